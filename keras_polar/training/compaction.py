"""The settled sub-network trains in place of its gated model: compaction in the middle of `fit`.

Once the consensus is settled, closed units are dead weight. A smaller network with a smaller
optimizer takes over: the slots of Adam, the momentum of SGD and the like are cut along with the
weights, steps and learning rate are the very same variables. For optimizers that treat every
weight by itself the run goes on as it would have, to float32 round-off.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from keras_polar.backends import to_numpy
from keras_polar.graph.keras_private import layers_of, scale_scores_alike
from keras_polar.processes import assign
from keras_polar.surgery.convert import small_twin
from keras_polar.surgery.cut import Piece
from keras_polar.training.keras_hooks import learning_rate, share_clock, undecayed
from keras_polar.training.teaching import lesson_of_twin

# What JAX makes a training step of. It would take one method of one model for one function,
# whatever network trains, and go on with the constants of an earlier one. It comes by `call`, not
# by `__call__`.
_METHODS = {"train_step": "train_step", "call": "__call__"}


class CannotCompact(Exception):
    """Says why the whole network has to go on training."""


class Compaction:
    """A smaller network that can train in the place of a settled gated model.

    Between `enter` and `leave` it trains, and what the gated model owns (variables, optimizer,
    states and metrics of its layers) is out of date; `leave` brings it up to date.

    Attributes:
        model: the sub-network.
        sparsity: what it lacks, in the measure of the gated model.
        metrics: id of a metric in the gated model -> the one of the sub-network.

    Raises:
        CannotCompact: there is no smaller network or optimizer that goes on equally.
    """

    def __init__(self, gated: Any) -> None:
        self.gated, self.masks, self.sparsity = gated, _masks(gated), gated.sparsity
        self.train_function: Any = None
        self.methods = {name: _own(getattr(gated, own)) for name, own in _METHODS.items()}
        _refuse_sharded()
        with _scope(gated):
            try:
                self.model, cutter = small_twin(gated, lesson_of_twin(gated))
            except (TypeError, ValueError) as error:
                raise CannotCompact(f"its smaller one cannot be made: {error}") from error
            _refuse_scaled(cutter.pieces, _scaled_alike(cutter.twins))
            _refuse_spectral(cutter.twins)
            self.metrics, states = _metrics(cutter.twins)
            self.whole = gated.optimizer
            if not self.whole.built:
                self.whole.build(gated.trainable_variables)
            self.part = _unbuilt(self.whole, {id(p.whole): p.part for p in cutter.pieces})
            slots = _slots(self.whole, self.part, gated, self.model, cutter.pieces)
        self.pieces = [*cutter.pieces, *states, *slots]

    @property
    def is_current(self) -> bool:
        """Whether the gated model still has the masks and the optimizer of before."""
        same = all(map(np.array_equal, self.masks, _masks(self.gated)))
        return same and self.gated.optimizer is self.whole

    def enter(self) -> None:
        """The sub-network trains on, from where the gated model is."""
        for piece in self.pieces:
            assign(piece.part, piece.cut(to_numpy(piece.whole)))
        self.gated.optimizer, self.gated.sub_network = self.part, self
        self._swap_function()
        self.gated.__dict__.update(self.methods)
        self.gated.make_train_function()

    def leave(self) -> None:
        """The gated model trains on, from where the sub-network is."""
        for piece in self.pieces:
            assign(piece.whole, piece.paste(to_numpy(piece.whole), to_numpy(piece.part)))
        self.gated.optimizer, self.gated.sub_network = self.whole, None
        self._swap_function()
        for name in self.methods:
            del self.gated.__dict__[name]

    def _swap_function(self) -> None:
        """Each of the two has a compiled step of its own."""
        other = self.gated.train_function
        self.gated.train_function, self.train_function = self.train_function, other


def _metrics(twins: Iterable[tuple[Any, Any]]) -> tuple[dict[int, Any], list[Piece]]:
    """Layers' own metrics: id of the whole one's -> the part's; and the pieces of their states."""
    layers = [pair for pair in twins if _is_layer(pair[0])]
    try:
        pairs = _pairs_of(layers, "metrics")
        states = _pairs_of(pairs, "variables")
    except ValueError as error:
        raise CannotCompact(f"its layers have metrics that their copies lack: {error}") from error
    pieces = [Piece(whole, part, (None,) * len(whole.shape)) for whole, part in states]
    for piece in pieces:
        if piece.whole.shape != piece.part.shape:
            raise CannotCompact(f"the metric {piece.whole.path!r} depends on the number of units")
    return {id(a): b for a, b in pairs}, [p for p in pieces if p.whole is not p.part]


def _is_layer(op: Any) -> bool:
    return isinstance(op, keras.layers.Layer)


def _pairs_of(twins: Iterable[tuple[Any, Any]], parts: str) -> list[tuple[Any, Any]]:
    """Pairs of the parts of twins, in order; a ValueError where one has more of them."""
    found = ((getattr(a, parts), getattr(b, parts)) for a, b in twins)
    return [pair for a, b in found for pair in zip(a, b, strict=True)]


def _refuse_sharded() -> None:
    if isinstance(keras.distribution.distribution(), keras.distribution.ModelParallel):
        raise CannotCompact("keras.distribution.ModelParallel shards its variables by their sizes")


def _own(method: Callable) -> Callable:
    """The same under an identity of its own."""
    return lambda *args, **kwargs: method(*args, **kwargs)


