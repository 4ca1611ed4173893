"""A teacher: the losses of keras.distillation, before and after the switch, and never elsewhere."""

import keras
import numpy as np
import pytest
from helpers import quick, randomise, small_resnet
from keras import layers
from keras.distillation import DistillationLoss, FeatureDistillation, LogitsDistillation

import keras_polar
from keras_polar.backends import CAN_COMPACT, to_numpy
from keras_polar.gates.lesson import Lesson
from keras_polar.surgery.certificate import difference

BACKEND = keras.backend.backend()
LONG = keras_polar.Schedule(steps=10_000)  # warms up longer than these tests run
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy
KL = keras.losses.KLDivergence
Teacher = keras_polar.Teacher


def data(n=32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 6)).astype("float32"), rng.integers(0, 3, n)


def network(seed=0, activation=None, name="network", classes=3, hidden="hidden", inputs=6):
    keras.utils.set_random_seed(seed)
    x = keras.Input((inputs,), name="x")
    z = layers.Dense(16, activation="tanh", name=hidden)(x)
    z = layers.Dense(8, activation="tanh", name="features")(z)
    outputs = layers.Dense(classes, activation=activation, name="head")(z)
    return keras.Model(x, outputs, name=name)


def two_headed(seed=0, as_dict=False):
    keras.utils.set_random_seed(seed)
    x = keras.Input((6,), name="x")
    z = layers.Dense(16, activation="tanh", name="hidden")(x)
    a, b = layers.Dense(3, name="a")(z), layers.Dense(4, name="b")(z)
    return keras.Model(x, {"a": a, "b": b} if as_dict else [a, b])


def number(x):
    return float(to_numpy(x))


def values(model):
    return [to_numpy(v).copy() for v in model.variables]


def compiled(model, loss=None, **options):
    loss = CROSSENTROPY(from_logits=True) if loss is None else loss
    model.compile(keras.optimizers.SGD(0.0), loss, jit_compile=BACKEND == "jax", **options)
    return model


def losses(gated, x, y, epochs=1):
    """What `fit` reports of one step per epoch, without learning anything."""
    return gated.fit(x, y, len(x), epochs, shuffle=False, verbose=0).history["loss"]


class Inside(keras.callbacks.Callback):
    """Whether the sub-network trained."""

    async_safe = True
    was_compacted = False

    def on_train_batch_end(self, batch, logs=None):
        self.was_compacted |= self.model.sub_network is not None


def feature_of(model, x, name="features"):
    return keras.Model(model.input, model.get_layer(name).output)(x)


# By hand: what is added for a gated model and its teacher.
LOSSES = {
    "default": (None, lambda g, t, x: LogitsDistillation(3.0, KL()).compute_loss(t(x), g(x))),
    "temperature": (
        lambda: LogitsDistillation(temperature=4.0),
        lambda g, t, x: LogitsDistillation(4.0, KL()).compute_loss(t(x), g(x)),
    ),
    "as they are": (
        lambda: FeatureDistillation("mse"),
        lambda g, t, x: FeatureDistillation("mse").compute_loss(t(x), g(x)),
    ),
    "features": (
        lambda: FeatureDistillation("mse", "features", "features"),
        lambda g, t, x: FeatureDistillation("mse").compute_loss(feature_of(t, x), feature_of(g, x)),
    ),
}


@pytest.mark.parametrize("name", quick(("default", "features"), LOSSES))
def test_the_loss_is_that_of_keras_before_and_after_the_switch(name):
    make, by_hand = LOSSES[name]
    x, y = data()
    model, other = network(), randomise(network(seed=1))
    teacher = Teacher(other, make() if make else None, weight=0.5)
    gated = compiled(keras_polar.apply(model, 0.3, gate="static", schedule=LONG, teacher=teacher))

    def wanted():
        own = CROSSENTROPY(from_logits=True)(y, gated(x))
        added = 0.5 * number(by_hand(gated, other, x))
        assert added > 1e-3
        return number(own) + added

    before = wanted()
    assert losses(gated, x, y) == pytest.approx([before], rel=1e-5)
    gated.settle()
    after = wanted()
    assert abs(after - before) > 1e-4
    inside = Inside()
    found = gated.fit(x, y, len(x), verbose=0, callbacks=[inside]).history["loss"]
    assert inside.was_compacted == CAN_COMPACT
    assert found == pytest.approx([after], rel=1e-5)
    own = number(CROSSENTROPY(from_logits=True)(y, gated(x)))
    assert gated.evaluate(x, y, verbose=0) == pytest.approx(own, rel=1e-5)


