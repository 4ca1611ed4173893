"""What each sample's loss says about each unit: gradients with respect to gates that are all 1."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_polar.backends import gradient_function
from keras_polar.coupling.coupling import Coupling
from keras_polar.graph.rebuild import rebuild
from keras_polar.rules import CallSite
from keras_polar.training.gate_specs import GateSpec, gate_specs
from keras_polar.training.insertion import MaskInserter


def probed(coupling: Coupling) -> keras.Model:
    """The coupled network with an input in place of every gate: (its input, probes) -> outputs.

    Args:
        coupling: of the model; the new one has copies of its weights.

    Returns:
        A model whose second input is a list of float32 tensors of shape (batch, units), one per
        group: factors of each sample's units, wherever these are read. With ones it is the
        model itself.

    Raises:
        ValueError: a group's units are masked on weights, for all samples at once.
    """
    specs = gate_specs(coupling, (), [1] * len(coupling.groups))
    for spec in specs:
        _check_per_sample(spec)
    inserter = ProbeInserter(coupling, specs)
    return rebuild(coupling.graph, inserter.visit, inserter.model)


def _check_per_sample(spec: GateSpec) -> None:
    if not spec.per_sample:
        raise ValueError(
            f"Group {spec.name!r} (layers {', '.join(spec.layers)}) has units that are masked for "
            "all samples at once, so that there are no gradients per sample. Leave its layers out "
            f"(`ignore={list(spec.layers)}`), or use a criterion of weights."
        )


class ProbeInserter(MaskInserter):
    """Inputs of the model in place of gates."""

    def _gate(self, i: int, site: CallSite, values: Any) -> Any:
        return keras.Input((self.specs[i].units,), name=self._name(f"probe_{i}"))

    def model(self, inputs: Any, outputs: Any, name: str) -> keras.Model:
        probes = [self.gates[i] for i in range(len(self.specs))]
        return keras.Model([inputs, probes], outputs, name=name)


def gate_gradients(
    coupling: Coupling, loss: Callable[[Any, Any], Any], x: Any, y: Any, batch_size: int = 250
) -> list[np.ndarray]:
    """What the loss of each sample would change by if a unit's gate, 1, were a little larger.

    Args:
        coupling: of a model, in inference mode.
        loss: (y, outputs) -> the loss of each sample, a tensor of shape (batch,).
        x: inputs as the model takes them: an array, or a structure of arrays.
        y: what `loss` takes for them: an array, or a structure of arrays.
        batch_size: samples at a time; the last few that do not fill a batch are done as well.

    Returns:
        One float array of shape (samples, units) per group.

    Example::

        from keras.losses import sparse_categorical_crossentropy as loss

        gradients = gate_gradients(analyze(model), loss, images, labels)
    """
    model, inputs = probed(coupling), coupling.graph.inputs
    units = [group.units for group in coupling.groups]

    def total(probes: list, *flat: Any) -> Any:
        batch_x, batch_y = tree.pack_sequence_as((x, y), list(flat))
        batch_x = tree.pack_sequence_as(inputs, tree.flatten(batch_x))
        return ops.sum(loss(batch_y, model([batch_x, probes], training=False)))

    gradients, arrays = gradient_function(total), tree.flatten((x, y))
    batches = []
    for first in range(0, len(arrays[0]), batch_size):
        batch = [a[first : first + batch_size] for a in arrays]
        batches.append(gradients([np.ones((len(batch[0]), n), "float32") for n in units], *batch))
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]
