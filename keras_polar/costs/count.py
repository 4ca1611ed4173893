"""What a model costs, counted layer by layer, and as terms of its units."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from keras_polar.coupling.coupling import Coupling
from keras_polar.rules import CallSite, CostTerm
from keras_polar.rules.call_site import weight_terms
from keras_polar.tables import table_html, table_text

COUNTED = ("weights", "macs", "units")


def terms(coupling: Coupling) -> list[tuple[int, CostTerm]]:
    """Every cost term of a graph, with its call; weights and units of what is shared once."""
    return [(i, t) for i, (_, own) in enumerate(_terms_by_call(coupling)) for t in own]


def _terms_by_call(coupling: Coupling) -> Iterator[tuple[CallSite, list[CostTerm]]]:
    seen: set[int] = set()
    for site in coupling.sites:
        yield site, _site_terms(site, seen)
        seen.update(map(id, (site.op, *getattr(site.op, "weights", ()))))


def _site_terms(site: CallSite, seen: set[int]) -> list[CostTerm]:
    """The terms of a call.

    Args:
        seen: ids of operations and variables that stand at earlier calls.
    """
    own = []
    if id(site.op) not in seen:
        own += weight_terms(site, site.rule.weights(site.op), seen)
        own += [CostTerm((site.axes[p],), units=1) for p in site.produces]
    return own + (site.macs or [])


@dataclass(frozen=True)
class CostRow:
    """The cost of one layer; a shared layer's weights stand at its first call."""

    name: str
    kind: str
    output_shape: tuple
    weights: int
    macs: int
    units: int
    macs_known: bool = True


@dataclass(frozen=True)
class Cost:
    """What a model costs; `rows` has one entry per layer.

    Attributes:
        weights: as `model.count_params()`.
        macs: multiply-accumulates for one sample: products that are summed up, as in convolutions,
            Dense layers and attention, not those of single elements or of weights among each
            other. Unknown spatial sizes count as 1; `sizes_known` says whether there are any.
        units: channels and neurons that weight layers produce.
        unknown: names of the layers whose multiply-accumulates nobody can count; they are not in
            `macs`, and their rows have `macs_known=False`.
    """

    weights: int
    macs: int
    units: int
    sizes_known: bool
    rows: tuple[CostRow, ...]
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        return table_text(*cost_table(self))

    def _repr_html_(self) -> str:
        return table_html(*cost_table(self))


def counted(coupling: Coupling) -> Cost:
    """The cost of a coupled graph, layer by layer."""
    rows = [_row(site, own) for site, own in _terms_by_call(coupling)]
    totals = {m: sum(getattr(r, m) for r in rows) for m in COUNTED}
    unknown = tuple(unknown_macs(coupling))
    return Cost(**totals, sizes_known=sizes_known(coupling), rows=tuple(rows), unknown=unknown)


def unknown_macs(coupling: Coupling) -> dict[str, CallSite]:
    """The layers whose multiply-accumulates are not known, by name."""
    return {s.name: s for s in coupling.sites if s.macs is None}


def sizes_known(coupling: Coupling) -> bool:
    """Whether all that a layer reads and computes has a static shape (but for the batch)."""
    computed = [s.call for s in coupling.sites if s.produces or s.macs]
    tensors = {i for call in computed for i in (*call.inputs, *call.outputs)}
    return all(None not in coupling.graph.specs[i].shape[1:] for i in tensors)


def _row(site: CallSite, cost_terms: list[CostTerm]) -> CostRow:
    def total(measure: str) -> int:
        return sum(getattr(t, measure) * math.prod(map(len, t.factors)) for t in cost_terms)

    shape = site.specs[site.call.outputs[0]].shape
    kind = type(site.op).__name__
    costs = total("weights"), total("macs"), total("units")
    return CostRow(site.name, kind, shape, *costs, macs_known=site.macs is not None)


def cost_table(cost: Cost) -> tuple:
    """The cost of a model as columns, rows and a note; a row per layer that costs anything."""
    # Rows of a layer that is called several times become one.
    layers: dict[str, list[CostRow]] = {}
    for row in cost.rows:
        layers.setdefault(row.name, []).append(row)
    rows = [
        (
            *(r.name, r.kind, str(r.output_shape), f"{r.weights:,}"),
            *(f"{r.macs:,}" if r.macs_known else "?", f"{r.units:,}"),
        )
        for r in map(_together, layers.values())
        if r.weights or r.macs or not r.macs_known
    ]
    macs = f"{cost.macs:,}" + " + ?" * bool(cost.unknown)
    total = ("total", "", "", f"{cost.weights:,}", macs, f"{cost.units:,}")
    notes = [
        "" if cost.sizes_known else "MACs per position: sizes of the input are not known",
        f"MACs that cannot be counted: {', '.join(cost.unknown)}" if cost.unknown else "",
    ]
    return ["layer", "kind", "output", *COUNTED], [*rows, total], ". ".join(filter(None, notes))


def _together(rows: Sequence[CostRow]) -> CostRow:
    costs = {m: sum(getattr(r, m) for r in rows) for m in COUNTED}
    return replace(rows[0], macs_known=all(r.macs_known for r in rows), **costs)
