"""``pcq quantize --calib``: what the artifact holds, what it records, what is refused, and learned rounding."""

import json
from pathlib import Path

import pytest
import torch

import pcq
import pcq.data
from pcq import cli
from pcq.calibrate.quadratic import Quadratic, nearest
from pcq.calibrate.rounding import rounding
from pcq.calibrate.steps import compared
from pcq.commands import Calibration
from pcq.commands.calibrating import draw
from pcq.demo import HERE
from pcq.quantizers import Binary, KMeans, Ternary, Uniform

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
DIGITS = HERE / "digits-resnet8.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("made") / "x.safetensors"
    return pcq.quantize(DIGITS, "ternary", arch=ARCH, out=out, calibration=Calibration("digits", 128, refine=12))


def test_the_artifact_holds_what_calibration_found(made):
    stored = pcq.read_artifact(made.path)
    outcome = made.calibrated.outcome
    for name, quantized in outcome.quantized.items():
        assert torch.equal(stored.quantized[name].codes, quantized.codes)
        assert torch.equal(stored.quantized[name].dequantize(), quantized.dequantize())
    assert any("running_var" in name for name in outcome.changed)
    for name, tensor in outcome.changed.items():
        assert torch.equal(stored.floats[name], tensor)
    assert made.bytes_after == made.predicted == made.path.stat().st_size
    assert stored.calibration == {"data": "digits", "method": "proxconnect", "samples": 128, "seed": 0, "refine": 12}


def test_the_steps_are_those_of_the_written_network(made):
    """What the last kept step says of the samples held out is what the artifact does on them."""
    asked = made.calibrated.asked
    _, held_out, _ = draw(asked)
    kept = [step for step in made.calibrated.outcome.steps if not step.reason][-1]
    with torch.no_grad():
        y, aim = pcq.open_network(made.path).module(held_out), made.calibrated.network(held_out)
    again = compared(kept.name, y, aim)
    assert again.agreement == kept.agreement
    assert again.error == pytest.approx(kept.error, rel=1e-4)
    assert kept.error < made.calibrated.outcome.steps[0].error / 2


def test_calibration_wins_back_what_rounding_loses(made, tmp_path):
    plain = pcq.quantize(DIGITS, "ternary", arch=ARCH, out=tmp_path / "plain.safetensors")
    assert not pcq.read_artifact(plain.path).calibration
    scores = [pcq.evaluate(path, "digits", arch=ARCH).scores.top1 for path in (plain.path, made.path)]
    assert scores[1] > scores[0] + 30


def test_a_seed_settles_everything(made, tmp_path):
    again, other = (
        pcq.quantize(DIGITS, "ternary", arch=ARCH, out=tmp_path / f"{seed}",
                     calibration=Calibration("digits", 128, seed=seed, refine=12))
        for seed in (0, 1)
    )  # fmt: skip
    assert made.path.read_bytes() == again.path.read_bytes() != other.path.read_bytes()


def test_samples_come_from_train_and_are_not_judged_by():
    train = pcq.data.open_data("digits", "train")
    samples, held_out, said = draw(Calibration("digits", 64, seed=3))
    every = train.take(list(range(train.n))).flatten(1)
    for x in (*samples, *held_out):
        assert (every == x.flatten()).all(1).any()
    assert len(held_out) == 16
    assert not any(torch.equal(a, b) for a in samples for b in held_out)
    assert "labels unused" in said


def test_random_is_called_invented(tmp_path, capsys):
    arguments = ["quantize", str(DIGITS), "-r", "w4", "--arch", ARCH, "--calib", "random", "--input", "1x8x8",
                 "--samples", "16", "-o", str(tmp_path / "x.safetensors")]  # fmt: skip
    assert cli.run([*arguments, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)["calibration"]
    assert "invented" in got["description"]
    assert got["data"] == "random"
    assert got["steps"][0]["name"] == "nearest levels"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--calib", "random"], "--input 3x224x224"),
        (["--calib", "digits", "--samples", "3"], "8 or more"),
        (["--calib", "digits", "--samples", "5000"], "--samples 8 to"),
        (["--calib", "fashion-mnist", "--arch", "pcq.demo.nets:resnet8?num_classes=10&in_channels=3"], "another shape"),
        (["--samples", "8"], "--calib random"),
        (["--refine", "8"], "--calib random"),
        (["--calib", "digits", "--refine", "-1"], "0 or more"),
        (["--calib", "digits", "--seed", "-1"], "-1 is no seed. Allowed: 0 to 2147483647"),
        (["--calib", "digits", "--seed", str(2**63)], "0 to 2147483647"),
        (["--calib", "random", "--input", "1x8x8", "--refine", "8"], "too unlike"),
        (["--calib", "digitz"], "Did you mean 'digits'"),
        (["--calib", "npz:wide.npz"], "does not take them"),
    ],
)
def test_mistakes_are_answered_and_leave_nothing(options, says, tmp_path, capsys, monkeypatch):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    np.savez("wide.npz", x=np.zeros((40, 3, 8, 8), np.float32))
    arch = [] if "--arch" in options else ["--arch", ARCH]
    assert cli.run(["quantize", str(DIGITS), "-r", "w4", *arch, "-o", "x.safetensors", *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in Path().iterdir()] == ["wide.npz"]


@pytest.mark.parametrize("quantizer", [Binary(), Ternary(), Uniform(3), KMeans(5)], ids=lambda q: q.text)
def test_learned_rounding_chooses_neighbours_and_is_never_worse_than_nearest(quantizer):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 12, generator=g) @ torch.randn(2, 12, 12, generator=g)
    q = Quadratic(torch.randn(2, 4, 12, generator=g), x.transpose(1, 2) @ x / 60 + 0.01 * torch.eye(12))
    grid = quantizer.fit(q.target.flatten(0, 1))
    row = torch.arange(8).reshape(2, 4, 1).expand(2, 4, 12).contiguous()
    start, found = nearest(grid, row, q.target), rounding(q, grid, row)
    assert (found.codes.int() - start.codes.int()).abs().max() <= 1
    assert (q.loss(found.decode()) <= q.loss(start.decode())).all()
    assert q.loss(found.decode()).sum() < 0.9 * q.loss(start.decode()).sum()
