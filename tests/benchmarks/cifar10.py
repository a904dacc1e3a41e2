"""The comparison of the ProxConnect family and its peers: every method from the same start, data order and budget.

    python -m tests.benchmarks.cifar10 tests/benchmarks/cifar10.yaml --data cifar10:DIR --float FOLDER --work FOLDER
    python -m tests.benchmarks.cifar10 --table results.jsonl

Float networks that are not in ``--float`` yet are trained first, for the file's ``floats: {epochs: N}``. Then the cells
of the YAML file run in its order, ``--jobs`` of them side by side; each adds a line to ``WORK/results.jsonl``. A cell
that has its line is not run again, and one of pcq's that was interrupted goes on where it was; ``--minutes`` interrupts
all that is still running then, as Ctrl-C and SIGTERM do. pcq's artifacts of seed 0 are exported and scored in ONNX
Runtime as well.

All weights get levels, the first and last layer too. ``sets: refitted`` (the default) are levels of each
channel refitted during training, least-squares ones and for ternary 1.1 times the mean magnitude, pcq's and torchao's
default; ``sets: mse`` are ternary least-squares levels; ``sets: paper`` are the fixed sets of arXiv 2110.13220:
{-1, 1}, {-1, 0, 1} and {-1, -0.3, 0.3, 1}, BatchNorm taking over the scale. ``scratch: true`` trains from random
weights (end-to-end).
Methods are pcq's and those of ``torchao_parq.py``: ``control`` (no levels), and torchao's, run by the interpreter that
``--torchao`` names (``make torchao`` makes it); without it they are left out, and said to be.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import yaml

import pcq
from pcq.data import open_data
from pcq.data.folder import find_images, open_image
from pcq.spec import parse
from tests.benchmarks import record, torchao_parq
from tests.benchmarks.record import ROOT, spread

LEVELS: dict[tuple[str, str], dict[str, Any]] = {
    ("ternary", "refitted"): {"levels": "ternary"},
    ("ternary", "mse"): {"levels": {"kind": "ternary", "scale": "mse"}},
    ("binary", "refitted"): {"levels": "binary"},
    ("quaternary", "refitted"): {"levels": {"kind": "lsb", "bits": 2}},
    ("ternary", "paper"): {"levels": {"kind": "fixed", "levels": [-1, 0, 1]}, "per": "tensor"},
    ("binary", "paper"): {"levels": {"kind": "fixed", "levels": [-1, 1]}, "per": "tensor"},
    ("quaternary", "paper"): {"levels": {"kind": "fixed", "levels": [-1, -0.3, 0.3, 1]}, "per": "tensor"},
}
COUNT = {"ternary": 3, "binary": 2, "quaternary": 4}

DEFAULTS = {"levels": "float", "sets": "refitted", "seed": 0, "scratch": False}
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Two-sided 95 % quantiles of Student's t, by the number of seeds."""


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


# -- one cell ----------------------------------------------------------------------------------------------------------


def run(
    cell: dict[str, Any], data: str, shape: tuple[int, ...], folder: Path, work: Path, torchao: str | None
) -> dict[str, Any]:
    """Train, score; what one line of the results holds. ``shape`` is one sample's."""
    arch = f"pcq.demo.nets:{cell['net']}?num_classes=10&in_channels={shape[0]}"
    by = run_peer if cell["method"] in torchao_parq.METHODS else run_pcq
    begun = time.perf_counter()
    start, out = folder / f"{cell['net']}.safetensors", work / f"{name(cell)}.safetensors"
    found = by(cell, data, start, arch, shape, out, torchao)
    return {"cell": cell} | found | {"cell_seconds": round(time.perf_counter() - begun)} | record.certificate()


