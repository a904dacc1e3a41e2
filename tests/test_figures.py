"""Figures that the documents quote are those of the committed results."""

import json
from collections import defaultdict
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
