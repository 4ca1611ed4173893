"""Tables of vectors: Embedding, and ReversibleEmbedding, which also maps back to the vocabulary."""

import math
from typing import Any

from keras import layers

from keras_polar.rules.call_site import CallSite
from keras_polar.rules.common import with_adapters
from keras_polar.rules.ids import Ids, no_unit
from keras_polar.rules.registry import add
from keras_polar.rules.rule import CostTerm, KeptUnits, Rule


class EmbeddingRule(Rule):
    """Makes the channels of its vectors; what it reads are numbers of rows, not units."""

    cuts_adapters = True

    def flow(self, site: CallSite) -> list[Ids]:
        site.pin(site.inputs[0], "is used as row numbers of a table")
        return [site.produce("out", site.op.output_dim, -1)]

    def weights(self, op: Any) -> dict[str, tuple]:
        return with_adapters(op, {"embeddings": (None, "out")})

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        return {"output_dim": kept.count(site.axes["out"])}

    def adapter_macs(self, site: CallSite) -> int:
        return math.prod(site.output_shapes[0][1:]) * site.op.lora_rank


class ReversibleEmbeddingRule(EmbeddingRule):
    """Called in reverse it reads the channels that it makes otherwise: the two are tied."""

    def flow(self, site: CallSite) -> list[Ids]:
        if not self._is_reverse(site):
            return super().flow(site)
        site.read("out", -1)
        return [no_unit(site.output_shapes[0])]

    def _is_reverse(self, site: CallSite) -> bool:
        return bool(site.given().get("reverse", False))

    def weights(self, op: Any) -> dict[str, tuple]:
        axes = {"embeddings": (None, "out"), "reverse_embeddings": ("out", None)}
        return with_adapters(op, axes)

    def adapter_macs(self, site: CallSite) -> int:
        return 0 if self._is_reverse(site) else super().adapter_macs(site)

    def macs(self, site: CallSite) -> list[CostTerm]:
        if not self._is_reverse(site):
            return []
        return [CostTerm((site.axes["out"],), macs=site.positions(0) * site.op.input_dim)]


add(EmbeddingRule(), layers.Embedding)
add(ReversibleEmbeddingRule(), layers.ReversibleEmbedding)
