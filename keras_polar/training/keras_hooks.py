"""What training needs of Keras' trainer and optimizers that has no public name."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import keras


def losses_are_handed_over(model: Any) -> bool:
    """Whether the losses of a step are being handed from one part of Keras to the next (JAX)."""
    return bool(model._losses_override)


def is_called_by(function: Callable) -> bool:
    """Whether a function is being run. What Keras says of it differs between backends."""
    return _frame_of(function) is not None


def caller(method: Callable) -> Any:
    """The object whose method is being run, None if it is not."""
    frame = _frame_of(method)
    return frame and frame.f_locals.get("self")


def _frame_of(function: Callable) -> Any:
    code = inspect.unwrap(function).__code__  # Keras wraps `fit` and others, all in one function
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def leaves_losses_out(model: Any) -> bool:
    """Whether a model is a `Distiller`, which does not train what its layers add as losses."""
    return isinstance(model, keras.distillation.Distiller) and "compute_loss" not in vars(model)


def add_losses(model: Any) -> None:
    """Makes up for that, from its next training step on that is traced."""
    own = model.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        return sum(model.losses, own(*args, **kwargs))

    vars(model)["compute_loss"] = compute_loss


def learning_rate(optimizer: Any) -> Any:
    """The learning rate that an optimizer was given: a schedule, or the variable that holds it."""
    return optimizer._learning_rate


def share_clock(new: Any, optimizer: Any) -> Any:
    """The new optimizer, with the very step counter and learning rate of another."""
    new._learning_rate = optimizer._learning_rate
    new._iterations = optimizer._iterations
    return new


def undecayed(optimizer: Any) -> tuple[Sequence[int], list[str] | None]:
    """Which variables are excluded from weight decay: ids, and patterns of names."""
    excluded = getattr(optimizer, "_exclude_from_weight_decay", ())
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    return excluded, [pattern.pattern] if pattern else None


def average_what_is_overwritten(model: Any) -> None:
    """Makes up for what Keras forgets in an optimizer with `use_ema`, which is built by it.

    Of variables that are overwritten with their gradients (see `gates.listening`) Keras keeps no
    average, and then assigns that to them all the same. Each is its own average here.
    """
    whole: Any = getattr(model, "optimizer", None)
    optimizer: Any = getattr(whole, "inner_optimizer", whole)
    if not getattr(optimizer, "use_ema", False):
        return
    strategy = getattr(model, "distribute_strategy", None)
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        if not optimizer.built:
            whole.build(model.trainable_variables)
    averages, variables = optimizer._model_variables_moving_average, optimizer._trainable_variables
    kept = [v if a is None else a for a, v in zip(averages, variables, strict=True)]
    # Past `__setattr__`, by which variables of the model would become the optimizer's, too.
    vars(optimizer)["_model_variables_moving_average"] = kept
