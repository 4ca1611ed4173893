"""A Keras model as a LiteRT (.tflite) file: write it, run it, compare it with Keras, time it.

Everything that needs TensorFlow or the LiteRT runtime is imported where it is used, so that the
package can be imported on any Keras backend.
"""

from keras_polar.litert.benchmark import Latency, benchmark_tflite
from keras_polar.litert.export import export_tflite
from keras_polar.litert.measure_latency import latency_table
from keras_polar.litert.modes import QuantizationMode
from keras_polar.litert.qat import quantize_aware
from keras_polar.litert.report import ExportReport, TensorInfo
from keras_polar.litert.runtime import run_tflite

__all__ = [
    "ExportReport",
    "Latency",
    "QuantizationMode",
    "TensorInfo",
    "benchmark_tflite",
    "export_tflite",
    "latency_table",
    "quantize_aware",
    "run_tflite",
]
