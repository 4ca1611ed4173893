"""Layers whose `call` uses weights of its own: a kernel becomes a stock layer, which is pruned."""

import keras
import numpy as np
import pytest
from helpers import check, randomise
from keras import layers, ops

import keras_polar
from keras_polar.backends import to_numpy

X = np.random.default_rng(0).standard_normal((5, 6)).astype("float32")


class Linear(layers.Layer):
    """The layer of Keras' guide "Making new layers via subclassing"."""

    def __init__(self, units=8, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.w = self.add_weight(
            (shape[-1], self.units), "random_normal", regularizer=keras.regularizers.L2(0.1)
        )
        self.b = self.add_weight((self.units,), "zeros")

    def call(self, x):
        return ops.matmul(x, self.w) + self.b

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class Operator(Linear):
    def call(self, x):
        return self.b + x @ self.w


class Dotted(Linear):
    def call(self, x):
        return ops.tanh(ops.dot(x, self.w)) * self.b  # the vector is no bias here


class Einsum(Linear):
    def call(self, x):
        return ops.einsum("bnc,cd->bnd", x, self.w) + self.b


class Heads(layers.Layer):
    """Attention from weights of its own."""

    def build(self, shape):
        self.query, self.key, self.value = (
            self.add_weight((shape[-1], 2, 4), name=name) for name in ("q", "k", "v")
        )
        self.out = self.add_weight((2, 4, shape[-1]), name="o")

    def call(self, x):
        q, k, v = (ops.einsum("bnc,chd->bhnd", x, w) for w in (self.query, self.key, self.value))
        scores = ops.softmax(ops.matmul(q, ops.swapaxes(k, -1, -2)))
        return ops.einsum("bhnd,hdc->bnc", ops.matmul(scores, v), self.out)


class Convolution(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight((3, 3, shape[-1], 8), name="kernel")
        self.offset = self.add_weight((8,), name="offset")

    def call(self, x):
        y = ops.conv(x, self.kernel, strides=2, padding="same", data_format="channels_last")
        return ops.relu(y + self.offset)


class Convolution1D(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight((3, shape[-1], 8), name="kernel")

    def call(self, x):
        return ops.conv(x, self.kernel, padding="same", data_format="channels_last")


class Block(layers.Layer):
    """The MLPBlock of the same guide: layers of one's own in a layer of one's own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = Linear(12), Linear(6)
        self.norm = layers.LayerNormalization()

    def build(self, shape):
        self.first.build(shape)
        self.second.build((*shape[:-1], 12))
        self.norm.build((*shape[:-1], 6))
        self.gamma = self.add_weight((6,), "ones", name="gamma")

    def call(self, x):
        gamma = ops.cast(ops.convert_to_tensor(self.gamma), x.dtype)
        return x + gamma * self.norm(self.second(ops.relu(self.first(x))))


class Experts(layers.Layer):
    """Several matrices, of which each token takes a share."""

    def build(self, shape):
        self.router = self.add_weight((shape[-1], 3), name="router")
        self.kernels = self.add_weight((3, shape[-1], 8), name="kernels")

    def call(self, x):
        shares = ops.softmax(ops.matmul(x, self.router))
        return ops.einsum("bned,bne->bnd", ops.einsum("bnc,ecd->bned", x, self.kernels), shares)


class Tokens(layers.Layer):
    """A token for the class in front, and a vector for each position: the beginning of a ViT."""

    def __init__(self, how="broadcast", **kwargs):
        super().__init__(**kwargs)
        self.how = how
        self.project = layers.Dense(6)

    def build(self, shape):
        self.project.build(shape)
        self.token = self.add_weight((1, 1, 6), "random_normal", name="token")
        self.positions = self.add_weight((1, shape[1] + 1, 6), "random_normal", name="positions")

    def call(self, x):
        batch = ops.shape(x)[0]
        token = {
            "broadcast": lambda: ops.broadcast_to(self.token, (batch, 1, 6)),
            "tile": lambda: ops.tile(self.token, (batch, 1, 1)),
            "repeat": lambda: ops.repeat(ops.cast(self.token, x.dtype), batch, axis=0),
            "reshaped": lambda: ops.broadcast_to(ops.reshape(self.token, (1, 6)), (batch, 1, 6)),
        }[self.how]()
        return ops.concatenate([token, self.project(x)], axis=1) + self.positions

    def get_config(self):
        return {**super().get_config(), "how": self.how}


def sequence(*parts, shape=(5, 6)):
    x = inputs = keras.Input(shape)
    for part in (layers.Dense(6, name="before"), *parts, layers.Dense(6, name="after")):
        x = part(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))


ROWS = {
    "matmul": lambda: sequence(Linear(name="own")),
    "vector": lambda: sequence(Linear(name="own"), shape=(6,)),
    "operator": lambda: sequence(Operator(name="own")),
    "dot": lambda: sequence(Dotted(name="own")),
    "einsum": lambda: sequence(Einsum(name="own")),
    "attention": lambda: sequence(Heads(name="own")),
    "conv": lambda: sequence(Convolution(name="own"), shape=(6, 6, 3)),
    "block": lambda: sequence(Block(name="own")),
    **{
        how: lambda how=how: sequence(Tokens(how, name="own"), Block())
        for how in ("broadcast", "tile", "repeat", "reshaped")
    },
    "experts": lambda: sequence(Experts(name="own")),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_multiplies_by_weights_of_its_own_is_pruned(name):
    model = ROWS[name]()
    before = [to_numpy(w) for w in model.weights]
    rows = {row.name: row for row in keras_polar.inspect(model).rows}
    assert rows["before"].prunable == 6, rows["before"].reason
    own = [row for name, row in rows.items() if name.startswith(("own", "linear"))]
    assert sum(row.prunable for row in own) >= 6, [row.reason for row in own]
    _, small = check(model)
    assert all(type(x).__module__.startswith("keras.") for x in small.layers)
    assert all(map(np.array_equal, before, map(to_numpy, model.weights)))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="LiteRT needs TensorFlow")
def test_the_small_model_becomes_a_file(tmp_path):
    gated = keras_polar.apply(randomise(ROWS["tile"]()), 0.3, gate="static")
    gated.settle()
    report = keras_polar.export_tflite(keras_polar.convert(gated), tmp_path / "small.tflite")
    assert report.max_difference <= 1e-5


@pytest.mark.parametrize("frozen", ["w", "b", "layer"])
def test_what_is_frozen_stays_so(frozen):
    own = Linear(name="own")
    model = sequence(own, shape=(6,))
    if frozen == "layer":
        own.trainable = False
    else:
        getattr(own, frozen).trainable = False
    gated = keras_polar.apply(model, 0.1, gate="static")
    gated.settle()
    for made in (gated, keras_polar.convert(gated)):
        dense = next(x for x in made.layers if x.name == "own_w")
        wanted = [frozen not in (name, "layer") for name in ("w", "b")]
        assert [dense.kernel.trainable, dense.bias.trainable] == wanted


def test_a_bias_is_one_and_what_weights_are_regularised_by_goes_along():
    own = Linear(name="own")
    gated = keras_polar.apply(sequence(own, shape=(6,)), 0.3, gate="static")
    dense = next(x for x in gated.layers if x.name == "own_w")
    assert type(dense) is layers.Dense
    assert dense.use_bias
    assert dense.kernel_regularizer.l2 == pytest.approx(0.1)
    np.testing.assert_array_equal(to_numpy(dense.kernel), to_numpy(own.w))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_precision_is_that_of_the_layer(policy):
    x = keras.Input((6,))
    h = Linear(8, name="own", dtype=policy)(layers.Dense(6)(x))
    model = randomise(keras.Model(x, layers.Dense(2)(h)))
    gated = keras_polar.apply(model, 1e-6, gate="static")
    for group in gated.groups:
        group.set_mask(np.ones(group.units, bool))
    np.testing.assert_array_equal(
        to_numpy(model(X, training=False)), to_numpy(gated(X, training=False))
    )


def test_a_layer_called_twice_is_one_layer():
    own, x = Linear(6, name="own"), keras.Input((6,))
    h = own(ops.relu(own(layers.Dense(6)(x))))
    model = keras.Model(x, layers.Dense(2)(h))
    _, small = check(model)
    assert sum(type(x) is layers.Dense for x in small.layers) == 3


def test_lengths_may_be_open():
    x = keras.Input((None, 6))
    h = Convolution1D(name="own")(Linear(7)(layers.Dense(6, name="before")(x)))
    model = keras.Model(x, layers.Dense(2)(ops.max(h, axis=1)))
    samples = np.random.default_rng(0).standard_normal((4, 9, 6)).astype("float32")
    check(model, inputs=samples)
    assert keras_polar.inspect(model).prunable > 0.9


class Tied(Linear):
    def call(self, x):
        return ops.matmul(ops.matmul(x, self.w), ops.transpose(self.w))


class Standardised(Linear):
    def call(self, x):
        return ops.matmul(x, self.w / ops.std(self.w, axis=0)) + self.b


class Crowd(Linear):
    """Each sample is given as many as there are samples."""

    def call(self, x):
        rows = ops.broadcast_to(ops.sum(self.w, axis=0)[None], (ops.shape(x)[0], self.units))
        return ops.matmul(x, self.w) + ops.matmul(rows, ops.transpose(rows))[:, :1]


class Noisy(Linear):
    def call(self, x, training=False):
        return super().call(x + 1.0 if training else x)


@pytest.mark.parametrize("kind", [Tied, Standardised, Crowd, Noisy])
def test_other_uses_stay_whole(kind):
    model = sequence(kind(name="own"), shape=(6,))
    rows = {row.name: row for row in keras_polar.inspect(model).rows}
    assert rows["before"].prunable == 0
    assert "own" in rows["before"].reason
    check(model)


class Positions(layers.Layer):
    """A matrix that is added: units are followed through the layer as it is."""

    def build(self, shape):
        self.table = self.add_weight(shape[1:], "random_normal", name="table")

    def call(self, x):
        return x + self.table


def test_a_layer_without_a_kernel_stays_the_layer_that_it_is():
    model = sequence(Positions(name="own"))
    _, small = check(model)
    assert any(isinstance(x, Positions) for x in small.layers)


def test_it_trains_like_the_layer():
    """One step of the gated model, all open, is one of the model."""
    model = randomise(sequence(Block(name="own")))
    schedule = keras_polar.Schedule(steps=1000)
    gated = keras_polar.apply(model, 1e-6, gate="static", schedule=schedule)
    x = np.random.default_rng(1).standard_normal((8, 5, 6)).astype("float32")
    y = np.arange(8) % 2
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for net in (model, gated):
        net.compile(keras.optimizers.SGD(0.1), loss)
        net.train_on_batch(x, y)
    np.testing.assert_allclose(
        to_numpy(model(x, training=False)), to_numpy(gated(x, training=False)), atol=1e-5
    )


class Positioned(layers.Layer):
    """Embeddings of positions that are always the same: the beginning of most transformers."""

    def __init__(self, how="row", **kwargs):
        super().__init__(**kwargs)
        self.how = how
        self.positions = layers.Embedding(5, 6, name="positions")

    def call(self, x):
        rows = ops.arange(0, x.shape[1])
        if self.how == "row":
            return x + self.positions(rows)
        if self.how == "batch of one":
            return self.positions(ops.expand_dims(rows, 0)) * x
        if self.how == "for each":
            return x + ops.broadcast_to(self.positions(rows), ops.shape(x))
        if self.how == "twice":
            return x + self.positions(rows) + self.positions(rows[::-1])
        return x + ops.sum(self.positions(rows), axis=0)

    def get_config(self):
        return {**super().get_config(), "how": self.how}


@pytest.mark.parametrize("how", ["row", "batch of one", "for each", "twice"])
def test_embeddings_of_positions_are_pruned_with_what_they_are_added_to(how):
    own = Positioned(how, name="own")
    model = sequence(own, Block())
    nodes = len(own.positions._inbound_nodes)
    assert {row.name: row.prunable for row in keras_polar.inspect(model).rows}["before"] == 6
    _, small = check(model)
    table = small.get_layer("positions")
    assert table.output_dim < 6
    assert (own.positions.name, len(own.positions._inbound_nodes)) == ("positions", nodes)


def test_units_pass_through_a_dense_layer_on_another_axis():
    """As in an MLP-Mixer: tokens are mixed, channel by channel."""
    x = keras.Input((5, 6))
    h = layers.Dense(12, name="channels")(x)
    mixed = layers.Dense(7, "gelu", name="tokens")(ops.swapaxes(h, 1, 2))
    mixed = layers.Dense(5, name="back")(mixed)
    h = layers.LayerNormalization()(h + ops.swapaxes(mixed, 1, 2))
    model = keras.Model(x, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(h)))
    rows = {row.name: row.prunable for row in keras_polar.inspect(model).rows}
    assert rows == {"channels": 12, "tokens": 0, "back": 0, "head": 0}
    check(model)
    check(model, gate="dynamic")


def test_embeddings_of_positions_that_are_mixed_stay():
    model = sequence(Positioned("mixed", name="own"))
    assert {row.name: row.prunable for row in keras_polar.inspect(model).rows}["before"] == 0


class Queries(layers.Layer):
    """Reads the table of an embedding that it never calls (as detectors do), or calls as well."""

    def __init__(self, calls=False, **kwargs):
        super().__init__(**kwargs)
        self.calls, self.dense = calls, layers.Dense(6)
        self.queries = layers.Embedding(5, 6, name="queries")

    def build(self, shape):
        self.dense.build(shape)
        self.queries.build()

    def call(self, x):
        rows = ops.expand_dims(self.queries.embeddings, 0)
        y = self.dense(x) + ops.tile(rows, (ops.shape(x)[0], 1, 1))
        return y + self.queries(ops.argmax(x[..., :5], axis=-1)) if self.calls else y

    def get_config(self):
        return {**super().get_config(), "calls": self.calls}


@pytest.mark.parametrize("calls", [False, True])
def test_the_table_of_an_embedding_is_read(calls):
    own = Queries(calls, name="own")
    model = sequence(own, Block())
    table = own.queries.embeddings
    rows = {row.name: row for row in keras_polar.inspect(model).rows}
    assert rows["queries"].prunable == 6, rows["queries"].reason
    _, small = check(model)
    assert small.get_layer("queries").output_dim < 6
    assert own.queries.embeddings is table


class Keeps(layers.Layer):
    """Makes a part, and leaves it to others to use it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.head = layers.Dense(6), layers.Dense(6, name="lent")

    def build(self, shape):
        self.dense.build(shape)
        self.head.build((*shape[:-1], 6))

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("is_used", [True, False])
def test_a_part_that_only_others_use(is_used):
    own, x = Keeps(name="own"), keras.Input((5, 6))
    h = own(layers.Dense(6, name="before")(x))
    h = own.head(h) if is_used else h
    model = randomise(keras.Model(x, layers.Dense(3, name="head")(layers.Dense(7)(h))))
    rows = {row.name: row for row in keras_polar.inspect(model).rows}
    assert rows["before"].prunable == (6 if is_used else 0), rows["before"].reason
    check(model)


class Gathered(layers.Layer):
    """Rows of a table at numbers that are always the same: biases of relative positions, say."""

    def __init__(self, how="rows", **kwargs):
        super().__init__(**kwargs)
        self.how = how
        self.dense = layers.Dense(6)

    def build(self, shape):
        self.dense.build(shape)
        self.table = self.add_weight((9, 6), "random_normal", name="table")

    def call(self, x):
        x, numbers = self.dense(x), ops.array([0, 3, 3, 8, 1])
        if self.how == "columns":
            return x + ops.take(self.table, [5, 4, 3, 2, 1, 0], axis=1)[:5, :]
        rows = ops.take(self.table, numbers, axis=0)
        if self.how == "in windows":  # of one token each
            windows = ops.reshape(x, (-1, 1, 6)) * ops.take(self.table, ops.array([4]), axis=0)
            return ops.reshape(windows, (-1, 5, 6))
        if self.how == "on another axis":
            added = ops.swapaxes(x, 1, 2) + ops.expand_dims(ops.transpose(rows), 0)
            return ops.swapaxes(added, 1, 2)
        return x + rows + (self.table[4:] if self.how == "twice" else 0.0)

    def get_config(self):
        return {**super().get_config(), "how": self.how}


@pytest.mark.parametrize("how", ["rows", "on another axis", "twice", "in windows"])
def test_rows_of_a_table_are_cut_with_what_they_are_added_to(how):
    model = sequence(Gathered(how, name="own"), Block())
    rows = {row.name: row for row in keras_polar.inspect(model).rows}
    assert rows["own_table"].prunable == 6, rows["own_table"].reason
    _, small = check(model)
    table = small.get_layer("own_table")
    assert table.input_dim == 9
    assert table.output_dim < 6


class Hands(layers.Layer):
    """Gives others what it holds."""

    def __init__(self, how="each", **kwargs):
        super().__init__(**kwargs)
        self.how, self.dense = how, layers.Dense(6)

    def build(self, shape):
        self.dense.build(shape)
        self.table = self.add_weight((5, 6), "random_normal", name="table")

    def call(self, x):
        rows = ops.expand_dims(self.table, 0)
        if self.how == "each":
            return self.dense(x), ops.tile(rows, (ops.shape(x)[0], 1, 1))
        rows = rows if self.how == "all" else ops.take(self.table, [4, 3, 2, 1, 0], axis=0)
        return self.dense(x), rows

    def get_config(self):
        return {**super().get_config(), "how": self.how}


def handing(how):
    x = keras.Input((5, 6))
    h, rows = Hands(how, name="own")(layers.Dense(6, name="before")(x))
    return randomise(keras.Model(x, layers.Dense(3, name="head")(h + rows)))


def test_what_each_sample_is_handed_out_is_cut():
    model = handing("each")
    assert {row.name: row.prunable for row in keras_polar.inspect(model).rows}["before"] == 6
    check(model)


@pytest.mark.parametrize("how", ["all", "rows"])
def test_what_all_samples_are_handed_out_stays(how):
    found = {row.name: row for row in keras_polar.inspect(handing(how)).rows}
    assert "own variable" in found["before"].reason


def test_entries_that_are_no_rows_stay():
    model = sequence(Gathered("columns", name="own"))
    rows = {row.name: row for row in keras_polar.inspect(model).rows}
    assert rows["before"].prunable == 0
    assert "own variable" in rows["own"].reason
    check(model)


class Masked(Tokens):
    """Has a token for patches that are hidden, and none is hidden here: KerasHub's DINOv2."""

    def build(self, shape):
        super().build(shape)
        self.hidden = self.add_weight((1, 6), "random_normal", name="hidden")

    def call(self, x, hides=None):
        if hides is not None:
            x = ops.where(hides, self.hidden, x)
        return super().call(x)


def test_a_weight_that_the_call_does_not_use_holds_nothing():
    x = keras.Input((5, 6))
    h = layers.LayerNormalization()(Masked(name="tokens")(x))
    model = randomise(keras.Model(x, layers.Dense(3, name="head")(h)))
    rows = {r.name: r for r in keras_polar.inspect(model).rows}
    assert "tokens" not in rows
    assert rows["tokens_token"].prunable == 6
    pair = check(model)
    assert not any("hidden" in w.path for m in pair for w in m.weights)


def test_a_weight_that_is_used_in_training_alone_holds_its_layer():
    class Hiding(Masked):
        def call(self, x, training=False):
            return super().call(x, hides=x > 0 if training else None)

    model = keras.Sequential([keras.Input((5, 6)), Hiding(name="tokens"), layers.Dense(3)])
    rows = {r.name: r.reason for r in keras_polar.inspect(model).rows}
    assert "differently in training" in rows["tokens"]
