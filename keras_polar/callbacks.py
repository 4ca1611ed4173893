"""What can be watched while a gated model trains.

The gates' sparsity and polarization are in the logs of `fit`: in the progress bar, in
`history` and, as `epoch_sparsity` and `epoch_polarization`, in TensorBoard, if `fit` is given
`keras.callbacks.TensorBoard`; with `histogram_freq=1` that callback also writes histograms of
every gate's `open_rates`. Only what the pictures of `keras_polar.plots` need is recorded here.
"""

from typing import Any

import keras
import numpy as np


class OpenRates(keras.callbacks.Callback):
    """Records how open every gate is: before training and after each epoch.

    Attributes:
        history: group name -> list of float32 arrays of shape (units,), rates in [0, 1]; the
            first is the state before training. A second `fit` goes on where the first ended.

    Example:

        >>> rates = keras_polar.callbacks.OpenRates()
        >>> gated.fit(x, y, epochs=10, callbacks=[rates])
        >>> keras_polar.plots.open_rates(rates.history).savefig("open_rates.png")
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: dict[str, list[np.ndarray]] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        if not self.history:
            self._record()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._record()

    def _record(self) -> None:
        for group in self.model.groups:
            self.history.setdefault(group.name, []).append(np.array(group.open_rates))
