"""Errors say what was expected, what came, which layer, and what to do."""

import functools

import keras
import numpy as np
import pytest
from helpers import close_half, small_resnet
from keras import layers

import keras_polar
from keras_polar import Schedule, cli, plots

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="LiteRT files are written by TensorFlow"
)


class Subclassed(keras.Model):
    def call(self, x):
        return x


class MyDense(layers.Dense):
    pass


@functools.cache
def model():
    return small_resnet()


@functools.cache
def gated():
    made = keras_polar.apply(small_resnet(), gate="static")
    close_half(made)
    return made


@functools.cache
def unbuilt():
    return keras.Sequential([layers.Dense(3)], name="unbuilt")


@functools.cache
def unprunable():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, name="only")], name="outputs")


@functools.cache
def without_units():
    x = keras.Input((2,))
    return keras.Model(x, layers.ReLU()(x), name="empty")


@functools.cache
def of_open_sizes():
    x = keras.Input((None, None, 3))
    y = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3)(x))
    return keras.Model(x, layers.Dense(2)(y), name="open_sizes")


@functools.cache
def of_two_inputs():
    a, b = keras.Input((2,), name="left"), keras.Input((3,), name="right")
    return keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([a, b])), name="two_inputs")


def apply(**options):
    return lambda: keras_polar.apply(model(), **{"sparsity": 0.5, **options})


def apply_to(build):
    return lambda: keras_polar.apply(build(), 0.5)


def convert(build, **options):
    return lambda: keras_polar.convert(build(), **options)


def remove(units, build=model):
    return lambda: keras_polar.remove(build(), units)


def set_mask(mask):
    return lambda: gated().groups[0].set_mask(mask)


def schedule(**options):
    return lambda: Schedule(**options)


def register(*args, **kwargs):
    return lambda: keras_polar.register(*args, **kwargs)


def export(build, path="small.tflite", **options):
    return lambda: keras_polar.export_tflite(build(), path, **options)


def command(*arguments):
    def run():
        options = cli.parser().parse_args(arguments)
        return options.run(options)

    return run


# What is done, which error comes, what it names (the offender), what it says to do.
APPLY = [
    (apply(sparsity=0.0), ValueError, "received 0.0", "0 < sparsity < 1"),
    (apply(sparsity=1), ValueError, "received 1", "0 < sparsity < 1"),
    (apply(sparsity=50), ValueError, "received 50", "0.5 removes half"),
    (apply(sparsity=-0.5), ValueError, "received -0.5", "0 < sparsity < 1"),
    (apply(sparsity=float("nan")), ValueError, "received nan", "0 < sparsity < 1"),
    (apply(sparsity="half"), TypeError, "'half'", "number in (0, 1)"),
    (apply(sparsity=True), TypeError, "True", "number in (0, 1)"),
    (apply(sparsity=None), TypeError, "None", "number in (0, 1)"),
    (apply(sparsity=0.9999), ValueError, "sparsity=0.9999", "at most 0.9"),
    (apply(min_units=999), ValueError, "min_units=999", "Ask for less"),
    (apply(round_to=999), ValueError, "round_to=999", "Ask for less"),
    (apply(measure="flops"), ValueError, "'flops'", "'macs'"),
    (apply(measure=None), ValueError, "None", "'macs'"),
    (apply(gate="soft"), ValueError, "'soft'", "'static'"),
    (apply(granularity="stages"), ValueError, "'stages'", "'channels'"),
    (apply(round_to=0), ValueError, "received 0", "round_to as an int >= 1"),
    (apply(round_to=8.0), ValueError, "received 8.0", "round_to as an int >= 1"),
    (apply(min_units=1.5), ValueError, "received 1.5", "min_units as an int >= 1"),
    (apply(min_units=True), ValueError, "received True", "min_units as an int >= 1"),
    (apply(schedule="fast"), TypeError, "'fast'", "keras_polar.Schedule"),
    (apply(schedule={"warmup": 0.1}), TypeError, "{'warmup': 0.1}", "keras_polar.Schedule"),
    (apply(ignore=["stem*", "nonsense"]), ValueError, "'nonsense'", "Layers with units: block0_a"),
    (apply(ignore=[3]), TypeError, "received 3", "names or glob patterns"),
    (apply(ignore=5), TypeError, "received 5", "names or glob patterns"),
    (apply(ignore=["*"]), ValueError, "ignored by '*'", "keras_polar.inspect(model)"),
    (apply(speed=3), TypeError, "speed", "unexpected keyword"),
    (apply_to(unbuilt), TypeError, "'unbuilt'", "Add `keras.Input(shape)`"),
    (apply_to(lambda: Subclassed(name="mine")), TypeError, "'mine'", "Make it functional"),
    (apply_to(lambda: "model.keras"), TypeError, "received str", "functional or Sequential"),
    (apply_to(lambda: None), TypeError, "received NoneType", "functional or Sequential"),
    (apply_to(lambda: layers.Dense(3)), TypeError, "received Dense", "functional or Sequential"),
    (apply_to(lambda: keras.Model), TypeError, "received type", "functional or Sequential"),
    (apply_to(unprunable), ValueError, "only: is an output", "keras_polar.inspect(model)"),
    (apply_to(gated), ValueError, "'small_resnet' has gates", "`convert` first"),
    (
        lambda: keras_polar.apply(of_open_sizes(), measure="macs"),
        *(ValueError, "'open_sizes'", "measure='weights'"),
    ),
]

