"""pcq beside its peers: the same network, samples, bits and layers, each tool in its own pinned environment.

    python tests/benchmarks/peers/compare.py FOLDER --out OUT.json [--networks ...] [--tools ...] [--levels ...]

For every network, levels and tool: all settings of the tool's worker are tried on one (smaller) draw of calibration
samples and the best by top-1 on the split ``val`` is chosen; that one is run on other draws, and those are scored once,
on ``test``. No tool sees a label. Everything is kept in FOLDER and taken up again from there; environments are made
from ``requirements/*.txt`` on first use. ``table.py OUT.json`` prints the result.
"""

import argparse
import base64
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import venv
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from problem import LEVELS, Problem, build, checked, read, values, write
from safetensors.torch import load_file
from torch import nn

import pcq
from pcq.data import open_data
from pcq.scores import module_predictor

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
DEMO = ROOT / "pcq" / "demo"
TOOLS = ("pcq", "aimet", "brevitas", "nncf", "torchao", "ort")
SEARCH_SEED, SEEDS, VALIDATION = 100, (0, 1, 2), 5000


@dataclass(frozen=True)
class Network:
    """``arch``: FILE:FUNCTION; ``reach``: a folder that FILE imports from; ``measure``: top1, or agreement.

    ``parts``: what the test samples are of, in their order: how many, and how many of them in a row show the same.
    """

    float_file: Path
    arch: str
    arguments: dict[str, Any]
    data: str
    measure: str = "top1"
    reach: str = ""
    group: int = 0
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        told = "&".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.arch}?{told}" if told else self.arch


def networks(args: argparse.Namespace) -> dict[str, Network]:
    resnet20 = f"{DEMO / 'nets.py'}:resnet20"
    found = {
        "fashion-mnist": Network(
            DEMO / "fashion-mnist-resnet20.safetensors",
            resnet20,
            {"num_classes": 10, "in_channels": 1},
            "fashion-mnist",
        )
    }
    if args.cifar10_float:
        found["cifar10"] = Network(
            args.cifar10_float, resnet20, {"num_classes": 10, "in_channels": 3}, f"cifar10:{args.cifar10}"
        )
    if args.minilm:
        found["minilm"] = Network(
            args.minilm / "minilm.safetensors", f"{HERE / 'minilm.py'}:minilm", {}, f"npz:{args.minilm / 'minilm.npz'}",
            "agreement", group=128,
        )  # fmt: skip
    if args.efficientnet:
        found["efficientnet"] = Network(
            args.efficientnet / "efficientnet.safetensors", f"{HERE / 'efficientnet.py'}:efficientnet", {},
            f"npz:{args.efficientnet / 'efficientnet.npz'}", "agreement",
            parts=json.loads((args.efficientnet / "parts.json").read_text()),
        )  # fmt: skip
    return found


def environment(folder: Path, tool: str) -> Path:
    """The interpreter of ``tool``'s own environment, made from its pins if it is not there."""
    if tool == "pcq":
        return Path(sys.executable)
    python = folder / tool / "bin" / "python"
    done = folder / tool / "installed"
    if not done.exists():
        venv.create(folder / tool, with_pip=True, clear=not python.exists())
        pins = HERE / "requirements" / f"{tool}.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", pins], check=True)
        frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
        done.write_text(frozen)
    return python


def problem(network: Network, levels: str, seed: int, count: int) -> Problem:
    """``count`` samples drawn by ``seed`` from the split ``train``."""
    module = build(network.arch, network.arguments)
    state = load_file(network.float_file)
    layers = [name for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    data = open_data(network.data, "train")
    order = torch.randperm(data.n, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    samples = torch.cat([data.take(order[i : i + 64]) for i in range(0, len(order), 64)])
    weights = tuple(f"{name}.weight" for name in layers)
    return Problem(levels, network.arch, network.arguments, weights, seed, state, samples, network.group)


def work(python: Path, tool: str, network: Network, folder: Path, numbers: list[int]) -> None:
    """The worker on the problem in ``folder``; an answer that is there is not made again."""
    reach = os.pathsep.join(p for p in (str(ROOT) if tool == "pcq" else "", network.reach) if p)
    told = {"OMP_NUM_THREADS": "1", "PYTHONPATH": reach, "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
    answers = folder / tool
    answers.mkdir(exist_ok=True)
    command = [python, HERE / f"{tool}_worker.py", folder, answers, *map(str, numbers)]
    with (answers / "log.txt").open("a") as log:
        subprocess.run(command, env={**os.environ, **told}, stdout=log, stderr=log, check=True)


class Scorer:
    """Predictions of float networks on a split, kept on disk beside them."""

    def __init__(self, folder: Path, network: Network, split: str, limit: int | None) -> None:
        self.network, self.ending = network, f".{split}{limit or ''}.npy"
        self.data = open_data(network.data, split)
        self.order = self.data.order(limit)
        known = f"float.{zlib.crc32(network.float_file.read_bytes()):08x}"
        self.float = self.predictions(network.float_file, folder / f"{known}{self.ending}")

    def predictions(self, file: Path, kept: Path) -> NDArray[np.int16]:
        if kept.exists():
            return np.load(kept)
        predict = module_predictor(pcq.open_network(file, self.network.spec).module)
        size = max(1, min(250, 2**21 // math.prod(self.data.shape)))  # photos need much memory
        found = torch.cat([predict(x).argmax(1) for x, _ in self.data.batches(size, order=self.order)])
        result: NDArray[np.int16] = found.numpy().astype(np.int16)
        np.save(draft := kept.with_suffix(f".{os.getpid()}.npy"), result)
        draft.rename(kept)
        return result

    def aim(self) -> NDArray[np.int16]:
        """What a prediction should be: the label, or what the float network says."""
        if self.network.measure == "agreement":
            return self.float
        assert self.data.labels is not None
        return self.data.labels[self.order].numpy().astype(np.int16)

    def right(self, answer: Path) -> NDArray[np.bool_]:
        return self.predictions(answer, answer.with_suffix(self.ending)) == self.aim()


def parts(right: NDArray[np.bool_], asked: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Per cent right among the test samples of each part."""
    ends = np.cumsum([count for count, _ in asked.values()])
    assert ends[-1] == len(right), "--test goes with networks without parts"
    return {name: 100 * float(part.mean()) for name, part in zip(asked, np.split(right, ends[:-1]), strict=True)}


def told(asked: Problem, answers: Path, number: int) -> dict[str, Any]:
    """The record of one answer; one with more values in a channel than its levels allow is an error."""
    record: dict[str, Any] = json.loads((answers / f"{number}.json").read_text())
    if "error" not in record:
        state = checked(asked, load_file(answers / f"{number}.safetensors"))
        record["values"] = max(values(state[name], asked.group) for name in asked.weights)
        if record["values"] > asked.count:
            record["error"] = f"{record['values']} different values with one scale, {asked.count} are allowed"
    return record


def posed(args: argparse.Namespace, network: Network, levels: str, seed: int, folder: Path) -> Problem:
    """The problem in ``folder``, written if it is not there yet; answers to another one are not taken for its."""
    count = args.search_samples if seed == SEARCH_SEED else args.samples
    if not (folder / "problem.json").exists():
        write(folder, problem(network, levels, seed, count))
    found, state = read(folder), load_file(network.float_file)
    if len(found.samples) != count:
        raise SystemExit(f"{folder} holds a problem of {len(found.samples)} samples, {count} are asked for")
    if found.state.keys() != state.keys() or any(not torch.equal(found.state[name], state[name]) for name in state):
        raise SystemExit(f"{folder} holds a problem of another network than {network.float_file}; take another FOLDER")
    return found


def cell(args: argparse.Namespace, name: str, network: Network, levels: str, tool: str) -> dict[str, Any]:
    """Search, choice and final runs of one tool; with ``--read`` those that are there already."""
    (args.folder / name).mkdir(parents=True, exist_ok=True)
    base = args.folder / name / levels
    valid = Scorer(args.folder / name, network, "val", VALIDATION)

    def answered(seed: int, numbers: list[int]) -> dict[int, dict[str, Any]]:
        """Number of a setting -> its record, with the answer's file in ``answer`` if it is a right one."""
        folder = base / f"seed{seed}"
        asked = posed(args, network, levels, seed, folder)
        if not args.read:
            work(environment(args.venvs, tool), tool, network, folder, numbers)
        there = [number for number in numbers if (folder / tool / f"{number}.json").exists()]
        found = {number: told(asked, folder / tool, number) for number in there}
        return {n: r if "error" in r else r | {"answer": folder / tool / f"{n}.safetensors"} for n, r in found.items()}

    tried = answered(SEARCH_SEED, args.settings)
    for record in tried.values():
        if "answer" in record:
            record["val"] = 100 * float(valid.right(record.pop("answer")).mean())
        print(name, levels, tool, record, flush=True)
    out: dict[str, Any] = {"network": name, "levels": levels, "tool": tool, "tried": list(tried.values()), "runs": []}
    scored = [number for number, record in tried.items() if "val" in record]
    if not scored:
        return out
    best = max(scored, key=lambda number: tried[number]["val"])
    out["chosen"] = tried[best]["setting"]
    test = Scorer(args.folder / name, network, "test", args.test)
    out["images"] = len(test.order)
    out |= {"parts": network.parts} if network.parts else {}
    out["float"] = 100 * float((test.float == test.aim()).mean())
    for seed in args.seeds:
        for record in answered(seed, [best]).values():
            if "answer" in record:
                right = test.right(record.pop("answer"))
                record |= {"seed": seed, "test": 100 * float(right.mean())}
                record |= {"parts": parts(right, network.parts)} if network.parts else {}
                record["right"] = base64.b85encode(zlib.compress(np.packbits(right).tobytes(), 9)).decode()
            out["runs"].append(record)
            print(name, levels, tool, {key: record[key] for key in record if key != "right"}, flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["fashion-mnist"])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--samples", type=int, default=512, help="of the runs that are scored on test")
    parser.add_argument("--search-samples", type=int, default=256, help="of the runs that settings are chosen by")
    parser.add_argument("--settings", type=int, nargs="+", default=list(range(12)), help="try only these, by number")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=list(SEEDS), help="of the draws scored on test, or none"
    )
    parser.add_argument("--test", type=int, help="score on so many evenly spaced test samples; default: all")
    parser.add_argument("--read", action="store_true", help="run nothing: make OUT from what is in FOLDER")
    parser.add_argument("--venvs", type=Path, help="where the environments are; default: FOLDER/venvs")
    parser.add_argument("--cifar10", type=Path, help="where CIFAR-10 is")
    parser.add_argument("--minilm", type=Path, help="the folder that minilm.py made")
    parser.add_argument("--efficientnet", type=Path, help="the folder that efficientnet.py made")
    parser.add_argument("--cifar10-float", type=Path, help="a float ResNet-20 for it")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.venvs = (args.venvs or args.folder / "venvs").resolve()
    known = networks(args)
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    record: dict[str, Any] = {"cells": []}
    if args.out.exists():
        record = json.loads(args.out.read_text())
    for name in args.networks:
        for tool in args.tools:
            for levels in args.levels:
                made = cell(args, name, known[name], levels, tool)
                made |= {
                    "commit": commit.strip(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                    "torch": torch.__version__, "samples": args.samples, "search_seed": SEARCH_SEED,
                    "search_samples": args.search_samples, "validation": VALIDATION,
                    "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, shared, one thread",
                }  # fmt: skip
                same = (name, levels, tool)
                cells = [c for c in record["cells"] if (c["network"], c["levels"], c["tool"]) != same]
                record["cells"] = [*cells, made]
                args.out.write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
