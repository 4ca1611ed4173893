"""EinsumDense: a product with a kernel along any axes, written as an equation."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import layers

from keras_polar.rules.activations import activated
from keras_polar.rules.call_site import CallSite, alone, sizes
from keras_polar.rules.common import with_adapters
from keras_polar.rules.ids import Ids, broadcast_along, no_unit, varies
from keras_polar.rules.registry import add
from keras_polar.rules.rule import CostTerm, KeptUnits, Rule


@dataclass(frozen=True)
class Equation:
    """`inputs,kernel->outputs`, one name per axis; those of an ellipsis are "0", "1" and so on."""

    inputs: tuple[str, ...]
    kernel: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the batch comes first and no letter stands twice in one term."""
        terms = (self.inputs, self.kernel, self.outputs)
        batch = self.inputs[0]
        leads = self.outputs[0] == batch and batch not in self.kernel
        return leads and all(len(set(t)) == len(t) for t in terms)


def parse(equation: str, ndim: int) -> Equation:
    """The axes of an equation for an input with `ndim` axes."""
    left, outputs = equation.replace(" ", "").replace("...", ".").split("->")
    inputs, kernel = left.split(",")
    elided = tuple(map(str, range(ndim - len(inputs.replace(".", "")))))

    def axes(term: str) -> tuple[str, ...]:
        return tuple(name for c in term for name in (elided if c == "." else c))

    return Equation(axes(inputs), axes(kernel), axes(outputs))


class EinsumDenseRule(Rule):
    """Reads the axes that vanish and makes the new ones.

    Of several new axes (heads and their width, say) the units are along the first, even if only
    one is left there. Units on an axis that stays pass through it, and then its own are pinned: an
    element of the output can belong to one unit only.
    """

    cuts_adapters = True

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,), shape = site.inputs, site.output_shapes[0]
        equation = parse(site.op.equation, ids.ndim)
        if not equation.is_plain:
            return site.pin_all(f"equation {site.op.equation!r} is not one the library can follow")
        axis = self._unit_axis(site, equation)
        for name in equation.kernel:
            if axis is None or name != equation.inputs[axis]:
                self._fix(site, name, equation)
        if axis is None:
            return activated(site, self._made(site, equation))
        name = equation.inputs[axis]
        if name not in equation.outputs:
            site.read(name, axis)
            return activated(site, self._made(site, equation))
        vector = site.follow(name, axis)
        if (made := self._place_made(equation)) is not None:
            own = site.produce_inside(equation.outputs[made], shape[made])
            site.pin(own, "units of its input pass through it on another axis")
        return activated(site, broadcast_along(vector, equation.outputs.index(name), shape))

    def _unit_axis(self, site: CallSite, equation: Equation) -> int | None:
        """The axis of the input that units are on: the longest on which they vary.

        One that is read counts more than one that stays, as positions of which each has units.
        """
        (ids,) = site.inputs
        axes = [i for i in range(1, ids.ndim) if varies(ids, i)]
        own = [i for i in axes if equation.inputs[i] not in equation.outputs]
        return max(own or axes, key=lambda i: ids.shape[i], default=None)

    def _fix(self, site: CallSite, name: str, equation: Equation) -> None:
        """An axis of the kernel that the input has and no units are on."""
        if name in equation.inputs:
            size = site.op.kernel.shape[equation.kernel.index(name)]
            site.set_axis(name, np.full(size, -1, np.int32))

    def _made(self, site: CallSite, equation: Equation) -> Ids:
        shape, place = site.output_shapes[0], self._place_made(equation)
        if place is None:
            return no_unit(shape)
        return site.produce(equation.outputs[place], shape[place], place)

    def _place_made(self, equation: Equation) -> int | None:
        """The first axis of the output that the kernel alone has."""
        new = [n for n in equation.kernel if n not in equation.inputs]
        return min((equation.outputs.index(n) for n in new), default=None)

    def weights(self, op: Any) -> dict[str, tuple]:
        kernel = tuple(op.equation.replace(" ", "").split("->")[0].split(",")[1])
        axes: dict[str, tuple] = {"kernel": kernel}
        if op.bias is not None:
            outputs = _outputs(op)
            first = min(outputs.index(c) for c in op.bias_axes)
            names = [c if c in op.bias_axes else None for c in outputs[first:]]
            axes["bias"] = (*names, *(None,) * (len(op.bias.shape) - len(names)))
        return with_adapters(op, axes)

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        op = site.op
        # `output_shape` leaves out the batch and the axes of an ellipsis.
        names = _outputs(op)[0 if op.equation.replace(" ", "").startswith("...") else 1 :]
        shape = [
            kept.count(site.axes[n]) if n in site.axes and size is not None else size
            for n, size in zip(names, op.partial_output_shape, strict=True)
        ]
        return {"output_shape": tuple(shape)}

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        equation = parse(site.op.equation, site.inputs[0].ndim)
        if not equation.is_plain:
            return None
        size = dict(zip(equation.inputs, _sizes(site, site.call.inputs[0]), strict=True))
        size |= dict(zip(equation.outputs, _sizes(site, site.call.outputs[0]), strict=True))
        named = [n for n in size if n in site.axes]
        other = math.prod(n for name, n in size.items() if name not in named)
        return [CostTerm(tuple(site.axes[n] for n in named), macs=other)]

    def adapter_macs(self, site: CallSite) -> int | None:
        """The equation with the rank for the kernel's last axis, then from the rank back to it."""
        own = alone(site, self)
        if own is None:
            return None
        rank, last = site.op.lora_kernel_b.shape
        return own[0].macs // last * rank + math.prod(site.output_shapes[0][1:]) * rank


def _outputs(op: Any) -> str:
    """The letters of the output, the axes of an ellipsis left out."""
    return op.equation.replace(" ", "").replace("...", "").split("->")[1]


def _sizes(site: CallSite, index: int) -> tuple:
    return sizes(site.specs[index].shape)


add(EinsumDenseRule(), layers.EinsumDense)