def run_pcq(
    cell: dict[str, Any], data: str, float_: Path, arch: str, shape: tuple[int, ...], out: Path, _: str | None
) -> dict[str, Any]:
    """By pcq.finetune; the artifact of seed 0 is exported and scored in ONNX Runtime too."""
    recipe = out.with_suffix(".yaml")
    rule = {"match": "*"} | LEVELS[cell["levels"], cell["sets"]]
    refit = {"refit": 0} if cell["sets"] == "paper" else {}
    section = refit | cell["settings"] | {"method": cell["method"], "seed": cell["seed"]}
    recipe.write_text(yaml.safe_dump({"pcq": 1, "rules": [rule], "finetune": section}))
    resume = out.with_suffix(".resume").exists()
    result = pcq.finetune(float_, recipe, data, out=out, arch=arch, scratch=cell["scratch"], resume=resume, force=True)
    onnx = None
    if cell["seed"] == 0:
        onnx = pcq.export_onnx(out, out.with_suffix(".onnx"), input_shape=shape, force=True).path
    return {
        "rows": {row.weights: {"val": row.val.top1, "test": row.test and row.test.top1} for row in result.rows},
        "ort_test": onnx and pcq.evaluate(onnx, data).scores.top1,
        "unquantized_val": result.unquantized,
        "epochs": [vars(epoch) for epoch in result.epochs],
        "batchnorm": None if result.batchnorm is None else vars(result.batchnorm),
        "telemetry": vars(result.telemetry),
        "warnings": result.warnings,
        "bits": result.bits,
        "bytes": {"artifact": out.stat().st_size, "onnx": onnx and onnx.stat().st_size},
        "artifact": hashlib.sha256(out.read_bytes()).hexdigest(),
        "seconds": round(result.seconds),
    }


def run_peer(
    cell: dict[str, Any], data: str, float_: Path, arch: str, shape: tuple[int, ...], out: Path, torchao: str | None
) -> dict[str, Any]:
    """By ``torchao_parq.py`` in a process of its own, which scores as pcq does."""
    if cell["method"] != "control" and (reason := missing(torchao)):
        raise Missing(reason)
    if cell["sets"] != "refitted":
        raise Missing(f"{cell['method']} has no fixed levels")
    job = out.with_suffix(".job.json")
    keys = ("levels", "method", "settings", "seed", "scratch")
    told = {key: cell[key] for key in keys} | {"float": str(float_), "arch": arch, "data": data, "out": str(out)}
    job.write_text(json.dumps(told))
    python = torchao if cell["method"] != "control" else None
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [python or sys.executable, "-m", "tests.benchmarks.torchao_parq", str(job)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    peer = json.loads(out.with_suffix(".json").read_text())
    if cell["method"] != "control" and peer["levels_a_row"] > COUNT[cell["levels"]]:
        raise RuntimeError(f"{name(cell)} has {peer['levels_a_row']} levels in a row, not {COUNT[cell['levels']]}")
    return {"rows": peer.pop("rows"), "ort_test": None, "peer": peer, "seconds": peer["seconds"]}


class Missing(Exception):
    """A cell that cannot be run here, and why."""


def missing(torchao: str | None) -> str | None:
    """Why torchao cannot be run, if so."""
    if torchao is None:
        return "no --torchao INTERPRETER was given; `make torchao` makes one"
    try:
        asked = subprocess.run(
            [torchao, "-c", "import torchao; print(torchao.__version__)"], capture_output=True, text=True
        )
    except OSError as error:
        return f"{torchao} does not run: {error.strerror}; `make torchao` makes one"
    found = asked.stdout.strip().partition("+")[0]
    return (
        None
        if found == torchao_parq.PINNED
        else f"{torchao} has {found or 'no torchao'} and not torchao {torchao_parq.PINNED}"
    )


# -- all of them -------------------------------------------------------------------------------------------------------


def packed(data: str, work: Path) -> str:
    """A spec that opens at once: CIFAR-10's image folders are decoded once, into the form of its Python batches."""
    spec = parse(data)
    root = Path(spec.name).expanduser()
    if spec.kind != "cifar10" or any((root / f / "test_batch").is_file() for f in ("", "cifar-10-batches-py")):
        return data
    folder = work / "cifar10"
    if not (folder / "test_batch").is_file():
        folder.mkdir(exist_ok=True)
        for split in ("train", "test"):
            found = find_images(root / split)
            pixels = np.stack([np.asarray(open_image(file, "RGB")) for file in found.files]).transpose(0, 3, 1, 2)
            parts = 5 if split == "train" else 1
            labels = np.array_split(np.array(found.labels), parts)
            for i, (some, theirs) in enumerate(zip(np.array_split(pixels, parts), labels, strict=True), 1):
                batch = pickle.dumps({"data": some.reshape(len(some), -1), "labels": theirs.tolist()})
                (folder / (f"data_batch_{i}" if parts > 1 else "test_batch")).write_bytes(batch)
    return f"cifar10:{folder}"


def train_floats(nets: set[str], data: str, folder: Path, epochs: int, jobs: int) -> None:
    """The networks that are not there yet, side by side."""
    spec = parse(data)
    folder.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[bytes]] = []
    for net in sorted(net for net in nets if not (folder / f"{net}.safetensors").exists()):
        command = [sys.executable, "-m", "tests.benchmarks.train_float", spec.kind, "--net", net]
        command += ["--epochs", str(epochs), "--out", str((folder / f"{net}.safetensors").resolve())]
        command += ["--root", str(Path(spec.name).expanduser().resolve())] if spec.name else []
        print(" ".join(command), flush=True)
        running.append(subprocess.Popen(command, cwd=ROOT))
        if len(running) == jobs:
            _waited(running.pop(0))
    for process in running:
        _waited(process)


