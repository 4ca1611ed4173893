"""The examples use what is public: who copies from them does not have to reach inside."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

import keras_polar

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
# The modules that the page's head speaks of, and what it documents of them.
MODULES = set(re.findall(r"`keras_polar\.([a-z_]+)`", API.split("\n## ")[0]))
ENTRIES = dict(re.findall(r"^::: (\S+)\n((?:    .*\n)*)", API, re.MULTILINE))


def sources():
    """Path -> code of the scripts and notebooks."""
    for path in sorted(EXAMPLES.rglob("*.py")):
        yield path, path.read_text(encoding="utf-8")
    for path in sorted(EXAMPLES.rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        yield path, re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join(code), flags=re.MULTILINE)


def imports(tree):
    """(dotted name, the name it is known by) of what is imported from the package, wherever."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(a.name, a.asname or a.name.split(".")[0]) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [(f"{node.module}.{a.name}", a.asname or a.name) for a in node.names]
        else:
            continue
        yield from (pair for pair in found if pair[0].split(".")[0] == "keras_polar")


def attributes(tree):
    """`keras_polar.x.y` wherever it is read, as dotted names."""
    texts = (ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    return (t for t in texts if re.fullmatch(r"keras_polar(\.\w+)+", t))


def is_public(dotted):
    """Whether a name of the package, or one in a module of it, is one that users may rely on."""
    _, *names = dotted.split(".")
    if names and names[0] in MODULES:
        return not names[1:] or names[1] in public_in(names[0])
    return not names or names[0] in keras_polar.__all__  # what that has is its own affair


def public_in(module):
    """Names of a public module: those that it exports, and those that the page has."""
    path = f"keras_polar.{module}"
    exported = getattr(importlib.import_module(path), "__all__", ())
    listed = re.findall(r"members: \[(.*)\]", ENTRIES.get(path, ""))
    alone = (e.removeprefix(f"{path}.") for e in ENTRIES if e.startswith(f"{path}."))
    return {*exported, *re.findall(r"\w+", "".join(listed)), *alone}


def private(tree):
    """What is used of the package and not public."""
    used = {*(dotted for dotted, _ in imports(tree)), *attributes(tree)}
    return sorted(name for name in used if not is_public(name))


def patched(tree):
    """Assignments to attributes of the package, of its modules and of what is imported from it."""
    own = {name for _, name in imports(tree)}
    return sorted(ast.unparse(n) for n in targets(tree) if root(n) in own)


def targets(tree):
    for node in ast.walk(tree):
        changed = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        if changed and isinstance(node, (ast.Attribute, ast.Subscript)):
            yield node
        elif isinstance(node, ast.Call) and node.args and setter(node.func):
            yield node.args[0]


def setter(function):
    return ast.unparse(function).split(".")[-1] in ("setattr", "delattr", "setitem", "object")


def root(node):
    """The name that a chain of attributes and subscripts begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return getattr(node, "id", None)


@pytest.mark.parametrize("check", [private, patched], ids=lambda f: f.__name__)
def test_examples_use_what_is_public(check):
    found = {
        str(path.relative_to(EXAMPLES)): names
        for path, code in sources()
        if (names := check(ast.parse(code, str(path))))
    }
    assert not found, f"{check.__doc__} {found}"


def test_there_are_examples_and_public_modules():
    assert len(list(sources())) > 20
    assert {"callbacks", "importances", "plots", "processes", "rules"} <= MODULES


PLANTED = [
    (private, "from keras_polar.costs.measures import MEASURES"),
    (private, "def f():\n    import keras_polar.gates.gate as gate"),
    (private, "from keras_polar import backends"),
    (private, "from keras_polar.rules import elementwise"),
    (private, "import keras_polar\nkeras_polar.training.compaction.Compaction"),
    (private, "import keras_polar\nkeras_polar.importances.gate_gradients"),
    (patched, "import keras_polar\nkeras_polar.plots.widths = None"),
    (patched, "from keras_polar import rules\nrules.REGISTRY['x'] = 1"),
    (patched, "from keras_polar import GatedModel as G\ndel G.fit"),
    (patched, "from keras_polar import plots\nsetattr(plots, 'widths', None)"),
    (patched, "import keras_polar\nmock.patch.object(keras_polar.plots, 'widths')"),
]


@pytest.mark.parametrize(("check", "code"), PLANTED)
def test_what_is_not_public_is_noticed(check, code):
    assert check(ast.parse(code))


ALLOWED = [
    "import keras_polar\ngated = keras_polar.apply(model)\ngated.name = 'x'",
    "from keras_polar.rules import CostTerm",
    "from keras_polar.processes import require_agreement",
    "from keras_polar import importances\nimportances.Fisher",
    "import keras_polar\nkeras_polar.plots.widths\nkeras_polar.callbacks.OpenRates",
    "import keras_polar\nkeras_polar.LatencyTable.load('x')",
]


@pytest.mark.parametrize("code", ALLOWED)
def test_what_is_public_may_be_used(code):
    tree = ast.parse(code)
    assert not private(tree)
    assert not patched(tree)