def _scope(gated: Any) -> contextlib.AbstractContextManager:
    """Where the gated model's variables were made, so that those of its part are of their kind."""
    strategy = getattr(gated, "distribute_strategy", None)  # Keras on TensorFlow has it
    return strategy.scope() if strategy is not None else contextlib.nullcontext()


def _masks(gated: Any) -> list[np.ndarray]:
    return [group.mask for group in gated.groups]


def _scaled_alike(twins: Iterable[tuple[Any, Any]]) -> set[int]:
    """Ids of the variables of attention, which divides by the width of its whole keys from now on.

    Then the weights need not be rescaled when keys become narrower, and learn as they would have.
    """
    layers = (zip(layers_of(a), layers_of(b), strict=True) for a, b in twins if _is_layer(a))
    pairs = itertools.chain.from_iterable(layers)
    scaled = [whole for whole, part in pairs if scale_scores_alike(whole, part)]
    return {id(v) for whole in scaled for v in whole.variables}


def _refuse_scaled(pieces: Iterable[Piece], scaled_alike: set[int]) -> None:
    for piece in pieces:
        if piece.factor != 1 and id(piece.whole) not in scaled_alike:
            raise CannotCompact(
                f"{piece.whole.path!r} is rescaled when it is cut, which changes its gradients"
            )


def _refuse_spectral(twins: Iterable[tuple[Any, Any]]) -> None:
    layers = (zip(layers_of(a), layers_of(b), strict=True) for a, b in twins if _is_layer(a))
    for whole, part in itertools.chain.from_iterable(layers):
        is_spectral = isinstance(whole, keras.layers.SpectralNormalization)
        if is_spectral and whole.kernel.shape != part.kernel.shape:
            raise CannotCompact(
                f"SpectralNormalization {whole.name!r} divides its kernel by a norm of all of it, "
                "closed units included"
            )


def _unbuilt(optimizer: Any, parts: dict[int, Any]) -> Any:
    """An optimizer like another, with its very step counter and learning rate, without slots."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = _unbuilt(optimizer.inner_optimizer, parts)
        scaling = optimizer.initial_scale, optimizer.dynamic_growth_steps
        return share_clock(type(optimizer)(inner, *scaling, name=optimizer.name), optimizer)
    rate = learning_rate(optimizer)
    if isinstance(rate, keras.Variable):
        rate = 0.0
    try:
        new = type(optimizer).from_config({**optimizer.get_config(), "learning_rate": rate})
    except Exception as error:
        kind = type(optimizer).__name__
        raise CannotCompact(f"the optimizer ({kind}) cannot be made anew: {error}") from error
    _exclude_from_decay(new, optimizer, parts)
    return share_clock(new, optimizer)


def _exclude_from_decay(new: Any, optimizer: Any, parts: dict[int, Any]) -> None:
    excluded, patterns = undecayed(optimizer)
    if excluded or patterns:
        new.exclude_from_weight_decay([parts[i] for i in excluded if i in parts], patterns)


def _slots(whole: Any, part: Any, gated: Any, small: Any, pieces: list[Piece]) -> list[Piece]:
    """Builds the smaller optimizer; what each of its variables is cut out of."""
    by_part: dict[Any, Piece] = {id(p.part): p for p in pieces}
    by_whole: dict[Any, Any] = {id(p.whole): p for p in pieces}
    # The optimizer that is there does not say whose its slots are; its twin does, in their order.
    twin = _built(_unbuilt(whole, {}), gated.trainable_variables)
    slots = [v for v in whole.variables if v.name not in _SHARED]
    if len(slots) != len(twin):
        raise CannotCompact("the optimizer was built for other variables than are trained now")
    owned = zip(slots, (by_whole.get(owner, owner) for _, owner in twin), strict=True)
    table = _numbered(owned)
    parts = _built(part, small.trainable_variables)
    numbered = _numbered((slot, by_part.get(owner)) for slot, owner in parts)
    return [_slot(table.get(key), slot, key[0]) for key, slot in numbered.items()]


_SHARED = ("iteration", "learning_rate")


def _built(optimizer: Any, variables: list) -> list[tuple[Any, int | None]]:
    """The slots that an optimizer makes for variables, each with the id of its variable, if any."""
    owners: dict[int, int] = {}
    for each in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if each is not None:
            each.add_variable_from_reference = _recording(each.add_variable_from_reference, owners)
    optimizer.build(variables)
    return [(v, owners.get(id(v))) for v in optimizer.variables if v.name not in _SHARED]


def _recording(make: Callable, owners: dict[int, int]) -> Callable:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        slot = make(*args, **kwargs)
        owners[id(slot)] = id(args[0] if args else kwargs["reference_variable"])
        return slot

    return recorded


def _numbered(owned: Iterable[tuple[Any, Any]]) -> dict[tuple, Any]:
    """From (slot, owner) to (owner, how many of its slots come before) -> slot."""
    counts: Counter = Counter()
    numbered = {}
    for slot, owner in owned:
        numbered[owner, counts[owner]] = slot
        counts[owner] += 1
    return numbered


def _slot(whole: Any, part: Any, piece: Piece | None) -> Piece:
    is_cut = piece is not None and whole is not None and whole.shape == piece.whole.shape
    where = piece.where if is_cut and piece is not None else (None,) * len(part.shape)
    slot = Piece(whole, part, where)
    if whole is None or slot.cut(np.empty(whole.shape, bool)).shape != tuple(part.shape):
        raise CannotCompact(f"the optimizer's variable {part.path!r} cannot be cut")
    return slot
