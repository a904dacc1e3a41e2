"""The fine-tune: from a float network and levels for its weights to a network on its levels.

``train`` is a loop over steps whose whole state is in ``_Run``; everything else is a function of the settings and of
the step's number. So a run goes on bit by bit from any step at which it was saved. Between measurements and refits no
step waits for the device.
"""

import copy
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcq import shards
from pcq.activations import Range
from pcq.data import Inputs
from pcq.data.inputs import refusing
from pcq.errors import CheckFailed, PcqError
from pcq.grids import Grid
from pcq.loading import versioned
from pcq.progress import Progress, silent
from pcq.proxconnect import ProxConnect, Target, Telemetry
from pcq.qtensor import QuantizedTensor
from pcq.scores import Scores, module_predictor
from pcq.settings import EPOCHS, Finetune, method_of, schedule_of
from pcq.train import augment, batchnorm, graphs, saving
from pcq.train.activations import Simulation, Weight8
from pcq.train.batches import Batches, own_randomness
from pcq.train.board import Board
from pcq.train.ranks import ALONE, Ranks
from pcq.train.splits import Splits
from pcq.train.step import logits, loss_of, make_optimizer, rate, update
from pcq.train.stopping import Interrupted, Stop, listening

LINES = 100
"""Measurements over a run."""

SAVE_SECONDS = 120.0
"""Between saves, where no number of steps is given."""

OBSERVED = 0.1
"""Share of the training before ranges of activations are learned."""

TRIED = 22
"""Steps that are timed where the duration is given in minutes: two to warm up, and one with a refit."""

LOOKS_AT_END = 3
"""Scores of the held-out samples after the last epoch's: with two kinds of BatchNorm statistics, and room."""

LOOK_BATCHES = 10
"""For the BatchNorm statistics of an epoch's score."""

ALONE_IN_BATCH = (
    "BatchNorm normalises by the batch in training: give a larger one (finetune.batch), or finetune.mode: eval"
)


@dataclass(frozen=True)
class Job:
    """What to train.

    Attributes:
        module: the network with the weights to start from, on its device; it is trained in place.
        teacher: the float network, where its outputs are needed.
        weights: what gets levels, by name.
        splits: the data.
        data: its spec.
        settings: all else; ``augment`` and ``precision`` settled.
        saved: where the state goes that the run can go on from.
        metrics: where the measurements go.
        fingerprint: of recipe, model and data: what a saved state has to agree with.
        save_every: steps between saves; None: by the clock.
        ranks: the processes that train together; the first one writes the files.
        board: TensorBoard's folder; None: it gets nothing.
        weights8: parameters whose layers compute on activations of 8 bits; None: activations are float.
        fixed: levels of the weights that are not trained.
    """

    module: nn.Module
    teacher: nn.Module | None
    weights: Mapping[str, Target]
    splits: Splits
    data: str
    settings: Finetune
    saved: Path
    metrics: Path
    fingerprint: Mapping[str, str]
    save_every: int | None = None
    ranks: Ranks = ALONE
    board: Path | None = None
    weights8: Mapping[Tensor, Weight8] | None = None
    fixed: Mapping[str, Grid] = field(default_factory=dict)


@dataclass(frozen=True)
class Epoch:
    """One look: the score (percent) of the held-out samples with the weights on their levels, and the mean loss."""

    step: int
    epoch: float
    loss: float
    score: float


@dataclass(frozen=True)
class BatchNorm:
    """Scores (percent) of the held-out samples with the statistics of training and with those estimated anew."""

    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class Trained:
    """What came out; the module holds it too.

    Attributes:
        quantized: codes and levels of each weight that has some.
        epochs: one look an epoch.
        batchnorm: None where there is nothing to estimate.
        telemetry: the measurements over the run, the last one at its end.
        steps: optimizer steps.
        hard_from: the step from which on all weights were on their levels.
        unquantized: for post-training quantization, the score before the weights were rounded.
        resumed_at: the step that the run went on from, if it was interrupted.
        ranges: of activations, by name, where they had 8 bits.
    """

    quantized: dict[str, QuantizedTensor]
    epochs: tuple[Epoch, ...]
    batchnorm: BatchNorm | None
    telemetry: tuple[Telemetry, ...]
    steps: int
    hard_from: int
    unquantized: float | None
    resumed_at: int | None
    ranges: dict[str, Range] = field(default_factory=dict)


