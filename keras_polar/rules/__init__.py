"""The rules: all that the library knows about each operation. Importing it registers them."""

from keras_polar.rules import (  # noqa: F401
    applications,
    attention,
    channelwise,
    contraction,
    einsum,
    elementwise,
    embedding,
    linear,
    movement,
    recurrent,
    traced,
    wrappers,
)
from keras_polar.rules import pinned as _pinned  # noqa: F401  (last: only what has no rule)
from keras_polar.rules.base import Kept, Rule, Site, Term, is_unknown, read, rule_for

__all__ = ["Kept", "Rule", "Site", "Term", "is_unknown", "read", "rule_for"]
