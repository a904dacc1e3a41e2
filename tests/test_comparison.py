"""The driver of the comparison of methods (tests/benchmarks/cifar10.py): cells, resuming, peers, the table."""

import json
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from pcq.demo import HERE
from pcq.demo.nets import lenet
from pcq.models import build
from pcq.settings import Finetune
from pcq.train.step import make_optimizer
from pcq.train.stopping import Interrupted, listening
from tests.benchmarks import cifar10, torchao_parq

FILES = sorted(Path(cifar10.__file__).parent.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_cell_is_one_of_a_kind_and_known(file: Path) -> None:
    found = list(cifar10.cells(yaml.safe_load(file.read_text())))
    assert len({cifar10.name(cell) for cell in found}) == len(found)
    for cell in found:
        settings = Finetune(**cell["settings"], seed=cell["seed"])
        assert settings.epochs
        if cell["method"] in torchao_parq.METHODS:
            assert cell["method"] == "control" or cell["levels"] in torchao_parq.BITS
            assert cell["sets"] == "refitted"
        else:
            Finetune(method=cell["method"])
            assert (cell["levels"], cell["sets"]) in cifar10.LEVELS


def test_lists_are_crossed_in_order() -> None:
    document = {
        "settings": {"epochs": 2},
        "cells": [
            {"net": "a", "levels": ["x", "y"], "method": ["m", "n"], "settings": {"lr": 1}},
            {"net": "b", "method": "m"},
        ],
    }
    found = list(cifar10.cells(document))
    assert [(c["net"], c["levels"], c["method"]) for c in found] == [
        ("a", "x", "m"), ("a", "x", "n"), ("a", "y", "m"), ("a", "y", "n"), ("b", "float", "m"),
    ]  # fmt: skip
    assert found[0]["settings"] == {"epochs": 2, "lr": 1}
    assert found[4]["settings"] == {"epochs": 2}


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert cifar10.read(results) == []
    results.write_text('{"cell": 1}\n{"cell": 2}\n{"ce')
    assert cifar10.read(results) == [{"cell": 1}, {"cell": 2}]
    assert results.read_text() == '{"cell": 1}\n{"cell": 2}\n'


def line(method: str, seed: int, test: float, ort: float | None = None) -> dict[str, Any]:
    rows = {"float": {"val": 91.0, "test": 90.0}, "fine-tuned": {"val": test + 1, "test": test}}
    cell = {"net": "n", "levels": "ternary", "method": method, "settings": {}, "sets": "refitted", "scratch": False}
    return {"cell": cell | {"seed": seed}, "rows": rows, "ort_test": ort}


def test_the_table_ranks_and_calls_ties_ties() -> None:
    lines = [line("good", s, 89.0 + 0.1 * s, 89.0 + 0.1 * s) for s in range(3)]
    lines += [line("level", s, 88.9 + (0.3, -0.3, 0.3)[s]) for s in range(3)]
    lines += [line("bad", s, 85.0 + 0.1 * s) for s in range(3)]
    rows = [row.split(" | ") for row in cifar10.table(lines).splitlines()[2:]]
    assert [row[3] for row in rows] == ["good", "level", "bad"]
    assert [row[8] for row in rows] == ["best", "tie (0.10)", "4.00"]
    assert rows[0][6] == "0.90 ± 0.10"
    assert rows[0][9].startswith("0.00")


@pytest.mark.parametrize("python", [None, "/no/such/python", sys.executable])
def test_without_torchao_its_cells_are_said_to_be_left_out(python: str | None) -> None:
    reason = cifar10.missing(python)
    if python == sys.executable and reason is None:
        pytest.skip("torchao is installed here")
    assert reason
    assert "torchao" in reason


def test_two_cells_side_by_side_resume_and_a_missing_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user runs it, and again in this process; the peer is the control, which needs no other environment."""
    torch.manual_seed(0)
    float_, work = tmp_path / "float", tmp_path / "work"
    float_.mkdir()
    save_file(lenet().state_dict(), float_ / "lenet.safetensors")
    data = tmp_path / "data.py"
    data.write_text(
        "import torch\n"
        "def data(split):\n"
        "    g = torch.Generator().manual_seed({'train': 0, 'val': 1, 'test': 2}[split])\n"
        "    y = torch.arange(200) % 10\n"
        "    x = torch.rand(200, 1, 28, 28, generator=g)\n"
        "    x[torch.arange(200), 0, y, y] += 5\n"
        "    return x, y\n"
    )
    text = (
        "settings: {steps: 4, batch: 50}\n"
        "cells:\n"
        "  - {net: lenet, levels: ternary, method: [binaryconnect, torchao-parq]}\n"
        "  - {net: lenet, method: control}\n"
    )
    cells = tmp_path / "cells.yaml"
    cells.write_text(text)
    command = [sys.executable, "-m", "tests.benchmarks.cifar10", str(cells), "--data", f"{data}:data", "--jobs", "2"]
    command += ["--float", str(float_), "--work", str(work), "--out", str(tmp_path / "table")]
    done = subprocess.run(command, cwd=cifar10.ROOT, capture_output=True, text=True, check=True)
    assert "no --torchao INTERPRETER was given" in (tmp_path / "table.md").read_text()
    lines = cifar10.read(work / "results.jsonl")
    assert {x["cell"]["method"] for x in lines} == {"binaryconnect", "control"}, done.stdout + done.stderr
    assert lines[0]["rows"].keys() >= {"float", "fine-tuned"}
    monkeypatch.setattr(sys, "argv", command[2:])
    cifar10.main()
    assert cifar10.read(work / "results.jsonl") == lines
    assert "binaryconnect" in capsys.readouterr().out


def test_all_that_run_save_themselves_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to end does not take the others with it, and none begins the cell that waits for it."""

    def saving(number: int) -> dict[str, Any]:
        with listening() as told:
            (tmp_path / f"begun{number}").touch()
            while not told.wanted:
                time.sleep(0.02)
            time.sleep(0.3 * number)
            (tmp_path / f"saved{number}").touch()
        raise Interrupted("saved")

    monkeypatch.setattr(cifar10, "run", saving)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, context, cifar10._prepare, (1,)) as pool:
        futures = [pool.submit(cifar10._until_stopped, number) for number in range(6)]
        while not all((tmp_path / f"begun{number}").exists() for number in range(2)):
            time.sleep(0.02)
        cifar10.stop(pool)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["begun0", "begun1", "saved0", "saved1"]
    assert all(future.cancelled() or isinstance(future.exception(), KeyboardInterrupt) for future in futures)


