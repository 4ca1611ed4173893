"""Operations that act on every element alone, on one tensor or on several."""

from typing import Any

import numpy as np
from keras import layers, ops, tree

from keras_polar.backends import to_numpy
from keras_polar.graph.ir import Call, Ref, refs_in
from keras_polar.graph.keras_private import op_class
from keras_polar.rules.call_site import CallSite, ids_along
from keras_polar.rules.common import axes_of, in_float32
from keras_polar.rules.ids import Ids, broadcast_along, no_unit, varies
from keras_polar.rules.registry import add
from keras_polar.rules.rule import KeptUnits, Rule


class ElementwiseRule(Rule):
    """One tensor in, ids unchanged."""

    fuses = True

    def flow(self, site: CallSite) -> list[Ids]:
        return [np.broadcast_to(site.inputs[0], site.output_shapes[0])]


class DropoutRule(ElementwiseRule):
    """The shape of its noise may name the number of units."""

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        ids, shape = site.outputs[0], site.op.noise_shape
        if shape is None:
            return {}
        sizes = [kept.size(ids, i) if n == ids.shape[i] else n for i, n in enumerate(shape)]
        return {"noise_shape": tuple(sizes)}


class ClipRule(ElementwiseRule):
    """Bounds may be vectors, which are cut with the units."""

    def flow(self, site: CallSite) -> list[Ids]:
        shape = site.output_shapes[0]
        return [np.broadcast_to(_lift(site.inputs[0], len(shape)), shape)]

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        bounds = {n: getattr(site.op, n) for n in ("x_min", "x_max")}
        return {n: cut_constant(b, site.outputs[0], kept) for n, b in bounds.items() if np.ndim(b)}


class ScalarRule(ElementwiseRule):
    """Element-wise as long as the layer's statistics or factors are scalars."""

    def __init__(self, *attributes: str) -> None:
        self.attributes = attributes

    def flow(self, site: CallSite) -> list[Ids]:
        if any(np.size(getattr(site.op, a)) != 1 for a in self.attributes):
            return site.pin_all("has one constant per channel")
        return super().flow(site)


class MergeRule(Rule):
    """Several tensors (or constants) in: units at the same position go together.

    A tensor without units along the axes on which others have theirs (one map that multiplies all
    channels, say) is pinned: its one unit meets many, and they need not go together.
    """

    def flow(self, site: CallSite) -> list[Ids]:
        shape = site.output_shapes[0]
        if _has_mixed_list(site.call):
            return site.pin_all("has a list of tensors and constants")
        lifted = [_lift(ids, len(shape)) for ids in site.inputs]
        partners = []
        for ids in lifted:
            if _is_spread_over_others(ids, lifted):
                site.pin(ids, "is broadcast over other units")
            else:
                partners.append(np.broadcast_to(ids, shape))
        for other in partners[1:]:
            site.units.tie(partners[0], other, f"combined with fixed elements by {site.name!r}")
        return [partners[0] if partners else no_unit(shape)]

    def arguments(self, site: CallSite, kept: KeptUnits) -> tuple[tuple, dict]:
        """Constants that span a cut axis are cut with it."""
        ids = site.outputs[0]

        def cut(value: Any) -> Any:
            if refs_in(value) or not np.ndim(value):
                return value
            return cut_constant(value, ids, kept)

        args = tuple(map(cut, site.call.args))
        return args, {k: cut(v) for k, v in site.call.kwargs.items()}


def _has_mixed_list(call: Call) -> bool:
    """Whether an argument is a list of both tensors and constants."""
    return any(
        refs_in(x) and len(refs_in(x)) < len(tree.flatten(x))
        for x in (*call.args, *call.kwargs.values())
    )


def _lift(ids: Ids, ndim: int) -> Ids:
    """The array with axes of size 1 put in front of its shape, as broadcasting does."""
    return ids.reshape((1,) * (ndim - ids.ndim) + ids.shape)


def _is_spread_over_others(ids: Ids, lifted: list[Ids]) -> bool:
    """Whether others vary, and only along axes on which this one has size 1."""
    others = [i for i in range(ids.ndim) if any(varies(x, i) for x in lifted if x is not ids)]
    return bool(others) and all(ids.shape[i] == 1 for i in others)


def cut_constant(value: Any, ids: Ids, kept: KeptUnits) -> np.ndarray:
    """A constant that is broadcast against a tensor, without what is cut from the tensor."""
    array = to_numpy(value)
    for axis in range(-array.ndim, 0):
        if array.shape[axis] > 1:
            array = np.take(array, kept.where(ids_along(ids, axis)), axis=axis)
    return array


class MergeLayerRule(MergeRule):
    """The merge layers line up tensors of different ranks in a way of their own: pinned."""

    def flow(self, site: CallSite) -> list[Ids]:
        if len({ids.ndim for ids in site.inputs}) > 1:
            return site.pin_all("merges tensors of different ranks")
        return super().flow(site)


class SumRule(MergeRule):
    """A sum, of which any part may be missing."""

    def summands(self, call: Call) -> tuple[int, ...]:
        return tuple(range(len(call.inputs)))


class SumLayerRule(MergeLayerRule, SumRule):
    """A sum in the way of the merge layers."""


