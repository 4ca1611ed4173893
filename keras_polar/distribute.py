"""The one place that knows about tf.distribute."""

from typing import Any

import keras


def global_mean(x: Any) -> Any:
    """The mean of `x` over all replicas, differentiable; `x` itself where there is one.

    Outside TensorFlow a batch is one (possibly sharded) array and needs no help.
    """
    if keras.backend.backend() != "tensorflow":
        return x
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return x
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, x)


def require_supported(model: Any) -> None:
    """Raises a NotImplementedError if Keras cannot train under the model's strategy."""
    strategy = getattr(model, "distribute_strategy", None)  # Keras on TensorFlow has it
    found = _unsupported(strategy) if strategy is not None else ""
    if found:
        raise NotImplementedError(
            f"fit of {model.name!r}: Keras {keras.__version__} cannot train under {found} (see "
            "github.com/keras-team/keras/issues/20585). Use tf.distribute.MirroredStrategy on "
            "one machine, or KERAS_BACKEND=jax with keras.distribution on several."
        )


def _unsupported(strategy: Any) -> str:
    import tensorflow as tf

    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        return "ParameterServerStrategy"
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        tasks = strategy.cluster_resolver.cluster_spec().as_dict().items()
        workers = sum(len(addresses) for kind, addresses in tasks if kind in ("chief", "worker"))
        return f"MultiWorkerMirroredStrategy with {workers} workers" if workers > 1 else ""
    return ""
