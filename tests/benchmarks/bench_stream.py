"""How much memory a sharded checkpoint of 6 GB takes on its way to an artifact, and how long, against a plain read.

Run by hand: ``python tests/benchmarks/bench_stream.py [--recipe ternary] [--threads 2] [--out results/stream.json]``.
The checkpoint (bfloat16 and float32 mixed, its largest tensor 500 MiB) is made once under ``--folder``. Quantizing runs
in a process of its own through ``pcq.commands.quantize``; peak memory is that process's VmHWM: everything resident at
once, Python and torch included. The plain pass reads the same files in pieces of 16 MiB in the same process, before
and after; its bytes come from the page cache wherever they fit, so the ratio is an upper bound.
Goal: peak under 1.5 GB plus three times the largest tensor.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

GOAL = "1.5 GB + 3 x largest tensor"
SHARD_BYTES = 500 * 2**20


def shapes() -> dict[str, tuple[tuple[int, int], str]]:
    """A language model's weights: a bfloat16 embedding of 500 MiB, blocks in bfloat16, a float32 head."""
    found = {"embed_tokens.weight": ((128_000, 2048), "bfloat16")}
    for i in range(15):
        kind = "float32" if i % 6 == 5 else "bfloat16"
        for name, shape in {"q": (4096, 4096), "k": (1024, 4096), "o": (4096, 4096), "up": (14_336, 4096)}.items():
            found[f"layers.{i}.{name}_proj.weight"] = (shape, kind)
        found[f"layers.{i}.down_proj.weight"] = ((4096, 14_336), kind)
    found["lm_head.weight"] = ((32_000, 2048), "float32")
    return found


def make(folder: Path) -> None:
    """Write the checkpoint, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02
    shards: list[list[str]] = [[]]
    size = 0
    sizes = {name: shape[0] * shape[1] * getattr(torch, kind).itemsize for name, (shape, kind) in shapes().items()}
    for name, nbytes in sizes.items():
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    places = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            shape, kind = shapes()[name]
            numel = shape[0] * shape[1]
            tensors[name] = noise.to(getattr(torch, kind)).repeat(-(-numel // noise.numel()))[:numel].reshape(shape)
        save_file(tensors, folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def plain_pass(folder: Path) -> float:
    """Seconds to read all shards."""
    buffer = bytearray(2**24)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(folder: Path, recipe: str, threads: int) -> dict[str, float | int | str]:
    """Quantize in this process."""
    import torch

    from pcq.commands import quantize

    torch.set_num_threads(threads)
    before = plain_pass(folder)
    imports = peak()
    out = folder / "out.safetensors"
    start, cpu = time.perf_counter(), time.process_time()
    result = quantize(folder, recipe, out=out, force=True)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    highest = peak()
    out.unlink()
    source = result.planned.source
    largest = max(source.entries.values(), key=lambda entry: source_bytes(entry.shape, entry.dtype))
    read = min(before, plain_pass(folder))
    return {
        "recipe": recipe,
        "threads": threads,
        "bytes": source.nbytes,
        "largest_tensor": source_bytes(largest.shape, largest.dtype),
        "artifact_bytes": result.bytes_after,
        "peak_after_imports": imports,
        "peak": highest,
        "goal": int(1.5e9) + 3 * source_bytes(largest.shape, largest.dtype),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "plain_read_seconds": round(read, 2),
        "times_a_plain_read": round(seconds / read, 1),
    }


def source_bytes(shape: tuple[int, ...], dtype: str) -> int:
    import math

    import torch

    kind: torch.dtype = getattr(torch, dtype)
    return math.prod(shape) * kind.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pcq-stream"))
    parser.add_argument("--recipe", nargs="+", default=["ternary"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.folder, given.recipe[0], given.threads)))
        return
    if not (given.folder / "model.safetensors.index.json").exists():
        make(given.folder)
    cases = []
    for recipe in given.recipe:
        command = [sys.executable, __file__, "--child", "--folder", str(given.folder), "--recipe", recipe]
        done = subprocess.run(
            [*command, "--threads", str(given.threads)], check=True, stdout=subprocess.PIPE, text=True
        )
        case = json.loads(done.stdout.splitlines()[-1])
        cases.append(case)
        verdict = "within" if case["peak"] <= case["goal"] else "ABOVE"
        print(f"{recipe}: {case['bytes'] / 1e9:.2f} GB -> {case['artifact_bytes'] / 1e9:.2f} GB, peak "
              f"{case['peak'] / 1e9:.2f} GB, {verdict} the goal {case['goal'] / 1e9:.2f} GB, {case['seconds']} s, "
              f"{case['times_a_plain_read']} plain reads", flush=True)  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "goal": GOAL,
        "cases": cases,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