def _waited(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"training a float network failed: {process.args!r}")


def read(results: Path) -> list[dict[str, Any]]:
    """The lines; a last one that was cut off is dropped from the file."""
    if not results.exists():
        return []
    text = results.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(results, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def run_all(todo: list[dict[str, Any]], args: argparse.Namespace, data: str, results: Path) -> tuple[list[str], bool]:
    """Run ``todo``, ``args.jobs`` at a time; every line is on the disk before the next.

    What was left out, and why; and whether any of it should have worked.
    """
    begun, left_out, done, failed = time.time(), [], 0, False
    shape = open_data(data, "test").shape
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // args.jobs)
    with ProcessPoolExecutor(args.jobs, context, _prepare, (threads,)) as pool:
        waiting: dict[Future[dict[str, Any]], dict[str, Any]] = {
            pool.submit(_until_stopped, cell, data, shape, args.float, args.work, args.torchao): cell for cell in todo
        }
        while waiting:
            left = None if args.minutes is None else max(0.0, args.started + args.minutes * 60 - time.time())
            try:
                finished, _ = wait(waiting, left, "FIRST_COMPLETED")
            except KeyboardInterrupt:
                finished = set()
            if not finished:
                stop(pool)
                left_out.append(f"{len(waiting)} cells, for want of time; the same command goes on")
                break
            for future in finished:
                cell = waiting.pop(future)
                try:
                    line = future.result()
                except Exception as error:  # one cell's failure is not the others'
                    failed = failed or not isinstance(error, Missing)
                    left_out.append(f"{name(cell)}: {error if isinstance(error, Missing) else repr(error)}")
                    print(f"NOT RUN {left_out[-1]}", flush=True)
                    continue
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                done += 1
                minutes = (time.time() - begun) / done * len(waiting) / 60
                told = f"{name(cell)} {json.dumps(line['rows'])} {line['cell_seconds']} s"
                print(f"{done} of {len(todo)}: {told}; {minutes:.0f} min to go", flush=True)
    return left_out, failed


def stop(pool: ProcessPoolExecutor) -> None:
    """Each process gets one SIGTERM, on which it saves what it is at; all are waited for."""
    for child in multiprocessing.active_children():
        child.terminate()
    pool.shutdown(wait=True, cancel_futures=True)


_stopped = False
"""Whether this process was told to stop: the pool has handed it the next cell already."""


def _until_stopped(*job: Any) -> dict[str, Any]:
    """:func:`run`, in a process of the pool. One that ended by itself would have the others killed while they save."""
    global _stopped
    if _stopped:
        raise KeyboardInterrupt
    try:
        return run(*job)
    except KeyboardInterrupt:
        _stopped = True
        raise


def _prepare(threads: int) -> None:
    """Of a process that runs cells: its threads, that a terminal's Ctrl-C is left to the process that started it, and
    that SIGTERM ends what it has started, too."""
    os.setsid()
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


# -- the table ---------------------------------------------------------------------------------------------------------


def table(lines: list[dict[str, Any]]) -> str:
    """Points lost against the float network (mean and standard deviation over seeds), markdown; the best first.

    Behind the best of its group by the test split: the mean of the differences seed by seed; ``tie`` where a paired t
    test of these does not tell it from 0 (two-sided, 95 %); nothing where there is one seed.
    """
    groups = defaultdict[tuple[str, ...], dict[str, dict[int, dict[str, Any]]]](dict)
    for line in lines:
        cell = line["cell"]
        start = "end-to-end" if cell["scratch"] else "fine-tune"
        settings = ", ".join(f"{k} {v}" for k, v in sorted(cell["settings"].items()))
        key = (cell["net"], f"{start}, {settings}", f"{cell['levels']}, {cell['sets']}")
        groups[key].setdefault(cell["method"], {})[cell["seed"]] = line
    out = [
        "| network | start | levels | method | seeds | lost, val | lost, test | test | behind the best | ORT - torch |"
    ]
    out.append("|---|---|---|---|---|---|---|---|---|---|")
    for key, methods in sorted(groups.items()):
        lost = {m: {s: _lost(line, "test") for s, line in found.items()} for m, found in methods.items()}
        ranked = sorted(methods, key=lambda m: mean(lost[m].values()))
        for method in ranked:
            found = methods[method]
            apart = [abs(x["ort_test"] - x["rows"]["fine-tuned"]["test"]) for x in found.values() if x["ort_test"]]
            row = [
                *key,
                method,
                ", ".join(map(str, sorted(found))),
                spread([_lost(line, "val") for line in found.values()]),
                spread(list(lost[method].values())),
                spread([x["rows"]["fine-tuned"]["test"] for x in found.values()]),
                _behind(lost[ranked[0]], lost[method]),
                f"{max(apart):.2f}" if apart else "",
            ]
            out.append("| " + " | ".join(row) + " |")
    return "\n".join(out) + "\n"


def _lost(line: dict[str, Any], split: str) -> float:
    rows = line["rows"]
    return float(rows["float"][split] - rows["fine-tuned"][split])


def _behind(best: dict[int, float], other: dict[int, float]) -> str:
    apart = [other[seed] - best[seed] for seed in best.keys() & other.keys()]
    if len(apart) < 2:
        return ""
    if best == other:
        return "best"
    tie = abs(mean(apart)) <= STUDENT[min(5, len(apart))] * stdev(apart) / len(apart) ** 0.5
    return f"tie ({mean(apart):.2f})" if tie else f"{mean(apart):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--float", type=Path, help="folder of <net>.safetensors")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--minutes", type=float, help="stop after so many, to go on by the same command")
    parser.add_argument("--torchao", help="interpreter of an environment with torchao")
    parser.add_argument("--out", type=Path, help="write the table and the results' lines to OUT.md and OUT.jsonl")
    parser.add_argument("--table", type=Path, help="only print the table of these results")
    args = parser.parse_args()
    args.started = time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.table:
        print(table(read(args.table)))
        return
    args.work, args.float = args.work.resolve(), args.float.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    with (args.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run works in {args.work}") from None
        document = yaml.safe_load(args.cells.read_text())
        wanted = list(cells(document))
        data = packed(args.data, args.work)
        train_floats(
            {c["net"] for c in wanted}, data, args.float, document.get("floats", {}).get("epochs", 30), args.jobs
        )
        results = args.work / "results.jsonl"
        had = [line["cell"] for line in read(results)]
        left_out, failed = run_all([cell for cell in wanted if cell not in had], args, data, results)
        lines = [line for line in read(results) if line["cell"] in wanted]
    text = table(lines) + "".join(f"\nNot run: {each}\n" for each in left_out)
    print(text)
    if args.out:
        args.out.with_suffix(".md").write_text(text)
        args.out.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if failed:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
