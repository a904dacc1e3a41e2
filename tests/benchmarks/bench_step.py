"""The optimizer step with ProxConnect attached against the plain SGD-momentum step, on ResNet-18's shapes.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py [--rounds N] [--torchao | --whole] [--device cuda]
        [--out FILE.json]

Each round times 20 plain steps and then 20 steps of every variant, refit included at its default period of 20 steps;
reported is the median over the rounds of the ratio. The goal is at most 3. ``--torchao``, in an environment that has it
(`make torchao`), does the same with torchao's PARQ, its levels refitted every 20 steps too, and every 10, its default.

``--whole``: the whole training step instead, forward and backward passes of ResNet-18 (32 images of 224 pixels) and
ResNet-20 (128 images of 32 pixels) and the optimizer's step, with ProxConnect against without; goal at most 1.02. The
passes are the same in both, so they are timed once a round, and the steps as above.

On a GPU the plain step is torch's fused one. With one thread on a CPU the clock is the thread's own processor time:
waiting for other processes does not count.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_prox import commit, processor
from torch import nn
from torch.nn.functional import cross_entropy

from pcq.methods import METHODS
from pcq.proxconnect import ProxConnect, Target
from pcq.quantizers import LeastSquaresBinary, Quantizer, Ternary, Uniform
from pcq.rows import Rows
from pcq.schedules import Linear

STEPS = 20
DEVICE = torch.device("cpu")


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

    def __init__(
        self, method: str | None, quantizer: Quantizer | None, axis: int | None, of: list[tuple[int, ...]] | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        some = [0.05 * torch.randn(shape, generator=generator) for shape in of or shapes()]
        self.parameters = [nn.Parameter(values.to(DEVICE)) for values in some]
        for parameter in self.parameters:
            parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator).to(DEVICE)
        self.fused = True if DEVICE.type == "cuda" else None
        self.optimizer: Any = torch.optim.SGD(self.parameters, lr=1e-4, momentum=0.9, fused=self.fused)
        if method is not None and quantizer is not None:
            chosen = {
                str(i): Target(p, Rows(tuple(p.shape), axis), quantizer)
                for i, p in enumerate(self.parameters)
                if p.ndim > 1
            }
            # Long enough to stay in the middle of the anneal, where the map does all its work.
            self.prox = ProxConnect(self.optimizer, chosen, METHODS[method], Linear(0.0, 0.9, 0.5), steps=10**6)

    def seconds(self) -> float:
        start = clock()
        for _ in range(STEPS):
            self.optimizer.step()
        return (clock() - start) / STEPS


class Peer(Variant):
    """The same with torchao's PARQ, in the middle of its anneal."""

    def __init__(self, bits: int, per_channel: bool, period: int) -> None:
        from torchao.prototype.parq import LSBQuantizer, ProxPARQ, QuantOptimizer

        super().__init__(None, None, None)
        weights = [p for p in self.parameters if p.ndim > 1]
        rest = [p for p in self.parameters if p.ndim == 1]
        groups = [{"params": weights, "quant_bits": bits}, {"params": rest}]
        base = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, fused=self.fused)
        prox = ProxPARQ(-(10**6), 10**6)
        self.optimizer = QuantOptimizer(base, LSBQuantizer(), prox, quant_period=period, quant_per_channel=per_channel)


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measured(cells: dict[str, Any], rounds: int, plain: Variant) -> dict[str, Any]:
    """Median ratios to the plain step; ``cells`` are functions that make a variant."""
    ratios, plains = {}, []
    for name, make in cells.items():
        variant, found = make(), []
        plain.seconds(), variant.seconds()
        for _ in range(rounds):
            before = plain.seconds()
            plains.append(before)
            found.append(variant.seconds() / before)
        ratios[name] = round(statistics.median(found), 2)
        print(name, ratios[name], flush=True)
    return {"plain_ms": round(statistics.median(plains) * 1e3, 2), "ratio": ratios}


