"""A script: by how many bytes a process grows at most while it loads a .tflite file and runs it.

    python peak_memory.py FILE THREADS SHAPES

SHAPES is a JSON list of the shapes of the inputs. Linux only. Nothing but the runtime is
imported: what else the process did would count.
"""

import json
import sys

from ai_edge_litert.interpreter import Interpreter


def memory(field: str) -> int:
    """Bytes of this process, by a field of /proc/self/status such as "VmHWM"."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def growth(path: str, threads: int, shapes: list[list[int]]) -> int:
    """Peak memory of the process beyond what it has now, in bytes."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
        control.write("5")  # resets the peak
    before = memory("VmRSS")
    interpreter = Interpreter(model_path=path, num_threads=threads)
    for detail, shape in zip(interpreter.get_input_details(), shapes, strict=True):
        interpreter.resize_tensor_input(detail["index"], shape)
    interpreter.allocate_tensors()
    interpreter.invoke()
    return memory("VmHWM") - before


if __name__ == "__main__":
    print(growth(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])))
