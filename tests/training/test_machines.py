"""Several processes of JAX: one network, a resumed run, and errors in words instead of waiting."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import free_ports, quick

from keras_polar.processes import _batches, require_agreement

pytestmark = pytest.mark.skipif(not find_spec("jax"), reason="several processes train on JAX")
SCRIPT = Path(__file__).parents[1] / "support" / "one_of_several.py"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "distributed.py"
LIMIT = 250  # seconds; JAX notices after 100 that a process is gone


def start(job, folder, *options):
    """Starts as many processes as there are options."""
    (port,) = free_ports(1)
    rest = [(i, len(options), port, json.dumps(o)) for i, o in enumerate(options)]
    return started(folder, [(SCRIPT, job, folder, *words) for words in rest])


def started(folder, commands):
    """Processes that write what they say into the folder, in which they run."""
    folder.mkdir(exist_ok=True)
    # Most of the time goes to compiling networks that run for a moment.
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    env = {**os.environ, "KERAS_BACKEND": "jax", **quick}
    processes = []
    for i, command in enumerate(commands):
        words = [sys.executable, *map(str, command)]
        with (folder / f"{i}.txt").open("w") as file:
            processes.append(subprocess.Popen(words, stdout=file, stderr=file, env=env, cwd=folder))
    return processes


def ended(processes):
    """Their exit codes; none of them is left."""
    try:
        return [process.wait(LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()  # what waits for another process does not heed SIGTERM


def output(folder, i):
    return (folder / f"{i}.txt").read_text()


def run(job, folder, *options):
    codes = ended(start(job, folder, *options))
    assert not any(codes), [output(folder, i) for i in range(len(options))]


def check_equal(folder, reference, but=()):
    wanted = np.load(reference / "0.npz")
    masks = [name for name in wanted if name.endswith("settled_mask")]
    assert 0 < sum(wanted[name].sum() for name in masks) < sum(wanted[n].size for n in masks)
    for i in range(2):
        found = np.load(folder / f"{i}.npz")
        assert {*found} == {*wanted}
        for name in {*wanted}.difference(but):
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-5, err_msg=name)
        for name in masks:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("gate", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(gate, tmp_path):
    one = start("train", tmp_path / "one", {"gate": gate})
    run("train", tmp_path / "two", {"gate": gate}, {"gate": gate})
    assert ended(one) == [0], output(tmp_path / "one", 0)
    check_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_one_process_may_save_within_an_epoch(tmp_path):
    options = {"saving": True}
    run("train", tmp_path / "saving", options, options)
    run("train", tmp_path / "plain", {}, {})
    check_equal(tmp_path / "saving", tmp_path / "plain")


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    dynamic = {"gate": "dynamic"}
    # Under pressure, and after the switch to the smaller network; the second is the coordinator.
    for killed, step in ((1, 7), (0, 13)):
        options = {**dynamic, "end": [killed, step, "kill"]}
        codes = ended(start("train", tmp_path / "killed", options, options))
        assert codes[killed] == -signal.SIGKILL, output(tmp_path / "killed", killed)
        assert codes[1 - killed] != 0  # the other one does not wait for ever
    for name in ("killed", "undisturbed"):
        run("train", tmp_path / name, dynamic, dynamic)
    check_equal(tmp_path / "killed", tmp_path / "undisturbed", but=["losses"])


@pytest.mark.parametrize(
    "wrong", quick([{"seed": 1}], [{"seed": 1}, {"steps": 4}]), ids=["seed", "batches"]
)
def test_processes_that_disagree_end(wrong, tmp_path):
    assert ended(start("train", tmp_path, {}, wrong)) == [1, 1]
    said = {"seed": "- seed: 0 (process 0), 1 (process 1)"}
    said["steps"] = "- data, batches per epoch: 5 (process 0), 4 (process 1)"
    for i in range(2):
        assert said[next(iter(wrong))] in output(tmp_path, i)


SAID = {
    "callbacks": ["callbacks that may look at batches: False (process 0), True (process 1)"],
    "batches": ["batches per epoch: 2 (process 0), 1 (process 1)", "x[:n]"],
    "samples": ["samples: 16 (process 0), 13 (process 1)", "x[:n]"],
    "batch size": ["batch_size: 8 (process 0), 4 (process 1)", "batches of one size"],
    "epochs": ["epochs: 1 (process 0), 2 (process 1)", "same script"],
    "validation": ["samples: nothing (process 0), 40 (process 1)", "validate together"],
    "sparsity": ["sparsity: 0.5 (process 0), 0.4 (process 1)", "same script"],
    "schedule": ["schedule's polarization: 4.0 (process 0), 5.0 (process 1)", "same script"],
    "optimizer": ["optimizer's beta_1: 0.9 (process 0), 0.8 (process 1)", "same script"],
    "weights": ["weights (checksum): ", "set_random_seed"],
    "masks": ["masks (checksum): ", "same script"],
    "one without distribution": ["nothing (process 1)", "set_distribution"],
    "none with distribution": ["received None", "set_distribution"],
    "seed": ["my script: ", "seed: 0 (process 0), 1 (process 1)"],
    "backup": ["['no backup'] (process 0), [3] (process 1)", "Copy the whole folder"],
    "no number": ["nobody knows how many batches", "steps_per_epoch"],  # a warning
    "stop": ["after epoch 1", "stop: False (process 0), True (process 1)"],
    "sizes": ["after epoch 1", "seen in loss: ", "drop_remainder=True"],
}


@pytest.mark.slow
def test_every_process_says_what_they_disagree_about(tmp_path):
    run("disagree", tmp_path, {}, {})
    found, other = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert found == other
    assert found.pop("backup, copied") == ""  # the remedy helped
    assert {*found} == {*SAID}
    for name, texts in SAID.items():
        for text in texts:
            assert text in found[name], name


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_example(count, tmp_path):
    (port,) = free_ports(1)
    meeting = (f"--coordinator=localhost:{port}", f"--processes={count}")
    which = [(*meeting, f"--process_id={i}") for i in range(count)] if count > 1 else [()]
    options = "--epochs=4", "--backup_dir=backup"
    codes = ended(started(tmp_path, [(EXAMPLE, *options, *words) for words in which]))
    assert not any(codes), [output(tmp_path, i) for i in range(count)]
    assert "Epoch 4/4" in output(tmp_path, 0)
    assert "+0.00 points" in output(tmp_path, 0)
    small = keras.models.load_model(tmp_path / "distributed_output" / "small.keras")
    assert f"{small.count_params():,}" in output(tmp_path, 0)


class Pieces(keras.utils.PyDataset):
    def __getitem__(self, index):
        return np.zeros((8, 6)), np.zeros(8)


class Seven(Pieces):
    def __len__(self):
        return 7


@pytest.mark.parametrize(
    ("x", "options", "count"),
    [
        (np.zeros((20, 6)), {}, 1),
        ({"a": np.zeros((65, 6)), "b": np.zeros((65, 2))}, {}, 3),
        (np.zeros((20, 6)), {"batch_size": 8}, 3),
        (np.zeros((20, 6)), {"batch_size": 8, "steps_per_epoch": 2}, 2),
        (Seven(), {}, 7),
        (Pieces(), {}, None),
        (iter(()), {}, None),
        (iter(()), {"steps_per_epoch": 5}, 5),
    ],
)
def test_batches_are_counted_where_they_are_known(x, options, count):
    assert _batches(x, options, "batch_size", "steps_per_epoch") == count


def test_batches_of_datasets_are_counted():
    data = pytest.importorskip("tensorflow").data.Dataset.range(20).batch(8)
    for dataset, count in ((data, 3), (data.repeat(), None), (data.filter(lambda _: True), None)):
        assert _batches(dataset, {}, "batch_size", "steps_per_epoch") == count


def test_one_process_agrees_with_itself():
    require_agreement({"seed": 0})
