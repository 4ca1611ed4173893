"""Random graphs with random masks keep the certificate; the coupling agrees with an oracle."""

import os
import time

import keras
import numpy as np
import pytest
from certify import certify
from helpers import randomise
from hypothesis import HealthCheck, Phase, given, settings
from keras import layers, tree
from random_models import build, programs, seeded_program

from keras_polar.coupling.coupling import couple
from keras_polar.graph.ir import fill, refs_in
from keras_polar.graph.keras_private import op_class
from keras_polar.graph.trace import trace
from keras_polar.rules import trace_model
from keras_polar.rules.registry import _REGISTRY, find
from keras_polar.surgery.certificate import random_inputs

# Keras says so of a Flatten behind a Masking, and of a softmax where one unit is left.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not support masking:UserWarning",
    "ignore:(?s).*You are using a softmax over axis:UserWarning",
)
SEEDS = int(os.environ.get("FUZZ_SEEDS", "100"))  # of the quick tests; twenty times as many in all
CHUNK = 10
# Hypothesis shrinks a failure for minutes: only where somebody asks for it and waits.
SHRINK = [Phase.shrink] if "FUZZ_SHRINK" in os.environ else []
FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "15")),
    phases=[Phase.explicit, Phase.generate, *SHRINK],
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


def fails(program, seed):
    try:
        certify(program, seed)
    except Exception as error:
        return type(error)
    return None


def shortest(program, seed, seconds=60):
    """The program without the steps that its failure does not need."""
    kind, (rank, steps), end = fails(program, seed), program, time.monotonic() + seconds
    i = 0
    while i < len(steps) and time.monotonic() < end:
        shorter = steps[:i] + steps[i + 1 :]
        if shorter and fails((rank, shorter), seed) is kind:
            steps = shorter
        else:
            i += 1
    return rank, steps


def certify_or_explain(program, seed):
    try:
        return certify(program, seed)
    except Exception as error:
        error.add_note(f"seed {seed}: {program}\nshorter: {shortest(program, seed)}")
        raise


def certify_chunk(first):
    for seed in range(first, first + CHUNK):
        certify_or_explain(seeded_program(seed), seed)


def test_a_good_part_of_the_random_models_can_go():
    """The certificate says little about models that stay as they are."""
    shares = []
    for seed in range(60):
        keras.backend.clear_session(free_memory=False)
        coupling = couple(trace_model(build(seeded_program(seed))))
        units = np.concatenate(list(coupling.produced().values()))
        shares.append((coupling.group_of[units] >= 0).mean())
    assert np.mean(shares) > 0.25


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_random_models_keep_the_certificate(first):
    certify_chunk(first)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SEEDS, 20 * SEEDS, CHUNK))
def test_many_random_models_keep_the_certificate(first):
    certify_chunk(first)


@given(programs)
@FUZZ
def test_programs_of_hypothesis_keep_the_certificate(program):
    certify(program)


