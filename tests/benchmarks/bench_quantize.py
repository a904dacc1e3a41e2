"""How long the levels take: every quantizer on random weights of the shapes of ResNet-50, against a plain copy.

Run by hand: ``python tests/benchmarks/bench_quantize.py [--threads 2] [--only TEXT] [--out results/quantize.json]``.
Each case runs in a process of its own. Seconds are fit and nearest levels of all 25.5 million weights, the best of the
repeats; the copy is of the same float32 weights, timed in the same process just before, best of five; peak is what
resident memory grew to above the weights themselves while quantizing, the codes that are kept (1 byte a weight)
included. SQNR is of Gaussian weights and says nothing about real ones.
"""

import argparse
import ctypes
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

CASES = {
    "binary": ("Binary()", None),
    "ternary": ("Ternary()", None),
    "ternary, groups of 64": ("Ternary()", 64),
    "ternary, per tensor": ("Ternary()", 0),
    "least-squares binary, 2 bits": ("LeastSquaresBinary(2)", None),
    "least-squares binary, 4 bits": ("LeastSquaresBinary(4)", None),
    "uniform 2-bit": ("Uniform(2)", None),
    "uniform 4-bit": ("Uniform(4)", None),
    "uniform 4-bit, groups of 64": ("Uniform(4)", 64),
    "uniform 8-bit": ("Uniform(8)", None),
    "uniform 8-bit absmax": ("Uniform(8, scale='absmax')", None),
    "uniform 4-bit affine": ("Uniform(4, symmetric=False)", None),
    "uniform 8-bit affine": ("Uniform(8, symmetric=False)", None),
    "k-means, 4 levels": ("KMeans(4)", None),
    "k-means, 16 levels": ("KMeans(16)", None),
    "k-means, 256 levels, per tensor": ("KMeans(256)", 0),
    "powers of two, 4 bits": ("AdditivePowersOfTwo(4)", None),
    "nf4 absmax, groups of 64": ("Fixed('nf4', 'absmax')", 64),
    "nf4 mse": ("Fixed('nf4', 'mse')", None),
}
"""Name -> quantizer, group (None: per channel, 0: per tensor)."""


def resnet50_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(planes, width, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
            shapes += [(4 * planes, width, 1, 1)] if block == 0 else []
            width = 4 * planes
    return [*shapes, (1000, 2048)]


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str, threads: int, repeats: int) -> dict[str, float | int | str]:
    import torch

    from pcq import quantizers
    from pcq.qtensor import quantize
    from pcq.rows import Rows

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * 0.02 for shape in resnet50_shapes()]
    numel = sum(weight.numel() for weight in weights)
    made, group = CASES[name]
    quantizer = eval(made, vars(quantizers))
    cut = {None: {}, 0: {"axis": None}}.get(group, {"group": group})
    quantize(quantizer, weights[1], Rows(tuple(weights[1].shape), **cut))

    def copy() -> float:
        start = time.perf_counter()
        for weight in weights:
            weight.clone()
        return time.perf_counter() - start

    plain = min(copy() for _ in range(5))
    seconds, used = [], []
    for _ in range(repeats):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed is not counted as there already
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
        before = resident("VmRSS")
        start, busy = time.perf_counter(), time.process_time()
        done = [quantize(quantizer, weight, Rows(tuple(weight.shape), **cut)) for weight in weights]
        seconds.append(time.perf_counter() - start)
        used.append(time.process_time() - busy)
        peak = resident("VmHWM") - before
        noise = sum(float((q.dequantize() - w).double().square().sum()) for q, w in zip(done, weights, strict=True))
        nbytes = sum(q.nbytes for q in done)
        del done
    signal = sum(float(weight.double().square().sum()) for weight in weights)
    return {
        "case": name,
        "quantizer": quantizer.text,
        "weights": numel,
        "seconds": round(min(seconds), 3),
        "seconds_worst": round(max(seconds), 3),
        "cpu_seconds": round(min(used), 3),
        "copies": round(min(seconds) / plain, 1),
        "peak_extra_mb": round(peak / 1e6, 1),
        "sqnr_db": round(10 * float(torch.tensor(signal / noise).log10()), 3),
        "bits_per_weight": round(8 * nbytes / numel, 4),
    }


def machine() -> dict[str, str | int]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "cpu": models[0],
        "cores": os.cpu_count() or 0,
        "load_before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, help="write the results as JSON here")
    parser.add_argument("--case", help="measure this one here and print JSON (what each process does)")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.threads, arguments.repeats)))
        return
    about = machine() | {"threads": arguments.threads, "repeats": arguments.repeats}
    results = []
    for name in (name for name in CASES if arguments.only in name):
        command = [sys.executable, __file__, "--case", name, f"--threads={arguments.threads}"]
        found = subprocess.run([*command, f"--repeats={arguments.repeats}"], capture_output=True, text=True, check=True)
        results.append(json.loads(found.stdout))
        row = results[-1]
        print(
            f"{name:32} {row['seconds']:8.2f} s {row['copies']:7.1f} copies {row['peak_extra_mb']:7.1f} MB "
            f"{row['sqnr_db']:7.2f} dB {row['bits_per_weight']:6.3f} bits",
            flush=True,
        )
    if arguments.out:
        arguments.out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
