"""Layers that mix units and make new ones: Dense and the convolutions."""

import math
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_polar.backends import to_numpy
from keras_polar.graph.ir import Ref
from keras_polar.graph.keras_private import op_class
from keras_polar.rules.activations import activated
from keras_polar.rules.call_site import CallSite
from keras_polar.rules.common import channel_axis, spread, widest, with_adapters
from keras_polar.rules.ids import Ids, no_unit, varies
from keras_polar.rules.registry import add
from keras_polar.rules.rule import CostTerm, KeptUnits, Rule


class DenseRule(Rule):
    """Reads and makes units on the last axis, at every position of the others.

    Of units on another axis (tokens are mixed, say) and its own, those are free that are more: an
    element of the output can belong to one unit only.
    """

    cuts_adapters = True

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,) = site.inputs
        axis = None if varies(ids, ids.ndim - 1) else widest(ids, {*range(1, ids.ndim - 1)})
        if axis is not None and ids.shape[axis] >= site.op.units:
            return activated(site, self._through(site, axis))
        site.read("in", -1, by=("kernel", 0))
        return activated(site, site.produce("out", site.op.units, -1))

    def _through(self, site: CallSite, axis: int) -> Ids:
        site.set_axis("in", no_unit((site.inputs[0].shape[-1],)))
        own = site.produce_inside("out", site.op.units)
        site.pin(own, "units of its input pass through it on another axis")
        return spread(site, site.follow("through", axis), axis)

    def weights(self, op: Any) -> dict[str, tuple]:
        return with_adapters(op, {"kernel": ("in", "out"), "bias": ("out",)})

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        return {"units": kept.count(site.axes["out"])}

    def macs(self, site: CallSite) -> list[CostTerm]:
        own = (site.axes["in"], site.axes["out"])
        if "through" not in site.axes:
            return [CostTerm(own, macs=site.positions(0, -1))]
        through = site.axes["through"]
        return [CostTerm((through, *own), macs=site.positions(0, -1) // len(through))]

    def adapter_macs(self, site: CallSite) -> int:
        adapters = (site.op.lora_kernel_a, site.op.lora_kernel_b)
        return site.positions(0, -1) * sum(math.prod(x.shape) for x in adapters)


class ConvRule(Rule):
    """Conv1D/2D/3D, grouped ones included.

    Of a grouped convolution go either whole groups (input and output channels of a group are one
    unit), or the same channels out of every group: whichever leaves more to choose from.
    """

    cuts_adapters = True

    def flow(self, site: CallSite) -> list[Ids]:
        axis = channel_axis(site.op)
        if getattr(site.op, "groups", 1) == 1:  # transposed ones have no groups
            kernel, *_ = self.weights(site.op).values()
            site.read("in", axis, by=("kernel", kernel.index("in")))
            return activated(site, site.produce("out", site.op.filters, axis))
        return activated(site, self._grouped(site, axis))

    def _grouped(self, site: CallSite, axis: int) -> Ids:
        groups, vector = site.op.groups, site.follow("all_in", axis)
        by_group = vector.reshape(groups, -1)
        out = site.produce("out", site.op.filters, axis)
        out_by_group = site.axes["out"].reshape(groups, -1)
        fixed = f"a group of {site.name!r} reads fixed channels"
        if groups >= by_group.shape[1] and (vector >= 0).all():
            site.units.tie(by_group, by_group[:, :1], fixed)
            site.units.tie(out_by_group, by_group[:, :1], fixed)
            site.set_axis("group", by_group[:, 0])
        else:
            site.units.tie(by_group, by_group[:1], fixed)
            site.units.tie(out_by_group, out_by_group[:1], fixed)
            site.set_axis("in", by_group[0])
            site.reads.append((0, axis % site.inputs[0].ndim))
        return out

    def weights(self, op: Any) -> dict[str, tuple]:
        axes = {"kernel": (*self._window(op), "in", "out"), "bias": ("out",)}
        return with_adapters(op, axes)

    def _window(self, op: Any) -> tuple:
        return (None,) * op.rank

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        changes = {"filters": kept.count(site.axes["out"])}
        if "group" in site.axes:
            changes["groups"] = kept.count(site.axes["group"])
        return changes

    def macs(self, site: CallSite) -> list[CostTerm]:
        names = [n for n in ("in", "out") if n in site.axes]
        per_pair = math.prod(site.op.kernel_size)
        if "group" in site.axes:  # the inputs per group do not change
            per_pair *= len(site.axes["all_in"]) // site.op.groups
        positions = self._positions(site)
        return [CostTerm(tuple(site.axes[n] for n in names), macs=per_pair * positions)]

    def _positions(self, site: CallSite) -> int:
        return site.positions(0, channel_axis(site.op), output=True)


class ConvTransposeRule(ConvRule):
    """Conv1D/2D/3DTranspose: the kernel's last two axes are swapped, the work is per input."""

    def weights(self, op: Any) -> dict[str, tuple]:
        return {"kernel": (*self._window(op), "out", "in"), "bias": ("out",)}

    def _positions(self, site: CallSite) -> int:
        return site.positions(0, channel_axis(site.op))


class DepthwiseConvRule(Rule):
    """DepthwiseConv1D/2D: output channels `i * depth_multiplier + m` belong to input channel i."""

    def flow(self, site: CallSite) -> list[Ids]:
        axis = channel_axis(site.op)
        vector = site.follow("in", axis)
        out = site.set_axis("out", np.repeat(vector, site.op.depth_multiplier))
        return activated(site, spread(site, out, axis))

    def weights(self, op: Any) -> dict[str, tuple]:
        return {"kernel": (*(None,) * op.rank, "in", None), "bias": ("out",)}

    def macs(self, site: CallSite) -> list[CostTerm]:
        positions = site.positions(0, channel_axis(site.op), output=True)
        return [CostTerm((site.axes["out"],), macs=math.prod(site.op.kernel_size) * positions)]


class SeparableConvRule(Rule):
    """SeparableConv1D/2D: a depthwise convolution without bias, then a 1x1 convolution."""

    def flow(self, site: CallSite) -> list[Ids]:
        axis = channel_axis(site.op)
        vector = site.read("in", axis)
        site.set_axis("middle", np.repeat(vector, site.op.depth_multiplier))
        return activated(site, site.produce("out", site.op.filters, axis))

    def weights(self, op: Any) -> dict[str, tuple]:
        window = (None,) * op.rank
        return {
            "depthwise_kernel": (*window, "in", None),
            "pointwise_kernel": (*window, "middle", "out"),
            "bias": ("out",),
        }

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        return {"filters": kept.count(site.axes["out"])}

    def macs(self, site: CallSite) -> list[CostTerm]:
        middle, out = site.axes["middle"], site.axes["out"]
        positions = site.positions(0, channel_axis(site.op), output=True)
        window = math.prod(site.op.kernel_size)
        return [
            CostTerm((middle,), macs=window * positions),
            CostTerm((middle, out), macs=positions),
        ]


class KernelRule(Rule):
    """A convolution as an operation, its kernels constants: units it reads are cut from them.

    What it makes cannot be pruned, for a constant has no units of its own. `cuts` says for each
    kernel (argument 1, 2, ...) which of its axes meets the input's channels, repeated or not.
    """

    def __init__(self, *cuts: int) -> None:
        self.cuts = cuts

    def flow(self, site: CallSite) -> list[Ids]:
        if len(site.inputs) > 1 or not isinstance(site.call.args[0], Ref):
            return site.pin_all("its kernel is not a constant")
        axis = channel_axis(site.op)
        if site.inputs[0].shape[axis] != self._kernel(site).shape[self.cuts[0]]:
            return site.pin_all("is a grouped convolution with a constant kernel")
        return self._pass(site, axis)

    def _pass(self, site: CallSite, axis: int) -> list[Ids]:
        site.read("in", axis)
        return [no_unit(site.output_shapes[0])]

    def _kernel(self, site: CallSite) -> np.ndarray:
        return to_numpy(site.call.args[1])

    def arguments(self, site: CallSite, kept: KeptUnits) -> tuple[tuple, dict]:
        """Kernels without the channels that are gone."""
        args = list(site.call.args)
        for i, axis in enumerate(self.cuts, 1) if "in" in site.axes else ():
            kernel = to_numpy(args[i])
            times = kernel.shape[axis] // len(site.axes["in"])
            kernel = np.take(kernel, kept.where(np.repeat(site.axes["in"], times)), axis)
            args[i] = keras.ops.convert_to_tensor(kernel)  # some backends want no other
        return tuple(args), site.call.kwargs

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        positions = site.positions(0, channel_axis(site.op), output=True)
        kernels = site.call.args[1 : len(self.cuts) + 1]
        if len(kernels) < len(self.cuts):
            return None
        size = sum(math.prod(site.shape_of(k)) for k in kernels)
        if "in" not in site.axes:
            return [CostTerm((), macs=size * positions)]
        return [CostTerm((site.axes["in"],), macs=size // len(site.axes["in"]) * positions)]


class DepthwiseKernelRule(KernelRule):
    """`ops.depthwise_conv` with a constant kernel: channel by channel."""

    def _pass(self, site: CallSite, axis: int) -> list[Ids]:
        vector = site.follow("in", axis)
        out = np.repeat(vector, self._kernel(site).shape[-1])
        return [spread(site, site.set_axis("out", out), axis)]


add(DenseRule(), layers.Dense)
add(ConvRule(), layers.Conv1D, layers.Conv2D, layers.Conv3D)
add(
    ConvTransposeRule(),
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
)
add(DepthwiseConvRule(), layers.DepthwiseConv1D, layers.DepthwiseConv2D)
add(SeparableConvRule(), layers.SeparableConv1D, layers.SeparableConv2D)
add(KernelRule(-2), op_class("Conv"))
add(KernelRule(-2, -2), op_class("SeparableConv"))
add(DepthwiseKernelRule(-2), op_class("DepthwiseConv"))
