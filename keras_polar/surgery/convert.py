"""From a plan of what stays to a physically smaller model: gated -> small, and direct surgery."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_polar.backends import to_numpy
from keras_polar.coupling.coupling import Coupling, couple
from keras_polar.gates.groups import require_gated
from keras_polar.graph.configs import repair_configs
from keras_polar.graph.ir import Graph
from keras_polar.graph.quantized import why_altered
from keras_polar.graph.rebuild import rebuild
from keras_polar.surgery.certificate import check_certificate
from keras_polar.surgery.cut import Cutter
from keras_polar.surgery.strip import flags_for, stripped
from keras_polar.surgery.tasks import put_together, writes
from keras_polar.surgery.writers import rewritten


def convert(gated: Any, *, verify: Any = None, into: Any = None) -> keras.Model:
    """The static sub-network of a gated model, as an ordinary smaller Keras model.

    Args:
        gated: what `keras_polar.apply` returned.
        verify: inputs of the model, or True for random ones (sizes that it leaves open are 32 in
            those): checks the certificate, that both models give the same outputs.
        into: the `keras_hub` task that `apply` was given, or one that is built like it: the result
            is a task of its class around the smaller backbone, with its preprocessor; one that
            writes texts has a backbone of its own class, of smaller sizes, and its sampler.

    Returns:
        A functional `keras.Model` of stock layers, with the weights of `gated`; not compiled.
        With `into`, the task.

    Raises:
        TypeError: `gated` has no gates, or `into` is no task.
        ValueError: a gated layer has been quantized since `apply`, the certificate does not hold
            (says by how much), the inputs do not fit, or the task of `into` cannot be made of what
            stays.

    Warns:
        UserWarning: the gates are not settled, and what their consensus removes by now is more
            than a point off the requested sparsity; or a task was pruned, and the result lacks its
            preprocessor.

    Example:

        >>> small = keras_polar.convert(gated, verify=True)
        >>> small.save("small.keras")
    """
    require_gated(gated, "convert")
    _warn_of_early_conversion(gated)
    small, cutter = small_twin(gated)
    repair_configs(small.layers)
    if verify is not None and verify is not False:
        if gated.pipeline is not None and verify is not True:
            verify = gated.pipeline.inputs(verify)
        check_certificate(gated, small, verify, cutter.first_difference)
    if into is not None:
        return rewritten(small, into) if writes(into) else put_together(small, into)
    _warn_of_lost_preprocessor(gated)
    return small


def _warn_of_lost_preprocessor(gated: Any) -> None:
    task = None if gated.pipeline is None else gated.pipeline.task
    if task is not None and task.preprocessor is not None:
        warnings.warn(
            f"convert({gated.name!r}): what you get takes inputs as "
            f"{type(task.preprocessor).__name__} makes them; raw ones give other answers. "
            "`convert(gated, into=task)` gives a task that preprocesses. For the network alone, "
            "set task.preprocessor = None before.",
            stacklevel=3,
        )


def _warn_of_early_conversion(gated: Any) -> None:
    wanted, found = gated.consensus.sparsity, gated.sparsity
    if not gated.settled and abs(found - wanted) > 0.01:
        warnings.warn(
            f"convert({gated.name!r}): the gates are not settled, and their consensus removes "
            f"{found:.1%} of the {gated.consensus.measure} by now instead of {wanted:.1%}. Let "
            "`fit` reach the settle step of the schedule, or call gated.settle() first."
            f"{_unfollowed(gated)}",
            stacklevel=3,
        )


def _unfollowed(gated: Any) -> str:
    """Of gates that were trained as if there were no schedule, or past its settle step."""
    schedule = gated.consensus.schedule
    step, steps = (int(to_numpy(v)) for v in (gated.consensus.step, gated.consensus.steps))
    if step < schedule.settle_step(steps or step):
        return ""
    return (
        " Nobody followed its training: `fit` of another model around it wants "
        "callbacks=[keras_polar.callbacks.Follow(gated)]."
    )


def small_twin(
    gated: Any, wrap: Callable[[Graph, Callable], Callable] = lambda _, visit: visit
) -> tuple[keras.Model, "Cutter"]:
    """The sub-network of a gated model, and the cutter that made it.

    Args:
        wrap: what to rebuild a graph with instead of the cutter's `visit`.
    """
    coupling = couple(stripped(gated))
    cutter = Cutter(coupling, _flags(gated, coupling))
    return rebuild(coupling.graph, wrap(coupling.graph, cutter.visit), keras.Model), cutter


def _flags(gated: Any, coupling: Coupling) -> np.ndarray:
    """What stays by the gates' consensus.

    Raises:
        ValueError: a layer cannot be cut any more.
    """
    made, flags = coupling.produced(), flags_for(gated, coupling)
    producers = {name for group in gated.groups for name in group.members}
    lost = [s for s in coupling.sites if s.name in producers - made.keys()]
    closed = np.unique(coupling.roots[~flags]).tolist()
    found = [(s.name, why_altered(s.op, s.rule.cuts_adapters)) for s in lost]
    reasons = [f"{name!r} {why or 'has no rule'}" for name, why in found]
    reasons += [coupling.reasons[root] for root in closed if root in coupling.reasons]
    if reasons:
        raise ValueError(
            f"convert: the closed units of {gated.name!r} cannot be cut out any more, for a layer "
            f"has changed since `apply`: {reasons[0]}. Load a gated model saved before that."
        )
    return flags
