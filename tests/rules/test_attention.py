"""Attention, EinsumDense and Embedding: heads and widths really go, and the certificate holds."""

import keras
import numpy as np
import pytest
from helpers import check, close_half, model_of, predicted, randomise
from keras import layers, ops

import keras_polar
from keras_polar.surgery.certificate import difference, random_inputs

ATTENTION = {"num_heads": 4, "key_dim": 6, "name": "attention"}
GROUPED = {"head_dim": 6, "name": "attention"}


def self_attention(kind=layers.MultiHeadAttention, call=None, **options):
    layer = kind(**options)
    return lambda x: layer(x, x, **(call or {}))


def cross_attention(x):
    value, key = layers.Dense(7, name="values")(x), layers.Dense(9, name="keys")(x)
    return layers.MultiHeadAttention(**ATTENTION)(x[:, :3], value, key)


def with_scores(x):
    layer = layers.MultiHeadAttention(**ATTENTION)
    y, scores = layer(x, x, return_attention_scores=True)
    scores = layers.Dense(4, name="mixed")(ops.transpose(scores, (0, 2, 3, 1)))
    return layers.Concatenate()([layers.Flatten()(y), layers.Flatten()(scores)])


def with_causal_and_other_mask(x):
    mask = ops.sum(x, axis=-1, keepdims=True) > -1e9
    layer = layers.MultiHeadAttention(**ATTENTION)
    return layer(x, x, attention_mask=mask, use_causal_mask=True)


def shared(x):
    layer = layers.MultiHeadAttention(**ATTENTION)
    return layers.Add()([layer(x, x), layer(ops.tanh(x), x, use_causal_mask=True)])


def attention_by_einsum(x):
    q, k, v = (
        layers.EinsumDense("btd,dnh->btnh", (5, 4, 6), bias_axes="nh", name=n)(x) for n in "qkv"
    )
    y = ops.sigmoid(q) * ops.tanh(k) + v
    return layers.EinsumDense("btnh,nhd->btd", (5, 8), bias_axes="d", name="project")(y)


