"""Pruning for time: the table of measured operations, its file and cache, the polynomial of it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import randomise, small_resnet
from keras import layers, ops

import keras_polar
from keras_polar.costs.fusion import fused
from keras_polar.costs.latency import coefficients
from keras_polar.costs.measures import cost_of
from keras_polar.costs.polynomial import Polynomial
from keras_polar.coupling.coupling import analyze, ignoring
from keras_polar.litert.runtime import interpreter
from keras_polar.litert.split_model import convert_each

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="LiteRT files are written by TensorFlow"
)


def two_convolutions(size=8, head=True):
    x = inputs = keras.Input((size, size, 3))
    for i, width in enumerate((24, 32)):
        x = layers.Conv2D(width, 3, use_bias=False, name=f"conv{i}")(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x) if head else x)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def table(cache):
    return keras_polar.latency_table(two_convolutions(), runs=3)


def pieces(model):
    return fused(analyze(model))


# --- what is measured -------------------------------------------------------------------------


def test_followers_are_part_of_the_layer_before_them():
    found = [[s.name for s in p.sites] for p in pieces(small_resnet())]
    assert ["stem", "stem_bn", "re_lu"] in [[*f[:2], f[2][:5]] for f in found if len(f) == 3]
    assert sum(map(len, found)) == len(analyze(small_resnet()).sites)
    assert any(f[0].startswith("add") and f[1].startswith("re_lu") for f in found)


def test_a_tensor_with_two_readers_ends_a_piece():
    x = keras.Input((8,))
    y = layers.Dense(8, name="dense")(x)
    model = keras.Model(x, layers.Add()([y, layers.ReLU()(y)]))
    assert [len(p.calls) for p in pieces(model)] == [1, 1, 1]


def test_sizes_at_full_width_are_those_of_the_layer():
    piece = next(p for p in pieces(two_convolutions()) if p.name == "conv1")
    read_, written = 6 * 6 * 24, 4 * 4 * 32
    macs = 4 * 4 * 9 * 24 * 32
    assert piece.sizes(piece.variants[0]) == (read_, written, macs, written, macs)
    assert len(piece.variants) == 3 * 4  # 24, 16, 8 in; 32, 24, 16, 8 out


def test_every_operation_has_a_time_for_every_width(table):
    found = pieces(two_convolutions())
    assert {p.key for p in found} == set(table.ops)
    for piece in found:
        rows = table.ops[piece.key]
        assert [row[:-1] for row in rows] == [piece.sizes(v) for v in piece.variants]
        assert all(row[-1] > 0 for row in rows)


def test_equal_layers_are_one_operation():
    x = inputs = keras.Input((4, 4, 8))
    for _ in range(4):
        x = layers.ReLU()(layers.Conv2D(8, 3, padding="same")(x))
    model = keras.Model(inputs, layers.Flatten()(x))
    assert len({p.key for p in pieces(model)}) < len(pieces(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "middle",
    [
        lambda x: layers.SeparableConv2D(16, 3)(x),
        lambda x: layers.DepthwiseConv2D(3)(x),
        lambda x: layers.Concatenate()([x, layers.Conv2D(8, 1)(x)]),
        lambda x: layers.Multiply()([x, layers.GlobalAveragePooling2D(keepdims=True)(x)]),
        lambda x: layers.Dropout(0.1)(layers.ZeroPadding2D(1)(x)),
        lambda x: ops.silu(x) * 2.0,
        lambda x: layers.MultiHeadAttention(2, 4)(*2 * [layers.Reshape((36, 16))(x)]),
    ],
    ids="separable depthwise concatenate gate padding ops attention".split(),
)
def test_layers_of_other_kinds(middle, tmp_path):
    x = keras.Input((8, 8, 3))
    y = middle(layers.Conv2D(16, 3, activation="relu")(x))
    model = keras.Model(x, layers.Dense(3)(layers.Flatten()(y)))
    table = keras_polar.latency_table(model, tmp_path / "table.json", runs=1)
    # Little: what so small layers take hardly depends on their widths.
    gated = keras_polar.apply(model, 0.01, measure="latency", latency_table=table, min_units=1)
    assert gated.budget.full_cost > 0


def test_one_conversion_of_many_models(tmp_path):
    """Each file computes what its model computes, and a model that computes nothing has none."""
    models = []
    for width in (4, 8, 4):
        x = keras.Input(batch_shape=(1, 6, 6, 3))
        y = layers.BatchNormalization()(layers.Conv2D(width, 3)(x))
        models.append(randomise(keras.Model(x, [layers.ReLU()(y), layers.Flatten()(y)])))
    x = keras.Input(batch_shape=(1, 4))
    models.insert(1, keras.Model(x, layers.Dropout(0.5)(x)))
    files = convert_each(models)
    assert files.pop(1) == b""
    image = np.random.default_rng(0).random((1, 6, 6, 3)).astype("float32")
    for content, model in zip(files, [m for m in models if len(m.outputs) == 2], strict=True):
        (tmp_path / "part.tflite").write_bytes(content)
        found = run(tmp_path / "part.tflite", image)
        for one, other in zip(found, model(image), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def run(path, image):
    ready = interpreter(path, 1)
    ready.allocate_tensors()
    ready.set_tensor(ready.get_input_details()[0]["index"], image)
    ready.invoke()
    return [ready.get_tensor(d["index"]) for d in ready.get_output_details()]


# --- the polynomial ---------------------------------------------------------------------------


def time_of(model, table, ignore=()):
    whole = analyze(model)
    return cost_of(ignoring(whole, ignore), table, whole=whole)


def test_the_polynomial_is_the_sum_of_the_operations(table):
    """At every width of the grid, to the picosecond that coefficients are rounded to."""
    model = two_convolutions()
    found, cost = pieces(model), time_of(model, table)
    for counts in [(24, 32), (24, 24), (16, 16), (8, 32), (8, 8)]:
        flags = _flags(model, counts)
        fitted = 0.0
        for piece in found:
            constant, *slopes = coefficients(table.ops[piece.key])
            fitted += constant + np.dot(slopes, piece.sizes(flags))
        assert cost(counts) == pytest.approx(1000 * fitted, rel=1e-3)


def _flags(model, counts):
    coupling = analyze(model)
    flags = np.ones(len(coupling.roots), bool)
    for group, count in zip(coupling.groups, counts, strict=True):
        flags[group.roots[count:]] = False
    return flags[coupling.roots]


def test_ignored_layers_cost_the_same(table):
    model = two_convolutions()
    all_of_it, part = time_of(model, table), time_of(model, table, ignore=["conv0"])
    for count in (32, 24, 16, 5):
        assert part([count]) == all_of_it([24, count])


def test_blocks_of_channels():
    steps = Polynomial((1,), ((2 + 1,),))
    assert [steps([9, n]) for n in (0, 1, 16, 17, 32)] == [0, 16, 16, 32, 32]
    counts = ops.convert_to_tensor([9.0, 17.0])
    assert float(steps.expected(counts, 1.0)) == 32


def test_coefficients_are_not_negative_and_exact_where_they_can_be():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, (12, 5)).astype(float)
    true = np.array([3.0, 0.5, 0.0, 2.0, 0.0, 1.0])
    rows = [(*s, true[0] + s @ true[1:]) for s in sizes]
    np.testing.assert_allclose(coefficients(rows), true, atol=1e-6)
    assert min(coefficients([(*s, -1.0) for s in sizes])) == 0.0


# --- apply ------------------------------------------------------------------------------------


def test_settled_networks_have_the_predicted_latency_removed(table):
    model = two_convolutions()
    gated = keras_polar.apply(model, 0.3, measure="latency", latency_table=table, round_to=1)
    gated.settle()
    assert gated.sparsity >= 0.25
    small = keras_polar.convert(gated, verify=True)
    kept = [small.get_layer(n).filters for n in ("conv0", "conv1")]
    cost = time_of(model, table)
    assert 1 - cost(kept) / cost([24, 32]) == pytest.approx(gated.sparsity, abs=0.005)


def test_it_trains_and_a_saved_one_loads(table, tmp_path):
    options = {"measure": "latency", "latency_table": table, "round_to": 1}
    gated = keras_polar.apply(two_convolutions(), 0.3, **options)
    gated.compile("sgd", "mse")
    gated.fit(np.zeros((8, 8, 8, 3)), np.zeros((8, 4)), epochs=2, verbose=0)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert loaded.sparsity == gated.sparsity
    assert loaded.consensus.measure == "latency"


def test_branches_go_with_their_sum(tmp_path):
    model = small_resnet()
    table = keras_polar.latency_table(model, tmp_path / "table.json", runs=1)
    options = {"latency_table": table, "granularity": "blocks", "max_sparsity": 1.0}
    gated = keras_polar.apply(model, 0.01, measure="latency", **options)
    closed = gated.budget.cost([0] * len(gated.groups))
    assert 0 < closed < gated.budget.full_cost


# --- files ------------------------------------------------------------------------------------


def test_a_table_from_a_file_gives_the_same_budget(table, tmp_path):
    path = tmp_path / "table.json"
    table.save(path)
    loaded = keras_polar.LatencyTable.load(path)
    assert loaded == table
    assert str(loaded).startswith(table.device)
    options = {"measure": "latency", "gate": "static"}
    model = two_convolutions()
    given = keras_polar.apply(model, 0.3, latency_table=table, **options)
    read_ = keras_polar.apply(model, 0.3, latency_table=str(path), **options)
    assert given.budget == read_.budget
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]  # no draft is left


def test_what_the_cache_holds_is_not_measured_again(table, cache):
    (file,) = (cache / "keras_polar").iterdir()
    before = file.stat().st_mtime_ns
    gated = keras_polar.apply(two_convolutions(), 0.3, measure="latency")
    assert gated.budget.cost == time_of(two_convolutions(), table)
    assert file.stat().st_mtime_ns == before


def test_a_table_is_added_to(table, tmp_path):
    path = tmp_path / "table.json"
    table.save(path)
    wider = keras_polar.latency_table(two_convolutions(9), path, runs=1)
    both = keras_polar.LatencyTable.load(path)
    assert table.ops.items() <= both.ops.items()
    assert set(wider.ops) - set(table.ops)


# --- what cannot be ---------------------------------------------------------------------------


def test_an_operation_that_the_table_lacks(table):
    with pytest.raises(ValueError, match=r"layer 'conv0'.*latency_table\(model\)\.save"):
        keras_polar.apply(two_convolutions(16), 0.3, measure="latency", latency_table=table)


def test_unknown_sizes():
    model = two_convolutions(None)
    for call in (
        lambda: keras_polar.apply(model, 0.3, measure="latency"),
        lambda: keras_polar.latency_table(model),
    ):
        with pytest.raises(ValueError, match="known sizes"):
            call()


def test_a_table_for_another_measure(table):
    with pytest.raises(ValueError, match="measure='macs'"):
        keras_polar.apply(two_convolutions(), 0.3, measure="macs", latency_table=table)
    with pytest.raises(TypeError, match="latency_table"):
        keras_polar.apply(two_convolutions(), 0.3, measure="latency", latency_table=3)


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"format": 2}'])
def test_a_file_that_is_no_table(content, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="measure again"):
        keras_polar.LatencyTable.load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="latency_table"):
        keras_polar.apply(
            two_convolutions(), 0.3, measure="latency", latency_table=tmp_path / "none.json"
        )


def test_a_table_of_another_device_is_not_added_to(table, tmp_path):
    path = tmp_path / "table.json"
    table.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "a phone"}))
    with pytest.raises(ValueError, match="a phone"):
        keras_polar.latency_table(two_convolutions(), path)


@pytest.mark.skipif(not find_spec("jax"), reason="Keras on NumPy takes some of it from JAX")
def test_another_backend(table, tmp_path):
    """There a table can be used but not made."""
    table.save(tmp_path / "table.json")
    code = (
        "import keras, keras_polar, pytest, test_latency as t\n"
        "m = t.two_convolutions()\n"
        "with pytest.raises(ValueError, match='KERAS_BACKEND=tensorflow'):\n"
        "    keras_polar.latency_table(m, 'other.json')\n"
        "assert t.time_of(m, keras_polar.LatencyTable.load('table.json'))([24, 32]) > 0\n"
    )
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "KERAS_BACKEND": "numpy", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize("options", [{"runs": 0}, {"threads": 0}])
def test_bad_numbers(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        keras_polar.latency_table(two_convolutions(), **options)


def test_a_layer_that_lite_rt_does_not_know(tmp_path):
    x = keras.Input((8,))
    y = layers.Dense(8, name="before")(x)
    model = keras.Model(x, layers.Dense(2)(ops.sort(ops.erfinv(y))))
    with pytest.raises(ValueError, match=r"layer 'before' cannot be timed"):
        keras_polar.latency_table(model, tmp_path / "table.json", runs=1)
