"""Networks that take whole numbers go every way that those of floats go; ``--input`` gives their shape, no more."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pcq import cli, commands
from pcq.checkpoint import reading
from pcq.commands import programs
from pcq.data.inputs import Random, taken, varied
from pcq.errors import CheckFailed
from pcq.sources import pt2

NET = """
import torch
from torch import nn

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(40, 16), nn.Embedding(6, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.block(self.words(ids) + self.places(torch.arange(6))).mean(1))

def words():
    return Words()
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    got = cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert got == code, (got, out, err)
    return out, err


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the network's weights, its artifact and sentences, and its spec."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "net.py").write_text(NET)
    arch = f"{folder}/net.py:words"
    torch.manual_seed(0)
    torch.save(commands.networks.models.build(arch).state_dict(), folder / "net.pt")
    ids = np.random.default_rng(0).integers(0, 40, (64, 6))
    np.savez(folder / "ids.npz", x=ids, y=ids[:, 0] % 3)
    commands.quantize(folder / "net.pt", "w4", arch=arch, out=folder / "net.safetensors")
    return folder, arch


def test_onnx_takes_every_word_and_computes_what_torch_does(
    words: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = words
    run(capsys, "export", folder / "net.safetensors", tmp_path / "net.onnx", "--input", "6")
    session = ort.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(int64)"
    ids = np.arange(42).reshape(7, 6) % 40
    network = commands.open_network(folder / "net.safetensors").module
    with torch.no_grad():
        wanted = network(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: ids})[0], wanted, atol=1e-5)
    out, _ = run(capsys, "eval", tmp_path / "net.onnx", "--data", f"npz:{folder}/ids.npz", "--reference",
                 folder / "net.safetensors", "--json")  # fmt: skip
    scores = json.loads(out)
    assert scores["agreement"] == 100
    numbers = np.load(folder / "ids.npz")
    np.savez(tmp_path / "small.npz", x=numbers["x"].astype(np.uint8), y=numbers["y"])
    np.savez(tmp_path / "off.npz", x=numbers["x"] + 0.7, y=numbers["y"])
    for file in (tmp_path / "net.onnx", folder / "net.safetensors"):
        out, _ = run(capsys, "eval", file, "--data", f"npz:{tmp_path}/small.npz", "--json")
        assert json.loads(out)["top1"] == scores["top1"]
        _, err = run(capsys, "eval", file, "--data", f"npz:{tmp_path}/off.npz", code=2)
        assert "the data has floats" in err or "does not take them" in err


def test_an_exported_program_of_them(
    words: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eval mode torch runs this layer by another way than in a program, which rounds differently."""
    folder, _ = words
    out, _ = run(capsys, "export", folder / "net.safetensors", tmp_path / "net.pt2", "--pt2", "--input", "6")
    assert "it puts out the network's numbers within " in out
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert program(torch.full((5, 6), 39)).shape == (5, 3)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        out, _ = run(capsys, "export", folder / "net.safetensors", tmp_path / "net.pt2", "--pt2", "--input", "6", "-f")
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert "it puts out the very bits of the network at batch 1 and 3" in out
    monkeypatch.setattr(programs, "TOLERANCE", 1e-9)
    with pytest.raises(CheckFailed, match=r"puts out something else: \S+ of the outputs' scale"):
        programs.export_pt2(folder / "net.safetensors", tmp_path / "off.pt2", input_shape=(6,))
    assert not (tmp_path / "off.pt2").exists()


def test_side_by_side(words: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, arch = words
    out, _ = run(capsys, "bench", folder / "net.pt", "--arch", arch, "--input", "6", "--rounds", "1",
                 "--processes", "1", "--batch", "2", "--threads", "1", "--json")  # fmt: skip
    assert json.loads(out)["rows"][0]["latencies"][0]["batch"] == 2


def test_no_samples_are_invented_for_them(words: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, arch = words
    for command in ("quantize", "analyze"):
        _, err = run(capsys, command, folder / "net.pt", "-r", "w4", "--arch", arch, "--calib", "random",
                     "--input", "6", code=2)  # fmt: skip
        assert "--calib random: samples are invented as pictures, and this network takes whole numbers" in err


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


def test_what_a_network_takes_is_found_by_running_it() -> None:
    assert taken(nn.Linear(5, 2), (5,)) == Random((5,))
    assert taken(Sum(), (5,)) == Random((5,))  # it takes both
    assert taken(nn.Sequential(nn.Embedding(40, 4), nn.Flatten()), (5,)) == Random((5,), 40)
    assert taken(nn.Linear(5, 2), (7,)) == Random((7,))  # neither
    ids = Random((50,), 40)(3)
    assert ids.shape == (3, 50)
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) < int(ids.max()) < 40
    assert torch.equal(ids, Random((50,), 40)(3))
    assert Random((2, 3))(4).shape == (4, 2, 3)
    ids, mask = varied(Masked(), (torch.zeros(2, 50, dtype=torch.int64), torch.ones(2, 50)))
    assert 0 <= int(ids.min()) < int(ids.max()) < 40
    assert torch.equal(mask, torch.ones(2, 50))


class Masked(nn.Module):
    """An input of words and one of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(40, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.head((self.words(ids) * mask[..., None]).sum(1))
        return out


@pytest.fixture
def masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program of two inputs, net.pt2, and its artifact, net.safetensors."""
    example, batch = (torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6)), {0: torch.export.Dim.AUTO}
    torch.export.save(torch.export.export(Masked(), example, dynamic_shapes=(batch, batch)), tmp_path / "net.pt2")
    run(capsys, "quantize", tmp_path / "net.pt2", "-r", "w4", "-o", tmp_path / "net.safetensors")


@pytest.mark.usefixtures("masked")
def test_a_program_of_several_inputs_brings_their_shapes_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("net.pt2", "net.safetensors"):
        found = [(tuple(x.shape), x.dtype) for x in commands.open_network(tmp_path / name).inputs]
        assert found == [((2, 6), torch.int64), ((2, 6), torch.float32)]
    read = []

    def counted(program: bytes) -> tuple[Tensor, ...]:
        read.append(program)
        return pt2.example_inputs(program)

    for place in (reading, commands.networks):
        monkeypatch.setattr(place, "example_inputs", counted)
    _, err = run(capsys, "export", tmp_path / "net.safetensors")
    assert f"Next: pcq eval {tmp_path / 'net.onnx'} --data SPEC" in err.splitlines()
    assert len(read) == 1
    session = ort.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    feed = {"ids": np.full((5, 6), 39), "mask": np.ones((5, 6), np.float32)}
    assert session.run(None, feed)[0].shape == (5, 3)
    _, err = run(capsys, "export", tmp_path / "net.safetensors", "--input", "6", code=2)
    assert "--input: the exported program says the shapes of its inputs. Leave it out." in err
    out, _ = run(capsys, "export", tmp_path / "net.safetensors", tmp_path / "x.pt2", "--pt2")
    assert "the very bits of the network at batch 2 and 4" in out
    _, err = run(capsys, "export", tmp_path / "net.safetensors", tmp_path / "y.pt2", "--pt2", "--input", "6", code=2)
    assert "--input: the exported program says the shapes of its inputs. Leave it out." in err
    _, err = run(capsys, "export", tmp_path / "net.safetensors", "--mode", "int8", code=2)
    assert "need samples to observe ranges on, and none are given. Give some: --calib folder:DIR." in err