@dataclass
class _Run:
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


def quick_in_bf16(device: torch.device) -> bool:
    """Whether the machine multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    flags = Path("/proc/cpuinfo")
    return device.type == "cpu" and flags.is_file() and "avx512_bf16" in flags.read_text(errors="ignore")


def settled(settings: Finetune, data: str, device: torch.device) -> Finetune:
    """``settings`` with every ``auto`` made up, but for ``anneal``, which belongs to the method."""
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if settings.activations is None and quick_in_bf16(device) else "float32"
    return replace(settings, augment=augment.settle(settings.augment, data), precision=precision)


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
        total = saved["total"] if saved else ranks.agree(_total(job, batches, stop))
        if saved:
            module.load_state_dict(versioned(module, saved["module"]), strict=False)
        run = _set_up(job, batches, total)
        if saved:
            _restore(run, saved)
        measured = _metrics(job, saved)
        try:
            with _recorded(job, batches):
                _steps(job, run, batches, measured, stop, progress)
            return _finished(job, run, batches, measured, stop, saved["step"] if saved else None)
        except _ScoringStopped:
            raise _interrupted(job, run, stop) from None
        finally:
            run.prox.detach()
            measured.close()
            if run.simulation is not None:
                run.simulation.detach()


def _set_up(job: Job, batches: Batches, total: int) -> _Run:
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
    run = _Run(optimizer, prox, total, torch.zeros((), dtype=torch.float64, device=device))
    if job.weights8 is not None:
        run.simulation = Simulation(module, job.weights8, ranks=job.ranks)
        run.simulation.look(*next(_samples(job, batches, 1)))
        if settings.ranges == "learned" and run.simulation.seen <= run.simulation.halved:
            raise PcqError("there are no ranges to learn", where="finetune.ranges",
                           allowed="activations of 8 bits; where weights of 8 bits read them they have 7, and "
                           "those of tokens are measured anew in each run",
                           todo="Leave it out, or give weights 7 bits or fewer")  # fmt: skip
    return run


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


def _total(job: Job, batches: Batches, stop: Stop) -> int:
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
    run = _set_up(trial, batches, TRIED)
    begun, limit, ends = time.perf_counter(), time.perf_counter() + 20, list[float]()
    for x, y in batches.run(0, TRIED):
        _step(trial, run, batches, x, y, 1e-8)
        float(run.losses)  # waits for the device
        ends.append(time.perf_counter())
        if job.ranks.any(ends[-1] > limit or bool(stop.wanted)) == (True,):
            break
    warm = len(ends) // 10
    step = (ends[-1] - (ends[warm - 1] if warm else begun)) / (len(ends) - warm)
    begun = time.perf_counter()
    run.prox.telemetry()
    measured = time.perf_counter()
    _look(trial, run, batches, saving.Metrics(None), _heeding(job, stop))
    return step, time.perf_counter() - measured, measured - begun


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


def placed(inputs: Inputs, device: torch.device) -> Inputs:
    """On the device; images with their channels last, which is how convolutions like them."""
    there = (x.to(device, non_blocking=True) for x in inputs)
    return tuple(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in there)


def _steps(job: Job, run: _Run, batches: Batches, measured: saving.Metrics, stop: Stop, progress: Progress) -> None:
    """From wherever the run stands to its last step."""
    settings, total = job.settings, run.total
    every = max(1, total // LINES)
    begun, first = time.perf_counter() - run.seconds, run.step
    saved_at = time.perf_counter()
    coming = batches.run(run.step, total)
    while True:
        run.seconds = time.perf_counter() - begun
        if run.looked < run.step and (run.step % batches.an_epoch == 0 or run.step == total):
            _look(job, run, batches, measured, _heeding(job, stop))
        due = run.step % job.save_every == 0 if job.save_every else time.perf_counter() - saved_at > SAVE_SECONDS
        stops, due = job.ranks.any(bool(stop.wanted), due)
        if stops or (due and run.step > first) or run.step == total:
            _save(job, run, measured)
            saved_at = time.perf_counter()
        if stops:
            raise _interrupted(job, run, stop)
        if run.step == total:
            return
        x, y = next(coming)
        learning_rate = rate(settings, run.step / total)
        _step(job, run, batches, x, y, learning_rate)
        if run.step % every == 0 or run.step == total:
            _refuse_nan(job, run)
            seen = run.prox.telemetry()
            run.telemetry.append(seen)
            line = {"kind": "step", "epoch": round(run.step / batches.an_epoch, 4), "lr": learning_rate}
            mean = float(run.losses / run.counted)
            measured.write({**line, "loss": mean, **asdict(seen), "seconds": round(time.perf_counter() - begun, 2)})
        progress(_stage(run, batches), run.step, total)


def _step(job: Job, run: _Run, batches: Batches, x: Inputs, y: Tensor | None, learning_rate: float) -> None:
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


def _stage(run: _Run, batches: Batches) -> str:
    score = f", {run.epochs[-1].score:.2f} % held out" if run.epochs else ""
    return f"epoch {(run.step - 1) // batches.an_epoch + 1} of {-(-run.total // batches.an_epoch)}{score}"


def _heeding(job: Job, stop: Stop) -> Progress:
    """Scoring takes long, so a signal ends it, in all processes."""

    def progress(stage: str, done: int, total: int) -> None:
        if job.ranks.any(bool(stop.wanted)) == (True,):
            raise _ScoringStopped

    return progress


class _ScoringStopped(Exception):
    """A signal came while the held-out samples were being scored."""


def _refuse_nan(job: Job, run: _Run) -> None:
    if not bool(torch.isfinite(run.losses)):
        raise _diverged(job, f"the loss is not a number any more at step {run.step}")


def _diverged(job: Job, what: str) -> CheckFailed:
    kept = f" The last saved state is {job.saved}." if job.saved.is_file() else ""
    rate = f"Lower the learning rate (--set finetune.lr={job.settings.learning_rate / 4:g})"
    return CheckFailed(what, todo=f"{rate}, or limit the gradient (--set finetune.clip=1).{kept}")


def scored(module: nn.Module, job: Job, progress: Progress = silent) -> Scores:
    """Of the held-out samples; without labels, agreement with the float network."""
    reference = None if job.teacher is None or job.splits.val.labels is not None else module_predictor(job.teacher)
    try:
        return job.ranks.evaluate(
            module_predictor(module), job.splits.val, reference=reference, batch=job.settings.at_once, progress=progress
        )
    except CheckFailed as error:
        raise _diverged(job, f"training has diverged: {error.what}") from error


def number(scores: Scores) -> float:
    """The one to choose by: top-1, or without labels agreement, or how much is explained."""
    return next(value for value in (scores.top1, scores.agreement, scores.explained) if value is not None)


def _as_file(job: Job, run: _Run, levels: Mapping[str, Grid]) -> AbstractContextManager[None]:
    """Within it biases are rounded as in the int8 file, the trained weights being on these levels."""
    return nullcontext() if run.simulation is None else run.simulation.on_levels({**job.fixed, **levels})


def _samples(job: Job, batches: Batches, count: int) -> Iterator[Inputs]:
    """``count`` batches as they are trained on, changed at random, the same ones each time."""
    device = next(job.module.parameters()).device
    for step in range(min(count, batches.an_epoch)):
        yield placed(batches.make(step)[0], device)


def _look(job: Job, run: _Run, batches: Batches, measured: saving.Metrics, progress: Progress) -> None:
    """Score the held-out samples with the weights on their levels."""
    _refuse_nan(job, run)
    job.ranks.check_same({name: target.parameter.data for name, target in job.weights.items()})
    job.ranks.share(job.module.buffers())
    count = min(LOOK_BATCHES, job.settings.estimates)
    estimated = batchnorm.borrowed(job.module, _samples(job, batches, count)) if count else nullcontext()
    try:
        with run.prox.quantized() as levels, estimated, _as_file(job, run, levels):
            score = number(scored(job.module, job, progress))
    except _ScoringStopped:
        return
    epoch = run.step / batches.an_epoch
    mean = float(run.losses / max(1, run.counted))
    run.epochs.append(Epoch(run.step, epoch, mean, score))
    run.losses.zero_()
    run.counted, run.looked = 0, run.step
    measured.write({"kind": "epoch", "epoch": round(epoch, 4), "step": run.step, "loss": mean, "score": score})


def _save(job: Job, run: _Run, measured: saving.Metrics) -> None:
    _refuse_nan(job, run)
    here, optimizer = job.ranks.first, run.optimizer.state_dict()
    optimizer["state"] = {
        number: {key: shards.saved(value, here) if isinstance(value, Tensor) else value for key, value in each.items()}
        for number, each in optimizer["state"].items()
    }
    mine = {name: shards.saved(t, here) for name, t in job.module.state_dict().items() if name not in job.weights}
    prox = run.prox.state_dict()
    if not here:
        return
    state = {
        "module": mine,
        "optimizer": optimizer,
        "prox": prox,
        "total": run.total,
        "step": run.step,
        "looked": run.looked,
        "losses": run.losses,
        "counted": run.counted,
        "epochs": [asdict(epoch) for epoch in run.epochs],
        "telemetry": [asdict(seen) for seen in run.telemetry],
        "seconds": run.seconds,
        "metrics": measured.flushed(),
        "activations": None if run.simulation is None else run.simulation.state_dict(),
    }
    try:
        saving.save(job.saved, state, job.fingerprint)
    except PcqError as error:
        if not job.saved.is_file():
            raise
        todo = f"{error.todo}; then the same command with --resume goes on from the last save, which stays"
        raise PcqError(error.what, where=error.where, todo=todo) from error


def _restore(run: _Run, saved: Mapping[str, Any]) -> None:
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    state = {
        number: {
            key: shards.spread(value, parameters[number]) if _of(parameters[number], value) else value
            for key, value in each.items()
        }
        for number, each in saved["optimizer"]["state"].items()
    }
    run.optimizer.load_state_dict({**saved["optimizer"], "state": state})
    run.prox.load_state_dict(saved["prox"])
    run.step, run.looked, run.counted, run.seconds = (saved[k] for k in ("step", "looked", "counted", "seconds"))
    run.losses.copy_(saved["losses"])
    run.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]
    run.telemetry = [Telemetry(**seen) for seen in saved["telemetry"]]
    if run.simulation is not None:
        run.simulation.load_state_dict(saved["activations"])


def _of(parameter: Tensor, value: object) -> bool:
    """Whether a value in the optimizer's state has an element for each of the parameter's."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _interrupted(job: Job, run: _Run, stop: Stop) -> Interrupted:
    by = stop.wanted or "a signal to another process"
    return Interrupted(
        f"stopped by {by} after {run.step:,} of {run.total:,} steps; the run is saved in {job.saved}. "
        "Give the same command with --resume to go on.",
        signal.Signals[stop.wanted] if stop.wanted else signal.SIGTERM,
    )


def _finished(
    job: Job,
    run: _Run,
    batches: Batches,
    measured: saving.Metrics,
    stop: Stop,
    resumed_at: int | None,
) -> Trained:
    """Round what is left, check that every weight is on its levels, settle BatchNorm."""
    job.ranks.share(job.module.buffers())
    module, settings, heed = job.module, job.settings, _heeding(job, stop)
    unquantized = number(scored(module, job, heed)) if run.prox.method.posttraining else None
    quantized = run.prox.finish()
    settled_as = None
    if settings.estimates and (kept := batchnorm.statistics(module)):
        levels = {name: weight.grid for name, weight in quantized.items()}
        with _as_file(job, run, levels):
            before = number(scored(module, job, heed))
        batchnorm.reestimate(module, _samples(job, batches, settings.estimates))
        with _as_file(job, run, levels):
            after = number(scored(module, job, heed))
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
