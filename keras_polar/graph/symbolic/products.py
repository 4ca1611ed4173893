"""Weights of a layer's own that its `call` uses as a kernel: a stock layer does that as well.

`ops.matmul(x, self.w) + self.b` is a Dense, `ops.einsum(...)` an EinsumDense, `ops.conv(...)` a
convolution. What is known of these layers holds for the code then, and a file needs no more than
Keras.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
from keras import layers, tree

from keras_polar.graph.keras_private import op_class
from keras_polar.graph.symbolic.record import (
    MADE_FOR,
    CannotTrace,
    OwnWeight,
    RecordedCall,
    tensors_in,
)


@dataclass(frozen=True, eq=False)
class Product:
    """Stands in recorded calls for a layer that is made once, however often it is called.

    Attributes:
        make: makes it, without a bias and with arguments of every layer.
        shape: of the inputs, the batch first.
        kernel, bias: the variables that become its weights.
        bias_options: arguments that give it a bias; None if it cannot have that of the code.
    """

    make: Callable
    shape: tuple
    kernel: OwnWeight
    bias_options: dict | None
    bias: OwnWeight | None = None

    @property
    def name(self) -> str:
        return self.kernel.full_name

    @property
    def weights(self) -> list:
        """The variables of the layer whose `call` this is a part of."""
        return [w.variable for w in (self.kernel, self.bias) if w is not None]

    @property
    def key(self) -> tuple[int, ...]:
        return tuple(map(id, self.weights))

    def layer(self) -> Any:
        """The layer, built, its weights those of the variables."""
        options = (self.bias_options if self.bias else None) or {"use_bias": False}
        made = self.make(**options, **self._settings(), dtype=self.kernel.owner.dtype_policy)
        made.build((None, *self.shape[1:]))
        for new, old in zip(made.weights, self.weights, strict=True):
            if new.shape != old.shape:
                raise CannotTrace(f"uses its own variable {old.path!r} as no layer does")
            new.assign(old)
            new.trainable = old.trainable
        made.name = self.name
        MADE_FOR[made] = tuple(self.weights)
        return made

    def _settings(self) -> dict:
        parts = {"kernel": self.kernel, "bias": self.bias}
        return {
            f"{part}_{kind}": getattr(weight.variable, kind)
            for part, weight in parts.items()
            for kind in ("regularizer", "constraint")
            if weight is not None
        }


def with_products(
    steps: list[RecordedCall], weights: list[OwnWeight], outputs: list, batch: int
) -> list[RecordedCall]:
    """The calls, those in which own weights are kernels being of `Product`s.

    Args:
        outputs: of all the calls.
        batch: the size that stands for the number of samples.

    Raises:
        CannotTrace: what is a kernel in one place is something else in another.
    """
    own = {id(w.symbol): w for w in weights if w.rows is None}
    steps = _without_casts(steps, own)
    steps = _with_biases([_as_product(s, own, batch) for s in steps], own, outputs)
    keys: dict[int, set] = {}
    for product in (s.op for s in steps if isinstance(s.op, Product)):
        for variable in product.weights:
            keys.setdefault(id(variable), set()).add(product.key)
    read = {id(x) for s in steps for x in tensors_in((s.args, s.kwargs))}
    for w in own.values():
        found = keys.get(id(w.variable), set())
        if len(found) > 1 or (found and id(w.symbol) in read):
            raise CannotTrace(f"uses its own variable {w.variable.path!r} in several ways")
    return steps


def _without_casts(steps: list[RecordedCall], own: dict) -> list[RecordedCall]:
    """The calls less those that cast a weight to the type that it has in the layer anyway."""
    same: dict[int, Any] = {}
    for step in (s for s in steps if isinstance(s.op, _SAME)):
        weight = same.get(id(step.args[0]), step.args[0])
        if id(weight) in own and step.outputs[0].dtype == weight.dtype:
            same[id(step.outputs[0])] = weight
    made = [s for s in steps if not all(id(x) in same for x in s.outputs)]
    swapped = [tree.map_structure(lambda x: same.get(id(x), x), (s.args, s.kwargs)) for s in made]
    return [replace(s, args=a, kwargs=k) for s, (a, k) in zip(made, swapped, strict=True)]


def _as_product(step: RecordedCall, own: dict, batch: int) -> RecordedCall:
    given = tensors_in((step.args, step.kwargs))
    if len(given) != 2 or tuple(given[0].shape[:1]) != (batch,):
        return step
    x, kernel = given
    if id(x) in own or id(kernel) not in own:
        return step
    for kind, layer_of in _LAYERS.items():
        made = layer_of(step, x, kernel) if type(step.op) is kind else None
        if made is not None:
            make, bias_options = made
            product = Product(make, tuple(x.shape), own[id(kernel)], bias_options)
            path = f"{step.path.rpartition('/')[0]}/{product.name}"
            return replace(step, op=product, path=path, args=(x,), kwargs={})
    return step


def _dense(step: RecordedCall, x: Any, kernel: Any) -> tuple | None:
    if len(kernel.shape) != 2 or len(x.shape) < 2:
        return None
    return partial(layers.Dense, kernel.shape[1]), {"use_bias": True}


def _einsum(step: RecordedCall, x: Any, kernel: Any) -> tuple | None:
    equation = step.op.subscripts.replace(" ", "")
    terms, _, out = equation.partition("->")
    if not out or "." in equation or terms[0] != out[0] or terms[0] in terms.split(",")[1]:
        return None
    make = partial(_einsum_dense, equation, step.shapes[0][1:])
    return make, {"bias_axes": out[-1]}


def _einsum_dense(equation: str, shape: tuple, use_bias: bool = True, **options: Any) -> Any:
    return layers.EinsumDense(equation, shape, **options)


def _convolution(step: RecordedCall, x: Any, kernel: Any) -> tuple | None:
    options = {k: getattr(step.op, k) for k in ("strides", "padding", "dilation_rate")}
    data_format = step.op.data_format or keras.config.image_data_format()
    is_last = data_format == "channels_last"
    *size, channels, filters = kernel.shape
    kind = getattr(layers, f"Conv{len(size)}D")
    options["groups"] = x.shape[-1 if is_last else 1] // channels
    make = partial(kind, filters, tuple(size), data_format=data_format, **options)
    return make, {"use_bias": True} if is_last else None


_LAYERS = {
    op_class("Matmul"): _dense,
    op_class("Dot"): _dense,
    op_class("Einsum"): _einsum,
    op_class("Conv"): _convolution,
}
_ADD, _SAME = op_class("Add"), (op_class("Cast"), op_class("ConvertToTensor"))


def _with_biases(steps: list[RecordedCall], own: dict, outputs: list) -> list[RecordedCall]:
    """The calls, those that only add a vector of its own to a product being part of it."""
    readers: dict[int, list] = {id(x): [None] for x in outputs}
    for step in steps:
        for x in tensors_in((step.args, step.kwargs)):
            readers.setdefault(id(x), []).append(step)
    made = {id(s.outputs[0]): s for s in steps if isinstance(s.op, Product)}
    whole: list[RecordedCall] = []
    for step in steps:
        product, bias = _sum_of(step, made, own)
        if product and all(len(readers[id(x)]) == 1 for x in (product.outputs[0], bias.symbol)):
            whole.remove(product)
            step = replace(product, op=replace(product.op, bias=bias), outputs=step.outputs)
        whole.append(step)
    return whole


def _sum_of(step: RecordedCall, made: dict, own: dict) -> tuple:
    """The call of a product and the vector that a call adds to it; else None twice."""
    if not isinstance(step.op, _ADD) or step.kwargs or len(step.args) != 2:
        return None, None
    for a, b in (step.args, step.args[::-1]):
        product = made.get(id(a))
        fits = id(b) in own and tuple(b.shape) == (a.shape[-1],)
        if product is not None and fits and product.op.bias_options is not None:
            return product, own[id(b)]
    return None, None
