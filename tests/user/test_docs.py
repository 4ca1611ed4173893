"""What README.md and docs/ show is true: snippets run, and the commands that they name exist.

The ```python blocks of a page run in order, in one namespace and an empty folder. The names that
pages take for granted, `prepared` makes: a tiny classifier `model`, its data `x`, `y`,
`x_test`, `y_test`, and for custom loops `n` pairs `batches`, `tf`, `loss_fn` and `optimizer`.
Nothing is compiled by XLA, which takes longer than these trainings; other tests do that.
"""

import ast
import contextlib
import importlib.util
import re
import shlex
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import randomise

from keras_polar import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page):
    """Pairs (line before the code, code); what is the README's runs with the README."""
    text, known = page.read_text(), page != PAGES[0] and PAGES[0].read_text()
    found = [(text[: m.start(1)].count("\n"), m[1]) for m in PYTHON.finditer(text)]
    return [(line, code) for line, code in found if not known or code not in known]


# --- Python ----------------------------------------------------------------------------------


def network():
    """A residual block between a stem and a head, 8 and 16 channels."""
    layers = keras.layers

    def conv(x, name, width=8):
        return layers.Conv2D(width, 3, padding="same", use_bias=False, name=name)(x)

    inputs = keras.Input((8, 8, 1))
    x = layers.ReLU()(layers.BatchNormalization(name="bn")(conv(inputs, "stem")))
    y = conv(layers.ReLU()(conv(x, "conv1", 16)), "conv2")
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(layers.Add()([x, y])))
    return randomise(keras.Model(inputs, layers.Dense(3, "softmax", name="head")(x)))


def prepared():
    """The names that pages take for granted."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    x, x_test = (rng.random((count, 8, 8, 1), "float32") for count in (64, 16))
    y, y_test = rng.integers(0, 3, 64), rng.integers(0, 3, 16)
    data = {"x": x, "y": y, "x_test": x_test, "y_test": y_test}
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    loss_fn = keras.losses.SparseCategoricalCrossentropy()
    loop = {"batches": batches, "n": len(batches), "loss_fn": loss_fn, "tf": tf}
    return {"model": network(), **data, **loop, "optimizer": keras.optimizers.Adam()}


def can_run(code):
    """Whether the extra that a snippet needs is installed."""
    return "tf_keras" not in code or importlib.util.find_spec("tensorflow_model_optimization")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="pages use TensorFlow as well")
@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("keras.src.trainers.trainer.model_supports_jit", lambda _: False)
    names = prepared()
    for line, code in snippets(page):
        if can_run(code):
            # The empty lines in front make the lines of a traceback those of the page.
            exec(compile("\n" * line + code, str(page), "exec"), names)


# --- commands --------------------------------------------------------------------------------

INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
SHELL = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
STARTS = ("make", "python", "keras_polar", "pip")


def commands(page):
    """The shell commands of a page, each a list of words."""
    text = PYTHON.sub("", page.read_text())
    lines = [line for m in SHELL.finditer(text) for line in m[1].splitlines()]
    text = SHELL.sub("", text)
    lines += [line for m in INDENTED.finditer(text) for line in m[0].splitlines()]
    lines += [" ".join(m[1].split()) for m in INLINE.finditer(INDENTED.sub("\n", text))]
    return [w for w in map(words, lines) if len(w) > 1 and w[0] in STARTS]


def words(line):
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # prose or code with a lone quote
        return []


def check_make(targets):
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {t for t in targets if "=" not in t} <= {*known}


def check_python(arguments):
    script, *flags = arguments
    if script == "-m":
        return check_module(*flags)
    calls = [n for n in ast.walk(ast.parse((ROOT / script).read_text())) if isinstance(n, ast.Call)]
    firsts = [n.args[0] for n in calls if n.args]
    # Flags are defined by calls of DEFINE_ functions and their partials: name, default, help.
    known = {a.value for a in firsts if isinstance(a, ast.Constant)}
    for flag in flags:
        assert flag.startswith("--"), flag
        assert flag[2:].split("=")[0] in known, f"{script} has no {flag}"


def check_module(module, *arguments):
    assert module == "keras_polar"
    check_keras_polar(arguments)


def check_keras_polar(arguments):
    is_help = contextlib.suppress(SystemExit) if "--help" in arguments else contextlib.nullcontext()
    with is_help:
        cli.parser().parse_args([*arguments])


def check_pip(arguments):
    extras = re.findall(r'^        "([a-z]+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE)
    wanted = [name for a in arguments for m in re.findall(r"\[(.*)\]", a) for name in m.split(",")]
    assert {*wanted} <= {*extras}


CHECKS = {
    "make": check_make,
    "python": check_python,
    "keras_polar": check_keras_polar,
    "pip": check_pip,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page):
    for command, *arguments in commands(page):
        CHECKS[command](arguments)


def test_commands_are_found():
    found = {command[0] for command in commands(ROOT / "README.md")}
    assert found == {*STARTS}


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (check_make, ["no-such-target"]),
        (check_python, ["examples/cifar10.py", "--no_such_flag=1"]),
        (check_python, ["examples/no_such_script.py"]),
        (check_keras_polar, ["export", "a.keras", "b.tflite", "--no_such_flag"]),
        (check_pip, ["install", "keras_polar[nothing]"]),
    ],
)
def test_wrong_commands_are_noticed(check, wrong):
    with pytest.raises((AssertionError, FileNotFoundError, SystemExit)):
        check(wrong)
