"""Exported programs of a fixed batch, or with inputs by name: scored and calibrated as open ones by position are."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pcq
from pcq import cli
from pcq.commands import analyze, export_pt2


class Two(nn.Module):
    """Of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.c((self.a(left) + self.b(right)).relu())
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of each kind, and samples whose labels are what the networks say."""
    made = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    images, left, right = torch.randn(42, 1, 6, 6), torch.randn(42, 6), torch.randn(42, 5)
    one = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).eval()
    two = Two()
    batch = {0: torch.export.Dim("n")}
    given = {"right": right[:2], "left": left[:2]}
    programs = {
        "fixed": torch.export.export(one, (images[:4],)),
        "named": torch.export.export(two, (), given, dynamic_shapes={"right": batch, "left": batch}),
        "both": torch.export.export(two, (), {"right": right[:4], "left": left[:4]}),
    }
    for name, program in programs.items():
        torch.export.save(program, made / f"{name}.pt2")
    with torch.no_grad():
        labels = one(images).argmax(1), two(left, right).argmax(1)
    np.savez(made / "fixed.npz", x=images.numpy(), y=labels[0].numpy())
    np.savez(made / "named.npz", left=left.numpy(), right=right.numpy(), y=labels[1].numpy())
    np.savez(made / "both.npz", left=left.numpy(), right=right.numpy(), y=labels[1].numpy())
    return made


@pytest.mark.parametrize("name", ["fixed", "named", "both"])
def test_they_are_scored_analyzed_and_calibrated(name: str, folder: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    program, data = folder / f"{name}.pt2", f"npz:{folder / name}.npz"
    assert pcq.evaluate(program, data, batch=7).scores.top1 == 100
    out = str(tmp_path / "q.safetensors")
    assert cli.run(["quantize", str(program), "-r", "w8", "--calib", data, "-o", out]) == 0
    capsys.readouterr()
    assert cli.run(["eval", out, "--data", data, "--reference", str(program), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["n"] == 42
    assert scores["top1"] == scores["agreement"] > 90
    found = analyze(program, "w8", calib=data)
    assert found.samples == 32
    assert found.whole is not None
    assert found.whole.agreement is not None
    assert found.whole.agreement > 90


class Outputs(dict[str, Tensor]):
    """As Hugging Face's: a dictionary of a class of its own, which a program refers to."""


pytree.register_pytree_node(
    Outputs,
    lambda outputs: (list(outputs.values()), list(outputs)),
    lambda values, names: Outputs(zip(names, values, strict=True)),
    serialized_type_name="tests.Outputs",
)


