"""Export time, file size, load time, memory and latency of packed ONNX files, against the same network in float32.

Run by hand: ``python tests/benchmarks/bench_export.py [--only PATTERN] [--rounds 7]``. The float file is the same
graph, traced and optimised the same way, with nothing packed. Load time and peak memory (VmHWM over what the
interpreter with ONNX Runtime takes) come from a process of its own for each file and round; latencies at batch 1 from
one process that runs all files in turn; one thread; medians, and for ratios the median of the rounds' ratios. The
result goes to ``results/export.json`` and ``.md``.
"""

import argparse
import datetime
import fnmatch
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import torch
from networks import Case, prepare

from pcq.export import passes, write_onnx, writing
from pcq.export.facts import target
from pcq.export.tracing import trace

RESULTS = Path(__file__).parent / "results"
RECIPES = {
    "resnet18": ("ternary-all", "binary-all", "w3", "w4", "w4-g64", "codebook4", "w8"),
    "resnet50": ("ternary-all", "binary-all", "ternary", "w4"),
    "mobilenet_v2": ("ternary-all", "binary-all", "mixed"),
    "vit_b_16": ("ternary-all", "binary-all", "w4"),
}
LIMITS = {"ternary-all": 1.65, "binary-all": 1.05}
SHORT_ROWS = {"ternary-all": 1.80, "binary-all": 1.20}

START = """
import json, sys, time
import numpy as np, onnxruntime as ort
def session(path):
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
"""
LOAD = (
    START
    + """
before, start = peak(), time.perf_counter()
session(sys.argv[1])
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""
)
RUN = (
    START
    + """
x = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
rounds, paths = int(sys.argv[1]), sys.argv[2:]
sessions = [session(path) for path in paths]
times = [[] for _ in paths]
for i in range(rounds + 1):
    for one, mine in zip(sessions, times):
        start = time.perf_counter()
        one.run(None, {one.get_inputs()[0].name: x})
        if i:
            mine.append(time.perf_counter() - start)
print(json.dumps(times))
"""
)


def write_float(case: Case, path: Path) -> int:
    """The network as it is; returns the file's size."""
    goal = target("1.17")
    model = trace(case.network, case.example, goal.opset).model
    passes.optimise(model)
    passes.finish(model, goal.ir_version, "", {})
    writing.save(model, path)
    return path.stat().st_size


def in_process(code: str, *arguments: object) -> list[list[float]]:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result: list[list[float]] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def ratio(numbers: list[float], reference: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numbers, reference, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="network, recipe to take, such as 'resnet18, *'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_export"), help="where the files go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name, given in RECIPES.items():
        recipes = [recipe for recipe in given if fnmatch.fnmatch(f"{name}, {recipe}", arguments.only)]
        if not recipes:
            continue
        paths = {"float": arguments.folder / f"{name}.float.onnx"}
        facts: dict[str, dict[str, object]] = {"float": {}}
        for recipe in recipes:
            case = prepare(name, recipe)
            if recipe == recipes[0]:
                facts["float"]["bytes"] = write_float(case, paths["float"])
            paths[recipe] = arguments.folder / f"{name}.{recipe}.onnx"
            stages: dict[str, float] = {}
            last = [time.perf_counter(), ""]

            def timed(stage: str, done: int, total: int, stages: dict[str, float] = stages, last: list = last) -> None:
                now = time.perf_counter()
                if last[1]:
                    stages[last[1]] = stages.get(last[1], 0.0) + now - last[0]
                last[:] = now, stage

            report = write_onnx(case.network, case.weights, case.example, paths[recipe], progress=timed)
            timed("", 0, 0)
            facts[recipe] = {
                "bytes": report.nbytes, "predicted": report.predicted, "bits": report.bits_per_weight,
                "error": report.error, "seconds": report.seconds, "stages": {k: round(v, 2) for k, v in stages.items()},
            }  # fmt: skip
            limit = (SHORT_ROWS if name == "mobilenet_v2" else LIMITS).get(recipe)
            assert limit is None or report.bits_per_weight <= limit, (name, recipe, report.bits_per_weight)
            del case
        loads: dict[str, list[list[float]]] = {key: [] for key in paths}
        for _ in range(arguments.rounds):
            for key, path in paths.items():
                loads[key].append(in_process(LOAD, path))
        runs = dict(zip(paths, in_process(RUN, 2 * arguments.rounds, *paths.values()), strict=True))
        reference = [load[0] for load in loads["float"]]
        for key in paths:
            row = {"network": name, "recipe": key, **facts[key]}
            row["load_ms"] = 1e3 * statistics.median(load[0] for load in loads[key])
            row["load_ratio"] = ratio([load[0] for load in loads[key]], reference)
            row["peak_mb"] = statistics.median(load[1] for load in loads[key]) / 1e6
            row["run_ms"] = 1e3 * statistics.median(runs[key])
            row["run_ratio"] = ratio(runs[key], runs["float"])
            rows.append(row)
            print(line(row), flush=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
        ).stdout.strip(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        "rounds": arguments.rounds,
    }
    if arguments.only == "*":
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "export.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        (RESULTS / "export.md").write_text(markdown(about, rows))


def line(row: dict[str, object]) -> str:
    """One row for people."""
    bits = f"{row['bits']:.3f}" if "bits" in row else ""
    export = f"{row['seconds']:.0f}" if "seconds" in row else ""
    error = f"{row['error']:.0e}" if "error" in row else ""
    return (
        f"| {row['network']} | {row['recipe']} | {row['bytes']:,} | {bits} | {error} | {export} | {row['load_ms']:.0f} "
        f"| {row['load_ratio']:.2f} | {row['peak_mb']:.0f} | {row['run_ms']:.1f} | {row['run_ratio']:.2f} |"
    )


def markdown(about: dict[str, object], rows: list[dict[str, object]]) -> str:
    """The table for people."""
    return "\n".join([
        "# Packed ONNX files against float32", "",
        f"Made by `tests/benchmarks/bench_export.py` on {about['date']} at commit {str(about['commit'])[:10]}, "
        f"torch {about['torch']}, ONNX Runtime {about['onnxruntime']}, {about['machine']}, one thread, random weights, "
        f"{about['rounds']} rounds on a shared machine: read the ratios.", "",
        "| network | recipe | bytes | bits | error | export s | load ms | x float | peak MB | run ms | x float |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *map(line, rows), "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
