"""What can be pruned can be saved, and loaded where this library is not known."""

import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import check, close_half, quick, randomise, saved_and_loaded
from keras import layers, ops

import keras_polar
from keras_polar.graph.deepcopy import duplicate
from keras_polar.graph.keras_private import source_of
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


class Initialised(TakesTuples):
    """While Keras loads a file, it writes a setting that it has written before in other words."""

    def __init__(self, initializer="ones", **kwargs):
        super().__init__(**kwargs)
        self.initializer = keras.initializers.get(initializer)

    def get_config(self):
        return {**super().get_config(), "initializer": self.initializer}


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
    (Initialised, {"factor": 3.0}),
]


@pytest.mark.parametrize(("kind", "arguments"), PARTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_part_says_what_it_can_be_made_from(kind, arguments):
    """`check` saves and loads both models, and compares what they compute."""
    gated, small = check(model_of(holder_of(kind, **arguments)))
    loaded = saved_and_loaded(gated)
    assert not loaded.not_loadable
    # A run that goes on from a file is saved as well, and so may be what came of it.
    cleared = keras_polar.remove(saved_and_loaded(small), {})
    x = random_inputs(gated)
    for pruned, again in ((gated, loaded), (small, cleared)):
        assert difference(pruned, saved_and_loaded(again), x) == 0
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


@keras.saving.register_keras_serializable("tests")
class Nameless(layers.Layer):
    """A norm that nobody can load where it stands alone: its class takes no name."""

    def __init__(self, units):
        super().__init__()
        self.units = units

    def build(self, shape):
        self.scale = self.add_weight((self.units,), "random_normal", name="scale")

    def call(self, x):
        mean = ops.mean(ops.square(x), axis=-1, keepdims=True)
        return x * ops.rsqrt(mean + 1e-6) * self.scale


def test_parts_that_have_no_config_are_opened_as_well():
    @keras.saving.register_keras_serializable("tests")
    class Outer(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense, self.norm = layers.Dense(8), Nameless(8)

        def build(self, shape):
            self.dense.build(shape)
            self.norm.build((*shape[:-1], 8))

        def call(self, x):
            return self.norm(self.dense(x))

        def compute_output_shape(self, shape):
            return (*shape[:-1], 8)

    model = model_of(Outer())
    _, small = check(model)
    assert not [x for x in small.layers if isinstance(x, Nameless)]
    assert all(row.prunable for row in keras_polar.inspect(model).rows if row.name != "logits")


@keras.saving.register_keras_serializable("tests")
class Lends(layers.Layer):
    """Stays whole, and has a part that others use as well."""

    def __init__(self, part=None, **kwargs):
        super().__init__(**kwargs)
        self.is_given = part is not None
        self.part = part or layers.Dense(6, name="lent")

    def build(self, shape):
        if not self.part.built:
            self.part.build(shape)

    def call(self, x):
        return self.part(x) / float(ops.shape(x)[0])

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        part = keras.saving.serialize_keras_object(self.part)
        return {**super().get_config(), **({"part": part} if self.is_given else {})}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "part": keras.saving.deserialize_keras_object(config.get("part"))})


def lending(part):
    lender = Lends(part, name="lends")
    x = keras.Input((5, 6))
    h = layers.Dense(8, name="free")(lender.part(lender(x)))
    return randomise(keras.Model(x, layers.Dense(2, name="head")(h)))


def test_a_part_that_others_use_too_is_said_before_the_run():
    with pytest.warns(UserWarning, match=r"'lends': a part of it is used on its own.*'lent'"):
        gated = keras_polar.apply(lending(None), 0.01, measure="units")
    close_half(gated)
    for model in (gated, keras_polar.convert(gated)):
        with pytest.raises(NotImplementedError, match="used on its own as well"):
            saved_and_loaded(model)


def test_a_part_that_others_use_too_may_be_in_the_config():
    check(lending(layers.Dense(6, name="lent")))


# --- functional models inside layers that stay whole -----------------------------------------


class Around(layers.Layer):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def get_config(self):
        inner = keras.saving.serialize_keras_object(self.inner)
        return {**super().get_config(), "inner": inner}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("inner")), **config)


@keras.saving.register_keras_serializable("tests")
class Repeats(Around):
    """Calls a model in a loop, which nobody can open."""

    def call(self, x):
        y = self.inner(x)
        return ops.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, 2 * y), (0, y))[1]

    def compute_output_shape(self, shape):
        return self.inner.compute_output_shape(shape)


