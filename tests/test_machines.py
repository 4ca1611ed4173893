"""Several processes of JAX: one network, a resumed run, and errors in words instead of waiting."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers import free_ports

pytestmark = pytest.mark.skipif(not find_spec("jax"), reason="several processes train on JAX")
SCRIPT = Path(__file__).with_name("one_of_several.py")
LIMIT = 250  # seconds; JAX notices after 100 that a process is gone


def start(job, folder, *options):
    """Starts as many processes as there are options."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "KERAS_BACKEND": "jax"}
    (port,) = free_ports(1)
    processes = []
    for i, chosen in enumerate(options):
        words = job, folder, i, len(options), port, json.dumps(chosen)
        with (folder / f"{i}.txt").open("w") as file:
            command = [sys.executable, str(SCRIPT), *map(str, words)]
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=env))
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
        options = {**dynamic, "kill": [killed, step]}
        codes = ended(start("train", tmp_path / "killed", options, options))
        assert codes[killed] == -signal.SIGKILL, output(tmp_path / "killed", killed)
        assert codes[1 - killed] != 0  # the other one does not wait for ever
    for name in ("killed", "undisturbed"):
        run("train", tmp_path / name, dynamic, dynamic)
    check_equal(tmp_path / "killed", tmp_path / "undisturbed", but=["losses"])


@pytest.mark.parametrize("wrong", [{"seed": 1}, {"steps": 4}], ids=["seed", "batches"])
def test_processes_that_disagree_end(wrong, tmp_path):
    assert ended(start("train", tmp_path, {}, wrong)) == [1, 1]
    said = {"seed": "- seed: 0 (process 0), 1 (process 1)"}
    said["steps"] = "- data, batches per epoch: 5 (process 0), 4 (process 1)"
    for i in range(2):
        assert said[next(iter(wrong))] in output(tmp_path, i)


SAID = {
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