def test_several_losses_with_weights():
    x, y = data()
    model, other = network(), network(seed=1)
    both = [LogitsDistillation(2.0, KL()), FeatureDistillation("mae", "features", "features")]
    gated = keras_polar.apply(model, 0.3, schedule=LONG, teacher=Teacher(other, both, [0.3, 2.0]))
    by_hand = 0.3 * both[0].compute_loss(other(x), model(x))
    by_hand += 2.0 * FeatureDistillation("mae").compute_loss(
        feature_of(other, x), feature_of(model, x)
    )
    own = CROSSENTROPY(from_logits=True)(y, model(x))
    assert losses(compiled(gated), x, y) == pytest.approx([number(own + by_hand)], rel=1e-5)


def test_layers_that_are_compared_keep_all_their_units():
    loss = FeatureDistillation("mse", "features", "features")
    gated = keras_polar.apply(network(), 0.3, teacher=Teacher(network(), loss))
    assert [g.name for g in gated.groups] == ["hidden"]
    teacher = Teacher(network(), loss)
    with pytest.raises(ValueError, match="features: is compared with the teacher"):
        keras_polar.apply(network(), 0.3, ignore=["hidden"], teacher=teacher)


def test_only_every_third_step():
    x, y = data()
    model, other = network(), network(seed=1)
    gated = keras_polar.apply(model, 0.3, schedule=LONG, teacher=Teacher(other, every=3))
    compiled(gated)
    own = number(CROSSENTROPY(from_logits=True)(y, model(x)))
    added = 3 * number(LogitsDistillation(3.0, KL()).compute_loss(other(x), model(x)))
    wanted = [own, own, own + added] * 2
    assert losses(gated, x, y, 6) == pytest.approx(wanted, rel=1e-5)
    gated.settle()
    compact = losses(gated, x, y, 3)
    assert compact[0] == pytest.approx(compact[1], rel=1e-6)
    assert compact[2] > compact[0] + 0.01


def test_gradients_come_through_the_turn():
    """A conditional loss teaches: with a single step, and that the teacher's, weights move."""
    x, y = data()
    trained = []
    for every in (1, 2):
        other = network(seed=1)
        teacher = Teacher(other, weight=1 / every, every=every)
        gated = keras_polar.apply(network(), 0.3, gate="static", schedule=LONG, teacher=teacher)
        gated.consensus.step.assign(1.0)
        gated.compile(keras.optimizers.SGD(0.1), None, jit_compile=BACKEND == "jax")
        before = difference(other, gated, x)
        gated.fit(x, y, len(x), epochs=1, verbose=0)
        assert difference(other, gated, x) < before - 1e-3
        trained.append(to_numpy(gated.get_layer("head").kernel))
    np.testing.assert_allclose(trained[0], trained[1], rtol=1e-5, atol=1e-6)


def test_probabilities_of_a_softmax_are_compared_as_logits():
    x, y = data()
    teacher = network(seed=1)
    runs = []
    for activation in (None, "softmax"):
        loss = CROSSENTROPY(from_logits=activation is None)
        model = network(activation=activation)
        gated = keras_polar.apply(model, 0.3, schedule=LONG, teacher=teacher)
        runs += losses(compiled(gated, loss), x, y)
        as_teacher = network(seed=1, activation="softmax")
        gated = keras_polar.apply(model, 0.3, schedule=LONG, teacher=as_teacher)
        runs += losses(compiled(gated, loss), x, y)
    assert runs == pytest.approx([runs[0]] * 4, rel=1e-4)


FIRST_ALONE = {"a": "kl_divergence", "b": None}