@keras.saving.register_keras_serializable("tests")
class Cell(Around):
    """A recurrent cell whose step is a model."""

    state_size = output_size = 6

    def call(self, x, states):
        y = self.inner(x) + 0.5 * states[0]
        return y, [y]


def recurrent(inner):
    return layers.Bidirectional(layers.RNN(Cell(inner), return_sequences=True))


def functional(shape, *parts):
    x = inputs = keras.Input(shape)
    for part in parts or (layers.Dense(5, activation="relu"), layers.Dense(6)):
        x = part(x)
    return keras.Model(inputs, x)


def sequential(shape):
    return keras.Sequential([keras.Input(shape), layers.Dense(5), layers.Dense(6)])


def branched(shape):
    """Shared layers, several outputs of one call, and calls besides those of the model."""
    inputs = keras.Input(shape)
    shared = layers.Dense(6, activation="relu")
    shared(inputs)
    a, b = ops.split(layers.Dense(12)(inputs), 2, axis=-1)
    return keras.Model(inputs, shared(shared(inputs)) + shared(b) * a)


def twice(shape):
    inner = functional(shape)
    return functional(shape, inner, inner)


INSIDE = {
    "functional": functional,
    "Sequential": sequential,
    "nested": lambda shape: functional(shape, functional(shape), sequential(shape)),
    "nested in Sequential": lambda shape: keras.Sequential(
        [keras.Input(shape), functional(shape), sequential(shape)]
    ),
    "nested twice": twice,
    "branched": branched,
    "own layer": lambda shape: functional(shape, Repeats(functional(shape))),
}
AROUND = {
    "own layer": (Repeats, (5, 6), (5, 6)),
    "open steps": (layers.TimeDistributed, (6,), (None, 6)),
    "own layer, open steps": (lambda x: layers.TimeDistributed(Repeats(x)), (6,), (None, 6)),
    "Bidirectional": (recurrent, (6,), (5, 6)),
}


def test_calls_of_a_copy_are_its_own():
    """A copy that knew the calls of the original would have no config (a `KeyError`)."""
    inner = branched((6,))
    inner(np.zeros((1, 6), "float32"))
    new = duplicate(inner, "new")
    own = {id(x) for x in new.operations}
    assert own.isdisjoint(map(id, inner.operations))
    for model in (inner, new):
        assert {id(source_of(x)[0]) for x in model.outputs} <= set(map(id, model.operations))
    names = [{op.name: len(op._inbound_nodes) for op in m.operations} for m in (inner, new)]
    assert names[0].keys() == names[1].keys()
    assert sum(names[1].values()) == len(new._nodes) < sum(names[0].values())
    assert {**inner.get_config(), "name": ""} == {**new.get_config(), "name": ""}


@pytest.mark.filterwarnings("ignore:apply. .*the length is open")
@pytest.mark.parametrize(
    ("inside", "around"),
    quick(
        [*itertools.product(INSIDE, ["own layer"]), *itertools.product(["functional"], AROUND)],
        itertools.product(INSIDE, AROUND),
    ),
)
def test_a_model_in_a_layer_that_stays_whole(inside, around):
    wrap, inner_shape, shape = AROUND[around]
    inputs = keras.Input(shape)
    x = layers.Dense(8, activation="relu", name="free")(inputs)
    x = wrap(INSIDE[inside](inner_shape))(layers.Dense(6, name="before")(x))
    model = randomise(keras.Model(inputs, layers.Dense(2, name="logits")(x)))
    for pruned in check(model):
        again = saved_and_loaded(saved_and_loaded(pruned))
        assert difference(pruned, again, random_inputs(model)) <= 1e-6


def test_masks_inside_a_model_in_a_layer_that_stays_whole():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 4, mask_zero=True)(tokens)
    inner = keras.Model(tokens, layers.LSTM(5, return_sequences=True)(layers.Dense(6)(x)))
    new = duplicate(inner, "new")
    inputs = np.array([[1, 2, 0, 3, 0, 0], [5, 1, 1, 1, 2, 3]], "int32")
    for model in (inner, new):
        gated, _ = check(model, inputs=inputs)
        assert len(gated.groups) == 2


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
# Loaded, layers have the configs of their classes again, some of which nobody can read.
keras_polar.remove(small, {}).save("small_again.keras")
small_again = keras.models.load_model("small_again.keras")
for model, y in zip((gated, small, again, small_again), 2 * outputs):
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
