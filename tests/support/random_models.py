"""Random functional models as short programs: seeded, printable, easy to shrink.

A program is a rank (0 to 3 spatial axes) and steps `(name, first, second, width)`: a step reads
the tensor `first` places back, another one of the same positions, and adds its result.
"""

import keras
import numpy as np
from hypothesis import strategies as st
from keras import layers, ops
from random_first import FIRST, FIRST_ELSEWHERE, SLOW_FIRST
from random_layers import LAYERS, PINNED, POSITIONS, PRODUCTS, STREAMS
from random_ops import ALONG, BINARY, MOVES, REDUCTIONS, SLOW_OPS, UNARY
from random_steps import SIZE, average, channels, ranked
from random_steps import STEPS as COMMON

TABLES = {
    "unary": UNARY,
    "binary": BINARY,
    "reductions": REDUCTIONS,
    "along": ALONG,
    "moves": MOVES,
    "positions": POSITIONS,
    "products": PRODUCTS,
    "layers": LAYERS,
    "streams": STREAMS,
    "pinned": PINNED,
    "first": FIRST,
}
STEPS = {**COMMON, **{name: step for table in TABLES.values() for name, step in table.items()}}
SLOW = {**SLOW_OPS, **SLOW_FIRST}
ALL_STEPS = {**STEPS, **SLOW, **FIRST_ELSEWHERE}
# Drawn from first: the many rare operations must not crowd out what real models are made of.
FAMILIES = [[name] for name in sorted(COMMON)] + [sorted(table) for table in TABLES.values()]

numbers = st.integers(0, 9)
names = st.sampled_from(FAMILIES).flatmap(st.sampled_from)
steps = st.tuples(names, numbers, numbers, st.integers(2, 6))
programs = st.tuples(st.integers(0, 3), st.lists(steps, min_size=1, max_size=12))


def seeded_program(seed):
    """A program of up to 12 steps, the same for the same seed."""
    rng = np.random.default_rng(seed)

    def step():
        # Small numbers are more likely: most steps build on what is new.
        first, second = (int(rng.integers(0, rng.integers(1, 9))) for _ in range(2))
        family = FAMILIES[rng.integers(len(FAMILIES))]
        return family[rng.integers(len(family))], first, second, int(rng.integers(2, 7))

    return int(rng.integers(4)), [step() for _ in range(rng.integers(2, 13))]


def enlarged(x):
    """At least `SIZE` positions: what crops them must not leave nothing in the end."""
    missing = [(0, max(0, SIZE - size)) for size in x.shape[1:-1]]
    if not any(n for _, n in missing):
        return x
    return ranked("ZeroPadding{}", x)(missing if len(missing) > 1 else missing[0])(x)


def build(program):
    """The model of a program; steps that fit none of the tensors are left out."""
    rank, listed = program
    inputs = {n: keras.Input((*[SIZE] * rank, c), name=n) for n, c in (("a", 3), ("b", 2))}
    tensors = [layers.Dense(4)(inputs["a"]), layers.Dense(5)(inputs["b"])]
    for name, first, second, width in listed:
        ranks, step = ALL_STEPS[name]
        fitting = [t for t in reversed(tensors) if len(t.shape) - 1 in ranks]
        if not fitting:
            continue
        x = fitting[first % len(fitting)]
        meeting = [t for t in reversed(tensors) if t.shape[:-1] == x.shape[:-1]]
        z = step(x, meeting[second % len(meeting)], width)
        z._sparse = False  # as Keras says of every product with a constant
        tensors.append(enlarged(z if channels(z) < 24 else layers.Dense(6)(z)))
    pooled = layers.Concatenate()([average(t) for t in tensors[-3:]])
    heads = {"head": layers.Dense(2, name="head")(pooled), "last": layers.Flatten()(tensors[-1])}
    return keras.Model(inputs, heads if len(listed) % 2 else list(heads.values()))


def side_by_side(rank, names, width=3):
    """Steps with units of their own in front and behind."""
    a, b = (keras.Input((*[SIZE] * (rank - 1), n)) for n in (3, 2))
    ends = []
    for name in names:
        x, y = layers.Dense(6, name=f"before {name}")(a), layers.Dense(5)(b)
        z = layers.Dense(4)(ALL_STEPS[name][1](x, y, width))
        ends.append(layers.Dense(2)(ops.tanh(z)))
    return keras.Model([a, b], ends)
