"""The float32 file of a network and one in each mode of export side by side: bytes, load, memory, latency.

Run by hand: ``python tests/benchmarks/bench_modes.py [--only resnet18 vit_s] [--rounds 20]``. ``pcq bench`` measures:
load time and peak memory in fresh processes, latency in one process that runs the files in turn, medians, and for
ratios the median of the rounds' ratios. Weights are random (torchvision's and timm's classes), but for
EfficientNet-Lite0, whose weights are real (tests/benchmarks/efficientnet_lite0.py); ranges are those of random samples,
and nothing goes back to float: this is about speed and bytes. The result goes to ``results/modes.json`` and ``.md``, a
table for each machine; other machines' tables, and of this one's the networks not asked for, stay as they are, with
their own dates.
"""

import argparse
import datetime
import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

import efficientnet_lite0
import networks
import onnxruntime
import torch
from bench_export import write_float
from bench_prox import processor
from torch import Tensor, nn

import pcq
from pcq.errors import PcqError
from pcq.export import write_int8, write_onnx
from pcq.models import load_state
from pcq.torchvision_compat import import_torchvision

RESULTS = Path(__file__).parent / "results"
CASES = (
    ("resnet18", "ternary-all"), ("resnet18", "w8"), ("resnet50", "ternary-all"), ("resnet50", "ternary"),
    ("mobilenet_v2", "w8"), ("vit_s", "ternary-all"), ("vit_s", "w8"), ("efficientnet_lite0", "w8"),
)  # fmt: skip
LAYOUTS = {
    "exact": {}, "native": {"layout": "native", "target_ort": "1.26"},
    "low-memory": {"layout": "low-memory", "target_ort": "1.26"},
    "matmulnbits 1": {"layout": "matmulnbits", "target_ort": "1.32", "level": 1},
    "matmulnbits 4": {"layout": "matmulnbits", "target_ort": "1.32", "level": 4},
}  # fmt: skip
"""Modes of export and their arguments; one is left out where fewer than half of the weights can have it."""

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
    """One row for each file."""
    case = networks.prepare(name, recipe)
    samples = torch.randn(24, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    said: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "float.onnx"]
        write_float(case, paths[0])
        for mode, arguments in LAYOUTS.items():
            path = Path(folder) / f"{mode}.onnx"
            try:
                made = write_onnx(case.network, case.weights, case.example, path, **arguments)  # type: ignore[arg-type]
            except PcqError as error:
                print(f"  no {mode}: {error}", flush=True)
                continue
            served = sum(case.weights[row.name].numel for row in made.tensors if row.layout == mode.split(" ")[0])
            share = served / sum(weight.numel for weight in case.weights.values())
            if share < 0.5:
                print(f"  no {mode}: {share:.0%} of the weights can have it", flush=True)
                continue
            paths.append(path)
            said[mode] = {"error": made.error, "share": share, "resident": made.resident}
            if made.level4 is not None:
                said[mode]["relative_l2"] = made.level4.relative_l2
        held_out = [(x, None) for x in samples[12:].split(4)]
        paths.append(Path(folder) / "int8.onnx")
        whole = Path(folder) / "whole.onnx"
        write_onnx(case.network, case.weights, case.example, whole, fold=False)
        report = write_int8(whole, paths[-1], lambda: samples[:12].split(4), held_out, max_drop=100)
        said["int8"] = {"fused": report.fused, "unfused": report.unfused}
        said["int8"]["relative_l2"] = report.drop and report.drop.relative_l2
        bench = pcq.bench(paths, batches=(1,), threads=(1, 2), rounds=rounds)
    about = {"network": name, "recipe": recipe, "date": datetime.date.today().isoformat(), "commit": commit(),
             "onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "rounds": rounds,
             "load average": os.getloadavg()[1]}  # fmt: skip
    rows: list[dict[str, object]] = []
    for row in bench.rows:
        mode = row.path.stem
        timed = {"load": asdict(row.load), "peak": asdict(row.peak)}
        timed["latencies"] = [asdict(latency) for latency in row.latencies]
        rows.append(about | {"mode": mode, "bytes": row.nbytes} | timed | said.get(mode, {}))
    return rows


def commit() -> str:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return head.stdout.strip()


def machine() -> str:
    """This machine, as far as the kernels go."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    name = (
        "with VNNI" if "avx512_vnni" in flags else "without VNNI" if "avx512f" in flags else "without AVX512 and VNNI"
    )
    return f"{processor()}, {os.cpu_count()} cores of a virtual machine {name}"


def markdown(rows_of: dict[str, list[dict[str, object]]]) -> str:
    """A table for each machine."""
    lines = [
        "# Export modes side by side\n",
        "Made by `tests/benchmarks/bench_modes.py`, batch 1 of 3x224x224. Weights are random but for "
        "EfficientNet-Lite0. x: ratio to the float32 file of the same network. Apart: how far outputs are from the "
        "exact file's (int8) or "
        "torch's (matmulnbits 4), relative L2, on random inputs. Modes: [docs/onnx.md](../../../docs/onnx.md).\n",
    ]
    for name, rows in rows_of.items():
        lines.append(f"## {name}\n")
        made = {(row["date"], row["commit"], row["onnxruntime"], row["rounds"], row["load average"]) for row in rows}
        for date, head, ort, rounds, load in sorted(made, key=str):
            busy = "not recorded" if load is None else f"{load:.0f} beside it, so times are indicative"
            same = [row for row in rows if (row["date"], row["commit"], row["load average"]) == (date, head, load)]
            these = ", ".join(dict.fromkeys(f"{row['network']} {row['recipe']}" for row in same))
            lines.append(f"- {these}: {date}, commit {head}, ONNX Runtime {ort}, {rounds} rounds, load average {busy}")
        lines += [
            "",
            "| network | recipe | mode | bytes | load ms | x | peak MB | 1 thread ms | x | 2 threads ms | x | apart | "
            "int8 kernels |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        ]
        first = 1.0
        for row in rows:
            load = row["load"]["median"]  # type: ignore[index]
            first = load if row["mode"] == "float" else first
            one, two = row["latencies"]  # type: ignore[misc]
            fused = ", ".join(f"{n} {kind}" for kind, n in row.get("fused", {}).items())  # type: ignore[attr-defined]
            apart = "" if row.get("relative_l2") is None else f"{row['relative_l2']:.1e}"
            lines.append(
                f"| {row['network']} | {row['recipe']} | {row['mode']} | {row['bytes']:,} | {1e3 * load:.0f} | "
                f"{load / first:.2f} | {row['peak']['median'] / 1e6:.0f} | {1e3 * one['seconds']['median']:.1f} | "  # type: ignore[index]
                f"{one['ratio']:.2f} | {1e3 * two['seconds']['median']:.1f} | {two['ratio']:.2f} | {apart} | {fused} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="these networks")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    networks.build = build
    path = RESULTS / "modes.json"
    rows_of = json.loads(path.read_text()) if path.exists() else {}
    old, rows = rows_of.get(machine(), []), []
    for name, recipe in CASES:
        if args.only is None or name in args.only:
            print(name, recipe, flush=True)
            rows += measure(name, recipe, args.rounds)
        else:
            rows += [row for row in old if (row["network"], row["recipe"]) == (name, recipe)]
    rows_of[machine()] = rows
    path.write_text(json.dumps(rows_of, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(rows_of))
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
