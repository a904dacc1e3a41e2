"""The optimizer step with ProxConnect attached against the plain SGD-momentum step, on ResNet-18's shapes.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py [--rounds N] [--out FILE.json]

Each round times 20 plain steps and then 20 steps of every variant, refit included at its default period of 20 steps;
reported is the median over the rounds of the ratio. The goal is at most 3.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from bench_prox import commit, processor
from torch import nn

from pcq.methods import METHODS
from pcq.proxconnect import ProxConnect, Target
from pcq.quantizers import LeastSquaresBinary, Quantizer, Ternary, Uniform
from pcq.rows import Rows
from pcq.schedules import Linear

STEPS = 20


def shapes() -> list[tuple[int, ...]]:
    """Convolution and linear weights of ResNet-18, then its vectors: 11.7 M weights."""
    weights: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    before = 64
    for width in (64, 128, 256, 512):
        weights += [(width, before, 3, 3), (width, width, 3, 3), (width, width, 3, 3), (width, width, 3, 3)]
        if width != before:
            weights.append((width, before, 1, 1))
        before = width
    weights.append((1000, 512))
    vectors: list[tuple[int, ...]] = [(shape[0],) for shape in weights[:-1] for _ in range(2)]
    return [*weights, *vectors, (1000,)]


class Variant:
    """Parameters of ResNet-18's shapes with constant gradients, an SGD-momentum optimizer, and what is attached."""

    def __init__(self, method: str | None, quantizer: Quantizer | None, axis: int | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(0.05 * torch.randn(shape, generator=generator)) for shape in shapes()]
        for parameter in self.parameters:
            parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator)
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-4, momentum=0.9)
        if method is not None and quantizer is not None:
            chosen = {
                str(i): Target(p, Rows(tuple(p.shape), axis), quantizer)
                for i, p in enumerate(self.parameters)
                if p.ndim > 1
            }
            # Long enough to stay in the middle of the anneal, where the map does all its work.
            self.prox = ProxConnect(self.optimizer, chosen, METHODS[method], Linear(0.0, 0.9, 0.5), steps=10**6)

    def seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            self.optimizer.step()
        return (time.perf_counter() - start) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    layouts: tuple[tuple[str, int | None], ...] = (("per tensor", None), ("per channel", 0))
    cells = [
        (f"{method}, {name}, {layout}", (method, quantizer, axis))
        for method in ("binaryconnect", "proxconnect", "parq", "binaryrelax", "proxquant")
        for name, quantizer in (
            ("ternary", Ternary()),
            ("uniform 2-bit", Uniform(2)),
            ("LSBQ 2-bit", LeastSquaresBinary(2)),
        )
        for layout, axis in layouts
        if name != "LSBQ 2-bit" or method in ("binaryconnect", "parq")
    ]
    plain = Variant(None, None, None)
    total = sum(p.numel() for p in plain.parameters)
    ratios: dict[str, list[float]] = {}
    steps, plains = {}, []
    for name, cell in cells:
        variant = Variant(*cell)
        plain.seconds(), variant.seconds()
        for _ in range(args.rounds):
            before = plain.seconds()
            plains.append(before)
            took = variant.seconds()
            ratios.setdefault(name, []).append(took / before)
            steps[name] = took
    result = {
        "what": "optimizer step with ProxConnect / plain SGD-momentum step, median of the rounds, refit every 20 steps",
        "parameters": total,
        "rounds": args.rounds,
        "plain_ms": round(statistics.median(plains) * 1e3, 2),
        "ratio": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "hardware": processor(),
        "platform": platform.system(),
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
