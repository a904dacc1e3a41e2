"""EfficientNet-Lite0 with every layer in int8: the choices of the exact and the int8 files, and where float is sure.

    python -m tests.benchmarks.int8_efficientnet OUT.jsonl --debian FOLDER [--recipes w8] [--seeds 0] [--samples 128]
    python -m tests.benchmarks.int8_efficientnet OUT.jsonl --table

Calibrated, layers only, and its ranges observed, on crops, objects and subjects of split ``calib``; no layer goes back
to float (``max_drop=100``). Scored in ONNX Runtime as ``calibrate_efficientnet.py`` scores; counts are of pictures on
which a file's choice is the float network's, or the exact file's.
"""

import argparse
import tempfile
from pathlib import Path

from torch import Tensor

import pcq
from pcq.commands import Calibration
from pcq.commands.exporting import Int8
from pcq.scores import onnx_predictor
from tests.benchmarks import calibrate_photos, efficientnet_lite0, record
from tests.benchmarks.calibrate_efficientnet import ARCH, Seen, outputs, scored

FILES = ("exact", "int8, --vnni", "int8")


def run(args: argparse.Namespace, recipe: str, seed: int, seen: Seen) -> record.Row:
    """Quantize, export three files, and count."""
    photos, labels = efficientnet_lite0.photos()
    spec = f"{calibrate_photos.__file__}:samples?debian={args.debian}&subject=4"
    row: record.Row = {"images": {name: len(each) for name, (each, _, _) in seen.items()}}
    row["sure"] = {name: int(sure.sum()) for name, (_, _, sure) in seen.items()}
    with tempfile.TemporaryDirectory() as folder:
        made = pcq.quantize(
            efficientnet_lite0.checkpoint(), record.recipe(recipe), arch=ARCH, out=Path(folder) / "x.safetensors",
            calibration=Calibration(spec, args.samples, seed=seed, refine=0),
        )  # fmt: skip
        exact: dict[str, Tensor] = {}
        for name in FILES:
            how = Int8(spec, samples=args.samples, max_drop=100, vnni="vnni" in name) if name != "exact" else None
            done = pcq.export_onnx(made.path, Path(folder) / f"{name}.onnx", input_shape=(3, 224, 224), int8=how)
            predict = onnx_predictor(done.path)
            got = {place: outputs(predict, x).argmax(1) for place, (x, _, _) in seen.items()}
            exact = exact or got
            row[name] = {
                "bytes": done.report.nbytes if done.int8 is None else done.int8.nbytes,
                "in_int8": 0 if done.int8 is None else sum(each.activations is not None for each in done.int8.layers),
                "top1_of_20": int((outputs(predict, photos).argmax(1) == labels).sum()),
            }
            for kind, aims in (("float", {place: aim for place, (_, aim, _) in seen.items()}), ("exact", exact)):
                equal = {place: got[place] == aim for place, aim in aims.items()}
                row[name] |= {
                    f"as_{kind}": {place: int(each.sum()) for place, each in equal.items()},
                    f"as_{kind}_where_sure": {place: int(equal[place][seen[place][2]].sum()) for place in equal},
                }
    return row


def table(lines: list[record.Row]) -> str:
    """A row for each file; in brackets where float is sure."""
    rows = []
    for x in lines:
        for name in FILES:
            told = [
                f"{100 * x[name][of][place] / x['images'][place]:.1f} "
                f"({100 * x[name][f'{of}_where_sure'][place] / x['sure'][place]:.1f})"
                for of in ("as_float", "as_exact")
                for place in x["images"]
            ]
            facts = [x[name][each] for each in ("bytes", "in_int8", "top1_of_20")]
            rows.append([x["recipe"], x["seed"], name, *facts, *told])
    head = (
        "| recipe | seed | file | bytes | layers in int8 | top-1 of 20 | as float %, crops | objects | subjects "
        "| as exact %, crops | objects | subjects |"
    )
    return record.markdown(head, rows)


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--debian", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    record.recipe_arguments(parser, ("w8",))
    args = parser.parse_args()
    wanted: list[record.Row] = [
        {"recipe": recipe, "seed": seed, "samples": args.samples} for seed in args.seeds for recipe in args.recipes
    ]
    seen = scored(args)
    record.fill(args, wanted, lambda key: run(args, key["recipe"], key["seed"], seen), table, "onnxruntime")


if __name__ == "__main__":
    main()
