"""Runs methods beside their controls, each on the same seeds; what has been run is not repeated.

    python examples/benchmarks/comparison/run.py --train_dense --seeds=0,1,2 --dense_dir=FOLDER
"""

import dataclasses
import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import protocol

flags.DEFINE_enum("regime", "trained", ("trained", "scratch"), "")
flags.DEFINE_string("model", "resnet20", "")
flags.DEFINE_string("data_dir", None, "")
flags.DEFINE_string("dense_dir", None, "")
flags.DEFINE_list("seeds", "0", "")
flags.DEFINE_bool("train_dense", False, "")


def main(argv):
    o = flags.FLAGS
    setting = protocol.recipe(o.regime, o.model)
    data = protocol.load(setting, o.data_dir)
    for seed in map(int, o.seeds):
        path = setting.dense_path(o.dense_dir, seed)
        if not path.exists():
            print(path, protocol.train_dense(setting, data, seed, path), flush=True)


if __name__ == "__main__":
    app.run(main)
