"""All that differs between TensorFlow, JAX and PyTorch."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()
# Keras on JAX takes the state out of a model's variables while it trains, and hands each part of a
# step what that part is to see of it.
IS_STATE_TAKEN = BACKEND == "jax"
# A model that trains is a compiled function of its variables, so that a smaller one may take over.
CAN_COMPACT = BACKEND in ("tensorflow", "jax")
# `ops.dot_product_attention` wants keys and values that are equally wide.
WANTS_EQUAL_WIDTHS = BACKEND == "jax"


class Reported:
    """The values that non-trainable variables of a model have after the latest training step.

    Where the state is taken out of the model, they come from what the step returns, as copies: the
    next step is given the memory of that state.

    Args:
        model: a compiled model that `fit` trains.
        variables: some of its non-trainable variables, scalars.
    """

    def __init__(self, model: Any, variables: Sequence[Any]) -> None:
        self.model, self.variables = model, variables
        self.values: list = []

    def read(self) -> list[float]:
        """One number per variable; none before the first step."""
        now = self.values if IS_STATE_TAKEN else self.variables
        return [float(to_numpy(v)) for v in now]

    def watch(self) -> None:
        """To be called when the model's train function is another one."""
        if not IS_STATE_TAKEN or any(w.reported is self for w in _watched(self.model)):
            return
        ids = [id(v) for v in self.model.non_trainable_variables]
        places = [ids.index(id(v)) for v in self.variables]
        self.model.train_function = _Watched(self.model.train_function, self, places)

    def forget(self) -> None:
        """The model has its own train function again, or that of others who still watch."""
        chain = _watched(self.model)
        if chain:
            self.model.train_function = chain[-1].step
        for watched in reversed([w for w in chain if w.reported is not self]):
            watched.step, self.model.train_function = self.model.train_function, watched


class _Watched:
    """A train function that tells what the step returns; several may stand around one another."""

    def __init__(self, step: Callable, reported: Reported, places: Sequence[int]) -> None:
        self.step, self.reported, self.places = step, reported, places

    def __call__(self, state: Any, iterator: Any) -> Any:
        logs, state = self.step(state, iterator)
        self.reported.values = [ops.copy(state[1][i]) for i in self.places]
        return logs, state


def _watched(model: Any) -> list[_Watched]:
    """Those who watch the model's train function, the outermost first."""
    found, step = [], model.train_function
    while isinstance(step, _Watched):
        found.append(step)
        step = step.step
    return found


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Inside, products and convolutions of float32 are computed in float32.

    TensorFlow, JAX and PyTorch round their factors to TF32 on GPUs since Ampere, JAX to bfloat16
    on TPUs. Networks that are equal to float32 round-off then differ by up to 1e-3.

    Returns:
        A context manager; it decorates functions as well.

    Example:

        >>> with keras_polar.full_precision():
        ...     difference = abs(gated.predict(images) - small.predict(images)).max()
    """
    settings = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    set_precision = settings.get(BACKEND)
    if set_precision is None:  # NumPy, OpenVINO: no accelerator
        yield
        return
    restore = set_precision()
    try:
        yield
    finally:
        restore()


def _tensorflow() -> Callable[[], Any]:
    import tensorflow as tf

    config = tf.config.experimental
    before = config.tensor_float_32_execution_enabled()
    config.enable_tensor_float_32_execution(False)
    return lambda: config.enable_tensor_float_32_execution(before)


def _jax() -> Callable[[], Any]:
    import jax

    stack = contextlib.ExitStack()
    stack.enter_context(jax.default_matmul_precision("float32"))
    return stack.close


def _torch() -> Callable[[], Any]:
    import torch

    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, torch.get_float32_matmul_precision()

    def restore() -> None:
        cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])

    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return restore


def global_mean(x: Any) -> Any:
    """The mean of `x` over all replicas, differentiable; `x` itself where there is one.

    Outside TensorFlow a batch is one (possibly sharded) array and needs no help.
    """
    if BACKEND != "tensorflow":
        return x
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return x
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, x)


def global_sum(x: Any) -> Any:
    """The sum of `x` over all replicas; see `global_mean`."""
    return replicas() * global_mean(x)


def replicas() -> int:
    """How many replicas share a batch: each sees the gradients of its part of their mean loss."""
    if BACKEND != "tensorflow":
        return 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def require_supported(model: Any) -> None:
    """Raises a NotImplementedError if Keras cannot train under the model's strategy."""
    strategy = getattr(model, "distribute_strategy", None)  # Keras on TensorFlow has it
    found = _unsupported(strategy) if strategy is not None else ""
    if found:
        raise NotImplementedError(
            f"fit of {model.name!r}: Keras {keras.__version__} cannot train under {found} (see "
            "github.com/keras-team/keras/issues/20585). Use tf.distribute.MirroredStrategy on "
            "one machine, or KERAS_BACKEND=jax with keras.distribution on several."
        )


