"""Other ways out of an artifact: what is read back is the dequantized network, bit by bit."""

import json
import math
import os
import resource
import signal
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pcq import cli, read_artifact
from pcq.checkpoint import compressed
from pcq.commands import (
    Calibration,
    bench,
    export_compressed,
    export_onnx,
    export_pt2,
    export_state_dict,
    open_network,
    quantize,
)
from pcq.commands.programs import _apart
from pcq.demo import HERE
from pcq.errors import CheckFailed, PcqError
from pcq.grids import Affine, Codebook
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows
from tests.test_tokens import Masked

DIGITS = HERE / "digits-resnet8.safetensors"
ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(DIGITS, "ternary", out=tmp_path_factory.mktemp("a") / "a.safetensors", arch=ARCH).path


class Noisy(nn.Module):
    """Adds noise to what enters it, in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x + torch.randn_like(x))
        return out


@pytest.mark.parametrize(("export", "name"), [(export_onnx, "out.onnx"), (export_pt2, "out.pt2")])
def test_a_network_that_draws_random_numbers_is_told_so(
    export: Callable[..., object], name: str, tmp_path: Path
) -> None:
    """Nothing can be compared with it."""
    save_file(Noisy().state_dict(), tmp_path / "noisy.safetensors")
    made = quantize(tmp_path / "noisy.safetensors", "binary-all", arch="tests.test_doors:Noisy")
    with pytest.raises(PcqError, match=r"puts out something else in every run\. Take randomness out") as caught:
        export(made.path, tmp_path / name, input_shape=(6,))
    assert caught.value.exit_code == 2
    assert not list(tmp_path.glob("out*"))


def test_the_state_dict_is_the_dequantized_one(artifact: Path, tmp_path: Path) -> None:
    result = export_state_dict(artifact, tmp_path / "f.safetensors")
    read, right = load_file(result.path), read_artifact(artifact).state_dict()
    assert read.keys() == right.keys()
    assert all(torch.equal(read[name], right[name]) and read[name].dtype == right[name].dtype for name in right)
    again = quantize(result.path, "ternary", out=tmp_path / "again.safetensors", arch=ARCH)
    ternary = {n: q for n, q in read_artifact(again.path).quantized.items() if q.grid.count == 3}
    assert ternary
    assert all(torch.equal(q.dequantize(), right[name]) for name, q in ternary.items())
    with pytest.raises(PcqError, match="pcq did not write it"):
        export_state_dict(artifact, tmp_path / "f.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["w8", "ternary-all", "codebook4"])
def test_what_was_half_precision_runs_as_its_codes_say(tmp_path: Path, dtype: torch.dtype, recipe: str) -> None:
    """A float network holds the very levels, and so does its ONNX file; a state dict has the checkpoint's dtype."""
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(DIGITS).items()}
    torch.save(state, tmp_path / "m.pt")
    made = quantize(tmp_path / "m.pt", recipe, arch=ARCH).path
    held, codes = open_network(made).module.state_dict(), read_artifact(made).quantized
    assert all(torch.equal(held[name], weight.dequantize()) for name, weight in codes.items())
    report = export_onnx(made, input_shape=(1, 8, 8)).report
    assert {tensor.name for tensor in report.tensors} == codes.keys()
    written = export_state_dict(made)
    kind = str(dtype).removeprefix("torch.")
    assert f"checkpoint's {kind} rounded to it ({len(codes)} quantized weights)" in written.proof
    read = load_file(written.path)
    assert {tensor.dtype for tensor in read.values() if tensor.is_floating_point()} == {dtype}


def test_tied_tensors_are_there_under_every_name(tmp_path: Path) -> None:
    weight = torch.randn(40, 16)
    torch.save({"tok.weight": weight, "head.weight": weight}, tmp_path / "m.pt")
    made = quantize(tmp_path / "m.pt", "w8").path
    read = load_file(export_state_dict(made).path)
    assert torch.equal(read["tok.weight"], read["head.weight"])
    folder = export_compressed(made).path
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored["tok.weight_packed"], stored["head.weight_packed"])


def test_the_program_puts_out_the_same_bits(artifact: Path, tmp_path: Path) -> None:
    result = export_pt2(artifact, tmp_path / "n.pt2", input_shape=(1, 8, 8))
    program = torch.export.load(result.path).module()
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(program(x), open_network(artifact).module(x))
    assert quantize(result.path, "w8", out=tmp_path / "q.safetensors").bits < 9
    with pytest.raises(PcqError, match="the input shape"):
        export_pt2(artifact, tmp_path / "o.pt2")


