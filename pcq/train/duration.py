"""How many steps a recipe's epochs, steps or minutes are."""

import copy
import time
from dataclasses import replace
from typing import Any

from pcq.settings import EPOCHS
from pcq.train import saving
from pcq.train.batches import Batches
from pcq.train.job import Job
from pcq.train.looks import heeding, look
from pcq.train.run import advance, set_up
from pcq.train.stopping import Stop

LINES = 100
"""Measurements over a run."""

TRIED = 22
"""Steps that are timed where the duration is given in minutes: two to warm up, and one with a refit."""

LOOKS_AT_END = 3
"""Scores of the held-out samples after the last epoch's: with two kinds of BatchNorm statistics, and room."""


def total_steps(job: Job, batches: Batches, stop: Stop) -> int:
    """Optimizer steps, from the recipe's duration."""
    settings = job.settings
    if settings.steps is not None:
        return settings.steps
    if settings.minutes is None:
        return max(1, round((settings.epochs or EPOCHS) * batches.an_epoch))
    begun = time.perf_counter()
    step, look, line = _measured(job, batches, stop)
    left = settings.minutes * 60 - (time.perf_counter() - begun) - LOOKS_AT_END * look
    each = step + look / batches.an_epoch
    every = max(1, int(left / each) // LINES)
    return max(1, round(left / (each + line / every)))


def _measured(job: Job, batches: Batches, stop: Stop) -> tuple[float, float, float]:
    """Seconds of a training step, of a look and of a measurement, by a few of each on a copy of the network."""
    copied: dict[int, Any] = {}
    module = copy.deepcopy(job.module, copied)
    weights = {name: replace(each, parameter=module.get_parameter(name)) for name, each in job.weights.items()}
    weights8 = None if job.weights8 is None else {copied[id(p)]: each for p, each in job.weights8.items()}
    trial = replace(job, module=module, weights=weights, weights8=weights8)
    run = set_up(trial, batches, TRIED)
    begun, limit, ends = time.perf_counter(), time.perf_counter() + 20, list[float]()
    for x, y in batches.run(0, TRIED):
        advance(trial, run, batches, x, y, 1e-8)
        float(run.losses)  # waits for the device
        ends.append(time.perf_counter())
        if job.ranks.any(ends[-1] > limit or bool(stop.wanted)) == (True,):
            break
    warm = len(ends) // 10
    step = (ends[-1] - (ends[warm - 1] if warm else begun)) / (len(ends) - warm)
    begun = time.perf_counter()
    run.prox.telemetry()
    measured = time.perf_counter()
    look(trial, run, batches, saving.Metrics(None), heeding(job, stop))
    return step, time.perf_counter() - measured, measured - begun
