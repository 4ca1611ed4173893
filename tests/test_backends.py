"""Gates, losses, fit and convert on whatever backend KERAS_BACKEND names."""

import keras
import numpy as np
import pytest
from helpers import small_resnet

import keras_polar
from keras_polar.samples import difference


@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_apply_fit_convert(gate):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 8, 8, 1)).astype("float32")
    y = (x.mean(axis=(1, 2, 3)) > 0).astype("int64")
    gated = keras_polar.apply(small_resnet(classes=2), 0.5, gate=gate)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    gated.compile("adam", loss, metrics=["accuracy"], jit_compile=False)
    history = gated.fit(x, y, epochs=6, batch_size=32, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["sparsity"][0] == pytest.approx(0, abs=0.05)
    assert history["sparsity"][-1] == pytest.approx(gated.sparsity, abs=1e-5)
    assert abs(gated.sparsity - 0.5) <= 0.015  # one unit of this tiny model is about 1 %
    assert difference(gated, keras_polar.convert(gated, verify=x[:32]), x[:32]) <= 1e-4
