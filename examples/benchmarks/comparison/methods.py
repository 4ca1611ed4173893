"""Methods by name: from a `protocol.Run` to the network that would be shipped.

Most controls are named by what they rank units by and by where they cut: `l1_even`,
`fisher_inside`, `group_norm_free`. Every combination of `CRITERIA` and `SHARES` is a method.
Options are appended to a name, `l1_even+teacher`, and give a row of their own; `OPTIONS` says what
they do.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable

import cifar10
import keras
import magnitude
import models
import numpy as np
import protocol

import keras_polar
from keras_polar import importances

SLIMMING = 1e-4  # weight of the penalty on BatchNorm scales, as Liu et al. have it
POLARIZATION_T = 1.2  # Zhuang et al. recommend 1.0 to 1.4
PROBED = 2_000  # training images that gate gradients are taken of
ROUNDS = 4  # of a gradual cut of a trained network

OPTIONS = {
    "teacher": "the trained dense network teaches beside the labels (Hinton et al., 2015)",
    "restart": "the course of the learning rate begins anew when our gates settle",
    "late": "cut when our gates settle, also in a trained network",
    "statistics": "statistics of BatchNorm are estimated anew at the cut, before training goes on",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        ship: from a `protocol.Run` to the network that would be shipped.
        what: what it is, for a table's reader.
        options: those of `OPTIONS` that it can have.
        ours: whether it depends on the settings that are for our methods alone.
        removes: whether it depends on what is to be removed.
    """

    ship: Callable
    what: str
    options: tuple[str, ...] = ("teacher", "restart")
    ours: bool = False
    removes: bool = True


# --- networks that are trained as they are ------------------------------------------------------


def dense(run):
    return run.train(run.start())


def narrow(run):
    return _from_scratch(run, _narrow(run.setting))


def narrow_longer(run):
    return _from_scratch(run, _narrow(run.setting), longer=True)


def narrow_inside(run):
    """Cut by lot first, then its weights are drawn anew: a recipe for a network, no pruning."""
    small = _cut(run, run.setting.build(), run.setting.sparsity, random, "inside")
    return _from_scratch(run, keras.models.clone_model(small))


def shallow(run):
    setting = run.setting
    if not setting.model.startswith("resnet"):
        raise ValueError(f"shallow: depths of ResNets are known, received {setting.model}.")
    depths = (name for name in models.BUILDERS if name.startswith("resnet"))
    networks = (dataclasses.replace(setting, model=name).build() for name in depths)
    wanted = _wanted(setting)
    closest = min(networks, key=lambda net: abs(_cost(net, setting.measure) - wanted))
    return _from_scratch(run, closest)


def _from_scratch(run, model, longer=False):
    """Trains random weights for as many steps as the others have had, or for as many MACs."""
    setting = run.setting
    steps = setting.dense_steps + (setting.steps or 0)
    if longer:
        steps = round(_effort(setting) / keras_polar.cost(model).macs)
        steps -= steps % setting.steps_per_epoch if protocol.ON_JAX else 0
    restart = round(setting.course.settle * steps) if "restart" in run.options else 0
    return run.train(model, total=steps, peak=setting.learning_rate, restart=restart)


def _effort(setting):
    """MACs per sample of a run that is cut when our gates settle, the dense training included."""
    full, settle_at = keras_polar.cost(setting.build()).macs, setting.settles_at
    kept = 1 - setting.sparsity
    own = settle_at + (setting.total - settle_at) * kept
    return full * (own + (setting.dense_steps if setting.regime == "trained" else 0))


def _narrow(setting):
    """A uniformly narrower network, as close to the wanted cost as widths go."""
    return setting.build(_narrow_width(setting))


@functools.cache
def _narrow_width(setting):
    first = next(x for x in setting.build().layers if isinstance(x, keras.layers.Conv2D))
    wanted, costs = _wanted(setting), {}

    def cost(width):
        costs[width] = _cost(setting.build(width), setting.measure)
        return costs[width]

    bisect.bisect_left(range(1, int(first.filters) + 1), wanted, key=cost)
    return min(costs, key=lambda width: abs(costs[width] - wanted))


