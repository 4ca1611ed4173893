"""Tasks of KerasHub: raw inputs in, a smaller task of the same class out."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import randomise

import keras_polar

pytest.importorskip("keras_hub")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import hub_tasks
import keras_hub as hub
from hub_tasks import (
    TEXT,
    detector,
    image_classifier,
    images,
    scenes,
    segmenter,
    sentences,
    text_classifier,
    vit,
)
from task_trip import task_row

M = hub.models

TASKS = {"image": (image_classifier, images), "text": (text_classifier, sentences)}


@pytest.fixture(params=TASKS)
def case(request):
    make, data = TASKS[request.param]
    keras.utils.set_random_seed(0)
    return make(), *data()


def open_all(gated):
    for group in gated.groups:
        group.set_mask(np.ones(group.units, bool))


def test_nothing_cut_answers_as_the_task_does(case):
    task, x, _ = case
    gated = keras_polar.apply(task, 0.3, gate="static")
    open_all(gated)
    wanted = task.predict(x, verbose=0)
    np.testing.assert_allclose(gated.predict(x, verbose=0), wanted, atol=1e-5)
    made = keras_polar.convert(gated, into=task)
    assert type(made) is type(task)
    assert made.count_params() == task.count_params()
    np.testing.assert_allclose(made.predict(x, verbose=0), wanted, atol=1e-5)


ALONE = """
import sys, numpy as np, keras_hub
raw = np.load(sys.argv[2], allow_pickle=True)
x = raw["x"].tolist() if raw["x"].dtype.kind in "UO" else raw["x"]
base = getattr(keras_hub.models, sys.argv[3])
found = base.from_preset(sys.argv[1]).predict(x, verbose=0)
np.testing.assert_allclose(found, raw["y"], atol=1e-6)
assert "keras_polar" not in sys.modules
"""


def test_from_raw_inputs_to_a_preset_and_back(case, tmp_path):
    task, x, y = case
    before = [w.copy() for w in task.get_weights()]
    gated = keras_polar.apply(task, 0.3)
    gated.compile("adam")  # loss and metrics are the task's
    history = gated.fit(x, y, batch_size=8, epochs=3, verbose=0, validation_data=(x, y)).history
    assert "val_sparse_categorical_accuracy" in history
    assert gated.settled
    made = keras_polar.convert(gated, into=task, verify=x[:4])
    assert all(map(np.array_equal, before, task.get_weights()))
    assert made.count_params() < 0.75 * task.count_params()
    assert made.preprocessor is task.preprocessor
    answers = gated.predict(x, verbose=0)
    np.testing.assert_allclose(made.predict(x, verbose=0), answers, atol=1e-5)
    scores = gated.evaluate(x, y, verbose=0, return_dict=True)
    assert scores["loss"] == pytest.approx(history["val_loss"][-1], rel=1e-5)
    assert made.evaluate(x, y, verbose=0) == pytest.approx(list(scores.values())[:2], rel=1e-5)
    made.save_to_preset(str(tmp_path / "preset"))
    np.savez(tmp_path / "raw.npz", x=np.array(x), y=answers)
    base = "ImageClassifier" if isinstance(task, M.ImageClassifier) else "TextClassifier"
    command = [sys.executable, "-c", ALONE, tmp_path / "preset", tmp_path / "raw.npz", base]
    subprocess.run([*map(str, command)], check=True)


def test_what_the_task_is_compiled_with_counts(case):
    task, x, y = case
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    task.compile("sgd", loss, metrics=["sparse_top_k_categorical_accuracy"])
    gated = keras_polar.apply(task, 0.3)
    gated.compile(loss="auto")
    assert isinstance(gated.optimizer, keras.optimizers.SGD)
    assert gated.optimizer is not task.optimizer
    found = gated.evaluate(x, y, verbose=0, return_dict=True)
    assert "sparse_top_k_categorical_accuracy" in found
    gated.compile("adam", "mse", metrics=["mae"])
    assert gated.loss == "mse"


@pytest.mark.parametrize("kind", ["dataset", "batches"])
def test_datasets_are_preprocessed(kind):
    from tensorflow import data

    (task, (x, y)) = text_classifier(), sentences()
    gated = keras_polar.apply(task, 0.3, gate="static")
    open_all(gated)
    gated.compile("sgd")
    batches = data.Dataset.from_tensor_slices((x, y)).batch(16)
    if kind == "batches":

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 3

            def __getitem__(self, i):
                return x[16 * i : 16 * (i + 1)], y[16 * i : 16 * (i + 1)]

        batches = Batches()
    found = gated.evaluate(batches, verbose=0)
    assert found == pytest.approx(task.evaluate(x, y, verbose=0), rel=1e-5)
    gated.fit(batches, epochs=1, shuffle=False, verbose=0)


def test_data_in_other_forms_are_preprocessed_as_well():
    task, (x, y) = text_classifier(), sentences(20)
    gated = keras_polar.apply(task, 0.3, gate="static")
    gated.settle()
    gated.compile()
    wanted = gated.evaluate(x, y, batch_size=8, verbose=0)
    for given in ((np.array(x), y.tolist()), (np.array(x, object), y)):
        assert gated.evaluate(*given, batch_size=8, verbose=0) == pytest.approx(wanted)
    with pytest.raises(TypeError, match=r"received generator.*preprocessor = None"):
        gated.predict(iter_of(x))


def iter_of(x):
    yield from x


def test_without_preprocessor_data_are_taken_as_they_are():
    task, (x, _) = text_classifier(), sentences()
    ready = {k: np.array(v) for k, v in task.preprocessor(x).items()}
    gated = keras_polar.apply(task, 0.3, gate="static")
    gated.settle()
    wanted = gated.predict(x, verbose=0)
    with pytest.warns(UserWarning, match=r"BertTextClassifierPreprocessor.*into=task"):
        small = keras_polar.convert(gated)
    np.testing.assert_allclose(small.predict(ready, verbose=0), wanted, atol=1e-5)
    task.preprocessor = None
    np.testing.assert_allclose(gated.predict(ready, verbose=0), wanted, atol=1e-5)
    keras_polar.convert(gated)  # says nothing


def test_a_loaded_model_goes_into_its_task(tmp_path):
    task, (x, _) = text_classifier(), sentences()
    gated = keras_polar.apply(task, 0.3, gate="static")
    gated.settle()
    gated.compile()
    gated.optimizer.build(gated.trainable_variables)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert loaded.compiled
    made = keras_polar.convert(loaded, into=text_classifier())
    np.testing.assert_allclose(made.predict(x, verbose=0), gated.predict(x, verbose=0), atol=1e-5)


def test_what_is_no_task_is_refused():
    gated = keras_polar.apply(text_classifier(), 0.3, gate="static")
    gated.settle()
    with pytest.raises(TypeError, match="expected into= as a task of KerasHub"):
        keras_polar.convert(gated, into=gated)
    with pytest.raises(
        ValueError, match=r"not built like into=ResNetImageClassifier.*GlobalAverage"
    ):
        keras_polar.convert(gated, into=image_classifier())


# Of each task, what loads its preset without this library; None where none can.
OTHERS = {
    "vit": (vit, "ImageClassifier"),
    "segmenter": (segmenter, "ImageSegmenter"),
    "albert": (
        lambda: M.AlbertTextClassifier(M.AlbertBackbone(embedding_dim=8, **TEXT), num_classes=2),
        "TextClassifier",
    ),
    "roberta": (lambda: M.RobertaTextClassifier(M.RobertaBackbone(**TEXT), num_classes=2), None),
    "distil_bert": (
        lambda: M.DistilBertTextClassifier(M.DistilBertBackbone(**TEXT), num_classes=2),
        None,
    ),
    "masked": (lambda: M.BertMaskedLM(M.BertBackbone(**TEXT)), None),
}


def fixed_inputs(task):
    """Random inputs, of length 8 where the task's are open."""
    rng, made = np.random.default_rng(0), {}
    for x in task.inputs:
        shape = [4, *(n or 8 for n in x.shape[1:])]
        whole = "int" in keras.backend.standardize_dtype(x.dtype)
        made[x.name] = rng.integers(0, 2, shape) if whole else rng.normal(size=shape)
    structure = task.input
    return made if isinstance(structure, dict) else next(iter(made.values()))


