"""The quantization modes of `export_tflite`: all that differs between them stands in one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FLOAT = "float32"
IO = (None, FLOAT)  # what `export_tflite(io=...)` takes
# What TensorFlow's converter can do: other names would be another file, silently.
_WEIGHTS = (FLOAT, "float16", "int8")
_ACTIVATIONS = (FLOAT, "int8", "int16")


def check_known(argument: str, value: Any, known: Sequence[Any]) -> None:
    """Raises unless an argument is one of the known values."""
    if value not in known:
        raise ValueError(
            f"Expected `{argument}` to be one of {', '.join(map(repr, known))}; received {value!r}."
        )


@dataclass(frozen=True)
class QuantizationMode:
    """How a .tflite file stores its weights, and in which numbers it computes.

    Attributes:
        name: what `export_tflite(quantize=...)` takes and its report says; None for the mode
            without quantization.
        weights: dtype that large weights are stored in: "float32", "float16" or "int8".
        activations: dtype of what flows between operations: "float32", "int8" or "int16". Integers
            need ranges, which come from representative data; the inputs and outputs of the file
            are such integers too, unless `io="float32"`.
        operations: the operations that the file may hold, as names in `tf.lite.OpsSet`. Of an
            integer mode, TensorFlow's converter still writes what has no integer kernel (ELU, say)
            as a float operation between a dequantization and a quantization.

    Raises:
        ValueError: a dtype is none of these, or activations are integers and weights are not.

    Example:
        >>> int16x8 = "EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8"
        >>> mode = QuantizationMode("int16x8", weights="int8", activations="int16",
        ...                         operations=(int16x8,))
        >>> keras_polar.export_tflite(small, "small.tflite", mode, representative_data=images)
    """

    name: str | None
    weights: str = FLOAT
    activations: str = FLOAT
    operations: tuple[str, ...] = ("TFLITE_BUILTINS",)  # which every LiteRT runtime has

    def __post_init__(self) -> None:
        check_known("activations", self.activations, _ACTIVATIONS)
        check_known("weights", self.weights, ("int8",) if self.is_integer else _WEIGHTS)

    @property
    def is_integer(self) -> bool:
        """Whether activations are integers.

        Such a file needs representative data. Its loops are written out, and it is run once in a
        process of its own: TensorFlow's calibrator and the runtime break down on some.
        """
        return self.activations != FLOAT

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored in fewer bytes than Keras has them in."""
        return self.weights != FLOAT

    @property
    def float_types(self) -> tuple[str, ...]:
        """The narrow floats that weights are stored in; integers are the converter's default."""
        return (self.weights,) if self.is_quantized and "float" in self.weights else ()

    def ends(self, io: str | None) -> str:
        """The dtype of the inputs and outputs of the file that are floats in the model."""
        return io or self.activations


FLOAT32 = QuantizationMode(None)
FLOAT16 = QuantizationMode("float16", weights="float16")
DYNAMIC = QuantizationMode("dynamic", weights="int8")
INT8 = QuantizationMode("int8", "int8", "int8", ("TFLITE_BUILTINS_INT8",))
MODES = (FLOAT32, FLOAT16, DYNAMIC, INT8)


def mode_of(quantize: str | QuantizationMode | None) -> QuantizationMode:
    """The mode of this name; an object is taken as it is.

    Raises:
        ValueError: there is no such mode.
    """
    if isinstance(quantize, QuantizationMode):
        return quantize
    names = [mode.name for mode in MODES]
    check_known("quantize", quantize, names)
    return MODES[names.index(quantize)]


def modes_text() -> str:
    """The names of the modes that quantize, and what they need, for the command line."""
    names = [f"{m.name} (which needs --data)" if m.is_integer else m.name for m in MODES if m.name]
    return f"{', '.join(names[:-1])} or {names[-1]}"
