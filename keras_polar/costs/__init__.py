"""What a model costs, for any mask."""
