"""Figures that the documents quote are those of the committed results."""

import json
from collections import defaultdict
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "benchmarks" / "results"


def text(name: str) -> str:
    """A document, its line breaks as spaces."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def rows(name: str) -> list[dict[str, Any]]:
    """The lines of a result."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def steps(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A run's steps by the first word of their names."""
    return {each["step"].split()[0]: each for each in row["steps"]}


def test_the_table_of_calibrations_steps_is_that_of_its_rows() -> None:
    runs = defaultdict(list)
    for row in rows("calibrate_steps.jsonl"):
        runs[row["float"], row["recipe"]].append(steps(row))
    document = text("docs/calibration.md")
    for (_, recipe), made in runs.items():
        lost = {name: [run[name]["lost"] for run in made] for name in ("nearest", "layers", "blocks")}
        seconds = [mean(run[name]["cpu_seconds"] for run in made) for name in ("layers", "blocks")]
        levels = "symmetric" if recipe.endswith("symmetric") else f"`{recipe}`"
        assert (
            f"| {levels} | {lost['nearest'][0]:.2f} | {spread(lost['layers'])} | {spread(lost['blocks'])} | "
            f"{seconds[0]:.0f} + {seconds[1]:.0f} |"
        ) in document


def test_how_often_refined_blocks_are_worse_is_counted_right() -> None:
    worse = defaultdict(list)
    for row in rows("calibrate_steps.jsonl"):
        step = steps(row)
        worse[row["float"]] += [row["recipe"]] * (step["blocks"]["held_out_error"] >= step["layers"]["held_out_error"])
    assert sorted(worse["cifar10-resnet20.safetensors"]) == ["w3+all", "w4+all", "w4+all"]
    assert sorted(worse["fashion-mnist-resnet20.safetensors"]) == ["ternary-all", "w3", "w3, symmetric", "w4"]
    assert worse["fashion-mnist-vit.safetensors"] == []
    assert (
        "of the first ResNet-20 but three (two of `w4+all`, one of `w3+all`), of Fashion-MNIST's but four (one each of "
        "`w4`, `w3`, symmetric `w3` and `ternary-all`) and of the ViT; "
    ) in text("docs/calibration.md")


def test_how_often_batchnorm_taken_anew_is_worse_is_counted_right() -> None:
    runs = [steps(row) for row in rows("calibrate_steps.jsonl") if "resnet20" in row["float"]]
    worse = [run["BatchNorm"]["lost"] - run["blocks"]["lost"] for run in runs]
    assert sum(points <= 0 for points in worse) == 2
    assert f"worse in all runs on ResNet-20 but two, by up to {max(worse):.1f} points" in text("docs/calibration.md")


def cells(name: str) -> dict[tuple[str, str], list[float]]:
    """Test points lost on CIFAR-10 on a GPU, by levels and method, one for each seed."""
    lost = defaultdict(list)
    for row in rows(name):
        cell, scores = row["cell"], row["rows"]
        if "graphs" in cell["settings"]:
            lost[cell["levels"], cell["method"]].append(scores["float"]["test"] - scores["fine-tuned"]["test"])
    return lost


def test_how_far_proxquant_and_rpc_are_behind_on_cifar10_is_what_their_rows_say() -> None:
    lost = {key: mean(values) for key, values in cells("cifar10.jsonl").items()}
    behind = []
    for levels in ("ternary", "binary"):
        best = min(points for (each, _), points in lost.items() if each == levels)
        behind.append([lost[levels, method] - best for method in ("proxquant", "reverse")])
    (quant, rpc), (quant2, rpc2) = behind
    assert f"are {quant:.1f} to {rpc:.1f} and {quant2:.0f} to {rpc2:.0f} points behind" in text("README.md")


def test_how_much_smaller_networks_become_is_what_the_measured_ones_became() -> None:
    cases = json.loads((RESULTS / "command.json").read_text(encoding="utf-8"))["cases"]
    smaller = [case["bytes_before"] / case["bytes_after"] for case in cases]
    assert f"{min(smaller):.0f} to {max(smaller):.0f} times smaller" in text("README.md")


def test_the_table_of_methods_on_cifar10_is_that_of_its_rows() -> None:
    lost, document = cells("cifar10.jsonl"), text("docs/finetune.md")
    names = {"parq", "proxconnect", "binaryconnect", "binaryrelax", "torchao-parq", "proxquant", "reverse"}
    for method in names:
        label = "torchao's PARQ" if method == "torchao-parq" else f"`{method}`"
        points = [spread(lost[levels, method]) for levels in ("ternary", "binary", "quaternary")]
        assert f"| {label} | {' | '.join(points)} |" in document
    best = min(lost["quaternary", method][0] for method in names)
    two = [lost["quaternary", method][0] - best for method in ("proxquant", "reverse")]
    assert f"10 and 11 in binary, {two[0]:.1f} and {two[1]:.1f} in 2 bits." in document


