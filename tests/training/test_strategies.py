"""Strategies of tf.distribute that need a process of their own: the same weights, or an error."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from helpers import free_ports

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute"),
]
SCRIPT = Path(__file__).parents[1] / "support" / "under_strategy.py"


def start(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process):
    out, error = process.communicate(timeout=300)
    assert out, error
    return json.loads(out.splitlines()[-1])


def test_central_storage_trains_as_one_device():
    found = result(start("central_storage"))
    assert found["plain"] <= 1e-5
    assert found["gated"] <= 1e-5


def test_one_worker_trains_as_one_device():
    found = result(start("multi_worker", 0, *free_ports(1)))
    assert found["plain"] <= 1e-5
    assert found["gated"] <= 1e-5


def check_refused(found, what):
    # Once this fails, Keras has learned it: take the refusal out of keras_polar.distribute.
    assert isinstance(found["plain"], str)
    assert found["gated"].startswith(
        f"NotImplementedError: fit of 'network': Keras {keras.__version__}"
    )
    assert f"cannot train under {what}" in found["gated"]
    assert "MirroredStrategy on one machine" in found["gated"]


def test_two_workers_are_refused():
    ports = free_ports(2)
    for process in [start("multi_worker", i, *ports) for i in range(2)]:
        check_refused(result(process), "MultiWorkerMirroredStrategy with 2 workers")


def test_a_parameter_server_is_refused():
    check_refused(result(start("parameter_server", 0, *free_ports(2))), "ParameterServerStrategy")
