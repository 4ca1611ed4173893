"""Layers made of layers open by themselves, or stay whole and say why."""

import re

import keras
import numpy as np
import pytest
from helpers import check, close_half, randomise
from keras import layers, ops
from keras.src import backend

import keras_polar
from keras_polar.rules import trace_model
from keras_polar.surgery.certificate import difference, random_inputs


class Block(layers.Layer):
    """Pre-norm feed-forward block; computes with the sizes of its input, as such code does."""

    def __init__(self, dim=6, hidden=8, rate=0.3, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.LayerNormalization(name="norm")
        self.up = layers.Dense(hidden, activation="gelu", name="up")
        self.down = layers.Dense(dim, name="down")
        self.dropout = layers.Dropout(rate, name="dropout")

    def build(self, shape):
        self.norm.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], self.up.units))
        self.built = True

    def call(self, x, training=False):
        batch, length = ops.shape(x)[:2]
        y = ops.reshape(self.norm(x), (batch, length, x.shape[-1]))
        y = self.dropout(self.up(y), training=training)
        return x + self.down(y)


class Stack(layers.Layer):
    def __init__(self, depth=2, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [Block(name="block") for _ in range(depth)]
        self.head = keras.Sequential([layers.Dense(7, activation="relu"), layers.Dense(6)])

    def build(self, shape):
        for part in (*self.blocks, self.head):
            part.build(shape)
        self.built = True

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(x), None

    def compute_output_spec(self, x, training=False):
        return keras.KerasTensor(x.shape, x.dtype)


def model_of(*parts, shape=(5, 6)):
    inputs = x = keras.Input(shape)
    for part in parts:
        x = part(x)
    return keras.Model(inputs, layers.Dense(2, name="logits")(x))


def notes(model):
    return {call.op.name: call.note for call in trace_model(model).calls if call.note}


def state(model):
    """Everything about a model that opening its layers might have touched."""
    parts = model._flatten_layers()
    return [
        (type(x), x.built, len(x._inbound_nodes), len(x._outbound_nodes), sorted(vars(x)))
        for x in parts
    ] + [np.array(w) for w in model.get_weights()]


def test_a_composite_opens_and_the_converted_model_is_made_of_its_parts():
    model = randomise(model_of(Block(name="block")))
    gated, small = check(model)
    assert [g.name for g in gated.groups] == ["up"]
    assert [c.path for c in trace_model(model).calls if c.op.name in ("up", "dropout")] == [
        "block/up",
        "block/dropout",
    ]
    assert not any(isinstance(x, Block) for x in small.layers)
    assert small.get_layer("up").units == 4


def test_the_same_names_inside_every_composite_stay_apart():
    model = randomise(model_of(Block(name="first"), Block(name="second")))
    gated, _ = check(model)
    assert [g.name for g in gated.groups] == ["up", "second_up"]


def test_the_callers_model_is_left_as_it_was():
    model = randomise(model_of(Block(), Block()))
    before = state(model)
    check(model)
    for was, now in zip(before, state(model), strict=True):
        assert was == now if isinstance(was, tuple) else np.array_equal(was, now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "call", None)  # nothing was cached: a broken call shows
        assert "block" in " ".join(notes(model))


def test_a_layer_shared_by_two_calls_stays_shared():
    shared = Block(name="shared")
    model = randomise(model_of(shared, layers.Dense(6), shared))
    _, small = check(model)
    assert len({w.path for w in small.weights}) == len(model.weights)


def test_nested_composites_sequentials_and_outputs_that_are_none():
    class Outer(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.stack = Stack(name="stack")

        def build(self, shape):
            self.stack.build(shape)
            self.built = True

        def call(self, x, training=False):
            y, cache = self.stack(x, training=training)
            assert cache is None
            return y + x

    model = randomise(model_of(Outer(name="outer")))
    assert not notes(model)
    gated, _ = check(model)
    assert sum(g.units for g in gated.groups) == 8 + 8 + 7
    assert "outer/stack/block/up" in {c.path for c in trace_model(model).calls}


def test_a_subclassed_model_inside_a_functional_one_opens():
    class Own(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.a, self.b = layers.Dense(8, activation="relu"), layers.Dense(6)

        def call(self, x):
            return self.b(self.a(x))

    gated, _ = check(randomise(model_of(Own())))
    assert sum(g.units for g in gated.groups) == 14


def test_a_functional_model_inside_a_composite_opens():
    class Holder(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            x = keras.Input((5, 6))
            self.inner = keras.Model(x, layers.Dense(6)(ops.tanh(layers.Dense(9)(x))))

        def call(self, x):
            return ops.flip(self.inner(x), 1)

    model = randomise(model_of(Holder()))
    before = state(model)
    gated, _ = check(model)
    assert sum(g.units for g in gated.groups) == 15
    assert all(a == b for a, b in zip(before, state(model), strict=True) if isinstance(a, tuple))


def test_dropout_inside_follows_the_mode_of_the_model():
    model = randomise(model_of(Block(rate=0.9)))
    gated = keras_polar.apply(model, gate="static")
    close_half(gated)
    x = random_inputs(model)
    assert difference(gated, model, x) > 0
    first, second = (ops.convert_to_numpy(gated(x, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    still, again = (ops.convert_to_numpy(gated(x, training=False)) for _ in range(2))
    assert np.array_equal(still, again)


def test_every_variable_moves_to_the_gated_model_and_is_trained():
    frozen = Block(name="frozen")
    frozen.trainable = False
    model = randomise(model_of(Block(name="free"), frozen))
    gated = keras_polar.apply(model, 0.2, gate="static")
    own = [v for v in gated.trainable_variables if "gate" not in v.path]
    shapes = [sorted(map(tuple, (v.shape for v in vs))) for vs in (own, model.trainable_variables)]
    assert shapes[0] == shapes[1]
    gated.compile("sgd", "mse")
    before = [np.array(v) for v in map(ops.convert_to_numpy, own)]
    x = random_inputs(model, batch=8)
    gated.fit(x, np.ones((8, 5, 2), "float32"), verbose=0)
    moved = [
        np.abs(a - ops.convert_to_numpy(v)).max() > 0 for a, v in zip(before, own, strict=True)
    ]
    assert all(moved)


def test_the_converted_model_loads_without_the_composites_class(tmp_path):
    model = randomise(model_of(Block(), Block()))
    _, small = check(model)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    assert difference(small, loaded, random_inputs(model)) == 0


# --- layers that stay whole ------------------------------------------------------------------


class Parts(layers.Layer):
    """A layer with two Dense layers; subclasses do with them what cannot be opened."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = layers.Dense(8, name="a"), layers.Dense(6, name="b")
        self.dropout = layers.Dropout(0.5)

    def build(self, shape):
        self.a.build(shape)
        self.b.build((*shape[:-1], 8))
        self.built = True

    def plain(self, x):
        return self.b(self.a(x))


class OnlyInTraining(Parts):
    def call(self, x, training=False):
        y = self.plain(x)
        return y + 1.0 if training else y


class FixedMode(Parts):
    def call(self, x):
        return self.plain(self.dropout(x, training=True))


class OwnVariable(Parts):
    def build(self, shape):
        super().build(shape)
        self.scale = self.add_weight((6,), "ones", name="scale")

    def call(self, x):
        return self.plain(x) * ops.sort(self.scale)


class ReturnsItsOwn(OwnVariable):
    def call(self, x):
        return self.plain(x), self.scale

    def compute_output_shape(self, shape):
        return shape, (6,)


class OwnVariableCast(OwnVariable):
    def call(self, x):
        return self.plain(x) * ops.cast(self.scale, "bool")


class Counts(Parts):
    def build(self, shape):
        super().build(shape)
        self.calls = self.add_weight((), "zeros", trainable=False, name="calls")

    def call(self, x):
        self.calls.assign_add(1.0)
        return self.plain(x)


class Unused(Parts):
    def call(self, x):
        return self.a(x)[..., :6]


class Noisy(Parts):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x):
        return self.plain(x) + keras.random.normal((6,), seed=self.seed)


class AddsLoss(Parts):
    def call(self, x, training=False):
        if training:
            self.add_loss(ops.mean(x))
        return self.plain(x)


class BatchSize(Parts):
    def call(self, x):
        return self.plain(x) / float(ops.shape(x)[0])

    def compute_output_shape(self, shape):
        return shape


class PerSample(Parts):
    def call(self, x):
        rows = ops.arange(ops.shape(x)[0], dtype="float32")[:, None, None]
        return self.plain(x) * rows

    def compute_output_shape(self, shape):
        return shape


class Angles(layers.Layer):
    """Says the shape of its input instead of its output's, as KerasHub's Moonshine does."""

    def build(self, shape):
        self.speed = self.add_weight((4,), "random_normal", trainable=False)

    def call(self, x):
        return ops.expand_dims(ops.mean(x, axis=-1), -1) * self.speed

    def compute_output_shape(self, shape):
        return shape[:2]


class Turned(Parts):
    """Needs the true shape of what it is given."""

    def call(self, x, angles):
        return self.plain(x) + ops.sum(ops.sin(angles[:, :, :3]), axis=2, keepdims=True)

    def compute_output_shape(self, x_shape, angles_shape):
        return x_shape


def test_a_layer_that_says_a_wrong_shape_does_not_close_those_behind_it():
    x = keras.Input((5, 3))
    h = layers.Dense(6, name="before")(x)
    h = Turned(name="turned")(h, Angles(name="angles")(x))
    model = randomise(keras.Model(x, layers.Dense(2, name="head")(h)))
    assert not notes(model)
    rows = {r.name: r.prunable for r in keras_polar.inspect(model).rows}
    assert rows["before"] == 6
    check(model)


class Regularized(Parts):
    def call(self, x):
        return self.plain(x)


CLOSED = [
    (OnlyInTraining(), "differently in training"),
    (FixedMode(), "sets the mode"),
    (OwnVariable(), "own variable .*scale"),
    (OwnVariableCast(), "own variable .*scale"),
    (Counts(), "changes its own variable .*calls"),
    (Unused(), "does not use its variable"),
    (Noisy(), "own variable .*seed"),
    (AddsLoss(), "adds a loss"),
    (BatchSize(), "batch size"),
    (PerSample(), "batch"),
    (Regularized(activity_regularizer="l2"), "activity regularizer"),
]


@pytest.mark.parametrize("number", range(len(CLOSED)))
def test_what_cannot_be_opened_stays_whole_and_says_why(number):
    prototype, reason = CLOSED[number]
    layer = type(prototype).from_config({**prototype.get_config(), "name": "whole"})
    model = model_of(layers.Dense(6, name="before"), layer, layers.Dense(7, name="after"))
    (note,) = notes(model).values()
    assert re.search(reason, note), note
    rows = {r.name: r for r in keras_polar.inspect(model).rows}
    assert rows["before"].prunable == 0
    assert "whole" in rows["before"].reason
    assert note in rows["whole"].reason
    assert any(v is w for v in layer.variables for w in model.variables)


def test_a_layer_that_returns_a_variable_stays_whole():
    x = keras.Input((5, 6))
    y, scale = ReturnsItsOwn(name="whole")(layers.Dense(6, name="before")(x))
    model = randomise(keras.Model(x, layers.Dense(7, name="after")(y * scale)))
    (note,) = notes(model).values()
    assert "own variable" in note
    assert {r.name: r.prunable for r in keras_polar.inspect(model).rows}["before"] == 0


def test_a_variable_that_nothing_changes_becomes_a_constant():
    class Buffer(Parts):
        def build(self, shape):
            super().build(shape)
            self.table = self.add_weight((6,), "ones", trainable=False, name="table")

        def call(self, x):
            return self.plain(x) * self.table + ops.cast(self.table, "float32")

    model = randomise(model_of(Buffer(name="buffer")))
    assert not notes(model)
    check(model)


def test_a_sublayer_that_cannot_be_opened_stays_whole_inside():
    class Outer(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.own, self.free = OnlyInTraining(name="own"), Block(name="free")

        def build(self, shape):
            self.own.build(shape)
            self.free.build(shape)
            self.built = True

        def call(self, x, training=False):
            return self.free(self.own(x, training=training), training=training)

    model = randomise(model_of(Outer(name="outer")))
    assert list(notes(model)) == ["own"]
    gated, small = check(model)
    assert [g.name for g in gated.groups] == ["up"]
    assert isinstance(small.get_layer("own"), OnlyInTraining)


# --- shapes and masks ------------------------------------------------------------------------


class Causal(layers.Layer):
    """Mixes positions by a mask made from the sequence's length."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = layers.Dense(8, name="a"), layers.Dense(6, name="b")

    def build(self, shape):
        self.a.build(shape)
        self.b.build((*shape[:-1], 8))
        self.built = True

    def call(self, x, keep=None):
        batch, length = ops.shape(x)[0], ops.shape(x)[1]
        causal = ops.cast(ops.arange(length)[:, None] >= ops.arange(length), "float32")
        causal = ops.broadcast_to(causal[None], (batch, length, length))
        if keep is not None:
            causal = causal * ops.cast(keep, "float32")[:, None, :]
        return x + self.b(ops.relu(self.a(x))) + ops.sum(causal, axis=-1, keepdims=True)

    def compute_output_spec(self, x, keep=None):
        return keras.KerasTensor(x.shape, x.dtype)


def test_constants_made_from_the_sizes_hold_for_every_batch():
    model = randomise(model_of(Causal(name="causal")))
    assert not notes(model)
    gated, small = check(model)
    for batch in (1, 3):
        assert difference(gated, small, random_inputs(model, batch)) <= 1e-4


def test_a_mask_given_as_an_argument_goes_in():
    x, keep = keras.Input((5, 6), name="x"), keras.Input((5,), dtype="int32", name="keep")
    y = Causal()(x, keep=keep)
    model = randomise(keras.Model({"x": x, "keep": keep}, layers.Dense(2)(y)))
    assert not notes(model)
    check(model)


class Masked(Parts):
    """Uses the mask that Keras passes on by itself, and uses it up."""

    supports_masking = True

    def compute_mask(self, x, previous_mask):
        return None

    def call(self, x, mask=None):
        return self.plain(x) * ops.cast(mask, "float32")[..., None]


def test_an_implicit_mask_becomes_explicit():
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(4, 6, mask_zero=True)(tokens)
    x = Masked(name="destroys")(x)
    model = randomise(keras.Model(tokens, layers.Dense(2)(x)))
    assert not notes(model)
    inputs = np.array([[1, 2, 0, 3, 0], [0, 0, 1, 1, 2]], "int32")
    check(model, inputs=inputs)


def test_unknown_sizes_are_the_reason_and_fixed_ones_the_way_out():
    tokens = keras.Input((None, 6))
    inner = keras.Model(tokens, layers.Dense(2)(Causal(name="causal")(tokens)), name="inner")
    (note,) = notes(inner).values()
    assert "unknown size: build the model on inputs with fixed sizes" in note
    assert note.startswith("the length is open: ")
    x = keras.Input((5, 6))
    model = randomise(keras.Model(x, inner(x)))
    assert not notes(model)
    check(model)


def remedied(model, text):
    """The model, once what a message advises was done."""
    (code,) = re.findall(r"x = keras\.tree.*?keras\.Model\(x, model\(x\)\)", text)[:1]
    names = {"keras": keras, "model": model}
    exec(code, names)
    return names["model"]


def with_open_length(*parts):
    x = {"a": keras.Input((None, 6), name="a"), "b": keras.Input((None, 6), name="b")}
    y = layers.Dense(6, name="before")(x["a"] + x["b"])
    for part in parts:
        y = part(y)
    return keras.Model(x, layers.Dense(2, name="logits")(y))


def test_an_open_length_is_the_first_reason_and_the_remedy_works():
    model = with_open_length(OnlyInTraining(name="other"), Causal(name="causal"))
    with pytest.raises(ValueError, match=r"pruned\. causal: the length is open") as error:
        keras_polar.apply(model)
    assert str(error.value).count("the length is open") == 1
    reasons = {r.name: r.reason for r in keras_polar.inspect(model).rows}
    assert reasons["causal"].startswith("the length is open")
    assert "length" not in reasons["other"]  # it would not open with known sizes either
    with_sizes = remedied(model, str(error.value))
    assert [tuple(x.shape) for x in with_sizes.inputs] == [(None, 128, 6)] * 2
    assert "causal" not in {r.name for r in keras_polar.inspect(with_sizes).rows}


def test_half_of_a_model_of_open_length_does_not_stay_in_silence():
    model = randomise(with_open_length(layers.Dense(8), layers.Dense(6), Causal(name="causal")))
    with pytest.warns(UserWarning, match="causal of model .* stay as they are, for the length is"):
        keras_polar.apply(model, 0.2)


def test_a_wrapper_around_a_composite_is_exact_either_way():
    model = randomise(
        model_of(
            layers.Dense(6), layers.TimeDistributed(layers.Dense(6), name="each"), layers.Dense(5)
        )
    )
    check(model)


class PassesMask(Parts):
    supports_masking = True

    def call(self, x, mask=None):
        return self.plain(x) + 1.0


def test_a_mask_that_opening_would_lose_keeps_the_layer_whole():
    tokens = keras.Input((5,), dtype="int32")
    embedded = layers.Embedding(4, 6, mask_zero=True)(tokens)
    whole = PassesMask(name="whole")(embedded)
    inputs = np.array([[1, 2, 0, 3, 0], [0, 0, 1, 1, 2]], "int32")
    # By the mask of its output Keras weighs a model's losses.
    x = layers.Dense(3)(layers.Dense(8, name="free")(whole))
    model = randomise(keras.Model(tokens, x))
    assert "implicit mask" in notes(model)["whole"]
    gated, small = check(model, inputs=inputs)
    assert all(backend.get_keras_mask(m.output) is not None for m in (model, gated, small))
    # Here the only layer that uses it gets it as an argument.
    pooled = layers.Dense(3)(layers.GlobalAveragePooling1D()(whole))
    model = randomise(keras.Model(tokens, pooled))
    assert not notes(model)
    check(model, inputs=inputs)


class Scale(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight((shape[-1],), "ones")

    def call(self, x):
        variance = ops.mean(ops.square(ops.cast(x, "float32")), axis=-1, keepdims=True)
        return x * ops.reciprocal(ops.sqrt(variance + 1e-6)) * self.scale


def test_a_product_with_a_constant_does_not_become_sparse():
    """Keras says so of it, and a sublayer that states no output shape then fails on it."""

    class Normed(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.norm, self.dense = Scale(), layers.Dense(8)

        def build(self, shape):
            self.norm.build(shape)
            self.dense.build(shape)

        def call(self, x):
            return self.dense(self.norm(x))

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((5, 8))
    x = layers.Dense(8)(inputs) * ops.cast(ops.sqrt(9.0), "float32")
    check(randomise(keras.Model(inputs, layers.Dense(3)(Normed()(x)))))
