"""Tasks of KerasHub that write texts: strings in, a smaller task that writes out."""

import io
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import quick
from keras import ops

import keras_polar

hub = pytest.importorskip("keras_hub")
M = hub.models
TEXT = {"vocabulary_size": 50, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 24}
HEADS = {**TEXT, "num_heads": 2}
QUERIES = {**TEXT, "num_query_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "GPT2": {**HEADS, "max_sequence_length": 16},
    "OPT": {**HEADS, "max_sequence_length": 16},
    "Bloom": HEADS,
    "GPTNeoX": HEADS,
    "Falcon": {**TEXT, "num_attention_heads": 2},
    "Llama": QUERIES,
    "Llama3": QUERIES,
    "Mistral": QUERIES,
    "Phi3": QUERIES,
    "Qwen": QUERIES,
    "Qwen3": {**QUERIES, "head_dim": 8},
    "Gemma": {**QUERIES, "head_dim": 8},
}
OF_PIECES = ("Llama", "Mistral", "Phi3", "Gemma")  # of SentencePiece
LENGTH = 12
SENTENCES = ["the quick fox", "a lazy dog", "jumped over", "the brown hen.", "he", "an old hat"] * 4
SPECIAL = (
    "<|endoftext|> <s> <pad> </s> <unk> <mask> <|begin_of_text|> <|end_of_text|> "
    "<|start_header_id|> <|end_header_id|> <|eot_id|> <|im_end|>"
).split()
WORDS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz.", "Ġ", "Ġt", "he"]


def pieces():
    """The proto of a small SentencePiece model."""
    import sentencepiece

    made = io.BytesIO()
    tokens = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    pieces = {"pad_piece": "<pad>", "bos_piece": "<s>", "eos_piece": "</s>", "unk_piece": "<unk>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_writer=made,
        vocab_size=40,
        model_type="BPE",
        minloglevel=2,
        **tokens,
        **pieces,
    )
    return made.getvalue()


def tokenizer_of(name):
    kind = getattr(M, f"{name}Tokenizer")
    if name in OF_PIECES:
        return kind(proto=pieces())
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    return kind(vocabulary=vocabulary, merges=["Ġ t", "h e"])


def with_large_weights(task):
    """So that texts depend on all of them."""
    rng = np.random.default_rng(0)
    for weight in task.weights:
        if len(weight.shape) > 1:
            weight.assign(0.4 * rng.standard_normal(weight.shape))
    task.compile(sampler="greedy")
    return task


def task_of(name, **options):
    backbone = getattr(M, f"{name}Backbone")(**FAMILIES[name], **options)
    preprocessor = getattr(M, f"{name}CausalLMPreprocessor")(tokenizer_of(name), LENGTH)
    made = getattr(M, f"{name}CausalLM")(backbone=backbone, preprocessor=preprocessor)
    return with_large_weights(made)


def pruned(task, sparsity=0.1, **options):
    """In one shot."""
    gated = keras_polar.apply(task, sparsity, gate="static", importance="l1_norm", **options)
    gated.settle()
    return keras_polar.convert(gated, into=task)


def width(task):
    return task.backbone.get_config()["intermediate_dim"]


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


ALONE = """
import sys, numpy as np, keras_hub
task = getattr(keras_hub.models, sys.argv[2]).from_preset(sys.argv[1])
task.compile(sampler="greedy")
print(task.generate(["the q", "a"]))
assert "keras_polar" not in sys.modules
"""


def check_preset(task, base, folder):
    task.save_to_preset(str(folder))
    command = [sys.executable, "-c", ALONE, str(folder), base]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert found.splitlines()[-1] == str(task.generate(["the q", "a"]))


@pytest.mark.parametrize("name", quick(("GPT2",), FAMILIES))
def test_from_strings_to_texts_of_a_smaller_task(name, tmp_path):
    keras.utils.set_random_seed(0)
    task = task_of(name)
    before = [w.copy() for w in task.get_weights()]
    texts = task.generate(["the q", "a"])
    gated = keras_polar.apply(task, 0.1, round_to=4)
    (tied,) = gated.consensus.equal
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
    np.testing.assert_array_equal(
        written(made, ["the q", "a"]), written_step_by_step(made, ["the q", "a"])
    )
    check_preset(made, "CausalLM", tmp_path / "preset")


@pytest.mark.parametrize("name", quick(("GPT2",), FAMILIES))
def test_nothing_cut_writes_as_before(name):
    task = task_of(name)
    gated = keras_polar.apply(task, 0.1, gate="static")
    for group in gated.groups:
        group.set_mask(np.ones(group.units, bool))
    made = keras_polar.convert(gated, into=task)
    assert width(made) == width(task)
    assert made.generate(["the q", "a"]) == task.generate(["the q", "a"])


@pytest.mark.parametrize("name", quick(("GPT2",), FAMILIES))
def test_pruned_twice(name):
    task = task_of(name)
    once = pruned(task)
    twice = pruned(once)
    assert width(twice) < width(once) < width(task)
    np.testing.assert_array_equal(written(twice, ["he"]), written_step_by_step(twice, ["he"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2", "Llama3", "Qwen3", "Gemma"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_smaller_task_is_quantized_and_adapted_like_any(name, mode):
    made = pruned(task_of(name), round_to=2)
    made.backbone.enable_lora(2)
    made.compile("adam", sampler="greedy")
    made.fit(SENTENCES, batch_size=8, verbose=0)
    made = pruned(task_of(name), round_to=2)
    wanted = ops.convert_to_numpy(made(made.preprocessor(SENTENCES)[0], training=False))
    made.quantize(mode)
    found = ops.convert_to_numpy(made(made.preprocessor(SENTENCES)[0], training=False))
    assert np.abs(found - wanted).max() < (0.05 if mode == "int8" else 0.6) * np.abs(wanted).max()
    assert len(made.generate("he")) > 2
