"""Byte budgets: the allocation against the best uniform levels within the same bytes, file size against budget.

    python -m tests.benchmarks.budgets OUT.jsonl [--float FILE --arch SPEC --data SPEC] [--budgets 40kB 55kB ...]
    python -m tests.benchmarks.budgets OUT.jsonl --table

Default: the Fashion-MNIST ResNet-20 that comes with pcq (1.08 MB in float). Both are calibrated alike (layers only) and
scored on ``limit`` test images, which nothing is chosen by.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pcq
from pcq.commands import Calibration
from pcq.recipe import Recipe

DEMO = Path(pcq.__file__).parent / "demo" / "fashion-mnist-resnet20.safetensors"


def run(args: argparse.Namespace, budget: str) -> dict[str, Any]:
    """The budget's file, and that of the best uniform levels within it."""
    asked = Calibration(args.data, args.samples, args.method, seed=args.seed, refine=0)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        made = pcq.quantize(args.float, arch=args.arch, out=Path(folder) / "x.safetensors", budget=budget,
                            calibration=asked)  # fmt: skip
        cpu = time.process_time() - start
        allocation = made.allocation
        assert allocation is not None
        line: dict[str, Any] = {
            "float": args.float.name, "budget": budget, "limit": allocation.limit, "bytes": made.bytes_after,
            "bits": made.bits, "loss": allocation.loss, "gap": allocation.gap, "note": allocation.note,
            "uniformly": allocation.uniformly, "errors": allocation.errors, "cpu_seconds": round(cpu),
            "options": {name: option.text for name, option in allocation.options.items()},
        }  # fmt: skip
        scores = pcq.evaluate(made.path, args.data, arch=args.arch, reference=args.float, limit=args.limit).scores
        line |= {"top1": scores.top1, "agreement": scores.agreement, "float_top1": scores.reference_top1}
        if allocation.uniform:
            best = allocation.uniform[0]
            recipe = Recipe("uniform", "", (best.option.rule(list(allocation.options)),))
            alike = pcq.quantize(args.float, recipe, arch=args.arch, out=Path(folder) / "y.safetensors",
                                 calibration=asked)  # fmt: skip
            scores = pcq.evaluate(alike.path, args.data, arch=args.arch, reference=args.float, limit=args.limit).scores
            line["uniform"] = {"levels": best.option.text, "bytes": alike.bytes_after, "loss": best.loss,
                               "top1": scores.top1, "agreement": scores.agreement}  # fmt: skip
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return line | {
        "seed": args.seed, "samples": args.samples, "method": args.method, "limit_test": args.limit,
        "commit": head.stdout.strip(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """One row a budget."""
    out = [
        "| float | budget | file, bytes | used % | top-1 | agreement % | uniform levels | bytes | top-1 | agreement % |"
    ]
    out.append("|---|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        other = line.get("uniform", {"levels": "none fits", "bytes": 0, "top1": None, "agreement": None})
        cells = [line["float"], line["budget"], f"{line['bytes']:,}", f"{100 * line['bytes'] / line['limit']:.2f}"]
        cells += [_percent(line["top1"]), _percent(line["agreement"]), other["levels"], f"{other['bytes']:,}"]
        cells += [_percent(other["top1"]), _percent(other["agreement"])]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--float", type=Path, default=DEMO)
    parser.add_argument("--arch", default="pcq.demo.nets:resnet20?num_classes=10&in_channels=1")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--budgets", nargs="+", default=["66kB", "75kB", "90kB", "115kB", "160kB"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=2500)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if not args.table:
        for budget in args.budgets:
            if any((line["float"], line["budget"]) == (args.float.name, budget) for line in done):
                continue
            line = run(args, budget)
            done.append(line)
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(budget, line["bytes"], line["top1"], line.get("uniform"), flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
