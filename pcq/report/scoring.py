"""Scores, and the demo's table of them."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.demo import DemoResult
from pcq.report.forms import percent, render, size, table, to_json, verbatim


@render.register
def _(result: commands.EvalResult) -> RenderableType:
    scores = result.scores
    made = table(f"{result.path} on {result.data}", "score", "value", right=("value",))
    made.add_row("samples", f"{scores.n:,}")
    made.add_row("runtime", result.runtime)
    for label, value in (
        ("top-1", scores.top1),
        ("top-5", scores.top5),
        ("agreement with float", scores.agreement),
        ("top-1 of float", scores.reference_top1),
        ("explained of float's outputs", scores.explained),
    ):
        if value is not None:
            made.add_row(label, percent(value))
    return made


@to_json.register
def _(result: commands.EvalResult) -> dict[str, Any]:
    scores = result.scores
    return {
        "path": str(result.path),
        "data": result.data,
        "runtime": result.runtime,
        **scores.to_json(),
    }


@render.register
def _(result: DemoResult) -> RenderableType:
    made = table(
        f"{result.network} on {result.data}",
        "weights",
        "artifact",
        "ONNX",
        "smaller",
        "bits/weight",
        "top-1 torch",
        "top-1 ONNX Runtime",
        right=("artifact", "ONNX", "smaller", "bits/weight", "top-1 torch", "top-1 ONNX Runtime"),
    )
    for row in result.rows:
        made.add_row(
            row.weights,
            size(row.artifact_bytes),
            "-" if row.onnx_bytes is None else size(row.onnx_bytes),
            f"{result.rows[0].artifact_bytes / row.artifact_bytes:.1f}x",
            f"{row.bits:.2f}",
            percent(row.torch_top1),
            percent(row.onnx_top1),
        )
    return Group(made, Text("What to type next:"), *[verbatim(f"  {line}") for line in result.next_steps])


@to_json.register
def _(result: DemoResult) -> dict[str, Any]:
    return {
        "network": result.network,
        "data": result.data,
        "rows": [vars(row) for row in result.rows],
        "next": list(result.next_steps),
        "seconds": result.seconds,
    }
