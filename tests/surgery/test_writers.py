"""Tasks of KerasHub that write texts: strings in, a smaller task that writes out."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import quick
from keras import ops

import keras_polar

pytest.importorskip("keras_hub")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import keras_hub as hub
from hub_tasks import (
    FAMILIES,
    LENGTH,
    LENGTHS,
    QUERIES,
    SENTENCES,
    TASKS,
    translator,
    writer,
)

M = hub.models


def pruned(task, sparsity=0.1, **options):
    """In one shot."""
    gated = keras_polar.apply(task, sparsity, gate="static", importance="l1_norm", **options)
    gated.settle()
    return keras_polar.convert(gated, into=task)


def width(task):
    return task.backbone.get_config()["intermediate_dim"]


# Of the whole task as well: with its caches, what KerasHub's GPT-NeoX writes is another text.
FORGETS = ("GPTNeoX",)


def written_step_by_step(task, prompts):
    """What the whole network writes, without caches: the likeliest word, time and again."""
    given = task.preprocessor.generate_preprocess(prompts)
    ids = ops.convert_to_numpy(given["token_ids"]).copy()
    mask = ops.convert_to_numpy(given["padding_mask"]).astype(bool)
    for place in range(mask.sum(axis=1).min(), ids.shape[1]):
        seen = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        logits = ops.convert_to_numpy(task(seen, training=False))
        ids[:, place] = np.where(mask[:, place], ids[:, place], logits[:, place - 1].argmax(-1))
    return ids


def written(task, prompts):
    given = task.preprocessor.generate_preprocess(prompts)
    found = task.make_generate_function()(given, stop_token_ids=None)
    return ops.convert_to_numpy(found["token_ids"])


def is_written_alike(task):
    prompts = ["the q", "a"]
    return np.array_equal(written(task, prompts), written_step_by_step(task, prompts))


ALONE = """
import json, sys, keras_hub
task = getattr(keras_hub.models, sys.argv[2]).from_preset(sys.argv[1])
for name, length in json.loads(sys.argv[3]).items():
    setattr(task.preprocessor, name, length)
