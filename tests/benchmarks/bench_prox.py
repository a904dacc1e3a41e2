"""The proximal map on 11 M weights against a memory copy of the same bytes.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_prox.py [--weights N] [--rounds N] [--device cuda] [--out FILE.json]

Each round times the copy and then every map once, so that a busy machine slows all of them alike; what is reported is
the median over the rounds of (map / copy of the same round). The goal is at most 4 copies, on a GPU 2; there
each is called 20 times before the clock is read.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pcq.grids import Affine, Codebook, Grid
from pcq.prox import BinaryRelax, Hard, L, Parq, Prox, ProxQuant, proximal

PROXES: list[Prox] = [Hard(), ProxQuant(), BinaryRelax(), BinaryRelax(clip=True), Parq(), L(1.0, 0.5)]
STRENGTH = 0.5


def grids(g: int, device: torch.device) -> dict[str, Grid]:
    """The level sets that are measured, for ``g`` rows of standard normal weights."""
    scale = torch.linspace(0.7, 1.3, g, device=device)
    uneven = torch.tensor([-1.5, -0.45, 0.45, 1.5], device=device)
    return {
        "binary": Affine(1.6 * scale, 0.5, 2),
        "ternary": Affine(1.2 * scale, 1.0, 3),
        "uniform 2-bit": Affine(1.0 * scale, 1.5, 4),
        "uniform 4-bit": Affine(0.3 * scale, 7.5, 16),
        "listed 3": Codebook(scale[:, None] * scale.new_tensor([-1.2, 0.0, 1.2])),
        "listed 4": Codebook(scale[:, None] * uneven),
        "listed 16": Codebook(scale[:, None] * torch.linspace(-2.5, 2.5, 16, device=device)),
    }


def seconds(work: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if calls > 1:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def commit() -> str:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return described.stdout.strip()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=11_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    weights = torch.randn(args.weights, generator=torch.Generator().manual_seed(0)).to(args.device)
    calls = 1 if args.device.type == "cpu" else 20
    target = torch.empty_like(weights)
    maps: dict[str, Callable[[], Tensor]] = {}
    for layout, width in (("per tensor", args.weights), ("per channel of 2000", 2000)):
        g = args.weights // width
        rows, out = weights[: g * width].view(g, width), target[: g * width].view(g, width)
        for name, grid in grids(g, args.device).items():
            for prox in PROXES:
                if name == "listed 16" and not isinstance(prox, Hard | Parq):
                    continue
                shifts = prox.shifts(STRENGTH)
                maps[f"{layout}, {name}, {prox}"] = lambda r=rows, g=grid, s=shifts, o=out: proximal(r, g, s, out=o)  # type: ignore[misc]
    for work in maps.values():
        work()
    ratios: dict[str, list[float]] = {name: [] for name in maps}
    copies = []
    for _ in range(args.rounds):
        for name, work in maps.items():
            copy = min(seconds(lambda: target.copy_(weights), calls) for _ in range(3))
            copies.append(copy)
            ratios[name].append(seconds(work, calls) / copy)
    result = {
        "what": "time of the proximal map / time of a copy of the same float32 weights, median of the rounds",
        "weights": args.weights,
        "rounds": args.rounds,
        "copy_ms": round(statistics.median(copies) * 1e3, 4),
        "copies": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "hardware": processor() if args.device.type == "cpu" else torch.cuda.get_device_name(args.device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
