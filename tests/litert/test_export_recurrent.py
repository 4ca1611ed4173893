"""Recurrent layers as .tflite files: loops of one sample, or written out step by step for int8."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_polar.litert import export_tflite, run_tflite
from keras_polar.litert.converter import MOST_STEPS

STEPS = 3
SEQUENCE, VIDEO = (STEPS, 4), (STEPS, 5, 2)
KINDS = {
    "LSTM": (layers.LSTM, SEQUENCE),
    "GRU": (layers.GRU, SEQUENCE),
    "GRU reset before": (lambda n, **k: layers.GRU(n, reset_after=False, **k), SEQUENCE),
    "SimpleRNN": (layers.SimpleRNN, SEQUENCE),
    "ConvLSTM1D": (lambda n, **k: layers.ConvLSTM1D(n, 3, **k), VIDEO),
    "ConvLSTM2D": (lambda n, **k: layers.ConvLSTM2D(n, 3, **k), (STEPS, 5, 5, 2)),
    "ConvLSTM3D": (lambda n, **k: layers.ConvLSTM3D(n, 3, **k), (STEPS, 4, 4, 4, 2)),
    "Bidirectional": (lambda n, **k: layers.Bidirectional(layers.LSTM(n, **k)), SEQUENCE),
    "cell": (lambda n, **k: layers.RNN(layers.GRUCell(n), **k), SEQUENCE),
    "cells": (lambda n, **k: layers.RNN([layers.LSTMCell(n), layers.GRUCell(3)], **k), SEQUENCE),
    "TimeDistributed": (
        lambda n, **k: layers.TimeDistributed(layers.SimpleRNN(n, **k)),
        (2, *SEQUENCE),
    ),
    "nested": (lambda n, **k: nested(layers.GRU(n, **k)), SEQUENCE),
}
FORMS = {"open": {}, "fixed": {"batch_size": 2}, "unrolled": {"unroll": True}}
QUICK = [("LSTM", "open"), ("SimpleRNN", "unrolled")]


def nested(layer):
    inputs = keras.Input(SEQUENCE)
    return keras.Model(inputs, layer(inputs), name="inner")


def model_of(layer, shape=SEQUENCE, **options):
    inputs = keras.Input(shape, name="x", **options)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layer(inputs))))


def samples(shape=SEQUENCE, count=16):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype("float32")


def slow_but(quick):
    pairs = [(kind, form) for kind in KINDS for form in FORMS]
    return [pytest.param(*x, marks=() if x in quick else pytest.mark.slow) for x in pairs]


@pytest.mark.parametrize(("kind", "form"), slow_but(QUICK))
def test_every_recurrent_layer_is_exported_in_every_form(tmp_path, kind, form):
    make, shape = KINDS[kind]
    options = FORMS[form]
    model = model_of(
        make(4, unroll="unroll" in options), shape, batch_size=options.get("batch_size")
    )
    x, path = samples(shape), tmp_path / "net.tflite"
    batch = {"open": 1, "fixed": 2, "unrolled": None}[form]
    for quantize, tolerance in ((None, 1e-5), ("dynamic", 0.05), ("int8", 0.15)):
        report = export_tflite(model, path, quantize, representative_data=x)
        assert report.relative_difference <= tolerance, quantize
        assert report.inputs[0].shape == (batch, *shape)
        assert any("batch size is fixed at 1" in note for note in report.notes) == (form == "open")
        written_out = quantize == "int8" and form != "unrolled"
        assert any(f"({STEPS} steps)" in note for note in report.notes) == written_out
        assert all(note in str(report) for note in report.notes)
    expected = np.concatenate([model(x[i : i + 2]) for i in range(0, 16, 2)])
    got = run_tflite(path, x)["output_0"]
    assert np.abs(got - expected).max() <= 0.15 * np.abs(expected).max()


def test_model_with_loops_is_not_changed(tmp_path):
    layer = layers.GRU(4)
    model = model_of(layer)
    weights = [w.copy() for w in model.get_weights()]
    export_tflite(model, tmp_path / "net.tflite", "int8", representative_data=samples())
    assert not layer.unroll
    assert len(layer._inbound_nodes) == len(model.layers[-1]._inbound_nodes) == 1
    assert model._inbound_nodes == []
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("unroll", "quantize", "tolerance"),
    [(False, None, 1e-5), pytest.param(True, "int8", 0.5, marks=pytest.mark.slow)],
)
def test_states_are_as_before(tmp_path, unroll, quantize, tolerance):
    layer = layers.LSTM(4, stateful=True, unroll=unroll)
    model = model_of(layer, batch_size=2)
    model(samples(count=2))
    before = [np.array(x) for x in layer.states]
    report = export_tflite(model, tmp_path / "net.tflite", quantize, representative_data=samples())
    assert report.relative_difference <= tolerance
    for old, state in zip(before, layer.states, strict=True):
        np.testing.assert_array_equal(old, state)


@pytest.mark.parametrize("bidirectional", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_masked_steps_are_left_out(tmp_path, bidirectional):
    gru = layers.GRU(4)
    layer = layers.Bidirectional(gru) if bidirectional else gru
    lengths = np.arange(16) % STEPS + 1
    x = np.where(np.arange(STEPS)[:, None] < lengths[:, None, None], samples(), 0)
    model = model_of(lambda t: layer(layers.Masking()(t)))
    path = tmp_path / "net.tflite"
    assert export_tflite(model, path, representative_data=x).relative_difference <= 1e-5
    assert export_tflite(model, path, "int8", representative_data=x).relative_difference <= 0.15


def test_steps_that_are_always_masked_are_an_error_and_no_crash(tmp_path):
    # XNNPACK frees memory twice where a product's inputs were zero in all samples.
    x = np.where(np.arange(STEPS)[:, None] < STEPS - 1, samples(), 0)
    model = model_of(lambda t: layers.GRU(4)(layers.Masking()(t)))
    with pytest.raises(ValueError, match=r"LiteRT breaks down.*masked.*'dynamic'"):
        export_tflite(model, tmp_path / "net.tflite", "int8", representative_data=x)
    assert list(tmp_path.iterdir()) == []
    export_tflite(model, tmp_path / "net.tflite", "dynamic", representative_data=x)


def test_open_number_of_steps_is_a_loop_and_int8_says_what_to_do(tmp_path):
    model, path = model_of(layers.GRU(4), (None, 4)), tmp_path / "net.tflite"
    report = export_tflite(model, path, representative_data=samples())
    assert report.relative_difference <= 1e-5
    assert report.inputs[0].shape == (1, None, 4)
    with pytest.raises(ValueError, match=r"fixed number of steps.*\(None, None, 4\).*'dynamic'"):
        export_tflite(model, path, "int8", representative_data=samples())
    x = keras.Input(SEQUENCE)
    report = export_tflite(keras.Model(x, model(x)), path, "int8", representative_data=samples())
    assert report.relative_difference <= 0.15


def test_long_sequences_stay_loops(tmp_path):
    shape = (MOST_STEPS + 1, 2)
    model, x = model_of(layers.SimpleRNN(3), shape), samples(shape, 2)
    with pytest.raises(ValueError, match=r"at most 512 steps.*have 513.*'dynamic'"):
        export_tflite(model, tmp_path / "net.tflite", "int8", representative_data=x)
    report = export_tflite(model, tmp_path / "net.tflite", "dynamic", representative_data=x)
    assert report.relative_difference <= 0.05


# --- other loops, and infinities -------------------------------------------------------------


def scan(x):
    start = ops.zeros_like(x[:, 0])
    return ops.scan(lambda carry, t: (carry + t, carry), start, ops.swapaxes(x, 0, 1))[0]


def test_loop_of_another_layer_takes_one_sample_at_a_time(tmp_path):
    report = export_tflite(model_of(layers.Lambda(scan)), tmp_path / "net.tflite")
    assert report.inputs[0].shape == (1, *SEQUENCE)
    assert "batch size is fixed at 1" in str(report)
    assert report.relative_difference <= 1e-5


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: ops.map(lambda t: 2 * t, x),
        pytest.param(lambda x: ops.relu(ops.log(ops.relu(x))), marks=pytest.mark.slow),
        pytest.param(scan, marks=pytest.mark.slow),
    ],
)
def test_calibrator_that_ends_its_process_is_an_error(tmp_path, compute):
    model, path = model_of(layers.Lambda(compute)), tmp_path / "net.tflite"
    with pytest.raises(ValueError, match=r"calibrator breaks down.*'dynamic' or 'float16'"):
        export_tflite(model, path, "int8", representative_data=samples())
    assert list(tmp_path.iterdir()) == []
    export_tflite(model, path, "dynamic", representative_data=samples())


@pytest.mark.slow
def test_loop_that_the_calibrator_survives_is_exported(tmp_path):
    loop = layers.Lambda(lambda x: ops.fori_loop(0, 3, lambda i, t: 0.5 * t + 1.0, x))
    report = export_tflite(
        model_of(loop), tmp_path / "net.tflite", "int8", representative_data=samples()
    )
    assert report.relative_difference <= 0.1
