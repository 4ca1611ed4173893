"""A run that is killed in every phase and resumed ends with the numbers of an undisturbed one."""

import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="slow; one backend will do"),
]
SCRIPT = Path(__file__).parents[1] / "support" / "interrupted_run.py"
# When the run is killed, in the middle of an epoch -> after which step. The smaller network takes
# over between steps 48 and 49.
KILLED = {"warm-up": 13, "pressure": 27, "at the switch": 48, "just after it": 49, "after": 65}


def run(folder, gate, step=0):
    """The exit code; a process that a signal ends has its negative number."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(folder), gate, str(step)]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode


@pytest.mark.parametrize("gate", ["static", "dynamic"])
def test_killed_and_resumed(gate, tmp_path):
    for phase, step in KILLED.items():
        assert run(tmp_path / "killed", gate, step) == -signal.SIGKILL, phase
    for folder in (tmp_path / "killed", tmp_path / "undisturbed"):
        assert run(folder, gate) == 0
    killed, undisturbed = (np.load(tmp_path / n / "final.npz") for n in ("killed", "undisturbed"))
    assert killed["consensus/step"] == undisturbed["consensus/step"] == 80
    masks = [name for name in undisturbed if name.endswith("settled_mask")]
    assert 0 < sum(undisturbed[name].sum() for name in masks) < 40
    assert {*killed} == {*undisturbed}
    for name in undisturbed:
        np.testing.assert_array_equal(killed[name], undisturbed[name], err_msg=name)
