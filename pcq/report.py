"""Results as rich tables for people and as plain dicts for machines: ``render(result)`` and ``to_json(result)``.

Adding a result means adding one function to each of the two dispatchers.
"""

import math
from collections import Counter
from functools import singledispatch
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pcq import commands
from pcq.demo import DemoResult
from pcq.plan import Kept, Quantized

UNITS = ("B", "kB", "MB", "GB", "TB")


def size(nbytes: float) -> str:
    """Bytes in decimal units: ``5.76 MB``."""
    for unit in UNITS:
        if nbytes < 1000 or unit == UNITS[-1]:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def shape(sizes: tuple[int, ...]) -> str:
    """``(64, 3, 7, 7) -> 64x3x7x7``."""
    return "x".join(map(str, sizes)) or "scalar"


def percent(value: float | None) -> str:
    """A score in percent, two decimals."""
    return "-" if value is None else f"{value:.2f} %"


def decibels(value: float) -> str:
    """A signal-to-noise ratio; exact is ``exact``."""
    return "exact" if math.isinf(value) else f"{value:.1f}"


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table with a left-aligned title; the columns named in ``right`` hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


@singledispatch
def render(result: object) -> RenderableType:
    """What a person sees."""
    raise AssertionError(f"no rendering for {type(result)}")


@singledispatch
def to_json(result: object) -> dict[str, Any]:
    """What ``--json`` prints."""
    raise AssertionError(f"no JSON for {type(result)}")


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
    for entry in result.plan.entries:
        name = entry.parameter.name
        if isinstance(entry, Quantized):
            made.add_row(name, shape(entry.parameter.shape), entry.text, str(entry.rule + 1), size(entry.nbytes))
        elif entry.parameter.kind in ("norm", "bias", "buffer") or entry.parameter.tied_to:
            kept[entry.reason] += 1
        else:
            made.add_row(name, shape(entry.parameter.shape), f"float: {entry.reason}", "", size(entry.nbytes))
    rest = ", ".join(f"{count} {reason}" for reason, count in kept.items())
    return Group(made, Text(f"Left float as well: {rest}." if rest else "No other tensors."))


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
        f"({result.bytes_before / result.bytes_after:.1f}x smaller), {result.bits:.3f} bits per quantized weight with "
        f"scales and tables; size as predicted to the byte; {result.seconds:.1f} s."
    )
    return Group(made, Text(total))


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
    }


@render.register
def _(result: commands.EvalResult) -> RenderableType:
    scores = result.scores
    made = table(f"{result.path} on {result.data}", "score", "value", right=("value",))
    made.add_row("samples", f"{scores.n:,}")
    made.add_row("runtime", result.runtime)
    for label, value in (("top-1", scores.top1), ("top-5", scores.top5), ("agreement with float", scores.agreement)):
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
        "n": scores.n,
        "top1": scores.top1,
        "top5": scores.top5,
        "agreement": scores.agreement,
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
    return Group(made, Text("What to type next:"), *[Text(f"  {line}") for line in result.next_steps])


@to_json.register
def _(result: DemoResult) -> dict[str, Any]:
    return {
        "network": result.network,
        "data": result.data,
        "rows": [vars(row) for row in result.rows],
        "next": list(result.next_steps),
        "seconds": result.seconds,
    }


def _tensors(tensors: tuple[commands.TensorView, ...]) -> Table:
    made = table("", "tensor", "shape", "form", "bits/weight", "bytes", right=("bits/weight", "bytes"))
    for row in tensors:
        made.add_row(row.name, shape(row.shape), row.form, f"{row.bits:.3f}", f"{row.nbytes:,}")
    return made


@render.register
def _(result: commands.FileView) -> RenderableType:
    weights = sum(math.prod(row.shape) for row in result.tensors)
    facts = table(f"{result.path}: {result.kind}, {size(result.nbytes)}", "fact", "value")
    for label, value in (("tensors", f"{len(result.tensors):,}"), ("numbers", f"{weights:,}"), *result.facts):
        facts.add_row(label, Text(value))
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
        made.add_row(str(i + 1), Text(str(rule)))
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


@render.register
def _(result: commands.ExportResult) -> RenderableType:
    proof = result.report
    made = table(
        f"Packed: {result.path}", "weight", "shape", "function", "bits/weight", "bytes", right=("bits/weight", "bytes")
    )
    for row in proof.tensors:
        made.add_row(row.name, shape(row.shape), row.function, f"{row.bits:.3f}", f"{row.nbytes:,}")
    lines = [
        f"{size(proof.float_bytes)} of float weights and tensors -> {size(proof.nbytes)} on disk "
        f"({proof.float_bytes / proof.nbytes:.1f}x smaller), {proof.bits_per_weight:.3f} bits per packed weight.",
        f"Proved: every code and level bit-exact; outputs within {proof.error:.1e} of torch's, relative to their "
        f"scale, in {len(proof.agreements)} runs of ONNX Runtime {proof.ort_version} with and without graph "
        f"optimisation; size {proof.nbytes:,} bytes.",
        f"Opset {proof.opset}, IR {proof.ir_version}: runs on ONNX Runtime {proof.target_ort} and later; "
        f"{'dynamic' if proof.dynamic_batch else 'fixed'} batch; {proof.seconds:.1f} s.",
        "Leave the runtime's default optimisation on; do not run onnxsim or onnxslim on the file: they unpack it.",
    ]
    return Group(made, *[Text(line) for line in lines])


@to_json.register
def _(result: commands.ExportResult) -> dict[str, Any]:
    proof = result.report
    return {
        "path": str(result.path),
        "data_path": None if proof.data_path is None else str(proof.data_path),
        "artifact": str(result.artifact),
        "arch": result.arch,
        "bytes": proof.nbytes,
        "bytes_predicted": proof.predicted,
        "float_bytes": proof.float_bytes,
        "bits": proof.bits_per_weight,
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "function": row.function,
                "bits": row.bits,
                "bytes": row.nbytes,
            }
            for row in proof.tensors
        ],
        "agreements": [
            {"inputs": run.inputs, "batch": run.batch, "optimised": run.optimised, "error": run.error}
            for run in proof.agreements
        ],
        "dynamic_batch": proof.dynamic_batch,
        "opset": proof.opset,
        "ir_version": proof.ir_version,
        "target_ort": proof.target_ort,
        "ort_version": proof.ort_version,
        "seconds": proof.seconds,
    }
