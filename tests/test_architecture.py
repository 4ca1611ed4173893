"""The house has one way up: what may import what, and where Keras and the backends are known."""

import ast
from pathlib import Path

import pytest

import keras_polar

HOUSE = Path(keras_polar.__file__).parent
# A part imports itself and those above it in this list.
ORDER = (
    "_version tables backends processes graph rules coupling costs selection gates surgery litert "
    "training inspection importances plots callbacks cli __init__ __main__"
).split()
# What decides about masks computes with NumPy alone.
PLAIN = ("selection/budget.py", "selection/equal.py", "selection/select.py")
LONGEST = 60  # lines of a function


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


MODULES = {p.relative_to(HOUSE): parse(p) for p in sorted(HOUSE.rglob("*.py"))}


def part(path):
    return path.parts[0].removesuffix(".py")


def imported(tree):
    """Dotted names of modules that a tree imports, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{a.name}" for a in node.names)


def too_high(path, tree):
    """Imports of parts further down the list."""
    found = (n.split(".") for n in imported(tree) if n.startswith("keras_polar."))
    parts = {names[1] for names in found if names[1] in ORDER}
    return sorted(p for p in parts if ORDER.index(p) > ORDER.index(part(path)))


def private_to_keras(path, tree):
    """Imports of `keras.src`, and attributes with an underscore of what is not the library's."""
    if part(path) == "graph" or path.as_posix() == "training/keras_hooks.py":
        return []
    return [n for n in imported(tree) if n.startswith("keras.src")] + [
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute)
        and n.attr.startswith("_")
        and not n.attr.startswith("__")
        and n.attr not in OWN_NAMES
    ]


def is_own_attribute(node):
    """`self.x = ...`: what the library's own classes assign."""
    is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return is_set and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def is_field(node):
    """`_x: int = 0` of a dataclass."""
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


NODES = [node for tree in MODULES.values() for node in ast.walk(tree)]
OWN_NAMES = {n.name for n in NODES if hasattr(n, "name")}
OWN_NAMES |= {n.attr for n in NODES if is_own_attribute(n)}
OWN_NAMES |= {n.target.id for n in NODES if is_field(n)}


def backend_asked(path, tree):
    """Calls of `keras.backend.backend()`."""
    return [
        ast.unparse(n)
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("backend.backend")
        if path.as_posix() != "backends.py"
    ]


def backends_imported(path, tree):
    """Imports of TensorFlow, JAX or PyTorch outside of what knows them."""
    libraries = {"tensorflow", "jax", "torch", "tf_keras", "tensorflow_model_optimization"}
    may = path.as_posix() == "backends.py" or part(path) == "litert"
    return [] if may else [n for n in imported(tree) if n.split(".")[0] in libraries]


def not_plain(path, tree):
    """What NumPy code imports besides."""
    other = ("keras.", "tensorflow")
    return [n for n in imported(tree) if path.as_posix() in PLAIN and n.startswith(other)]


def undocumented(path, tree):
    return [] if ast.get_docstring(tree) or not tree.body else ["no docstring"]


def too_long(path, tree):
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    return [n.name for n in functions if n.end_lineno - body_start(n) >= LONGEST]


def body_start(function):
    """The line behind a function's signature and docstring."""
    first = function.body[0]
    return first.end_lineno + 1 if ast.get_docstring(function) else first.lineno


CHECKS = [
    too_high,
    private_to_keras,
    backend_asked,
    backends_imported,
    not_plain,
    undocumented,
    too_long,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_the_house(check):
    found = {p.as_posix(): broken for p, tree in MODULES.items() if (broken := check(p, tree))}
    assert not found, f"{check.__doc__ or check.__name__}: {found}"


def test_every_part_has_a_place():
    assert {part(p) for p in MODULES} == set(ORDER)


PLANTED = [
    (too_high, "graph/ir.py", "from keras_polar.rules.registry import rule_for"),
    (too_high, "rules/rule.py", "from keras_polar.coupling.coupling import couple"),
    (too_high, "coupling/coupling.py", "import keras_polar.costs.count"),
    (too_high, "costs/count.py", "from keras_polar.selection import budget"),
    (too_high, "selection/select.py", "from keras_polar.gates.gate import Gate"),
    (too_high, "gates/gate.py", "def f():\n    from keras_polar.surgery.cut import cut"),
    (too_high, "surgery/convert.py", "from keras_polar import litert"),
    (too_high, "litert/export.py", "from keras_polar.training.model import GatedModel"),
    (too_high, "training/apply.py", "from keras_polar.inspection import inspect"),
    (too_high, "backends.py", "from keras_polar.graph.ir import Ref"),
    (private_to_keras, "rules/rule.py", "from keras.src import backend"),
    (private_to_keras, "training/loop.py", "def f(layer):\n    return layer._inbound_nodes"),
    (backend_asked, "training/loop.py", "import keras\nx = keras.backend.backend() == 'jax'"),
    (backends_imported, "gates/gate.py", "def f():\n    import tensorflow as tf"),
    (backends_imported, "processes.py", "import jax"),
    (not_plain, "selection/select.py", "from keras import ops"),
    (undocumented, "rules/new.py", "x = 1"),
    (too_long, "rules/new.py", "def f():\n" + "    x = 1\n" * 61),
]


@pytest.mark.parametrize(("check", "path", "code"), PLANTED)
def test_what_does_not_belong_is_noticed(check, path, code):
    assert check(Path(path), ast.parse(code))