def _unsupported(strategy: Any) -> str:
    import tensorflow as tf

    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        return "ParameterServerStrategy"
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        tasks = strategy.cluster_resolver.cluster_spec().as_dict().items()
        workers = sum(len(addresses) for kind, addresses in tasks if kind in ("chief", "worker"))
        return f"MultiWorkerMirroredStrategy with {workers} workers" if workers > 1 else ""
    return ""


def to_numpy(x: Any) -> np.ndarray:
    """A variable or tensor as a NumPy array."""
    # By way of a tensor: NumPy 2 warns about converting a TensorFlow variable directly.
    x = keras.ops.convert_to_tensor(x)
    if BACKEND == "tensorflow" and x.shape.rank == 0:
        return np.asarray(x.numpy())  # what NumPy gets of one in bfloat16 is no array
    return keras.ops.convert_to_numpy(x)


def process_count() -> int:
    """How many processes of JAX train together."""
    if BACKEND != "jax":
        return 1
    import jax

    return jax.process_count()


def from_every_process(array: np.ndarray) -> np.ndarray:
    """An array of each process of JAX, stacked in the order of the processes."""
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(array)


def placed_like(value: np.ndarray, like: Any) -> Any:
    """An array of JAX with the type and on the devices of another; asks no other process."""
    import jax

    value = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def gradient_function(function: Callable[..., Any]) -> Callable[..., list[np.ndarray]]:
    """(points, *others) -> the gradients of a scalar with respect to each of the points.

    Args:
        function: gets a list of tensors, the points, and whatever else is handed on; returns a
            scalar tensor. It is compiled where the backend compiles.
    """
    makers = {"tensorflow": _tensorflow_gradients, "jax": _jax_gradients, "torch": _torch_gradients}
    if BACKEND not in makers:
        raise NotImplementedError(
            f"Keras on {BACKEND!r} has no gradients. Set KERAS_BACKEND to one of "
            f"{', '.join(makers)} in a new process."
        )
    gradients = makers[BACKEND](function)

    def on_arrays(points: Sequence[Any], *others: Any) -> list[np.ndarray]:
        tensors = [ops.convert_to_tensor(x) for x in points]
        return [to_numpy(g) for g in gradients(tensors, *map(ops.convert_to_tensor, others))]

    return on_arrays


def _tensorflow_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    import tensorflow as tf

    @tf.function
    def gradients(points: list, *others: Any) -> list:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(points)
            value = function(points, *others)
        return tape.gradient(value, points, unconnected_gradients="zero")

    return gradients


def _jax_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    return jax.jit(jax.grad(function))


def _torch_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def gradients(points: list, *others: Any) -> Any:
        points = [x.detach().requires_grad_() for x in points]
        with torch.enable_grad():
            return torch.autograd.grad(
                function(points, *others), points, allow_unused=True, materialize_grads=True
            )

    return gradients