GATED = [
    (
        lambda: gated().train_on_batch(np.ones((2, 8, 8, 1)), np.ones((2, 10))),
        *(ValueError, "'small_resnet'", "schedule=keras_polar.Schedule(steps=n)"),
    ),
    (convert(model), TypeError, "'small_resnet' without gates", "keras_polar.apply"),
    (convert(lambda: "gated.keras"), TypeError, "received str", "keras.models.load_model"),
    (convert(lambda: None), TypeError, "received NoneType", "keras_polar.apply"),
    (convert(gated, verify=np.ones((2, 8, 9, 1))), ValueError, "(2, 8, 9, 1)", "(None, 8, 8, 1)"),
    (convert(gated, verify=np.ones((0, 8, 8, 1))), ValueError, "(0, 8, 8, 1)", "one sample"),
    (convert(gated, verify="yes"), ValueError, "'yes'", "(None, 8, 8, 1)"),
    (convert(gated, verify=[np.ones((1, 8, 8, 1))] * 2), ValueError, "2", "(None, 8, 8, 1)"),
    (
        lambda: keras_polar.GatedModel(*model_ends(), name="bare").groups,
        ValueError,
        "'bare'",
        "apply",
    ),
]


def model_ends():
    x = keras.Input((2,))
    return x, layers.Dense(2)(x)


REMOVE = [
    (remove({"nonsense": [0]}), ValueError, "'nonsense'", "Layers with units: block0_a"),
    (remove({3: [0]}), ValueError, "received 3", "Layers with units: block0_a"),
    (remove({"stem": [8]}), ValueError, "[8]", "'stem' has units 0 to 7"),
    (remove({"stem": [-1]}), ValueError, "[-1]", "'stem' has units 0 to 7"),
    (remove({"stem": [0.5]}), ValueError, "[0.5]", "'stem' has units 0 to 7"),
    (remove({"stem": "all"}), ValueError, "all", "'stem' has units 0 to 7"),
    (remove({"stem": [[0], [1, 2]]}), ValueError, "[[0], [1, 2]]", "'stem' has units 0 to 7"),
    (remove({"stem": [True] * 8}), ValueError, "True", "'stem' has units 0 to 7"),
    (remove({"stem": range(8)}), ValueError, "lose all its 8 units", "Leave at least one"),
    (remove({"logits": [1]}), ValueError, "'logits' cannot go", "keras_polar.inspect(model)"),
    (remove(["stem"]), TypeError, "['stem']", "layer name -> indices"),
    (remove({"stem": [0]}, gated), ValueError, "'small_resnet' has gates", "`convert` it first"),
    (remove({"stem": [0]}, lambda: "model.keras"), TypeError, "received str", "functional"),
]

