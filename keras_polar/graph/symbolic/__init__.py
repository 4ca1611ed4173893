"""What a layer's `call` does: recorded, merged, expanded into the calls it consists of."""
