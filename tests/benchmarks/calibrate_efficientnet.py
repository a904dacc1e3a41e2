"""EfficientNet-Lite0 calibrated on photos: top-1 of foolbox's 20, agreement with float on other photos.

    python -m tests.benchmarks.calibrate_efficientnet OUT.jsonl --debian FOLDER [--recipes w8 w6 w4 w3] [--seeds 0]
        [--samples 512] [--refine 0] [--method proxconnect] [--subjects 4] [--valid]
    python -m tests.benchmarks.calibrate_efficientnet OUT.jsonl --debian FOLDER --disturbed
    python -m tests.benchmarks.calibrate_efficientnet OUT.jsonl --table

The heads of ``efficientnet_lite0.py`` and ``calibrate_photos.py`` say how to get network and photos. Calibrated on
photos of split ``calib``, scored on those of ``test``: some 320 crops, mostly of landscapes, and 340 views each of
objects and of photos of one subject, and 320 views of the 20 labelled photos; and on those of them that the float
network is sure of, its choice having a probability of ``SURE`` or more. ``plain`` has each recipe without calibration.
``--subjects N`` calibrates on N views of each photo of a subject as well, ``--valid`` on the photos of split ``valid``
too, by which settings were chosen.
``--disturbed`` has the float network itself instead, on the same pictures moved by a pixel or saved as JPEG: how much
of the agreement is noise.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import pcq
from pcq.commands import Calibration
from pcq.export.drop import SURE
from pcq.scores import module_predictor
from tests.benchmarks import calibrate_photos, efficientnet_lite0, record

ARCH = f"{efficientnet_lite0.__file__}:network"

VIEWS = 16
"""Of each labelled photo."""

Seen = dict[str, tuple[Tensor, Tensor, Tensor]]
"""What is scored on -> images, the float network's choice for each, and whether it is sure of it."""


