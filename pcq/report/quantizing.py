"""Plans and ledgers."""

from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.plan import Kept, Quantized
from pcq.report.forms import decibels, finite, render, shape, size, smaller, table, to_json
from pcq.words import counted, first_of


@render.register
def _(result: commands.Planned) -> RenderableType:
    made = table(
        f"Plan: {result.model} with recipe {result.recipe.name}",
        "weight",
        "shape",
        "levels",
        "rule",
        "bytes",
        right=("rule", "bytes"),
    )
    kept: Counter[str] = Counter()
    tied = []
    for entry in result.plan.entries:
        name = entry.parameter.name
        if isinstance(entry, Quantized):
            made.add_row(name, shape(entry.parameter.shape), entry.text, str(entry.rule + 1), size(entry.nbytes))
        elif entry.parameter.tied_to is not None:
            tied.append(f"{name} is {entry.parameter.tied_to}")
        elif entry.parameter.kind in ("norm", "bias", "buffer"):
            kept[entry.reason] += 1
        else:
            made.add_row(name, shape(entry.parameter.shape), f"float: {entry.reason}", "", size(entry.nbytes))
    rest = ", ".join(f"{count} {reason}" for reason, count in kept.items())
    lines = [f"Left float as well: {rest}." if rest else "No other tensors."]
    lines += [f"Tied, and stored once: {', '.join(tied)}."] if tied else []
    return Group(made, Text("\n".join(lines)))


@to_json.register
def _(result: commands.Planned) -> dict[str, Any]:
    return {
        "model": str(result.model),
        "arch": result.arch,
        "recipe": result.recipe.to_json(),
        "notes": list(result.notes),
        "entries": [
            {
                "name": entry.parameter.name,
                "shape": list(entry.parameter.shape),
                "kind": entry.parameter.kind,
                "levels": entry.text if isinstance(entry, Quantized) else None,
                "rule": entry.rule + 1 if isinstance(entry, Quantized) else None,
                "reason": entry.reason if isinstance(entry, Kept) else None,
                "bytes": entry.nbytes,
            }
            for entry in result.plan.entries
        ],
    }


@render.register
def _(result: commands.QuantizeResult) -> RenderableType:
    made = table(
        f"Ledger: {result.path}",
        "weight",
        "shape",
        "levels",
        "rows",
        "bits/weight",
        "SQNR dB",
        "bytes",
        right=("rows", "bits/weight", "SQNR dB", "bytes"),
    )
    for row in result.ledger:
        made.add_row(
            row.name,
            shape(row.shape),
            row.levels,
            f"{row.rows:,}",
            f"{row.bits:.3f}",
            decibels(row.sqnr),
            f"{row.nbytes:,}",
        )
    total = (
        f"{size(result.bytes_before)} of tensors -> {size(result.bytes_after)} on disk "
        f"({smaller(result.bytes_before, result.bytes_after)}), {result.bits:.3f} bits per quantized weight with "
        f"scales and tables; size as predicted to the byte; {result.seconds:.1f} s."
    )
    parts = [render(part) for part in (result.allocation, result.calibrated) if part is not None]
    if result.nan:
        named = first_of(result.nan)
        total += f"\nNaN in what stays as it is, which the outputs may become too: {named}. Repair the checkpoint."
    if result.unfit:
        total += f"\n{_unfit(result)}"
    elif _rounded_blindly(result):
        total += ROUNDED
    return Group(made, *parts, Text(total))


def _unfit(result: commands.QuantizeResult) -> str:
    lost = result.unfit
    return (
        f"Next to nothing is kept of {len(lost)} of {counted(len(result.ledger), 'weight')} ({first_of(lost)}): fixed "
        "levels are used as they are, whatever the weights' size. `scale: mse` beside them in the recipe fits them."
    )


ROUNDED = (
    "\nEach weight was rounded for itself, which shifts what its layer puts out. BatchNorm knows what that was in "
    "training: `--calib random` repairs most of it without data, `--calib SPEC` more, with unlabelled samples."
)
FEW_BITS = 6
"""Bits a weight below which plain rounding was seen to cost networks with BatchNorm points."""


def _rounded_blindly(result: commands.QuantizeResult) -> bool:
    """Whether there was no calibration of a network with BatchNorm to few bits."""
    norms = any(entry.parameter.name.endswith("running_var") for entry in result.planned.plan.entries)
    return result.calibrated is None and norms and 0 < result.bits < FEW_BITS


@render.register
def _(result: commands.Calibrated) -> RenderableType:
    made = table(
        f"Calibration on {result.data}",
        "step",
        "output error",
        "agreement with float %",
        "seconds",
        "",
        right=("output error", "agreement with float %", "seconds"),
    )
    for step in result.outcome.steps:
        made.add_row(
            step.name,
            "" if step.error is None else f"{step.error:.4g}",
            "" if step.agreement is None else f"{step.agreement:.1f}",
            f"{step.seconds:.1f}",
            step.reason or "kept",
        )
    outcome = result.outcome
    kind = "invented " if result.asked.data == "random" else ""
    notes = [f"Measured on {outcome.held_out:,} other {kind}samples, against the float network."]
    if kind:
        notes.append("What this is worth on real data is not known without any: score it with `pcq eval`.")
    notes += [f"{name} was only rounded to its nearest levels: {why}." for name, why in outcome.plain.items()]
    return Group(made, Text("\n".join(notes)))


@to_json.register
def _(result: commands.Calibrated) -> dict[str, Any]:
    outcome = result.outcome
    return {
        **result.to_json(),
        "description": result.data,
        "held_out": outcome.held_out,
        "steps": [
            {
                "name": step.name,
                "error": step.error,
                "agreement": step.agreement,
                "kept": not step.reason,
                "reason": step.reason,
                "seconds": step.seconds,
            }
            for step in outcome.steps
        ],
        "layers": [vars(layer) for layer in outcome.layers],
        "blocks": [vars(block) for block in outcome.blocks],
        "only_rounded": dict(outcome.plain),
    }


@to_json.register
def _(result: commands.QuantizeResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "plan": to_json(result.planned),
        "ledger": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "levels": row.levels,
                "rows": row.rows,
                "bits": row.bits,
                "sqnr_db": finite(row.sqnr),
                "bytes": row.nbytes,
            }
            for row in result.ledger
        ],
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "bytes_predicted": result.predicted,
        "bits": result.bits,
        "seconds": result.seconds,
        "allocation": None if result.allocation is None else to_json(result.allocation),
        "nan": list(result.nan),
        "unfit": list(result.unfit),
        "calibration": None if result.calibrated is None else to_json(result.calibrated),
    }