CASES = {
    "plain": [self_attention(**ATTENTION)],
    "no_bias": [self_attention(**ATTENTION, use_bias=False)],
    "value_width": [self_attention(**ATTENTION, value_dim=3)],
    "output_shape": [self_attention(**ATTENTION, output_shape=7)],
    "output_of_two_axes": [self_attention(**ATTENTION, output_shape=(2, 6))],
    "gated_attention": [self_attention(**ATTENTION, use_gate=True)],
    "dropout": [self_attention(**ATTENTION, dropout=0.3)],
    "causal": [self_attention(**ATTENTION, call={"use_causal_mask": True})],
    "causal_and_mask": [with_causal_and_other_mask],
    "sliding_window": [self_attention(**ATTENTION, sliding_window=2)],
    "scores": [with_scores],
    "cross": [cross_attention],
    "shared": [shared],
    "grouped": [
        self_attention(
            layers.GroupQueryAttention, **GROUPED, num_query_heads=6, num_key_value_heads=3
        )
    ],
    "grouped_few": [
        self_attention(
            layers.GroupQueryAttention, **GROUPED, num_query_heads=8, num_key_value_heads=2,
            use_gate=True,
        )
    ],
    "multi_query": [
        self_attention(
            layers.GroupQueryAttention, **GROUPED, num_query_heads=4, num_key_value_heads=1,
            use_bias=False, dropout=0.2,
        )
    ],
    "einsum_heads": [attention_by_einsum],
    "einsum_ellipsis": [
        layers.EinsumDense("...x,xy->...y", 6, bias_axes="y", activation="relu"),
        layers.EinsumDense("bt...,td->bd...", (4,), bias_axes="d"),
    ],
    "einsum_batch_axis": [
        layers.EinsumDense("btc,tc->btc", (5, 8), bias_axes="c"), layers.Dense(6),
    ],
    "einsum_per_step": [
        layers.EinsumDense("btc,tcd->btd", (5, 7), bias_axes="td"), layers.Dense(6),
    ],
    "einsum_sum": [layers.EinsumDense("btc,td->bd", (7,), bias_axes="d")],
    "luong": [lambda x: layers.Attention(use_scale=True)([x, layers.Dense(8)(x)])],
    "luong_three": [
        lambda x: layers.Attention(score_mode="concat")(
            [x, layers.Dense(6, name="values")(x), layers.Dense(8)(x)]
        ),
        layers.Dense(4),
    ],
    "bahdanau": [
        lambda x: layers.AdditiveAttention()([x, layers.Dense(6, name="values")(x), ops.tanh(x)]),
    ],
    "dot": [lambda x: layers.Dot(axes=-1)([x, layers.Dense(8)(x)])],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gate", ["static", "dynamic"])
def test_one_construct(case, gate):
    gated, small = check(randomise(model_of(*CASES[case])), gate=gate)
    if any(hasattr(x, "_query_dense") for x in small.layers):
        kinds = {g.name for g in gated.groups if g.layers[0] == "attention"}
        assert {"attention.q", "attention.key"} <= kinds
    assert all(type(x).__module__.startswith("keras.") for x in small.layers)


def test_attention_over_one_of_two_axes():
    steps = [self_attention(**ATTENTION, attention_axes=(2,)), layers.Dense(6)]
    check(randomise(model_of(*steps, shape=(3, 4, 8))))


def test_heads_and_widths_shrink():
    model = randomise(model_of(self_attention(**ATTENTION, value_dim=4)))
    _, small = check(model)
    layer = small.get_layer("attention")
    assert (layer.num_heads, layer.key_dim, layer.value_dim) == (2, 3, 2)
    assert layer.output_dense.kernel.shape == (2, 2, 4)
    assert layer.query_dense.kernel.shape == (4, 2, 3)


@pytest.mark.parametrize(("queries", "keys", "left"), [(6, 3, (2, 1)), (8, 2, (4, 2))])
def test_heads_of_grouped_attention_go_in_legal_pieces(queries, keys, left):
    options = {"num_query_heads": queries, "num_key_value_heads": keys, **GROUPED}
    _, small = check(randomise(model_of(self_attention(layers.GroupQueryAttention, **options))))
    layer = small.get_layer("attention")
    assert (layer.num_query_heads, layer.num_key_value_heads, layer.head_dim) == (*left, 3)


def zeroed(model, layer, rows):
    """The model with rows of a layer's output projection set to zero, by hand."""
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    kernel = twin.get_layer(layer).output_dense.kernel
    value = np.array(ops.convert_to_numpy(kernel))
    value[rows] = 0
    kernel.assign(value)
    return twin


def test_removed_heads_equal_zeroed_rows_of_the_projection():
    model = randomise(model_of(self_attention(**ATTENTION)))
    small = keras_polar.remove(model, {"attention": [0, 2]})
    assert small.get_layer("attention").num_heads == 2
    inputs = random_inputs(model)
    assert difference(zeroed(model, "attention", [0, 2]), small, inputs) < 1e-5
    assert difference(model, small, inputs) > 1e-3


def fused_attention(x, how):
    """Queries, keys and values of one Dense, as most who write attention by hand have them."""
    n, heads = x.shape[1], 2
    parts = layers.Dense(3 * 12, name="qkv")(x)
    if how == "last axis":
        q, k, v = ops.split(parts, 3, axis=-1)
        q, k, v = (ops.swapaxes(ops.reshape(y, (-1, n, heads, 6)), 1, 2) for y in (q, k, v))
    elif how == "own axis":
        parts = ops.split(ops.reshape(parts, (-1, n, 3, heads, 6)), 3, axis=2)
        q, k, v = (ops.swapaxes(ops.squeeze(y, 2), 1, 2) for y in parts)
    else:
        parts = ops.transpose(ops.reshape(parts, (-1, n, 3, heads, 6)), (2, 0, 3, 1, 4))
        q, k, v = ops.unstack(parts, axis=0) if how == "unstack" else (parts[i] for i in range(3))
    weights = ops.softmax(ops.matmul(q * 6**-0.5, ops.swapaxes(k, -1, -2)), axis=-1)
    y = ops.swapaxes(ops.matmul(weights, v), 1, 2)
    return layers.Dense(x.shape[-1], name="project")(ops.reshape(y, (-1, n, 12)))


@pytest.mark.parametrize("how", ["unstack", "places", "own axis", "last axis"])
def test_queries_keys_and_values_of_one_layer(how):
    x = keras.Input((5, 8))
    h = layers.Dense(10, name="stream")(x)
    h = layers.GlobalAveragePooling1D()(h + fused_attention(h, how))
    model = randomise(keras.Model(x, layers.Dense(3, name="head")(h)))
    rows = {row.name: row for row in keras_polar.inspect(model).rows}
    assert rows["qkv"].prunable >= 30, rows["qkv"].reason
    for seed in range(3):
        _, small = check(model, seed=seed)
        assert small.get_layer("qkv").units < 36


def test_mask_per_head_keeps_the_heads():
    x, mask = keras.Input((5, 8)), keras.Input((4, 5, 5), dtype="bool")
    y = layers.MultiHeadAttention(**ATTENTION)(layers.Dense(6)(x), x, attention_mask=mask)
    model = randomise(keras.Model([x, mask], layers.Dense(2)(y)))
    gated, _ = check(model)
    assert "attention.q" not in {g.name for g in gated.groups}
    reason = next(r.reason for r in keras_polar.inspect(model).rows if r.name == "attention")
    assert "mask for every head" in reason


def block(x, i):
    y = layers.LayerNormalization()(x)
    y = layers.MultiHeadAttention(4, 6, dropout=0.1, name=f"attention{i}")(y, y)
    x = layers.Add()([x, y])
    y = layers.LayerNormalization()(x)
    y = layers.Dense(16, activation="gelu", name=f"wide{i}")(y)
    return layers.Add()([x, layers.Dense(x.shape[-1], name=f"narrow{i}")(y)])


def transformer(blocks=2):
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True, name="embedding")(tokens)
    for i in range(blocks):
        x = block(x, i)
    return keras.Model(tokens, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))


