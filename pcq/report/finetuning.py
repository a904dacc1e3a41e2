"""The final table of a fine-tune, and how it went."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.report.forms import percent, render, size, smaller, table, to_json
from pcq.words import counted


@render.register
def _(result: commands.FinetuneResult) -> RenderableType:
    valued = any(row.val.explained is not None for row in result.rows)
    columns = ("explained, held out", "explained, test") if valued else ("held out", "test", "agreement with float")
    made = table(f"{result.path}, trained on {result.data}", "weights", *columns, right=columns)
    for row in result.rows:
        last = row.val if row.test is None else row.test
        pair = (row.val, row.test)
        found = [None if one is None else one.explained if valued else one.top1 for one in pair]
        made.add_row(row.weights, *map(percent, found if valued else [*found, last.agreement]))
    seen, how = result.telemetry, result.settings
    lines = [
        f"{size(result.bytes_before)} of tensors -> {size(result.bytes_after)} on disk "
        f"({smaller(result.bytes_before, result.bytes_after)}), {result.bits:.3f} bits per quantized weight; size "
        f"as predicted to the byte.",
        f"{how.method}, {counted(result.steps, 'step')} of {how.batch}, {how.optimizer} at "
        f"{how.learning_rate:g}, seed {how.seed}, {result.seconds:.0f} s; all weights on their levels; flips at the "
        f"end {100 * seen.flips:.4f} % a step.",
    ]
    if result.resumed_at is not None:
        lines.append(f"Went on from step {result.resumed_at:,}.")
    if (norm := result.batchnorm) is not None:
        kept = "kept" if norm.kept else "not kept"
        lines.append(f"BatchNorm estimated anew: held out {norm.before:.2f} % before, {norm.after:.2f} % after: {kept}")
    if result.unquantized is not None:
        lines.append(f"Held out before the weights were rounded: {result.unquantized:.2f} %.")
    lines.append(f"Measurements: {result.metrics}")
    began = [render(part) for part in (result.allocation, result.calibrated) if part is not None]
    return Group(*began, made, *[Text(line) for line in (*lines, *result.warnings)])


@to_json.register
def _(result: commands.FinetuneResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "metrics": str(result.metrics),
        "data": result.data,
        "settings": {key: value for key, value in vars(result.settings).items() if value is not None},
        "recipe": result.planned.recipe.to_json(),
        "rows": [
            {
                "weights": row.weights,
                "val": row.val.to_json(),
                "test": None if row.test is None else row.test.to_json(),
            }
            for row in result.rows
        ],
        "allocation": None if result.allocation is None else to_json(result.allocation),
        "calibration": None if result.calibrated is None else to_json(result.calibrated),
        "epochs": [vars(epoch) for epoch in result.epochs],
        "batchnorm": None if result.batchnorm is None else vars(result.batchnorm),
        "telemetry": vars(result.telemetry),
        "unquantized": result.unquantized,
        "warnings": list(result.warnings),
        "steps": result.steps,
        "resumed_at": result.resumed_at,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "bits": result.bits,
        "seconds": result.seconds,
    }
