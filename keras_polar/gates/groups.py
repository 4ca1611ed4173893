"""The groups of a gated model, and what its gates say about the model without them."""

from typing import Any

import keras
import numpy as np

from keras_polar.backends import to_numpy
from keras_polar.gates.gate import Gate


class GateGroup:
    """A view of one group of units that are decided together.

    Attributes:
        name: of the group, after its first layer.
        layers: names of the layers that produce its units; of a residual branch, those in it.
        units: number of units; 1 for a branch.
        members: layer -> for each unit it makes, its place in this group or -1; None for all in
            order. Empty for a branch.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.name, self.layers, self.units = gate.group, list(gate.producers), gate.units
        self.members = gate.members

    @property
    def is_block(self) -> bool:
        """Whether it is a residual branch that stays or goes as a whole."""
        return not self.members

    @property
    def open_rates(self) -> np.ndarray:
        """Moving average of each unit's gate over the samples, float32 of shape (units,)."""
        return to_numpy(self._gate.open_rates)

    @property
    def mask(self) -> np.ndarray:
        """The consensus, True for units that stay, bool of shape (units,)."""
        return to_numpy(self._gate.consensus()) > 0.5

    @property
    def settled(self) -> bool:
        """Whether the mask is fixed."""
        return bool(to_numpy(self._gate.settled) > 0.5)

    def set_mask(self, mask: Any) -> None:
        """Fixes the mask of this group by hand.

        Args:
            mask: bool of shape (units,), True for units that stay.

        Raises:
            ValueError: wrong shape or dtype, or no unit would stay.
        """
        mask = np.asarray(mask)
        if mask.shape != (self.units,) or mask.dtype != bool:
            raise ValueError(
                f"set_mask of group {self.name!r}: expected a bool array of shape ({self.units},), "
                f"received {mask.dtype} of shape {mask.shape}."
            )
        if not mask.any() and not self.is_block:
            raise ValueError(
                f"set_mask of group {self.name!r}: the mask closes all {self.units} units of "
                f"{', '.join(self.layers)}. Leave at least one open."
            )
        self._gate.settled_mask.assign(mask.astype("float32"))
        self._gate.open_rates.assign(mask.astype("float32"))
        self._gate.settled.assign(1.0)

    def __repr__(self) -> str:
        return f"<group {self.name!r}: {int(self.mask.sum())} of {self.units} units open>"


# --- reading a gated model -------------------------------------------------------------------


def is_gated(model: Any) -> bool:
    """Whether a model has gates."""
    return isinstance(model, keras.Model) and any(
        isinstance(x, Gate) for x in getattr(model, "layers", [])
    )


def require_gated(model: Any, what: str) -> None:
    """Raises a TypeError if `model` has no gates."""
    if not is_gated(model):
        name = f"{model.name!r} without gates" if isinstance(model, keras.Model) else ""
        raise TypeError(
            f"{what}: expected a gated model, as keras_polar.apply returns it; received "
            f"{type(model).__name__} {name}. Call `gated = keras_polar.apply(model, sparsity=0.5)` "
            "and train that; one saved on disk is read with `keras.models.load_model`."
        )
