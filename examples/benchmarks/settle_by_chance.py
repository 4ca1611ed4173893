"""Gated networks that are settled without training: for what does not depend on which units go."""

import keras_polar


class Chance(keras_polar.Importance):
    """Ranks units by lot; every group gives the same share.

    Args:
        seed: of the lot.
    """

    name = "chance"

    def __init__(self, seed=0):
        self.seed = seed

    def scores(self, coupling):
        return keras_polar.importances.at_random(coupling, self.seed)


def settled(model, sparsity, seed=0, **options):
    """A gated network whose gates are settled, on channels that chance ranks.

    Args:
        options: as `keras_polar.apply` takes them.
    """
    gated = keras_polar.apply(model, sparsity, gate="static", importance=Chance(seed), **options)
    gated.settle()
    return gated
