"""The main job through the command line, on the pretrained digits network that comes with the installation."""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

import pcq
from pcq import cli, demo
from pcq.cli import frame
from pcq.demo import HERE
from pcq.report import forms

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
DIGITS = HERE / "digits-resnet8.safetensors"


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """Run pcq in this process; its standard output and standard error."""
    got = cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert got == code, (got, out, err)
    return out, err


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    return json.loads(run(capsys, *arguments, "--json")[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits network quantized to ternary and exported."""
    folder = tmp_path_factory.mktemp("made")
    result = pcq.quantize(DIGITS, "ternary", arch=ARCH, out=folder / "net.ternary.safetensors")
    pcq.export_onnx(result.path, folder / "net.ternary.onnx", input_shape=(1, 8, 8))
    return folder


def test_a_file_that_became_larger_is_not_called_smaller() -> None:
    assert forms.smaller(410, 100) == "4.1x smaller"
    assert forms.smaller(100, 100) == "1.0x smaller"
    assert forms.smaller(100, 123) == "1.2x larger"


def test_quantize_prints_plan_and_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "quantize", DIGITS, "--recipe", "ternary", "--arch", ARCH, "-o", tmp_path / "x.safetensors")
    assert "layer2.0.conv1.weight" in out
    assert "bits/weight" in out
    assert "size as predicted to the byte" in out
    assert "`--calib random` repairs most of it without data" in " ".join(out.split())
    assert f"Next: pcq export {tmp_path}/x.safetensors --onnx --input SHAPE\n" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_fixed_levels_of_another_size_than_the_weights_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = ("--arch", ARCH, "-o", tmp_path / "x.safetensors")
    out, _ = run(capsys, "quantize", DIGITS, "--recipe", "paper-ternary", *to)
    said = " ".join(out.split())
    assert "Next to nothing is kept of 8 of 8 weights (" in said
    assert "`--calib random`" not in said
    fitted = ("--set", "rules.0.levels.scale=mse")
    for recipe, sets, unfit in (("paper-ternary", (), 8), ("paper-ternary", fitted, 0), ("paper-binary", (), 0)):
        got = answer(capsys, "quantize", DIGITS, "--recipe", recipe, *sets, *to)
        assert len(got["unfit"]) == unfit


def test_the_ledger_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    got = answer(capsys, "quantize", DIGITS, "--recipe", "ternary", "--arch", ARCH, "-o", path)
    assert got["bytes_after"] == got["bytes_predicted"] == path.stat().st_size
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for row in got["ledger"]:
        parts = [tensor for name, tensor in stored.items() if name.rpartition(".")[0] == row["name"]]
        assert row["bytes"] == sum(part.nbytes for part in parts) > 0
    assert len(got["ledger"]) == 8
    assert got["bytes_before"] > 8 * got["bytes_after"]


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    got = answer(capsys, "quantize", DIGITS, "-r", "w4", "--arch", ARCH, "-o", path, "--dry-run")
    assert {entry["levels"] is None for entry in got["entries"]} == {True, False}
    assert all((entry["levels"] is None) == (entry["reason"] is not None) for entry in got["entries"])
    assert not path.exists()


def test_what_another_run_has_put_there_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that is not the predicted one is found before the file has its name."""
    write = pcq.checkpoint.write_artifact

    def overtaken(path: Path, *more: Any) -> int:
        size = write(path, *more)
        path.write_bytes(b"of another run")
        return size

    monkeypatch.setattr(pcq.checkpoint, "write_artifact", overtaken)
    result = pcq.quantize(DIGITS, "w8", arch=ARCH, out=tmp_path / "x.safetensors")
    assert result.path.read_bytes() == b"of another run"
    assert result.bytes_after == result.predicted


def test_default_output_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(DIGITS.read_bytes())
    run(capsys, "quantize", model, "-r", "w8", "--arch", ARCH)
    assert (tmp_path / "model.w8.safetensors").exists()


def test_same_through_python_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "quantize", DIGITS, "-r", "w4", "--arch", ARCH, "-o", tmp_path / "cli.safetensors")
    pcq.quantize(DIGITS, "w4", arch=ARCH, out=tmp_path / "python.safetensors")
    assert (tmp_path / "cli.safetensors").read_bytes() == (tmp_path / "python.safetensors").read_bytes()


def test_export_proves_itself_and_scores_like_torch(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_torch = answer(capsys, "eval", made / "net.ternary.safetensors", "--data", "digits")
    in_ort = answer(capsys, "eval", made / "net.ternary.onnx", "--data", "digits")
    assert in_torch["n"] == in_ort["n"] == 400
    assert in_torch["top1"] == in_ort["top1"]
    onnx.checker.check_model(str(made / "net.ternary.onnx"), full_check=True)


def test_bytes_of_int8_stand_beside_no_others(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is predicted is the size of the exact file, which is not kept."""
    int8 = ["--mode", "int8", "--calib", "digits", "--samples", 32, "--max-drop", 100]
    got = answer(
        capsys, "export", made / "net.ternary.safetensors", "-o", tmp_path / "a.onnx", "--input", "1x8x8", *int8
    )
    assert got["bytes"] == (tmp_path / "a.onnx").stat().st_size != got["int8"]["exact_bytes"]
    assert got["bytes_predicted"] is None


def test_eval_against_the_float_network(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = answer(capsys, "eval", made / "net.ternary.onnx", "--data", "digits", "--reference", DIGITS, "--arch", ARCH)
    assert 0 < got["agreement"] <= 100
    for name in ("net.ternary.onnx", "net.ternary.safetensors"):  # both record the architecture
        again = answer(capsys, "eval", made / name, "--data", "digits", "--reference", DIGITS)
        assert again["agreement"] == got["agreement"]
    got = answer(capsys, "eval", DIGITS, "--data", "digits", "--arch", ARCH, "--reference", DIGITS)
    assert got["agreement"] == 100
    assert got["top1"] == got["reference_top1"] == 99.5  # pcq/demo/digits-resnet8.json


def test_samples_of_another_shape_for_onnx(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 3, 9, 9), np.float32), y=np.zeros(4, np.int64))
    _, err = run(capsys, "eval", made / "net.ternary.onnx", "--data", f"npz:{tmp_path / 'd.npz'}", code=2)
    assert "samples of 3x9x9: the model takes 1x8x8." in err


def test_names_are_neither_markup_nor_emoji(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "net[red] :boom:.safetensors"
    model.write_bytes(DIGITS.read_bytes())
    assert "net[red]:boom:.safetensors" in "".join(run(capsys, "inspect", model)[0].split())
    (tmp_path / "data.py").write_text("def boom():\n    raise RuntimeError('on fire')\n")
    _, err = run(capsys, "eval", model, "--arch", ARCH, "--data", f"{tmp_path}/data.py:boom", code=2)
    assert f"{tmp_path}/data.py:boom: boom() raised" in err


def test_the_next_command_has_all_that_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shape of the samples where there were some, an exported program's own, else words to fill in."""
    out = tmp_path / "x.safetensors"
    calib = ["--calib", "digits", "--samples", 8, "--calib-method", "nearest", "--refine", 0]
    for given in (["quantize", *calib], ["finetune", "--data", "digits", "--steps", 1]):
        _, err = run(capsys, *given, DIGITS, "-r", "w8", "--arch", ARCH, "-o", out)
        assert f"Next: pcq export {out} --onnx --input 1x8x8\n" in err
    run(capsys, *shlex.split(err.partition("Next: pcq ")[2]))
    _, err = run(capsys, "quantize", DIGITS, "-r", "w8", "-o", out)
    assert f"Next: pcq export {out} --onnx --arch ARCH --input SHAPE\n" in err
    module = torch.nn.Sequential(torch.nn.Linear(6, 9))
    torch.export.save(torch.export.export(module, (torch.zeros(2, 6),)), tmp_path / "net.pt2")
    assert "an exported program" in run(capsys, "inspect", tmp_path / "net.pt2")[0]
    _, err = run(capsys, "quantize", tmp_path / "net.pt2", "-r", "w8", "-o", out)
    assert f"Next: pcq export {out} --onnx\n" in err
    run(capsys, *shlex.split(err.partition("Next: pcq ")[2]))


def test_what_to_type_next_can_be_pasted(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = run(capsys, "quantize", DIGITS, "-r", "w8", "--arch", ARCH, "-o", tmp_path / "my net.safetensors")
    assert f"Next: pcq export '{tmp_path}/my net.safetensors' --onnx" in err
    result = demo.DemoResult("net", "data", (), ("pcq eval " + "x" * 300 + " --data digits",), 1.0)
    frame.emit(result, False)
    assert result.next_steps[0] in capsys.readouterr().out
    monkeypatch.setattr(frame, "console", lambda: Console(width=40, markup=False))
    frame.emit(pcq.analyze(DIGITS, "ternary", arch=ARCH), False)
    pasted = capsys.readouterr().out.partition("To paste under")[2]
    assert re.search(r'  - match: \{name: \[".*"\]\}\n    levels: \{kind: uniform, bits: 8\}\n', pasted)


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 20])
def test_no_terminal_is_too_narrow_for_words_and_numbers(width: int) -> None:
    made = forms.table("What it does", "weight", "levels", "bits", "signs lost %", "", right=("bits", "signs lost %"))
    name = "encoder.layers.0.self_attention.weight"
    made.add_row(name, "uniform 8-bit symmetric", "11.562", "45.8", "[red]")
    made.add_row("fc.weight", "ternary", "1.82", "0.1", "")
    shown = io.StringIO()
    Console(file=shown, width=width).print(made, crop=False)
    text = shown.getvalue()
    assert max(map(len, text.splitlines())) <= width
    told = set(re.findall(r"[^\s│┃]+", text))
    assert {"fc.weight", "uniform", "symmetric", "ternary", "11.562", "45.8", "[red]"} <= told
    assert ("signs" in told, "┏" in text) == (True, width >= 60)
    assert any(part.startswith(name[: forms.WORD]) for part in told)
    assert (name in told) == (width not in (60, 20))


def test_one_of_several_state_dicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(DIGITS)
    torch.save({"model": state, "ema": {name: tensor * 2 for name, tensor in state.items()}}, tmp_path / "both.pt")
    torch.save({name: tensor * 2 for name, tensor in state.items()}, tmp_path / "ema.pt")
    _, err = run(capsys, "quantize", tmp_path / "both.pt", "-r", "w8", "--arch", ARCH, code=2)
    assert "Choose one, such as --key model." in err
    out = tmp_path / "out.safetensors"
    run(capsys, "quantize", tmp_path / "both.pt", "-r", "w8", "--arch", ARCH, "--key", "ema", "-o", out)
    right = pcq.read_artifact(pcq.quantize(tmp_path / "ema.pt", "w8", arch=ARCH).path).state_dict()
    again = pcq.quantize(tmp_path / "both.pt", "w8", arch=ARCH, key="ema", out=tmp_path / "py.safetensors").path
    for path in (out, again):
        found = pcq.read_artifact(path).state_dict()
        assert all(torch.equal(found[name], right[name]) for name in right)
    both = tmp_path / "both.pt"
    assert len(answer(capsys, "inspect", both, "--key", "ema")["tensors"]) == len(state)
    run(capsys, "recipes", "check", "w8", both, "--key", "ema")
    assert answer(capsys, "analyze", both, "-r", "w8", "--arch", ARCH, "--key", "ema")["weights"]
    on = ["--data", "digits", "--limit", 40, "--arch", ARCH]
    alone = answer(capsys, "eval", tmp_path / "ema.pt", *on)["top1"]
    assert answer(capsys, "eval", both, "--key", "ema", *on)["top1"] == alone


def test_nan_in_what_stays_float_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mask of -infinity among the buffers is none."""
    state = torch.nn.Linear(8, 4).state_dict() | {"mask": torch.full((4, 4), -torch.inf), "step": torch.tensor(3)}
    torch.save(state, tmp_path / "sound.pt")
    torch.save(state | {"bias": torch.tensor([0, torch.nan, 0, 0])}, tmp_path / "m.pt")
    assert "NaN in" not in run(capsys, "quantize", tmp_path / "sound.pt", "-r", "w8")[0]
    said = " ".join(run(capsys, "quantize", tmp_path / "m.pt", "-r", "w8")[0].split())
    assert "NaN in what stays as it is, which the outputs may become too: bias. Repair the checkpoint." in said
    assert answer(capsys, "quantize", tmp_path / "m.pt", "-r", "w8")["nan"] == ["bias"]


def test_a_state_dict_is_chosen_where_there_are_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of several files, those of a single one need no choice; a choice that serves none is refused."""
    state = load_file(DIGITS)
    torch.save({"model": {name: tensor * 0 for name, tensor in state.items()}, "ema": state}, tmp_path / "both.pt")
    torch.save({"model": state}, tmp_path / "one.pt")
    artifact = pcq.quantize(DIGITS, "w8", arch=ARCH, out=tmp_path / "a.safetensors").path
    both, one = tmp_path / "both.pt", tmp_path / "one.pt"
    on = ["--data", "digits", "--limit", 40, "--arch", ARCH, "--key"]
    for compared in ([both, "--reference", DIGITS], [one, "--reference", both], [artifact, "--reference", both]):
        assert answer(capsys, "eval", *compared, *on, "ema")["agreement"] == 100
        assert "there is no state dict 'none' in it. Allowed: model, ema." in run(
            capsys, "eval", *compared, *on, "none", code=2
        )[1]  # fmt: skip
    for files, told in (
        ([one], "there is no state dict 'ema' in it. Allowed: model."),
        ([DIGITS], "it holds one state dict only. Leave out --key ema."),
        ([artifact], "--key: no file holds several state dicts, or one named 'ema'. Leave it out."),
        ([artifact, "--reference", one], "--key: no file holds several state dicts, or one named 'ema'."),
    ):
        assert told in run(capsys, "eval", *files, *on, "ema", code=2)[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--state-dict", "--mode", "native"], "--mode: it has no part in --state-dict."),
        (["--state-dict", "--input", "1x8x8"], "--input: it has no part in --state-dict."),
        (["--state-dict", "--float", "first"], "--float: it has no part in --state-dict."),
        (["--pt2", "--vnni"], "--vnni: it has no part in --pt2."),
        (["--pt2", "--optimize", "ram"], "--optimize: it has no part in --pt2."),
        (["--compressed-tensors", "--target-ort", "1.20"], "--target-ort: it has no part in --compressed-tensors."),
        (["--onnx", "--pt2"], "--onnx --pt2: several forms at once."),
        (["--max-drop", "0.5"], "--max-drop: it belongs to --mode int8."),
        (["--samples", "7", "--mode", "native"], "--samples: it belongs to --mode int8."),
        (["--calib", "digits"], "int8. Give --mode int8 or, with --calib, --optimize speed; or leave it out."),
    ],
)
def test_options_of_export_that_would_do_nothing(
    options: list[str], told: str, tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, "export", made / "net.ternary.safetensors", tmp_path / "out", *options, code=2)
    assert told in err
    assert not list(tmp_path.iterdir())


def test_a_shape_for_samples_that_nobody_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("quantize", "analyze"):
        _, err = run(capsys, command, DIGITS, "-r", "w8", "--arch", ARCH, "--input", "1x8x8", code=2)
        assert err.startswith("pcq: --input: this is about ")


def test_options_of_inspect_that_would_do_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "two things" in run(capsys, "inspect", DIGITS, "--prox", "hard", code=2)[1]
    assert "--levels: it belongs to --prox" in run(capsys, "inspect", DIGITS, "--levels", "0,1", code=2)[1]
    assert "--out: it belongs to --prox" in run(capsys, "inspect", DIGITS, "-o", "x.png", code=2)[1]
    for name in ("net.ternary.onnx", "net.ternary.safetensors"):
        for option in (["--key", "ema"], ["--unsafe-pickle"], ["--allow-global", "a.B"]):
            err = run(capsys, "inspect", made / name, *option, code=2)[1]
            assert f"{option[0]}: this is about checkpoints" in err
    for option in (["--arch", "foo:bar"], ["--unsafe-pickle"], ["--allow-global", "a.B"]):
        err = run(capsys, "eval", made / "net.ternary.onnx", "--data", "digits", *option, code=2)[1]
        assert f"{option[0]}: this is about checkpoints" in err


def test_a_name_of_another_kind_of_file(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = made / "net.ternary.safetensors"
    for command, told in (
        (["quantize", DIGITS, "-r", "w8", "--arch", ARCH, "-o", tmp_path / "x.onnx"], "Let it end in .safetensors."),
        (["export", net, tmp_path / "x.safetensors", "--input", "1x8x8"], "Let it end in .onnx."),
        (["export", net, tmp_path / "x.onnx", "--state-dict"], "Let it end in .safetensors."),
        (["export", made / "net.ternary.onnx"], "this is not an artifact of pcq."),
    ):
        assert told in run(capsys, *command, code=2)[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["net.ternary.safetensors", "net.ternary.onnx"])
def test_inspect_shows_every_weight(made: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    got = answer(capsys, "inspect", made / name)
    packed = [row for row in got["tensors"] if row["bits"] < 32]
    assert len(packed) == 8
    out, _ = run(capsys, "inspect", made / name)
    assert all(row["name"] in out for row in packed)


def test_inspect_a_checkpoint_and_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "float checkpoint" in run(capsys, "inspect", DIGITS)[0]
    assert answer(capsys, "inspect", DIGITS)["bytes"] == DIGITS.stat().st_size
    assert "a valid recipe" in run(capsys, "recipes", "check", "ternary")[0]
    assert "conv1.weight" in run(capsys, "recipes", "check", "ternary", DIGITS, "--arch", ARCH)[0]


def test_recipes_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    names = [each["name"] for each in answer(capsys, "recipes", "list")["recipes"]]
    expected = "binary ternary quaternary w2 w3 w4 w8 codebook4 paper-binary paper-ternary paper-quaternary mixed"
    assert set(expected.split()) <= set(names)
    for name in names:
        text, _ = run(capsys, "recipes", "show", name)
        assert text.startswith("#")
        assert "pcq quantize" in text


def test_recipes_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert "rules" in json.loads(run(capsys, "recipes", "schema")[0])["properties"]


def test_prox_plot_is_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("hard", "binaryrelax", "proxquant", "parq"):
        path = tmp_path / f"{kind}.png"
        run(capsys, "inspect", "--prox", kind, "--out", path)
        assert path.read_bytes().startswith(b"\x89PNG")
    run(capsys, "inspect", "--prox", "parq", "--out", path)
    path.write_text("mine")
    assert "pcq did not write it" in run(capsys, "inspect", "--prox", "parq", "--out", path, code=2)[1]
    assert path.read_text() == "mine"
    run(capsys, "inspect", "--prox", "parq", "--out", path, "--force")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_demo_replaces_no_file_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("digits-resnet8.safetensors", "digits-resnet8.ternary.onnx"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        _, err = run(capsys, "demo", "--out", folder, code=2)
        assert f"{name}: there is a file already, and pcq did not write it" in " ".join(err.split())
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "mine")]
    assert "cannot be written: file exists" in run(capsys, "demo", "--out", folder / name, code=2)[1]


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = answer(capsys, "demo", "--out", tmp_path / "demo")
    assert [row["weights"] for row in got["rows"]] == ["float32", "w4", "ternary"]
    for row in got["rows"][1:]:
        assert row["torch_top1"] == row["onnx_top1"]
        assert row["artifact_bytes"] < got["rows"][0]["artifact_bytes"] / 4
    out, _ = run(capsys, "demo", "--out", tmp_path / "demo")
    assert "What to type next" in out


def test_something_is_said_before_the_seconds_of_imports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's first line and, in a terminal, one that goes again: both before anything needs PyTorch."""
    code = "import sys; sys.modules['torch'] = None; from pcq import cli; cli.run(['demo', '--out', 'there'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told, then = ran.stderr.splitlines()[:2]
    assert told == "A small pretrained network is scored on digits, quantized, exported and checked in there."
    assert then == "pcq: this needs torch, which is not installed. Run `pip install torch`"
    shown = io.StringIO()
    monkeypatch.setattr(frame, "console", lambda stderr: Console(file=shown, force_terminal=True))
    with frame.starting():
        pass
    assert not shown.getvalue()
    monkeypatch.delitem(sys.modules, "torch")
    with frame.starting():
        pass
    assert "starting: PyTorch is imported" in shown.getvalue()


@pytest.mark.parametrize(("module", "number"), [("typer", 2), ("torch", 2), ("torch", 15)])
def test_a_signal_that_an_import_swallows(module: str, number: int, tmp_path: Path) -> None:
    """Some of what PyTorch imports catches KeyboardInterrupt: the command went on as if nobody had pressed Ctrl-C."""
    swallowing = f"import os\ntry:\n    os.kill(os.getpid(), {number})\nexcept BaseException:\n    pass\n"
    if module == "typer":  # before the command line is there to say anything
        swallowing = f"import os\nos.kill(os.getpid(), {number})\n"
    (tmp_path / f"{module}.py").write_text(swallowing)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pcq.__main__ import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, "inspect", "net.pt"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (ran.returncode, ran.stderr) == (128 + number, "pcq: interrupted; no output file was changed.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_somebody_swallows_counts_at_the_next_progress(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(
        number, signal.default_int_handler
    )  # shells start what runs in the background without SIGINT

    @frame.answers
    def command() -> None:
        with frame.bar("working") as progress:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), number)
            progress("working", 1, 2)
        raise AssertionError

    try:
        with pytest.raises(typer.Exit) as stopped:
            command()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert stopped.value.exit_code == 128 + number
    assert capsys.readouterr().err == "pcq: interrupted; no output file was changed.\n"