def peers() -> dict[str, Any]:
    cells = {}
    for levels, bits in (("ternary", 0), ("LSBQ 2-bit", 2)):
        for layout, period in (("per tensor", 20), ("per channel", 20), ("per channel", 10)):
            name = f"parq, {levels}, {layout}, refit every {period}"
            cells[name] = lambda a=(bits, layout == "per channel", period): Peer(*a)  # type: ignore[misc]
    return cells


def whole(rounds: int) -> dict[str, Any]:
    """Ratios of the whole training step, and the milliseconds it takes without levels."""
    from pcq.models import build

    found = {}
    networks = (
        ("ResNet-20, 128 of 32 px", "pcq.demo.nets:resnet20", (128, 3, 32, 32)),
        ("ResNet-18, 32 of 224 px", "torchvision:resnet18", (32, 3, 224, 224)),
    )
    for name, arch, size in networks:
        network = build(arch).to(DEVICE, memory_format=torch.channels_last)
        x, y = torch.randn(size).to(DEVICE, memory_format=torch.channels_last), torch.zeros(size[0], dtype=torch.long)
        y = y.to(DEVICE)
        cross_entropy(network(x), y).backward()
        of = [tuple(p.shape) for p in network.parameters()]
        plain = Variant(None, None, None, of)
        variants = {
            f"{method}, {levels}, per channel": Variant(method, quantizer, 0, of)
            for method in ("proxconnect", "parq")
            for levels, quantizer in (("ternary", Ternary()), ("LSBQ 2-bit", LeastSquaresBinary(2)))
        }
        ratios: dict[str, list[float]] = {each: [] for each in variants}
        passes = []
        for _ in range(rounds):
            start = clock()
            cross_entropy(network(x), y).backward()
            passes.append(clock() - start)
            before = plain.seconds()
            for each, variant in variants.items():
                ratios[each].append((passes[-1] + variant.seconds()) / (passes[-1] + before))
        medians = {each: round(statistics.median(values), 4) for each, values in ratios.items()}
        found[name] = {"passes_ms": round(statistics.median(passes) * 1e3, 2), "ratio": medians}
        print(name, found[name], flush=True)
    return found


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torchao", action="store_true", help="torchao's PARQ instead")
    parser.add_argument("--whole", action="store_true", help="whole training steps")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    DEVICE = args.device
    begun = os.getloadavg()[0]
    layouts: tuple[tuple[str, int | None], ...] = (("per tensor", None), ("per channel", 0))
    cells = {
        f"{method}, {name}, {layout}": lambda a=(method, quantizer, axis): Variant(*a)
        for method in ("binaryconnect", "proxconnect", "parq", "binaryrelax")
        for name, quantizer in (
            ("ternary", Ternary()),
            ("uniform 2-bit", Uniform(2)),
            ("LSBQ 2-bit", LeastSquaresBinary(2)),
        )
        for layout, axis in layouts
        if name != "LSBQ 2-bit" or method in ("binaryconnect", "parq")
    }
    if args.whole:
        what = "training step (forward, backward, optimizer) with ProxConnect / without, median of the rounds"
        found = {"networks": whole(args.rounds)}
    else:
        what = "optimizer step with ProxConnect / plain SGD-momentum step, median of the rounds, refit every 20 steps"
        plain = Variant(None, None, None)
        found = {"parameters": sum(p.numel() for p in plain.parameters)}
        if args.torchao:
            import torchao

            what = what.replace("ProxConnect", "torchao's PARQ").replace(", refit every 20 steps", "")
            found["torchao"] = torchao.__version__
        found |= measured(peers() if args.torchao else cells, args.rounds, plain)
    cpu = DEVICE.type == "cpu"
    result = {
        "what": what,
        "rounds": args.rounds,
        **found,
        "clock": "processor time of the thread" if cpu and torch.get_num_threads() == 1 else "wall",
        "hardware": processor() if cpu else torch.cuda.get_device_name(DEVICE),
        "platform": platform.system(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": [round(begun, 1), round(os.getloadavg()[0], 1)],
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
