"""A model as plain data, and back: the only folder that knows how Keras is made inside."""
