"""What Keras' own quantization and adapters of low rank make of layers: said in one place."""

from typing import Any

import keras


def quantized(layer: Any) -> dict[str, str]:
    """The layers, within a model or layer, that Keras has quantized: path -> mode."""
    parts = layer._flatten_layers()
    modes = {x.path or x.name: getattr(x, "quantization_mode", None) for x in parts}
    return {path: mode for path, mode in modes.items() if mode}


def listed(modes: dict[str, str]) -> str:
    """Quantized layers in words."""
    shown = [f"{path!r} ({mode})" for path, mode in list(modes.items())[:3]]
    more = [f"{len(modes) - 3} more"] if len(modes) > 3 else []
    return ", ".join([*shown, *more])


def why_altered(layer: Any, cuts_adapters: bool = False) -> str:
    """Why an operation cannot be cut although its class can; empty if nothing speaks against it.

    Args:
        cuts_adapters: whether adapters of low rank of its own are cut along.
    """
    if not isinstance(layer, keras.layers.Layer):
        return ""
    found = quantized(layer)
    if found:
        return (
            f"has been quantized by Keras ({', '.join(dict.fromkeys(found.values()))}): prune and "
            "`convert` first, then `quantize` the small model"
        )
    parts = [x for x in layer._flatten_layers() if not (cuts_adapters and x is layer)]
    if any(getattr(x, "lora_enabled", False) for x in parts):
        return (
            "has adapters of low rank (LoRA): prune and `convert` first, then `enable_lora` on "
            "the small model"
        )
    return ""
