"""ResNet-20 calibrated on unlabelled training images: points lost against float on all test images.

    python tests/benchmarks/calibrate_resnet20.py OUT.json [--recipes w4 w2 ternary binary] [--seeds 0 1 2]
        [--float FILE] [--data SPEC] [--arch SPEC]

Default: the Fashion-MNIST ResNet-20 that comes with pcq. Settings are the defaults; nothing was chosen by these scores.
Every finished run is written at once, so that an interrupted table is a shorter one.
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

import torch

import pcq
from pcq.commands import Calibration

DEMO = Path(pcq.__file__).parent / "demo" / "fashion-mnist-resnet20.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["w4", "w2", "ternary", "binary"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--float", type=Path, default=DEMO)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--arch", default="pcq.demo.nets:resnet20?num_classes=10&in_channels=1")
    args = parser.parse_args()
    float_top1 = pcq.evaluate(args.float, args.data, arch=args.arch).scores.top1
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    record = {
        "float": args.float.name, "data": args.data, "float_top1": float_top1, "commit": commit.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, shared",
        "runs": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for recipe in args.recipes:
                start = time.process_time()
                made = pcq.quantize(
                    args.float, recipe, arch=args.arch, out=Path(folder) / "x.safetensors",
                    calibration=Calibration(args.data, 512, seed=seed),
                )  # fmt: skip
                cpu = time.process_time() - start
                scores = pcq.evaluate(made.path, args.data, reference=args.float, arch=args.arch).scores
                assert scores.top1 is not None
                assert made.calibrated is not None
                run = {
                    "recipe": recipe, "seed": seed, "method": made.calibrated.asked.solver, "bits": made.bits,
                    "bytes": made.bytes_after, "top1": scores.top1, "lost": float_top1 - scores.top1,
                    "agreement": scores.agreement, "cpu_seconds": cpu, "seconds": made.seconds,
                    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                    "steps": [[s.name, s.error, s.agreement, s.reason] for s in made.calibrated.outcome.steps],
                }  # fmt: skip
                record["runs"].append(run)
                print(recipe, seed, f"{scores.top1:.2f} lost {run['lost']:.2f} in {cpu:.0f} s", flush=True)
                args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
