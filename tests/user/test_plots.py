"""The pictures show the numbers they are given; the recorder and TensorBoard get the gates'."""

import sys

import keras
import numpy as np
import pytest
from helpers import close_half, small_resnet

import keras_polar
from keras_polar import plots

RATES = {
    "a": [[1.0, 1.0, 1.0], [0.2, 1.0, 0.4], [0.0, 1.0, 0.0]],
    "b": [[1.0, 1.0], [0.5, 0.5], [1.0, 0.0]],
}


def drawn(figure):
    figure.draw_without_rendering()  # raises if anything does not fit
    return figure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A gated model, what the recorder has, and the folder of TensorBoard."""
    folder = tmp_path_factory.mktemp("logs")
    x = np.random.default_rng(0).standard_normal((64, 8, 8, 1)).astype("float32")
    gated = keras_polar.apply(small_resnet(), 0.5, gate="static")
    gated.compile("sgd", "mse", jit_compile=False)
    rates = keras_polar.callbacks.OpenRates()
    callbacks = [rates]
    if keras.backend.backend() == "tensorflow":
        callbacks.append(keras.callbacks.TensorBoard(folder, histogram_freq=1))
    gated.fit(x, np.zeros((64, 10)), epochs=3, verbose=0, callbacks=callbacks)
    return gated, rates.history, folder


def test_shares_below_a_percent_are_labelled():
    """One unit of 2,000 disagrees."""
    rates = np.ones((2, 2000))
    rates[1, 0] = 0.5
    bar = drawn(plots.polarization({"a": rates})).axes[-1]
    labels = {label.get_text() for label in bar.get_yticklabels()}
    assert {"0.1%", "1%", "100%"} <= labels


def test_open_rates_show_what_stays_below_the_line():
    figure = drawn(plots.open_rates(RATES))
    a, b = figure.axes[:2]
    # Unit 1 stays; of the others the one that was open longer comes first.
    np.testing.assert_allclose(a.images[0].get_array().T, np.array(RATES["a"])[:, [1, 2, 0]])
    assert a.lines[0].get_ydata()[0] == 1
    assert a.get_title() == "a\n1 of 3 units open"
    np.testing.assert_allclose(b.images[0].get_array().T, RATES["b"])


def test_polarization_is_a_histogram_for_each_time():
    figure = drawn(plots.polarization(RATES))
    above, below = figure.axes[:2]
    shares = above.images[0].get_array().filled(0)
    assert shares.shape == (plots.BINS, 3)
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    np.testing.assert_allclose(shares[-1], [1, 0.2, 0.4], rtol=1e-6)  # open for all samples
    np.testing.assert_allclose(shares[0], [0, 0, 0.6], rtol=1e-6)  # for none
    np.testing.assert_allclose(
        below.lines[0].get_ydata(), [1, 1 - 4 * ((0.16 + 0.24) / 3 + 0.5 / 2) / 2, 1], rtol=1e-6
    )


def test_widths_are_those_of_the_layers():
    model = small_resnet()
    gated = keras_polar.apply(model, 0.5, gate="static")
    close_half(gated)
    axis = drawn(plots.widths(model, keras_polar.convert(gated))).axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[:3] == ["stem", "block0_a", "block0_b"]
    before, after = ([bar.get_width() for bar in bars] for bars in axis.containers)
    assert before == [8, 8, 8, 16, 16, 16, 10]
    assert after == [4, 4, 4, 8, 8, 8, 10]
    assert [t.get_text() for t in axis.texts][-2:] == ["8 / 16", "10 / 10"]


def test_shares_of_groups_stand_beside_the_uniform_one():
    gated = keras_polar.apply(small_resnet(), 0.5, gate="static", measure="units")
    kept = [0.25, *[0.5] * (len(gated.groups) - 2), 0.75]
    for group, share in zip(gated.groups, kept, strict=True):
        group.set_mask(np.arange(group.units) < share * group.units)
    axis = drawn(plots.shares(gated)).axes[0]
    whole, stays = ([bar.get_width() for bar in bars] for bars in axis.containers)
    assert stays == kept
    assert set(whole) == {1}
    first = gated.groups[0]
    assert axis.texts[0].get_text() == f"{first.units // 4} / {first.units}"
    units = np.array(gated.budget.units)
    uniform = axis.lines[0].get_xdata()[0]
    below, above = (gated.budget.achieved((uniform + d) * units) for d in (0, 1e-6))
    assert below >= gated.sparsity > above  # widths are whole numbers
    with pytest.raises(TypeError, match=r"plots\.shares: expected a gated model"):
        plots.shares(small_resnet())


def test_trade_off_has_a_line_per_method_and_a_log_scale_for_a_wide_span():
    axis = drawn(plots.trade_off({"dense": [(2e5, 0.93)], "pruned": [(1e5, 0.9), (1e4, 0.8)]})).axes
    dense, pruned = axis[0].lines
    np.testing.assert_array_equal(pruned.get_xydata(), [(1e4, 0.8), (1e5, 0.9)])
    np.testing.assert_array_equal(dense.get_xydata(), [(2e5, 0.93)])
    assert axis[0].get_xscale() == "log"
    narrow = drawn(plots.trade_off({"dense": [(2e5, 0.93)]}, size="MACs", score="F1")).axes[0]
    assert narrow.get_xscale() == "linear"
    assert (narrow.get_xlabel(), narrow.get_ylabel()) == ("MACs", "F1")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'keras_polar\[plots\]'"):
        plots.open_rates(RATES)


def test_open_rates_are_recorded_before_training_and_after_each_epoch(run):
    gated, history, _ = run
    assert list(history) == [g.name for g in gated.groups]
    for group in gated.groups:
        record = np.array(history[group.name])
        assert record.shape == (4, group.units)
        assert (record[0] == 1).all()
        np.testing.assert_array_equal(record[-1], group.mask)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow reads the events")
def test_tensorboard_gets_sparsity_polarization_and_histograms(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gated, _, folder = run
    tags = EventAccumulator(str(folder / "train")).Reload().Tags()["tensors"]
    assert {"epoch_sparsity", "epoch_polarization"} <= {*tags}
    assert sum("open_rates" in tag for tag in tags) == len(gated.groups)


def test_tables_are_html_in_a_notebook():
    model = small_resnet()
    page = keras_polar.cost(model)._repr_html_()
    assert page.count("<tr>") == 15
    assert '<td style="text-align: right">5,266</td>' in page
    page = keras_polar.inspect(keras.Model(model.inputs, model.outputs, name="a<b"))._repr_html_()
    assert "<caption>a&lt;b: " in page
