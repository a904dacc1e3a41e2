"""``pcq finetune --calib``: the start rounds to the calibrated network, keeps its levels, and a run can be resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pcq
from pcq import cli, qtensor
from pcq.commands import Calibration
from pcq.commands.starting import centred, settled
from pcq.demo import HERE
from pcq.errors import PcqError
from pcq.methods import METHODS
from pcq.proxconnect import ProxConnect, Target
from pcq.quantizers import Binary, KMeans, LeastSquaresBinary, Quantizer, Ternary, Uniform
from pcq.refit import refit_weight
from pcq.rows import Rows
from pcq.settings import NEAR_RATES, Finetune
from pcq.train.stopping import Interrupted

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
DIGITS = HERE / "digits-resnet8.safetensors"
CALIB = Calibration("digits", 64, "gptq", refine=8)


def tune(out: Path, **options: Any) -> pcq.commands.FinetuneResult:
    options = {"steps": 8, "calibration": CALIB, **options}
    return pcq.finetune(DIGITS, "ternary", "digits", out=out, arch=ARCH, **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> pcq.commands.FinetuneResult:
    return tune(tmp_path_factory.mktemp("straight") / "x.safetensors")


@pytest.mark.parametrize("quantizer", [Binary(), Ternary(), Uniform(3), KMeans(4), LeastSquaresBinary(2)],
                         ids=lambda q: q.text)  # fmt: skip
@pytest.mark.parametrize("rows", [Rows((8, 40)), Rows((8, 40), axis=None), Rows((8, 40), group=16)])
def test_the_start_has_the_calibrated_codes_and_a_refit_keeps_their_levels(quantizer: Quantizer, rows: Rows) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 40, generator=g)
    fitted = qtensor.quantize(quantizer, weight, rows)
    moved = qtensor.encode(weight + 0.2 * torch.randn(8, 40, generator=g), fitted.grid, rows)  # as if calibrated
    latent = centred(weight, moved)
    assert torch.equal(qtensor.encode(latent, moved.grid, rows).codes, moved.codes)
    again = refit_weight(quantizer, latent, moved.grid, rows)
    torch.testing.assert_close(again.levels(), moved.grid.levels(), rtol=0.02, atol=0.02)
    if quantizer == Binary():
        return
    assert (latent - weight).abs().mean() < (moved.dequantize() - weight).abs().mean()


def test_hard_from_the_start_the_network_is_the_calibrated_one() -> None:
    weight = nn.Parameter(torch.randn(6, 20, generator=torch.Generator().manual_seed(0)))
    rows = Rows((6, 20))
    levels = qtensor.quantize(Ternary(), weight.detach() * 1.3, rows)
    weight.data.copy_(centred(weight.detach(), levels))
    optimizer = torch.optim.SGD([weight], 0.1)
    ProxConnect(optimizer, {"w": Target(weight, rows, Ternary(), levels.grid)}, METHODS["binaryconnect"], steps=10)
    assert torch.equal(weight.detach(), levels.dequantize())


def test_the_calibrated_row_is_that_of_quantize(straight, tmp_path) -> None:
    made = pcq.quantize(DIGITS, "ternary", arch=ARCH, out=tmp_path / "x.safetensors", calibration=CALIB)
    rows = {row.weights: row for row in straight.rows}
    assert list(rows) == ["float", "one-shot", "calibrated", "fine-tuned"]
    assert rows["calibrated"].test.top1 == pcq.evaluate(made.path, "digits").scores.top1
    assert rows["calibrated"].test.top1 > rows["one-shot"].test.top1 + 20
    stored = pcq.read_artifact(straight.path)
    assert stored.calibration == {"data": "digits", "method": "gptq", "samples": 64, "seed": 0, "refine": 8}
    assert straight.settings.learning_rate == NEAR_RATES["adamw"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_near_the_aim_the_learning_rate_is_low(optimizer: Any) -> None:
    usual, said = Finetune(optimizer=optimizer), Finetune(optimizer=optimizer, lr=0.5)
    assert settled(usual, None, scratch=False) == usual
    assert settled(usual, CALIB, scratch=False).learning_rate == NEAR_RATES[optimizer] < usual.learning_rate / 5
    assert settled(said, CALIB, scratch=False) == said


def test_resumed_is_uninterrupted_and_another_run_is_refused_before_calibration(
    straight, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "x.safetensors"

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("epoch") and done == 5:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        tune(out, progress=stop)
    with monkeypatch.context() as patch:
        patch.setattr("pcq.commands.starting.calibrated", lambda *_: pytest.fail("it calibrates"))
        for change in ({"seed": 1}, {"samples": 65}, {"refine": 0}, {"data": "random", "refine": None}, None):
            other = None if change is None else replace(CALIB, **change)
            with pytest.raises(PcqError, match="another calibration"):
                tune(out, calibration=other, resume=True)
        with pytest.raises(PcqError, match="another recipe"):
            tune(out, seed=1, resume=True)
        with pytest.raises(PcqError, match="no interrupted run"):
            tune(tmp_path / "y.safetensors", resume=True)
    tune(out, resume=True)
    assert out.read_bytes() == straight.path.read_bytes()


def test_the_command_line_says_the_same(straight, tmp_path) -> None:
    line = [
        "finetune",
        str(DIGITS),
        "-r",
        "ternary",
        "-d",
        "digits",
        "--arch",
        ARCH,
        "-o",
        str(tmp_path / "x.safetensors"),
    ]
    line += ["--calib", "digits", "--samples", "64", "--calib-method", "gptq", "--refine", "8"]
    assert cli.run([*line, "--steps", "8"]) == 0
    assert (tmp_path / "x.safetensors").read_bytes() == straight.path.read_bytes()


def test_frozen_weights_are_the_calibrated_ones(tmp_path) -> None:
    result = tune(tmp_path / "x.safetensors", overrides=["finetune.freeze=[fc.*]"], steps=2)
    stored = pcq.read_artifact(result.path).quantized["fc.weight"]
    assert torch.equal(stored.codes, result.calibrated.outcome.quantized["fc.weight"].codes)
    assert torch.equal(stored.dequantize(), result.calibrated.outcome.quantized["fc.weight"].dequantize())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--calib", "digits", "--scratch"], "cannot be calibrated"),
        (["--calib", "digits", "--method", "posttraining"], "rounds at its end"),
        (["--samples", "64"], "--samples: this is about calibration, which was not asked for"),
        (["--calib-method", "gptq"], "--calib-method: this is about calibration, which was not asked for"),
        (["--refine", "0"], "--refine: this is about calibration, which was not asked for"),
        (["--calib", "random", "--refine", "1"], "not refined on invented samples"),
        (["--calib", "digits", "--samples", "3"], "8 or more"),
    ],
)
def test_mistakes_are_answered_and_leave_nothing(options, says, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["finetune", str(DIGITS), "-r", "ternary", "-d", "digits", "--arch", ARCH, "-o", "x.safetensors"]
    assert cli.run([*line, *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(Path().iterdir())