def outputs(predict: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A network's or file's logits of each image."""
    return torch.cat([predict(part) for part in x.split(16)])


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """The logits that a checkpoint's or an artifact's network has for images."""
    return partial(outputs, module_predictor(pcq.open_network(path, ARCH).module))


def scored(args: argparse.Namespace) -> Seen:
    """What is scored on, as the float network sees it; nothing where only a table is asked for."""
    if args.table:
        return {}
    x = {
        "crops": calibrate_photos.crops("test", 18, efficientnet_lite0.installed("skimage").parent, args.debian),
        "objects": calibrate_photos.objects("test", 4, args.debian),
        "subjects": calibrate_photos.subjects("test", 4, args.debian),
        "views": calibrate_photos.views(efficientnet_lite0.files(), VIEWS),
    }
    predict = opened(efficientnet_lite0.checkpoint())
    best = {name: predict(each).softmax(1).max(1) for name, each in x.items()}
    return {name: (each, best[name].indices, best[name].values >= SURE) for name, each in x.items()}


def as_jpeg(quality: int, x: Tensor) -> Tensor:
    """The images after they were saved at that quality."""
    saved = []
    for image in (x * 128 + 127).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        saved.append(np.asarray(Image.open(file), np.float32))
    return calibrate_photos.scaled(saved)


DISTURBED: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "one pixel to the left": lambda x: torch.cat([x[..., 1:], x[..., -1:]], -1),
    "JPEG, quality 95": partial(as_jpeg, 95),
    "JPEG, quality 90": partial(as_jpeg, 90),
}


def scores(seen: Seen, predict: Callable[[Tensor], Tensor]) -> record.Row:
    """How many of the 20 photos are right, and the agreement in percent: of all images, of those float is sure of.

    Of the 20 photos' views also how many percent are right.
    """
    photos, labels = efficientnet_lite0.photos()
    chosen = {name: predict(x).argmax(1) for name, (x, _, _) in seen.items()}
    right = {name: (chosen[name] == exact).float() for name, (_, exact, _) in seen.items()}
    return {
        "top1_of_20": int((predict(photos).argmax(1) == labels).sum()),
        "top1_of_views": 100 * float((chosen["views"] == labels.repeat_interleave(VIEWS)).float().mean()),
        "agreement": {name: 100 * float(each.mean()) for name, each in right.items()},
        "agreement_where_sure": {name: 100 * float(right[name][sure].mean()) for name, (_, _, sure) in seen.items()},
        "images": {name: len(each) for name, each in right.items()},
        "images_sure": {name: int(sure.sum()) for name, (_, _, sure) in seen.items()},
    }


def run_float(disturbed: str, seen: Seen) -> record.Row:
    """The float network on images that are disturbed."""
    path, change = efficientnet_lite0.checkpoint(), DISTURBED[disturbed]
    predict = opened(path)
    size = {"bits": 32, "bytes": path.stat().st_size}
    return size | scores(seen, lambda x: predict(change(x))) | {"cpu_seconds": 0}


def run(args: argparse.Namespace, recipe: str, seed: int, method: str, seen: Seen) -> record.Row:
    """One recipe and seed: quantize, then score."""
    spec = f"{calibrate_photos.__file__}:samples?debian={args.debian}&subject={args.subjects}&valid={int(args.valid)}"
    asked = Calibration(spec, args.samples, args.method, seed=seed, refine=args.refine) if method != "plain" else None
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        made = pcq.quantize(
            efficientnet_lite0.checkpoint(), record.recipe(recipe), arch=ARCH, out=Path(folder) / "x.safetensors",
            calibration=asked,
        )  # fmt: skip
        cpu = time.process_time() - start
        found = scores(seen, opened(made.path))
    steps = made.calibrated.outcome.steps if made.calibrated is not None else ()
    return {
        "bits": made.bits, "bytes": made.bytes_after, **found, "cpu_seconds": round(cpu),
        "steps": [[s.name, s.error, s.agreement, s.reason, round(s.seconds)] for s in steps],
        "peak_mb": record.peak_mb(),
    }  # fmt: skip


def _agreement(row: record.Row, name: str) -> str:
    """Of all images, then of those that float is sure of, as far as measured."""
    if name not in row["agreement"]:
        return ""
    sure = f" ({row['agreement_where_sure'][name]:.1f})" if "agreement_where_sure" in row else ""
    return f"{row['agreement'][name]:.1f}{sure}"


def table(lines: list[record.Row]) -> str:
    """One row a run; in brackets the agreement where float is sure; ``+`` for samples of split ``valid`` as well."""
    rows = [
        [x["recipe"], x["seed"], f"{x['samples']}{' +' * x['valid']}", x["subjects"], x["method"], x["refine"],
         f"{x['bits']:.2f}", f"{x['bytes'] / 1e6:.2f}", x["top1_of_20"],
         *(_agreement(x, name) for name in ("crops", "objects", "subjects", "views")),
         f"{x['top1_of_views']:.1f}" if "top1_of_views" in x else "", x["cpu_seconds"]]
        for x in lines
    ]  # fmt: skip
    head = (
        "| recipe | seed | samples | views of subjects | method | steps a block | bits | MB | top-1 of 20 "
        "| agreement %, crops | objects | subjects | views of the 20 | their top-1 % | CPU s |"
    )
    return record.markdown(head, rows)


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--debian", type=Path)
    parser.add_argument("--subjects", type=int, default=0)
    parser.add_argument("--valid", action="store_true")
    parser.add_argument("--disturbed", action="store_true")
    record.recipe_arguments(parser, ("w8", "w6", "w4", "w3"))
    record.calibration_arguments(parser, samples=512, method="proxconnect", refine=0)
    args = parser.parse_args()
    none = {"samples": 0, "method": "plain", "refine": 0, "subjects": 0, "valid": False}
    alike = {name: getattr(args, name) for name in none}
    wanted: list[record.Row] = [{"recipe": recipe, "seed": 0} | none for recipe in args.recipes]
    wanted += [{"recipe": recipe, "seed": seed} | alike for seed in args.seeds for recipe in args.recipes]
    if args.disturbed:
        wanted = [{"recipe": "float", "seed": 0} | none | {"method": name} for name in DISTURBED]
    seen = scored(args)

    def one(key: record.Row) -> record.Row:
        if args.disturbed:
            return run_float(key["method"], seen)
        return run(args, key["recipe"], key["seed"], key["method"], seen)

    record.fill(args, wanted, one, table)


if __name__ == "__main__":
    main()