def padded_tokens(n=16, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 20, (n, 6))
    return np.where(np.arange(6) < rng.integers(2, 7, (n, 1)), tokens, 0).astype("int32")


@pytest.mark.parametrize("gate", ["static", "dynamic"])
def test_transformer_loses_width_of_its_stream_heads_and_widths(gate):
    model = randomise(transformer())
    gated, small = check(model, gate=gate, inputs=padded_tokens())
    assert {"embedding", "attention0.q", "attention0.value", "attention1.key", "wide0"} <= {
        g.name for g in gated.groups
    }
    assert small.get_layer("attention1").num_heads == 2
    assert small.get_layer("wide0").units == 8
    assert small.get_layer("embedding").output_dim == 4
    assert small.get_layer("layer_normalization").gamma.shape == (4,)
    stays = {r.name for r in keras_polar.inspect(model).rows if r.prunable < r.units}
    assert stays == {model.layers[-1].name}
    dynamic = {x.group for x in gated.layers if type(x).__name__ == "DynamicGate"}
    assert dynamic == ({"wide0", "wide1"} if gate == "dynamic" else set())


def values(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.trainable_weights]


@pytest.mark.parametrize("gate", [pytest.param("static", marks=pytest.mark.slow), "dynamic"])
def test_gated_transformer_trains_saves_and_loads(gate, tmp_path):
    schedule = keras_polar.Schedule(0.1, 0.4, 0.8)  # of 16 steps, some in which gates learn
    gated = keras_polar.apply(transformer(blocks=1), 0.3, gate=gate, schedule=schedule)
    tokens, labels = padded_tokens(64), np.arange(64) % 2
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    gated.compile("adam", loss, jit_compile=False)
    before = values(gated)
    gated.fit(tokens, labels, batch_size=16, epochs=4, verbose=0)
    names = [v.path for v in gated.trainable_weights]
    moved = {n for n, a, b in zip(names, before, values(gated), strict=True) if (a != b).any()}
    for name in names:
        # A key's bias shifts all scores of a query alike: softmax does not feel it.
        assert name in moved or "key/bias" in name, name
    assert abs(gated.sparsity - 0.3) < 0.02
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert difference(gated, loaded, tokens) == 0
    small = keras_polar.convert(loaded, verify=tokens)
    assert difference(gated, small, tokens) < 1e-4
    small.save(tmp_path / "small.keras")
    assert difference(small, keras.models.load_model(tmp_path / "small.keras"), tokens) == 0


