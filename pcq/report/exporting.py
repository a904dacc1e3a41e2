"""The proof of an export."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.report.forms import render, shape, size, table, to_json


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