@pytest.mark.parametrize("words", ["recipes schema", "--help", "--version"])
def test_nobody_reads_what_is_printed(words: str) -> None:
    """No traceback: `| head -1` ends it by 141, as it does other tools; a full disk is said."""
    command = [sys.executable, "-m", "pcq", *words.split()]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        ran = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE)
    assert (ran.returncode, ran.stderr) == (141, b"")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
        assert ran.returncode == 2
        assert ran.stderr.startswith(b"pcq: standard output: no room left to write it.")
        assert b"Traceback" not in ran.stderr
        with open("/dev/full", "wb") as full:
            assert subprocess.run(command, stdout=full, stderr=full).returncode == 2


def test_a_table_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(sys.stdout, "write", broken)
    with pytest.raises(BrokenPipeError):  # rich would end the process, by exit code 1
        frame.console().print("a table")


def test_names_that_the_encoding_has_no_letters_for(tmp_path: Path) -> None:
    (tmp_path / "\u00fc.yaml").write_text('pcq: 1\nrules:\n  - match: "*"\n    levels: ternary\n')
    ran = subprocess.run(
        [sys.executable, "-m", "pcq", "recipes", "check", "\u00fc.yaml"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.getcwd()},
    )
    assert ran.returncode == 0, ran.stderr
    assert rb"\xfc" in ran.stdout


