"""The float32 file, the `exact` and the `int8` file of a network side by side: bytes, load, memory, latency.

Run by hand: ``python tests/benchmarks/bench_modes.py [--only resnet18] [--rounds 20]``. ``pcq bench`` measures: load
time and peak memory in fresh processes, latency in one process that runs the files in turn, medians, and for ratios the
median of the rounds' ratios. Weights are random (torchvision's and timm's classes), but for EfficientNet-Lite0, whose
weights are real (tests/benchmarks/efficientnet_lite0.py); ranges are those of random samples, and nothing goes back to
float: this is about speed and bytes. The result goes to ``results/modes.json`` and ``.md``; networks not asked for keep
their rows.
"""

import argparse
import datetime
import json
import platform
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

import efficientnet_lite0
import networks
import onnxruntime
import torch
from bench_export import write_float
from torch import Tensor, nn

import pcq
from pcq.export import write_int8, write_onnx
from pcq.models import load_state
from pcq.torchvision_compat import import_torchvision

RESULTS = Path(__file__).parent / "results"
CASES = (
    ("resnet18", "ternary-all"), ("resnet18", "w8"), ("resnet50", "ternary-all"), ("resnet50", "ternary"),
    ("mobilenet_v2", "w8"), ("vit_s", "ternary-all"), ("vit_s", "w8"), ("efficientnet_lite0", "w8"),
)  # fmt: skip
torchvision_build = networks.build


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As networks.build, and two more."""
    torch.manual_seed(0)
    if name == "vit_s":
        import_torchvision()
        import timm  # imports torchvision, which has to be made ready first

        network: nn.Module = timm.create_model("vit_small_patch16_224", num_classes=1000)
        nn.init.normal_(network.get_parameter("head.weight"), std=0.02)
    elif name == "efficientnet_lite0":
        network = efficientnet_lite0.network()
        load_state(network, torch.load(efficientnet_lite0.checkpoint(), weights_only=True))
    else:
        return torchvision_build(name)
    return network.eval(), (torch.randn(1, 3, 224, 224),)


def measure(name: str, recipe: str, rounds: int) -> list[dict[str, object]]:
    """One row for each of the three files."""
    case = networks.prepare(name, recipe)
    samples = torch.randn(24, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{mode}.onnx" for mode in ("float", "exact", "int8")]
        write_float(case, paths[0])
        write_onnx(case.network, case.weights, case.example, paths[1])
        held_out = [(x, None) for x in samples[12:].split(4)]
        report = write_int8(paths[1], paths[2], lambda: samples[:12].split(4), held_out, max_drop=100)
        bench = pcq.bench(paths, batches=(1,), threads=(1, 2), rounds=rounds)
    said = {"fused": report.fused, "unfused": report.unfused, "relative_l2": report.drop and report.drop.relative_l2}
    rows: list[dict[str, object]] = []
    for row in bench.rows:
        mode = row.path.stem
        one = {"network": name, "recipe": recipe, "mode": mode, "bytes": row.nbytes, "load": asdict(row.load)}
        timed = {"peak": asdict(row.peak), "latencies": [asdict(latency) for latency in row.latencies]}
        rows.append(one | timed | (said if mode == "int8" else {}))
    return rows


def markdown(result: dict[str, object], rows: list[dict[str, object]]) -> str:
    """The table."""
    lines = [
        "# Export modes side by side\n",
        f"Made by `tests/benchmarks/bench_modes.py` on {result['date']} at commit {result['commit']}, torch "
        f"{result['torch']}, ONNX Runtime {result['onnxruntime']}, {result['machine']}, {result['rounds']} rounds, "
        "batch 1 of 3x224x224. Weights are random but for EfficientNet-Lite0. x: ratio to the float32 file of the same "
        "network.\n",
        "| network | recipe | mode | bytes | load ms | x | peak MB | 1 thread ms | x | 2 threads ms | x | kernels |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    first: dict[str, float] = {}
    for row in rows:
        load = row["load"]["median"]  # type: ignore[index]
        if row["mode"] == "float":
            first = {"load": load}
        one, two = row["latencies"]  # type: ignore[misc]
        fused = ", ".join(f"{n} {kind}" for kind, n in row.get("fused", {}).items())  # type: ignore[attr-defined]
        lines.append(
            f"| {row['network']} | {row['recipe']} | {row['mode']} | {row['bytes']:,} | {1e3 * load:.0f} | "
            f"{load / first['load']:.2f} | {row['peak']['median'] / 1e6:.0f} | {1e3 * one['seconds']['median']:.1f} | "  # type: ignore[index]
            f"{one['ratio']:.2f} | {1e3 * two['seconds']['median']:.1f} | {two['ratio']:.2f} | {fused} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one network")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    networks.build = build
    path = RESULTS / "modes.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = []
    for name, recipe in CASES:
        if args.only in (None, name):
            print(name, recipe, flush=True)
            rows += measure(name, recipe, args.rounds)
        else:
            rows += [row for row in old if (row["network"], row["recipe"]) == (name, recipe)]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": head.stdout.strip(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": f"{platform.machine()}, 2 cores of a virtual machine with VNNI",
        "rounds": args.rounds,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result, rows))
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
