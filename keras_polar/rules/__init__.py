"""The rules: all that the library knows about each operation. Importing it registers them."""

from keras_polar.rules import (  # noqa: F401
    activations,
    applications,
    attention,
    custom,
    dense_conv,
    einsum_dense,
    elementwise,
    embedding,
    hub,
    matmul,
    movement,
    pooling_norm,
    recurrent,
    reductions,
    wrappers,
)
from keras_polar.rules import unprunable as _unprunable  # noqa: F401  (last: only what has no rule)
from keras_polar.rules.call_site import CallSite
from keras_polar.rules.registry import is_unknown, rule_for, trace_model
from keras_polar.rules.rule import CostTerm, KeptUnits, Rule

# The names that rules had before.
Kept, Site, Term = KeptUnits, CallSite, CostTerm

__all__ = [
    "CallSite",
    "CostTerm",
    "Kept",
    "KeptUnits",
    "Rule",
    "Site",
    "Term",
    "is_unknown",
    "rule_for",
    "trace_model",
]
