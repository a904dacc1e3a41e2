"""The record of a driver: a file with a line of JSON for each run, each with its certificate, and a table of them.

    python -m tests.benchmarks.DRIVER OUT.jsonl [...]
    python -m tests.benchmarks.DRIVER OUT.jsonl --table

A run that has its line is not made again; the table of all is printed at the end.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import pcq
from pcq.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
DEMO = Path(pcq.__file__).parent / "demo" / "fashion-mnist-resnet20.safetensors"
SOURCES = ("pcq", "recipes", "tests/benchmarks/*.py")

Row = dict[str, Any]


def certificate(*libraries: str) -> Row:
    """Where and when a result was made, and with what: torch's version, Python's, and those of ``libraries``."""
    return {
        "commit": commit(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__, **{name: version(name) for name in libraries},
        "python": platform.python_version(), "machine": machine(), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def commit() -> str:
    """The commit of the sources that run; ``+`` behind it: with changes to them."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *SOURCES], capture_output=True, cwd=ROOT)
    return head.stdout.strip() + ("+" if changed.returncode == 1 else "")


def machine() -> str:
    """The processor as far as kernels go, cores, threads, and the GPU if there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    known = [name for flag, name in (("avx512f", "AVX512"), ("avx512_vnni", "VNNI")) if flag in flags]
    processor = platform.machine() + (f" with {' and '.join(known)}" if known else " without AVX512" if flags else "")
    threads = torch.get_num_threads()
    parts = [processor, f"{os.cpu_count()} CPU cores", f"{threads} thread{'s' if threads > 1 else ''}"]
    return ", ".join([*parts, torch.cuda.get_device_name()] if torch.cuda.is_available() else parts)


def peak_mb() -> int:
    """Resident memory of this process at its highest so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What all of these drivers take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the table of what is in OUT")
    return parser


def network_arguments(parser: argparse.ArgumentParser) -> None:
    """A float network and its data; by default the ResNet-20 for Fashion-MNIST that comes with pcq."""
    parser.add_argument("--float", type=Path, default=DEMO)
    parser.add_argument("--arch", default="pcq.demo.nets:resnet20?num_classes=10&in_channels=1")
    parser.add_argument("--data", default="fashion-mnist")


def recipe_arguments(parser: argparse.ArgumentParser, recipes: Iterable[str], seeds: Iterable[int] = (0,)) -> None:
    """Which recipes (:func:`recipe`), and draws of samples."""
    parser.add_argument("--recipes", nargs="+", default=list(recipes))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))


def calibration_arguments(parser: argparse.ArgumentParser, samples: int, method: str, refine: int | None) -> None:
    """How to calibrate; ``refine`` None: the driver settles it."""
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--method", default=method)
    if refine is not None:
        parser.add_argument("--refine", type=int, default=refine)


def recipe(name: str) -> Recipe:
    """A recipe by its name or path; ``w2+all`` is ``w2`` with all weights like those of its last rule."""
    loaded = load_recipe(name.removesuffix("+all"))
    if not name.endswith("+all"):
        return loaded
    return Recipe(f"{loaded.name}+all", "", (loaded.rules[-1],))


def fill(args: argparse.Namespace, wanted: Iterable[Row], run: Callable[[Row], Row], table: Callable[[list[Row]], str],
         *libraries: str) -> None:  # fmt: skip
    """Run what is ``wanted`` (the fields that tell a run from the others) and has no line yet; print the table.

    A line holds what was wanted, what ``run`` makes of it, and the certificate.
    """
    rows: list[Row] = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for key in [] if args.table else wanted:
        if any(all(row.get(name) == value for name, value in key.items()) for row in rows):
            continue
        row = key | run(key) | certificate(*libraries)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(table([row]), flush=True)
    print(table(rows), end="")


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def markdown(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A table; ``head`` is its first line."""
    lines = [head, "|" + "---|" * (head.count("|") - 1), *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
    return "\n".join(lines) + "\n"
