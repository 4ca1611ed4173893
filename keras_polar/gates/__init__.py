"""Thin Keras layers over pure functions: who decides about units, and what the loss says of it."""