def _wanted(setting):
    return (1 - setting.sparsity) * _cost(setting.build(), setting.measure)


def _cost(model, measure):
    return getattr(keras_polar.cost(model), measure)


# --- ours ---------------------------------------------------------------------------------------


def gated(run, **options):
    setting, full = run.setting, run.start()
    own = {name: getattr(setting, name) for name in ("measure", "round_to", "max_sparsity")}
    own |= {"schedule": setting.course, **options}
    if run.teacher:
        weight = 1 - protocol.OF_LABELS
        own["teacher"] = keras_polar.Teacher(run.teacher, protocol.distillation(), weight)
    model = keras_polar.apply(full, setting.sparsity, **own)
    if protocol.ON_JAX:
        return _in_two_parts(run, model)
    small = keras_polar.convert(run.train(model), verify=True)
    if options.get("compact", True):
        gone = keras_polar.cost(full).macs - keras_polar.cost(small).macs
        run.macs -= run.of_images(3 * gone, (1 - setting.course.settle) * setting.total)
    return small


def _in_two_parts(run, model):
    """What `fit` does in one on TensorFlow, up to the optimiser's momentum at the settle step."""
    then = run.setting.settles_at
    model.consensus.steps.assign(run.setting.total)
    run.train(model, last=then).settle()
    if not model.consensus.compact:
        return keras_polar.convert(run.train(model, first=then), verify=True)
    return run.train(keras_polar.convert(model, verify=True), first=then)


# --- cuts ---------------------------------------------------------------------------------------


def random(run, coupling):
    """by lot"""
    return importances.at_random(coupling, run.rng)


def l1(run, coupling):
    """by the L1 norm of filters (Li et al., 2017)"""
    return importances.l1_norm(coupling)


def group_norm(run, coupling):
    """by the norm of all that has to be zero for a unit to be zero (the criterion of OTO, ATO)"""
    return importances.group_norm(coupling)


def batch_norm(run, coupling):
    """by the scale of BatchNorm (Liu et al., 2017)"""
    return importances.batch_norm_scale(coupling)


def density(run, coupling):
    """by how often the activation is not zero (after Foldy-Porto et al., 2020)"""
    return importances.density(coupling)


def taylor(run, coupling):
    """by absolute gate gradients per sample (Molchanov et al., 2017)"""
    return importances.Taylor(cross_entropy, *_samples(run, PROBED)).scores(coupling)


def fisher(run, coupling):
    """by squared gate gradients per sample (Liu et al., 2021)"""
    return importances.Fisher(cross_entropy, *_samples(run, PROBED)).scores(coupling)


def relevance(run, coupling):
    """by the share in the logit of the true class (LRP-0; after Aketi et al., 2020)"""
    return importances.Taylor(true_logit, *_samples(run, protocol.SAMPLE)).scores(coupling)


def _samples(run, count):
    images, labels = (x[:count] for x in run.data.train)
    mean, deviation = np.float32(cifar10.CHANNEL_MEAN), np.float32(cifar10.CHANNEL_STD)
    return (np.float32(images) / 255 - mean) / deviation, labels  # without TensorFlow


def cross_entropy(labels, logits):
    return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


def true_logit(labels, logits):
    classes = keras.ops.one_hot(labels, logits.shape[-1])
    return keras.ops.sum(classes * logits, axis=-1)


CRITERIA = (random, l1, group_norm, batch_norm, density, taylor, fisher, relevance)
SHARES = {
    "even": "the same share of every group",
    "free": "scores compete over all groups",
    "per_cost": "scores over what a unit saves compete over all groups",
    "inside": "the same share of every group, residual streams kept",
    "inside_per_cost": "scores over what a unit saves compete, residual streams kept",
}


