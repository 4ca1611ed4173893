"""The layers that keras.applications defines for its own models.

They are not registered for serialization, but Keras finds them by their module, so that a saved
model of theirs loads wherever Keras is.
"""

from typing import Any

from keras_polar.graph.ir import Call
from keras_polar.graph.keras_private import CustomScaleLayer, LayerScale, StochasticDepth
from keras_polar.rules.call_site import CallSite
from keras_polar.rules.elementwise import ElementwiseRule, MergeLayerRule
from keras_polar.rules.ids import Ids
from keras_polar.rules.registry import add
from keras_polar.rules.rule import KeptUnits, Rule


class LayerScaleRule(Rule):
    """ConvNeXt's factor per channel on the residual branch."""

    def flow(self, site: CallSite) -> list[Ids]:
        site.follow("channels", -1)
        return [site.inputs[0]]

    def weights(self, op: Any) -> dict[str, tuple]:
        return {"gamma": ("channels",)}

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        return {"projection_dim": kept.count(site.axes["channels"])}


class ScaledSumRule(MergeLayerRule):
    """Called on a list [shortcut, branch]: shortcut + scale * branch, the scale a Python number."""

    def summands(self, call: Call) -> tuple[int, ...]:
        return (1,)


add(LayerScaleRule(), LayerScale)
add(ElementwiseRule(), StochasticDepth)
add(ScaledSumRule(), CustomScaleLayer)
