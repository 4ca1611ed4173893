"""What a .tflite file computes in float32, by the types of its tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BRIDGES = ("QUANTIZE", "DEQUANTIZE")  # from float to integers and back: no computation


def float_operations(path: Path) -> tuple[str, ...]:
    """Kinds of operations that read or write float32, each once, in the order of the file.

    The converter leaves in float32, between a dequantization and a quantization, whatever it has
    no integer kernel for; nothing but the types of tensors tells.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
    found = (
        names[_code(model.OperatorCodes(operator.OpcodeIndex()))]
        for graph, operator in _operators(model)
        if schema.TensorType.FLOAT32 in _types(graph, operator)
    )
    return tuple(name for name in dict.fromkeys(found) if name not in BRIDGES)


def _operators(model: Any) -> Iterator[tuple[Any, Any]]:
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for operator in map(graph.Operators, range(graph.OperatorsLength())):
            yield graph, operator


def _code(kind: Any) -> int:
    # Files of old have the code in a byte, which newer ones fill up to its largest value.
    return max(kind.BuiltinCode(), kind.DeprecatedBuiltinCode())


def _types(graph: Any, operator: Any) -> set[int]:
    """Types of what an operation reads and writes; -1 stands for an input that is left out."""
    inputs = map(operator.Inputs, range(operator.InputsLength()))
    outputs = map(operator.Outputs, range(operator.OutputsLength()))
    return {graph.Tensors(i).Type() for i in (*inputs, *outputs) if i >= 0}
