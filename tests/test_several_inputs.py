"""Calibration of networks with several inputs: tokens and masks by name, branches on them, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pcq
from pcq import cli
from pcq import tape as tapes
from pcq.commands import Calibration
from pcq.commands.calibrating import draw_inputs
from pcq.errors import PcqError


class Tokens(nn.Module):
    """Embeds tokens, skips the mask where all of it is set (as transformers do), and puts out the mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        x = self.norm(x + self.second(self.first(x).relu()))
        if not attention_mask.bool().all():
            x = x * attention_mask[..., None]
        return x.mean(1)


def network() -> nn.Module:
    return Tokens()


def _samples(n: int = 48, padded: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(n, 6, dtype=torch.int64)
    if padded:
        mask[:, 4:] = 0
    return {"attention_mask": mask, "input_ids": torch.randint(20, (n, 6), generator=g)}


def several(split: str) -> dict[str, Tensor]:
    return _samples(40)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file(Tokens().state_dict(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("padded", [True, False])
def test_a_branch_on_the_mask_is_replayed_where_all_samples_take_it(padded: bool) -> None:
    module, found = Tokens(), _samples(padded=padded)
    inputs = (found["input_ids"], found["attention_mask"])
    tape = tapes.record(module, tuple(each[:8] for each in inputs))
    values = dict(zip(tape.inputs, (each[8:16] for each in inputs), strict=True))
    again = tapes.output(tape, tapes.run(tape, tapes.state(module), values, 0, len(tape.ops)))
    with torch.no_grad():
        torch.testing.assert_close(again, module(*(each[8:16] for each in inputs)))
    other = _samples(padded=not padded)
    values = dict(zip(tape.inputs, (other["input_ids"][:8], other["attention_mask"][:8]), strict=True))
    with pytest.raises(PcqError, match="another way"):
        tapes.run(tape, tapes.state(module), values, 0, len(tape.ops))


@pytest.mark.parametrize("kind", ["npz", "function"])
def test_calibrated_from_the_command_line(kind: str, model: Path, tmp_path: Path, capsys) -> None:
    arch = f"{__file__}:network"
    np.savez(tmp_path / "s.npz", **{name: array.numpy() for name, array in _samples().items()})
    spec = f"npz:{tmp_path / 's.npz'}" if kind == "npz" else f"{__file__}:several"
    line = [
        "quantize",
        str(model),
        "-r",
        "ternary-all",
        "--arch",
        arch,
        "--calib",
        spec,
        "-o",
        str(tmp_path / "x.safetensors"),
    ]
    assert cli.run([*line, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)["calibration"]
    steps = {step["name"]: step for step in got["steps"]}
    assert "input_ids" in got["description"]
    assert steps["reconstruction (proxconnect), means and deviations matched"]["kept"]
    assert got["layers"][0]["weight"] == "first.weight"
    assert pcq.read_artifact(tmp_path / "x.safetensors").calibration["data"] == spec


def test_the_order_is_the_networks(tmp_path: Path) -> None:
    taken, others, said = draw_inputs(Calibration(f"{__file__}:several", 16), Tokens())
    assert taken[0].max() > 1 >= taken[1].max()
    assert len(taken[0]) == 16
    assert len(others[1]) == 8
    assert "16 samples of attention_mask, input_ids" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {**s, "masks": s["attention_mask"]}, "no input 'masks'"),
        (lambda s: {"attention_mask": s["attention_mask"]}, "no array for the input 'input_ids'"),
        (lambda s: {**s, "attention_mask": s["attention_mask"][:9]}, "as many samples each"),
        (lambda s: {name: array[:5] for name, array in s.items()}, "too few"),
    ],
)
def test_mistakes_are_answered(change, says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **{name: array.numpy() for name, array in change(_samples()).items()})
    with pytest.raises(PcqError, match=says):
        draw_inputs(Calibration(f"npz:{tmp_path / 's.npz'}"), Tokens())
