"""Attention: heads and widths of multi-head layers, and the layers without weights of their own."""

import math
from typing import Any

import numpy as np
from keras import layers

from keras_polar.backends import WANTS_EQUAL_WIDTHS
from keras_polar.graph.clone import variable_at
from keras_polar.graph.keras_private import attended_axes, is_fused_attention
from keras_polar.rules.call_site import CallSite, sizes
from keras_polar.rules.ids import broadcast_along, no_unit
from keras_polar.rules.registry import add
from keras_polar.rules.rule import CostTerm, KeptUnits, Rule

MASKS = ("query_mask", "value_mask", "key_mask", "attention_mask")


class MultiHeadRule(Rule):
    """What MultiHeadAttention and GroupedQueryAttention have in common.

    Their units are the heads, the widths that all heads share, and the output's channels. Heads
    and the value width are read by the output projection. A closed unit of the key width is one
    product less in the dot product of query and key: the query projection is masked.

    In names of axes, `q` is the head axis of queries, `kv` that of keys and values, `key` and
    `value` are the widths.
    """

    def flow(self, site: CallSite) -> list:
        arguments = site.given()
        query, value = (site.place(arguments.get(name)) for name in ("query", "value"))
        key = site.place(arguments["key"]) if "key" in arguments else value
        if min(query, value, key) < 0:
            return site.pin_all("attends to something that is not a tensor of the model")
        for name, tensor in (("query_in", query), ("value_in", value), ("key_in", key)):
            site.read(name, -1, tensor)
        for name in MASKS:
            site.pin_argument(arguments.get(name), "is used as a mask")
        self.make_heads(site)
        self._read_inside(site)
        if _has_mask_per_head(site, arguments.get("attention_mask"), query):
            site.pin(site.axes["q"], "has an attention mask for every head")
        return self._outputs(site)

    def make_heads(self, site: CallSite) -> None:
        """Names the axes "q", "kv", "key" and "value"."""
        raise NotImplementedError

    def _read_inside(self, site: CallSite) -> None:
        site.read_inside("_output_dense.kernel", 0)
        site.read_inside("_output_dense.kernel", 1)
        site.read_inside("_query_dense.kernel", 2)
        if variable_at(site.op, "_query_dense.bias") is not None:
            site.read_inside("_query_dense.bias", 1)

    def _outputs(self, site: CallSite) -> list:
        width = site.output_shapes[0][-1]
        outputs = [site.produce("out", width, -1)]
        for shape in site.output_shapes[1:]:  # the attention scores: batch, heads, ...
            if len(shape) == 4:
                outputs.append(broadcast_along(site.axes["q"], 1, shape))
            else:
                site.pin(site.axes["q"], "returns its scores for several attention axes")
                outputs.append(no_unit(shape))
        return outputs

    def weights(self, op: Any) -> dict[str, tuple]:
        projections = {
            "_query_dense.kernel": ("query_in", "q", "key"),
            "_query_dense.bias": ("q", "key"),
            "_key_dense.kernel": ("key_in", "kv", "key"),
            "_key_dense.bias": ("kv", "key"),
            "_value_dense.kernel": ("value_in", "kv", "value"),
            "_value_dense.bias": ("kv", "value"),
            "_gate_dense.kernel": ("query_in", "q", "value"),
            "_gate_dense.bias": ("q", "value"),
        }
        # The output may have several axes: the units are the last one's.
        other = (None,) * (len(variable_at(op, "_output_dense.kernel").shape) - 3)
        out = {"kernel": ("q", "value", *other, "out"), "bias": (*other, "out")}
        return projections | {f"_output_dense.{name}": axes for name, axes in out.items()}

    def factors(self, site: CallSite, kept: KeptUnits) -> dict[str, float]:
        # The layer divides by the root of its key width, which is smaller now.
        key = site.axes["key"]
        factor = math.sqrt(kept.count(key) / len(key))
        if factor == 1:
            return {}
        return {"_query_dense.kernel": factor, "_query_dense.bias": factor}

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        given, axes = site.given(), site.axes
        if "q" not in axes:
            return None
        query, value = site.place(given["query"]), site.place(given["value"])
        asked, known = site.positions(query), site.positions(value)
        scores = asked * self._attended(site, value)
        products = [
            (("query_in", "q", "key"), asked),
            (("key_in", "kv", "key"), known),
            (("value_in", "kv", "value"), known),
            (("q", "key"), scores),
            (("q", "value"), scores),
            (("q", "value", "out"), asked * math.prod(_other_output_axes(site))),
        ]
        if hasattr(site.op, "_gate_dense"):
            products.append((("query_in", "q", "value"), asked))
        return [CostTerm(tuple(axes[n] for n in names), macs=macs) for names, macs in products]

    def _attended(self, site: CallSite, value: int) -> int:
        """Number of positions that each position attends to."""
        shape = sizes(site.specs[site.call.inputs[value]].shape)
        return math.prod(shape[axis] for axis in attended_axes(site.op))


