"""What an export returns."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a .tflite file.

    Attributes:
        name: its name in the file's signature.
        shape: batch first; None where any size is accepted.
        dtype: name of the NumPy dtype, such as "float32" or "int8".
        scale: of a quantized tensor, whose value is `scale * (stored - zero_point)`; else None.
        zero_point: the integer that stands for 0; None where nothing is quantized.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None

    def __str__(self) -> str:
        text = f"{self.name}: {self.dtype} {self.shape}"
        if self.scale is None:
            return text
        return f"{text}, scale {self.scale:.6g}, zero point {self.zero_point}"


@dataclass(frozen=True)
class Comparison:
    """How far a .tflite file is from the Keras model, on the same samples.

    Attributes:
        samples: how many samples were compared.
        random: whether they were drawn at random, because no data were given.
        max_difference: largest |LiteRT - Keras| over all outputs, in the outputs' units.
        mean_difference: mean |LiteRT - Keras| of the output where it is largest.
        relative_difference: the largest |LiteRT - Keras|, each output divided by its own largest
            |Keras| value.
        agreement: share of samples, 0 to 1, whose largest output is the same one in both; None
            unless the model has one output of shape `(batch, classes)`.
        accuracy: share of samples whose largest output is the label's; None without labels.
        keras_accuracy: the same of the Keras model.
    """

    samples: int
    random: bool
    max_difference: float
    mean_difference: float
    relative_difference: float
    agreement: float | None = None
    accuracy: float | None = None
    keras_accuracy: float | None = None

    def _lines(self) -> list[str]:
        kind = "random " if self.random else ""
        lines = [
            f"  against Keras on {self.samples} {kind}samples: max difference "
            f"{self.max_difference:.2g} (relative {self.relative_difference:.2g}), mean "
            f"{self.mean_difference:.2g}"
        ]
        if self.agreement is not None:
            lines.append(f"  same largest output: {self.agreement:.2%}")
        if self.accuracy is not None:
            lines.append(f"  accuracy {self.accuracy:.2%} (Keras {self.keras_accuracy:.2%})")
        return lines


@dataclass(frozen=True, kw_only=True)
class ExportReport(Comparison):
    """What `export_tflite` wrote, and how far it is from the Keras model (see `Comparison`).

    Attributes:
        path: the file.
        bytes: its size.
        quantize: how it computes: None (as Keras), or the name of the mode, such as "int8".
        inputs: in the order of the Keras model's inputs.
        outputs: in the order of the Keras model's outputs.
        notes: what is otherwise in the file than in the model: a batch size fixed at 1, say.
        precision_difference: of a model that does not compute in float32: how far it is from its
            float32 copy, measured as `relative_difference`. The file is made of the copy and
            compared with it: what the other attributes call Keras is the copy. Else None.
        float_operations: of an integer file, the kinds of LiteRT operations that compute in float32
            all the same, such as "ELU", since there is no integer kernel for them. A device without
            floats cannot run them.
    """

    path: Path
    bytes: int
    quantize: str | None
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    notes: tuple[str, ...] = ()
    precision_difference: float | None = None
    float_operations: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.bytes:,} bytes, {self.quantize or 'not quantized'}",
            *self._lines(),
            *(f"  input  {tensor}" for tensor in self.inputs),
            *(f"  output {tensor}" for tensor in self.outputs),
            *(f"  note: {note}" for note in self.notes),
        ]
        if self.float_operations:
            names = ", ".join(self.float_operations)
            lines.append(f"  note: {names} compute in float32, without an integer kernel")
        if self.precision_difference is not None:
            lines.append(
                "  note: Keras is a float32 copy; the model itself differs from it by "
                f"{self.precision_difference:.2g} (relative)"
            )
        return "\n".join(lines)
