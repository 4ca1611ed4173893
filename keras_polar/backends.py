"""What differs between TensorFlow, JAX and PyTorch while Keras' training loop runs."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_polar.graph.trace import to_numpy

# Keras on JAX takes the state out of a model's variables while it trains, and hands each part of a
# step what that part is to see of it.
IS_STATE_TAKEN = keras.backend.backend() == "jax"


class Reported:
    """The values that non-trainable variables of a model have after the latest training step.

    Where the state is taken out of the model, they come from what the step returns, as copies: the
    next step is given the memory of that state.

    Args:
        model: a compiled model that `fit` trains.
        variables: some of its non-trainable variables, scalars.
    """

    def __init__(self, model: Any, variables: Sequence[Any]) -> None:
        self.model, self.variables = model, variables
        self.values: list = []
        self.steps: list[tuple] = []

    def read(self) -> list[float]:
        """One number per variable; none before the first step."""
        now = self.values if IS_STATE_TAKEN else self.variables
        return [float(to_numpy(v)) for v in now]

    def watch(self) -> None:
        """To be called when the model's train function is another one."""
        step = self.model.train_function
        if not IS_STATE_TAKEN or any(step is watched for _, watched in self.steps):
            return
        ids = [id(v) for v in self.model.non_trainable_variables]
        places = [ids.index(id(v)) for v in self.variables]

        def watched(state: Any, iterator: Any) -> Any:
            logs, state = step(state, iterator)
            self.values = [ops.copy(state[1][i]) for i in places]
            return logs, state

        self.steps.append((step, watched))
        self.model.train_function = watched

    def forget(self) -> None:
        """The model has its own train function again."""
        for step, watched in self.steps:
            if self.model.train_function is watched:
                self.model.train_function = step
