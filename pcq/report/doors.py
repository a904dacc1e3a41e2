"""What the other ways out of an artifact wrote."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.report.forms import render, size, table, to_json


@render.register
def _(result: commands.DoorResult) -> RenderableType:
    packed = f", {result.packed} of them packed" if result.packed else ", in float"
    lines = [f"{result.path}: {result.door}, {size(result.nbytes)}, {result.tensors} tensors{packed}.",
             f"Proved: {result.proof}."]  # fmt: skip
    if not result.kept:
        return Group(*[Text(line) for line in lines])
    made = table("Quantized weights that are floats there", "weight", "why")
    for name, why in result.kept:
        made.add_row(name, why)
    return Group(made, *[Text(line) for line in lines])


@to_json.register
def _(result: commands.DoorResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "artifact": str(result.artifact),
        "form": result.door,
        "tensors": result.tensors,
        "packed": result.packed,
        "float": [{"name": name, "reason": why} for name, why in result.kept],
        "bytes": result.nbytes,
        "proof": result.proof,
    }
