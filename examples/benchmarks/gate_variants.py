"""Other gates than the library's: does the straight-through slope or the initial logit matter?

    python examples/benchmarks/gate_variants.py --data_dir=FOLDER --variant=clipped

Static gates, half of the multiply-accumulates of ResNet-20, 16x16 pixels, 12 epochs, widths not
rounded, accuracy on training images held out; any flag of compare.py changes that.

Variants:
  sigmoid   the library's: the slope of a sigmoid, an initial logit of 2
  identity  a slope of 1/4 everywhere, that of the sigmoid at 0
  clipped   a slope of 1/4 for logits between -2 and 2, none beyond
  open1     an initial logit of 1
  open4     an initial logit of 4
"""

import functools
from pathlib import Path

import compare
from absl import app, flags
from keras import ops

from keras_polar import gates

_VARIANT = flags.DEFINE_enum(
    "variant", "sigmoid", ("sigmoid", "identity", "clipped", "open1", "open4"), "What to try."
)
PROTOCOL = {
    "image_size": 16,
    "measure": "macs",
    "methods": ["static"],
    "round_to": 1,
    "evaluate_on": "held_out",
    "seeds": ["0"],
}
SLOPES = {
    "identity": lambda logits: logits / 4,
    "clipped": lambda logits: ops.clip(logits / 4 + 0.5, 0.0, 1.0),
}


def use(variant):
    """Changes the library's gates for the rest of the process."""
    if variant in SLOPES:
        gates.hard_step = functools.partial(gates.hard_step, soft_of=SLOPES[variant])
    elif variant.startswith("open"):
        gates.OPEN = float(variant.removeprefix("open"))


def main(argv):
    """Entry point of absl."""
    folder = Path(__file__).parent / "results" / "gates" / _VARIANT.value
    for name, value in {**PROTOCOL, "results_dir": str(folder)}.items():
        flags.FLAGS.set_default(name, value)
    use(_VARIANT.value)
    compare.main(argv)


if __name__ == "__main__":
    app.run(main)
