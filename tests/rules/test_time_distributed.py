"""TimeDistributed models open: one call for each step, units pruned, costs times the steps."""

import keras
import numpy as np
import pytest
from helpers import check, close_half, randomise
from keras import layers

import keras_polar


def cnn(shape=(8, 8, 3), head=layers.GlobalAveragePooling2D):
    inputs = keras.Input(shape)
    x = layers.BatchNormalization()(layers.Conv2D(6, 3, padding="same", name="first")(inputs))
    x = layers.Add()([x, layers.Conv2D(6, 3, padding="same", activation="relu", name="second")(x)])
    return keras.Model(inputs, head()(layers.Conv2D(8, 3, name="third")(x)), name="cnn")


def inner(shape, *steps):
    inputs = x = keras.Input(shape)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, x)


def video(*steps, steps_of_time=3):
    return inner((steps_of_time, 8, 8, 3), *steps, layers.Dense(3, name="head"))


def each(layer):
    return layers.TimeDistributed(layer)


def shared_inside_and_outside():
    frames, frame = keras.Input((3, 8, 8, 3)), keras.Input((8, 8, 3))
    net = cnn()
    both = layers.Concatenate()([layers.LSTM(6)(each(net)(frames)), net(frame)])
    return keras.Model([frames, frame], layers.Dense(3, name="head")(both))


def called_twice():
    frames, net = keras.Input((3, 8, 8, 3)), each(cnn())
    darker = layers.GRU(5)(net(layers.Rescaling(0.5)(frames)))
    both = layers.Concatenate()([layers.LSTM(6)(net(frames)), darker])
    return keras.Model(frames, layers.Dense(3, name="head")(both))


MODELS = {
    "frames": lambda: video(each(cnn()), layers.LSTM(6)),
    "frames, flat": lambda: video(each(cnn(head=layers.Flatten)), layers.GRU(6)),
    "one frame": lambda: video(each(cnn()), layers.LSTM(6), steps_of_time=1),
    "average of frames": lambda: video(each(cnn()), layers.GlobalAveragePooling1D()),
    "layers and models": lambda: video(
        each(inner((8, 8, 3), layers.Conv2D(5, 3), layers.Conv2D(4, 3))),
        each(layers.MaxPooling2D()),
        each(layers.Flatten()),
        each(layers.Dense(7)),
        layers.LSTM(6),
    ),
    "models of models": lambda: inner(
        (2, 3, 8, 8, 3),
        each(inner((3, 8, 8, 3), each(cnn()), layers.LSTM(5))),
        layers.LSTM(4),
        layers.Dense(3, name="head"),
    ),
    "units from before": lambda: inner(
        (4, 6),
        layers.Dense(8, name="before"),
        each(inner((8,), layers.Dense(7, activation="relu"), layers.Dropout(0.5), layers.Dense(5))),
        layers.Flatten(),
        layers.Dense(3, name="head"),
    ),
    "recurrent": lambda: inner(
        (3, 4, 6),
        layers.Dense(8),
        each(layers.Bidirectional(layers.LSTM(5))),
        layers.LSTM(4),
        layers.Dense(3, name="head"),
    ),
    "shared inside and outside": shared_inside_and_outside,
    "called twice": called_twice,
}


@pytest.mark.parametrize("gate", ["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_all_units_inside_can_go(name, gate):
    model = randomise(MODELS[name]())
    check(model, gate)
    found = keras_polar.inspect(model)
    assert not found.unknown
    assert all(r.prunable == r.units for r in found.rows if r.name != "head"), found


def test_sentences_of_words_with_their_masks():
    word = keras.Input((6,), dtype="int32")
    x = layers.LSTM(5)(layers.Embedding(30, 8, mask_zero=True)(word))
    sentence = keras.Model(word, layers.Dense(7, activation="relu")(x))
    words = keras.Input((4, 6), dtype="int32")
    model = keras.Model(words, layers.Dense(3)(layers.LSTM(6)(each(sentence)(words))))
    tokens = np.random.default_rng(0).integers(0, 5, (3, 4, 6)).astype("int32")
    gated, _ = check(randomise(model), inputs=tokens)
    assert sum(g.units for g in gated.groups) == 8 + 5 + 7 + 6


def test_costs_are_those_of_all_steps():
    net = inner((32, 32, 3), layers.Conv2D(64, 3), layers.Conv2D(64, 3))
    frames = keras.Input((8, 32, 32, 3))
    x = layers.GlobalAveragePooling2D()(net.output)
    x = layers.Flatten()(each(keras.Model(net.input, x))(frames))
    model = keras.Model(frames, layers.Dense(4)(layers.Dense(32, activation="relu")(x)))
    true = 8 * (30 * 30 * 64 * 27 + 28 * 28 * 64 * 576) + 512 * 32 + 32 * 4
    assert keras_polar.cost(model).macs == true
    assert keras_polar.cost(model).weights == model.count_params()
    gated = keras_polar.apply(model, 0.5, measure="macs")
    gated.settle()
    small = keras_polar.convert(gated)
    assert keras_polar.cost(small).macs / true == pytest.approx(0.5, abs=0.01)
    assert len(str(keras_polar.cost(model)).splitlines()) == 4 + 5  # one line for each layer


def test_half_of_a_video_model_does_not_take_all_from_its_lstm():
    model = inner((5, 16, 16, 3), each(cnn((16, 16, 3))), layers.LSTM(24), layers.Dense(4))
    gated = keras_polar.apply(model, 0.5)  # warnings are errors
    gated.settle()
    assert keras_polar.convert(gated).get_layer("lstm").units >= 8


def test_frames_without_a_known_number_stay_whole_and_are_counted_as_one():
    model = randomise(video(each(cnn()), layers.LSTM(6), steps_of_time=None))
    frames = np.random.default_rng(0).standard_normal((2, 3, 8, 8, 3)).astype("float32")
    with pytest.warns(UserWarning, match="time_distributed .* stay as they are, for the length is"):
        check(model, inputs=frames)
    found, one = keras_polar.cost(model), video(each(cnn()), layers.LSTM(6), steps_of_time=1)
    assert not found.sizes_known
    assert found.macs == keras_polar.cost(one).macs
    reasons = " ".join(r.reason for r in keras_polar.inspect(model).rows)
    assert "build the model on inputs with fixed sizes" in reasons
    assert "in user code" not in reasons


def test_training_goes_on_in_the_small_model():
    model = randomise(video(each(cnn()), layers.LSTM(6)))
    x, y = np.random.default_rng(0).random((8, 3, 8, 8, 3)).astype("float32"), np.ones((8, 3))
    gated = keras_polar.apply(model, 0.4)
    gated.compile("adam", "mse")
    gated.fit(x, y, epochs=4, batch_size=4, verbose=0)
    assert gated.settled
    assert abs(gated.sparsity - 0.4) < 0.02
    small = keras_polar.convert(gated, verify=x)
    small.compile("adam", "mse")
    small.fit(x, y, verbose=0)


def test_the_small_model_loads_alone(tmp_path):
    gated = keras_polar.apply(randomise(video(each(cnn()), layers.LSTM(6))), 0.4)
    close_half(gated)
    small = keras_polar.convert(gated)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    x = np.random.default_rng(0).random((2, 3, 8, 8, 3)).astype("float32")
    assert np.array_equal(small.predict(x, verbose=0), loaded.predict(x, verbose=0))