@pytest.mark.filterwarnings("ignore:apply. variable 'token_embedding/embeddings'")
@pytest.mark.parametrize("name", OTHERS)
def test_other_tasks(name, tmp_path):
    make, base = OTHERS[name]
    task = randomise(make())
    gated = keras_polar.apply(task, 0.2, gate="static")
    gated.settle()
    x = fixed_inputs(task)
    answers = gated.predict(x, verbose=0)
    made = keras_polar.convert(gated, into=task)
    assert type(made) is type(task)
    assert made.count_params() < 0.9 * task.count_params()
    np.testing.assert_allclose(made.predict(x, verbose=0), answers, atol=1e-5)
    made.save_to_preset(str(tmp_path / "preset"))
    loaded = type(task).from_preset(str(tmp_path / "preset"))
    np.testing.assert_allclose(loaded.predict(x, verbose=0), answers, atol=1e-5)
    made.save(tmp_path / "task.keras")
    loaded = keras.models.load_model(tmp_path / "task.keras", compile=False)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), answers, atol=1e-5)
    if base and not isinstance(x, dict):
        np.savez(tmp_path / "raw.npz", x=x, y=answers)
        command = [sys.executable, "-c", ALONE, tmp_path / "preset", tmp_path / "raw.npz", base]
        subprocess.run([*map(str, command)], check=True)


def test_tasks_that_generate_in_another_way_are_refused():
    class Paints(M.ResNetImageClassifier):
        def generate(self):
            """As tasks that make images do."""

    classifier = image_classifier()
    task = Paints(classifier.backbone, num_classes=3)
    gated = keras_polar.apply(task, 0.3, gate="static")
    gated.settle()
    with pytest.raises(TypeError, match=r"into=Paints .* generates by calling the layers"):
        keras_polar.convert(gated, into=task)


