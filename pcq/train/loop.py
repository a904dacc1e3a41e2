"""The fine-tune: from a float network and levels for its weights to a network on its levels.

``train`` is a loop over steps whose whole state is in ``Run``; everything else is a function of the settings and of
the step's number. So a run goes on bit by bit from any step at which it was saved. Between measurements and refits no
step waits for the device.
"""

import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from pcq.errors import PcqError
from pcq.models import versioned
from pcq.progress import Progress, silent
from pcq.train import augment, batchnorm, graphs, looks, saving
from pcq.train.batches import Batches, own_randomness
from pcq.train.board import Board
from pcq.train.duration import LINES, total_steps
from pcq.train.job import BatchNorm, Job, Trained
from pcq.train.run import Run, advance, placed, refuse_nan, samples, set_up
from pcq.train.state import restore, save
from pcq.train.step import rate
from pcq.train.stopping import Interrupted, Stop, listening

SAVE_SECONDS = 120.0
"""Between saves, where no number of steps is given."""


def train(job: Job, *, resume: bool = False, progress: Progress = silent) -> Trained:
    """Minimise the loss over weights on their levels, by the recipe's method.

    Args:
        job: what to train.
        resume: go on with the interrupted run in ``job.saved``.
        progress: called after every step.

    Raises:
        PcqError: the settings, the network and the data do not fit one another, or there is no such run to resume.
        CheckFailed: the loss is not a number any more.
        Interrupted: SIGINT or SIGTERM; the state was saved.
    """
    settings, module, ranks = job.settings, job.module, job.ranks
    size = min(settings.batch, job.splits.train.n)
    if size < ranks.world:
        raise PcqError(f"a batch of {size} samples is too few for {ranks.world} processes", where="finetune.batch")
    change = augment.make(settings.augment, job.splits.plain.shape)  # type: ignore[arg-type]
    threads = 2 if job.data.startswith("folder:") else 0
    pin = threads > 0 and next(module.parameters()).device.type == "cuda"
    batches = Batches(job.splits.train, size, settings.seed, change, threads, ranks.rank, ranks.world, pin)
    saved = ranks.agree(saving.load(job.saved, job.fingerprint) if resume and ranks.first else None)
    with own_randomness(), listening(patient=ranks.world > 1) as stop, ranks.whole_batches():
        total = saved["total"] if saved else ranks.agree(total_steps(job, batches, stop))
        if saved:
            module.load_state_dict(versioned(module, saved["module"]), strict=False)
        run = set_up(job, batches, total)
        if saved:
            restore(run, saved)
        measured = _metrics(job, saved)
        try:
            with _recorded(job, batches):
                _steps(job, run, batches, measured, stop, progress)
            return _finished(job, run, batches, measured, stop, saved["step"] if saved else None)
        except looks.ScoringStopped:
            raise _interrupted(job, run, stop) from None
        finally:
            run.prox.detach()
            measured.close()
            if run.simulation is not None:
                run.simulation.detach()


def _recorded(job: Job, batches: Batches) -> AbstractContextManager[None]:
    """Within it the passes are CUDA graphs, if the recipe wants that."""
    if not job.settings.graphs:
        return nullcontext()
    x = placed(batches.make(0)[0], next(job.module.parameters()).device)
    return graphs.recorded(job.module, x, job.settings.precision == "bf16")


def _metrics(job: Job, saved: Mapping[str, Any] | None) -> saving.Metrics:
    if not job.ranks.first:
        return saving.Metrics(None)
    name = job.metrics.name.removesuffix(".metrics.jsonl")
    board = None if job.board is None else Board(job.board, name, saved["step"] + 1 if saved else 0)
    return saving.Metrics(job.metrics, saved["metrics"] if saved else 0, board)


def _steps(job: Job, run: Run, batches: Batches, measured: saving.Metrics, stop: Stop, progress: Progress) -> None:
    """From wherever the run stands to its last step."""
    settings, total = job.settings, run.total
    every = max(1, total // LINES)
    begun, first = time.perf_counter() - run.seconds, run.step
    saved_at = time.perf_counter()
    coming = batches.run(run.step, total)
    while True:
        run.seconds = time.perf_counter() - begun
        if run.looked < run.step and (run.step % batches.an_epoch == 0 or run.step == total):
            looks.look(job, run, batches, measured, looks.heeding(job, stop))
        due = run.step % job.save_every == 0 if job.save_every else time.perf_counter() - saved_at > SAVE_SECONDS
        stops, due = job.ranks.any(bool(stop.wanted), due)
        if stops or (due and run.step > first) or run.step == total:
            save(job, run, measured)
            saved_at = time.perf_counter()
        if stops:
            raise _interrupted(job, run, stop)
        if run.step == total:
            return
        x, y = next(coming)
        learning_rate = rate(settings, run.step / total)
        advance(job, run, batches, x, y, learning_rate)
        if run.step % every == 0 or run.step == total:
            refuse_nan(job, run)
            seen = run.prox.telemetry()
            run.telemetry.append(seen)
            line = {"kind": "step", "epoch": round(run.step / batches.an_epoch, 4), "lr": learning_rate}
            mean = float(run.losses / run.counted)
            measured.write({**line, "loss": mean, **asdict(seen), "seconds": round(time.perf_counter() - begun, 2)})
        progress(_stage(run, batches), run.step, total)


def _stage(run: Run, batches: Batches) -> str:
    score = f", {run.epochs[-1].score:.2f} % held out" if run.epochs else ""
    return f"epoch {(run.step - 1) // batches.an_epoch + 1} of {-(-run.total // batches.an_epoch)}{score}"


def _interrupted(job: Job, run: Run, stop: Stop) -> Interrupted:
    by = stop.wanted or "a signal to another process"
    return Interrupted(
        f"stopped by {by} after {run.step:,} of {run.total:,} steps; the run is saved in {job.saved}. "
        "Give the same command with --resume to go on.",
        signal.Signals[stop.wanted] if stop.wanted else signal.SIGTERM,
    )


def _finished(
    job: Job,
    run: Run,
    batches: Batches,
    measured: saving.Metrics,
    stop: Stop,
    resumed_at: int | None,
) -> Trained:
    """Round what is left, check that every weight is on its levels, settle BatchNorm."""
    job.ranks.share(job.module.buffers())
    module, settings, heed = job.module, job.settings, looks.heeding(job, stop)
    unquantized = looks.number(looks.scored(module, job, heed)) if run.prox.method.posttraining else None
    quantized = run.prox.finish()
    settled_as = None
    if settings.estimates and (kept := batchnorm.statistics(module)):
        levels = {name: weight.grid for name, weight in quantized.items()}
        with looks.as_file(job, run, levels):
            before = looks.number(looks.scored(module, job, heed))
        batchnorm.reestimate(module, samples(job, batches, settings.estimates))
        with looks.as_file(job, run, levels):
            after = looks.number(looks.scored(module, job, heed))
        if after <= before:
            batchnorm.put(module, kept)
        settled_as = BatchNorm(before, after, after > before)
        measured.write({"kind": "batchnorm", "step": run.step, **asdict(settled_as)})
    module.eval()
    strength = run.prox.schedule.strength
    hard_from = next((t for t in range(run.total) if strength(t / run.total, 1.0) >= 1), run.total)
    return Trained(
        quantized,
        tuple(run.epochs),
        settled_as,
        tuple(run.telemetry),
        run.total,
        hard_from,
        unquantized,
        resumed_at,
        {} if run.simulation is None else run.simulation.ranges,
    )
