"""The whole of ``pcq quantize`` on a ResNet-50 checkpoint: compute beside imports, peak memory, a plain pass beside it.

Run by hand: ``python tests/benchmarks/bench_command.py [--recipes ternary w4] [--out results/command.json]``.
The checkpoint holds torchvision's ResNet-50 with random weights (102 MB). Each repeat is a process of its own, of which
the first is the command line's; in it are timed the imports (``import torch`` and ``pcq.commands``), planning (reading,
recognising the network) and running (fitting, packing, writing, flushing). The plain pass reads the checkpoint's
tensors and writes them to another file, flushed, in the same process. Peak is VmHWM: everything resident at once;
``peak_over_imports`` is what quantizing adds to Python and torch.
Goals: compute under 2 s, peak memory under 2.5 times the checkpoint.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(path: Path, recipe: str) -> dict[str, float]:
    start = time.perf_counter()
    import torch

    from pcq import commands
    from pcq.torchvision_compat import import_torchvision

    import_torchvision()
    imported = time.perf_counter()
    base = peak()
    planned = commands.plan(path, recipe)
    ready = time.perf_counter()
    result = commands.run(planned, path.with_name(f"out.{recipe}.safetensors"), force=True)
    done = time.perf_counter()
    highest = peak()
    result.path.unlink()
    begun = time.perf_counter()
    state = torch.load(path, weights_only=True)
    with open(path.with_name("copy.bin"), "wb") as file:
        for tensor in state.values():
            file.write(tensor.contiguous().numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    plain = time.perf_counter() - begun
    path.with_name("copy.bin").unlink()
    return {
        "imports": imported - start,
        "plan": ready - imported,
        "run": done - ready,
        "plain_pass": plain,
        "peak": highest,
        "peak_over_imports": highest - base,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pcq-command"))
    parser.add_argument("--recipes", nargs="+", default=["ternary", "ternary-all", "binary", "w4", "w8"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    path = given.folder / "resnet50.pt"
    if given.child:
        print(json.dumps(measure(path, given.recipes[0])))
        return
    if not path.exists():
        import torch

        from pcq import models

        given.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        torch.save(models.build("torchvision:resnet50").state_dict(), path)
    cases = []
    for recipe in given.recipes:
        runs = []
        for _ in range(given.repeats):
            command = [sys.executable, __file__, "--child", "--folder", str(given.folder), "--recipes", recipe]
            runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        case: dict[str, object] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        case |= {"recipe": recipe, "run_all": [round(run["run"], 3) for run in runs]}
        case["times_a_plain_pass"] = statistics.median(run["run"] / run["plain_pass"] for run in runs)
        case["peak_over_checkpoint"] = case["peak"] / case["bytes_before"]  # type: ignore[operator]
        cases.append(case)
        print(json.dumps(case), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "cases": cases,
        "load_before": os.getloadavg(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
