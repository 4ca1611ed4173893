"""What can be neither rebuilt nor copied is shared with the caller's model, and stays as it is."""

import keras
import numpy as np
import pytest
from keras import layers
from keras.src.saving.serialization_lib import SafeModeScope

import keras_polar
from keras_polar.backends import to_numpy

BACKEND = keras.backend.backend()
X, Y = np.ones((32, 6), "float32"), np.zeros((32, 3), "float32")


class Opaque(layers.Layer):
    """Holds something that Python cannot copy."""

    def __init__(self, handle, **kwargs):
        super().__init__(**kwargs)
        self.handle = handle

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], 3), name="kernel")

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.absolute(self.kernel))


def around(layer):
    inputs = keras.Input((6,))
    x = layers.Dense(16, activation="relu", name="free")(inputs)
    x = layers.Dense(8, name="before")(x)
    return keras.Model(inputs, layer(x))


def pruned_and_trained(model):
    layer = model.layers[-1]
    before = [to_numpy(v).copy() for v in layer.variables]
    gated = keras_polar.apply(model, 0.2, gate="static", importance="logits")
    names = {v.path for v in layer.variables}
    assert names.isdisjoint(v.path for v in gated.trainable_variables)
    assert gated.count_params() > model.count_params()  # its weights are counted
    gated.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    gated.fit(X, Y, epochs=3, batch_size=8, verbose=0)
    for a, b in zip(before, layer.variables, strict=True):
        np.testing.assert_array_equal(a, to_numpy(b))
    small = keras_polar.convert(gated, verify=True)
    assert keras_polar.cost(small).weights == small.count_params() < model.count_params()
    return small


def test_a_layer_that_cannot_be_copied_is_shared_and_the_caller_is_told():
    model = around(Opaque(lock()))
    flags = [v.trainable for v in model.layers[-1].variables]
    with pytest.warns(
        UserWarning, match=r"nor copied: .*Implement `get_config`.*does not train it"
    ):
        pruned_and_trained(model)
    assert [v.trainable for v in model.layers[-1].variables] == flags == [True]


def test_a_frozen_one_is_shared_without_a_word():
    model = around(Opaque(lock(), trainable=False))
    pruned_and_trained(model)


def lock():
    import threading

    return threading.Lock()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TFSMLayer is TensorFlow's")
def test_a_saved_model_of_tensorflow_is_a_fixed_part(tmp_path):
    inputs = keras.Input((8,))
    keras.Model(inputs, layers.Dense(3)(inputs)).export(tmp_path / "fsm", verbose=False)
    model = around(layers.TFSMLayer(tmp_path / "fsm", call_endpoint="serve"))
    rows = {r.name: r for r in keras_polar.inspect(model).rows}
    assert (rows["free"].prunable, rows["before"].prunable) == (16, 0)
    with pytest.warns(UserWarning, match=r"call keras.config.enable_unsafe_deserialization\(\)"):
        pruned_and_trained(model)
    with SafeModeScope(False):  # what that function does, to be taken back
        gated = keras_polar.apply(model, 0.2, gate="static")
    part = next(x for x in gated.layers if isinstance(x, layers.TFSMLayer))
    assert len(part.trainable_variables) == 2  # a copy
