"""Models saved here and loaded in a process of their own: do they still compute the same?

The process that loads a small model knows nothing of keras_polar.
"""

import contextlib
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

FIRST = "small"  # what is imported once stays


def trouble(models, inputs) -> str:
    """Why one of the models cannot be saved, or not loaded, or is another then; empty if none is.

    Args:
        models: by name; the one that is called "small" is loaded without keras_polar.
        inputs: of all of them.
    """
    from half_closed import difference

    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            try:
                model.save(Path(folder, f"{name}.keras"))
            except Exception as error:  # the reason is what the table is for
                return f"{name}.keras is not saved: {error}"
        Path(folder, "inputs").write_bytes(pickle.dumps(inputs))
        command = [sys.executable, __file__, folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"not loaded: {done.stderr.strip().splitlines()[-1]}"
        found = pickle.loads(Path(folder, "outputs").read_bytes())
    off = {n: difference(m, lambda x, training, n=n: found[n], inputs) for n, m in models.items()}
    worst = max(off, key=off.get)
    return "" if off[worst] <= 1e-5 else f"{worst}.keras is another model: by {off[worst]:.0e}"


def outputs_of(file: Path, inputs) -> list:
    import keras

    y = keras.models.load_model(file)(inputs, training=False)
    return [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(y)]


def main(folder: Path) -> None:
    with contextlib.suppress(ImportError):
        import keras_hub  # noqa: F401  the classes of its layers
    found, inputs = {}, pickle.loads((folder / "inputs").read_bytes())
    for file in sorted(folder.glob("*.keras"), key=lambda f: f.stem != FIRST):
        if file.stem != FIRST:
            import keras_polar  # noqa: F401
        found[file.stem] = outputs_of(file, inputs)
        assert file.stem != FIRST or "keras_polar" not in sys.modules
    (folder / "outputs").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
