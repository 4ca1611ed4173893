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
from keras_polar.gates.stand_in import StandIn, inside_of, unpack
from keras_polar.graph.keras_private import hand_on_masks
from keras_polar.rules.registry import add, rule_for
from keras_polar.rules.rule import PinRule


@keras.saving.register_keras_serializable(PACKAGE)
class OverOpen(StandIn):
    """Computes what a layer does that averages over units, as if those closed were not there.

    Args:
        layer: the layer, built, or an operation; its rule says how (`Rule.over_open`).
        along: the axis of the units in the first tensor it is called on.
        places: for every unit there its gate among the concatenated ones, or one past the end for
            units without a gate; None where the one gate fits as it is.
    """

    along, places = -1, None  # attributes of its own, even if the layer has some of these names

    def __init__(self, layer: Any, along: int, places: list | None = None, **kwargs: Any) -> None:
        super().__init__(layer, autocast=getattr(layer, "autocast", False), **kwargs)
        self.along, self.places = along, places

    def call(self, gates: list, *args: Any, options: dict | None = None, **tensors: Any) -> Any:
        kwargs = {**tensors, **(options or {})}
        first, *_ = [*args, *kwargs.values()]
        share = gates_along(gates, self.places, self.along, len(first.shape))
        outputs = rule_for(self.layer).over_open(self.layer, share, *args, **kwargs)
        hand_on_masks(self.layer, args, kwargs, outputs)
        return outputs

    @property
    def activity_regularizer(self) -> Any:
        """That of the layer, whose own call would add its loss."""
        inside = inside_of(self)
        return getattr(inside, "activity_regularizer", None)

    @activity_regularizer.setter
    def activity_regularizer(self, value: Any) -> None:
        inside = inside_of(self)
        if isinstance(inside, keras.layers.Layer):
            inside.activity_regularizer = value

    def compute_output_spec(self, gates: list, *args: Any, **kwargs: Any) -> Any:
        """By the call itself on symbolic tensors: rules may have to look at them beforehand."""
        kwargs.pop("training", None)
        outputs = self.call(gates, *args, **kwargs)
        specs = keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape, x.dtype), outputs)
        hand_on_masks(self.layer, args, unpack(kwargs), specs)
        return specs

    def get_config(self) -> dict:
        return {**super().get_config(), "along": self.along, "places": self.places}


# Not to be replaced by the operations that its call consists of: `strip` takes the layer out.
add(PinRule("computes by gates", counts=False), OverOpen)