def test_a_package_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """One that pcq depends on may be gone too; a module of an installed package that is missing is a bug."""

    @frame.answers
    def command(name: str) -> None:
        importlib.import_module(name)

    with pytest.raises(typer.Exit) as stopped:
        command("onnx_absent.numbers")
    assert stopped.value.exit_code == 2
    told = "pcq: this needs onnx_absent, which is not installed. Run `pip install onnx-absent`\n"
    assert capsys.readouterr().err == told
    for name in ("onnx.absent", "pcq.absent"):
        with pytest.raises(ModuleNotFoundError):
            command(name)


def test_an_interrupted_demo_says_where_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.commands, "evaluate", stop)
    _, err = run(capsys, "demo", "--out", tmp_path / "there", code=130)
    assert err.endswith(f"pcq: interrupted; what was finished until then is in {tmp_path}/there.\n")
    assert [path.name for path in (tmp_path / "there").iterdir()] == [DIGITS.name]


def test_artifact_loads_as_a_plain_state_dict(made: Path) -> None:
    artifact = pcq.read_artifact(made / "net.ternary.safetensors")
    network = pcq.load_network(artifact, made / "net.ternary.safetensors")
    state = artifact.state_dict()
    assert torch.equal(network.module.state_dict()["layer3.0.conv2.weight"], state["layer3.0.conv2.weight"])
    levels = [row.unique().numel() for row in state["layer3.0.conv2.weight"].flatten(1)]
    assert max(levels) <= 3


