"""What averages over units (LayerNormalization, say) does so over the open ones.

Masks in front of it are not enough: a closed unit that arrives as zero counts in a mean. So the
layer is given the gates, by which its units are weighed: `mean = sum(g * x) / sum(g)`. Per sample,
where gates decide for each; to the same as in the layer itself, where all are open. The gradient of
a gate says what the statistics would be with a little less of its unit.
"""

from typing import Any

import keras

from keras_polar.gates.gate import PACKAGE
from keras_polar.gates.mask import gates_along
from keras_polar.gates.stand_in import StandIn, inside_of
from keras_polar.graph.keras_private import hand_on_masks
from keras_polar.rules.registry import add, rule_for
from keras_polar.rules.rule import PinRule


@keras.saving.register_keras_serializable(PACKAGE)
class OverOpen(StandIn):
    """Computes what a layer does that averages over units, as if those closed were not there.

    Args:
        layer: the layer, built; its rule says how (`Rule.over_open`).
        along: the axis of the units in the first tensor it is called on.
        places: for every unit there its gate among the concatenated ones, or one past the end for
            units without a gate; None where the one gate fits as it is.
    """

    along, places = -1, None  # attributes of its own, even if the layer has some of these names

    def __init__(self, layer: Any, along: int, places: list | None = None, **kwargs: Any) -> None:
        super().__init__(layer, autocast=False, **kwargs)
        self.along, self.places = along, places

    def call(self, gates: list, *args: Any, options: dict | None = None, **tensors: Any) -> Any:
        kwargs = {**tensors, **(options or {})}
        first, *_ = [*args, *kwargs.values()]
        share = gates_along(gates, self.places, self.along, len(first.shape))
        cast = _cast_for(self.layer, (args, kwargs))
        outputs = rule_for(self.layer).over_open(self.layer, share, *cast[0], **cast[1])
        hand_on_masks(self.layer, args, kwargs, outputs)
        return outputs

    @property
    def activity_regularizer(self) -> Any:
        """That of the layer, whose own call would add its loss."""
        inside = inside_of(self)
        return None if inside is None else inside.activity_regularizer

    @activity_regularizer.setter
    def activity_regularizer(self, value: Any) -> None:
        inside = inside_of(self)
        if inside is not None:
            inside.activity_regularizer = value

    def get_config(self) -> dict:
        return {**super().get_config(), "along": self.along, "places": self.places}


# Not to be replaced by the operations that its call consists of: `strip` takes the layer out.
add(PinRule("computes by gates", counts=False), OverOpen)


def _cast_for(layer: Any, arguments: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """The arguments of a call in the types in which Keras would hand them to the layer."""

    def cast(x: Any) -> Any:
        return layer.dtype_policy.convert_input(x, layer.autocast, layer.input_dtype)

    return keras.tree.map_structure(cast, arguments)
