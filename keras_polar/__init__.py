"""Structured pruning of Keras models with polarized gates, in one training run.

gated = keras_polar.apply(model, sparsity=0.5)
gated.compile(...); gated.fit(...)
small = keras_polar.convert(gated)
keras_polar.export_tflite(small, "small.tflite")
"""

from keras_polar import callbacks, importances, plots
from keras_polar._version import __version__
from keras_polar.backends import full_precision
from keras_polar.costs.latency import LatencyTable
from keras_polar.costs.measures import Measure
from keras_polar.gates.gate import DynamicGate, Gate
from keras_polar.gates.schedule import Schedule
from keras_polar.gates.teacher import Teacher
from keras_polar.inspection import cost, inspect
from keras_polar.litert import (
    benchmark_tflite,
    export_tflite,
    latency_table,
    quantize_aware,
    run_tflite,
)
from keras_polar.rules import Rule
from keras_polar.rules.registry import register
from keras_polar.selection.importance import Importance
from keras_polar.surgery.convert import convert
from keras_polar.surgery.remove import remove
from keras_polar.training.apply import apply
from keras_polar.training.model import GatedModel

__all__ = [
    "DynamicGate",
    "Gate",
    "GatedModel",
    "Importance",
    "LatencyTable",
    "Measure",
    "Rule",
    "Schedule",
    "Teacher",
    "__version__",
    "apply",
    "benchmark_tflite",
    "callbacks",
    "convert",
    "cost",
    "export_tflite",
    "full_precision",
    "importances",
    "inspect",
    "latency_table",
    "plots",
    "quantize_aware",
    "register",
    "remove",
    "run_tflite",
]
