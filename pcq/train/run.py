"""A run: all that changes from step to step, and one step of it."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pcq.data import Inputs
from pcq.data.inputs import refusing
from pcq.errors import CheckFailed, PcqError
from pcq.proxconnect import ProxConnect, Telemetry
from pcq.settings import method_of, schedule_of
from pcq.train import batchnorm
from pcq.train.activations import Simulation
from pcq.train.batches import Batches
from pcq.train.job import Epoch, Job
from pcq.train.step import logits, loss_of, make_optimizer, update

OBSERVED = 0.1
"""Share of the training before ranges of activations are learned."""

ALONE_IN_BATCH = (
    "BatchNorm normalises by the batch in training: give a larger one (finetune.batch), or finetune.mode: eval"
)


@dataclass
class Run:
    """All that changes from step to step."""

    optimizer: torch.optim.Optimizer
    prox: ProxConnect
    total: int
    losses: Tensor
    simulation: Simulation | None = None
    step: int = 0
    looked: int = 0
    counted: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    telemetry: list[Telemetry] = field(default_factory=list)
    seconds: float = 0.0


def set_up(job: Job, batches: Batches, total: int) -> Run:
    """What trains ``job.module`` for ``total`` steps.

    Raises:
        PcqError: ranges are to be learned, and there are none.
    """
    settings, module = job.settings, job.module
    job.ranks.spread(module)
    optimizer = make_optimizer(settings, module.parameters())
    prox = ProxConnect(
        optimizer,
        {name: replace(target, parameter=module.get_parameter(name)) for name, target in job.weights.items()},
        method_of(settings),
        schedule_of(settings),
        steps=total,
        refit=settings.refit or None,
    )
    device = next(module.parameters()).device
    run = Run(optimizer, prox, total, torch.zeros((), dtype=torch.float64, device=device))
    if job.weights8 is not None:
        run.simulation = Simulation(module, job.weights8, ranks=job.ranks)
        run.simulation.look(*next(samples(job, batches, 1)))
        if settings.ranges == "learned" and run.simulation.seen <= run.simulation.halved:
            raise PcqError("there are no ranges to learn", where="finetune.ranges",
                           allowed="activations of 8 bits; where weights of 8 bits read them they have 7, and "
                           "those of tokens are measured anew in each run",
                           todo="Leave it out, or give weights 7 bits or fewer")  # fmt: skip
    return run


def samples(job: Job, batches: Batches, count: int) -> Iterator[Inputs]:
    """``count`` batches as they are trained on, changed at random, the same ones each time."""
    device = next(job.module.parameters()).device
    for step in range(min(count, batches.an_epoch)):
        yield placed(batches.make(step)[0], device)


def placed(inputs: Inputs, device: torch.device) -> Inputs:
    """On the device; images with their channels last, which is how convolutions like them."""
    there = (x.to(device, non_blocking=True) for x in inputs)
    return tuple(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in there)


def advance(job: Job, run: Run, batches: Batches, x: Inputs, y: Tensor | None, learning_rate: float) -> None:
    """One optimizer step."""
    settings, module = job.settings, job.module
    module.train(settings.mode == "train")
    observing = run.step == 0 or run.step / run.total < settings.anneal_end
    if run.simulation is not None and settings.ranges == "learned" and 0 < run.step >= OBSERVED * run.total:
        run.simulation.learn()
    with run.simulation.watching(observing) if run.simulation is not None else nullcontext():
        loss = job.ranks.part(_loss(job, module, x, y), len(x[0]), batches.size)
    update(settings, run.optimizer, module, loss, learning_rate, job.ranks)
    if run.simulation is not None:
        run.simulation.update(learning_rate / settings.learning_rate)
    run.step += 1
    run.losses += job.ranks.mean(loss.detach().to(run.losses))
    run.counted += 1


def _loss(job: Job, module: nn.Module, x: Inputs, y: Tensor | None) -> Tensor:
    device = next(module.parameters()).device
    x = placed(x, device)
    bf16 = job.settings.precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        wanted = None
        if job.teacher is not None:
            with torch.no_grad():
                wanted = logits(job.teacher(*x), y is not None)
        lone = ALONE_IN_BATCH if len(x[0]) == 1 and module.training and batchnorm.layers(module) else ""
        with refusing(x, lone):
            out = logits(module(*x), y is not None)
    if not out.requires_grad:
        whole = "" if out.is_floating_point() else ": it is of whole numbers"
        raise PcqError(f"its output has no gradient{whole}", where="the network", allowed="floats of trained weights")
    highest = job.splits.train.highest
    if highest is not None and highest >= out.shape[1]:
        raise PcqError(f"a label is {highest}", where=job.data, allowed=f"0 to {out.shape[1] - 1}, the outputs")
    labels = None if y is None else y.to(device, non_blocking=True)
    at = job.splits.train.mask
    return loss_of(job.settings, out, labels, wanted, None if at is None else x[at])


def refuse_nan(job: Job, run: Run) -> None:
    """Raise CheckFailed if a loss since the last look was not a number."""
    if not bool(torch.isfinite(run.losses)):
        raise diverged(job, f"the loss is not a number any more at step {run.step}")


def diverged(job: Job, what: str) -> CheckFailed:
    """The error that says so, and what to do."""
    kept = f" The last saved state is {job.saved}." if job.saved.is_file() else ""
    rate = f"Lower the learning rate (--set finetune.lr={job.settings.learning_rate / 4:g})"
    return CheckFailed(what, todo=f"{rate}, or limit the gradient (--set finetune.clip=1).{kept}")
