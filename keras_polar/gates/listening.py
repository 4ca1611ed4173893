"""What the loss says of units: squares of their gates' gradients, which no optimizer hands on.

The mean of a gate's gradient is noise in a trained network; the mean of its square over the samples
ranks units almost as the loss does that closing each alone adds. A gradient is known only after
the backward pass, where a layer has no say. The way out is a variable that every Keras optimizer
overwrites with its gradient (`overwrite_with_gradient`, made for the scales of float8): its
"gradient" is a moving average with the squares of this step in it.
"""

from typing import Any

from keras import ops

from keras_polar.backends import global_sum, replicas

SMALL = 1e-30  # of importances, so that they have a logarithm
ROUND_OFF = 1e-5  # of a cost: the whole one is not always quite 1
STEPS = 24  # halvings of an interval of logarithms: float32 has no more


def listen(gates: Any, heard: Any, samples: Any, rate: Any) -> Any:
    """The gates as they are; what a backward pass through them hears is the gradient of `heard`.

    Closing a unit adds about half of the mean over the samples of `g^2` to the loss, `g` the
    gradient of its gate for a sample (Fisher pruning; Theis et al., arXiv 1801.05787).

    Args:
        gates: of shape (batch, units), or (1, units) where all samples share them.
        heard: moving averages of the squares, of shape (1, units); where samples share gates, of
            shape (2, units): below is the gradient of the step before.
        samples: how many the whole batch has; the loss is their mean.
        rate: of the moving averages.
    """
    squares_in = of_samples if heard.shape[0] == 1 else of_batches

    @ops.custom_gradient
    def heard_by(gates: Any, heard: Any, samples: Any, rate: Any) -> Any:
        def gradient(*args: Any, upstream: Any = None) -> tuple:
            slope = args[0] if upstream is None else upstream
            squares, *last = squares_in(ops.cast(slope, "float32"), heard, samples)
            average = heard[0] + rate * (squares - heard[0])
            blank = ops.zeros_like
            return slope, ops.stack([average, *last]), blank(samples), blank(rate)

        return gates + 0, gradient

    return heard_by(gates, heard, samples, rate)


def of_samples(slopes: Any, heard: Any, samples: Any) -> list:
    """The mean square of what each sample says; its loss has a weight of one over `samples`.

    Replicas have a part of the sum each, and the average of theirs is kept.
    """
    return [replicas() * samples * ops.sum(ops.square(slopes), axis=0)]


def of_batches(slopes: Any, heard: Any, samples: Any) -> list:
    """The same, where only the mean over the samples can be seen, and what it is.

    Its variance is that of a sample over their number, and half the mean square of what it changes
    by from step to step; the product of two steps is, on average, its mean squared.
    """
    now, before = global_sum(slopes[0]), heard[1]
    return [samples * ops.square(now - before) / 2 + now * before, now]


def log_damage(heard: Any) -> Any:
    """Logarithm of what closing each unit adds to the loss, to a summand that all share."""
    return ops.log(ops.maximum(heard, 0.0) + SMALL)


def as_blocks(worth: list, saved: Any) -> list:
    """What units of groups are worth that keep equally many: those of the same rank go as one.

    A block is worth what closing all its units adds to the loss, over what all of them save.

    Args:
        worth: of each group, logarithms of what its units add over what they save.
        saved: of each group, what one unit saves; of shape (groups,).
    """
    stacked = ops.stack(worth)
    ranks = ops.argsort(ops.argsort(-stacked, axis=-1), axis=-1)
    ranked = -ops.sort(-stacked, axis=-1)
    saved = ops.maximum(saved, 1e-12)
    shares = ops.log(saved / ops.sum(saved))[:, None]
    stays = ops.any(ops.isinf(ranked), axis=0)
    added = ops.logsumexp(ops.where(ops.isinf(ranked), 0.0, ranked) + shares, axis=0)
    block = ops.where(stays, float("inf"), added)
    return [ops.take(block, ranks[i], axis=0) for i in range(len(worth))]


def balance(wanted: Any, cost_of: Any, target: Any) -> Any:
    """How far above the threshold each unit is, at which the cost is what it is to be.

    Args:
        wanted: of all units; infinite for those that stay in any case.
        cost_of: function from 0/1 per unit to the cost.
        target: the cost.
    """
    is_free = ops.isfinite(wanted)
    low = ops.min(wanted) - 1.0  # nothing closed
    most = ops.max(ops.where(is_free, wanted, low)) + 1.0
    high = most
    for _ in range(STEPS):
        middle = (low + high) / 2
        is_met = cost_of(ops.cast(wanted > middle, "float32")) <= target + ROUND_OFF
        low, high = ops.where(is_met, low, middle), ops.where(is_met, middle, high)
    # Halfway to the next unit on either side: round-off decides about none.
    stays = wanted > high
    last = ops.max(ops.where(stays, ops.min(wanted) - 2.0, wanted))
    first = ops.min(ops.where(stays & is_free, wanted, most))
    return ops.where(is_free, wanted - (last + first) / 2, 1.0)
