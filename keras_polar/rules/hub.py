"""Layers of KerasHub that make or add to the stream of a network out of variables of their own.

They are known by their full names: KerasHub need not be installed.
"""

import math
from typing import Any

from keras_polar.rules.call_site import CallSite
from keras_polar.rules.custom import TracedRule
from keras_polar.rules.ids import Ids, broadcast_along, varies
from keras_polar.rules.pooling_norm import AlongRule
from keras_polar.rules.registry import add_by_name
from keras_polar.rules.rule import CostTerm, KeptUnits, Rule


class PositionEmbeddingRule(Rule):
    """A vector for each position, as wide as the input, of which only the shape is looked at."""

    def flow(self, site: CallSite) -> list[Ids]:
        if len(site.inputs) > 1:
            return site.pin_all("is told its positions")
        ids = site.inputs[0]
        return [broadcast_along(site.follow("channels", -1), ids.ndim - 1, ids.shape)]

    def weights(self, op: Any) -> dict[str, tuple]:
        return {"position_embeddings": (None, "channels")}


class PatchesRule(Rule):
    """ViT's first layer: patches of an image as vectors, a class token, a vector per position."""

    def flow(self, site: CallSite) -> list[Ids]:
        site.pin(site.inputs[0], "is cut into patches")
        return [site.produce("out", site.op.hidden_dim, -1)]

    def weights(self, op: Any) -> dict[str, tuple]:
        return {
            "class_token": (None, None, "out"),
            "patch_embedding.kernel": (None, None, None, "out"),
            "patch_embedding.bias": ("out",),
            "position_embedding.embeddings": (None, "out"),
        }

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        # Its own config leaves out the last two.
        options = {n: getattr(site.op, n) for n in ("use_patch_bias", "data_format")}
        return {"hidden_dim": kept.count(site.axes["out"]), **options}

    def macs(self, site: CallSite) -> list[CostTerm]:
        *kernel, _ = site.op.patch_embedding.kernel.shape
        return [CostTerm((site.axes["out"],), macs=site.op.num_patches * math.prod(kernel))]


class ChannelNormRule(TracedRule):
    """Normalises the channels of each head, or of the stream: then its call is traced."""

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,) = site.inputs
        return super().flow(site) if varies(ids, ids.ndim - 1) else [ids]


def _positions_and_channels(op: Any, ndim: int) -> tuple:
    return op.sequence_axis, op.feature_axis


add_by_name(
    AlongRule("turns channels by their positions", _positions_and_channels),
    "keras_hub.src.layers.modeling.rotary_embedding.RotaryEmbedding",
    "keras_hub.src.models.llama.llama_rotary_embedding.LlamaRotaryEmbedding",
    "keras_hub.src.models.phi3.phi3_rotary_embedding.Phi3SuScaledRotaryEmbedding",
)
add_by_name(ChannelNormRule(), "keras_hub.src.models.qwen3.qwen3_layernorm.Qwen3LayerNorm")
add_by_name(
    PositionEmbeddingRule(), "keras_hub.src.layers.modeling.position_embedding.PositionEmbedding"
)
add_by_name(PatchesRule(), "keras_hub.src.models.vit.vit_layers.ViTPatchingAndEmbedding")
