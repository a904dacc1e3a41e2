"""Ledger and proof of an ONNX model that was packed."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.report import quantizing  # noqa: F401  (its Calibrated)
from pcq.report.forms import decibels, finite, render, shape, size, smaller, table, to_json


@render.register
def _(result: commands.OnnxQuantizeResult) -> RenderableType:
    proof = result.proof
    right = ("rows", "bits/weight", "SQNR dB", "bytes")
    made = table(f"Packed: {result.path}", "weight", "shape", "levels", *right, right=right)
    for row in result.ledger:
        made.add_row(row.name, shape(row.shape), row.levels, f"{row.rows:,}", f"{row.bits:.3f}", decibels(row.sqnr),
                     f"{row.nbytes:,}")  # fmt: skip
    error = max(run.error for run in proof.agreements)
    runs_on = f"runs on ONNX Runtime {proof.target_ort} and later" if proof.target_ort else "newer than any tried"
    drift = 100 * proof.drift
    off = f"{drift:.0f}" if drift >= 10 else f"{drift:.2g}"
    lines = [
        f"{size(result.bytes_before)} -> {size(proof.nbytes)} on disk ({smaller(result.bytes_before, proof.nbytes)}), "
        f"{result.bits:.3f} bits per packed weight with scales and tables.",
        f"Proved: every code and level bit-exact; outputs within {error:.1e} of those of the input model with these "
        f"weights in float, in {len(proof.agreements)} runs of ONNX Runtime {proof.ort_version} with and without "
        "graph optimisation.",
        f"Against the float model itself: {off} % off on these inputs "
        f"({', '.join(sorted({run.inputs for run in proof.agreements}))}). Measure on data of your own.",
        f"Opset {proof.opset}, IR {proof.ir_version}: {runs_on}; {result.seconds:.1f} s.",
        "Leave the runtime's default optimisation on; do not run onnxsim or onnxslim on the file: they unpack it.",
    ]
    parts = [made] if result.calibrated is None else [made, render(result.calibrated)]
    return Group(*parts, *[Text(line) for line in lines])


@to_json.register
def _(result: commands.OnnxQuantizeResult) -> dict[str, Any]:
    proof = result.proof
    return {
        "path": str(result.path),
        "data_path": None if proof.data_path is None else str(proof.data_path),
        "plan": to_json(result.planned),
        "ledger": [
            {"name": row.name, "shape": list(row.shape), "levels": row.levels, "rows": row.rows, "bits": row.bits,
             "sqnr_db": finite(row.sqnr), "bytes": row.nbytes}
            for row in result.ledger
        ],
        "bytes_before": result.bytes_before,
        "bytes_after": proof.nbytes,
        "bytes_predicted": proof.predicted,
        "bits": result.bits,
        "agreements": [
            {"inputs": run.inputs, "batch": run.batch, "optimised": run.optimised, "error": run.error}
            for run in proof.agreements
        ],
        "drift": finite(proof.drift),
        "opset": proof.opset,
        "ir_version": proof.ir_version,
        "target_ort": proof.target_ort,
        "ort_version": proof.ort_version,
        "seconds": result.seconds,
        "calibration": None if result.calibrated is None else to_json(result.calibrated),
    }  # fmt: skip


render.register(commands.OnnxCalibrated, render.dispatch(commands.Calibrated))
to_json.register(commands.OnnxCalibrated, to_json.dispatch(commands.Calibrated))
