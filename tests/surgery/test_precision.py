"""Comparisons are made in float32 where the backend would rather use TF32 or bfloat16."""

import keras
import pytest
from helpers import small_resnet

import keras_polar
from keras_polar.backends import full_precision
from keras_polar.litert import compare

BACKEND = keras.backend.backend()


def is_reduced():
    """Whether the backend may round the factors of float32 products on an accelerator."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.config.experimental.tensor_float_32_execution_enabled()
    if BACKEND == "jax":
        import jax

        return jax.config.jax_default_matmul_precision != "float32"
    import torch

    return torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def reduced_before_and_after():
    assert is_reduced()  # each backend's default: otherwise these tests show nothing
    yield
    assert is_reduced()


def test_restored_after_an_error():
    seen = []

    @full_precision()
    def fail():
        seen.append(is_reduced())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [False]


def test_the_certificate_is_checked_in_float32():
    seen = []

    class Watched(keras_polar.GatedModel):
        def __call__(self, *args, **kwargs):
            seen.append(is_reduced())
            return super().__call__(*args, **kwargs)

    gated = keras_polar.apply(small_resnet(), 0.5, gate="static")
    gated.settle()
    gated.__class__ = Watched
    keras_polar.convert(gated, verify=True)
    assert seen == [False]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="files are written on TensorFlow")
def test_files_are_compared_in_float32(tmp_path, monkeypatch):
    seen, call = [], compare._call
    monkeypatch.setattr(compare, "_call", lambda *a: seen.append(is_reduced()) or call(*a))
    keras_polar.export_tflite(small_resnet(), tmp_path / "model.tflite")
    assert set(seen) == {False}
