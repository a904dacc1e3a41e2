"""Files, recipes and plots."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.report.forms import Listing, render, shape, size, table, to_json


def _tensors(tensors: tuple[commands.TensorView, ...]) -> Listing:
    made = table("", "tensor", "shape", "form", "bits/weight", "bytes", right=("bits/weight", "bytes"))
    for row in tensors:
        made.add_row(row.name, shape(row.shape), row.form, f"{row.bits:.3f}", f"{row.nbytes:,}")
    return made


@render.register
def _(result: commands.FileView) -> RenderableType:
    weights = sum(math.prod(row.shape) for row in result.tensors)
    facts = table(f"{result.path}: {result.kind}, {size(result.nbytes)}", "fact", "value")
    for label, value in (("tensors", f"{len(result.tensors):,}"), ("numbers", f"{weights:,}"), *result.facts):
        facts.add_row(label, value)
    return Group(facts, _tensors(result.tensors))


@to_json.register
def _(result: commands.FileView) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "kind": result.kind,
        "facts": [list(fact) for fact in result.facts],
        "tensors": [
            {"name": row.name, "shape": list(row.shape), "form": row.form, "bits": row.bits, "bytes": row.nbytes}
            for row in result.tensors
        ],
        "bytes": result.nbytes,
    }


@render.register
def _(result: commands.RecipeView) -> RenderableType:
    made = table(f"{result.path}: a valid recipe, {result.recipe.name}", "rule", "what it says")
    for i, rule in enumerate(result.recipe.rules):
        made.add_row(str(i + 1), str(rule))
    description = Text(result.recipe.description)
    return Group(description, made) if result.planned is None else Group(description, made, render(result.planned))


@to_json.register
def _(result: commands.RecipeView) -> dict[str, Any]:
    return {
        "path": result.path,
        "recipe": result.recipe.to_json(),
        "plan": None if result.planned is None else to_json(result.planned),
    }


@render.register
def _(result: commands.Shipped) -> RenderableType:
    made = table("Recipes that come with pcq (pcq recipes show NAME prints one)", "recipe", "what it is for")
    for name, summary in result.recipes:
        made.add_row(name, summary)
    return made


@to_json.register
def _(result: commands.Shipped) -> dict[str, Any]:
    return {"recipes": [{"name": name, "summary": summary} for name, summary in result.recipes]}


@render.register
def _(result: commands.ProxPlot) -> RenderableType:
    return Text(f"{result.path}: the {result.prox} map towards {', '.join(f'{q:g}' for q in result.levels)}.")


@to_json.register
def _(result: commands.ProxPlot) -> dict[str, Any]:
    return {"path": str(result.path), "prox": result.prox, "levels": list(result.levels)}
