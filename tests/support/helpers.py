"""What several tests need: models whose nothing is zero by luck, random masks, the certificate."""

import socket
import subprocess
import sys
import tempfile
import types

import keras
import numpy as np
import pytest

import keras_polar
from keras_polar.graph.keras_private import is_from_keras
from keras_polar.surgery.certificate import difference, random_inputs


def quick(chosen, every):
    """The cases of a sweep, those that are not chosen marked as slow."""
    return [
        x if x in chosen else pytest.param(*_arguments(x), marks=pytest.mark.slow) for x in every
    ]


def _arguments(case):
    return case if isinstance(case, tuple) else (case,)


def randomise(model, seed=0):
    """Random weights, biases and BatchNorm statistics that keep activations in a sane range."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if len(weight.shape) != 1 and not any(x in weight.path for x in ("variance", "gamma")):
            continue
        noise = 0.1 * rng.standard_normal(weight.shape)
        if "variance" in weight.path:
            weight.assign(1 + np.abs(noise))
        elif "gamma" in weight.path:
            weight.assign(1 + noise)
        else:
            weight.assign(noise)
    return model


def close_half(gated, seed=0):
    """Random masks that close half of every group."""
    rng = np.random.default_rng(seed)
    for group in gated.groups:
        group.set_mask(rng.permutation(group.units) < group.units // 2)


def check(model, gate="static", seed=0, inputs=None):
    """apply: same outputs; random masks, convert: certificate, cost predicted == cost counted."""
    gated = keras_polar.apply(model, 0.01, gate=gate, measure="units")
    inputs = random_inputs(model) if inputs is None else inputs
    assert difference(model, gated, inputs) <= 1e-4  # all gates are open
    close_half(gated, seed)
    small = keras_polar.convert(gated)
    assert difference(gated, small, inputs) <= 1e-4
    counts = [int(g.mask.sum()) for g in gated.groups]
    counted = keras_polar.cost(small)
    for measure in ("weights", "macs", "units"):
        assert predicted(model, counts, measure) == getattr(counted, measure), measure
    assert counted.weights == small.count_params()
    assert gated.sparsity > 0
    for pruned in (gated, small):
        check_file(pruned, model, inputs)
    return gated, small


def check_file(pruned, model, inputs):
    """Saved and loaded it computes the same; at least if the model that it comes from can be."""
    try:
        loaded = saved_and_loaded(pruned)
    except Exception:
        if can_be_saved(model):
            raise
    else:
        assert difference(pruned, loaded, inputs) <= 1e-6


def named_in(layer):
    """What a layer's file has names for that Keras does not know: its class, and its functions."""
    kind = type(layer)
    # Keras has a layer and an operation that are both called Add.
    if not is_from_keras(layer) and keras.saving.get_registered_name(kind) == kind.__name__:
        yield kind.__name__, kind
    names = ("activation", "recurrent_activation", "function", "call_function")
    for function in (getattr(layer, name, None) for name in names):
        if isinstance(function, types.FunctionType):
            yield function.__name__, function


def can_be_saved(model):
    try:
        saved_and_loaded(model)
    except Exception:
        return False
    return True


def saved_and_loaded(model, knows=True):
    """A model from its file, where classes and functions of tests are known, or not."""
    known = {k: v for x in model._flatten_layers() for k, v in named_in(x) if knows}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.keras"
        model.save(path)
        return keras.models.load_model(path, known, compile=False, safe_mode=not knows)


def check_loads_alone(small, tmp_path):
    """The saved model gives the same outputs in a process that never imports keras_polar."""
    small.save(tmp_path / "small.keras")
    x = random_inputs(small)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", small.predict(x, verbose=0))
    code = (
        "import sys, keras, numpy as np; m = keras.models.load_model('small.keras');"
        "y = m.predict(np.load('x.npy'), verbose=0);"
        "assert np.allclose(y, np.load('y.npy'), atol=1e-6);"
        "assert 'keras_polar' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def predicted(model, counts, measure):

    from keras_polar.costs.measures import MEASURES, cost_of
    from keras_polar.coupling.coupling import analyze

    return cost_of(analyze(model), MEASURES[measure])(counts)


def model_of(*steps, shape=(5, 8)):
    """Steps between a Dense layer, whose units can go, and a head."""
    inputs = keras.Input(shape)
    x = keras.layers.Dense(8, activation="tanh", name="before")(inputs)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(keras.layers.Flatten()(x)))


def small_resnet(input_shape=(8, 8, 1), widths=(8, 16), classes=10):
    """Two residual stages with projection shortcuts; BatchNorm that settles within few steps."""
    layers = keras.layers

    def conv(x, width, size, stride, name):
        options = {"padding": "same", "use_bias": False, "name": name}
        x = layers.Conv2D(width, size, strides=stride, **options)(x)
        return layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)

    inputs = keras.Input(input_shape)
    x = layers.ReLU()(conv(inputs, widths[0], 3, 1, "stem"))
    for i, width in enumerate(widths):
        y = layers.ReLU()(conv(x, width, 3, 1 + (i > 0), f"block{i}_a"))
        y = conv(y, width, 3, 1, f"block{i}_b")
        shortcut = conv(x, width, 1, 2, f"block{i}_shortcut") if i else x
        x = layers.ReLU()(layers.Add()([shortcut, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name="small_resnet")


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("localhost", 0))
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports
