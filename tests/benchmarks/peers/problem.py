"""What the driver and the workers share: a problem on disk, and answers to it. Needs torch, numpy, safetensors only.

A problem is a folder: ``problem.json`` (levels, names of the weights to quantize, the architecture as FILE:FUNCTION),
``float.safetensors`` (the state dict) and ``samples.npy`` (unlabelled, float32 ``[N, ...]``). An answer is a state dict
of the same names and shapes, dequantized, and a few figures.
"""

import argparse
import importlib.util
import json
import math
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LEVELS = {"4": 16, "3": 8, "2": 4, "ternary": 3, "binary": 2}  # levels -> how many values a channel may have
Setting = dict[str, Any]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """``levels``: a key of ``LEVELS``; they are those of an output channel, or of ``group`` weights of one."""

    levels: str
    arch: str
    arguments: dict[str, Any]
    weights: tuple[str, ...]
    seed: int
    state: State
    samples: Tensor
    group: int = 0

    @property
    def count(self) -> int:
        return LEVELS[self.levels]

    @property
    def bits(self) -> int:
        return math.ceil(math.log2(self.count))

    def network(self) -> nn.Module:
        """The float network in eval mode."""
        module = build(self.arch, self.arguments)
        module.load_state_dict(self.state)
        return module.eval()

    def batches(self, size: int) -> list[Tensor]:
        return list(self.samples.split(size))


def build(arch: str, arguments: dict[str, Any]) -> nn.Module:
    """``arch``: FILE:FUNCTION; nothing of the package around the file is imported."""
    file, _, function = arch.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    network: nn.Module = getattr(module, function)(**arguments)
    return network


def write(folder: Path, problem: Problem) -> None:
    """Nothing is written twice, and nothing is ever there half-written: workers may be reading."""
    if (folder / "problem.json").exists():
        return
    (made := folder.with_name(f"{folder.name}.{os.getpid()}")).mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in problem.state.items()}, made / "float.safetensors")
    np.save(made / "samples.npy", problem.samples.numpy())
    told = {"levels": problem.levels, "arch": problem.arch, "arguments": problem.arguments,
            "weights": problem.weights, "seed": problem.seed, "group": problem.group}  # fmt: skip
    (made / "problem.json").write_text(json.dumps(told))
    try:
        made.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(made)


def read(folder: Path) -> Problem:
    told = json.loads((folder / "problem.json").read_text())
    told["weights"] = tuple(told["weights"])
    return Problem(
        **told, state=load_file(folder / "float.safetensors"), samples=torch.from_numpy(np.load(folder / "samples.npy"))
    )


def peak_mb(reset: bool = False) -> float:
    """Most memory resident since the last reset (Linux), or in the process's life."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(settings: Callable[[Problem], list[Setting]], quantize: Callable[[Problem, Setting], State]) -> None:
    """A worker's main: ``worker.py PROBLEM ANSWERS [NUMBERS...]``; no numbers: every setting.

    Writes ``ANSWERS/<number>.safetensors`` and ``.json`` (the setting; seconds, CPU seconds and MB above those before,
    or the error). An answer that is there already is left as it is.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("problem", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("numbers", type=int, nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem = read(args.problem)
    tried = settings(problem)
    args.answers.mkdir(parents=True, exist_ok=True)
    for number, setting in enumerate(tried):
        told = args.answers / f"{number}.json"
        if told.exists() or (args.numbers and number not in args.numbers):
            continue
        torch.manual_seed(problem.seed)
        before = peak_mb(reset=True)
        record: dict[str, Any] = {"setting": setting}
        start, cpu = time.perf_counter(), time.process_time()
        try:
            answer = quantize(problem, setting)
            record |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            record |= {"peak_mb": peak_mb() - before, "load": os.getloadavg()[0]}
            save_file(checked(problem, answer), args.answers / f"{number}.safetensors")
        except Exception as error:
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        told.write_text(json.dumps(record))
        print(number, json.dumps(record), flush=True)


def checked(problem: Problem, answer: State) -> State:
    """All of the float state dict's names and shapes; what an answer does not hold is the float network's own."""
    if unknown := set(answer) - set(problem.state):
        raise ValueError(f"the answer has unknown tensors {sorted(unknown)[:3]}")
    out = {}
    for name, tensor in problem.state.items():
        new = answer.get(name, tensor).detach()
        if new.shape != tensor.shape or not bool(torch.isfinite(new.float()).all()):
            raise ValueError(f"{name}: shape {list(new.shape)}, or not finite")
        out[name] = new.to(tensor.dtype).contiguous().clone()
    return out


def values(weight: Tensor, group: int = 0) -> int:
    """The largest number of different values in an output channel, or in a group of one."""
    rows = weight.flatten(1)
    ordered = (rows.reshape(-1, group) if group else rows).sort(1).values
    return 1 + int((ordered.diff(dim=1) != 0).sum(1).max())


def conv_norms(network: nn.Module) -> dict[str, str]:
    """Name of a convolution -> name of the BatchNorm right behind it."""
    graph = torch.fx.symbolic_trace(network).graph
    modules = dict(network.named_modules())
    out: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            source = node.args[0]
            if source.op == "call_module" and isinstance(modules[source.target], nn.Conv2d) and len(source.users) == 1:
                out[source.target] = node.target
    return out


def folded(
    problem: Problem,
    norms: dict[str, str],
    layers: dict[str, tuple[Tensor, Tensor | None]],
    modules: dict[str, nn.Module],
) -> State:
    """What a tool made, told in the network's own tensors.

    A BatchNorm that the tool folded into the convolution before it does nothing any more but add the bias; a bias that
    it gave to a convolution before a BatchNorm is taken off the running mean.

    Args:
        problem: the problem.
        norms: see :func:`conv_norms`.
        layers: name of a convolution or linear layer -> its new weight, its new bias or None.
        modules: the tool's modules by name; a BatchNorm that is not among them was folded.
    """
    out: State = {}
    for name, module in modules.items():
        if isinstance(module, nn.BatchNorm2d) and f"{name}.running_mean" in problem.state:
            for key, tensor in module.state_dict().items():
                out[f"{name}.{key}"] = tensor.detach()
    for name, (weight, bias) in layers.items():
        out[f"{name}.weight"] = weight.detach()
        norm = norms.get(name)
        if norm is None:
            if bias is not None:
                out[f"{name}.bias"] = bias.detach()
        elif isinstance(modules.get(norm), nn.BatchNorm2d):
            if bias is not None:
                out[f"{norm}.running_mean"] = out[f"{norm}.running_mean"] - bias.detach()
        else:
            own = problem.state[f"{norm}.running_var"]
            offset = torch.zeros_like(own) if bias is None else bias.detach()
            out |= {f"{norm}.weight": torch.ones_like(own), f"{norm}.bias": offset}
            out |= {f"{norm}.running_mean": torch.zeros_like(own), f"{norm}.running_var": torch.ones_like(own)}
            out[f"{norm}.running_var"] -= problem.network().get_submodule(norm).eps
    return out
