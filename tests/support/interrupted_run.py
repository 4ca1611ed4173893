"""A training run that kills itself: `python interrupted_run.py FOLDER GATE STEP` (STEP 0: never).

Goes on from what FOLDER/backup holds; a run that ends writes its weights to FOLDER/final.npz.
"""

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
from helpers import small_resnet
from sklearn.datasets import load_digits

import keras_polar
from keras_polar.backends import to_numpy

BATCH, STEPS_PER_EPOCH, EPOCHS = 64, 10, 8
# Of 80 steps: warm-up until 16, full pressure from 32, settled after 48.
SCHEDULE = keras_polar.Schedule(warmup=0.2, ramp=0.4, settle=0.6)


class Kill(keras.callbacks.Callback):
    """`kill -9` after a step of the whole run."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(to_numpy(self.model.consensus.step)) == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, gate, step):
    x, y = load_digits(return_X_y=True)
    samples = BATCH * STEPS_PER_EPOCH
    x = (x[:samples].reshape(-1, 8, 8, 1) / 16).astype("float32")
    keras.utils.set_random_seed(0)
    gated = keras_polar.apply(small_resnet(), 0.5, gate=gate, schedule=SCHEDULE)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    gated.compile(keras.optimizers.Adam(3e-3), loss, jit_compile=False)
    callbacks = [keras.callbacks.BackupAndRestore(folder / "backup"), Kill(step)]
    options = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    gated.fit(x, y[:samples], callbacks=callbacks, **options)
    np.savez(folder / "final.npz", **{w.path: to_numpy(w) for w in gated.weights})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
