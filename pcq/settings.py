"""How to fine-tune: the ``finetune:`` section of a recipe, and what its words stand for."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pcq.errors import PcqError
from pcq.methods import METHODS, Method, SignSwish
from pcq.prox import Hard
from pcq.schedules import Cosine, Geometric, Linear, MirroredSigmoid, Schedule, Theory

MethodName = Literal[
    "binaryconnect", "proxconnect", "reverse", "proxquant", "binaryrelax", "parq", "bnn", "bnn+", "bnn++",
    "posttraining",
]  # fmt: skip
assert set(get_args(MethodName)) == METHODS.keys()

LEARNING_RATES = {"adamw": 2e-3, "sgd": 2e-2}
"""Where the recipe does not say one."""

NEAR_RATES = {"adamw": 3e-4, "sgd": 3e-3}
"""Likewise, from the calibrated network: higher ones lose what calibration found before they find it again."""

MOST_AT_ONCE = 256
"""Samples that are scored at once, where a batch of training has more."""

OWN_ANNEAL: dict[str, Literal["sigmoid", "geometric"]] = {
    "parq": "sigmoid",
    "binaryrelax": "geometric",
    "proxquant": "geometric",
    "reverse": "geometric",
}
"""What `auto` is; `linear` for the others."""

EPOCHS = 10.0
"""Where the recipe does not say how long."""


@dataclass(frozen=True)
class Finetune:
    """How to fine-tune on the levels that the rules give.

    Attributes:
        method: the algorithm; all of them work with the same other settings.
        anneal: how the pull towards the levels grows; `auto`: as suits the method.
        anneal_start: share of the training before which there is no pull; `theory` has none.
        anneal_end: share of the training from which on every weight is on its nearest level.
        relative: each gap between levels hardens by its own width, all together; false: narrow gaps first.
        refit: optimizer steps between refits of the levels to the moving weights; 0: they stay as first fitted.
        epochs: passes over the training data (10 where nothing is said).
        steps: optimizer steps, instead of epochs.
        minutes: time, instead of epochs; a few steps are timed first to settle how many there are.
        batch: samples for each optimizer step.
        optimizer: `adamw`, or `sgd` with Nesterov momentum 0.9.
        lr: highest learning rate; where nothing is said 0.002 for adamw and 0.02 for sgd, and 0.0003 and 0.003 from the
            calibrated network.
        rate: `onecycle` rises over 30 % of the training and falls to 0, `cosine` falls after 5 % of warm-up, `step`
            falls to a tenth at 50 % and again at 75 %, `constant` stays.
        weight_decay: of weights; biases and norms have none.
        clip: largest norm of the gradient; 0: any.
        smoothing: label smoothing.
        distill: share of the loss that compares with the float network's outputs; the rest compares with the labels.
        augment: random changes of the training images; `auto`: those usual for the data set.
        freeze: patterns of parameters that stay as they are; those with levels are rounded once.
        activations: 8: what enters and leaves the layers has 8 bits in training too, as `pcq export --mode int8` will
            have it; the ranges are stored in the artifact.
        ranges: of these activations: `observed`, moving averages of each batch's least and greatest number; or
            `learned`, trained from there.
        precision: `bf16` computes in bfloat16 where it is safe; `auto`: where the machine is quick at it.
        graphs: record the passes of a training step as CUDA graphs, so that a small network's GPU does not wait for
            Python; for networks whose computation does not depend on the numbers in it.
        mode: in which the network is while it trains: `train`, or `eval`, in which it computes as it will: BatchNorm by
            the checkpoint's statistics, no dropout. That is for few samples and small batches.
        batchnorm: training batches from which the statistics of BatchNorm are estimated anew at the end, to be kept if
            they are better on the samples held out; 0: never. In mode `eval` they stay as they are.
        seed: of everything random.
    """

    method: MethodName = "proxconnect"
    anneal: Literal["auto", "linear", "cosine", "sigmoid", "geometric", "theory"] = "auto"
    anneal_start: float = 0.0
    anneal_end: float = 0.75
    relative: bool = True
    refit: int = 20
    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    batch: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = None
    rate: Literal["onecycle", "cosine", "step", "constant"] = "onecycle"
    weight_decay: float = 1e-4
    clip: float = 0.0
    smoothing: float = 0.0
    distill: float = 0.0
    augment: Literal["auto", "none", "crop", "crop-flip", "resized-crop"] = "auto"
    freeze: tuple[str, ...] = ()
    activations: Literal[8] | None = None
    ranges: Literal["observed", "learned"] = "observed"
    precision: Literal["auto", "bf16", "float32"] = "auto"
    graphs: bool = False
    mode: Literal["train", "eval"] = "train"
    batchnorm: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("activations", self.activations in (None, 8), "8, or left out for float"),
            ("ranges", self.ranges in ("observed", "learned"), "observed or learned"),
            ("anneal_start", 0 <= self.anneal_start <= 1, "a share of the training from 0 to 1"),
            ("anneal_end", 0 <= self.anneal_end < 1, "a share of the training below 1: the last part is for settling"),
            ("anneal_end", self.anneal_end >= min(1.0, self.anneal_start), "a share that is not before anneal_start"),
            ("anneal_start", not (self.anneal == "theory" and self.anneal_start), "0 where anneal is theory"),
            ("refit", self.refit >= 0, "0 or a number of steps"),
            ("epochs", self.epochs is None or 0 < self.epochs < math.inf, "a finite number above 0"),
            ("steps", self.steps is None or self.steps >= 1, "1 or more"),
            ("minutes", self.minutes is None or 0 < self.minutes < math.inf, "a finite number above 0"),
            ("batch", self.batch >= 1, "1 or more"),
            ("lr", self.lr is None or 0 < self.lr < math.inf, "a finite number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more, and finite"),
            ("clip", 0 <= self.clip < math.inf, "0 or more, and finite"),
            ("smoothing", 0 <= self.smoothing < 1, "a number from 0 to below 1"),
            ("distill", 0 <= self.distill <= 1, "a share of the loss from 0 to 1"),
            (
                "precision",
                self.activations is None or self.precision != "bf16",
                "float32 where activations have 8 bits",
            ),
            ("graphs", self.activations is None or not self.graphs, "false where activations have 8 bits"),
            ("graphs", self.mode == "train" or not self.graphs, "false in mode eval"),
            ("batchnorm", self.batchnorm >= 0, "0 or a number of batches"),
            ("seed", 0 <= self.seed < 2**31, "0 to 2147483647"),
        )
        problems = [
            f"{key} is {getattr(self, key)}, which has to be {allowed}" for key, holds, allowed in checks if not holds
        ]
        given = [key for key in ("epochs", "steps", "minutes") if getattr(self, key) is not None]
        if len(given) > 1:
            problems.append(f"{given[-1]} and {given[0]} both say how long to train; keep one of them")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def estimates(self) -> int:
        """Batches from which the statistics of BatchNorm are estimated anew."""
        return self.batchnorm if self.mode == "train" else 0

    @property
    def at_once(self) -> int:
        """How many samples are scored at once: what training takes of them fits into memory."""
        return min(self.batch, MOST_AT_ONCE)

    @property
    def learning_rate(self) -> float:
        """The highest."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr


