"""KerasHub tasks: raw inputs -> apply -> fit -> convert(into=task) -> predict -> preset."""

import keras
import numpy as np
import pytest
from helpers import close_half, randomise
from keras import layers

import keras_polar

RNG = np.random.default_rng(0)


class Task(keras.Model):
    """As KerasHub has them: a backbone, a head, and what inputs go through before."""

    def __init__(self, backbone, preprocessor=None, hidden=0, **kwargs):
        y = backbone(backbone.input)["features"]
        y = layers.Dense(hidden, "relu", name="hidden")(y) if hidden else y
        super().__init__(backbone.input, layers.Dense(3, name="logits")(y), **kwargs)
        self.backbone, self.preprocessor, self.hidden = backbone, preprocessor, hidden

    def preprocess_samples(self, x, y=None, sample_weight=None):
        return keras.utils.pack_x_y_sample_weight(self.preprocessor(x), y, sample_weight)

    def get_config(self):
        return {"name": self.name, "hidden": self.hidden}


def plain_task(**options):
    x = keras.Input((6,))
    y = layers.Dense(8, "relu", name="wide")(x)
    unread = layers.Dense(5, name="unread")(y)
    outputs = {"features": layers.Dense(8, "relu", name="features")(y), "unread": unread}
    return randomise(Task(keras.Model(x, outputs, name="backbone"), **options))


def cut(task):
    gated = keras_polar.apply(task, 0.2, gate="static")
    close_half(gated)
    return gated


def test_a_task_around_the_smaller_backbone():
    task = plain_task(preprocessor=layers.Rescaling(0.1))
    with pytest.warns(UserWarning, match=r"preprocessor \(Rescaling\) gives, and has no loss"):
        gated = cut(task)
    new = keras_polar.convert(gated, into=task)
    assert type(new) is Task
    assert new.preprocessor is task.preprocessor
    assert [x.name for x in new.backbone.layers][1:] == ["wide", "features"]
    small = keras_polar.convert(gated)
    assert new.count_params() == small.count_params() < task.count_params()
    x = RNG.standard_normal((4, 6)).astype("float32")
    assert np.array_equal(new(x), small(x))


def test_what_is_no_task_or_another_one_is_refused():
    gated = cut(plain_task())
    with pytest.raises(TypeError, match="expected into as the task of KerasHub"):
        keras_polar.convert(gated, into=keras.Sequential([keras.Input((6,)), layers.Dense(3)]))
    x = keras.Input((6,))
    other = Task(keras.Model(x, {"features": layers.Dense(4, name="other")(x)}))
    with pytest.raises(ValueError, match="Expected `into` to be the task"):
        keras_polar.convert(gated, into=other)


def test_a_head_that_was_cut_has_a_remedy():
    task = plain_task(hidden=7)
    with pytest.raises(ValueError, match=r"'hidden' of the head.*ignore=\['hidden'\]"):
        keras_polar.convert(cut(task), into=task)
    gated = keras_polar.apply(task, 0.2, gate="static", ignore=["hidden"])
    close_half(gated)
    assert keras_polar.convert(gated, into=task).get_layer("hidden").units == 7


# --- KerasHub's own --------------------------------------------------------------------------


def image_task(hub):
    backbone = hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    converter = hub.layers.ResNetImageConverter(image_size=(16, 16), scale=1 / 255.0)
    preprocessor = hub.models.ResNetImageClassifierPreprocessor(image_converter=converter)
    task = hub.models.ResNetImageClassifier(
        backbone=backbone, num_classes=4, preprocessor=preprocessor
    )
    return randomise(task), RNG.uniform(0, 255, (8, 16, 16, 3)).astype("float32")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "brown", "fox", "jumps"]


def text_task(hub):
    backbone = hub.models.BertBackbone(
        vocabulary_size=len(WORDS),
        num_layers=1,
        hidden_dim=8,
        intermediate_dim=12,
        num_heads=2,
        max_sequence_length=6,
    )
    preprocessor = hub.models.BertTextClassifierPreprocessor(
        hub.models.BertTokenizer(vocabulary=WORDS), sequence_length=6
    )
    task = hub.models.BertTextClassifier(
        backbone=backbone, num_classes=4, preprocessor=preprocessor
    )
    return randomise(task), np.array(["the quick fox", "brown fox jumps"] * 4)


TASKS = {"image": image_task, "text": text_task}


def gated_and_trained(task, x, y, **options):
    with pytest.warns(UserWarning, match="preprocessor .*has no loss of its own"):
        gated = keras_polar.apply(task, 0.2, gate="static", **options)
    # What the warning advises.
    x, y, w = keras.utils.unpack_x_y_sample_weight(task.preprocess_samples(x, y))
    gated.compile("adam", task.loss)
    gated.fit(x, y, sample_weight=w, verbose=0)
    return gated


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(?!apply|convert)")  # KerasHub's own
@pytest.mark.parametrize("kind", TASKS)
def test_a_task_in_and_a_task_out(kind, tmp_path):
    task, x = TASKS[kind](pytest.importorskip("keras_hub"))
    gated = gated_and_trained(task, x, np.zeros(8, int))
    small = keras_polar.convert(gated)
    new = keras_polar.convert(gated, into=task)
    assert type(new) is type(task)
    assert new.count_params() == small.count_params() < task.count_params()
    expected = small.predict(task.preprocess_samples(x), verbose=0)
    np.testing.assert_allclose(new.predict(x, verbose=0), expected, atol=1e-5)
    new.fit(x, np.zeros(8, int), verbose=0)
    expected = new.predict(x, verbose=0)
    new.save(tmp_path / "task.keras")
    loaded = keras.models.load_model(tmp_path / "task.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, atol=1e-5)
    new.save_to_preset(str(tmp_path / "preset"))
    preset = type(task).from_preset(str(tmp_path / "preset"))
    np.testing.assert_allclose(preset.predict(x, verbose=0), expected, atol=1e-5)
