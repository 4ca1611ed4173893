"""Models saved here and loaded in a process of their own: do they still compute the same?

The process that loads a small model knows nothing of keras_polar.
"""

import contextlib
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = ("small.keras", "gated.keras")  # in this order: what is imported once stays


def trouble(gated, small, inputs) -> str:
    """Why one of the two cannot be saved, or not loaded, or is another then; empty if none is."""
    from half_closed import difference

    with tempfile.TemporaryDirectory() as folder:
        for name, model in zip(FILES, (small, gated), strict=True):
            try:
                model.save(Path(folder, name))
            except Exception as error:  # the reason is what the table is for
                return f"{name} is not saved: {error}"
        Path(folder, "inputs").write_bytes(pickle.dumps(inputs))
        command = [sys.executable, __file__, folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"not loaded: {done.stderr.strip().splitlines()[-1]}"
        found = pickle.loads(Path(folder, "outputs").read_bytes())
    off = [
        difference(model, lambda x, training, y=y: y, inputs)
        for model, y in zip((small, gated), found, strict=True)
    ]
    return "" if max(off) <= 1e-5 else f"another model is loaded: it differs by {max(off):.0e}"


def outputs_of(folder: Path, name: str) -> list:
    import keras

    model = keras.models.load_model(folder / name)
    y = model(pickle.loads((folder / "inputs").read_bytes()), training=False)
    return [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(y)]


def main(folder: Path) -> None:
    with contextlib.suppress(ImportError):
        import keras_hub  # noqa: F401  the classes of its layers
    small = outputs_of(folder, FILES[0])
    assert "keras_polar" not in sys.modules
    import keras_polar  # noqa: F401

    outputs = pickle.dumps([small, outputs_of(folder, FILES[1])])
    (folder / "outputs").write_bytes(outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
