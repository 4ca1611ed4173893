"""What can be pruned can be saved, and loaded where this library is not known."""

import pickle
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import check, close_half, randomise, saved_and_loaded
from keras import layers, ops

import keras_polar
from keras_polar.surgery.certificate import difference, random_inputs


def model_of(part, shape=(5, 6)):
    inputs = keras.Input(shape)
    x = layers.Dense(8, activation="relu", name="before")(part(inputs))
    return randomise(keras.Model(inputs, layers.Dense(2, name="logits")(x)))


class Holder(layers.Layer):
    """Makes a part with arguments that it knows; opened, the part stands on its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # A policy, which is no number or word: Keras cannot remember the arguments by itself.
        self.part = self.make_part(dtype=self.dtype_policy, name="part")
        self.dense = layers.Dense(6, name="dense")

    def build(self, shape):
        self.part.build(shape)
        self.dense.build(shape)

    def call(self, x):
        return self.dense(self.part(x))


def holder_of(part_class, **arguments):
    def make_part(self, **kwargs):
        return part_class(**arguments, **kwargs)

    return type(f"Holds{part_class.__name__}", (Holder,), {"make_part": make_part})()


class Scaled(layers.Layer):
    """What the parts below have in common: a weight, a number, and how they tell of it."""

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, shape):
        self.scale = self.add_weight((shape[-1],), "ones", name="scale")

    def call(self, x):
        return x * self.scale * self.factor


class Silent(Scaled):
    """No config, as its dtype is a policy."""


class TellsTooMuch(Scaled):
    def get_config(self):
        return {**super(Scaled, self).get_config(), "factor": self.factor, "derived": 3}


class Forgets(Scaled):
    def get_config(self):
        return super(Scaled, self).get_config()


class OtherName(Scaled):
    def __init__(self, times=1.0, shift=(0, 0), **kwargs):
        super().__init__(**kwargs)
        self.factor, self.offset = times, tuple(shift)

    def get_config(self):
        return {**super(Scaled, self).get_config(), "factor": self.factor}

    def call(self, x):
        return super().call(x) + float(sum(self.offset))


class Breaks(Scaled):
    def get_config(self):
        return {"factor": self.no_such_attribute}


class HandsOn(Scaled):
    """Gives its parent an argument that the parent tells as well."""

    def __init__(self, own_factor=1.0, **kwargs):
        super().__init__(factor=own_factor, **kwargs)
        self.own_factor = own_factor

    def get_config(self):
        return {**super(Scaled, self).get_config(), "factor": self.factor, "more": 1}


class SizedByArgument(Scaled):
    def __init__(self, width=None, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, shape):
        self.scale = self.add_weight((self.width or 1,), "ones", name="scale")

    def get_config(self):
        return super(Scaled, self).get_config()


class Noting(Scaled):
    """Notes in which mode it was called last."""

    training = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.training = None

    def call(self, x, training=False):
        self.training = training
        return super().call(x)


class TakesTuples(Scaled):
    """Builds for a shape that is a tuple, which no file can hold."""

    def build(self, shape):
        super().build((*shape[:-1], {(None, 5, 6): 6}[shape]))

    def get_config(self):
        return {**super(Scaled, self).get_config(), "factor": self.factor}


PARTS = [
    (Silent, {"factor": 3.0}),
    (TellsTooMuch, {"factor": 3.0}),
    (Forgets, {"factor": 3.0}),
    (OtherName, {"times": 3.0, "shift": (1, 2)}),
    (Breaks, {"factor": 3.0}),
    (HandsOn, {"own_factor": 3.0}),
    (SizedByArgument, {"width": 6}),
    (Noting, {}),
    (TakesTuples, {"factor": 3.0}),
]


@pytest.mark.parametrize(("kind", "arguments"), PARTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_part_says_what_it_can_be_made_from(kind, arguments):
    """`check` saves and loads both models, and compares what they compute."""
    gated, small = check(model_of(holder_of(kind, **arguments)))
    loaded = saved_and_loaded(gated)
    again = saved_and_loaded(loaded)  # a run that goes on from a file is saved as well
    x = random_inputs(gated)
    assert difference(gated, again, x) == 0
    part = small.get_layer("part")
    assert all(getattr(part, k, v) == v for k, v in arguments.items())


def test_the_callers_layers_are_not_told_what_to_say():
    model = model_of(holder_of(Silent, factor=3.0))
    check(model)
    part = model.layers[1].part
    with pytest.raises(NotImplementedError):
        part.get_config()


def test_what_is_called_by_another_dtype_keeps_it():
    part = holder_of(Silent, factor=2.0)
    part.part.dtype_policy = "mixed_bfloat16"
    gated, _ = check(model_of(part))
    inside = saved_and_loaded(gated).get_layer("part")
    assert inside.dtype_policy.name == "mixed_bfloat16"


def test_a_stock_layer_whose_dtype_is_a_policy():
    """`Identity` writes no config of its own."""
    check(model_of(holder_of(layers.Identity)))


def assert_loads_alone(small, x):
    """Without a word of what the classes and functions in it are called."""
    assert difference(small, saved_and_loaded(small, knows=False), x) == 0


# --- parts that no file can name -------------------------------------------------------------


class Act(layers.Layer):
    """A function in the shape of a layer."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def test_a_function_in_a_layer_becomes_what_it_computes():
    _, small = check(model_of(holder_of(Act, function=lambda x: ops.relu(x) * 2)))
    assert not any(isinstance(x, Act) for x in small.layers)
    assert_loads_alone(small, random_inputs(small))


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        (layers.Dense, {"units": 6}),
        (layers.Conv1D, {"filters": 6, "kernel_size": 1}),
        (layers.Activation, {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_an_activation_that_has_no_name_for_keras(part, arguments):
    def quick_gelu(x):
        return x * ops.sigmoid(1.702 * x)

    arguments = {**arguments, "activation": quick_gelu}
    gated, small = check(model_of(holder_of(part, **arguments)))
    assert_loads_alone(small, random_inputs(small))
    assert part is layers.Activation or "part" in {n for g in gated.groups for n in g.members}


def test_an_activation_of_the_users_own_layer_stays_in_it():
    def own(x):
        return ops.relu(x) * 2

    inputs = keras.Input((6,))
    x = layers.Dense(8, activation=own, name="own")(inputs)
    _, small = check(randomise(keras.Model(inputs, layers.Dense(2)(x))))
    assert small.get_layer("own").activation is own


def test_what_keras_takes_for_sparse_is_dense_when_loaded():
    """It says so of a product with a constant, and then runs layers' calls on a sparse tensor."""

    class Outer(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense, self.scaled = layers.Dense(6), Silent()

        def build(self, shape):
            self.dense.build(shape)
            self.scaled.build(shape)

        def call(self, x):
            return self.scaled(self.dense(x) * ops.cast(ops.sqrt(9.0), "float32"))

        def compute_output_shape(self, shape):
            return shape

    check(model_of(Outer()))


# --- what cannot be saved --------------------------------------------------------------------


class Forgotten(Scaled):
    """Nothing says what it was made with."""

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.function = lambda x: x * factor

    def call(self, x):
        return self.function(x) * self.scale


def test_what_cannot_be_saved_is_known_before_the_run(tmp_path):
    model = model_of(holder_of(Forgotten, factor=2.0))
    with pytest.warns(UserWarning, match=r"neither it nor the small one can be saved .*'part'"):
        gated = keras_polar.apply(model, 0.2)
    close_half(gated)
    small = keras_polar.convert(gated, verify=True)
    for unsaved in (gated, small):
        with pytest.raises(NotImplementedError, match=r"'part' \(Forgotten\) cannot be saved"):
            unsaved.save(tmp_path / "model.keras")
        unsaved.save_weights(tmp_path / "model.weights.h5")  # the remedy
    gated.compile("sgd", "mse")
    x = random_inputs(model, batch=8)
    gated.fit(x, np.zeros((8, 5, 2)), verbose=0)


def test_parts_built_at_the_first_call_only():
    class Lazy(Scaled):
        def build(self, shape):
            super().build(shape)
            self.inner = layers.Dense(6, name="inner")

        def call(self, x):
            return self.inner(super().call(x)) + 0.0 * self.scale

        def compute_output_shape(self, shape):
            return shape  # so that Keras, when it loads a file, need not run the call

    lazy = Lazy(name="lazy")
    lazy(np.zeros((1, 5, 6), "float32"))
    model = model_of(lazy)
    with pytest.warns(UserWarning, match="'lazy': made from its config it has weights of shapes"):
        keras_polar.apply(model, 0.2)


# --- in a process of its own -----------------------------------------------------------------

SCRIPT = """
import pickle, sys, keras, keras_hub, numpy as np
x, *outputs = pickle.load(open("outputs.pickle", "rb"))
small = keras.models.load_model("small.keras")
assert "keras_polar" not in sys.modules
import keras_polar
gated = keras.models.load_model("gated.keras")
gated.save("again.keras")
again = keras.models.load_model("again.keras")
for model, y in zip((gated, small, again), (*outputs, outputs[0])):
    for a, b in zip(keras.tree.flatten(model(x)), y):
        assert np.allclose(keras.ops.convert_to_numpy(a), b, atol=1e-6)
"""


@pytest.mark.filterwarnings("ignore")  # KerasHub's own
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViTBackbone", "LlamaBackbone", "T5Backbone", "CLIPTextEncoder"])
def test_a_backbone_of_keras_hub_loads_in_a_process_of_its_own(name, tmp_path):
    pytest.importorskip("keras_hub")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    from hub_models import BACKBONES

    model = randomise(BACKBONES[name]())
    x = random_inputs(model, batch=2)
    gated, small = check(model, inputs=x)
    outputs = [list(map(ops.convert_to_numpy, keras.tree.flatten(m(x)))) for m in (gated, small)]
    gated.save(tmp_path / "gated.keras")
    small.save(tmp_path / "small.keras")
    (tmp_path / "outputs.pickle").write_bytes(pickle.dumps((x, *outputs)))
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, check=True)
