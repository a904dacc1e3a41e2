"""How a budget was spent."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.report.forms import render, size, table, to_json


@render.register
def _(result: commands.Allocation) -> RenderableType:
    made = table(f"Budget {result.budget}", "allocation", "bytes", "of the budget", "loss", "output error",
                 right=("bytes", "of the budget", "loss", "output error"))  # fmt: skip
    errors = ("", "") if result.errors is None else tuple(f"{error:.4g}" for error in result.errors)
    share = f"{100 * result.nbytes / result.limit:.2f} %"
    own = "chosen" if not result.uniformly else "chosen: uniform"
    made.add_row(own, f"{result.nbytes:,}", share, f"{result.loss:.4g}", errors[result.uniformly])
    for index, each in enumerate(result.uniform[:3]):
        measured = "" if index or result.errors is None else errors[1]
        name = f"all weights {each.option.text}"
        made.add_row(
            name, f"{each.nbytes:,}", f"{100 * each.nbytes / result.limit:.2f} %", f"{each.loss:.4g}", measured
        )
    counts: dict[str, list[str]] = {}
    for name, option in result.options.items():
        counts.setdefault(option.text, []).append(name)
    rows = table("Levels chosen", "levels", "weights", "")
    for text, names in counts.items():
        rows.add_row(text, str(len(names)), ", ".join(names))
    proof = "proven least" if result.gap == 0 else f"at most {100 * result.gap:.2g} % above the least"
    notes = [f"The loss is {proof} for these options."]
    if not result.uniform:
        notes.append("No uniform levels fit into this budget.")
    if result.errors is not None and result.uniform:
        notes.append("Output errors: on samples held out, both calibrated; the better one was taken.")
    if result.note:
        notes.append(f"{size(result.limit - result.nbytes)} of the budget are not used: {result.note}.")
    return Group(rows, made, Text("\n".join(notes)))


@to_json.register
def _(result: commands.Allocation) -> dict[str, Any]:
    return {
        "budget": result.budget,
        "limit": result.limit,
        "bytes": result.nbytes,
        "loss": result.loss,
        "gap": result.gap,
        "levels": {name: option.text for name, option in result.options.items()},
        "uniform": [{"levels": u.option.text, "bytes": u.nbytes, "loss": u.loss} for u in result.uniform],
        "output_error": None if result.errors is None else result.errors[0],
        "uniform_output_error": None if result.errors is None else result.errors[1],
        "uniform_taken": result.uniformly,
        "recipe": result.planned.recipe.to_json(),
        "note": result.note,
    }
