"""KerasHub backbones, built from small configs, hold the certificate."""

import re
import sys
from pathlib import Path

import keras
import pytest
from helpers import check, randomise

import keras_polar
from keras_polar.surgery.certificate import random_inputs

pytest.importorskip("keras_hub")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
from hub_models import BACKBONES, fixed

QUICK = ("BertBackbone", "LlamaBackbone", "EfficientNetBackbone", "ViTBackbone")
# Without a prunable unit, and why; a backbone that gains one is checked like all the others.
NOTHING = {
    "GemmaBackbone": "no rule for this operation",
    "Gemma3Backbone": "no rule for this operation",
    "Gemma3nBackbone": "cannot be opened",
    "Gemma4Backbone": "uses its own variable .*ffw_gating/kernel",
    "GptOssBackbone": "uses its own variable .*sinks",
    "MixtralBackbone": "adds a loss in its call",
    "MobileNetV5Backbone": "traced|normalises over the units",
    "Qwen3MoeBackbone": "adds a loss in its call",
    "Qwen3_5MoeBackbone": "adds a loss in its call",
    "QwenMoeBackbone": "adds a loss in its call",
    "RWKV7Backbone": "uses its own variable .*time_mix_k",
    "XLNetBackbone": "cannot be opened",
}


# A sampler whose inputs random numbers do not fit.
FAILS = ("StableDiffusion3Backbone",)


def marks(name):
    fails = pytest.mark.xfail(raises=Exception, strict=True)
    return [pytest.mark.slow] * (name not in QUICK) + [fails] * (name in FAILS)


SIZES = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16}
TEXT = {**SIZES, "intermediate_dim": 24, "vocabulary_size": 17, "max_sequence_length": 10}
WITH_STREAMS = {
    "BertBackbone": TEXT,
    "GPT2Backbone": TEXT,
    "ViTBackbone": {**SIZES, "mlp_dim": 24, "patch_size": 4, "image_shape": (20, 20, 3)},
    "LlamaBackbone": {
        **{k: v for k, v in TEXT.items() if k not in ("num_heads", "max_sequence_length")},
        "num_query_heads": 2,
        "num_key_value_heads": 1,
    },
}


@pytest.mark.filterwarnings("ignore")  # KerasHub's own
@pytest.mark.parametrize("name", WITH_STREAMS)
def test_nine_tenths_of_a_transformer_can_go_its_stream_included(name):
    import keras_hub

    model = fixed(getattr(keras_hub.models, name)(**WITH_STREAMS[name]))
    features = model.output
    features = features["sequence_output"] if isinstance(features, dict) else features
    model = randomise(keras.Model(model.input, keras.layers.Dense(3, name="head")(features)))
    assert keras_polar.inspect(model).prunable > 0.9
    _, small = check(model, gate="dynamic", inputs=random_inputs(model, batch=2))
    assert small.get_layer("head").kernel.shape == (8, 3)


@pytest.mark.filterwarnings("ignore")  # KerasHub's own
@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in BACKBONES])
def test_backbone_holds_the_certificate(name):
    model = randomise(BACKBONES[name]())
    found = keras_polar.inspect(model)
    if name in NOTHING and not found.prunable:
        assert re.search(NOTHING[name], " ".join(r.reason for r in found.rows))
    else:
        check(model, inputs=random_inputs(model, batch=2))  # the batch that SAM3 is built for


@pytest.mark.filterwarnings("ignore")  # KerasHub's own
def test_a_head_that_holds_the_embedding_of_its_backbone():
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=400,
        num_layers=1,
        hidden_dim=16,
        intermediate_dim=32,
        num_heads=2,
        max_sequence_length=8,
    )
    task = keras_hub.models.BertMaskedLM(backbone=backbone)
    used = task.count_params() - backbone.get_layer("pooled_dense").count_params()
    assert keras_polar.cost(task).weights == used
    gated = keras_polar.apply(task, 0.12)
    gated.settle()
    small = keras_polar.convert(gated)
    assert small.count_params() == round((1 - gated.sparsity) * used)
