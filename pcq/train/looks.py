"""Looking at the samples held out, with the weights on their levels."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from pcq.errors import CheckFailed
from pcq.grids import Grid
from pcq.progress import Progress, silent
from pcq.scores import Scores, module_predictor
from pcq.train import batchnorm, saving
from pcq.train.batches import Batches
from pcq.train.job import Epoch, Job
from pcq.train.run import Run, diverged, refuse_nan, samples
from pcq.train.stopping import Stop

LOOK_BATCHES = 10
"""For the BatchNorm statistics of an epoch's score."""


def look(job: Job, run: Run, batches: Batches, measured: saving.Metrics, progress: Progress) -> None:
    """Score the held-out samples with the weights on their levels."""
    refuse_nan(job, run)
    job.ranks.check_same({name: target.parameter.data for name, target in job.weights.items()})
    job.ranks.share(job.module.buffers())
    count = min(LOOK_BATCHES, job.settings.estimates)
    estimated = batchnorm.borrowed(job.module, samples(job, batches, count)) if count else nullcontext()
    try:
        with run.prox.quantized() as levels, estimated, as_file(job, run, levels):
            score = number(scored(job.module, job, progress))
    except ScoringStopped:
        return
    epoch = run.step / batches.an_epoch
    mean = float(run.losses / max(1, run.counted))
    run.epochs.append(Epoch(run.step, epoch, mean, score))
    run.losses.zero_()
    run.counted, run.looked = 0, run.step
    measured.write({"kind": "epoch", "epoch": round(epoch, 4), "step": run.step, "loss": mean, "score": score})


def scored(module: nn.Module, job: Job, progress: Progress = silent) -> Scores:
    """Of the held-out samples; without labels, agreement with the float network."""
    reference = None if job.teacher is None or job.splits.val.labels is not None else module_predictor(job.teacher)
    try:
        return job.ranks.evaluate(
            module_predictor(module), job.splits.val, reference=reference, batch=job.settings.at_once, progress=progress
        )
    except CheckFailed as error:
        raise diverged(job, f"training has diverged: {error.what}") from error


def number(scores: Scores) -> float:
    """The one to choose by: top-1, or without labels agreement, or how much is explained."""
    return next(value for value in (scores.top1, scores.agreement, scores.explained) if value is not None)


def as_file(job: Job, run: Run, levels: Mapping[str, Grid]) -> AbstractContextManager[None]:
    """Within it biases are rounded as in the int8 file, the trained weights being on these levels."""
    return nullcontext() if run.simulation is None else run.simulation.on_levels({**job.fixed, **levels})


def heeding(job: Job, stop: Stop) -> Progress:
    """Scoring takes long, so a signal ends it, in all processes."""

    def progress(stage: str, done: int, total: int) -> None:
        if job.ranks.any(bool(stop.wanted)) == (True,):
            raise ScoringStopped

    return progress


class ScoringStopped(Exception):
    """A signal came while the held-out samples were being scored."""
