"""EfficientNet-Lite0 calibrated on photos: top-1 of foolbox's 20, agreement with float on crops of other photos.

    python -m tests.benchmarks.calibrate_efficientnet OUT.jsonl --debian FOLDER [--recipes w8 w6 w4 w3] [--seeds 0]
        [--samples 256] [--refine 0] [--method proxconnect] [--crops 18]
    python -m tests.benchmarks.calibrate_efficientnet OUT.jsonl --table

The heads of ``efficientnet_lite0.py`` and ``calibrate_photos.py`` say how to get network and photos. Calibrated on
crops of the photos of split ``calib``, scored on ``crops`` crops of each photo of ``test`` (18: about 320).
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import pcq
from pcq.commands import Calibration
from pcq.scores import module_predictor
from tests.benchmarks import calibrate_photos, efficientnet_lite0, record

ARCH = f"{efficientnet_lite0.__file__}:network"


def predicted(path: Path, x: Tensor) -> Tensor:
    """The network's choice for each image."""
    predict = module_predictor(pcq.open_network(path, ARCH).module)
    return torch.cat([predict(part).argmax(1) for part in x.split(16)])


def run(args: argparse.Namespace, recipe: str, seed: int, x: Tensor, exact: Tensor) -> record.Row:
    """One recipe and seed: quantize, then score on the 20 photos and on the crops."""
    photos, labels = efficientnet_lite0.photos()
    spec = f"{calibrate_photos.__file__}:samples?debian={args.debian}"
    asked = Calibration(spec, args.samples, args.method, seed=seed, refine=args.refine)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        made = pcq.quantize(
            efficientnet_lite0.checkpoint(), record.recipe(recipe), arch=ARCH, out=Path(folder) / "x.safetensors",
            calibration=asked,
        )  # fmt: skip
        cpu = time.process_time() - start
        top1 = int((predicted(made.path, photos) == labels).sum())
        agreement = 100 * float((predicted(made.path, x) == exact).float().mean())
    assert made.calibrated is not None
    return {
        "bits": made.bits, "bytes": made.bytes_after, "top1_of_20": top1, "crops": len(x), "agreement": agreement,
        "cpu_seconds": round(cpu),
        "steps": [[s.name, s.error, s.agreement, s.reason, round(s.seconds)] for s in made.calibrated.outcome.steps],
        "peak_mb": record.peak_mb(),
    }  # fmt: skip


def table(lines: list[record.Row]) -> str:
    """One row a run."""
    rows = [
        [x["recipe"], x["seed"], x["samples"], x["method"], x["refine"], f"{x['bits']:.2f}", f"{x['bytes'] / 1e6:.2f}",
         x["top1_of_20"], f"{x['agreement']:.1f}", x["crops"], x["cpu_seconds"]]
        for x in lines
    ]  # fmt: skip
    head = (
        "| recipe | seed | samples | method | steps a block | bits | MB | top-1 of 20 | agreement % | crops | CPU s |"
    )
    return record.markdown(head, rows)


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--debian", type=Path)
    record.recipe_arguments(parser, ("w8", "w6", "w4", "w3"))
    record.calibration_arguments(parser, samples=256, method="proxconnect", refine=0)
    parser.add_argument("--crops", type=int, default=18)
    args = parser.parse_args()
    alike = {name: getattr(args, name) for name in ("samples", "method", "refine")}
    wanted = [{"recipe": recipe, "seed": seed} | alike for seed in args.seeds for recipe in args.recipes]
    x = torch.empty(0) if args.table else calibrate_photos.samples("test", str(args.debian), args.crops)
    exact = torch.empty(0) if args.table else predicted(efficientnet_lite0.checkpoint(), x)
    record.fill(args, wanted, lambda key: run(args, key["recipe"], key["seed"], x, exact), table)


if __name__ == "__main__":
    main()