def changed(settings: Finetune, **changes: object) -> Finetune:
    """``settings`` with other values; a new duration replaces the old one.

    Raises:
        PcqError: a value is not allowed, or ranges are to be learned where, after all changes, there are none.
    """
    if {"epochs", "steps", "minutes"} & changes.keys():
        changes = {"epochs": None, "steps": None, "minutes": None, **changes}
    if changes.get("method", settings.method) not in METHODS:
        from pcq.errors import did_you_mean

        word = str(changes["method"])
        raise PcqError(
            f"there is no method '{word}'", where="method", allowed=", ".join(METHODS), todo=did_you_mean(word, METHODS)
        )
    try:
        made = replace(settings, **changes)  # type: ignore[arg-type]
    except ValueError as error:
        raise PcqError(str(error).replace("\n", "; "), where="finetune") from None
    if made.ranges == "learned" and made.activations is None:
        what = "ranges is learned, which has to be observed where activations are float"
        raise PcqError(what, where="finetune", todo="Give --activations 8, too, or leave it out")
    return made


def method_of(settings: Finetune) -> Method:
    """The algorithm, its prox with absolute or relative shifts."""
    method = METHODS[settings.method]
    if isinstance(method.prox, Hard | SignSwish):
        return method
    return replace(method, prox=replace(method.prox, relative=settings.relative))


def schedule_of(settings: Finetune) -> Schedule:
    """The strength over the training."""
    start, end, kind = settings.anneal_start, settings.anneal_end, settings.anneal
    if kind == "auto":
        kind = OWN_ANNEAL.get(settings.method, "linear")
    match kind:
        case "cosine":
            return Cosine(start, end)
        case "sigmoid":
            return MirroredSigmoid(start, end)
        case "geometric" if METHODS[settings.method].updates == "weight":
            # The map is applied to what it has mapped at every step before: pulls add up.
            return Geometric(start, end, 0.001, 1.0)
        case "geometric":
            return Geometric(start, end)
        case "theory":
            return Theory(end)
    return Linear(start, end)