@pytest.mark.parametrize(
    ("export", "name"),
    [
        (partial(export_pt2, input_shape=(1, 8, 8)), "a.pt2"),
        (export_state_dict, "a.safetensors"),
        (export_compressed, "a"),
    ],
)
def test_an_output_for_which_there_is_no_room(
    export: Callable[..., object], name: str, artifact: Path, tmp_path: Path
) -> None:
    """torch would end the process, safetensors has an error of its own; RLIMIT_FSIZE stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(PcqError, match="no room left to write it"):
            export(artifact, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(1, -8, 8), (1, 8.5), (True, 8), "1x8x8", 8, (99999999999, 8)])
def test_what_is_no_shape(artifact: Path, shape: Any) -> None:
    export: Callable[..., object]
    for export in (export_onnx, export_pt2, partial(bench, [artifact])):
        given = {} if isinstance(export, partial) else {"artifact": artifact}
        with pytest.raises(PcqError, match="--input: .* (is not one sample's shape|is too large)"):
            export(**given, input_shape=shape)
    with pytest.raises(PcqError, match="--input"):
        Calibration("random", input_shape=shape)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("open_", [False, True])
def test_a_program_of_several_inputs_is_given_back(tmp_path: Path, by_name: bool, open_: bool) -> None:
    """With its dequantized weights, by position or by name, for every size that it left open."""
    example = {"ids": torch.zeros(2, 6, dtype=torch.int64), "mask": torch.ones(2, 6)}
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} if open_ else {}
    given = ((), example, dict.fromkeys(example, sizes)) if by_name else ((*example.values(),), {}, (sizes, sizes))
    program = torch.export.export(Masked().eval(), given[0], given[1], dynamic_shapes=given[2] if open_ else None)
    torch.export.save(program, tmp_path / "in.pt2")
    made = quantize(tmp_path / "in.pt2", "w4", out=tmp_path / "q.safetensors").path
    result = export_pt2(made, tmp_path / "out.pt2")
    assert result.proof.endswith("at batch 2 and 4" if open_ else "at batch 2")
    read, right = torch.export.load(result.path), read_artifact(made)
    state = right.state_dict()
    assert read.state_dict.keys() == state.keys()
    assert all(torch.equal(read.state_dict[name], state[name]) for name in state)
    shape = (3, 9) if open_ else (2, 6)
    inputs = {"ids": torch.randint(40, shape), "mask": torch.rand(shape)}
    args, named = ((), inputs) if by_name else ((*inputs.values(),), {})
    wanted = Masked()
    wanted.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(read.module()(*args, **named), wanted(**inputs), rtol=1e-6, atol=1e-6)


def test_a_program_that_puts_out_something_else_is_noticed(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = torch.export.load

    def spoilt(path: Path) -> torch.export.ExportedProgram:
        program = load(path)
        next(iter(program.state_dict.values())).data.view(-1)[0] += 1
        return program

    monkeypatch.setattr(torch.export, "load", spoilt)
    with pytest.raises(CheckFailed, match="was written and reads differently"):
        export_pt2(artifact, tmp_path / "n.pt2", input_shape=(1, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("theirs", "off"),
    [
        ([1.0, math.nan, 4.0], 0.0),
        ([1.0, 2.0, 4.0], math.inf),
        ([1.0, math.nan, 4.5], math.inf),
        ([1.0, math.nan], math.inf),
    ],
)
def test_numbers_that_are_none_have_to_be_the_same_ones(theirs: list[float], off: float) -> None:
    ours = torch.tensor([1.0, math.nan, 4.0])
    assert _apart(lambda: ours, lambda: torch.tensor(theirs), (), {}) == off


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(30, 16)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(self.tok(ids))))
        return y


@pytest.mark.parametrize(("recipe", "bits"), [("ternary-all", 2), ("binary-all", 2), ("w4", 8), ("w8", 8)])
def test_compressed_folders_unpack_to_the_weights(tmp_path: Path, recipe: str, bits: int) -> None:
    torch.manual_seed(0)
    save_file(Words().state_dict(), tmp_path / "m.safetensors")
    made = quantize(tmp_path / "m.safetensors", recipe, out=tmp_path / "q.safetensors").path
    result = export_compressed(made, tmp_path / "folder")
    stored = load_file(result.path / "model.safetensors")
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    forms = {n: g["weights"] for g in config["config_groups"].values() for n in g["targets"]}
    for name, weight in read_artifact(made).quantized.items():
        module = name.removesuffix(".weight")
        columns = int(stored[f"{module}.weight_shape"][1])
        q = compressed.unpack(stored[f"{module}.weight_packed"], forms[module]["num_bits"], columns)
        assert torch.equal(q.float() * stored[f"{module}.weight_scale"], weight.dequantize())
        assert name not in stored
    assert {form["num_bits"] for form in forms.values()} <= {bits, min(8, 2 * bits)}
    assert result.packed + len(result.kept) == 3
    assert torch.equal(stored["a.bias"], load_file(tmp_path / "m.safetensors")["a.bias"])


def test_what_does_not_fit_is_float_with_its_reason(artifact: Path, tmp_path: Path) -> None:
    result = export_compressed(artifact, tmp_path / "folder", arch=ARCH)
    reasons = dict(result.kept)
    assert set(reasons.values()) == {"it is not the weight of a Linear or an Embedding"}
    stored = load_file(result.path / "model.safetensors")
    assert all(name in stored for name in reasons)
    save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    listed = quantize(tmp_path / "m.safetensors", "nf4", out=tmp_path / "q.safetensors").path
    with pytest.raises(PcqError, match=r"none of its weights fits .*a list"):
        export_compressed(listed, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_link_to_a_folder_is_written_through(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        made = export_compressed(artifact, tmp_path / "link", arch=ARCH, force=True).path
        assert made.is_symlink()
        assert {file.name for file in (tmp_path / "real").iterdir()} == {"config.json", "model.safetensors"}


def test_others_may_read_what_is_written(artifact: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        state = export_state_dict(artifact, tmp_path / "f.safetensors").path
        folder = export_compressed(artifact, tmp_path / "folder", arch=ARCH).path
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (state, folder, *folder.iterdir())}
    assert modes.pop(folder) == 0o755
    assert len(modes) == 3
    assert set(modes.values()) == {0o644}


def test_a_folder_to_be_made_in_none_is_refused_at_once(artifact: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(PcqError, match="there is no folder"):
        export_compressed(artifact, tmp_path / "none" / "c", progress=lambda stage, done, total: seen.append(stage))
    assert not seen


def test_folders_with_other_files_are_never_replaced(artifact: Path, tmp_path: Path) -> None:
    folder = export_compressed(artifact, tmp_path / "folder", arch=ARCH).path
    export_compressed(artifact, folder, arch=ARCH)  # its own is
    (folder / "config.json").write_text("{}")
    with pytest.raises(PcqError, match="pcq did not write it"):
        export_compressed(artifact, folder, arch=ARCH)
    export_compressed(artifact, folder, arch=ARCH, force=True)
    (folder / "tokenizer.json").write_text("mine")
    for force in (False, True):
        with pytest.raises(PcqError, match=r"with other files: tokenizer\.json"):
            export_compressed(artifact, folder, arch=ARCH, force=force)
    assert (folder / "tokenizer.json").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(PcqError, match="it is a file"):
        export_compressed(artifact, tmp_path / "file", arch=ARCH, force=True)


COUNTS = st.sampled_from([2, 3, 4, 5, 16, 32, 100, 255, 256])


@given(st.integers(0, 10_000), COUNTS, st.sampled_from(["whole", "between", "rows", "halves"]),
       st.sampled_from([None, 4, 6]))  # fmt: skip
@settings(deadline=None, max_examples=120)
def test_integers_are_the_weight_or_a_reason(seed: int, count: int, form: str, group: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = Rows((5, 12), 0, 1, group)
    by_row = torch.randint(count, (rows.g,), generator=generator).to(torch.uint8)
    zero = {"whole": float(count // 2), "between": (count - 1) / 2, "rows": by_row, "halves": by_row.half() - 0.5}[form]
    grid = Affine(torch.rand(rows.g, generator=generator) + 0.01, zero, count)
    codes = torch.randint(count, (5, 12), generator=generator).to(torch.uint8)
    weight = QuantizedTensor(codes, grid, rows)
    found = compressed.integers(weight)
    if isinstance(found, str):
        assert count > (128 if form in ("whole", "between") else 64)
        return
    assert torch.equal(found.dequantize(), weight.dequantize())
    assert torch.equal(compressed.unpack(compressed.pack(found), found.bits, 12), found.q)


def test_packing_is_little_endian() -> None:
    """Eight 4-bit integers, first in the lowest bits, each plus 8: the format's own example order."""
    q = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, -1, 5]], dtype=torch.int8)
    made = compressed.Integers(q, torch.ones(1, 1), 4, None)
    assert [int(word) & 0xFFFFFFFF for word in compressed.pack(made)[0]] == [0x7BA9F810, 0x0000000D]


def test_listed_levels_are_no_integers() -> None:
    codes = torch.zeros(2, 2, dtype=torch.uint8)
    found = compressed.integers(QuantizedTensor(codes, Codebook(torch.tensor([[0.0, 1.0]])), Rows((2, 2))))
    assert isinstance(found, str)


def test_the_command_line(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", str(artifact), str(tmp_path / "s.safetensors"), "--state-dict", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "state-dict"
    assert cli.run(["export", str(artifact), str(tmp_path / "n.pt2"), "--pt2", "--input", "1x8x8"]) == 0
    assert "the very bits of the network at batch 1 and 3" in capsys.readouterr().out
    assert cli.run(["export", str(artifact), str(tmp_path / "c"), "--compressed-tensors"]) == 0
    assert "floats there" in capsys.readouterr().out
    named = ["--out", str(tmp_path / "named.safetensors"), "--state-dict", "--json"]
    assert cli.run(["export", str(artifact), *named]) == 0
    assert (tmp_path / "named.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()
    assert cli.run(["export", str(artifact), "twice.safetensors", *named]) == 2
    assert cli.run(["export", str(artifact), "--pt2", "--state-dict"]) == 2
    assert cli.run(["export", str(DIGITS), "--state-dict"]) == 2