def _other_output_axes(site: CallSite) -> tuple:
    """Sizes of the output's own axes before that of the channels."""
    query = site.inputs[site.place(site.given()["query"])]
    return site.output_shapes[0][query.ndim - 1 : -1]


def _has_mask_per_head(site: CallSite, mask: Any, query: int) -> bool:
    """Whether an attention mask has an axis for the heads that is longer than one."""
    place = site.place(mask)
    shape = site.inputs[place].shape if place >= 0 else getattr(mask, "shape", ())
    attended = len(attended_axes(site.op))
    heads = len(shape) - 2 * attended - 1
    is_full = heads == len(site.inputs[query].shape) - 1 - attended
    return is_full and shape[heads] != 1


def _needs_equal_widths(op: Any) -> bool:
    """Whether `keras.ops.dot_product_attention` computes the layer, which on JAX wants that."""
    fused = WANTS_EQUAL_WIDTHS and is_fused_attention(op)
    return fused and op.key_dim == op.value_dim


class MultiHeadAttentionRule(MultiHeadRule):
    """Heads, key width and value width go independently; on JAX the two widths go together."""

    def make_heads(self, site: CallSite) -> None:
        site.set_axis("kv", site.produce_inside("q", site.op.num_heads))
        key = site.produce_inside("key", site.op.key_dim)
        value = site.produce_inside("value", site.op.value_dim)
        if _needs_equal_widths(site.op):
            why = f"JAX computes {site.name!r} with keys and values that are equally wide"
            site.units.tie(key, value, why)

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        count = {n: kept.count(site.axes[n]) for n in ("q", "key", "value", "out")}
        # Without an explicit shape the output would be as wide as the query.
        shape = (*_other_output_axes(site), count["out"])
        return {
            "num_heads": count["q"],
            "key_dim": count["key"],
            "value_dim": count["value"],
            "output_shape": shape,
        }


class GroupedQueryAttentionRule(MultiHeadRule):
    """Key and value heads go with their query heads, or one query head out of every group.

    Of the two the one that leaves more to choose from. There is one width for queries, keys and
    values, and the output is as wide as the query.
    """

    def make_heads(self, site: CallSite) -> None:
        op, repeats = site.op, site.op.num_repeats
        if op.num_key_value_heads >= repeats:
            q = site.produce_inside("q", op.num_key_value_heads, lambda x: np.repeat(x, repeats))
            site.set_axis("kv", q[::repeats])
        else:
            heads = op.num_key_value_heads
            site.produce_inside("q", repeats, lambda x: np.tile(x, heads))
            site.set_axis("kv", np.full(heads, -1, np.int32))
        width = site.produce_inside("key", op.head_dim)
        site.set_axis("value", width)

    def _outputs(self, site: CallSite) -> list:
        outputs = super()._outputs(site)
        why = f"{site.name!r} needs its output, query and value to be equally wide"
        for name in ("out", "value_in"):
            site.units.tie(site.axes["query_in"], site.axes[name], why)
        return outputs

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        return {
            "num_query_heads": kept.count(site.axes["q"]),
            "num_key_value_heads": kept.count(site.axes["kv"]),
            "head_dim": kept.count(site.axes["key"]),
        }


class PlainAttentionRule(Rule):
    """Attention and AdditiveAttention: query and key meet channel by channel and are summed up.

    The channels of the output are those of the value.
    """

    def flow(self, site: CallSite) -> list:
        tensors = site.given()["inputs"]
        query, value, key = (site.place(t) for t in (*tensors, tensors[1])[:3])
        if min(query, value, key) < 0:
            return site.pin_all("attends to something that is not a tensor of the model")
        site.pin_argument(site.given().get("mask"), "is used as a mask")
        site.read("in", -1, query)
        site.read("key_in", -1, key)
        why = f"query and key of {site.name!r} meet fixed elements"
        site.units.tie(site.axes["in"], site.axes["key_in"], why)
        out = site.follow("out", -1, value)
        shape, *scores = site.output_shapes
        return [broadcast_along(out, len(shape) - 1, shape), *map(no_unit, scores)]

    def weights(self, op: Any) -> dict[str, tuple]:
        scale = getattr(op, "scale", None)
        return {} if scale is None or not len(scale.shape) else {"scale": ("in",)}

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        if "in" not in site.axes:
            return None
        query, value = (site.place(t) for t in site.given()["inputs"][:2])
        positions = site.positions(query) * sizes(site.inputs[value].shape)[-2]
        return [CostTerm((site.axes[n],), macs=positions) for n in ("in", "out")]


add(MultiHeadAttentionRule(), layers.MultiHeadAttention)
add(GroupedQueryAttentionRule(), layers.GroupQueryAttention)
add(PlainAttentionRule(), layers.Attention, layers.AdditiveAttention)