# Programs that once failed, each cut down to what its failure needed.
REGRESSIONS = {
    "fixed elements in a tensor of heads and channels: rectangles were sought without end": (
        2,
        [
            ("attention", 0, 3, 2),
            ("pad_units", 0, 0, 3),
            ("cumsum", 1, 0, 4),
            ("resizing", 1, 0, 5),
            ("stack", 6, 7, 6),
            ("dense", 5, 1, 4),
            ("sort", 2, 0, 2),
            ("multiply", 2, 0, 5),
        ],
    ),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_once_failed(name):
    certify(REGRESSIONS[name])


# --- the oracle: perturb a unit, see what it reaches -----------------------------------------


# Steps that read nothing: between two Dense layers a change is the unit itself.
ORACLE = (
    "activation batch_norm concat flip repeat take roll permute max_pool constants clip shuffle "
    "pad_units channels_first cumsum stack where multiply add squeeze depthwise halves split "
    "nested through_vector linear glu prelu resize group_norm maximum nested_functional "
    "Append Dsplit Dstack Fliplr GetItem Hsplit Hstack Moveaxis RepeatVector Rot90 Tile Unstack"
).split()


def run(graph, inputs, frozen=None, layer=None, shift=0.0):
    """Every tensor of a graph; with `frozen` values what reads units is unmoved, but for a layer.

    The output of that layer is shifted instead.
    """
    values = dict(zip(refs_in(graph.inputs), tree.flatten(inputs), strict=True))
    for call in graph.calls:
        if frozen is not None and hasattr(call.op, "kernel") and "Depthwise" not in str(call.op):
            found = [frozen[i] + (shift if call.op is layer else 0.0) for i in call.outputs]
        else:
            found = tree.flatten(call.op(*fill(call.args, values), **fill(call.kwargs, values)))
        values.update(zip(call.outputs, found, strict=True))
    return {i: keras.ops.convert_to_numpy(v) for i, v in values.items()}


def reached_by(graph, layer, units, frozen, size):
    """For every tensor which elements change with each unit: bool of shape (units, ...)."""
    found = {}
    for step in (-1.5, 0.7):  # so that no ReLU hides a unit from both
        rank = len(graph.specs[next(c for c in graph.calls if c.op is layer).outputs[0]].shape)
        shift = step * np.eye(units, dtype="float32").repeat(size, axis=0)
        shift = shift.reshape(units * size, *[1] * (rank - 2), units)
        many = {i: np.tile(v, (units, *[1] * (v.ndim - 1))) for i, v in frozen.items()}
        inputs = [many[i] for i in refs_in(graph.inputs)]
        for i, v in run(graph, inputs, many, layer, shift).items():
            distance = np.abs(v.astype("float32") - many[i].astype("float32"))
            # Round-off of sums in another order is no change: it grows with what is summed.
            noise = 1e-6 * np.maximum(1, np.abs(many[i]).max(initial=0))
            changed = distance.reshape(units, size, *v.shape[1:]).max(axis=1) > noise
            found[i] = changed | found.get(i, False)
    return found


READER = ("dense", 0, 0, 4)  # last: what the model returns is pinned


def oracle_program(seed):
    rng = np.random.default_rng(seed)
    rank, steps = seeded_program(seed)
    steps = [(str(rng.choice(ORACLE)), *numbers) for _, *numbers in steps[:7]]
    return rank, [*steps, READER]


def compare_with_oracle(program, seed=0):
    """Elements that change with a unit carry the id of its class; ids are of nothing else."""
    keras.backend.clear_session(free_memory=False)
    model = randomise(build(program), seed)
    graph = trace(model)
    coupling = couple(graph)
    frozen = run(graph, random_inputs(model, batch=6))
    makers = {s.name: s.op for s in coupling.sites if s.produces}
    reached = {
        n: reached_by(graph, makers[n], len(v), frozen, 6) for n, v in coupling.produced().items()
    }
    for site in coupling.sites:
        for index, ids in zip(site.call.outputs, site.outputs, strict=True):
            roots = np.where(ids >= 0, coupling.roots[ids], -1)[0]
            check_tensor(coupling, roots, {n: r[index] for n, r in reached.items()}, site.name)


def check_tensor(coupling, roots, reached, where):
    seen = {}
    for name, vector in coupling.produced().items():
        for unit, root in enumerate(coupling.roots[vector].tolist()):
            if root not in coupling.reasons:
                changed = reached[name][unit]
                message = f"unit {unit} of {name} at {where}"
                assert (roots[changed] == root).all(), f"{message} reaches another's element"
                seen[root] = seen.get(root, False) | changed
    for root, changed in seen.items():
        named, last = roots == root, roots.ndim - 1
        space = tuple(range(last))
        assert (named.any(axis=space) == changed.any(axis=space)).all(), (
            f"class {root} does not reach all elements that carry its id at {where}"
        )


@pytest.mark.parametrize("first", range(0, int(os.environ.get("ORACLE_SEEDS", "20")), CHUNK))
def test_ids_name_the_elements_that_change_with_a_unit(first):
    for seed in range(first, first + CHUNK):
        compare_with_oracle(oracle_program(seed), seed)


def mirrored(self, site):
    """The ids of a rule, with the channels of every output in the wrong order."""
    return [np.flip(ids, -1) for ids in self.right.flow(site)]


WRONG = {
    layers.BatchNormalization: "batch_norm",
    layers.DepthwiseConv1D: "depthwise",
    layers.Permute: "channels_first",
    op_class("Concatenate"): "halves",
    layers.Add: "add",
    op_class("Clip"): "clip",
    op_class("Flip"): "flip",
    op_class("Repeat"): "repeat",
    op_class("Split"): "split",
    op_class("Take"): "take",
}


@pytest.mark.parametrize("owner", WRONG, ids=lambda c: c.__name__)
def test_the_oracle_notices_a_wrong_rule(owner, monkeypatch):
    program = (1, [("linear", 0, 0, 6), (WRONG[owner], 0, 2, 5), READER])
    compare_with_oracle(program)
    rule = find(owner)
    wrong = object.__new__(type("Wrong", (type(rule),), {"flow": mirrored, "right": rule}))
    wrong.__dict__.update(rule.__dict__)
    monkeypatch.setitem(_REGISTRY, owner, wrong)
    with pytest.raises(AssertionError, match="reach"):
        compare_with_oracle(program)
