"""The notebooks of examples/colab: well formed, in step with the library, and they run.

The slow test runs them with KERAS_POLAR_SMOKE=1. What C++ code writes to the process's own error
stream (start-up notes of TensorFlow) is not captured; Python's warnings are, and fail the test.
"""

import ast
import inspect
import json
import operator
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import keras_polar

COLAB = Path(__file__).resolve().parents[2] / "examples" / "colab"
REPOSITORY = "https://colab.research.google.com/github/keras-polar/keras_polar/blob/main"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
MAX_BYTES = 300_000
DOTTED = re.compile(r"keras_polar(\.\w+)+")
MACHINE_PATH = re.compile(r"(/(home|root|tmp|work|usr|opt|mnt|var|Users)/|site-packages|[A-Z]:\\)")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def calls_and_names(notebook):
    """Syntax nodes of all code cells; lines for IPython become `pass`."""
    text = "\n".join(cell.source for cell in code_cells(notebook))
    return [*ast.walk(ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", text, flags=re.MULTILINE)))]


def resolve(dotted):
    return operator.attrgetter(dotted.removeprefix("keras_polar."))(keras_polar)


def without_pictures(outputs):
    return json.dumps(
        [{**o, "data": {**o.get("data", {}), "image/png": ""}} for o in outputs], default=str
    )


def kinds(notebook):
    """Cell -> what it shows: ("stdout",), ("image/png", "text/plain"), ..."""
    return {
        cell.id: [(o.get("name"), *sorted(o.get("data", {}))) for o in cell.outputs]
        for cell in code_cells(notebook)
    }


def assert_no_complaints(notebook):
    """No traceback and nothing on the error stream, where Python's warnings appear."""
    outputs = [o for cell in code_cells(notebook) for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_all_are_there():
    names = ["quickstart", "tflite_deployment", "transfer_learning"]
    assert [path.stem for path in NOTEBOOKS] == names
    readme = (COLAB.parents[1] / "README.md").read_text(encoding="utf-8")
    for name in names:
        assert f"({REPOSITORY}/examples/colab/{name}.ipynb)" in readme


@every_notebook
def test_is_well_formed(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    assert f"({REPOSITORY}/examples/colab/{path.name})" in notebook.cells[0].source
    assert "KERAS_POLAR_SMOKE" in "".join(cell.source for cell in code_cells(notebook))


@every_notebook
def test_outputs_are_those_of_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == [*range(1, len(counts) + 1)]
    assert_no_complaints(notebook)
    assert any("image/png" in kind for shown in kinds(notebook).values() for kind in shown)
    assert not any(cell.metadata for cell in notebook.cells)
    for cell in code_cells(notebook):
        assert MACHINE_PATH.search(without_pictures(cell.outputs)) is None


@every_notebook
def test_names_and_arguments_exist(path):
    nodes = calls_and_names(nbformat.read(path, as_version=4))
    attributes = (ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute))
    names = {name for name in attributes if DOTTED.fullmatch(name)}
    assert {"keras_polar.apply", "keras_polar.convert", "keras_polar.export_tflite"} <= names
    for name in names:
        resolve(name)
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        if DOTTED.fullmatch(name := ast.unparse(call.func)):
            given = {word.arg: None for word in call.keywords}
            inspect.signature(resolve(name)).bind(*call.args, **given)


@pytest.mark.slow
@every_notebook
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_POLAR_SMOKE", "1")
    notebook = nbformat.read(path, as_version=4)
    shown = kinds(notebook)
    nbclient.NotebookClient(
        notebook,
        timeout=900,  # per cell; on two busy cores one of MobileNet takes minutes
        resources={"metadata": {"path": str(tmp_path)}},
        extra_arguments=["--IPKernelApp.capture_fd_output=False"],
    ).execute()
    assert_no_complaints(notebook)
    assert kinds(notebook) == shown