def cut_once(run, *, scores, shares="even", penalty=None):
    """Trained until the cut, then the units with the lowest scores go for good.

    Args:
        scores: (run, coupling) -> one array per group.
        shares: one of `SHARES`.
        penalty: on the scales of BatchNorm, until then.
    """
    if penalty is not None and not run.cuts_at:
        raise ValueError("A penalty works until the cut, which is at step 0: add +late.")
    model = run.start()
    if penalty is not None:
        _penalise_scales(model, penalty)
    model = run.train(model, last=run.cuts_at)
    model = _cut(run, model, run.setting.sparsity, scores, shares)
    if "statistics" in run.options:
        run.estimate_statistics(model)
    if run.setting.regime == "trained":
        run.notes["accuracy_at_cut"] = protocol.accuracies(model, run.data)
    return run.train(model, first=run.cuts_at)


def three_stage(run):
    if run.setting.regime == "trained":
        raise ValueError("three_stage: of a trained network that is l1_even.")
    setting = run.setting
    model = _cut(run, run.train(run.start()), setting.sparsity, l1)
    steps = setting.epochs // 2 * setting.steps_per_epoch
    return run.train(model, total=steps, peak=0.1 * setting.peak, restart=0)


def cut_gradually(run, *, scores, shares="even"):
    """In rounds until our gates would settle; the cost falls in equal steps."""
    setting, model = run.setting, run.start()
    full, then = _cost(model, setting.measure), setting.settles_at
    rounds = ROUNDS if setting.regime == "trained" else then // setting.steps_per_epoch
    for number in range(rounds):
        first, last = (then * n // rounds for n in (number, number + 1))
        run.train(model, first=first, last=last)
        wanted = full * (1 - setting.sparsity * (number + 1) / rounds)
        missing = 1 - wanted / _cost(model, setting.measure)
        model = _cut(run, model, missing, scores, shares)
    return run.train(model, first=then)


def _cut(run, model, sparsity, scores, shares="even"):
    if sparsity <= 0:  # of a gradual cut, whose last round took more than its part
        return model
    own = Shared(functools.partial(scores, run), shares)
    options = {"measure": run.setting.measure, "gate": "static", "round_to": 1}
    gated = keras_polar.apply(model, sparsity, importance=own, **options)
    gated.settle()
    return keras_polar.convert(gated)


class Shared(keras_polar.Importance):
    """Scores by which groups give the wanted shares.

    Args:
        criterion: coupling -> one array per group.
        shares: one of `SHARES`.
    """

    name = "shared"
    is_free = True

    def __init__(self, criterion, shares):
        self.criterion, self.shares = criterion, shares
        self.is_per_cost = shares.endswith("per_cost")

    def scores(self, coupling):
        scores = self.criterion(coupling)
        if not self.is_per_cost and self.shares != "free":
            scores = [_places(s) for s in scores]
        if not self.shares.startswith("inside"):
            return scores
        return [
            np.full(len(s), np.inf) if _is_stream(group) else s
            for group, s in zip(coupling.groups, scores, strict=True)
        ]


def _places(scores):
    """From 0 for the lowest score to 1 for the highest, both excluded."""
    return (np.argsort(np.argsort(scores, kind="stable")) + 0.5) / len(scores)


def _is_stream(group):
    """Whether several layers write the group's units: a sum of residual branches."""
    return len(group.layers) > 1


def l1_penalty(scales):
    return keras.ops.sum(keras.ops.abs(scales))


def polarization_penalty(scales):
    """Zhuang et al., NeurIPS 2020, equation 2: t |g|_1 - |g - mean(g)|_1."""
    centred = scales - keras.ops.mean(scales)
    return POLARIZATION_T * l1_penalty(scales) - l1_penalty(centred)


class _ScalePenalty(keras.regularizers.Regularizer):
    def __init__(self, penalty):
        self.penalty = penalty

    def __call__(self, scales):
        return SLIMMING * self.penalty(scales)


def _penalise_scales(model, penalty):
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.regularizer = _ScalePenalty(penalty)


def magnitude_pruned(run):
    setting, full = run.setting, run.start()
    course, steps = setting.course, setting.total
    run.macs += 3 * keras_polar.cost(full).macs * steps * setting.batch_size
    return magnitude.train(
        full,
        run.batches.repeat(),
        sparsity=setting.sparsity,
        ramp=(round(course.warmup * steps), round(course.settle * steps)),
        steps=steps,
        learning_rate=setting.peak,
        weight_decay=setting.weight_decay,
    )


def as_trained(run):
    return run.dense_network()


# --- all of them --------------------------------------------------------------------------------


def _cuts():
    """Every criterion with every way to share."""
    for scores in CRITERIA:
        for shares, where in SHARES.items():
            ship = functools.partial(cut_once, scores=scores, shares=shares)
            what = f"cut at once {scores.__doc__}; {where}"
            yield f"{scores.__name__}_{shares}", Method(ship, what, (*OPTIONS,))


def _ours(what, **options):
    ship = functools.partial(gated, **options)
    return Method(ship, f"keras_polar {what}", ("teacher", "restart"), ours=True)


def _slimming(penalty, what):
    ship = functools.partial(cut_once, scores=batch_norm, shares="free", penalty=penalty)
    return Method(ship, what, (*OPTIONS,))


METHODS: dict[str, Method] = {
    "as_trained": Method(as_trained, "the trained network itself", (), removes=False),
    "dense": Method(dense, "the whole network, trained on as long", removes=False),
    "narrow": Method(narrow, "a uniformly narrower network of the same cost, from scratch"),
    "narrow_longer": Method(
        narrow_longer, "the same with as many training MACs as a run that is cut when gates settle"
    ),
    "narrow_inside": Method(
        narrow_inside, "a network that is narrower inside its blocks only, from scratch"
    ),
    "shallow": Method(shallow, "a ResNet of full width and fewer blocks, from scratch"),
    "dynamic": _ours("with gates that look at each sample", gate="dynamic"),
    "static": _ours("with one logit per unit", gate="static"),
    "both": _ours(
        "with static gates on channels and on residual branches",
        gate="static",
        granularity=("channels", "blocks"),
    ),
    "masked": _ours(
        "as static, but the whole network trains to the end", gate="static", compact=False
    ),
    "dynamic_logits": _ours(
        "as dynamic, but gates by their logits alone",
        gate="dynamic",
        importance="logits",
    ),
    "static_logits": _ours(
        "as static, but gates by their logits alone", gate="static", importance="logits"
    ),
    "both_logits": _ours(
        "as both, but gates by their logits alone",
        gate="static",
        granularity=("channels", "blocks"),
        importance="logits",
    ),
    "masked_logits": _ours(
        "as masked, but gates by their logits alone",
        gate="static",
        importance="logits",
        compact=False,
    ),
    **dict(_cuts()),
    "three_stage": Method(
        three_stage,
        "trained to the end, cut as l1_even, fine-tuned for half as many epochs at a tenth of the "
        "learning rate: what one pass saves",
        ("teacher",),
    ),
    "slimming": _slimming(
        l1_penalty,
        "L1 on the scales of BatchNorm, smallest scales cut, over all groups (Liu et al., 2017)",
    ),
    "polarized_slimming": _slimming(
        polarization_penalty,
        "the same with the polarization regulariser of Zhuang et al. (2020)",
    ),
    "gradual": Method(
        functools.partial(cut_gradually, scores=l1),
        "as l1_even, but in rounds until our gates settle (after Roy et al., 2020)",
    ),
    "magnitude": Method(
        magnitude_pruned,
        "tfmot's magnitude pruning: that share of every kernel becomes zeros, none goes "
        "(needs the extra qat)",
        (),
    ),
}


def parsed(name):
    """`method+option+option` -> (method, its options in order).

    Raises:
        ValueError: there is no such method, or it has no such option.
    """
    method, *options = name.split("+")
    if method not in METHODS:
        raise ValueError(f"No method {method!r}. Methods: {', '.join(METHODS)}.")
    known = METHODS[method].options
    wrong = [o for o in options if o not in known]
    if wrong:
        raise ValueError(
            f"{name}: {method} has no option {', '.join(wrong)}; it has "
            f"{', '.join(known) or 'none'}."
        )
    return method, tuple(o for o in OPTIONS if o in options)
