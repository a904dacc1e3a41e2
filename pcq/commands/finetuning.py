"""From a float network to one on its levels that was trained there: ``pcq finetune``."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pcq import checkpoint, shards
from pcq.atomic import held, sweep
from pcq.commands import starting
from pcq.commands.budgeting import Allocation, allocate, named
from pcq.commands.calibrating import Calibrated, Calibration, Method
from pcq.commands.quantizing import Planned, default_path, plan
from pcq.commands.students import build, fitted, forms8, freeze, original_or_new, unfit
from pcq.commands.tabling import FinetuneRow, table
from pcq.errors import PcqError
from pcq.plan import Kept, Quantized
from pcq.progress import Progress, silent
from pcq.proxconnect import Telemetry, targets
from pcq.qtensor import QuantizedTensor
from pcq.recipe import Recipe, load_recipe
from pcq.settings import Finetune, changed
from pcq.train import ranks
from pcq.train.batches import own_randomness, seed_all
from pcq.train.stopping import Interrupted

if TYPE_CHECKING:
    from pcq.train.job import BatchNorm, Epoch
    from pcq.train.splits import Splits


LOOKED_AT = 64
"""Samples of a split that tell whether the data is the same."""


@dataclass(frozen=True)
class FinetuneResult:
    """What :func:`finetune` wrote.

    Attributes:
        path: the artifact.
        metrics: the measurements of the run, one JSON object a line.
        planned: what was asked for.
        settings: how it was trained, with everything settled.
        data: the training data in words.
        rows: float, one-shot, calibrated (if that was the start) and fine-tuned, as far as they can be scored; the
            fine-tuned one is the file read back.
        epochs: the score of the samples held out and the mean loss after each epoch.
        batchnorm: the scores before and after its statistics were estimated anew; None where there is none.
        telemetry: where training stood at its end.
        warnings: what the reader should know, one sentence each.
        steps: optimizer steps.
        resumed_at: the step that an interrupted run went on from.
        unquantized: for post-training quantization, the held-out score (percent) before the weights were rounded.
        bytes_before: bytes of all tensors of the input.
        bytes_after: size of the artifact, as predicted.
        bits: stored bits per quantized weight, scales and tables included.
        seconds: all of it, without imports.
        shape: one sample's shape.
        calibrated: what it started from; None: from the float network.
        allocation: how the levels were chosen; None where the recipe has no budget.
    """

    path: Path
    metrics: Path
    planned: Planned
    settings: Finetune
    data: str
    rows: tuple[FinetuneRow, ...]
    epochs: "tuple[Epoch, ...]"
    batchnorm: "BatchNorm | None"
    telemetry: Telemetry
    warnings: tuple[str, ...]
    steps: int
    resumed_at: int | None
    unquantized: float | None
    bytes_before: int
    bytes_after: int
    bits: float
    seconds: float
    shape: tuple[int, ...]
    calibrated: Calibrated | None = None
    allocation: Allocation | None = None


@own_randomness()
@ranks.joined()
def finetune(
    model: str | Path,
    recipe: str | Path | Recipe,
    data: str,
    *,
    out: str | Path | None = None,
    arch: str | None = None,
    method: str | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    distill: float | None = None,
    activations: int | None = None,
    ranges: str | None = None,
    seed: int | None = None,
    overrides: Sequence[str] = (),
    calibration: Calibration | str | None = None,
    samples: int | None = None,
    calib_method: Method | None = None,
    refine: int | None = None,
    scratch: bool = False,
    resume: bool = False,
    save_every: int | None = None,
    shard: bool = False,
    tensorboard: str | Path | None = None,
    key: str | None = None,
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> FinetuneResult:
    """Train a network whose weights are to lie on the recipe's levels, and write the artifact.

    Started by ``torchrun`` on several processes, these train together, each on its part of every batch; the first
    writes the files.

    Beside the artifact ``X.safetensors`` are written ``X.metrics.jsonl`` and, while the run goes on, ``X.resume``.

    Args:
        model: a float checkpoint in any form of the README's table.
        recipe: a recipe file, the name of a shipped one, or a loaded one; its section ``finetune`` says how to train.
            If it has a budget, levels are chosen first, as ``pcq.quantize`` chooses them.
        data: a data spec; trained on is its split ``train``, looked at on the way ``val``, and once, at the end,
            ``test``.
        out: the artifact's path; default ``<model>.<recipe>.ft.safetensors`` beside the model.
        arch: the architecture, where it is not recognised.
        method, epochs, steps, minutes, distill, activations, ranges, seed: instead of what the recipe says; see
            ``pcq.settings.Finetune``.
        overrides: ``path=value`` changes of the recipe, such as ``finetune.lr=0.001``.
        calibration: start from the calibrated network, as ``pcq.quantize`` makes it; a data spec stands for
            ``Calibration(spec, samples, calib_method, seed, refine=refine)``.
        samples, calib_method, refine: for the calibration on a data spec.
        scratch: start from random weights, not from the model's.
        resume: go on with this run where it was interrupted.
        save_every: steps between saves of what a run can go on from; default: every two minutes.
        shard: of several processes, each holds a part of every parameter (FSDP2).
        tensorboard: a folder for TensorBoard, which gets the numbers of the metrics too, under the artifact's name.
        key: which state dict to open, where a checkpoint holds several.
        allow_globals: ``package.Class`` names that a pickled model may load.
        unsafe_pickle: load a pickle that can execute code. Only for files you trust.
        force: replace a file at ``out`` that pcq did not write, and what an interrupted run has left.
        progress: called after every step.

    Raises:
        PcqError: the model, the recipe or the data is not usable, or they do not fit one another.
        CheckFailed: the loss is not a number any more, weights are off their levels, or the file is not as predicted.
        KeyboardInterrupt: SIGINT or SIGTERM; the message says how to go on, or that the artifact was written already.
    """
    from pcq.train import board
    from pcq.train.job import settled

    begun = time.perf_counter()
    if tensorboard is not None:
        board.writer()
    loaded = load_recipe(recipe, overrides)
    said = {"method": method, "distill": distill, "activations": activations, "ranges": ranges, "seed": seed}
    said |= {"epochs": epochs, "steps": steps, "minutes": minutes}
    given = {key: value for key, value in said.items() if value is not None}
    if save_every is not None and save_every < 1:
        raise PcqError(f"{save_every} steps cannot be", where="--save-every", allowed="1 or more")
    here = ranks.current(shard)
    settings = settled(changed(loaded.finetune or Finetune(), **given), data, here.device)
    about = {"--samples": samples, "--calib-method": calib_method, "--refine": refine}
    if not isinstance(calibration, str) and (lost := [option for option, value in about.items() if value is not None]):
        todo = "Say on what: --calib folder:DIR"
        raise PcqError("this is about calibration, which was not asked for", where=lost[0], todo=todo)
    if isinstance(calibration, str):
        calibration = Calibration(calibration, samples, calib_method, settings.seed, refine=refine)
    settings = starting.settled(settings, calibration, scratch)
    rules = replace(loaded, finetune=settings)
    if rules.budget is not None:
        rules = replace(rules, name=named(rules, rules.budget))
    if settings.activations and here.shard:
        what = "sharded weights cannot train with 8-bit activations, which are rounded where whole weights are read"
        raise PcqError(what, where="--shard", todo="Leave it out: each process then has the whole network")
    planned = plan(model, rules, arch=arch, key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    files = Files.beside(Path(out) if out is not None else default_path(planned.model, f"{rules.name}.ft"))
    checkpoint.refuse_overwrite(files.artifact, ".safetensors", inputs=[planned.model], force=force)
    with held(files.metrics) if here.first else nullcontext():
        return _finetune(
            planned, rules, files, data, calibration, here, begun,
            scratch=scratch, resume=resume, force=force, save_every=save_every,
            tensorboard=None if tensorboard is None else Path(tensorboard), progress=progress,
        )  # fmt: skip


def _finetune(
    planned: Planned,
    rules: Recipe,
    files: "Files",
    data: str,
    calibration: Calibration | None,
    here: ranks.Ranks,
    begun: float,
    *,
    scratch: bool,
    resume: bool,
    force: bool,
    save_every: int | None,
    tensorboard: Path | None,
    progress: Progress,
) -> FinetuneResult:
    """All of a run that touches its files, which nobody else may meanwhile; ``rules`` have their settings settled."""
    from pcq.scores import module_predictor
    from pcq.train import loop, report, saving
    from pcq.train.job import Job
    from pcq.train.splits import check_outputs, open_splits

    settings = rules.finetune
    assert settings is not None
    if files.saved.exists() and not (resume or force):
        todo = "Go on with it by --resume, or start over with --force"
        raise PcqError("a run was interrupted here", where=str(files.saved), todo=todo)
    here.wait()  # all have looked before the first one writes
    if here.first:
        sweep(files.saved)
        sweep(files.artifact)
    original = build(planned)
    seed_all(settings.seed)  # the data's own code may draw random numbers
    splits = open_splits(data, settings.augment == "resized-crop", original)
    if splits.train.labels is None:
        settings = replace(settings, distill=1.0)
        rules = replace(rules, finetune=settings)
    mark = fingerprint(planned, rules, splits, data, scratch, calibration)
    if resume:
        if here.first:
            saving.check(files.saved, mark)
        here.wait()  # before calibration, which takes minutes
    check_outputs(splits, math.prod(module_predictor(original)(*splits.plain.given([0])).shape[1:2]))
    allocation = None
    if rules.budget is not None:
        asked = None if calibration is None else starting.shaped(calibration, splits.plain.shape)
        allocation = allocate(replace(planned, recipe=rules), rules.budget, asked, progress)
        planned, rules = allocation.planned, allocation.planned.recipe
    module = original_or_new(planned, original, settings.seed if scratch else None).to(here.device)
    begin = None
    if calibration is not None:
        known = None if allocation is None else allocation.calibrated
        begin = starting.start(planned, calibration, module, splits.plain.shape, here, progress, known)
        mark["number of calibration samples"] = str(begin.calibrated.outcome.samples)
    misfit = unfit(planned, module)
    fixed = freeze(module, planned, settings, begin)
    weights = targets(planned.plan, dict(module.named_parameters(remove_duplicate=False)))
    if begin is not None:
        weights = begin.levels(weights)
    job = Job(
        module,
        original.to(here.device) if settings.distill else None,
        {name: target for name, target in weights.items() if name not in fixed},
        splits.on(here.device),
        data,
        settings,
        files.saved,
        files.metrics,
        mark,
        save_every,
        here,
        tensorboard,
        forms8(planned, module) if settings.activations else None,
        {name: weight.grid for name, weight in fixed.items()},
    )
    trained = loop.train(job, resume=resume, progress=progress)
    header = checkpoint.make_header(
        planned.plan,
        arch=planned.arch,
        recipe=rules.to_json(),
        source=planned.source,
        calibration=None if begin is None else begin.calibrated.to_json(),
        activations=trained.ranges,
    )
    floats = {name: shards.whole(tensor) for name, tensor in module.state_dict().items() if name not in weights}
    values = stored(planned, floats, {**trained.quantized, **fixed})
    size = 0
    if here.first:
        size = checkpoint.write_artifact(files.artifact, header, values)
        files.saved.unlink(missing_ok=True)
    size = here.agree(size)
    try:
        rows = table(job, planned, original, begin, files.artifact, progress)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {files.artifact} was written, its scores were not finished: "
            f"`pcq eval {files.artifact} --data '{data}'`", 0
        ) from None  # fmt: skip
    return FinetuneResult(
        files.artifact,
        files.metrics,
        planned,
        replace(settings, batch=min(settings.batch, splits.train.n)),
        splits.train.describe(),
        rows,
        trained.epochs,
        trained.batchnorm,
        trained.telemetry[-1],
        (*splits.notes, *misfit, *report.warnings(trained, settings, fitted(planned)), *over(allocation, size)),
        trained.steps,
        trained.resumed_at,
        trained.unquantized,
        planned.source.nbytes,
        size,
        planned.plan.bits,
        time.perf_counter() - begun,
        splits.plain.shape,
        None if begin is None else begin.calibrated,
        allocation,
    )


def over(allocation: Allocation | None, size: int) -> tuple[str, ...]:
    """What to say where ranges of activations, which no allocation knows, make the file larger than the budget."""
    if allocation is None or not allocation.exceeded_by(size):
        return ()
    return (f"The artifact takes {size:,} bytes, more than {allocation.budget}: ranges of activations are in it too.",)


@dataclass(frozen=True)
class Files:
    """What a run writes."""

    artifact: Path
    metrics: Path
    saved: Path

    @staticmethod
    def beside(artifact: Path) -> "Files":
        stem = artifact.name.removesuffix(".safetensors")
        return Files(artifact, artifact.with_name(f"{stem}.metrics.jsonl"), artifact.with_name(f"{stem}.resume"))


def fingerprint(
    planned: Planned, recipe: Recipe, splits: "Splits", data: str, scratch: bool, calibration: Calibration | None
) -> dict[str, str]:
    """What has to be the same for a run to go on, as far as it is known from what was asked for.

    Of the data these are the labels and some LOOKED_AT samples of each split, evenly spaced.
    """
    samples = hashlib.sha256()
    for part in (splits.train, splits.val):
        seed_all(recipe.finetune.seed if recipe.finetune is not None else 0)
        samples.update(f"{part.n} {part.shape}".encode())
        if part.labels is not None:
            samples.update(part.labels.numpy().tobytes())
        looked_at = [0, *range(part.n - 1, 0, -max(1, part.n // LOOKED_AT))]
        for each in part.given(looked_at):
            samples.update(each.numpy().tobytes())
    weights = hashlib.sha256()
    for name in planned.source.names:
        weights.update(name.encode())
        weights.update(planned.source.tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    asked = None if calibration is None else calibration.to_json(calibration.samples)
    return {
        "calibration": "none" if asked is None else json.dumps(asked, sort_keys=True),
        "recipe": json.dumps(recipe.to_json(), sort_keys=True),
        "model": f"{planned.arch}, {'random weights' if scratch else weights.hexdigest()[:16]}",
        "data": f"{data}, {samples.hexdigest()[:16]}",
    }


def stored(
    planned: Planned, floats: Mapping[str, Tensor], quantized: Mapping[str, QuantizedTensor]
) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
    """The artifact's tensors: codes where there are levels, all else in the dtype it came in."""
    for entry in planned.plan.entries:
        name = entry.parameter.name
        if entry.parameter.tied_to is not None:
            continue
        if isinstance(entry, Quantized):
            done = quantized[name]
            yield name, QuantizedTensor(done.codes.cpu(), done.grid.map(lambda t: t.cpu()), done.rows)
        else:
            assert isinstance(entry, Kept), entry
            kept = floats[name] if name in floats else planned.source.tensor(name)  # a buffer that it does not save
            yield name, kept.cpu().to(getattr(torch, entry.parameter.dtype))
