"""Direct surgery: units go by their names, without gates and training."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_polar.coupling.coupling import Coupling, analyze
from keras_polar.gates.groups import is_gated
from keras_polar.graph.subclassed import as_functional
from keras_polar.rules import KeptUnits
from keras_polar.surgery.cut import cut


def remove(model: Any, units: Mapping[str, Any]) -> keras.Model:
    """Cuts units out of a model, without training; units that depend on them follow.

    Args:
        model: a functional or built Sequential Keras model; it is not changed.
        units: layer name -> indices of the units (channels, neurons) to cut. Units of other
            layers that are tied to them (by a residual sum, say) go as well.

    Returns:
        A smaller functional `keras.Model`.

    Raises:
        TypeError: the model is not functional, or `units` is not a dict.
        ValueError: the model has gates; unknown layer, index out of range, a unit that cannot go
            (says why), or a layer that would lose all its units.

    Example:

        >>> small = keras_polar.remove(model, {"conv1": [0, 3, 5]})
    """
    if not isinstance(units, Mapping):
        raise TypeError(
            "remove: expected a dict of layer name -> indices of units, {'conv1': [0, 3]} say; "
            f"received {units!r}."
        )
    if is_gated(model):
        raise ValueError(
            f"remove: model {model.name!r} has gates. `convert` it first and cut the result, or "
            "close units of the gated model with `gated.groups[i].set_mask(mask)`."
        )
    coupling = analyze(as_functional(model))
    produced = coupling.produced()
    flags = np.ones(len(coupling.roots), bool)
    for name, indices in units.items():
        flags[_roots_to_cut(coupling, produced, name, indices)] = False
    flags = flags[coupling.roots]
    _refuse_empty(coupling, flags)
    return cut(coupling, flags)


def _roots_to_cut(coupling: Coupling, produced: dict, name: str, indices: Any) -> np.ndarray:
    if name not in produced:
        raise ValueError(
            f"remove: expected the name of a layer with units; received {name!r}. "
            f"Layers with units: {', '.join(sorted(produced))}."
        )
    vector = produced[name]
    try:
        chosen = np.unique(np.asarray(indices).ravel())
    except ValueError:  # ragged
        chosen = np.array([np.nan])
    if chosen.size and (
        chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= len(vector)
    ):
        raise ValueError(
            f"remove: layer {name!r} has units 0 to {len(vector) - 1}; expected the indices of "
            f"those to cut, received {indices}."
        )
    roots = coupling.roots[vector[chosen.astype(int)]]
    for root in roots.tolist():
        if root in coupling.reasons:
            raise ValueError(
                f"remove: units of layer {name!r} cannot go: {coupling.reasons[root]}. "
                "keras_polar.inspect(model) lists the layers whose units can."
            )
    return roots


def _refuse_empty(coupling: Coupling, flags: np.ndarray) -> None:
    kept = KeptUnits(flags)
    for site in coupling.sites:
        for vector in site.axes.values():
            if len(vector) and not kept.count(vector):
                raise ValueError(
                    f"remove: layer {site.name!r} would lose all its {len(vector)} units. Leave at "
                    "least one, or remove the layer from the architecture."
                )
