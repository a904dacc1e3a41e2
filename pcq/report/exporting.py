"""The proof of an export."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.report.forms import render, shape, size, smaller, table, to_json
from pcq.words import counted

if TYPE_CHECKING:
    from pcq.export import Drop, Int8Report


@render.register
def _(result: commands.ExportResult) -> RenderableType:
    if result.int8 is not None:
        return _int8(result, result.int8)
    proof = result.report
    plain = all(row.layout == "exact" and row.reason == "runs everywhere" for row in proof.tensors)
    chosen = () if plain else ("layout", "why")
    made = table(f"Packed: {result.path}", "weight", "shape", "function", *chosen, "bits/weight", "bytes",
                 right=("bits/weight", "bytes"))  # fmt: skip
    for row in proof.tensors:
        why = () if plain else (row.layout, row.reason)
        made.add_row(row.name, shape(row.shape), row.function, *why, f"{row.bits:.3f}", f"{row.nbytes:,}")
    transient = f", {size(proof.transient)} more for a moment in every run" if proof.transient else ""
    lines = [
        f"{size(proof.float_bytes)} of float weights and tensors -> {size(proof.nbytes)} on disk "
        f"({smaller(proof.float_bytes, proof.nbytes)}), {proof.bits_per_weight:.3f} bits per packed weight.",
        f"Proved: every code and level bit-exact; outputs within {proof.error:.1e} of torch's, relative to their "
        f"scale, in {len(proof.agreements)} runs of ONNX Runtime {proof.ort_version} with and without graph "
        f"optimisation; size {proof.nbytes:,} bytes.",
        f"Opset {proof.opset}, IR {proof.ir_version}: runs on ONNX Runtime {proof.target_ort} and later; "
        f"{'dynamic' if proof.dynamic_batch else 'fixed'} batch"
        f"{', samples of other sizes too' * proof.dynamic_length}; {proof.seconds:.1f} s.",
        f"Predicted: {proof.predicted:,} bytes; loads {proof.load}; {size(proof.resident)} of weights in memory"
        f"{transient}, about {size(proof.loading)} more while loading.",
        "Leave the runtime's default optimisation on; do not run onnxsim or onnxslim on the file: they unpack it.",
    ]
    if proof.folded:
        one, many = "the scales and the bias of the layer before it", "the scales and biases of the layers before them"
        count = len(proof.folded)
        what = f"A BatchNorm is folded into {one}." if count == 1 else f"{count} BatchNorms are folded into {many}."
        lines.insert(1, what)
    if proof.level4 is not None:
        moved = f"{proof.level4.relative_l2:.1e} away (relative L2; at worst {proof.level4.error:.1e} of their scale)"
        lines.insert(2, "MatMulNBits may round activations to int8 (accuracy level 4): from torch's, outputs of ONNX "
                        f"Runtime {proof.ort_version} are {moved}. Other versions round more, or not at all; what is "
                        "proved above is the same file in float32 (--accuracy-level 1).")  # fmt: skip
    return Group(made, *[Text(line) for line in lines])


def _int8(result: commands.ExportResult, int8: "Int8Report") -> RenderableType:
    made = table(f"int8 activations: {result.path}", "weight", "runs in", "why float")
    for layer in int8.layers:
        made.add_row(layer.weight, f"int8, {layer.activations}" if layer.activations else "float", layer.reason)
    running = sum(layer.activations is not None for layer in int8.layers)
    fused = ", ".join(f"{count} {kind}" for kind, count in int8.fused.items()) or "nothing"
    lines = [
        f"{size(result.report.float_bytes)} of float weights and tensors -> {size(int8.nbytes)} on disk "
        f"({smaller(result.report.float_bytes, int8.nbytes)}; with float activations and nothing folded it takes "
        f"{size(int8.exact_bytes)}).",
        f"{running} of {len(int8.layers)} packed weights run in int8; ONNX Runtime {result.report.ort_version} fused "
        f"{fused}" + (f"; not fused, and gaining nothing: {int8.unfused}." if int8.unfused else "."),
        "Proved: every code bit-exact, and the integers and scales that ONNX Runtime unpacks.",
    ]
    if result.data:
        lines.append(f"Samples: {result.data}.")
    if int8.drop is None:
        lines.append("Nothing was held out, so what int8 costs was not measured: give --calib SPEC.")
    else:
        lines.append(f"Measured on {int8.drop.n} held-out samples, on {int8.cpu}: {_said(int8.drop)}.")
    if int8.fallen_back and int8.first_drop is not None:
        lines.append(f"With every layer in int8: {_said(int8.first_drop)}. So {len(int8.fallen_back)} went back to "
                     f"float, worst first: {', '.join(int8.fallen_back)}.")  # fmt: skip
    if int8.seven_bits:
        layers = counted(len(int8.seven_bits), "layer")
        lines.append(
            f"What enters {layers} of 8-bit weights has 7 bits: so no sum saturates on an x86; --vnni gives 8."
        )
    if int8.saturating:
        layers = counted(len(int8.saturating), "layer")
        lines.append(f"{layers} of 8-bit weights can saturate on x86 without VNNI, so results "
                     f"differ between processors: {', '.join(int8.saturating)}. There the session option "
                     "session.x64quantprecision=1 computes exactly, but slower.")  # fmt: skip
    lines.append("Leave the runtime's default optimisation on; do not run onnxsim or onnxslim on the file.")
    return Group(made, *[Text(line) for line in lines])


def _said(drop: "Drop") -> str:
    points = (
        "" if drop.exact is None or drop.int8 is None else f"top-1 {drop.exact:.2f} % exact, {drop.int8:.2f} % int8, "
    )
    sure = f" ({drop.sure_equal} of the {drop.sure} that are sure)" if drop.sure else ""
    same = "" if drop.agreement is None else f"{drop.agreement:.2f} % equal predictions{sure}, "
    same += "" if drop.explained is None else f"{drop.explained:.2f} % of the outputs' variance explained, "
    return f"{points}{same}outputs {drop.relative_l2:.1e} apart (relative L2)"


@to_json.register
def _(result: commands.ExportResult) -> dict[str, Any]:
    proof, written = result.report, result.int8 or result.report
    return {
        "path": str(result.path),
        "data_path": None if written.data_path is None else str(written.data_path),
        "artifact": str(result.artifact),
        "arch": result.arch,
        "bytes": written.nbytes,
        "bytes_predicted": proof.predicted if result.int8 is None else None,  # it is the exact file's
        "float_bytes": proof.float_bytes,
        "bits": proof.bits_per_weight,
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "function": row.function,
                "bits": row.bits,
                "bytes": row.nbytes,
                "layout": row.layout,
                "reason": row.reason,
            }
            for row in proof.tensors
        ],
        "memory": {"resident": proof.resident, "transient": proof.transient, "loading": proof.loading},
        "load": proof.load,
        "level4": None if proof.level4 is None else asdict(proof.level4),
        "folded": list(proof.folded),
        "agreements": [
            {"inputs": run.inputs, "batch": run.batch, "optimised": run.optimised, "error": run.error}
            for run in proof.agreements
        ],
        "dynamic_batch": proof.dynamic_batch,
        "dynamic_length": proof.dynamic_length,
        "opset": proof.opset,
        "ir_version": proof.ir_version,
        "target_ort": proof.target_ort,
        "ort_version": proof.ort_version,
        "seconds": proof.seconds,
        "mode": result.mode,
        "int8": None if result.int8 is None else {**asdict(result.int8), "path": str(result.int8.path),
                                                  "data_path": result.int8.data_path and str(result.int8.data_path),
                                                  "data": result.data},
    }  # fmt: skip
