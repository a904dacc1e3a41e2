"""``quantize(model, recipe)`` is ``run(plan(model, recipe))``: planning reads names and shapes only, running writes."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pcq import checkpoint, sources
from pcq.commands.budgeting import Allocation, allocate, everything, named
from pcq.commands.calibrating import Calibrated, Calibration, calibrated, stored
from pcq.commands.networks import architecture
from pcq.data.inputs import MASK, names, needed
from pcq.errors import CheckFailed, PcqError, raise_all
from pcq.inventory import inventory
from pcq.plan import Plan, Quantized, make_plan
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor, Quantizer
from pcq.quantizers import as_they_are
from pcq.recipe import Recipe, load_recipe

NOTHING = 0.5
"""dB of signal over noise, up or down, within which a weight is as good as 0."""


@dataclass(frozen=True)
class Planned:
    """A quantization that is ready to run; nothing has been computed or written yet.

    Attributes:
        model: the file or folder the weights come from.
        source: the opened weights.
        recipe: the resolved recipe.
        plan: what will happen to each tensor, and why.
        arch: the architecture spec, if it was given or recognised.
        notes: what was found and done on the way, one sentence each.
        inputs: what the network does not run without, and a mask of tokens, where they are known.
    """

    model: Path
    source: sources.Source
    recipe: Recipe
    plan: Plan
    arch: str | None
    notes: tuple[str, ...]
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class LedgerRow:
    """One quantized weight: its levels in words, what it costs and what it loses.

    ``bits`` are stored bits per weight including scales and tables, ``sqnr`` is
    ``10 log10(sum w^2 / sum (w - dequantized)^2)`` in dB (``inf`` when exact).
    """

    name: str
    shape: tuple[int, ...]
    levels: str
    rows: int
    bits: float
    sqnr: float
    nbytes: int


@dataclass(frozen=True)
class QuantizeResult:
    """What :func:`run` wrote.

    Attributes:
        path: the artifact.
        planned: what was asked for.
        ledger: one row for each quantized weight.
        bytes_before: bytes of all tensors of the input.
        bytes_after: size of the artifact on disk.
        predicted: the size that was predicted before anything ran; equal to ``bytes_after``, or the run failed.
        bits: stored bits per quantized weight, scales and tables included.
        seconds: compute and writing, without imports.
        calibrated: what calibration found; None without.
        allocation: how the levels were chosen; None where there was no budget.
        nan: tensors kept as they are that hold NaN.
    """

    path: Path
    planned: Planned
    ledger: tuple[LedgerRow, ...]
    bytes_before: int
    bytes_after: int
    predicted: int
    bits: float
    seconds: float
    calibrated: Calibrated | None = None
    allocation: Allocation | None = None
    nan: tuple[str, ...] = ()

    @property
    def unfit(self) -> tuple[str, ...]:
        """Weights whose levels do not fit their size; see :func:`unfit`."""
        rows = {row.name: row for row in self.ledger}
        entries = [entry for entry in self.planned.plan.quantized if entry.parameter.name in rows]
        return tuple(
            entry.parameter.name for entry in entries if unfit(entry.quantizer, rows[entry.parameter.name].sqnr)
        )


def plan(
    model: str | Path,
    recipe: str | Path | Recipe,
    *,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    key: str | None = None,
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
) -> Planned:
    """Open ``model``, read ``recipe``, and settle what happens to each tensor, without reading the weights' values (but
    for those that the architecture makes one tensor and the file has several of: they have to be equal).

    Args:
        model: a checkpoint in any form of the README's table.
        recipe: a recipe file, the name of a shipped one, or a loaded one.
        arch: the architecture, such as ``torchvision:resnet18``; needed only where it is not recognised and a later
            step runs the network.
        overrides: ``path=value`` changes of the recipe, such as ``rules.0.levels.bits=4``.
        key: which state dict to open, where a checkpoint holds several.
        allow_globals: ``package.Class`` names that a pickled model may load.
        unsafe_pickle: load a pickle that can execute code. Only for files you trust.

    Raises:
        PcqError: the model, the recipe or the architecture is not usable; the message says what to do.
    """
    loaded = load_recipe(recipe, overrides)
    opened = sources.open_source(Path(model), key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    source, module, spec = architecture(opened, arch)
    shapes = {name: source.shape(name) for name in source.names}
    dtypes = {name: source.dtype(name) for name in source.names}
    if module is not None:  # `first` and `last` mean the network's order, not the file's
        ordered = [name for name in module.state_dict() if name in shapes]
        shapes = {name: shapes[name] for name in dict.fromkeys([*ordered, *shapes])}
    parameters = inventory(shapes, dtypes, module, source.tied)
    raise_all(
        [
            PcqError(
                f"holds other values than {tied.tied_to}, and in this architecture both are one tensor",
                where=f"{model}: {tied.name}",
                todo="Give an architecture in which they are two, or a checkpoint that has the value of one for both",
            )
            for tied in parameters
            if tied.tied_to is not None
            and tied.name not in source.tied
            and not torch.equal(source.tensor(tied.name), source.tensor(tied.tied_to))
        ]
    )
    made = make_plan(loaded, parameters)
    takes = () if module is None else tuple(name for name in names(module) if name in (*needed(module), MASK))
    return Planned(Path(model), source, loaded, made, spec, (*source.notes, *made.notes), takes)


def run(
    planned: Planned,
    out: str | Path | None = None,
    *,
    calibration: Calibration | None = None,
    budget: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> QuantizeResult:
    """Quantize as planned and write the artifact; nothing is left behind unless all went well.

    Without calibration one tensor at a time is in memory; with it the network and what moves through it.

    Args:
        planned: from :func:`plan`.
        out: the artifact's path; default ``<model>.<recipe>.safetensors`` beside the model.
        calibration: what to calibrate with; None: every weight is rounded for itself.
        budget: choose the levels so that it fits, such as ``3MB`` or ``2.5bits``; None: what the recipe says.
        force: replace a file at ``out`` that pcq did not write.
        progress: called after each tensor, or each calibrated layer.

    Raises:
        PcqError: a weight holds NaN or infinity, ``out`` cannot be written, or the network or the calibration samples
            are not usable.
        CheckFailed: the file on disk is not what was predicted, or more than the budget.
    """
    budget = budget or planned.recipe.budget
    if budget is not None:
        planned = replace(planned, recipe=replace(planned.recipe, name=named(planned.recipe, budget)))
    path = Path(out) if out is not None else default_path(planned.model, planned.recipe.name)
    checkpoint.refuse_overwrite(path, ".safetensors", inputs=[planned.model], force=force)
    start = time.perf_counter()
    source = planned.source
    allocation = None if budget is None else allocate(planned, budget, calibration, progress)
    if allocation is not None:
        planned, made = allocation.planned, allocation.calibrated
    else:
        made = None if calibration is None else calibrated(planned, calibration, progress)
    header = checkpoint.make_header(
        planned.plan,
        arch=planned.arch,
        recipe=planned.recipe.to_json(),
        source=source,
        calibration=None if made is None else made.to_json(),
    )
    predicted = checkpoint.predicted_size(header)
    ledger: list[LedgerRow] = []
    nan: list[str] = []

    def tensors() -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
        ready = checkpoint.quantize_source(source, planned.plan, progress) if made is None else stored(planned, made)
        for done in ready:
            if isinstance(done.entry, Quantized):
                ledger.append(ledger_row(done))
            elif isinstance(done.value, Tensor) and bool(done.value.isnan().any()):
                nan.append(done.name)
            yield done.name, done.value

    if allocation is not None and allocation.exceeded_by(predicted):
        raise CheckFailed(f"the artifact takes {predicted:,} bytes, more than {allocation.budget}", where=str(path))
    size = checkpoint.write_artifact(path, header, tensors())
    weights = sum(math.prod(row.shape) for row in ledger)
    bits = 8 * sum(row.nbytes for row in ledger) / weights if weights else 0.0
    seconds = time.perf_counter() - start
    return QuantizeResult(
        path, planned, tuple(ledger), source.nbytes, size, predicted, bits, seconds, made, allocation, tuple(nan)
    )


def ledger_row(done: checkpoint.Done) -> LedgerRow:
    """What one weight costs and loses."""
    entry, value = done.entry, done.value
    assert isinstance(entry, Quantized), entry
    assert isinstance(value, QuantizedTensor), entry
    return LedgerRow(
        done.name,
        entry.parameter.shape,
        entry.text,
        entry.rows.g,
        8 * value.nbytes / value.numel,
        sqnr(done.signal, done.noise),
        value.nbytes,
    )


def sqnr(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinite where one of them is 0."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf


def unfit(quantizer: Quantizer, ratio: float) -> bool:
    """Whether next to nothing is kept of a weight by its SQNR: fixed levels are used as they are, whatever its size."""
    return as_they_are(quantizer) and abs(ratio) < NOTHING


def default_path(model: Path, recipe: str) -> Path:
    """``model.pt`` with recipe ``ternary`` -> ``model.ternary.safetensors`` beside it."""
    name = model.name
    for suffix in (".json", ".index", ".safetensors", ".pt2", ".pt", ".pth", ".bin", ".ckpt"):
        name = name.removesuffix(suffix)
    return model.parent / f"{name or 'model'}.{recipe}.safetensors"


def quantize(
    model: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    out: str | Path | None = None,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    key: str | None = None,
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
    calibration: Calibration | str | None = None,
    budget: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> QuantizeResult:
    """One-shot quantization of a checkpoint to an artifact: :func:`plan`, then :func:`run`, with their arguments.

    ``calibration`` may be a data spec or ``random``, which stands for ``Calibration(spec)``. Without a recipe the
    ``budget`` is for every weight that can be quantized.
    """
    if recipe is None:
        if budget is None:
            raise PcqError("neither a recipe nor a budget is given", where="quantize")
        recipe = everything(budget)
    planned = plan(
        model, recipe, arch=arch, overrides=overrides, key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle
    )
    if isinstance(calibration, str):
        calibration = Calibration(calibration)
    return run(planned, out, calibration=calibration, budget=budget, force=force, progress=progress)
