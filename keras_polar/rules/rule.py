"""What the library has to know about one operation, and the registry of who knows it.

A `Rule` answers three questions about an operation: how ids flow through it (`flow`), how it is
cut (`weights`, `config`, `arguments`), and what it computes (`macs`). The answers meet in the
named *axes* of a layer: `flow` says that the kernel's "in" axis carries the ids of the input's
channels and "out" fresh ones; `weights` says which axis of which variable is "in" or "out";
`config` and `macs` are written in terms of how many of each remain. How many weights a layer has
follows from `weights`.

Units that are both made and read within one layer (attention heads, the hidden state of an LSTM)
cannot be masked in front of a consumer. Their rule declares *inner reads*, axes of weights that
are multiplied by the mask instead: `(x * m) @ W == x @ (m[:, None] * W)`.

Nor is masking enough for who *averages* over units (LayerNormalization): zeros count as well. Its
rule says how it computes with the mask (`over_open`).

Example: the whole rule of a Dense layer::

    class DenseRule(Rule):
        def flow(self, site):
            site.read("in", axis=-1)
            return [site.produce("out", site.op.units, axis=-1)]

        def weights(self, op):
            return {"kernel": ("in", "out"), "bias": ("out",)}

        def config(self, site, kept):
            return {"units": kept.count(site.axes["out"])}

        def macs(self, site):
            return [CostTerm((site.axes["in"], site.axes["out"]), macs=site.positions(0, but=-1))]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_polar.graph.ir import Call
from keras_polar.rules.ids import Ids, drop_constant_axes, look_up

if TYPE_CHECKING:
    from keras_polar.rules.call_site import CallSite


@dataclass(frozen=True)
class CostTerm:
    """A cost that is a product: each coefficient times how many units of each factor are open.

    Attributes:
        factors: id vectors; elements of no unit (-1) always count as open.
        weights: number of weights per combination of units.
        macs: multiply-accumulates per sample and combination of units.
        units: 1 for the units a layer produces.
    """

    factors: tuple[Ids, ...]
    weights: int = 0
    macs: int = 0
    units: int = 0


@dataclass(frozen=True)
class KeptUnits:
    """Which ids stay after pruning: `flags[id]`."""

    flags: np.ndarray

    def where(self, ids: Ids, axis: int = 0) -> np.ndarray:
        """Indices along an axis at which anything stays."""
        (small,) = drop_constant_axes(ids)
        flags = np.moveaxis(look_up(self.flags, small, True), axis, 0)
        stays = flags.any(axis=tuple(range(1, flags.ndim)))
        return np.flatnonzero(np.broadcast_to(stays, ids.shape[axis]))

    def size(self, ids: Ids, axis: int) -> int:
        """Length of a tensor's axis after pruning."""
        return len(self.where(ids, axis))

    def count(self, vector: Ids) -> int:
        """How many elements of an id vector stay."""
        return self.size(vector, 0)

    def all(self, vector: Ids) -> bool:
        return self.count(vector) == len(vector)


class Rule:
    """How one kind of operation behaves under pruning. The base class pins everything.

    Attributes:
        fuses: whether a runtime computes it along with the operation before it, in no time.
        cuts_adapters: whether `weights` knows adapters of low rank (LoRA) that the layer may have.
    """

    fuses = False
    cuts_adapters = False

    def flow(self, site: CallSite) -> list[Ids]:
        """Ids of the outputs; ties, pins, reads and names axes on the way."""
        return site.pin_all("its rule does not say how units flow")

    def weights(self, op: Any) -> dict[str, tuple]:
        """Variable -> the axis name, or None, of each of its axes.

        Variables are named by attributes: "kernel", or "cell.kernel" for a sublayer's.
        """
        return {}

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        """Changes of the layer's config when only `kept` units remain."""
        return {}

    def factors(self, site: CallSite, kept: KeptUnits) -> dict[str, float]:
        """Variable -> what its values are multiplied by when only `kept` units remain."""
        return {}

    def arguments(self, site: CallSite, kept: KeptUnits) -> tuple[tuple, dict]:
        """The call's arguments when only `kept` units remain."""
        return site.call.args, site.call.kwargs

    def over_open(self, op: Any, gates: Any, *args: Any, **kwargs: Any) -> Any:
        """What an operation that averages over units computes if closed ones do not count.

        Asked where `flow` has said `site.average`, for there a closed unit must not arrive as zero,
        which would count like any other value. Outputs of closed units may be anything: who reads
        them has them masked.

        Args:
            gates: how much each unit counts, 0 or 1, in a shape that broadcasts against the tensor.
            *args: of the call.
            **kwargs: of the call.
        """
        raise NotImplementedError(
            f"{type(op).__name__} {op.name!r}: the rule {type(self).__name__} has no `over_open`, "
            "which says what it computes over open units. A rule that calls `site.average` needs "
            "it; give it to keras_polar.register before the model is loaded."
        )

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        """Multiply-accumulates of this call, as products of open units.

        For one sample, or for one row along the first axis where a sample takes several. None if it
        is not known how many: a rule that does not say it says that there are none.
        """
        return []

    def adapter_macs(self, site: CallSite) -> int | None:
        """What adapters of low rank add to a quantized layer; None if that is not known."""
        return None

    def applies(self, op: Any) -> bool:
        """Whether the rule knows this operation of its class (what a wrapper wraps, say)."""
        return True

    def rows(self, site: CallSite, before: list[int]) -> int:
        """Rows of the outputs that one sample takes, given those of the inputs."""
        return max(before, default=1)

    def keeps_batch(self, site: CallSite) -> bool:
        """Whether sample i of the output comes from sample i of the input."""
        axes = getattr(site.op, "axis", None)
        axes = axes if isinstance(axes, (tuple, list)) else [axes]
        return not any(isinstance(a, int) and a % site.inputs[0].ndim == 0 for a in axes)

    def summands(self, call: Call) -> tuple[int, ...]:
        """Positions of inputs that could be left out of a sum, with the others as they are."""
        return ()


class PinRule(Rule):
    """All units that reach the operation stay, for a stated reason.

    Args:
        why: the reason.
        counts: whether it is known that the operation does no multiply-accumulates.
    """

    def __init__(self, why: str, counts: bool = True) -> None:
        self.why, self.counts = why, counts

    def flow(self, site: CallSite) -> list[Ids]:
        return site.pin_all(self.why)

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        return [] if self.counts else None
