"""What every random model must keep: certificate, costs, a reason for every unit that stays."""

import keras
import numpy as np
from helpers import check_file, randomise
from random_models import build

import keras_polar
from keras_polar.costs.measures import MEASURES, cost_of
from keras_polar.coupling.coupling import _signatures, couple
from keras_polar.rules import trace_model
from keras_polar.surgery.certificate import difference, random_inputs
from keras_polar.training.gate_specs import branches_of


def certify(program, seed=0):
    """Builds the program and checks all that must hold; returns how many groups can go."""
    keras.backend.clear_session(free_memory=False)  # collecting garbage costs a second
    return len(certify_model(build(program), seed).groups)


def certify_model(model, seed=0):
    """Closes units at random, checks all that must hold; returns the coupling."""
    randomise(model, seed)
    coupling = couple(trace_model(model))
    assert_no_silent_pin(coupling)
    if coupling.groups:
        certify_gated(model, coupling, np.random.default_rng(seed))
    return coupling


def assert_no_silent_pin(coupling):
    """Every unit is in a group, or has a reason, or is the only one of its kind."""
    signatures = _signatures(coupling.sites, coupling.roots)
    for name, vector in coupling.produced().items():
        for root in np.unique(coupling.roots[vector]).tolist():
            if coupling.group_of[root] < 0 and not coupling.reasons.get(root):
                alike = np.flatnonzero(signatures == signatures[root])
                free = [i for i in alike if coupling.roots[i] == i and i not in coupling.reasons]
                assert free == [root], f"unit of {name!r} stays without a reason"


def certify_gated(model, coupling, rng):
    gate = ("static", "dynamic")[rng.integers(2)]
    ignore = [coupling.groups[0].layers[0]] if rng.integers(4) == 0 else []
    if ignore:
        coupling = couple(coupling.graph, ignore)
        if not coupling.groups:
            return
    blocks = branches_of(coupling, ignore)
    options = {"gate": gate, "ignore": ignore, "granularity": ("channels", "blocks")}
    gated = keras_polar.apply(model, 1e-3, measure="units", **options)
    # Keras on TensorFlow adds (n, 1) to (n, n) as if it were a bias of n channels: a batch of 2 and
    # 2 channels left would differ. No tensor here has 29 channels.
    inputs = random_inputs(model, batch=29)
    assert difference(model, gated, inputs) <= 1e-4  # all gates are open
    counts = []
    for group in gated.groups:
        least = 0 if group.is_block else 1
        counts.append(int(rng.integers(least, group.units + 1)))
        group.set_mask(rng.permutation(group.units) < counts[-1])
    small = keras_polar.convert(gated)
    assert difference(gated, small, inputs) <= 1e-4
    if rng.integers(4) == 0:  # a file takes as long as all the rest
        for pruned in (gated, small):
            check_file(pruned, model, inputs)
    counted = keras_polar.cost(small)
    assert counted.weights == small.count_params()
    for measure in ("weights", "macs", "units"):
        assert cost_of(coupling, MEASURES[measure], blocks)(counts) == getattr(counted, measure), (
            measure
        )
