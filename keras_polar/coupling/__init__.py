"""Which units of a graph go together, and which branches can go as a whole."""