# --- object detectors -------------------------------------------------------------------------


def assert_same_boxes(found, wanted):
    assert found.keys() == wanted.keys() == {"boxes", "confidence", "labels", "num_detections"}
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4)


def test_a_detector_finds_and_learns_what_the_task_does():
    task, (x, y) = detector(), scenes()
    gated = keras_polar.apply(task, 0.3, gate="static")  # warns of nothing
    assert not {n for g in gated.groups for n in g.layers} & {"conv2d_0", "box_head_conv2d_0"}
    open_all(gated)
    task.compile("sgd")
    gated.compile("sgd")
    assert_same_boxes(gated.predict(x, verbose=0), task.predict(x, verbose=0))
    assert gated.evaluate(x, y, verbose=0) == pytest.approx(task.evaluate(x, y, verbose=0))


def test_a_pruned_detector_keeps_its_heads():
    task, (x, _) = detector(), scenes()
    gated = keras_polar.apply(task, 0.3, gate="static")
    gated.settle()
    answers = gated.predict(x, verbose=0)
    made = keras_polar.convert(gated, into=task)
    assert made.count_params() < 0.75 * task.count_params()
    assert made.box_head.conv_layers[0].filters == 256
    # The widths that they read are the backbone's.
    assert made.backbone.output["P3"].shape[-1] < 256
    assert_same_boxes(made.predict(x, verbose=0), answers)
    made.box_head.prediction_layer.bias.assign_add([1.0] * 36)  # is no part of the task's head
    assert_same_boxes(gated.predict(x, verbose=0), answers)


BOXES = """
import sys, numpy as np, keras_hub, keras_polar
raw = np.load(sys.argv[2])
task = keras_hub.models.ObjectDetector.from_preset(sys.argv[1])
for name, found in task.predict(raw["x"], verbose=0).items():
    np.testing.assert_allclose(found, raw[name], atol=1e-4)
"""


@pytest.mark.slow
def test_a_detector_from_raw_images_to_a_preset_and_back(tmp_path):
    task, (x, y) = detector(), scenes()
    gated = keras_polar.apply(task, 0.3)
    gated.compile("adam")
    history = gated.fit(x, y, batch_size=2, epochs=3, verbose=0, validation_data=(x, y)).history
    assert gated.settled
    made = keras_polar.convert(gated, into=task, verify=x)
    answers = gated.predict(x, verbose=0)
    assert_same_boxes(made.predict(x, verbose=0), answers)
    losses = made.evaluate(x, y, verbose=0)
    assert gated.evaluate(x, y, verbose=0) == pytest.approx(losses, rel=1e-5)
    assert history["val_loss"][-1] == pytest.approx(losses[0], rel=1e-2)  # by batches of others
    made.fit(x, y, batch_size=2, shuffle=False, verbose=0)
    answers = made.predict(x, verbose=0)
    made.save_to_preset(str(tmp_path / "preset"))
    np.savez(tmp_path / "raw.npz", x=x, **answers)
    command = [sys.executable, "-c", BOXES, tmp_path / "preset", tmp_path / "raw.npz"]
    subprocess.run([*map(str, command)], check=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # KerasHub's own
def test_a_detector_that_computes_its_loss_by_itself(tmp_path, monkeypatch):
    """Of many outputs of its backbone, tuples among them, D-FINE reads some."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    import hub_models

    monkeypatch.setattr(hub_models, "fixed", lambda backbone: backbone)
    converter = hub.layers.DFineImageConverter(image_size=(64, 64), scale=1 / 255.0)
    task = M.DFineObjectDetector(
        hub_models.BACKBONES["DFineBackbone"](),
        num_classes=4,
        bounding_box_format="xyxy",
        preprocessor=M.DFineObjectDetectorPreprocessor(converter),
    )
    task.compile("sgd")
    x, y = scenes(2)
    gated = keras_polar.apply(task, 0.2, gate="static")
    gated.compile("sgd")
    gated.settle()
    made = keras_polar.convert(gated, into=task)
    assert made.count_params() < 0.85 * task.count_params()
    made.compile("sgd")
    losses = [m.evaluate(x, y, verbose=0) for m in (gated, made)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    answers = gated.predict(x, verbose=0)
    assert_same_boxes(made.predict(x, verbose=0), answers)
    made.save_to_preset(str(tmp_path / "preset"))
    loaded = M.DFineObjectDetector.from_preset(str(tmp_path / "preset"))
    assert_same_boxes(loaded.predict(x, verbose=0), answers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # KerasHub's own
@pytest.mark.parametrize("name", hub_tasks.TASKS)
def test_from_raw_samples_to_answers_of_a_smaller_task_and_its_preset(name):
    keras.utils.set_random_seed(0)
    assert not task_row(hub_tasks.TASKS[name])["failure"]
