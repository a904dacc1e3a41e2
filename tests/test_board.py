"""TensorBoard gets what metrics.jsonl gets."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pcq
from pcq.commands import FinetuneResult
from pcq.errors import PcqError

NET = """
from torch import nn


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
"""


def tune(folder: Path, **options: Any) -> FinetuneResult:
    (folder / "own.py").write_text(NET)
    scope: dict[str, Any] = {}
    exec(NET, scope)
    torch.manual_seed(0)
    torch.save(scope["net"]().state_dict(), folder / "net.pt")
    how = {"steps": 8, "out": folder / "x.safetensors", "tensorboard": folder / "board", **options}
    return pcq.finetune(folder / "net.pt", "ternary-all", "digits", arch=f"{folder / 'own.py'}:net", **how)


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard itself reads: value by tag and step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    found = [(tag, event.step, event.value) for tag in read.Tags()["scalars"] for event in read.Scalars(tag)]
    assert len({(tag, step) for tag, step, _ in found}) == len(found), "a step is there twice"
    return {(tag, step): value for tag, step, value in found}


def written(metrics: Path) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        (f"{line['kind']}/{k}", line["step"]): v for line in lines for k, v in line.items() if k not in ("kind", "step")
    }


def test_every_number_of_the_metrics_also_after_a_resume(tmp_path: Path) -> None:
    def dying(stage: str, done: int, total: int) -> None:
        if done == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tune(tmp_path, save_every=3, progress=dying)
    result = tune(tmp_path, resume=True)
    assert result.resumed_at == 3
    got, want = scalars(tmp_path / "board" / "x"), written(result.metrics)
    assert ("step/loss", 8) in want
    assert ("batchnorm/after", 8) in want
    assert ("epoch/score", 8) in want
    assert got.keys() == want.keys()
    assert all(got[key] == pytest.approx(float(want[key]), rel=1e-6) for key in want)


def test_without_the_package_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        PcqError, match="--tensorboard: TensorBoard's package is not installed.*pip install tensorboard"
    ):
        tune(tmp_path)
    assert not (tmp_path / "board").exists()
    assert not (tmp_path / "x.metrics.jsonl").exists()


def test_a_disk_that_fills_up_is_told_by_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "flush", full)
    with pytest.raises(PcqError, match="board: no room left to write it"):
        tune(tmp_path)


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "board").write_text("")
    with pytest.raises(PcqError, match="board: cannot be written"):
        tune(tmp_path)
