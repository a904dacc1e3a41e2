"""The same fine-tune with another's optimizer step: torchao's PARQ, in an environment of its own; or none, the control.

    PYTHON -m tests.benchmarks.torchao_parq JOB.json

Start, data order, augmentation, loss, optimizer, learning rates, budget and the end of the anneal are those of
``pcq.finetune``, whose parts this uses; only what happens to the weights in the optimizer's step is the peer's. Every
weight of more than one axis gets levels, by output channel. Run by ``tests.benchmarks.cifar10``, which scores what
comes out: the weights as the network runs with them, float32, and a JSON file beside them.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pcq import models
from pcq.atomic import atomic
from pcq.data import Data
from pcq.scores import evaluate, module_predictor
from pcq.settings import EPOCHS, Finetune
from pcq.train import augment, batchnorm, graphs
from pcq.train.batches import Batches, own_randomness
from pcq.train.job import settled
from pcq.train.run import placed
from pcq.train.splits import Splits, open_splits
from pcq.train.step import logits, loss_of, make_optimizer, rate, update

PINNED = "0.18.0"
"""The version of torchao that this was written for."""

BITS = {"ternary": 0, "binary": 1, "quaternary": 2}
"""torchao's name of the levels; 0 is ternary."""

METHODS = ("control", "torchao-parq", "torchao-parq-optimal", "torchao-hard", "torchao-binaryrelax")
"""``-optimal``: its exact least-squares levels instead of its default heuristic; the others have the default."""


def attach(method: str, base: torch.optim.Optimizer, settings: Finetune, levels: str, total: int) -> Any:
    """The peer's optimizer around ``base``, whose first group holds the weights that get levels.

    Levels are refitted as often as pcq refits them, the anneal starts and ends where pcq's does.
    """
    if method == "control":
        return base
    import torchao
    from torchao.prototype.parq import LSBQuantizer, ProxBinaryRelax, ProxHardQuant, ProxPARQ, QuantOptimizer

    if torchao.__version__.partition("+")[0] != PINNED:
        raise SystemExit(f"torchao is {torchao.__version__}, this was written for {PINNED}")
    start, end = (round(share * total) for share in (settings.anneal_start, settings.anneal_end))
    maps: dict[str, Callable[[], Any]] = {
        "torchao-parq": lambda: ProxPARQ(start, end),
        "torchao-parq-optimal": lambda: ProxPARQ(start, end),
        "torchao-hard": ProxHardQuant,
        "torchao-binaryrelax": lambda: ProxBinaryRelax(start, end),
    }
    base.param_groups[0]["quant_bits"] = BITS[levels]
    assert all(p.ndim > 1 for p in base.param_groups[0]["params"])
    quantizer = LSBQuantizer(optimal=method.endswith("-optimal"))
    return QuantOptimizer(base, quantizer, maps[method](), quant_period=settings.refit, quant_per_channel=True)


def levels_a_row(module: nn.Module) -> int:
    """The most different values that an output channel of any weight has."""
    weights = [p.detach() for p in module.parameters() if p.ndim > 1]
    return max(len(row.unique()) for p in weights for row in p.flatten(1))


def score(module: nn.Module, data: Data) -> float:
    """Top-1 in percent, as pcq scores networks, where the network is."""
    found = evaluate(module_predictor(module), data).top1
    assert found is not None
    return found


def settle_batchnorm(module: nn.Module, splits: Splits, settings: Finetune, batches: Batches) -> dict[str, Any] | None:
    """As ``pcq.finetune`` does: statistics estimated anew, kept if they are better on the samples held out."""
    if not (settings.batchnorm and (kept := batchnorm.statistics(module))):
        return None
    device = next(module.parameters()).device
    before = score(module, splits.val)
    steps = range(min(settings.batchnorm, batches.an_epoch))
    batchnorm.reestimate(module, (placed(batches.make(step)[0], device) for step in steps))
    after = score(module, splits.val)
    if after <= before:
        batchnorm.put(module, kept)
    return {"before": before, "after": after, "kept": after > before}


def start(job: dict[str, Any], seed: int, scratch: bool) -> nn.Module:
    """The float checkpoint's network; or, from scratch, the random one that ``pcq.finetune`` starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed if scratch else 0)
        module = models.build(job["arch"]).float()
    if not scratch:
        module.load_state_dict(load_file(job["float"]))
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


def train(job: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network, in eval mode, and what is to be known of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = settled(Finetune(**job["settings"], seed=job["seed"]), job["data"], device)
    splits = open_splits(job["data"]).on(device)
    module = start(job, settings.seed, job["scratch"])
    batches = Batches(
        splits.train,
        min(settings.batch, splits.train.n),
        settings.seed,
        augment.make(settings.augment, splits.plain.shape),  # type: ignore[arg-type]
    )
    total = settings.steps or max(1, round((settings.epochs or EPOCHS) * batches.an_epoch))
    optimizer = attach(job["method"], make_optimizer(settings, module.parameters()), settings, job["levels"], total)
    whole, inside = [], []
    begun = time.perf_counter()
    with own_randomness(), ExitStack() as stack:
        if settings.graphs:
            first = placed(batches.make(0)[0], device)
            stack.enter_context(graphs.recorded(module, first, settings.precision == "bf16"))
        for step, (x, y) in enumerate(batches.run(0, total)):
            at = time.perf_counter()
            module.train()
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                out = logits(module(*placed(x, device)))
            loss = loss_of(settings, out, None if y is None else y.to(device, non_blocking=True), None)
            inside.append(0.0)
            update(settings, _Timed(optimizer, inside), module, loss, rate(settings, step / total))  # type: ignore[arg-type]
            whole.append(time.perf_counter() - at)
            if step % 100 == 99:
                print(f"step {step + 1} of {total}, loss {float(loss):.3f}", flush=True)
        module.eval()
        settled_as = settle_batchnorm(module, splits, settings, batches)
    assert splits.test is not None
    networks = {"float": start(job, 0, False), "fine-tuned": module}
    sets = {"val": splits.val, "test": splits.test}
    return module, {
        "rows": {name: {s: score(net, data) for s, data in sets.items()} for name, net in networks.items()},
        "levels_a_row": levels_a_row(module),
        "batchnorm": settled_as,
        "seconds": round(time.perf_counter() - begun),
        "optimizer_step_ms": round(statistics.median(inside) * 1e3, 2),
        "training_step_ms": round(statistics.median(whole) * 1e3, 2),
        "torch": torch.__version__,
        "torchao": None if job["method"] == "control" else PINNED,
    }


class _Timed:
    """An optimizer whose steps are timed."""

    def __init__(self, optimizer: Any, into: list[float]) -> None:
        self.optimizer, self.into = optimizer, into
        self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad

    def step(self) -> None:
        at = time.perf_counter()
        self.optimizer.step()
        self.into[-1] = time.perf_counter() - at


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    module, told = train(job)
    out = Path(job["out"])
    with atomic(out) as draft:
        save_file({name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}, draft)
    with atomic(out.with_suffix(".json")) as draft:
        draft.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
