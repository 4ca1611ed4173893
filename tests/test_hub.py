"""KerasHub backbones, built from small configs, hold the certificate."""

import sys
from pathlib import Path

import pytest
from helpers import check, randomise

import keras_polar

pytest.importorskip("keras_hub")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
from hub_models import BACKBONES

QUICK = ("BertBackbone", "LlamaBackbone", "EfficientNetBackbone", "ViTBackbone")
# Why nothing in them can be pruned, or what Keras cannot do with them.
NOTHING: dict[str, str] = {}


@pytest.mark.filterwarnings("ignore")  # KerasHub's own
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BACKBONES]
)
def test_backbone_holds_the_certificate(name):
    model = randomise(BACKBONES[name]())
    if name in NOTHING:
        with pytest.raises((TypeError, ValueError), match=NOTHING[name]):
            keras_polar.apply(model, 0.01, measure="units")
    else:
        check(model)