REPORTS = [
    (lambda: keras_polar.inspect("model.keras"), TypeError, "received str", "functional"),
    (lambda: keras_polar.inspect(unbuilt()), TypeError, "'unbuilt'", "Add `keras.Input(shape)`"),
    (lambda: keras_polar.inspect(model(), ignore="sten"), ValueError, "'sten'", "stem"),
    (lambda: keras_polar.cost([model()]), TypeError, "received list", "functional"),
    (lambda: keras_polar.cost(Subclassed(name="mine")), TypeError, "'mine'", "Make it functional"),
]

SET_MASK = [
    (set_mask(np.ones(7, bool)), ValueError, "(7,)", "(8,)"),
    (set_mask(np.zeros(8, bool)), ValueError, "'stem'", "Leave at least one open"),
    (set_mask(np.ones(8)), ValueError, "float64", "bool array"),
    (set_mask([0, 1] * 4), ValueError, "int", "bool array"),
    (set_mask(None), ValueError, "object", "bool array"),
]

SCHEDULES = [
    (schedule(warmup=0.6), ValueError, "warmup=0.6", "warmup <= ramp"),
    (schedule(settle=1.5), ValueError, "settle=1.5", "settle <= 1"),
    (schedule(warmup=-0.1), ValueError, "warmup=-0.1", "0 <= warmup"),
    (schedule(ramp=float("nan")), ValueError, "ramp=nan", "warmup <= ramp"),
    (schedule(warmup="early"), TypeError, "warmup='early'", "a number"),
    (schedule(settle=None), TypeError, "settle=None", "a number"),
    (schedule(rate="slow"), TypeError, "rate='slow'", "a number"),
    (schedule(steps=0), ValueError, "received 0", "steps >= 1 or None"),
    (schedule(steps=10.5), TypeError, "received 10.5", "steps as an int"),
    (schedule(steps="all"), TypeError, "received 'all'", "steps as an int"),
    (schedule(rate=-1), ValueError, "rate=-1", "rate >= 0"),
    (schedule(polarization=-1), ValueError, "polarization=-1", "polarization >= 0"),
    (schedule(polarization=float("inf")), ValueError, "polarization=inf", "finite"),
    (schedule(cooldown=0.1), TypeError, "cooldown", "unexpected keyword"),
]

REGISTER = [
    (register("Dense", like=layers.Dense), TypeError, "'Dense'", "subclass of keras.layers.Layer"),
    (register(int, like=layers.Dense), TypeError, "int", "subclass of keras.layers.Layer"),
    (register(MyDense), TypeError, "MyDense", "either a rule or like=<class>"),
    (
        register(MyDense, keras_polar.Rule(), like=layers.Dense),
        *(TypeError, "MyDense", "either a rule or like=<class>"),
    ),
    (register(MyDense, keras_polar.Rule), TypeError, "MyDense", "pass an instance"),
    (register(MyDense, "dense"), TypeError, "'dense'", "pass an instance"),
    (register(MyDense, like=layers.Lambda), ValueError, "like='Lambda'", "keras.layers.Dense"),
    (register(MyDense, like="Dense"), ValueError, "like='Dense'", "keras.layers.Dense"),
]

EXPORT = [
    (export(lambda: "model.keras"), TypeError, "received str", "keras.models.load_model"),
    (export(unbuilt), TypeError, "'unbuilt'", "keras.Input(shape)"),
    (export(lambda: Subclassed(name="mine")), TypeError, "'mine'", "Make it functional"),
    (export(model, "small.onnx"), ValueError, "'small.onnx'", "small.tflite"),
    (export(model, 3), TypeError, "received int", "pathlib.Path"),
    (export(model, "nowhere/small.tflite"), FileNotFoundError, "'nowhere'", "Create it first"),
    (export(model, quantize="int3"), ValueError, "'int3'", "'float16'"),
    (export(model, representative_data=np.ones((2, 8, 9, 1))), ValueError, "8, 9", "8, 8"),
    (
        export(model, representative_data=np.ones((0, 8, 8, 1))),
        ValueError,
        "`representative_data`",
        "at least one",
    ),
    (export(of_two_inputs, representative_data=np.ones((2, 2))), ValueError, "'left'", "2 inputs"),
]

