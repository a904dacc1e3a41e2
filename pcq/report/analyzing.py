"""What ``pcq analyze`` found."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.report.forms import decibels, finite, render, size, table, to_json, verbatim
from pcq.sensitivity import Drift


@render.register
def _(result: commands.AnalyzeResult) -> RenderableType:
    measured = result.whole is not None
    columns = ["weight", "levels", "bits", "SQNR dB", "signs lost %", "outliers %"]
    if measured:
        columns += ["layer error", "alone: error agree % KL", "spared: error agree % KL"]
    title = f"What {result.planned.recipe.name} does to {result.planned.model}, the most harmful weight first"
    made = table(title, *columns, "", right=tuple(columns[2:]))
    for row in result.weights:
        cells = [row.name, row.levels.partition(",")[0], f"{row.bits:.2f}", decibels(row.sqnr)]
        cells += [f"{row.weight.flips:.1f}", f"{row.weight.outliers:.2f}"]
        if measured:
            layer = "-" if row.local is None else f"{row.local.error:.2g}"
            cells += [layer, " ".join(f"{part:>7}" for part in _drift(row.alone))]
            cells += [" ".join(f"{part:>7}" for part in _drift(row.spared))]
        made.add_row(*cells, "8 bits?" if row.override else "")
    notes = []
    if result.whole is not None:
        error, agreement, kl = _drift(result.whole)
        like = "" if result.whole.agreement is None else f", agreement {agreement} %, KL {kl}"
        notes.append(
            f"All quantized: output error {error}{like} against the float network, on {result.data}. "
            "Alone: only this weight is quantized; spared: only this one is float."
        )
        if "invented" in result.data:
            notes.append("Invented samples order the weights; what the figures are on real data is not known.")
    else:
        notes.append("Without samples: ranked by noise / signal of the weights alone. `--calib SPEC` measures more.")
    if result.plot is not None:
        notes.append(f"Drawn: {result.plot}")
    if result.overrides:
        notes.append(f"To paste under `rules:`, before the others (adds {size(result.added)}):")
    return Group(made, Text("\n".join(notes)), *([verbatim(result.overrides)] if result.overrides else []))


def _drift(found: Drift | None) -> tuple[str, str, str]:
    if found is None:
        return "-", "-", "-"
    agreement = "-" if found.agreement is None else f"{found.agreement:.1f}"
    return f"{found.error:.2g}", agreement, "-" if found.kl is None else f"{found.kl:.2g}"


@to_json.register
def _(result: commands.AnalyzeResult) -> dict[str, Any]:
    return {
        "model": str(result.planned.model),
        "arch": result.planned.arch,
        "recipe": result.planned.recipe.to_json(),
        "data": result.data or None,
        "samples": result.samples,
        "whole": None if result.whole is None else vars(result.whole),
        "weights": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "levels": row.levels,
                "bits": row.bits,
                "bytes": row.nbytes,
                "sqnr_db": finite(row.sqnr),
                "signs_lost": row.weight.flips,
                "outliers": row.weight.outliers,
                "layer_error": None if row.local is None else row.local.error,
                "layer_error_centred": None if row.local is None else row.local.centred,
                "alone": None if row.alone is None else vars(row.alone),
                "spared": None if row.spared is None else vars(row.spared),
                "damage": row.damage,
                "override": row.override,
            }
            for row in result.weights
        ],
        "overrides": result.overrides,
        "overrides_add": result.added,
        "plot": None if result.plot is None else str(result.plot),
    }