def test_the_time_left_in_a_log_is_that_of_the_work_at_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten seconds a piece, whatever the work before took; what goes on where it was counts from there."""
    now = 0.0
    monkeypatch.setattr(frame.time, "monotonic", lambda: now)
    progress = frame.lines()
    works = (("layers", 0, 100, 1000.0), ("scoring", 0, 30, 10.0), ("scoring", 0, 60, 10.0), ("steps", 40, 90, 10.0))
    for stage, first, total, seconds in works:
        progress(stage, first, total)
        for done in range(first + 1, first + 4):
            now += seconds
            progress(f"{stage}, as it goes", done, total)
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-10:] == [
        "layers, as it goes (3 of 100, about 26.9 h left)",
        "scoring, as it goes (1 of 30, about 5 min left)",
        "scoring, as it goes (2 of 30, about 5 min left)",
        "scoring, as it goes (3 of 30, about 4 min left)",
        "scoring, as it goes (1 of 60, about 10 min left)",
        "scoring, as it goes (2 of 60, about 10 min left)",
        "scoring, as it goes (3 of 60, about 10 min left)",
        "steps, as it goes (41 of 90, about 8 min left)",
        "steps, as it goes (42 of 90, about 8 min left)",
        "steps, as it goes (43 of 90, about 8 min left)",
    ]
