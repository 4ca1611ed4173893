"""What `apply` was asked for, parsed once: units and branches, costs, and what may remain."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_polar.costs.count import sizes_known, unknown_macs
from keras_polar.costs.latency import LatencyTable
from keras_polar.costs.measures import MEASURES, Measure, cost_of
from keras_polar.coupling.branches import Branch
from keras_polar.coupling.coupling import Coupling, analyze, ignoring, keeping, why_fixed
from keras_polar.gates.gate import Gate
from keras_polar.gates.objective import BY_GATES
from keras_polar.gates.schedule import Schedule
from keras_polar.gates.template import GATES, template_of
from keras_polar.graph.quantized import why_altered
from keras_polar.graph.trace import OPEN_LENGTH
from keras_polar.litert.measure_latency import measured_table
from keras_polar.selection.budget import Budget, budget_of, usual_floors
from keras_polar.selection.equal import equal_groups
from keras_polar.selection.importance import CRITERIA, Importance
from keras_polar.selection.select import below_usual
from keras_polar.surgery.tasks import widths_of_head, writes
from keras_polar.surgery.writers import Equal, expressible
from keras_polar.training.gate_specs import GateSpec, branches_of, gate_specs
from keras_polar.training.teaching import Teaching, teaching_of

GRANULARITIES = ("channels", "blocks")
IMPORTANCES = (*BY_GATES, *CRITERIA)
LISTED = 8  # groups that a warning names


@dataclass(frozen=True)
class Options:
    """The arguments of `apply`, checked; see there."""

    sparsity: float
    measure: str | Measure
    gate: str | Gate
    granularity: tuple[str, ...]
    ignore: Iterable[str]
    round_to: int | None
    min_units: int
    max_sparsity: float | Mapping[str, float] | None
    schedule: Schedule
    compact: bool
    latency_table: LatencyTable | str | os.PathLike | None
    importance: str | Importance
    teacher: Any = None
    equal: Iterable[str] = ()

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        _check_names(self)
        _check_numbers(self)
        if not isinstance(self.schedule, Schedule):
            raise TypeError(
                "apply: expected schedule as a keras_polar.Schedule or None, received "
                f"{self.schedule!r}."
            )


@dataclass(frozen=True, eq=False)
class PruningProblem:
    """What the gates of a model have to decide, and what may remain.

    Attributes:
        options: what was asked for.
        coupling: the units of the model, those of ignored layers kept.
        branches: the residual branches that may go as a whole.
        measure: what `sparsity` is a share of.
        budget: what the settled network may cost.
        specs: one per gate, in the order of the budget's variables.
        gate: the gates are made like it.
        teaching: what the network learns from a teacher, if there is one.
    """

    options: Options
    coupling: Coupling
    branches: tuple[Branch, ...]
    measure: Measure
    budget: Budget
    specs: tuple[GateSpec, ...]
    gate: Gate
    teaching: Teaching | None


def pruning_problem(model: Any, options: Options, task: Any = None) -> PruningProblem:
    """From a model and the options of `apply` to what is to be decided.

    Args:
        task: the model whose network `model` is.

    Raises:
        TypeError, ValueError: as `apply`.
    """
    gate = template_of(options.gate)
    whole = analyze(model)
    teaching = teaching_of(options.teacher, whole.graph)
    features = () if teaching is None else teaching.features
    comparable = keeping(whole, features, "is compared with the teacher")
    head = widths_of_head(model, whole.sites)
    comparable = keeping(comparable, head, "is in the head of a task, whose class says its width")
    ignore = [*options.ignore, *head] if head else options.ignore
    coupling = ignoring(comparable, options.ignore if "channels" in options.granularity else "*")
    equal: tuple = ()
    if writes(task):
        coupling, equal = expressible(coupling, task)
        _refuse_branches(options, task)
    branches = branches_of(coupling, ignore) if "blocks" in options.granularity else ()
    names = [site.name for site in coupling.sites]
    branches = tuple(b for b in branches if not {names[i] for i in b.calls}.intersection(features))
    if not coupling.groups and not branches:
        raise ValueError(
            f"apply: nothing in model {model.name!r} can be pruned. "
            f"{_why_nothing(coupling, options.granularity)}. See keras_polar.inspect(model)."
        )
    _warn_of_open_sizes(whole, model)
    measure = _measure(options, model, whole)
    cost = cost_of(coupling, measure, branches, whole)
    budget = budget_of(
        coupling,
        branches,
        cost,
        sparsity=float(options.sparsity),
        measure=measure.name,
        min_units=options.min_units,
        max_sparsity=options.max_sparsity,
        round_to=_rounding(options.round_to, coupling, equal),
        equal=equal_groups(coupling, options.equal, [e.names for e in equal]),
    )
    _warn_of_low_groups(coupling, budget, measure.name, options)
    specs = gate_specs(coupling, branches, budget.floors)
    return PruningProblem(
        options, coupling, branches, measure, budget, tuple(specs), gate, teaching
    )


def _rounding(round_to: int | None, coupling: Coupling, equal: Iterable[Equal]) -> Any:
    """What counts are multiples of: one for all groups, or one for each if settings say so."""
    steps = {name: e.step for e in equal for name in e.names if e.step > 1}
    if not steps:
        return round_to
    return tuple(math.lcm(round_to or 1, steps.get(g.name, 1)) for g in coupling.groups)


def _refuse_branches(options: Options, task: Any) -> None:
    if "blocks" in options.granularity:
        raise ValueError(
            f"apply: expected granularity='channels' for {type(task).__name__} {task.name!r}, "
            f"received {options.granularity}. All layers of a {type(task.backbone).__name__} have "
            "the same parts."
        )


# --- the options -----------------------------------------------------------------------------


def _check_sparsity(sparsity: Any) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.floating)):
        raise TypeError(f"apply: expected sparsity as a number in (0, 1), received {sparsity!r}.")
    if not 0 < sparsity < 1:
        raise ValueError(
            "apply: expected 0 < sparsity < 1, the share to be removed (0.5 removes half), "
            f"received {sparsity}."
        )


def _check_names(options: Options) -> None:
    granularity = options.granularity
    measures = (*MEASURES, LatencyTable.name)
    _check_name("measure", options.measure, measures, Measure)
    _check_name("gate", options.gate, tuple(GATES), Gate)
    _check_name("importance", options.importance, IMPORTANCES, Importance)
    for kind in granularity or (granularity,):
        _check_name("granularity", kind, GRANULARITIES)


def _check_name(name: str, value: Any, known: tuple, kind: type | None = None) -> None:
    """Raises unless an argument is a known name, or an object of the kind that it takes as well."""
    if (kind is not None and isinstance(value, kind)) or value in known:
        return
    is_class = isinstance(value, type) and kind is not None and issubclass(value, kind)
    remedy = f" or a keras_polar.{kind.__name__}" if kind is not None else ""
    instance = f" Pass an object of it: {name}={value.__name__}()." if is_class else ""
    raise ValueError(
        f"apply: expected {name} to be one of {known}{remedy}, received {value!r}.{instance}"
    )


def _check_numbers(options: Options) -> None:
    for name, value in (("round_to", options.round_to), ("min_units", options.min_units)):
        if name == "round_to" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"apply: expected {name} as an int >= 1, received {value!r}.")
    most = options.max_sparsity
    limits = most.values() if isinstance(most, Mapping) else [most]
    if not all(x is None or _is_share(x) for x in limits):
        raise ValueError(
            "apply: expected max_sparsity as a number in [0, 1] or {layer name: number in [0, 1]}, "
            f"received {most!r}."
        )


def _is_share(x: Any) -> bool:
    is_number = isinstance(x, (int, float, np.floating)) and not isinstance(x, bool)
    return is_number and 0 <= x <= 1


# --- the measure -----------------------------------------------------------------------------


def _measure(options: Options, model: Any, whole: Coupling) -> Measure:
    """The measure of a name, once it is known that it can be taken of the model."""
    known = {**MEASURES, LatencyTable.name: LatencyTable}
    measure: Any = known.get(options.measure, options.measure)  # type: ignore[arg-type]
    _check_sizes(measure, whole, model)
    _check_macs(measure, whole, model)
    table = options.latency_table
    if measure is LatencyTable:
        return _table(table, model, whole)
    if table is not None:
        raise ValueError(
            f"apply: latency_table is for measure='latency'; received measure={options.measure!r}."
        )
    return measure


def _table(table: Any, model: Any, whole: Coupling) -> LatencyTable:
    if table is None:
        return measured_table(whole, model.name)
    if isinstance(table, (str, os.PathLike)):
        return LatencyTable.load(table)
    if not isinstance(table, LatencyTable):
        raise TypeError(
            "apply: expected latency_table as a keras_polar.LatencyTable, the path of one or None, "
            f"received {table!r}."
        )
    return table


def _check_sizes(measure: Any, coupling: Coupling, model: Any) -> None:
    if measure.needs_sizes and not sizes_known(coupling):
        raise ValueError(
            f"apply: measure={measure.name!r} needs known sizes, but tensors of model "
            f"{model.name!r} have unknown ones. Build it on `keras.Input` with all sizes, or use "
            "measure='weights'."
        )


def _check_macs(measure: Any, coupling: Coupling, model: Any) -> None:
    unknown = unknown_macs(coupling) if measure.needs_macs else {}
    if not unknown:
        return
    kinds = {n: f"{n} ({type(s.op).__name__})" for n, s in unknown.items()}
    trained = [kinds[n] for n, s in unknown.items() if getattr(s.op, "weights", ())]
    text = (
        f"apply: measure={measure.name!r} needs to know what every layer computes, but nobody can "
        f"count the multiply-accumulates of {', '.join(trained or kinds.values())} in model "
        f"{model.name!r}"
    )
    remedy = (
        "Use measure='weights', or tell with keras_polar.register(<class>, <a keras_polar.Rule "
        "with `macs`>)"
    )
    if trained:
        raise ValueError(f"{text}. {remedy}.")
    warnings.warn(f"{text}: they count as none. {remedy}.", stacklevel=5)  # at the call of `apply`


# --- what is in the way ----------------------------------------------------------------------


def _why_nothing(coupling: Coupling, kinds: tuple) -> str:
    if "channels" not in kinds:
        return "It has no residual branch that could go as a whole"
    why = [*_reasons(coupling)]
    of_size = [x for x in why if OPEN_LENGTH in x]
    why = [*of_size[:1], *(x for x in why if OPEN_LENGTH not in x)]
    return "; ".join(why) or "It has no layer whose units could go"


def _reasons(coupling: Coupling) -> Iterator[str]:
    """Why units stay, layer by layer; what was changed first."""
    altered = {s.name: why_altered(s.op, s.rule.cuts_adapters) for s in coupling.sites}
    yield from (f"{name}: {reason}" for name, reason in altered.items() if reason)
    yield from (f"{n}: {why_fixed(coupling, v)}" for n, v in coupling.produced().items())
    for site in coupling.sites:
        has_say = site.call.note or getattr(site.op, "weights", None)
        if site.refused and has_say and not altered[site.name]:
            yield f"{site.name}: {site.refused}"


def _warn_of_open_sizes(coupling: Coupling, model: Any) -> None:
    closed = {s.name: None for s in coupling.sites if s.call.note.startswith(OPEN_LENGTH)}
    if closed:
        warnings.warn(
            f"apply: {', '.join(closed)} of model {model.name!r} stay as they are, for "
            f"{OPEN_LENGTH}. keras_polar.inspect(model) says what can be pruned.",
            stacklevel=4,  # at the call of `apply`
        )


def _warn_of_low_groups(coupling: Coupling, budget: Budget, measure: str, options: Options) -> None:
    def floors(sparsity: float) -> list[int]:
        limits = (options.min_units, options.max_sparsity, budget.equal)
        return usual_floors(coupling, sparsity, *limits)

    low, enough = below_usual(coupling, budget, floors)
    if low:
        more = f" and {len(low) - LISTED} more" if len(low) > LISTED else ""
        less = f"Ask for less (up to {enough:g} they keep it)" if enough else "Ask for less"
        warnings.warn(
            f"apply: sparsity={budget.sparsity:g} of the {measure} can only be reached with less "
            f"in some groups than usually stays: {', '.join(low[:LISTED])}{more}. {less}, keep "
            "layers whole with `ignore`, or say with `max_sparsity` what share of each group may "
            "go (1.0: all but min_units).",
            stacklevel=4,  # at the call of `apply`
        )
