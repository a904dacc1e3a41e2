"""ONNX in, ONNX out: ``plan_onnx`` and ``run_onnx`` do for a model what ``plan`` and ``run`` do for a checkpoint."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pcq import checkpoint
from pcq.commands.calibrating import Calibration
from pcq.commands.onnx_calibrating import OnnxCalibrated, calibrated_onnx
from pcq.commands.quantizing import LedgerRow, Planned, ledger_row
from pcq.errors import PcqError, raise_all
from pcq.plan import Kept, Plan, Quantized, make_plan
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor
from pcq.recipe import Recipe, load_recipe
from pcq.rules import Parameter

if TYPE_CHECKING:
    from pcq.onnx_input import Inventory, Rewritten

OVERHEAD = 600
"""Bytes that a packed weight takes in the file beside its codes and scales: its call, its names, its scheme."""

DETECTED = "exact"
"""The name of what is done without a recipe."""


@dataclass(frozen=True)
class OnnxQuantizeResult:
    """What :func:`run_onnx` wrote.

    Attributes:
        path: the packed ONNX file.
        planned: what was asked for.
        ledger: one row for each packed weight.
        bytes_before: size of the input with its external data.
        bits: stored bits per packed weight, scales and tables included.
        proof: the file, and the runs beside the input model.
        seconds: in all.
        calibrated: what calibration found; None without.
    """

    path: Path
    planned: Planned
    ledger: tuple[LedgerRow, ...]
    bytes_before: int
    bits: float
    proof: "Rewritten"
    seconds: float
    calibrated: OnnxCalibrated | None = None


def plan_onnx(
    model: str | Path, recipe: str | Path | Recipe | None, *, overrides: Sequence[str] = (), detect: bool = False
) -> Planned:
    """Find the weights of an ONNX model and settle what happens to each.

    Args:
        model: a float ONNX file.
        recipe: a recipe file, the name of a shipped one, or a loaded one; None with ``detect``.
        overrides: ``path=value`` changes of the recipe.
        detect: take only weights that have few different values already, and lose nothing.

    Raises:
        PcqError: the model or the recipe is not usable; the model is quantized already.
    """
    from pcq import onnx_input

    if (recipe is None) is not detect:
        what = "a recipe chooses levels, --detect takes those that are there" if detect else "a recipe is needed"
        raise PcqError(what, where="--recipe", todo="Give one of --recipe and --detect")
    opened = onnx_input.open_graph(Path(model))
    inventory = onnx_input.take_inventory(opened)
    if recipe is None:
        loaded, made = Recipe(DETECTED, "", ()), _detected(inventory)
    else:
        loaded = load_recipe(recipe, overrides)
        if loaded.budget is not None:
            todo = "Choose the levels by its rules alone"
            raise PcqError("budgets are for checkpoints, and an ONNX model was given", where="budget", todo=todo)
        made = make_plan(loaded, inventory.parameters)
    entries = tuple(_settled(entry) for entry in made.entries)
    packed = [entry.parameter.name for entry in entries if isinstance(entry, Quantized)]
    if not packed:
        why = "no weight has few enough different values" if detect else "no weight of a layer is left to quantize"
        raise PcqError(why, where=str(model), todo="`pcq inspect` lists the tensors")
    roots = {operand.chain.root for name in packed for operand in inventory.weights[name].operands}
    inputs = sum(root.is_graph_input() for root in roots)
    notes = (*opened.notes, *onnx_input.unlisted(inputs))
    return Planned(Path(model), inventory.source, loaded, Plan(entries, made.notes), None, notes)


def _settled(entry: Quantized | Kept) -> Quantized | Kept:
    """An entry, without weights too small to gain."""
    if isinstance(entry, Quantized) and entry.nbytes + OVERHEAD >= entry.parameter.nbytes:
        return Kept(entry.parameter, "too small to gain by packing")
    return entry


def _detected(inventory: "Inventory") -> Plan:
    """What is lossless for each weight."""
    from pcq import onnx_input

    entries: list[Quantized | Kept] = []
    for weight in inventory.weights.values():
        parameter: Parameter = weight.parameter
        transposed = parameter.groups if parameter.kind.startswith("conv_transpose") else None
        values = weight.read()
        found = onnx_input.detect(values, transposed)
        if found is None:
            finite = bool(values.isfinite().all())
            why = "more than 256 different values a channel" if finite else "it holds NaN or infinity"
            entries.append(Kept(parameter, why))
        else:
            entries.append(Quantized(parameter, found[1], found[0], 0))  # type: ignore[arg-type]
    return Plan((*entries, *(Kept(parameter, parameter.why) for parameter in inventory.others)))


def run_onnx(
    planned: Planned,
    out: str | Path | None = None,
    *,
    calibration: Calibration | None = None,
    samples: Sequence[str | Path] = (),
    force: bool = False,
    progress: Progress = silent,
) -> OnnxQuantizeResult:
    """Quantize an ONNX model as planned, write it with its weights packed, and prove it against the input model.

    Args:
        planned: from :func:`plan_onnx`.
        out: the file; default ``<model>.<recipe>.onnx`` beside the model.
        calibration: what to calibrate with; None: every weight is rounded for itself.
        samples: ``.npz`` files with an array for each input: more to compare on than random inputs.
        force: replace a file at ``out`` that pcq did not write.
        progress: called at each stage.

    Raises:
        PcqError: a weight holds NaN or infinity, no input is known that the model runs on, it does not run on the
            calibration samples, or raising its operator set changes what it computes.
        CheckFailed: the file is not bit-exact, computes something else, or has another size than predicted.
    """
    from pcq import onnx_input
    from pcq.onnx_input.trials import read_sample

    start = time.perf_counter()
    path = Path(out) if out is not None else checkpoint.beside(planned.model, f".{planned.recipe.name}.onnx")
    checkpoint.refuse_overwrite(path, ".onnx", inputs=[planned.model], force=force)
    if calibration is not None and not planned.recipe.rules:
        raise PcqError("nothing is rounded with --detect, so there is nothing to calibrate", where="--calib")
    opened = onnx_input.open_graph(planned.model)
    graph = opened.model.graph
    inputs = [value.name or "" for value in graph.inputs if value.name not in graph.initializers]
    given = [read_sample(Path(sample), inputs) for sample in samples]
    inventory = onnx_input.take_inventory(opened)
    entries = planned.plan.quantized
    ledger: list[LedgerRow] = []
    quantized: dict[str, QuantizedTensor] = {}
    total, done = sum(entry.parameter.numel for entry in entries), 0
    problems: list[PcqError] = []
    for entry in entries:
        try:
            checkpoint.refuse_non_finite(entry.parameter.name, inventory.weights[entry.parameter.name].read())
        except PcqError as problem:
            problems.append(problem)
    raise_all(problems)
    progress("find inputs", 0, 1)
    trials = onnx_input.find_inputs(opened, given)
    made = None if calibration is None else calibrated_onnx(planned, calibration, progress)
    for entry in entries:
        name = entry.parameter.name
        progress(f"quantizing {name}", done, total)
        weight = inventory.weights[name].read()
        done += weight.numel()
        if made is None:
            ready = checkpoint.Done(entry, *checkpoint.quantize_sliced(entry.quantizer, weight, entry.rows))
        else:
            value = made.outcome.quantized[name]
            noise = float((value.dequantize() - weight).square_().sum(dtype=torch.float64))
            ready = checkpoint.Done(entry, value, float(weight.square().sum(dtype=torch.float64)), noise)
        assert isinstance(ready.value, QuantizedTensor)
        quantized[name] = ready.value
        ledger.append(ledger_row(ready))
    metadata = {"recipe": json.dumps(planned.recipe.to_json()), "source": planned.model.name}
    if made is not None:
        metadata["calibration"] = json.dumps(made.to_json())
    proof = onnx_input.write_packed(
        opened, inventory, quantized, path, trials,
        changed=None if made is None else made.outcome.changed, metadata=metadata, progress=progress,
    )  # fmt: skip
    weights = sum(math.prod(row.shape) for row in ledger)
    bits = 8 * sum(row.nbytes for row in ledger) / weights
    seconds = time.perf_counter() - start
    return OnnxQuantizeResult(path, planned, tuple(ledger), opened.file_bytes, bits, proof, seconds, made)


def quantize_onnx(
    model: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    detect: bool = False,
    calibration: Calibration | str | None = None,
    samples: Sequence[str | Path] = (),
    force: bool = False,
    progress: Progress = silent,
) -> OnnxQuantizeResult:
    """One-shot quantization of an ONNX model to packed ONNX: :func:`plan_onnx`, then :func:`run_onnx`."""
    planned = plan_onnx(model, recipe, overrides=overrides, detect=detect)
    if isinstance(calibration, str):
        calibration = Calibration(calibration)
    return run_onnx(planned, out, calibration=calibration, samples=samples, force=force, progress=progress)
