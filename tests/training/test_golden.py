"""Files that an earlier version saved (commit 2120981) load, train on and convert as they did."""

import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_polar
from keras_polar.surgery.certificate import difference

GOLDEN = Path(__file__).parent / "golden"


def data(samples=64):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 9, (64, 6)).astype("int32")
    image = rng.standard_normal((64, 6, 6, 1)).astype("float32")
    return [tokens[:samples], image[:samples]], rng.integers(0, 3, 64)[:samples]


@pytest.mark.parametrize(("name", "settled"), [("gated", False), ("settled", True)])
def test_a_saved_model_gives_its_outputs_trains_on_and_converts(name, settled):
    gated = keras.models.load_model(GOLDEN / f"{name}.keras")
    assert type(gated) is keras_polar.GatedModel
    assert gated.settled is settled
    x, y = data()
    outputs = gated.predict(data(8)[0], verbose=0)
    np.testing.assert_allclose(outputs, np.load(GOLDEN / f"{name}.npy"), rtol=1e-5, atol=1e-6)
    history = gated.fit(x, y, epochs=8, initial_epoch=3, batch_size=16, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert gated.settled
    assert gated.sparsity == pytest.approx(0.3955342902711324)
    small = keras_polar.convert(gated, verify=x)
    whole = keras_polar.cost(gated).weights
    assert small.count_params() == round((1 - gated.sparsity) * whole)


def test_saved_weights_fit_into_a_model_of_today(tmp_path):
    with zipfile.ZipFile(GOLDEN / "weights.zip") as file:
        file.extractall(tmp_path)
    gated = keras.models.load_model(GOLDEN / "gated.keras")
    gated.load_weights(tmp_path / "settled.weights.h5")
    assert gated.settled
    settled = keras.models.load_model(GOLDEN / "settled.keras")
    assert difference(settled, gated, data()[0]) == 0
