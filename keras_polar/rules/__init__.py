"""The rules: all that the library knows about each operation. Importing it registers them."""

from keras_polar.rules import channelwise, elementwise, linear, movement, traced  # noqa: F401
from keras_polar.rules.base import Kept, Rule, Site, Term, read, rule_for

__all__ = ["Kept", "Rule", "Site", "Term", "read", "rule_for"]
