"""The steps of the random models reach every rule, in both data formats, and every one holds."""

import keras
import pytest
from certify import certify_model
from keras import layers
from random_models import ALL_STEPS, SIZE, SLOW, TABLES, side_by_side
from random_steps import STEPS

from keras_polar.coupling.coupling import why_fixed
from keras_polar.graph.keras_private import op_class
from keras_polar.graph.trace import trace
from keras_polar.rules.registry import _REGISTRY, opens
from keras_polar.rules.unprunable import PINNED

# Keras says so where one unit is left.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*You are using a softmax over axis:UserWarning"
)
_OF_GRAPHS = "joins samples: tests of graph networks"
NEVER_DRAWN = {
    **{op_class(f"Segment{kind}"): _OF_GRAPHS for kind in ("Max", "Min", "Prod", "Sum")},
    layers.Layer: "stands for all layers without a rule, of which the steps have some",
    op_class("BroadcastTo"): "needs a batch of known size",
}
LAST_ONLY = {layers.RandomCrop: "Keras 3.15 leaves channels-first images uncropped in inference"}

# Steps that keep the units in front of them even where they work along positions.
STAY = {
    "ArraySplit": "parts of a fixed size",
    "Masking": "masks by the values of all units",
    "TakeAlongAxis": "takes units from computed places",
    "Trapezoid": "is a statistic between units",
    "user's layer that keeps its units": "a logarithm of a sum over the units",
}
CHUNK = 10


def every_step(rank, width):
    """A model of every step that fits the rank, all on the same tensors."""
    inputs = keras.Input((*[SIZE] * (rank - 1), 3))
    x, y = layers.Dense(6)(inputs), layers.Dense(5)(inputs)
    fitting = [step for ranks, step in ALL_STEPS.values() if rank in ranks]
    return keras.Model(inputs, [step(x, y, width) for step in fitting])


@pytest.fixture(scope="module")
def formats():
    """Class -> the data formats in which the steps call it, None if it has none."""
    found = {}
    for rank, width in ((1, 2), (2, 3), (3, 4), (4, 5)):
        for call in trace(every_step(rank, width), opens).calls:
            found.setdefault(type(call.op), set()).add(getattr(call.op, "data_format", None))
    return found


def test_every_class_with_a_rule_is_in_a_step(formats):
    of_keras = {c for c in _REGISTRY if c.__module__.startswith("keras.")}  # other tests add theirs
    assert of_keras - formats.keys() - PINNED.keys() == NEVER_DRAWN.keys()


def test_every_class_with_a_data_format_is_in_a_step_with_channels_first(formats):
    last_only = {c for c, found in formats.items() if found == {"channels_last"}}
    assert last_only == LAST_ONLY.keys()


def chunks(table):
    """`(rank, names)` of steps that are tried out together, most of them on sequences."""
    ranks = {name: 2 if 2 in fitting else fitting[0] for name, (fitting, _) in table.items()}
    for rank in sorted(set(ranks.values())):
        names = [name for name, r in ranks.items() if r == rank]
        yield from ((rank, names[i : i + CHUNK]) for i in range(0, len(names), CHUNK))


def certify_steps(rank, names):
    coupling = certify_model(side_by_side(rank, names))
    for name, vector in coupling.produced().items():
        if name.startswith("before "):
            step, why = name.removeprefix("before "), why_fixed(coupling, vector)
            assert bool(why) == (step in STAY), f"{step}: {why}"


CHUNKS = {
    f"{name}-{i}": chunk
    for name, table in {"common": STEPS, **TABLES}.items()
    for i, chunk in enumerate(chunks(table))
}


# The rules of these have nothing to tell one operation from another.
ALIKE = ("unary", "binary")


@pytest.mark.parametrize(
    "chunk",
    [pytest.param(c, marks=[pytest.mark.slow] * c.startswith(ALIKE)) for c in CHUNKS],
)
def test_steps_keep_the_certificate_and_units_in_front_of_them_go(chunk):
    certify_steps(*CHUNKS[chunk])


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "names"), [*chunks(SLOW)])
def test_slow_steps_keep_the_certificate(rank, names):
    certify_steps(rank, names)