class SoftmaxRule(Rule):
    """Mixes units along its axes; on other axes it acts one by one.

    In the gated model the sum of the units on its axis is that of the open ones.
    """

    def __init__(self, is_log: bool = False) -> None:
        self.is_log = is_log

    def flow(self, site: CallSite) -> list[Ids]:
        axis = site.op.axis
        ids, *masks = site.inputs
        given = site.call.kwargs.get("mask", (*site.call.args, None)[1])
        if why := _why_masked(masks, given):
            return site.pin_all(why)
        axes = [axis] if isinstance(axis, int) else axis or range(1, ids.ndim)
        one = site.tie_along(ids, [i % ids.ndim for i in axes])
        if one is not None:
            return [np.broadcast_to(one, ids.shape)]
        if len(axes) > 1 or masks or given is not None or axes[0] % ids.ndim == 0:
            return site.pin_all("normalises over the units")
        return [broadcast_along(site.average("units", axes[0]), axes[0] % ids.ndim, ids.shape)]

    def over_open(self, op: Any, gates: Any, *args: Any, **kwargs: Any) -> Any:
        dtype, x = args[0].dtype, in_float32(args[0])
        (axis,) = axes_of(op.axis, len(x.shape))
        share = ops.cast(gates, x.dtype)
        highest = ops.max(ops.where(share > 0, x, LOWEST), axis, keepdims=True)
        # Closed ones may be above: what is behind must not get numbers whose squares are infinite.
        x = ops.minimum(x - ops.stop_gradient(highest), 0.0)
        total = ops.sum(share * ops.exp(x), axis, keepdims=True)
        return ops.cast(x - ops.log(total) if self.is_log else ops.exp(x) / total, dtype)


def _why_masked(masks: list[Ids], given: Any) -> str:
    """Why units stay for the mask of a softmax; empty if they need not."""
    if any(varies(mask, i) for mask in masks for i in range(mask.ndim)):
        return "is used as a mask"
    is_constant = given is not None and not isinstance(given, Ref)
    return "has a constant mask" if is_constant and np.size(given) > 1 else ""


LOWEST = -1e30  # stands for a unit that is closed, where the highest is sought


class PReLURule(Rule):
    """One slope per element, but for `shared_axes`: cut with the units."""

    fuses = True

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,) = site.inputs
        for axis in range(1, ids.ndim):
            site.set_axis(str(axis), ids_along(ids, axis))
        return [ids]

    def weights(self, op: Any) -> dict[str, tuple]:
        size = op.alpha.shape
        return {"alpha": tuple(str(i + 1) if n > 1 else None for i, n in enumerate(size))}


_UNARY = (
    "Absolute Abs Arccos Arccosh Arcsin Arcsinh Arctan Arctanh Cbrt Ceil Copy Cos Cosh Exp Exp2 "
    "Expm1 Floor Log Log10 Log1p Log2 NanToNum Negative Reciprocal Round Sign Sin Sinh Sqrt "
    "Square Tan Tanh Trunc Relu Relu6 ReLU Mish Sigmoid SparseSigmoid Softplus Softsign "
    "SoftShrink SparsePlus Silu Squareplus LogSigmoid LeakyRelu HardSigmoid HardSilu Elu Selu "
    "Gelu Celu TanhShrink HardTanh HardShrink Threshold Cast StopGradient Rsqrt Erf Erfc Erfinv "
    "Fabs Angle Array BitwiseInvert BitwiseNot Conj Conjugate ConvertToTensor Deg2rad I0 Imag "
    "Isfinite Isinf Isnan Isneginf Isposinf Isreal LogicalNot OnesLike Rad2deg Real SaturateCast "
    "Signbit Sinc ZerosLike"
).split()
_MERGE = (
    "Subtract Multiply Divide TrueDivide DivideNoNan Maximum Minimum Power Arctan2 BitwiseAnd "
    "BitwiseLeftShift BitwiseOr BitwiseRightShift BitwiseXor Equal FloorDivide Fmax Fmin Fmod "
    "FullLike Gcd Greater GreaterEqual Heaviside Hypot Isclose Lcm Ldexp LeftShift Less LessEqual "
    "Logaddexp Logaddexp2 LogicalAnd LogicalOr LogicalXor Mod Nextafter NotEqual Polar RightShift "
    "Where BinaryCrossentropy"
).split()

add(DropoutRule(), layers.Dropout, layers.AlphaDropout)
add(
    ElementwiseRule(),
    layers.ReLU,
    layers.LeakyReLU,
    layers.ELU,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.ActivityRegularization,
    layers.Identity,
    *map(op_class, _UNARY),
)
add(ScalarRule("scale", "offset"), layers.Rescaling)
add(ScalarRule("mean", "variance"), layers.Normalization)
add(ClipRule(), op_class("Clip"))
add(MergeRule(), *map(op_class, _MERGE))
add(SumRule(), op_class("Add"))
add(SumLayerRule(), layers.Add)
add(
    MergeLayerRule(),
    layers.Subtract,
    layers.Multiply,
    layers.Average,
    layers.Maximum,
    layers.Minimum,
)
add(SoftmaxRule(), layers.Softmax, op_class("Softmax"))
add(SoftmaxRule(is_log=True), op_class("LogSoftmax"))
add(PReLURule(), layers.PReLU)