def test_embedding_width_goes_and_its_mask_stays():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True, name="embedding")(tokens)
    x = layers.GlobalAveragePooling1D()(layers.Dense(6, activation="tanh")(x))
    _, small = check(randomise(keras.Model(tokens, layers.Dense(2)(x))), inputs=padded_tokens())
    assert small.get_layer("embedding").embeddings.shape == (20, 4)


@pytest.mark.parametrize("tie", [True, False])
def test_reversible_embedding_is_cut_on_both_ways(tie):
    tokens = keras.Input((6,), dtype="int32")
    embedding = layers.ReversibleEmbedding(20, 8, tie_weights=tie, name="embedding")
    x = embedding(tokens)
    x = layers.Add()([x, layers.Dense(8)(layers.Dense(6, activation="relu")(x))])
    model = randomise(keras.Model(tokens, embedding(x, reverse=True)))
    _, small = check(model, inputs=padded_tokens())
    assert small.get_layer("embedding").output_dim == 4


def test_activity_regulariser_of_a_masked_layer_is_felt():
    penalty = keras.regularizers.L2(0.1)
    layer = layers.MultiHeadAttention(**ATTENTION, activity_regularizer=penalty)
    model = randomise(model_of(lambda x: layer(x, x)))
    inputs = random_inputs(model)
    gated = keras_polar.apply(model, 0.2)
    model(inputs, training=False)
    gated(inputs, training=False)
    ours = float(sum(gated.losses))
    assert ours == pytest.approx(float(sum(model.losses)), rel=1e-5)
    assert ours > 0


def test_half_precision_keeps_its_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = randomise(model_of(self_attention(**ATTENTION)))
    finally:
        keras.config.set_dtype_policy("float32")
    gated = keras_polar.apply(model, 0.01, measure="units", gate="static")
    close_half(gated)
    small = keras_polar.convert(gated, verify=True)
    assert small.get_layer("attention").compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("equation", "shape", "reason"),
    [
        ("btc,cbd->btd", (5, 4), "not one the library can follow"),
        ("btc,cd->btd", (5, 4), "element"),
    ],
)
def test_einsum_that_cannot_be_cut_says_why(equation, shape, reason):
    inputs = keras.Input(batch_shape=(2, 5, 8))
    activation = "softmax" if reason == "element" else None
    odd = layers.EinsumDense(equation, shape, activation=activation, name="odd")
    model = randomise(keras.Model(inputs, layers.Dense(3)(odd(layers.Dense(8)(inputs)))))
    reasons = {r.name: r.reason for r in keras_polar.inspect(model).rows}
    assert reason in reasons["odd"]


def test_first_new_axis_of_einsum_goes():
    _, small = check(randomise(model_of(attention_by_einsum)))
    assert small.get_layer("q").kernel.shape == (4, 2, 6)
    assert small.get_layer("project").kernel.shape[0] == 2


def test_einsum_dense_counts_its_units_on_whatever_axis_its_input_has_some():
    """With one channel left the input has units along its positions only, and they stay."""
    x = keras.Input((5,))
    y = layers.Reshape((4, 3))(layers.Dense(12, name="positions")(x))
    z = layers.EinsumDense("btc,cnd->btnd", (4, 6, 2), name="heads")(y)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Flatten()(z)))
    gated = keras_polar.apply(model, 0.01, gate="static", measure="units")
    assert [g.units for g in gated.groups] == [3, 6]
    gated.groups[0].set_mask(np.arange(3) == 2)
    gated.groups[1].set_mask(np.ones(6, bool))
    small = keras_polar.convert(gated, verify=True)
    assert predicted(model, [1, 6], "units") == keras_polar.cost(small).units == 4 + 6 + 2