def test_distilled_networks_from_float_are_those_of_their_rows() -> None:
    document = text("docs/finetune.md")
    made = [row for row in rows("cifar10.jsonl") if "distill" in row["cell"]["settings"]]
    assert len(made) == 2
    for row in made:
        held_out, test = (row["rows"]["float"][of] - row["rows"]["fine-tuned"][of] for of in ("val", "test"))
        levels = row["cell"]["levels"]
        assert f"| {levels} | float | 10 | 0.002 | {held_out:.2f} | {test:.2f} | {row['commit']}, " in document


def test_what_a_whole_training_step_takes_is_in_its_record() -> None:
    networks = json.loads((RESULTS / "bench_step_whole.json").read_text(encoding="utf-8"))["networks"]
    small, large = (sorted(each["ratio"].values()) for each in networks.values())
    assert (
        f"takes {small[0]:.3f} to {small[-1]:.3f} times as long in ResNet-20, "
        f"{large[0]:.3f} to {large[-1]:.3f} in ResNet-18"
    ) in text("docs/finetune.md")


def test_which_methods_of_the_quick_comparison_are_told_apart_is_counted_right() -> None:
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in sorted(rows("quick.jsonl"), key=lambda row: row["cell"]["seed"]):
        cell = row["cell"]
        if cell["sets"] == "refitted":
            scores[cell["levels"], cell["method"]].append(row["rows"]["fine-tuned"]["test"])
    names = ("binaryconnect", "proxconnect", "binaryrelax", "parq", "bnn", "torchao-parq")
    apart = []
    pairs = [(levels, *pair) for levels in ("ternary", "binary") for pair in combinations(names, 2)]
    for levels, one, other in pairs:
        ahead = [a - b for a, b in zip(scores[levels, one], scores[levels, other], strict=True)]
        width = 4.303 * stdev(ahead) / sqrt(len(ahead))  # of a paired t with three seeds
        if abs(mean(ahead)) > width:
            apart.append((levels, one, other, f"{mean(ahead):.2f} ± {width:.2f}"))
    assert [each[:3] for each in apart] == [("ternary", "binaryrelax", "parq")]
    assert (
        f"of the {len(pairs)} pairs one is beyond its interval (BinaryRelax {apart[0][3]} ahead of PARQ, ternary)"
    ) in text("docs/finetune.md")


def test_what_was_tried_in_every_runtime_is_counted_right() -> None:
    files = json.loads((RESULTS / "ort_matrix.json").read_text(encoding="utf-8"))["exact"]
    made = [name for name in files if not name.startswith("unpack")]
    assert len({name.split(",")[0] for name in made}) == 7
    assert f"{len(made)} files of seven networks, in ten ONNX Runtimes" in text("docs/onnx.md")


def test_how_much_memory_loading_takes_is_what_was_measured() -> None:
    measured = json.loads((RESULTS / "export.json").read_text(encoding="utf-8"))["rows"]
    weights = {row["network"]: row["bytes"] / 4 for row in measured if row["recipe"] == "float"}
    each = [row["peak_mb"] * 1e6 / weights[row["network"]] for row in measured if row["recipe"] != "float"]
    assert f"for a moment {min(each):.0f} to {max(each):.0f} bytes a weight of memory" in text("docs/onnx.md")


def test_how_much_slower_packed_memory_runs_is_what_was_measured() -> None:
    machines = json.loads((RESULTS / "modes.json").read_text(encoding="utf-8"))
    (measured,) = (rows for machine, rows in machines.items() if "without AVX512" in machine)
    ratios = [
        next(each["ratio"] for each in row["latencies"] if (each["batch"], each["threads"]) == (1, 1))
        for row in measured
        if row["mode"] == "low-memory" and row["network"] in ("mobilenet_v2", "efficientnet_lite0")
    ]
    assert f"there runs take {min(ratios):.1f} to {max(ratios):.1f} times as long" in text("docs/onnx.md")


def test_other_peoples_models_that_were_refused_are_told() -> None:
    models = json.loads((RESULTS / "onnx_zoo.json").read_text(encoding="utf-8"))["rows"]
    refused = {row["model"] for row in models if "after" not in row}
    assert refused == {"ddddocr.common_old", "torch.mobilenet_v3_small dynamo"}
    document = text("docs/onnx.md")
    assert "One is refused, being quantized already. That of torch's newer exporter was refused as well" in document


def test_what_int8_is_said_to_buy_is_what_was_measured() -> None:
    """Less memory than the exact file, which is the smaller one on disk; its speed beside float's is in the help."""
    ratios = []
    for measured in json.loads((RESULTS / "modes.json").read_text(encoding="utf-8")).values():
        files = {(row["network"], row["recipe"], row["mode"]): row for row in measured}
        for (network, recipe, mode), row in files.items():
            if mode == "int8":
                exact = files[network, recipe, "exact"]
                assert row["peak"]["median"] < exact["peak"]["median"]
                assert row["bytes"] > exact["bytes"]
                latency = next(each for each in row["latencies"] if (each["batch"], each["threads"]) == (1, 1))
                ratios.append(1 / latency["ratio"])
    assert "the same, on int8 kernels: less memory, and faster" in text("README.md")
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times as fast" in text("pcq/cli/exporting.py")