@pytest.mark.parametrize(
    ("as_dict", "loss"),
    [
        (True, None),
        (False, FIRST_ALONE),
        pytest.param(False, None, marks=pytest.mark.slow),
        pytest.param(True, FIRST_ALONE, marks=pytest.mark.slow),
    ],
)
def test_two_outputs_keep_their_names(as_dict, loss, tmp_path):
    x, y = data()
    model, other = two_headed(0, as_dict), two_headed(1, as_dict)
    if loss is not None:
        loss = LogitsDistillation(3.0, loss if as_dict else list(loss.values()))
    gated = keras_polar.apply(model, 0.3, schedule=LONG, teacher=Teacher(other, loss))
    assert gated.output_names == model.output_names
    own = {n: CROSSENTROPY(from_logits=True) for n in "ab"}
    compiled(gated, own, metrics={"a": ["accuracy"]})
    compiled(model, own, metrics={"a": ["accuracy"]})
    labels = {"a": y, "b": y}
    labels = labels if as_dict else list(labels.values())
    report = gated.evaluate(x, labels, verbose=0, return_dict=True)
    assert report == pytest.approx(model.evaluate(x, labels, verbose=0, return_dict=True))
    by_hand = LogitsDistillation(3.0, KL())
    theirs, ours = (keras.tree.flatten(m(x)) for m in (other, model))
    added = sum(
        number(by_hand.compute_loss(a, b))
        for a, b in list(zip(theirs, ours, strict=True))[: 1 if loss else 2]
    )
    assert losses(gated, x, labels) == pytest.approx([report["loss"] + added], rel=1e-5)
    gated.settle()
    again = losses(gated, x, labels)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert loaded.output_names == model.output_names
    assert losses(loaded, x, labels) == pytest.approx(again, rel=1e-5)
    small = keras_polar.convert(gated, verify=x)
    assert small.output_names == model.output_names


def images(n=64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 8, 8, 1)).astype("float32"), rng.integers(0, 10, n)


@pytest.fixture(params=quick(("float32",), ("float32", "mixed_float16", "mixed_bfloat16")))
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


def test_the_teacher_stays_what_it_was(policy, tmp_path):
    """The very model that is pruned teaches, BatchNorm and all, in a whole run."""
    model = randomise(small_resnet())
    before, trainable = values(model), len(model.trainable_variables)
    x, y = images()
    gated = keras_polar.apply(model, 0.4, teacher=model)
    taught = {id(v) for v in gated.lesson.variables}
    assert len(taught) == len(model.variables)
    assert not taught.intersection(id(v) for v in gated.trainable_variables)
    assert not taught.intersection(id(v) for v in model.variables)
    outputs = to_numpy(model(x))
    answers = keras.tree.flatten(gated.lesson.teacher([x], training=True))
    np.testing.assert_array_equal(to_numpy(answers[0]), outputs)  # in inference mode, for good
    gated.compile(keras.optimizers.Adam(1e-2), CROSSENTROPY(from_logits=True), metrics=["accuracy"])
    gated.trainable = True  # and for all layers, as loops do
    for layer in gated.layers:
        layer.trainable = True
    gated.fit(x, y, batch_size=16, epochs=3, verbose=0, validation_data=(x, y))
    assert gated.settled
    for taught_values in (gated.lesson.variables, model.variables):
        for a, b in zip(before, taught_values, strict=True):
            np.testing.assert_array_equal(to_numpy(b), a)
    assert len(model.trainable_variables) == trainable
    np.testing.assert_array_equal(to_numpy(model(x)), outputs)
    small = keras_polar.convert(gated, verify=x[:8])
    assert not [layer for layer in small.layers if isinstance(layer, Lesson)]
    assert small.count_params() < model.count_params()
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert {id(v) for v in loaded.lesson.variables}.isdisjoint(
        id(v) for v in loaded.trainable_variables
    )
    loaded.fit(x, y, batch_size=16, verbose=0)
    for a, b in zip(before, loaded.lesson.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(b), a)


def test_a_fit_that_fails_leaves_the_teacher_whole():
    x, y = data(64)
    model = network()
    before = values(model)
    gated = keras_polar.apply(model, 0.3, teacher=model)
    gated.compile("adam", CROSSENTROPY(from_logits=True))

    def stop(batch, logs):
        if batch == 2:
            raise KeyboardInterrupt

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
    with pytest.raises(KeyboardInterrupt):
        gated.fit(x, y, 8, verbose=0, callbacks=[callback])
    for a, b in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(b), a)
    again = keras_polar.apply(model, 0.3, teacher=model)
    again.compile("adam", CROSSENTROPY(from_logits=True))
    again.fit(x, y, 8, verbose=0)
    for a, b in zip(before, again.lesson.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(b), a)