def test_the_control_is_float_training_from_the_same_start_in_the_same_order(tmp_path: Path) -> None:
    """pcq's own float training (posttraining) before its weights are rounded has the same biases and norms."""
    import pcq

    arch = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
    start = HERE / "digits-resnet8.safetensors"
    settings = {"steps": 6, "batchnorm": 0}
    job = {"float": str(start), "arch": arch, "data": "digits", "levels": "float", "method": "control"}
    module, told = torchao_parq.train(job | {"settings": settings, "seed": 3, "scratch": False})
    sets = [f"finetune.{key}={value}" for key, value in settings.items()]
    result = pcq.finetune(
        start,
        "ternary",
        "digits",
        out=tmp_path / "x.safetensors",
        arch=arch,
        method="posttraining",
        seed=3,
        overrides=sets,
    )
    stored = pcq.read_artifact(result.path)
    mine = module.state_dict()
    for name, tensor in stored.floats.items():
        assert torch.equal(tensor, mine[name]), name
    assert told["levels_a_row"] > 4
    assert json.dumps(told)


def test_the_peers_first_group_is_what_gets_levels() -> None:
    module = build("pcq.demo.nets:lenet")
    groups = make_optimizer(Finetune(), module.parameters()).param_groups
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in module.parameters() if p.ndim > 1}
