"""What README.md and docs/ show is true: snippets run, and the commands that they name exist.

The ```python blocks of a page run in order, in one namespace and an empty folder. The names that
pages take for granted, `prepared` makes: a tiny classifier `model`, its data `x`, `y`,
`x_test`, `y_test`, and for custom loops `n` pairs `batches`, `tf`, `loss_fn` and `optimizer`.
Nothing is compiled by XLA, which takes longer than these trainings; other tests do that.
"""

import ast
import contextlib
import importlib.util
import pydoc
import re
import shlex
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import randomise

import keras_polar
from keras_polar import cli

ROOT = Path(__file__).resolve().parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
CONTRIBUTING = DOCS / "CONTRIBUTING.md"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page):
    """Pairs (line before the code, code); what is the README's runs with the README."""
    text, known = page.read_text(), page != README and README.read_text()
    found = [(text[: m.start(1)].count("\n"), m[1]) for m in PYTHON.finditer(text)]
    return [(line, code) for line, code in found if not known or code not in known]


def sections(page):
    """Title of each part of a page -> its snippets, as `snippets` gives them."""
    lines, found = page.read_text().splitlines(), {}
    for line, code in snippets(page):
        title = next(x for x in lines[line::-1] if x.startswith("## "))
        found.setdefault(title.strip("# "), []).append((line, code))
    return found


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


# Word in a snippet -> the package of an extra that it needs.
NEEDS = {"tf_keras": "tensorflow_model_optimization", "keras_hub": "keras_hub"}


def can_run(code):
    """Whether the extra that a snippet needs is installed."""
    return all(importlib.util.find_spec(m) for word, m in NEEDS.items() if word in code)


def names_of(code, context):
    """Names that a snippet reads (`ast.Load`) or makes (`ast.Store`)."""
    nodes = [*ast.walk(ast.parse(code))]
    found = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context)}
    imports = [a for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]
    return found | {a.asname or a.name for a in imports if context is ast.Store}


def run(page, code_of_page):
    names = {"__name__": page.stem, **prepared()}
    for line, code in code_of_page:
        if can_run(code):
            # The empty lines in front make the lines of a traceback those of the page.
            exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("keras.src.trainers.trainer.model_supports_jit", lambda _: False)


on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="pages use TensorFlow as well"
)


@on_tensorflow
@pytest.mark.usefixtures("empty_folder")
@pytest.mark.filterwarnings("ignore:apply. the gated model is the network of:UserWarning")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if snippets(p) and p != CONTRIBUTING], ids=lambda p: p.name
)
def test_snippets_run(page):
    run(page, snippets(page))


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_without_an_extra_do_not_need_one_that_has_it(page):
    made, of_extras = set(), set()
    for _, code in snippets(page):
        own = names_of(code, ast.Store)
        if any(word in code for word in NEEDS):
            of_extras |= own - made
        else:
            assert not names_of(code, ast.Load) & of_extras - own
            made, of_extras = made | own, of_extras - own


@on_tensorflow
@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("title", sections(CONTRIBUTING))
def test_each_how_to_runs_by_itself(title):
    run(CONTRIBUTING, sections(CONTRIBUTING)[title])


def test_how_tos_use_public_names():
    trees = [ast.parse(code) for _, code in snippets(CONTRIBUTING)]
    nodes = [n for tree in trees for n in ast.walk(tree)]
    modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    assert "keras_polar" in modules
    assert not [m for m in modules if "._" in m or m.startswith("keras.src")]
    assert not [n for n in names if n.startswith("_") and not n.startswith("__")]


# --- the start page --------------------------------------------------------------------------

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# What a code block of the site shows without being scrolled.
WIDTH = 80
MEASURED = re.compile(r"\d[\d,.]*\s*(?:%|points?\b|times\b|x\b|ms\b|kB\b|weights\b|bytes\b)")


@pytest.mark.parametrize("page", [README, DOCS / "index.md"], ids=lambda p: p.name)
def test_code_is_not_cut_off(page):
    text = page.read_text()
    lines = [line for m in FENCED.finditer(text) for line in m[0].splitlines()]
    lines += [line for m in INDENTED.finditer(FENCED.sub("", text)) for line in m[0].splitlines()]
    assert lines
    assert not [line for line in lines if len(line) > WIDTH]


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


# --- measured numbers ------------------------------------------------------------------------


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = loaded(ROOT / "examples" / "benchmarks" / "pages.py")


def test_pages_have_results():
    assert {README, DOCS / "index.md", DOCS / "benchmarks" / "summary.md"} <= {*results.pages()}
    used = {m[2] for p in results.pages() for m in results.BLOCK.finditer(p.read_text())}
    assert used == {*results.BLOCKS}


@pytest.mark.parametrize("page", results.pages(), ids=lambda p: p.name)
def test_results_are_up_to_date(page):
    assert page.read_text() == results.written(page.read_text()), "run `make results`"


def test_old_results_are_noticed():
    text = README.read_text()
    old = re.sub(r"(\*\*keras_polar\*\* \|) [\d.]+", r"\1 99.9", text)
    assert old != text == results.written(old)


@pytest.mark.parametrize(
    "page", [README, DOCS / "index.md", DOCS / "benchmarks" / "summary.md"], ids=lambda p: p.name
)
def test_measured_numbers_stand_in_blocks(page):
    prose = results.BLOCK.sub("", FENCED.sub("", page.read_text()))
    assert not MEASURED.findall(prose)


# --- pages about the code --------------------------------------------------------------------


def entries():
    """What the API page documents: dotted path -> the members that it lists."""
    text = (DOCS / "api.md").read_text()
    found = re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.MULTILINE)
    return {path: re.findall(r"\w+", "".join(_members(options))) for path, options in found}


def _members(options):
    return re.findall(r"members: \[(.*)\]", options)


def test_api_page_has_every_public_name():
    documented = [pydoc.locate(path) for path in entries()]
    # A module is documented as a whole or by what is in it.
    modules = {*entries(), *(path.rpartition(".")[0] for path in entries())}
    missing = [
        name
        for name in keras_polar.__all__
        if not any(getattr(keras_polar, name) is thing for thing in documented)
        if f"keras_polar.{name}" not in modules
    ]
    assert missing == ["__version__"]  # the page says it in words


@pytest.mark.parametrize("path", entries())
def test_api_page_has_nothing_else(path):
    thing = pydoc.locate(path)
    assert thing is not None
    assert not [m for m in entries()[path] if not hasattr(thing, m)]


def test_architecture_page_knows_every_part():
    package = ROOT / "keras_polar"
    lines = (DOCS / "architecture.md").read_text().splitlines()
    rows = [re.findall(r"`([\w/.]+)`", line) for line in lines if line.startswith("| `")]
    files = [name for row in rows for name in row if "/" in name or name.endswith(".py")]
    assert not [name for name in files if not (package / name).exists()]
    parts = {p.name for p in package.glob("[a-z]*") if p.is_dir() or p.suffix == ".py"}
    assert {row[0].rstrip("/") for row in rows} - {"graph/symbolic"} == parts


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


def with_siblings(script):
    """A script and those beside it that it imports: their flags are its own."""
    tree = ast.parse(script.read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    paths = [path for name in names if (path := script.with_name(f"{name}.py")).exists()]
    return [tree, *(ast.parse(path.read_text()) for path in paths)]


def check_python(arguments):
    script, *flags = arguments
    if script == "-m":
        return check_module(*flags)
    nodes = [n for tree in with_siblings(ROOT / script) for n in ast.walk(tree)]
    firsts = [n.args[0] for n in nodes if isinstance(n, ast.Call) and n.args]
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