@keras.saving.register_keras_serializable("test_teacher")
class Noisy(layers.Layer):
    """Adds a loss and counts what it sees."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, x):
        self.add_loss(1e3 + 0 * keras.ops.sum(x))
        return x


def test_penalties_and_metrics_of_the_teacher_are_its_own():
    x, y = data()
    penalty = {"activity_regularizer": "l1", "kernel_regularizer": "l2"}
    inputs = keras.Input((6,))
    z = Noisy()(layers.Dense(16, activation="tanh", **penalty)(inputs))
    noisy = keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.5)(z)))
    model = network()
    gated = compiled(keras_polar.apply(model, 0.3, schedule=LONG, teacher=noisy))
    assert "seen" not in [m.name for m in gated.metrics]
    own = CROSSENTROPY(from_logits=True)(y, model(x))
    added = LogitsDistillation(3.0, KL()).compute_loss(noisy(x, training=False), model(x))
    for _ in range(2):
        assert losses(gated, x, y) == pytest.approx([number(own + added)], rel=1e-5)
        gated.settle()
        own = CROSSENTROPY(from_logits=True)(y, gated(x))
        added = LogitsDistillation(3.0, KL()).compute_loss(noisy(x, training=False), gated(x))


def test_inputs_and_outputs_are_told_by_their_names():
    """A teacher that was built in another order."""

    def build(order):
        keras.utils.set_random_seed(0)
        inputs = {n: keras.Input((k,), name=n) for n, k in (("left", 6), ("right", 6))}
        z = layers.Dense(16, activation="tanh")(layers.Concatenate()(list(inputs.values())))
        heads = {n: layers.Dense(3, name=n)(z) for n in ("a", "b")}
        model = keras.Model([inputs[n] for n in order[0]], [heads[n] for n in order[1]])
        return model

    model = build((("left", "right"), ("a", "b")))
    other = build((("right", "left"), ("b", "a")))
    (x, _), (z, _) = data(), data(seed=1)
    gated = keras_polar.apply(model, 0.3, schedule=LONG, teacher=other)
    compiled(gated, None)
    np.testing.assert_allclose(number(gated.lesson.loss_of(model([x, z]), [x, z])), 0, atol=1e-6)


class Own(DistillationLoss):
    def compute_loss(self, teacher_outputs, student_outputs, **kwargs):
        return keras.ops.max(keras.ops.abs(teacher_outputs - student_outputs))


def test_a_loss_of_ones_own():
    x, y = data()
    model, other = network(), network(seed=1)
    gated = keras_polar.apply(model, 0.3, schedule=LONG, teacher=Teacher(other, Own()))
    wanted = CROSSENTROPY(from_logits=True)(y, model(x)) + Own().compute_loss(other(x), model(x))
    assert losses(compiled(gated), x, y) == pytest.approx([number(wanted)], rel=1e-5)


def test_a_branch_that_closes_at_the_output():
    """The sum that is the output goes, and what it was the sum of is compared in its place."""
    x, y = data()
    inputs = keras.Input((6,))
    z = layers.Dense(16, activation="tanh", name="stem")(inputs)
    z = layers.Dense(3, name="short")(z)
    branch = layers.Dense(8, activation="tanh", name="a")(z)
    model = keras.Model(inputs, layers.Add()([z, layers.Dense(3, name="b")(branch)]))
    options = {"granularity": "blocks", "schedule": LONG, "max_sparsity": 1.0}
    gated = compiled(keras_polar.apply(model, 0.2, teacher=model, **options))
    gated.groups[0].set_mask([False])
    inside = Inside()
    found = gated.fit(x, y, len(x), verbose=0, callbacks=[inside]).history["loss"]
    assert inside.was_compacted == CAN_COMPACT
    wanted = CROSSENTROPY(from_logits=True)(y, gated(x))
    wanted = wanted + LogitsDistillation(3.0, KL()).compute_loss(model(x), gated(x))
    assert found == pytest.approx([number(wanted)], rel=1e-5)


def test_costs_and_files_do_not_know_the_teacher(tmp_path):
    model = network()
    gated = keras_polar.apply(model, 0.3, teacher=model)
    assert keras_polar.cost(gated) == keras_polar.cost(model)
    assert keras_polar.inspect(gated).rows
    if BACKEND == "tensorflow":
        gated.settle()
        keras_polar.export_tflite(gated, tmp_path / "taught.tflite")
        keras_polar.export_tflite(keras_polar.convert(gated), tmp_path / "small.tflite")
        sizes = {p.stem: p.stat().st_size for p in tmp_path.glob("*.tflite")}
        assert sizes["taught"] == sizes["small"]


REFUSED = [
    (lambda: "big", TypeError, "keras.Model, a keras_polar.Teacher or None, received 'big'"),
    (lambda: keras_polar.apply(network(), 0.3), ValueError, "has some.*keras_polar.convert"),
    (lambda: network(inputs=7), ValueError, r"x \(None, 6\) float32.*x \(None, 7\) float32"),
    (
        lambda: network(classes=4),
        ValueError,
        r"shape \(None, 3\), of the teacher 'network' \(None, 4\)",
    ),
    (two_headed, ValueError, r"outputs of model 'network' \(head\).* has a, b"),
    (lambda: network(activation="sigmoid"), ValueError, "compares logits.*is probabilities"),
    (
        lambda: Teacher(network(activation="softmax"), FeatureDistillation("mse")),
        ValueError,
        "is logits, and that of the teacher 'network' is probabilities of a softmax",
    ),
    (
        lambda: Teacher(network(), FeatureDistillation("mse", "features", "no")),
        ValueError,
        "received 'no', which it does not have. Its layers: hidden, features, head",
    ),
    (
        lambda: Teacher(network(), FeatureDistillation("mse", "hidden", "features")),
        ValueError,
        r"shape \(None, 8\), of the teacher 'network' \(None, 16\)",
    ),
    (
        lambda: Teacher(network(), LogitsDistillation(loss=["mse", "mse"])),
        ValueError,
        "as one loss, or in the structure of the outputs",
    ),
    (lambda: Teacher(network(), "mse"), TypeError, "a loss of keras.distillation"),
    (lambda: Teacher(network(), weight=-1.0), ValueError, "weight >= 0"),
    (lambda: Teacher(network(), weight="1"), TypeError, "weight as a number"),
    (lambda: Teacher(network(), weight=[1.0, 2.0]), ValueError, "each of 1 losses"),
    (lambda: Teacher(network(), every=0), ValueError, "every >= 1"),
    (lambda: Teacher(network(), every=1.5), TypeError, "every as an int"),
    (lambda: Teacher("net"), TypeError, "model as a keras.Model"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_does_not_fit_is_refused(case):
    make, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        keras_polar.apply(network(), 0.3, teacher=make())


def test_one_unit_is_no_distribution():
    model = network(classes=1)
    with pytest.raises(ValueError, match="has one unit, whose share is always 1"):
        keras_polar.apply(model, 0.3, teacher=model)
    keras_polar.apply(model, 0.3, teacher=Teacher(model, FeatureDistillation(loss="mse")))


class Subclassed(keras.Model):
    def call(self, x):
        return x


class Handed(layers.Layer):
    def __init__(self, scale, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, x):
        return x * self.scale

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


def test_what_a_teacher_was_handed_is_copied_and_what_cannot_be_is_refused():
    with pytest.raises(TypeError, match=r"teacher cannot be copied.*cannot be rewritten"):
        keras_polar.apply(network(), 0.3, teacher=Subclassed())
    inputs = keras.Input((6,))
    scale = keras.Variable(np.ones(16, "float32"), name="handed")
    model = keras.Model(inputs, layers.Dense(3)(Handed(scale)(layers.Dense(16)(inputs))))
    gated = keras_polar.apply(network(), 0.3, teacher=model)  # which is copied as it is
    assert scale.trainable
    assert not [v for v in gated.lesson.variables if v is scale]
