"""Float32 as it says: accelerators round the factors of products unless told otherwise."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Inside, products and convolutions of float32 are computed in float32.

    TensorFlow, JAX and PyTorch round their factors to TF32 on GPUs since Ampere, JAX to bfloat16
    on TPUs. Networks that are equal to float32 round-off then differ by up to 1e-3.
    """
    settings = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    set_precision = settings.get(keras.backend.backend())
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
