"""Tables: what a model costs, and which of its units can be pruned."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from keras_polar.costs.count import Cost, counted
from keras_polar.costs.measures import MEASURES, cost_of
from keras_polar.coupling.coupling import Coupling, couple, why_fixed
from keras_polar.gates.groups import is_gated
from keras_polar.graph.subclassed import as_functional
from keras_polar.rules import is_unknown, trace_model
from keras_polar.surgery.strip import stripped
from keras_polar.surgery.tasks import writes
from keras_polar.surgery.writers import as_network, expressible
from keras_polar.tables import table_html, table_text
from keras_polar.training.gate_specs import branches_of


def cost(model: Any, *, input_shape: Any = None) -> Cost:
    """Counts weights, multiply-accumulates and units of a functional model, layer by layer.

    Args:
        model: a functional or built Sequential Keras model. Gates are left out: of a gated model
            the whole network is counted, but for residual branches that are closed.
        input_shape: of a subclassed network, as for `keras_polar.apply`.

    Returns:
        `Cost` with the totals as ints, and `.rows`; `print(cost(model))` shows a table.

    Raises:
        TypeError: the model is not functional and cannot be made so.

    Example:

        >>> keras_polar.cost(keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])).weights
        36
    """
    return counted(_coupled(as_functional(model, input_shape)))


def _coupled(model: Any, ignore: Iterable[str] = ()) -> Coupling:
    return couple(stripped(model) if is_gated(model) else trace_model(model), ignore)


@dataclass(frozen=True)
class InspectRow:
    """One layer that makes units.

    Attributes:
        name: of the layer.
        kind: its class.
        units: channels or neurons it makes.
        prunable: how many of them can go, were there no sparsity to meet.
        group: the group they belong to; groups joined by ", " if several; empty if none.
        reason: why units stay; empty if all can go.
        weights_share, macs_share: the layer's share of the model's cost, in [0, 1]; of the
            multiply-accumulates None if nobody can count those of the layer.
    """

    name: str
    kind: str
    units: int
    prunable: int
    group: str
    reason: str
    weights_share: float
    macs_share: float | None


@dataclass(frozen=True)
class Inspection:
    """Which units of a model can be pruned; `rows` has one entry per layer that makes units.

    Attributes:
        model: its name.
        rows: one entry per layer that makes units, or that no rule is known for.
        prunable_weights, prunable_macs: the share of the model's weights (multiply-accumulates)
            that is gone when every group keeps one unit, in [0, 1]. This is the largest
            `sparsity` that `keras_polar.apply` can be asked for with `min_units=1`.
            Multiply-accumulates are those that can be counted.
        branches: the residual branches that can go as a whole (`granularity="blocks"`), each as
            the names of its layers.
        unknown: names of the layers whose multiply-accumulates nobody can count: shares of them
            are shares of all others'.
    """

    model: str
    rows: tuple[InspectRow, ...]
    prunable_weights: float
    prunable_macs: float
    branches: tuple[tuple[str, ...], ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def prunable(self) -> float:
        """Share of all units that can go."""
        return sum(r.prunable for r in self.rows) / max(1, sum(r.units for r in self.rows))

    def _table(self) -> tuple:
        columns = ["layer", "kind", "units", "prunable", "group", "weights", "MACs", "why not"]
        rows = [
            (
                *(r.name, r.kind, str(r.units), str(r.prunable), r.group),
                *(f"{r.weights_share:.1%}", _percent(r.macs_share), r.reason),
            )
            for r in self.rows
        ]
        which = f" that can be counted (not those of {', '.join(self.unknown)})"
        note = (
            f"{self.model}: {self.prunable:.1%} of the units can be pruned, and with one unit left "
            f"per group {self.prunable_weights:.1%} of the weights and {self.prunable_macs:.1%} of "
            f"the MACs{which if self.unknown else ''} are gone. "
            f"Residual branches that can go as a whole: {len(self.branches)}"
        )
        return columns, rows, note

    def __str__(self) -> str:
        return table_text(*self._table())

    def _repr_html_(self) -> str:
        return table_html(*self._table())


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.1%}"


def inspect(model: Any, *, ignore: Iterable[str] = (), input_shape: Any = None) -> Inspection:
    """Says of every layer which of its units can be pruned, with which others, or why not.

    Args:
        model: a functional or built Sequential Keras model; gates are left out.
        ignore: as for `keras_polar.apply`.
        input_shape: of a subclassed network, or a task that writes texts, as for
            `keras_polar.apply`.

    Raises:
        TypeError: the model is not functional and cannot be made so.
        ValueError: nobody knows at which length such a task is to be looked at.

    Example:

        >>> print(keras_polar.inspect(model))
    """
    coupling = _coupled(as_network(model, input_shape), ignore)
    if writes(model):
        coupling, _ = expressible(coupling, model)
    found = counted(coupling)
    rows = _layer_rows(coupling, _shares(found))
    shares = [_removable(coupling, measure) for measure in ("weights", "macs")]
    found_branches = () if writes(model) else branches_of(coupling, ignore)
    branches = tuple(branch.layers for branch in found_branches)
    return Inspection(model.name, tuple(rows), shares[0], shares[1], branches, found.unknown)


def _shares(totals: Cost) -> dict[str, tuple[float, float | None]]:
    """Each layer's shares of the weights and multiply-accumulates, all its calls together."""
    costs: dict[str, Counter] = {}
    for row in totals.rows:
        costs.setdefault(row.name, Counter()).update(weights=row.weights, macs=row.macs)
    return {
        name: (
            own["weights"] / max(1, totals.weights),
            None if name in totals.unknown else own["macs"] / max(1, totals.macs),
        )
        for name, own in costs.items()
    }


def _layer_rows(coupling: Coupling, shares: dict) -> list[InspectRow]:
    kinds = {s.name: type(s.op).__name__ for s in coupling.sites}
    rows = []
    for name, vector in coupling.produced().items():
        group = coupling.group_of[vector]
        names = dict.fromkeys(coupling.groups[i].name for i in group[group >= 0].tolist())
        can_go = int((group >= 0).sum())
        reason = why_fixed(coupling, vector[group < 0]) if can_go < len(vector) else ""
        rows.append(
            InspectRow(
                name, kinds[name], len(vector), can_go, ", ".join(names), reason, *shares[name]
            )
        )
    return rows + _unknown_rows(coupling, shares)


def _removable(coupling: Coupling, measure: str) -> float:
    """Share of a cost that is gone when every group keeps one unit."""
    total = cost_of(coupling, MEASURES[measure])
    full = total([g.units for g in coupling.groups])
    return 1 - total([1] * len(coupling.groups)) / full if full else 0.0


def _unknown_rows(coupling: Coupling, shares: dict) -> list[InspectRow]:
    """Layers of unknown cost, or with weights, that their rule cannot follow units through."""
    unknown = {
        s.name: s
        for s in coupling.sites
        if s.refused and (is_unknown(s.op) or s.macs is None or getattr(s.op, "weights", None))
    }
    return [
        InspectRow(name, type(site.op).__name__, 0, 0, "", site.refused, *shares[name])
        for name, site in unknown.items()
    ]