class Attends(nn.Module):
    """Tokens that look at those that are not masked; where all are, at none."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(40, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        x = self.words(input_ids)
        looks = (x @ x.mT).masked_fill(attention_mask[:, None] == 0, -torch.inf).softmax(-1)
        return Outputs(hidden=x, logits=self.head(looks @ x))


@pytest.mark.parametrize("by_name", [True, False])
def test_outputs_of_a_class_of_their_own_are_dictionaries(by_name: bool, tmp_path: Path) -> None:
    """A mask of tokens is not tried with all tokens hidden, and the number of tokens stays open."""
    given = {"input_ids": torch.ones(2, 6, dtype=torch.int64), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    open_ = {0: torch.export.Dim("n"), 1: torch.export.Dim("t", min=2, max=64)}
    sizes = dict.fromkeys(given, open_)
    args, named = ((), given) if by_name else (tuple(given.values()), {})
    program = torch.export.export(Attends().eval(), args, named, dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "net.pt2")
    made = pcq.quantize(tmp_path / "net.pt2", "w8", out=tmp_path / "q.safetensors").path
    back = torch.export.load(export_pt2(made, tmp_path / "back.pt2").path).module()
    exported = pcq.export_onnx(made, tmp_path / "q.onnx").path
    session = ort.InferenceSession(exported)
    ids, mask = torch.randint(40, (3, 9)), (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    values = (ids, mask) if not by_name else ()
    wanted = back(*values, **({"input_ids": ids, "attention_mask": mask} if by_name else {}))
    assert type(wanted) is dict
    (got,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    np.testing.assert_allclose(got, wanted["logits"].detach().numpy(), atol=1e-4)


def test_a_traced_program_needs_no_class_of_its_outputs(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from tests.test_programs import Attends\n")
    torch.save(Attends().state_dict(), tmp_path / "net.pt")
    np.savez(tmp_path / "x.npz", input_ids=np.ones((2, 6), int), attention_mask=np.ones((2, 6), int))
    made = pcq.quantize(tmp_path / "net.pt", "w8", arch=f"{tmp_path}/net.py:Attends", out=tmp_path / "q.safetensors")
    path = export_pt2(made.path, tmp_path / "q.pt2", example=f"npz:{tmp_path}/x.npz").path
    assert type(torch.export.load(path).module()(*[torch.ones(3, 6, dtype=torch.int64)] * 2)) is dict


def test_fixed_ones_on_invented_samples(folder: Path, tmp_path: Path) -> None:
    asked = pcq.commands.Calibration("random", 10, input_shape=(1, 6, 6))
    planned = pcq.commands.plan(folder / "fixed.pt2", "w4")
    made = pcq.commands.calibrated(planned, asked)
    assert made.outcome.samples == 8
    assert made.outcome.steps[-1].error is not None


def test_what_they_do_not_take_is_said(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((40, 2, 6, 6), np.float32))
    with pytest.raises(pcq.PcqError, match="samples of 2x6x6: the network does not take them"):
        analyze(folder / "fixed.pt2", "w4", calib=f"npz:{tmp_path / 'd.npz'}")


class Packed(nn.Module):
    """Lengths decide what the recurrent layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.last = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out: Tensor = self.last(self.gru(packed)[1][-1])
        return out


class Chosen(nn.Module):
    """As many rows as are above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        rows = y.reshape(-1, 8)
        return y + (torch.ones(7) if rows[rows[:, 0] > 0].shape[0] > 2 else torch.ones(1)).sum()


@pytest.mark.parametrize("kind", ["Packed", "Chosen"])
def test_networks_whose_sizes_depend_on_values_are_told_what_to_do(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    torch.save({"Packed": Packed, "Chosen": Chosen}[kind]().state_dict(), tmp_path / "n.pt")
    arrays = {"x": np.random.default_rng(0).random((8, 5, 4), np.float32)}
    if kind == "Packed":
        arrays["lengths"] = np.arange(8) % 5 + 1
    np.savez(tmp_path / "x.npz", **arrays)
    made = pcq.quantize(tmp_path / "n.pt", "w8", arch=f"{__file__}:{kind}", out=tmp_path / "n.safetensors").path
    for export in (pcq.export_onnx, pcq.commands.export_pt2):
        with pytest.raises(pcq.PcqError, match=r"cannot export .* depend on values.*give the network without"):
            export(made, example=f"npz:{tmp_path / 'x.npz'}")
    assert capsys.readouterr().err == ""  # torch prints the graph so far


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_said_at_once(dtype: torch.dtype, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    net = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64)).to(dtype).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 8, dtype=dtype),)), tmp_path / "n.pt2")
    made = tmp_path / "n.w8.safetensors"
    assert cli.run(["quantize", str(tmp_path / "n.pt2"), "-r", "w8"]) == 0
    said = capsys.readouterr()
    kind = str(dtype).removeprefix("torch.")
    assert f"The program computes in {kind}" in said.err
    assert f"Next: pcq export {made} --pt2" in said.err
    assert cli.run(["export", str(made), "--pt2"]) == 0
    with pytest.raises(pcq.PcqError, match=rf"in {kind}. Allowed: float32. Export the program again from model.float"):
        pcq.export_onnx(made)
