"""The comparison of the ProxConnect family: every method from the same start, data order and budget.

    python -m tests.benchmarks.cifar10 tests/benchmarks/cifar10.yaml --data cifar10:DIR --float FOLDER --work FOLDER
    python -m tests.benchmarks.cifar10 --table results.jsonl

Cells of the YAML file are run one after the other by ``pcq.finetune``; each adds a line to ``FOLDER/results.jsonl``. A
cell that has its line is not run again, and one that was interrupted goes on where it was. Every cell's artifact is
exported and scored in ONNX Runtime as well.

All weights get levels, the first and last layer too. ``sets: refitted`` (the default) are least-squares levels of each
channel, refitted during training; ``sets: paper`` are the fixed sets of arXiv 2110.13220: {-1, 1}, {-1, 0, 1} and
{-1, -0.3, 0.3, 1}, BatchNorm taking over the scale. ``scratch: true`` trains from random weights (end-to-end).
"""

import argparse
import datetime
import hashlib
import itertools
import json
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml

import pcq

LEVELS: dict[tuple[str, str], dict[str, Any]] = {
    ("ternary", "refitted"): {"levels": "ternary"},
    ("binary", "refitted"): {"levels": "binary"},
    ("quaternary", "refitted"): {"levels": {"kind": "lsb", "bits": 2}},
    ("ternary", "paper"): {"levels": {"kind": "fixed", "levels": [-1, 0, 1]}, "per": "tensor"},
    ("binary", "paper"): {"levels": {"kind": "fixed", "levels": [-1, 1]}, "per": "tensor"},
    ("quaternary", "paper"): {"levels": {"kind": "fixed", "levels": [-1, -0.3, 0.3, 1]}, "per": "tensor"},
}

DEFAULTS = {"sets": "refitted", "seed": 0, "scratch": False}


def cells(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every cell with its settings, lists crossed, in the file's order."""
    for entry in document["cells"]:
        said = DEFAULTS | {key: value for key, value in entry.items() if key != "settings"}
        settings = document.get("settings", {}) | entry.get("settings", {})
        axes = [[(key, v) for v in (value if isinstance(value, list) else [value])] for key, value in said.items()]
        for chosen in itertools.product(*axes):
            yield dict(chosen) | {"settings": settings}


def name(cell: dict[str, Any]) -> str:
    """A file name that no other cell has."""
    start = "scratch" if cell["scratch"] else "finetune"
    words = [cell["net"], start, cell["levels"], cell["sets"], cell["method"].replace("+", "p"), f"seed{cell['seed']}"]
    return "-".join([*words, hashlib.sha256(json.dumps(cell["settings"], sort_keys=True).encode()).hexdigest()[:6]])


def run(cell: dict[str, Any], data: str, folder: Path, work: Path) -> dict[str, Any]:
    """Fine-tune, export, score; what one line of the results holds."""
    label = name(cell)
    recipe, out = work / f"{label}.yaml", work / f"{label}.safetensors"
    rule = {"match": "*"} | LEVELS[cell["levels"], cell["sets"]]
    refit = {"refit": 0} if cell["sets"] == "paper" else {}
    section = refit | cell["settings"] | {"method": cell["method"], "seed": cell["seed"]}
    recipe.write_text(yaml.safe_dump({"pcq": 1, "rules": [rule], "finetune": section}))
    shape = (1, 28, 28) if data.startswith("fashion") else (3, 32, 32)
    result = pcq.finetune(
        folder / f"{cell['net']}.safetensors",
        recipe,
        data,
        out=out,
        arch=f"pcq.demo.nets:{cell['net']}?num_classes=10&in_channels={shape[0]}",
        scratch=cell["scratch"],
        resume=out.with_suffix(".resume").exists(),
        force=True,
    )
    onnx = pcq.export_onnx(out, work / f"{label}.onnx", input_shape=shape, force=True).path
    scored = pcq.evaluate(onnx, data)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "cell": cell,
        "rows": {row.weights: {"val": row.val.top1, "test": row.test and row.test.top1} for row in result.rows},
        "ort_test": scored.scores.top1,
        "unquantized_val": result.unquantized,
        "epochs": [vars(epoch) for epoch in result.epochs],
        "batchnorm": None if result.batchnorm is None else vars(result.batchnorm),
        "telemetry": vars(result.telemetry),
        "warnings": result.warnings,
        "bits": result.bits,
        "bytes": {"artifact": out.stat().st_size, "onnx": onnx.stat().st_size},
        "artifact": hashlib.sha256(out.read_bytes()).hexdigest(),
        "seconds": round(result.seconds),
        "date": datetime.date.today().isoformat(),
        "commit": head.stdout.strip(),
        "torch": torch.__version__,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, CPU",
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Points lost against the float network (mean and standard deviation over seeds), markdown."""
    groups = defaultdict[tuple[Any, ...], list[dict[str, Any]]](list)
    for line in lines:
        cell = line["cell"]
        start = "end-to-end" if cell["scratch"] else "fine-tune"
        settings = ", ".join(f"{k} {v}" for k, v in sorted(cell["settings"].items()))
        groups[cell["net"], start, settings, cell["levels"], cell["sets"], cell["method"]].append(line)
    out = ["| network | start | levels | method | seeds | lost, val | lost, test | test | ONNX Runtime - torch |"]
    out.append("|---|---|---|---|---|---|---|---|---|")
    for (net, start, settings, levels, sets, method), found in sorted(groups.items()):
        lost = {s: [x["rows"]["float"][s] - x["rows"]["fine-tuned"][s] for x in found] for s in ("val", "test")}
        test = [x["rows"]["fine-tuned"]["test"] for x in found]
        apart = max(abs(x["ort_test"] - x["rows"]["fine-tuned"]["test"]) for x in found)
        seeds = ", ".join(str(s) for s in sorted(x["cell"]["seed"] for x in found))
        row = [net, f"{start}, {settings}", f"{levels}, {sets}", method, seeds, *map(_spread, lost.values())]
        out.append("| " + " | ".join([*row, _spread(test), f"{apart:.2f}"]) + " |")
    return "\n".join(out) + "\n"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--float", type=Path, help="folder of <net>.safetensors")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--table", type=Path, help="only print the table of these results")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    todo = [cell for cell in cells(yaml.safe_load(args.cells.read_text())) if cell not in [x["cell"] for x in done]]
    start = time.time()
    for i, cell in enumerate(todo):
        print(f"{i + 1} of {len(todo)}: {name(cell)}", flush=True)
        line = run(cell, args.data, args.float, args.work)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        left = (time.time() - start) / (i + 1) * (len(todo) - i - 1)
        print(f"  {json.dumps(line['rows'])} {line['seconds']} s; {left / 60:.0f} min to go", flush=True)
    print(table([json.loads(line) for line in results.read_text().splitlines()]))


if __name__ == "__main__":
    main()
