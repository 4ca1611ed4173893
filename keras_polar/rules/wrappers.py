"""Layers around another layer."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
from keras import layers

from keras_polar.graph.ir import Call, Ref, Spec, refs_in
from keras_polar.graph.keras_private import functional
from keras_polar.rules.call_site import CallSite, set_rows, sizes
from keras_polar.rules.ids import Ids, Units, no_unit, varies
from keras_polar.rules.registry import add, is_unknown, rule_for, trace_model
from keras_polar.rules.rule import CostTerm, KeptUnits, Rule


class WrapperRule(Rule):
    """The inner layer's rule, asked about what the wrapper calls the layer on (`_inner`)."""

    def applies(self, op: Any) -> bool:
        return not is_unknown(op.layer)

    def _inner(self, site: CallSite) -> CallSite:
        """A call of the inner layer; it shares names and units with `site`."""
        raise NotImplementedError

    def weights(self, op: Any) -> dict[str, tuple]:
        inner = rule_for(op.layer).weights(op.layer)
        return {f"layer.{path}": names for path, names in inner.items()}

    def factors(self, site: CallSite, kept: KeptUnits) -> dict[str, float]:
        inner = self._inner(site)
        found = inner.rule.factors(inner, kept)
        return {f"layer.{path}": factor for path, factor in found.items()}

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        serialised = copy.deepcopy(site.op.get_config()["layer"])
        inner = self._inner(site)
        serialised["config"].update(inner.rule.config(inner, kept))
        serialised.pop("build_config", None)
        return {"layer": serialised}


class TimeDistributedRule(WrapperRule):
    """The inner layer's rule, asked about one step; steps are positions."""

    def flow(self, site: CallSite) -> list[Ids]:
        ids, *masks = site.inputs
        for mask in masks:
            site.pin(mask, "is used as a mask")
        if varies(ids, 1):
            return site.pin_all("runs over the units")
        step = self._inner(site)
        if len(step.output_shapes) != 1:
            return site.pin_all("has several outputs in TimeDistributed")
        (out,) = step.rule.flow(step)
        site.refused = step.refused
        if step.averaged and any(axis >= 0 for axis in site.op.layer.axis):
            return site.pin_all("normalises over an axis counted from the batch")
        site.averaged += step.averaged
        site.reads += [(0, axis + 1 if axis else 0) for _, axis in step.reads]
        site.inner_reads += [(f"layer.{path}", axis) for path, axis in step.inner_reads]
        return [np.broadcast_to(np.expand_dims(out, 1), site.output_shapes[0])]

    def _inner(self, site: CallSite) -> CallSite:
        """The call of the inner layer on one step."""
        specs = [
            Spec((s.shape[0], *s.shape[2:]), s.dtype)
            for s in (site.specs[i] for i in (site.call.inputs[0], *site.call.outputs))
        ]
        outputs = tuple(range(1, len(specs)))
        call = Call(site.op.layer, site.name, site.call.path, (Ref(0),), {}, (0,), outputs)
        inputs, rule = [site.inputs[0][:, 0]], rule_for(call.op)
        step = CallSite(call, tuple(specs), site.units, inputs, site.shared_axes, rule)
        step.axes, step.produces = site.axes, site.produces
        step.outputs = [ids[:, 0] for ids in site.outputs]
        return step

    def over_open(self, op: Any, gates: Any, *args: Any, **kwargs: Any) -> Any:
        return rule_for(op.layer).over_open(op.layer, gates, *args, **kwargs)

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        step, model = self._inner(site), functional(site.op.layer)
        step.refused = site.refused
        inner = step.macs if model is None else _model_macs(model)
        steps = site.output_shapes[0][1]
        return None if inner is None else [CostTerm(t.factors, macs=steps * t.macs) for t in inner]


def _model_macs(model: Any) -> list[CostTerm] | None:
    """What a model computes whose units all stay; None if nobody knows."""
    graph = trace_model(model)
    rows = dict.fromkeys(refs_in(graph.inputs), 1)
    terms: list[CostTerm] | None = []
    for call in graph.calls:
        ids = [no_unit(sizes(graph.specs[i].shape)) for i in call.inputs]
        site = CallSite(call, graph.specs, Units(), ids, {}, rule_for(call.op), refused="inside")
        rows.update(dict.fromkeys(call.outputs, set_rows(site, [rows[i] for i in call.inputs])))
        terms = None if terms is None or site.macs is None else terms + site.macs
    return terms if all(None not in spec.shape[1:] for spec in graph.specs) else None


class SpectralNormalizationRule(WrapperRule):
    """Computes what the wrapped layer does: in inference mode its kernel is used as it stands.

    The vector of its power iteration goes along with the last axis of the kernel. Training divides
    the kernel by a norm of all of it, closed units included, until they are cut.
    """

    def flow(self, site: CallSite) -> list[Ids]:
        inner = self._inner(site)
        outputs = inner.rule.flow(inner)
        if inner.inner_reads or inner.averaged:
            return self._pinned(site, "wraps a layer that reads its units itself")
        site.refused = inner.refused
        # Not on the kernel: training would assign it as masked.
        site.reads += inner.reads
        return outputs

    def _pinned(self, site: CallSite, why: str) -> list[Ids]:
        for vector in site.axes.values():
            site.pin(vector, why)
        return site.pin_all(why)

    def _inner(self, site: CallSite) -> CallSite:
        return wrapped(site, site.op.layer)

    def weights(self, op: Any) -> dict[str, tuple]:
        found = super().weights(op)
        kernel = "kernel" if hasattr(op.layer, "kernel") else "embeddings"
        return {**found, "vector_u": (None, found[f"layer.{kernel}"][-1])}

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        return self._inner(site).macs


def wrapped(site: CallSite, layer: Any) -> CallSite:
    """The same call of the layer within, which shares names and units with `site`."""
    call, rule = replace(site.call, op=layer), rule_for(layer)
    inner = CallSite(call, site.specs, site.units, site.inputs, site.shared_axes, rule)
    inner.axes, inner.produces, inner.refused = site.axes, site.produces, site.refused
    inner.outputs = site.outputs
    return inner


add(TimeDistributedRule(), layers.TimeDistributed)
add(SpectralNormalizationRule(), layers.SpectralNormalization)
