"""EfficientNet-Lite0 calibrated on photos: top-1 of foolbox's 20, agreement with float on crops of other photos.

    python -m tests.benchmarks.calibrate_efficientnet OUT.jsonl --debian FOLDER [--recipes w8 w6 w4 w3] [--seeds 0]
        [--samples 256] [--refine 0] [--method proxconnect] [--crops 18]
    python -m tests.benchmarks.calibrate_efficientnet OUT.jsonl --table

The heads of ``efficientnet_lite0.py`` and ``calibrate_photos.py`` say how to get network and photos. Calibrated on
crops of the photos of split ``calib``, scored on ``crops`` crops of each photo of ``test`` (18: about 320).
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pcq
from pcq.commands import Calibration
from pcq.scores import module_predictor
from tests.benchmarks import calibrate_photos, efficientnet_lite0

ARCH = f"{efficientnet_lite0.__file__}:network"


def predicted(path: Path, x: Tensor) -> Tensor:
    """The network's choice for each image."""
    predict = module_predictor(pcq.open_network(path, ARCH).module)
    return torch.cat([predict(part).argmax(1) for part in x.split(16)])


def run(args: argparse.Namespace, recipe: str, seed: int, x: Tensor, exact: Tensor) -> dict[str, Any]:
    """One recipe and seed: quantize, then score on the 20 photos and on the crops."""
    photos, labels = efficientnet_lite0.photos()
    spec = f"{calibrate_photos.__file__}:samples?debian={args.debian}"
    asked = Calibration(spec, args.samples, args.method, seed=seed, refine=args.refine)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        made = pcq.quantize(efficientnet_lite0.checkpoint(), recipe, arch=ARCH, out=Path(folder) / "x.safetensors",
                            calibration=asked)  # fmt: skip
        cpu = time.process_time() - start
        top1 = int((predicted(made.path, photos) == labels).sum())
        agreement = 100 * float((predicted(made.path, x) == exact).float().mean())
    assert made.calibrated is not None
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "recipe": recipe, "seed": seed, "samples": args.samples, "method": args.method, "refine": args.refine,
        "bits": made.bits, "bytes": made.bytes_after, "top1_of_20": top1, "crops": len(x), "agreement": agreement,
        "cpu_seconds": round(cpu),
        "steps": [[s.name, s.error, s.agreement, s.reason, round(s.seconds)] for s in made.calibrated.outcome.steps],
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), "commit": head.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """One row a run."""
    out = [
        "| recipe | seed | samples | method | steps a block | bits | MB | top-1 of 20 | agreement % | crops | CPU s |"
    ]
    out.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for x in lines:
        cells = [x["recipe"], x["seed"], x["samples"], x["method"], x["refine"], f"{x['bits']:.2f}"]
        cells += [f"{x['bytes'] / 1e6:.2f}", x["top1_of_20"], f"{x['agreement']:.1f}", x["crops"], x["cpu_seconds"]]
        out.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--debian", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["w8", "w6", "w4", "w3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--method", default="proxconnect")
    parser.add_argument("--crops", type=int, default=18)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if not args.table:
        x = calibrate_photos.samples("test", str(args.debian), args.crops)
        exact = predicted(efficientnet_lite0.checkpoint(), x)
        for seed in args.seeds:
            for recipe in args.recipes:
                line = run(args, recipe, seed, x, exact)
                done.append(line)
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(recipe, seed, line["top1_of_20"], line["agreement"], line["cpu_seconds"], flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