task.compile(sampler="greedy")
print(task.generate(["the q", "a"]))
assert "keras_polar" not in sys.modules
"""


def check_preset(task, base, folder, **lengths):
    """A new process writes the same; presets of pairs of texts do not hold their `lengths`."""
    task.save_to_preset(str(folder))
    command = [sys.executable, "-c", ALONE, str(folder), base, json.dumps(lengths)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert found.splitlines()[-1] == str(task.generate(["the q", "a"]))


@pytest.mark.parametrize("name", quick(("GPT2",), FAMILIES))
def test_from_strings_to_texts_of_a_smaller_task(name, tmp_path):
    keras.utils.set_random_seed(0)
    task = writer(name)
    before = [w.copy() for w in task.get_weights()]
    texts = task.generate(["the q", "a"])
    gated = keras_polar.apply(task, 0.1, round_to=4)
    tied = [name for names in gated.consensus.equal for name in names]
    assert {*tied} == {g.name for g in gated.groups}
    gated.compile("adam")  # the loss is the task's
    history = gated.fit(SENTENCES, batch_size=8, epochs=3, verbose=0).history
    assert "sparse_categorical_accuracy" in history
    made = keras_polar.convert(gated, into=task, verify=True)
    assert type(made) is type(task)
    assert type(made.backbone) is type(task.backbone)
    assert all(map(np.array_equal, before, task.get_weights()))
    assert task.generate(["the q", "a"]) == texts
    assert width(made) < width(task)
    assert made.count_params() == round((1 - gated.sparsity) * task.count_params())
    assert isinstance(made.sampler, hub.samplers.GreedySampler)
    scores = gated.evaluate(SENTENCES, verbose=0, return_dict=True)
    found = made.evaluate(SENTENCES, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(scores["loss"], rel=1e-4)
    made.compile(sampler="greedy")
    assert is_written_alike(made) == (name not in FORGETS)
    check_preset(made, "CausalLM", tmp_path / "preset")


@pytest.mark.parametrize("name", quick(("GPT2",), FAMILIES))
def test_nothing_cut_writes_as_before(name):
    task = writer(name)
    gated = keras_polar.apply(task, 0.1, gate="static")
    for group in gated.groups:
        group.set_mask(np.ones(group.units, bool))
    made = keras_polar.convert(gated, into=task)
    assert width(made) == width(task)
    assert made.generate(["the q", "a"]) == task.generate(["the q", "a"])


@pytest.mark.parametrize("name", quick(("GPT2",), FAMILIES))
def test_pruned_twice(name):
    task = writer(name)
    once = pruned(task)
    twice = pruned(once)
    assert width(twice) < width(once) < width(task)
    assert is_written_alike(twice) == (name not in FORGETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keys"), [("Qwen3", 4), ("Gemma", 4), ("Mistral", 4), ("Gemma", 1)]
)
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_heads_go_where_a_config_gives_their_width(name, keys, monkeypatch):
    heads = {"head_dim": 8, "num_query_heads": 8, "num_key_value_heads": keys}
    monkeypatch.setitem(FAMILIES, name, {**QUERIES, **heads})
    task = writer(name)
    made = pruned(task, 0.5, max_sparsity=1.0)
    config = made.backbone.get_config()
    assert config["num_query_heads"] < 8
    if keys > 1:
        assert config["num_query_heads"] == 2 * config["num_key_value_heads"]
    assert config["intermediate_dim"] < 24
    assert made.count_params() == pytest.approx(0.5 * task.count_params(), rel=0.05)
    assert is_written_alike(made)
    made.quantize("int8")
    assert written(made, ["he"]).shape == (1, LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2", "Llama3", "Qwen3", "Gemma"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_the_smaller_task_is_quantized_and_adapted_like_any(name, mode):
    made = pruned(writer(name), round_to=2)
    made.backbone.enable_lora(2)
    made.compile("adam", sampler="greedy")
    made.fit(SENTENCES, batch_size=8, verbose=0)
    made = pruned(writer(name), round_to=2)
    other = type(made)(type(made.backbone).from_config(made.backbone.get_config()))
    other.set_weights(made.get_weights())
    x = made.preprocessor(SENTENCES)[0]  # builds its tokenizer, as `quantize` wants it
    for task in (made, other):
        task.quantize(mode)
    found = [task(x, training=False) for task in (made, other)]
    np.testing.assert_allclose(*map(ops.convert_to_numpy, found), atol=1e-4)
    assert written(made, ["he"]).shape == (1, LENGTH)


# --- what is pruned, and what is not -------------------------------------------------------------


def test_what_a_config_cannot_say_is_kept_and_said():
    rows = {row.name: row for row in keras_polar.inspect(writer("GPT2")).rows}
    assert rows["feedforward_intermediate_dense"].prunable == 24
    assert rows["token_embedding"].reason == "GPT2Backbone has no setting for it"
    assert "no setting for it alone: num_heads" in rows["query"].reason
    assert not keras_polar.inspect(writer("GPT2")).branches


def test_a_layer_that_is_ignored_keeps_all_layers_as_they_are():
    with pytest.raises(ValueError, match=r"nothing in model.*no setting for it alone: intermedi"):
        keras_polar.apply(writer("GPT2"), 0.1, ignore="*layer_1*intermediate*")


def test_whole_layers_stay():
    with pytest.raises(ValueError, match=r"granularity='channels' for GPT2CausalLM .*same parts"):
        keras_polar.apply(writer("GPT2"), 0.1, granularity=("channels", "blocks"))


def test_the_length_has_to_be_known():
    task = writer("GPT2")
    task.preprocessor = None
    with pytest.raises(ValueError, match=r"GPT2CausalLM.*nobody knows.*input_shape=\(128,\)"):
        keras_polar.apply(task, 0.1)
    with pytest.raises(ValueError, match=r"nobody knows.*input_shape=\(8, 8\)"):
        keras_polar.apply(task, 0.1, input_shape=(8, 8))
    for shape in (8, (8,), {"token_ids": (8,), "padding_mask": (8,)}):
        made = pruned(task, input_shape=shape)
        assert width(made) < width(task)
    ids = np.ones((2, 8), int)
    given = {"token_ids": ids, "padding_mask": np.arange(8) < 3 * ids}
    assert made.generate(given, stop_token_ids=None)["token_ids"].shape == (2, 8)


def test_gates_that_are_not_settled_are_not_put_together():
    task = writer("GPT2")
    gated = keras_polar.apply(task, 0.1, gate="static")
    gated.groups[0].set_mask(np.arange(24) < 20)
    with (
        pytest.warns(UserWarning, match="not settled"),
        pytest.raises(ValueError, match=r"no GPT2Backbone of smaller sizes has .*gated\.settle"),
    ):
        keras_polar.convert(gated, into=task)


def test_another_task_is_refused():
    gated = keras_polar.apply(writer("GPT2"), 0.1, gate="static")
    gated.settle()
    with pytest.raises(ValueError, match="not built like into=OPTCausalLM"):
        keras_polar.convert(gated, into=writer("OPT"))


def test_the_network_alone():
    task = writer("GPT2")
    gated = keras_polar.apply(task, 0.1, gate="static")
    gated.settle()
    with pytest.warns(UserWarning, match=r"GPT2CausalLMPreprocessor.*into=task"):
        small = keras_polar.convert(gated)
    wanted = keras_polar.convert(gated, into=task)
    x = task.preprocessor(SENTENCES)[0]
    answers = small.predict(x, verbose=0)
    for model in (gated, wanted):
        np.testing.assert_allclose(model.predict(SENTENCES, verbose=0), answers, atol=1e-4)


def test_a_loaded_model_goes_into_its_task(tmp_path):
    task = writer("GPT2")
    gated = keras_polar.apply(task, 0.1, gate="static")
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    loaded.settle()
    made = keras_polar.convert(loaded, into=writer("GPT2"))
    assert width(made) < 24
    assert made.generate("he").startswith("he")


def test_adapters_of_low_rank_are_cut_along():
    task = writer("GPT2")
    task.backbone.enable_lora(2)
    gated = keras_polar.apply(task, 0.1, gate="static")
    gated.compile("adam")
    gated.fit(SENTENCES, batch_size=8, verbose=0)
    made = keras_polar.convert(gated, into=task)
    assert len(made.trainable_weights) == len(task.trainable_weights)
    answers = gated.predict(SENTENCES, verbose=0)
    np.testing.assert_allclose(made.predict(SENTENCES, verbose=0), answers, atol=1e-4)
    assert width(made) < width(task)


def test_a_frozen_task_in_half_precision_stays_so():
    task = writer("GPT2", dtype="mixed_bfloat16")
    task.backbone.get_layer("transformer_layer_0").trainable = False
    made = pruned(task)
    assert made.backbone.dtype_policy.name == "mixed_bfloat16"
    layers = zip(task.backbone.layers, made.backbone.layers, strict=True)
    for own, new in layers:
        assert own.dtype_policy.name == new.dtype_policy.name
    assert not made.backbone.get_layer("transformer_layer_0").trainable
    assert made.backbone.get_layer("transformer_layer_1").trainable


def test_the_task_itself_teaches():
    task = writer("GPT2")
    gated = keras_polar.apply(task, 0.1, gate="static", teacher=task)
    gated.compile("adam")
    gated.fit(SENTENCES, batch_size=8, verbose=0)
    made = keras_polar.convert(gated, into=task)
    assert width(made) < width(task)


# --- two texts ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_pairs_of_texts_to_texts(tmp_path):
    task = translator()
    pairs = {"encoder_text": SENTENCES, "decoder_text": SENTENCES[::-1]}
    gated = keras_polar.apply(task, 0.1)
    gated.compile("adam")
    gated.fit(pairs, batch_size=8, epochs=2, verbose=0)
    made = keras_polar.convert(gated, into=task)
    assert width(made) < width(task)
    again = pruned(made)
    assert width(again) < width(made)
    for model in (made, again):
        model.compile(sampler="greedy")
        given = model.preprocessor.generate_preprocess(["the q", "a"])
        ids = {k: ops.convert_to_numpy(v).copy() for k, v in given.items()}
        mask = ids.pop("decoder_padding_mask").astype(bool)
        for place in range(mask.sum(axis=1).min(), mask.shape[1]):
            logits = model({**ids, "decoder_padding_mask": np.ones_like(mask)}, training=False)
            best = ops.convert_to_numpy(logits)[:, place - 1].argmax(-1)
            ids["decoder_token_ids"][:, place] = np.where(
                mask[:, place], ids["decoder_token_ids"][:, place], best
            )
        found = model.make_generate_function()(given, stop_token_ids=None)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(found["decoder_token_ids"]), ids["decoder_token_ids"]
        )
    check_preset(made, "Seq2SeqLM", tmp_path / "preset", **LENGTHS)


def with_experts():
    heads = {"num_query_heads": 4, "num_key_value_heads": 2, "num_experts": 2, "top_k": 1}
    sizes = {"vocabulary_size": 50, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 24}
    return M.MixtralCausalLM(M.MixtralBackbone(**heads, **sizes))


@pytest.mark.slow
def test_what_cannot_be_opened_says_why():
    with pytest.raises(ValueError, match=r"nothing in model .* composite layer that cannot be ope"):
        keras_polar.apply(with_experts(), 0.1, input_shape=(8,))


@pytest.mark.slow
def test_widths_that_a_config_gives_as_a_factor_are_multiples_of_it():
    """Moonshine's are 4 times `hidden_dim`: 48 units stay, or 32, or 16."""
    case = TASKS["MoonshineAudioToText"]
    task = case.make()
    gated = keras_polar.apply(task, 0.15, **case.options)
    assert {group.units for group in gated.groups} == {64}
    gated.settle()
    assert {int(group.mask.sum()) for group in gated.groups} == {48}
    made = keras_polar.convert(gated, into=task)
    assert made.backbone.feedforward_expansion_factor == 3
