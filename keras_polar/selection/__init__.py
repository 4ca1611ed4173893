"""From scores to the units that are kept: NumPy alone."""
