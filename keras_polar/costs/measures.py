"""What `sparsity` may be a share of: weights, multiply-accumulates, units, time, and your own."""

import numbers
from collections.abc import Sequence

from keras_polar.costs.count import COUNTED, terms
from keras_polar.costs.polynomial import Amount, Polynomial, polynomial
from keras_polar.coupling.branches import Branch
from keras_polar.coupling.coupling import Coupling
from keras_polar.rules import CostTerm


class Measure:
    """A cost that can be told for any widths: `apply(model, 0.5, measure=...)` takes a share of it.

    A subclass says in `amount` what one term of the network costs, or in `terms` what all cost.

    Attributes:
        name: as in messages and saved models.
        needs_sizes: whether all sizes of the model must be known (height and width, say).
        needs_macs: whether it must be known of every layer what it computes.

    Example:

        >>> class Energy(keras_polar.Measure):
        ...     name, needs_sizes, needs_macs = "energy", True, True
        ...     def amount(self, term):  # femtojoules: 4600 per product, 650 per byte of weights
        ...         return 4600 * term.macs + 650 * 4 * term.weights
        >>> gated = keras_polar.apply(model, 0.5, measure=Energy())
    """

    name = "cost"
    needs_sizes = False
    needs_macs = False

    def amount(self, term: CostTerm) -> int:
        """How much one combination of a term's open units costs, a whole number."""
        raise NotImplementedError(
            f"{type(self).__name__}: expected a measure with a method `amount(term)` that gives a "
            "whole number for the weights, macs and units of a keras_polar.rules.CostTerm, or with "
            "`terms(coupling)`."
        )

    def terms(self, coupling: Coupling) -> list[tuple[int, Amount]]:
        """What the network costs, as products of open units.

        Args:
            coupling: of the whole model, nothing ignored.

        Returns:
            Pairs of the index of a call, whose branch the cost goes with, and an `Amount`.
        """
        return [(call, Amount(t.factors, self._whole(t))) for call, t in terms(coupling)]

    def _whole(self, term: CostTerm) -> int:
        amount = self.amount(term)
        if not isinstance(amount, numbers.Integral):
            raise TypeError(
                f"Measure {self.name!r}: expected `amount` to give whole numbers, which stay exact "
                f"in large networks; received {amount!r}. Choose a smaller unit and round."
            )
        return int(amount)


class Counted(Measure):
    """Weights, multiply-accumulates or units, counted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.needs_sizes = self.needs_macs = name == "macs"

    def amount(self, term: CostTerm) -> int:
        return getattr(term, self.name)


MEASURES: dict[str, Measure] = {name: Counted(name) for name in COUNTED}


def cost_of(
    coupling: Coupling,
    measure: Measure,
    branches: Sequence[Branch] = (),
    whole: Coupling | None = None,
) -> Polynomial:
    """A cost as a function of open counts: of the units of each group, then of branches.

    Args:
        branches: which count 1 or 0 each, as variables after those of the groups.
        whole: the same units with nothing ignored; None where nothing is.
    """
    return polynomial(coupling, measure.terms(whole or coupling), _calls_in(coupling, branches))


def _calls_in(coupling: Coupling, branches: Sequence[Branch]) -> list[set[int]]:
    return [{*branch.calls, *_sum_of_two(coupling, branch)} for branch in branches]


def _sum_of_two(coupling: Coupling, branch: Branch) -> tuple[int, ...]:
    """The sum that a branch ends in, if it goes with the branch."""
    return (branch.merge,) if len(coupling.graph.calls[branch.merge].inputs) == 2 else ()
