"""Tasks of KerasHub from small configs, with a preprocessor and raw samples for each.

Random weights, nothing downloaded; `TASKS` maps names to what builds a task and what it is fed.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras_hub as hub
import numpy as np

M = hub.models

WORDS = ["the", "quick", "brown", "fox", "jumped", "over", "a", "lazy", "dog", "."]
VOCABULARY = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *WORDS]


def image_classifier():
    backbone = M.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    converter = hub.layers.ResNetImageConverter(image_size=(16, 16), scale=1 / 255.0)
    preprocessor = M.ResNetImageClassifierPreprocessor(image_converter=converter)
    return M.ResNetImageClassifier(backbone, num_classes=3, preprocessor=preprocessor)


def text_classifier(cls=M.BertTextClassifier):
    shape = {"vocabulary_size": len(VOCABULARY), "max_sequence_length": 8}
    backbone = M.BertBackbone(
        num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32, **shape
    )
    tokenizer = M.BertTokenizer(vocabulary=VOCABULARY)
    preprocessor = M.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    return cls(backbone, num_classes=2, preprocessor=preprocessor)


def images(count=48):
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (count, 20, 20, 3)).astype("float32"), rng.integers(0, 3, count)


def sentences(count=48):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 4)) for _ in range(count)], rng.integers(0, 2, count)


TEXT = {"vocabulary_size": 40, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32}
TEXT |= {"max_sequence_length": 8, "num_heads": 2}


def vit():
    shape = {"image_shape": (16, 16, 3), "patch_size": 4, "num_layers": 2, "num_heads": 2}
    return M.ViTImageClassifier(M.ViTBackbone(hidden_dim=16, mlp_dim=32, **shape), num_classes=3)


def encoder(block_type):
    return M.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 64, 64],
        stackwise_num_blocks=[1, 1, 1],
        stackwise_num_strides=[1, 2, 2],
        block_type=block_type,
        image_shape=(64, 64, 3),
    )


def segmenter():
    backbone = M.DeepLabV3Backbone(
        image_encoder=encoder("bottleneck_block"),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P4",
        dilation_rates=[6, 12],
        upsampling_size=4,
        projection_filters=8,
        image_shape=(64, 64, 3),
    )
    return M.DeepLabV3ImageSegmenter(backbone, num_classes=2)


def raw_segmenter():
    task = segmenter()
    converter = hub.layers.DeepLabV3ImageConverter(image_size=(64, 64), scale=1 / 255.0)
    task.preprocessor = M.DeepLabV3ImageSegmenterPreprocessor(converter)
    return task


def shapes(count=4):
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (count, 64, 64, 3)).astype("float32")
    return images, np.eye(2, dtype="float32")[rng.integers(0, 2, (count, 64, 64))]


def masked_lm():
    """All its words are masked, so that it is asked the same each time."""
    shape = {"vocabulary_size": len(VOCABULARY), "max_sequence_length": 8}
    rates = {"mask_selection_rate": 1.0, "mask_token_rate": 1.0, "random_token_rate": 0.0}
    preprocessor = M.BertMaskedLMPreprocessor(
        M.BertTokenizer(vocabulary=VOCABULARY), 8, mask_selection_length=4, **rates
    )
    return M.BertMaskedLM(M.BertBackbone(**{**TEXT, **shape}), preprocessor=preprocessor)


def detector():
    shape = (64, 64, 3)
    backbone = M.RetinaNetBackbone(
        encoder("basic_block"), min_level=3, max_level=4, use_p5=False, image_shape=shape
    )
    converter = hub.layers.RetinaNetImageConverter(image_size=shape[:2], scale=1 / 255.0)
    return M.RetinaNetObjectDetector(
        backbone,
        num_classes=3,
        bounding_box_format="xyxy",
        pre_logits_num_conv_layers=1,
        preprocessor=M.RetinaNetObjectDetectorPreprocessor(converter),
    )


def scenes(count=4):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 40, (count, 2, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 40, (count, 2, 2))], -1)
    targets = {"boxes": boxes.astype("float32"), "labels": rng.integers(0, 3, (count, 2))}
    return rng.uniform(0, 255, (count, 80, 80, 3)).astype("float32"), targets


WRITES = {"vocabulary_size": 50, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 24}
HEADS = {**WRITES, "num_heads": 2}
QUERIES = {**WRITES, "num_query_heads": 4, "num_key_value_heads": 2}


FAMILIES = {
    "GPT2": {**HEADS, "max_sequence_length": 16},
    "OPT": {**HEADS, "max_sequence_length": 16},
    "Bloom": HEADS,
    "GPTNeoX": HEADS,
    "Falcon": {**WRITES, "num_attention_heads": 2},
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
TOKENS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz.", "Ġ", "Ġt", "he"]


def pieces(start="<s>", end="</s>"):
    """The proto of a small SentencePiece model."""
    import sentencepiece

    made = io.BytesIO()
    tokens = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    names = {"pad_piece": "<pad>", "bos_piece": start, "eos_piece": end, "unk_piece": "<unk>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_writer=made,
        vocab_size=40,
        control_symbols=["<|endoftext|>"],
        model_type="BPE",
        minloglevel=2,
        **tokens,
        **names,
    )
    return made.getvalue()


def tokenizer_of(name):
    kind = getattr(M, f"{name}Tokenizer")
    if name in OF_PIECES:
        return kind(proto=pieces(*["<bos>", "<eos>"] if name == "Gemma" else []))
    vocabulary = {word: i for i, word in enumerate(TOKENS)}
    return kind(vocabulary=vocabulary, merges=["Ġ t", "h e"])


def with_large_weights(task):
    """So that texts depend on all of them."""
    rng = np.random.default_rng(0)
    for weight in task.weights:
        if len(weight.shape) > 1:
            weight.assign(0.4 * rng.standard_normal(weight.shape))
    task.compile(sampler="greedy")
    return task


def writer(name, **options):
    tokenizer = tokenizer_of(name)
    config = {**FAMILIES[name], "vocabulary_size": tokenizer.vocabulary_size()}
    backbone = getattr(M, f"{name}Backbone")(**config, **options)
    preprocessor = getattr(M, f"{name}CausalLMPreprocessor")(tokenizer, LENGTH)
    made = getattr(M, f"{name}CausalLM")(backbone=backbone, preprocessor=preprocessor)
    return with_large_weights(made)


LENGTHS = {"encoder_sequence_length": 10, "decoder_sequence_length": 8}
AUDIO = 3000  # samples of a recording
SPOKEN = {"decoder_sequence_length": 8}
HEARD = {"encoder_input_values": (AUDIO, 1), "encoder_padding_mask": (AUDIO,)}
HEARD |= dict.fromkeys(("decoder_token_ids", "decoder_padding_mask"), (*SPOKEN.values(),))


def translator():
    backbone = M.BartBackbone(**HEADS, max_sequence_length=16)
    preprocessor = M.BartSeq2SeqLMPreprocessor(tokenizer_of("Bart"), **LENGTHS)
    return with_large_weights(M.BartSeq2SeqLM(backbone, preprocessor=preprocessor))


def corrector():
    tokenizer = M.T5Tokenizer(proto=pieces())
    config = {**HEADS, "vocabulary_size": tokenizer.vocabulary_size(), "key_value_dim": 8}
    preprocessor = M.T5Seq2SeqLMPreprocessor(tokenizer, **LENGTHS)
    return with_large_weights(M.T5Seq2SeqLM(M.T5Backbone(**config), preprocessor=preprocessor))


def listener():
    layers = {"encoder_num_layers": 2, "decoder_num_layers": 2}
    heads = {"encoder_num_heads": 2, "decoder_num_heads": 2}
    tokenizer = M.MoonshineTokenizer(proto=pieces())
    sizes = {"vocabulary_size": tokenizer.vocabulary_size(), "hidden_dim": 16, "filter_dim": 16}
    backbone = M.MoonshineBackbone(**layers, **heads, **sizes, intermediate_dim=24)
    preprocessor = M.MoonshineAudioToTextPreprocessor(
        hub.layers.MoonshineAudioConverter(), tokenizer, **SPOKEN
    )
    return with_large_weights(M.MoonshineAudioToText(backbone, preprocessor=preprocessor))


def recordings(count=24):
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((count, AUDIO)).astype("float32")
    return ({"audio": audio, "text": SENTENCES[:count]},)


@dataclass(frozen=True)
class Case:
    """A task, and what is given to it.

    Attributes:
        make: builds it.
        data: arguments of `fit`.
        asked: what is answered; the inputs of `data` if None.
        texts: whether by `generate`, instead of `predict`.
        loaded: attributes of the preprocessor that presets of KerasHub do not hold.
        options: of `apply`.
        given: to `from_preset`, which fails without it for any task of the class.
    """

    make: Callable[[], Any]
    data: Callable[[], tuple]
    asked: Any = None
    texts: bool = False
    loaded: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    given: dict = field(default_factory=dict)

    def answers(self, task: Any) -> Any:
        """What a task says."""
        return said(task, self.questions, self.texts)

    @property
    def questions(self) -> Any:
        return self.data()[0] if self.asked is None else self.asked


def said(task: Any, asked: Any, texts: bool) -> Any:
    """What a task answers, by `generate` or by `predict`."""
    return task.generate(asked) if texts else task.predict(asked, verbose=0)


PROMPTS = ["the q", "a"]


def _writes(name: str) -> Case:
    return Case(lambda: writer(name), lambda: (SENTENCES,), PROMPTS, texts=True)


def _pairs() -> tuple:
    return ({"encoder_text": SENTENCES, "decoder_text": SENTENCES[::-1]},)


TASKS = {
    "ResNetImageClassifier": Case(image_classifier, images),
    "BertTextClassifier": Case(text_classifier, sentences),
    "BertMaskedLM": Case(masked_lm, lambda: sentences()[:1]),
    "DeepLabV3ImageSegmenter": Case(raw_segmenter, shapes),
    "RetinaNetObjectDetector": Case(detector, scenes),
    **{f"{name}CausalLM": _writes(name) for name in FAMILIES},
    "BartSeq2SeqLM": Case(translator, _pairs, PROMPTS, texts=True, loaded=LENGTHS),
    "T5Seq2SeqLM": Case(corrector, _pairs, PROMPTS, texts=True, loaded=LENGTHS),
    "MoonshineAudioToText": Case(
        listener,
        recordings,
        {"audio": recordings(2)[0]["audio"]},
        texts=True,
        loaded=SPOKEN,
        options={"input_shape": HEARD},
        given={"dtype": "float32"},
    ),
}