COMMANDS = [
    (command("inspect", "missing.keras"), FileNotFoundError, "'missing.keras'", "model.save"),
    (command("inspect", "text.keras"), ValueError, "'text.keras'", "load it in Python"),
    (command("inspect", "plain.keras", "--ignore=sten"), ValueError, "'sten'", "stem"),
    (command("cost", "."), FileNotFoundError, "'.'", "model.save"),
    (command("convert", "plain.keras", "out.keras"), TypeError, "'small_resnet'", "apply"),
    (command("convert", "plain.keras", "out.h5"), ValueError, "'out.h5'", "'.keras'"),
    (command("convert", "plain.keras", "no/o.keras"), FileNotFoundError, "'no'", "Create it"),
    (command("export", "plain.keras", "out.bin"), ValueError, "'out.bin'", "'.tflite'"),
    (
        command("export", "plain.keras", "out.tflite", "--data=missing.npz"),
        *(FileNotFoundError, "'missing.npz'", "numpy.savez"),
    ),
    (
        command("export", "plain.keras", "out.tflite", "--data=pickled.npy"),
        *(ValueError, "'pickled.npy'", "arrays of numbers"),
    ),
    (
        command("export", "plain.keras", "out.tflite", "--data=two.npz"),
        *(ValueError, "['a', 'b']", "numpy.savez"),
    ),
    (
        command("export", "plain.keras", "out.tflite", "--data=text.keras"),
        *(ValueError, "'text.keras'", "numpy.savez"),
    ),
]

PLOTS = [
    (lambda: plots.open_rates({}), ValueError, "none", "callbacks.OpenRates()"),
    (lambda: plots.open_rates({"stem": [1.0, 0.5]}), ValueError, "'stem'", "(times, units)"),
    (lambda: plots.polarization({"stem": []}), ValueError, "'stem'", "(times, units)"),
    (lambda: plots.widths(model(), "small.keras"), TypeError, "received str", "functional"),
    (lambda: plots.widths(without_units(), model()), ValueError, "'empty'", "layer with units"),
    (lambda: plots.trade_off({}), ValueError, "got none", "(size, score)"),
    (lambda: plots.trade_off({"gates": [1e5, 0.9]}), ValueError, "'gates'", "(size, score)"),
    (lambda: plots.trade_off({"gates": [(1e5, 92)]}), ValueError, "92.0", "0.92 for 92 %"),
    (lambda: plots.trade_off({"gates": [(0, 0.9)]}), ValueError, "0.0", "sizes > 0"),
]

TABLES = {
    "plots": PLOTS,
    "apply": APPLY,
    "gated": GATED,
    "remove": REMOVE,
    "report": REPORTS,
    "set_mask": SET_MASK,
    "schedule": SCHEDULES,
    "register": REGISTER,
    "export": EXPORT,
    "command": COMMANDS,
}
CASES = [
    pytest.param(
        *case,
        id=f"{name}{i}",
        marks=[on_tensorflow] if name in ("export", "command") else [],
    )
    for name, table in TABLES.items()
    for i, case in enumerate(table)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files for the commands; the tests run in it."""
    path = tmp_path_factory.mktemp("files")
    model().save(path / "plain.keras")
    (path / "text.keras").write_text("this is no model")
    np.save(path / "pickled.npy", np.array([{}]), allow_pickle=True)
    np.savez(path / "two.npz", a=np.ones(2), b=np.ones(2))
    return path


@pytest.mark.parametrize(("act", "error", "offender", "remedy"), CASES)
def test_the_error_names_the_offender_and_a_remedy(
    act, error, offender, remedy, folder, monkeypatch
):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(error) as raised:
        act()
    assert offender in str(raised.value)
    assert remedy in str(raised.value)
    assert sorted(folder.iterdir()) == before


def test_there_are_many_kinds():
    assert len(CASES) >= 60


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: COMMAND"),
        (["prune", "a.keras"], "invalid choice: 'prune'"),
        (["convert", "a.keras"], "required: out"),
        (["cost", "a.keras", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_usage_of_the_command_line(arguments, text, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.parser().parse_args(arguments)
    assert raised.value.code == 2
    assert text in capsys.readouterr().err
