"""Networks with several inputs, calibrated and trained: tokens and masks by name, branches, what is refused."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pcq
from pcq import cli, models
from pcq import tape as tapes
from pcq.commands import Calibration
from pcq.commands.calibrating import draw_inputs
from pcq.commands.exporting import BATCH, Int8
from pcq.commands.finetuning import FinetuneResult
from pcq.data import open_data, open_inputs
from pcq.data.inputs import in_order, inputs, names
from pcq.errors import NoSplit, PcqError
from pcq.export import open_packed, verify
from pcq.export.scheme import usual_sizes
from pcq.export.tracing import trace
from pcq.settings import Finetune
from pcq.train.splits import open_splits
from pcq.train.step import loss_of


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


class Masked(Tokens):
    """The same without a branch, as export wants it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        x = self.norm(x + self.second(self.first(x).relu()))
        return (x * attention_mask[..., None]).mean(1)


@pytest.mark.parametrize("name", ["Masked", "Apart"])
def test_the_command_to_go_on_with_is_one_that_works(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the mask may be left out, too: most who quantize such a network mask tokens."""
    save_file(Tokens().state_dict(), tmp_path / "m.safetensors")
    arch = f"tests.test_several_inputs:{name}"
    assert (
        cli.run(["quantize", str(tmp_path / "m.safetensors"), "-r", "w8", "--arch", arch, "-o", f"{tmp_path}/q"]) == 0
    )
    assert capsys.readouterr().err.splitlines()[-1] == f"Next: pcq export {tmp_path}/q --onnx --example SPEC"


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


class Frames(Tokens):
    """Makes a mask of its own from the lengths and branches on it, as Wav2Vec2 does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None) -> Tensor:
        frames = torch.zeros(len(input_ids), input_ids.shape[1], dtype=torch.int64)
        frames[torch.arange(len(frames)), attention_mask.sum(1) - 1] = 1
        return super().forward(input_ids, frames.flip(1).cumsum(1).flip(1))


def test_a_branch_on_a_mask_made_from_the_mask_is_replayed() -> None:
    samples = tuple(_samples()[name] for name in ("input_ids", "attention_mask"))
    tape = tapes.record(module := Frames().eval(), samples)
    values = tapes.run(tape, tapes.state(module), dict(zip(tape.inputs, samples, strict=True)), 0, len(tape.ops))
    with torch.no_grad():
        torch.testing.assert_close(tapes.output(tape, values), Tokens().eval()(*samples))


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
    assert cli.run([*line, "--force"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith("--onnx --example SPEC")
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


@pytest.mark.parametrize("command", ["quantize", "analyze"])
@pytest.mark.parametrize("shape", [[], ["--input", "6"]])
def test_no_samples_are_invented_for_several_inputs(command: str, shape: list[str], model: Path, capsys) -> None:
    line = [command, str(model), "-r", "w4", "--arch", f"{__file__}:network", "--calib", "random", *shape]
    assert cli.run(line) == 2
    says = "this network takes 2 inputs (input_ids, attention_mask). Give real ones"
    assert f"samples are invented as pictures, and {says}" in capsys.readouterr().err


def _labelled(folder: Path, **change: np.ndarray | None) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Arrays in another order than the network's, labels, and what the network puts out."""
    samples = _samples()
    with torch.no_grad():
        out = Tokens()(samples["input_ids"], samples["attention_mask"])
    labels = (out.argmax(1) + (torch.arange(len(out)) % 3 == 0)) % 8
    arrays = {"y": labels.numpy(), **{k: v.numpy() for k, v in samples.items()}, **change}
    np.savez(folder / "e.npz", **{name: array for name, array in arrays.items() if array is not None})
    return folder / "e.npz", out, labels


def _program(folder: Path) -> Path:
    samples = _samples()
    n = torch.export.Dim("n", min=2, max=64)
    example = (samples["input_ids"][:4], samples["attention_mask"][:4])
    program = torch.export.export(Masked().eval(), example, dynamic_shapes=({0: n}, {0: n}))
    torch.export.save(program, folder / "m.pt2")
    return folder / "m.pt2"


def _onnx(folder: Path, batch: int | None) -> Path:
    samples = _samples()
    example = (samples["input_ids"][: batch or 4], samples["attention_mask"][: batch or 4])
    n = {0: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        Masked().eval(), example, folder / "m.onnx", dynamo=True, verbose=False,
        input_names=["input_ids", "attention_mask"], dynamic_shapes=None if batch else (n, n),
    )  # fmt: skip
    return folder / "m.onnx"


@pytest.mark.parametrize("kind", ["checkpoint", "program", "onnx", "onnx of 5"])
def test_scored_with_an_array_for_each_input(kind: str, model: Path, tmp_path: Path, capsys) -> None:
    spec, out, labels = _labelled(tmp_path)
    arch = f"{__file__}:network"
    path = {"checkpoint": model, "program": None}.get(kind) or (
        _program(tmp_path) if kind == "program" else _onnx(tmp_path, 5 if kind.endswith("5") else None)
    )
    line = ["eval", str(path), "--data", f"npz:{spec}", "--batch", "10", "--json"]
    line += ["--arch", arch] if kind == "checkpoint" else ["--reference", str(model), "--arch", arch]
    if kind == "program":
        line = line[:7]
    assert cli.run(line) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["top1"] == pytest.approx(100 * float((out.argmax(1) == labels).float().mean()))
    assert got["n"] == 48
    assert got["agreement"] == (100 if "onnx" in kind else None)
    assert "attention_mask 6, input_ids 6" in got["data"]
    quantized = pcq.quantize(model, "w8", arch=arch, out=tmp_path / "q.safetensors")
    scores = pcq.evaluate(quantized.path, f"npz:{spec}", reference=model, arch=arch).scores
    assert scores.agreement is not None
    assert scores.agreement > 90
    assert scores.n == 48


def test_arrays_of_the_split_are_taken(model: Path, tmp_path: Path) -> None:
    samples = {name: array.numpy() for name, array in _samples().items()}
    parts = {"test": slice(30), "val": slice(30, None)}
    arrays = {f"{name}_{split}": array[part] for split, part in parts.items() for name, array in samples.items()}
    np.savez(tmp_path / "s.npz", **arrays, y_test=np.zeros(30, int), y_val=np.ones(18, int))
    arch = f"{__file__}:network"
    sizes = [pcq.evaluate(model, f"npz:{tmp_path / 's.npz'}", arch=arch, split=s).scores.n for s in ("test", "val")]
    assert sizes == [30, 18]


@pytest.mark.parametrize(
    ("onnx", "change", "says"),
    [
        (False, {"masks": np.ones((48, 6), int)}, "no input 'masks'"),
        (True, {"masks": np.ones((48, 6), int)}, "its inputs are input_ids, attention_mask, the data has"),
        (True, {"attention_mask": np.ones((48, 5), int)}, "samples of 5: the model takes 6 as attention_mask"),
        (False, {"attention_mask": np.ones((40, 6), int)}, "as many samples each"),
        (False, {"y": np.zeros((47,), int)}, "the labels have shape"),
        (False, {"attention_mask": None}, "it has no array for the input 'attention_mask'"),
        (True, {"attention_mask": None}, "its inputs are input_ids, attention_mask, the data has input_ids"),
    ],
)
def test_scored_on_something_else(onnx: bool, change: dict, says: str, model: Path, tmp_path: Path) -> None:
    spec, _, _ = _labelled(tmp_path, **change)
    path = _onnx(tmp_path, None) if onnx else model
    with pytest.raises(PcqError, match=says):
        pcq.evaluate(path, f"npz:{spec}", arch=None if onnx else f"{__file__}:network")


@pytest.mark.parametrize("onnx", [False, True])
def test_data_of_one_input_is_not_enough(onnx: bool, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.zeros((9, 6), int), y=np.zeros(9, int))
    path = _onnx(tmp_path, None) if onnx else model
    with pytest.raises(PcqError, match="inputs .input_ids, attention_mask.*an array for each"):
        pcq.evaluate(path, f"npz:{tmp_path / 'one.npz'}", arch=None if onnx else f"{__file__}:network")


def masked() -> nn.Module:
    return Masked()


@pytest.mark.parametrize("kind", ["checkpoint", "program by name", "program of 4 samples"])
def test_exported_with_an_example_of_each_input(kind: str, model: Path, tmp_path: Path, capsys) -> None:
    spec, out, labels = _labelled(tmp_path)
    arch, source = ["--arch", f"{__file__}:masked"], model
    if kind != "checkpoint":
        arch, source = [], tmp_path / "m.pt2"
        n = {0: torch.export.Dim("n", min=2, max=64)}
        example = {name: array[:4] for name, array in sorted(_samples().items(), reverse=True)}
        by_name = "name" in kind
        program = torch.export.export(
            Masked().eval(), () if by_name else tuple(example.values()), example if by_name else None,
            dynamic_shapes=dict.fromkeys(example, n) if by_name else None,
        )  # fmt: skip
        torch.export.save(program, source)
    artifact, onnx = tmp_path / "q.safetensors", tmp_path / "q.onnx"
    assert cli.run(["quantize", str(source), "-r", "w8", "-o", str(artifact), *arch]) == 0
    capsys.readouterr()
    assert cli.run(["export", str(artifact), "--example", f"npz:{spec}", *arch, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["agreements"]
    assert {run["inputs"] for run in runs} == {"random", "sample"}
    fixed = kind.endswith("samples")
    assert {run["batch"] for run in runs if run["inputs"] == "random"} == ({4} if fixed else {1, 3})
    found = pcq.evaluate(onnx, f"npz:{spec}").scores
    assert found.n == 48
    assert found.top1 == pytest.approx(100 * float((out.argmax(1) == labels).float().mean()), abs=10)


def test_a_program_with_an_example_of_each_input(model: Path, tmp_path: Path, capsys) -> None:
    spec, _, _ = _labelled(tmp_path)
    arch = f"{__file__}:masked"
    made = pcq.quantize(model, "w8", arch=arch, out=tmp_path / "q.safetensors")
    for options in ([], ["--input", "6"]):
        assert cli.run(["export", str(made.path), "--arch", arch, "--pt2", *options]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "takes 2 inputs" in said
        assert "--example SPEC" in said
    assert cli.run(["export", str(made.path), "--arch", arch, "--pt2", "--example", f"npz:{spec}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proof"].endswith("at batch 1 and 3")
    program = torch.export.load(tmp_path / "q.pt2").module()
    inputs = {name: array[:5] for name, array in _samples().items()}
    with torch.no_grad():
        wanted = pcq.open_network(made.path, arch).module(**inputs)
        torch.testing.assert_close(program(inputs["input_ids"], inputs["attention_mask"]), wanted)
    again = pcq.quantize(tmp_path / "q.pt2", "w8", out=tmp_path / "again.safetensors").path
    with pytest.raises(PcqError, match="--example: the exported program says what its inputs are"):
        pcq.commands.export_pt2(again, example=f"npz:{spec}")


class Apart(Masked):
    """An argument that is not given stands between those that are, as in GPT-2."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, past: Tensor | None = None, attention_mask: Tensor | None = None, more: bool = False
    ) -> Tensor:
        assert past is None
        assert attention_mask is not None
        return super().forward(input_ids, attention_mask)


def apart() -> nn.Module:
    return Apart()


def test_arguments_that_are_not_given_may_stand_between(model: Path, tmp_path: Path) -> None:
    spec, _, _ = _labelled(tmp_path)
    data, archs = f"npz:{spec}", [f"{__file__}:apart", f"{__file__}:masked"]
    calibration = Calibration(data, 16, refine=4)
    one, other = (
        load_file(pcq.quantize(model, "ternary-all", arch=arch, out=tmp_path / name, calibration=calibration).path)
        for arch, name in zip(archs, ("a.safetensors", "b.safetensors"), strict=True)
    )
    assert all(torch.equal(one[name], value) for name, value in other.items())
    made = pcq.quantize(model, "w8", arch=archs[0], out=tmp_path / "w8.safetensors").path
    assert pcq.analyze(model, "w8", arch=archs[0], calib=data).weights
    for packed in (
        pcq.export_onnx(made, example=data).path,
        pcq.export_onnx(made, tmp_path / "i.onnx", int8=Int8(data, max_drop=100), example=data).path,
    ):
        assert [each.name for each in InferenceSession(packed).get_inputs()] == ["input_ids", "attention_mask"]
        scores = pcq.evaluate(packed, data, reference=model, arch=archs[0]).scores
        assert scores.agreement is not None
        assert scores.agreement > 90
    program = torch.export.load(pcq.commands.export_pt2(made, example=data).path).module()
    inputs = {name: array[:5] for name, array in _samples().items()}
    with torch.no_grad():
        wanted = pcq.open_network(made, archs[0]).module(**inputs)
        torch.testing.assert_close(program(inputs["input_ids"], inputs["attention_mask"]), wanted)
    assert tuned(tmp_path, data, arch=archs[0]).path.exists()


def test_arguments_are_bound_anew_for_other_data() -> None:
    module, arrays = Apart().eval(), _samples()
    ids, mask = (arrays[name] for name in ("input_ids", "attention_mask"))
    wanted = Masked().eval()
    wanted.load_state_dict(module.state_dict())
    for given in (["attention_mask", "input_ids"], ["more", "attention_mask", "input_ids"]):
        order = in_order(dict.fromkeys(given), module, "")
        assert order == sorted(given, key=["input_ids", "past", "attention_mask", "more"].index)
        assert names(module) == order
        twin = copy.deepcopy(module)
        assert torch.equal(twin(ids, mask), wanted(ids, mask))
    assert in_order({"input_ids": ids, "past": None}, module, "") == ["input_ids", "past"]
    assert type(module) is Apart
    with pytest.raises(PcqError, match=r"no input 'maks'.*input_ids, past, attention_mask, more"):
        in_order({"input_ids": ids, "maks": mask}, module, "")


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_gpt2_with_masked_tokens(tmp_path: Path) -> None:
    """Matrices ``[in, out]``, an argument between tokens and mask, and a causal network: no mask hides all."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 0, "eos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    arch = f"hf:{tmp_path}"
    torch.manual_seed(0)
    save_file(tied_once(models.build(arch)), tmp_path / "model.safetensors")
    ids = torch.randint(50, (24, 9))
    mask = (torch.arange(9) < torch.randint(4, 10, (24, 1))).long()
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=mask)
    data = f"npz:{tmp_path / 'x.npz'}"
    made = pcq.quantize(
        tmp_path, "w4", arch=arch, out=tmp_path / "g.safetensors", calibration=Calibration(data, 16, refine=2)
    )
    assert made.calibrated is not None
    plain = made.calibrated.outcome.plain
    assert sorted(plain) == ["transformer.wpe.weight", "transformer.wte.weight"]
    assert {row.name: row.rows for row in made.ledger}["transformer.h.0.mlp.c_fc.weight"] == 128
    exact = pcq.export_onnx(made.path, example=data).path
    int8 = pcq.export_onnx(made.path, tmp_path / "i.onnx", int8=Int8(data), example=data).path
    for path, products in ((exact, 0), (int8, 4)):
        assert [node.op_type for node in onnx.load(path).graph.node].count("MatMulInteger") == products
        scores = pcq.evaluate(path, data, reference=tmp_path, arch=arch).scores
        assert scores.explained is not None
        assert scores.explained > 95


def tied_once(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if name != "lm_head.weight"}


def test_an_example_of_one_input(tmp_path: Path) -> None:
    digits = Path(pcq.__file__).parent / "demo" / "digits-resnet8.safetensors"
    arch = "pcq.demo.nets:resnet8"
    made = pcq.quantize(digits, "w8", arch=arch, out=tmp_path / "d.safetensors")
    report = pcq.export_onnx(made.path, example="digits").report
    assert [(run.inputs, run.batch) for run in report.agreements].count(("sample", 4)) == 2
    with pytest.raises(PcqError, match="--input: the example says the shapes"):
        pcq.export_onnx(made.path, example="digits", input_shape=(1, 8, 8), force=True)
    assert "at batch 1 and 3" in pcq.commands.export_pt2(made.path, example="digits").proof
    with pytest.raises(PcqError, match="--input: the example says the shapes"):
        pcq.commands.export_pt2(made.path, example="digits", input_shape=(1, 8, 8), force=True)


def test_what_several_inputs_are_has_to_be_said(model: Path, tmp_path: Path) -> None:
    arch = f"{__file__}:masked"
    made = pcq.quantize(model, "w8", arch=arch, out=tmp_path / "q.safetensors")
    with pytest.raises(PcqError, match="takes 2 inputs.*input_ids, attention_mask.*--example SPEC"):
        pcq.export_onnx(made.path, arch=arch, input_shape=(6,))
    np.savez(tmp_path / "one.npz", x=np.zeros((9, 6), int))
    with pytest.raises(PcqError, match="takes 2 inputs"):
        pcq.export_onnx(made.path, arch=arch, example=f"npz:{tmp_path / 'one.npz'}")


@pytest.mark.parametrize("given", ["mean=0.5", "std=0.5", "mean=0.5&std=2"])
def test_mean_and_std_are_of_one_input(tmp_path: Path, given: str) -> None:
    np.savez(tmp_path / "two.npz", colour=np.zeros((4, 3, 8, 8), "float32"), grey=np.zeros((4, 1, 8, 8), "float32"))
    with pytest.raises(PcqError, match="mean and std are of one input, and it holds colour, grey"):
        open_data(f"npz:{tmp_path / 'two.npz'}?{given}", "test")


class Pair(nn.Module):
    """Two pictures, each through a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.out = nn.Linear(16, 5)

    def forward(self, colour: Tensor, grey: Tensor) -> Tensor:
        both = torch.cat([self.left(colour).relu(), self.right(grey).relu()], 1)
        return self.out(both.mean((2, 3)))


def packed(folder: Path, network: nn.Module, recipe: str = "w8") -> Path:
    save_file(network.state_dict(), folder / "float.safetensors")
    spec = f"{__file__}:{type(network).__name__}"
    return pcq.quantize(folder / "float.safetensors", recipe, arch=spec, out=folder / "packed.safetensors").path


def pictures(folder: Path, **changes: Tensor) -> str:
    g = torch.Generator().manual_seed(2)
    arrays = {"grey": 3 * torch.randn(50, 1, 8, 8, generator=g), "colour": torch.randn(50, 3, 8, 8, generator=g)}
    with torch.no_grad():
        arrays["labels"] = Pair()(arrays["colour"], arrays["grey"]).argmax(1)
    np.savez(folder / "pictures.npz", **{name: array.numpy() for name, array in (arrays | changes).items()})
    return f"npz:{folder / 'pictures.npz'}"


class Grey(nn.Module):
    """One input, whose shape its spec does not tell."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, grey: Tensor) -> Tensor:
        return self.head(self.conv(grey).relu().mean((2, 3)))


def test_int8_takes_the_shape_of_one_input_from_the_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=torch.randn(30, 1, 8, 8).numpy())
    artifact, spec = packed(tmp_path, Grey()), f"npz:{tmp_path / 'x.npz'}"
    made = pcq.export_onnx(artifact, tmp_path / "x.onnx", int8=Int8(spec, samples=10, max_drop=50))
    assert made.int8 is not None
    assert onnx_input(made.path) == ["batch", 1, 8, 8]
    with pytest.raises(PcqError, match=r"its samples are \[1, 8, 8\], the network takes \[1, 9, 9\].*--input 1x8x8"):
        pcq.export_onnx(artifact, tmp_path / "y.onnx", input_shape=(1, 9, 9), int8=Int8(spec, samples=10))
    two = packed(tmp_path, Pair())
    with pytest.raises(PcqError, match="the network takes 2 inputs"):
        pcq.export_onnx(two, tmp_path / "y.onnx", int8=Int8(spec, samples=10))


def onnx_input(path: Path) -> list[object]:
    import onnx

    return [axis.dim_param or axis.dim_value for axis in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]


def test_int8_of_several_inputs_has_the_ranges_of_each(tmp_path: Path) -> None:
    spec, artifact = pictures(tmp_path), packed(tmp_path, Pair())
    made = pcq.export_onnx(artifact, tmp_path / "x.onnx", int8=Int8(spec, samples=20, ranges="minmax", max_drop=10))
    assert made.int8 is not None
    assert [layer.activations for layer in made.int8.layers] == ["static"] * 3
    assert made.int8.drop is not None
    assert made.int8.drop.n == 20
    assert made.int8.drop.relative_l2 < 0.02
    assert made.int8.drop.exact is not None
    assert "20 samples" in made.data
    scored = pcq.evaluate(tmp_path / "x.onnx", spec).scores
    assert scored.top1 is not None
    assert scored.top1 >= 90


def test_int8_of_several_inputs_falls_back_layer_by_layer(tmp_path: Path) -> None:
    spec, artifact = pictures(tmp_path), packed(tmp_path, Pair(), "ternary-all")
    wild = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    wild[::7] *= 300  # so wide that the other samples' numbers have few codes
    spec = pictures(tmp_path, colour=wild)
    made = pcq.export_onnx(artifact, tmp_path / "x.onnx", int8=Int8(spec, samples=20, ranges="minmax", max_drop=4))
    assert made.int8 is not None
    assert made.int8.fallen_back == ("left.weight",)


def test_int8_of_tokens_and_masks_needs_no_ranges(tmp_path: Path) -> None:
    artifact = packed(tmp_path, Masked())
    np.savez(tmp_path / "tokens.npz", **{name: array.numpy() for name, array in _samples().items()})
    made = pcq.export_onnx(artifact, tmp_path / "x.onnx", int8=Int8(f"npz:{tmp_path / 'tokens.npz'}", samples=16))
    assert made.int8 is not None
    assert [layer.activations for layer in made.int8.layers] == [None, "dynamic", "dynamic"]
    assert usual_sizes(open_packed(made.path).metadata) == {"input_ids": (6,), "attention_mask": (6,)}
    assert made.int8.drop is not None
    assert made.int8.drop.agreement is not None
    exact = pcq.export_onnx(artifact, tmp_path / "y.onnx", example=f"npz:{tmp_path / 'tokens.npz'}", int8=Int8())
    assert exact.int8 is not None
    assert exact.int8.drop is None


class Fixed(Masked):
    """Its places are as many as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None) -> Tensor:
        return (
            self.second((self.words(input_ids) + self.places) @ self.first.weight.t()) * attention_mask[..., None]
        ).sum(1)


class Frame(Masked):
    """A mask of frames, which are floats."""

    def forward(self, frames: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return (self.second(self.first(frames).relu()) * attention_mask[..., None]).mean(1)  # type: ignore[no-any-return]


def test_text_of_any_length_where_the_code_does_not_fix_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "tokens.npz", **{name: array.numpy() for name, array in _samples().items()})
    mask = _samples()["attention_mask"].numpy()
    np.savez(tmp_path / "frames.npz", frames=np.zeros((48, 6, 8), np.float32), attention_mask=mask)
    for net, data, lengths in ((Masked(), "tokens", [2, 6, 9]), (Fixed(), "tokens", []), (Frame(), "frames", [])):
        artifact, spec = packed(tmp_path, net), f"npz:{tmp_path / data}.npz"
        made = pcq.export_onnx(artifact, tmp_path / "x.onnx", example=spec, force=True)
        session = InferenceSession(made.path)
        assert made.report.dynamic_length == bool(lengths)
        assert [value.shape[:2] for value in session.get_inputs()] == [["batch", "length" if lengths else 6]] * 2
        module = pcq.open_network(artifact).module
        door = pcq.commands.export_pt2(artifact, tmp_path / "x.pt2", example=spec, force=True)
        program = torch.export.load(door.path).module()
        for length in lengths:
            x = {
                "input_ids": torch.arange(3 * length).reshape(3, length) % 20,
                "attention_mask": torch.ones(3, length).long(),
            }
            with torch.no_grad():
                wanted = module(**x).numpy()
                np.testing.assert_allclose(program(*x.values()).numpy(), wanted, atol=1e-5)
            np.testing.assert_allclose(session.run(None, {k: v.numpy() for k, v in x.items()})[0], wanted, atol=1e-5)
        if not lengths:
            names = ["frames" if data == "frames" else "input_ids", "attention_mask"]
            with pytest.raises((RuntimeError, AssertionError)):
                program(*(torch.zeros(3, 5, 8) if name == "frames" else torch.ones(3, 5).long() for name in names))


def test_a_file_of_open_length_is_proved_at_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    prove = verify.prove

    def noted(path, weights, predicted, run, trials, *rest):  # type: ignore[no-untyped-def]
        seen.extend(tuple(x.shape) for trial in trials for x in trial.values)
        return prove(path, weights, predicted, run, trials, *rest)

    monkeypatch.setattr(verify, "prove", noted)
    np.savez(tmp_path / "tokens.npz", **{name: array.numpy() for name, array in _samples().items()})
    pcq.export_onnx(packed(tmp_path, Masked()), tmp_path / "x.onnx", example=f"npz:{tmp_path / 'tokens.npz'}")
    assert seen == [(1, 6)] * 2 + [(3, 3)] * 2 + [(4, 6)] * 2


class Wave(nn.Module):
    """Takes a wave of any length, but not below ``fewest`` samples, and a picture of any size."""

    def __init__(self, fewest: int = 0) -> None:
        super().__init__()
        self.first, self.second, self.fewest = nn.Conv1d(1, 16, 5, 2), nn.Conv2d(1, 16, 3), fewest

    def forward(self, wave: Tensor, picture: Tensor) -> Tensor:
        torch._check(wave.shape[1] > self.fewest)
        return self.first(wave[:, None]).mean(2) + self.second(picture).amax((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("fewest", "tried"), [(8, [(16,), (1, 5, 6)]), (31, None)])
def test_every_size_that_a_program_leaves_open_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fewest: int, tried: list[tuple[int, ...]] | None
) -> None:
    seen = []
    prove = verify.prove

    def noted(path, weights, predicted, run, trials, *rest):  # type: ignore[no-untyped-def]
        seen.extend([tuple(x.shape[1:]) for x in trial.values] for trial in trials)
        return prove(path, weights, predicted, run, trials, *rest)

    monkeypatch.setattr(verify, "prove", noted)
    net, given, any_ = Wave(fewest).eval(), (torch.zeros(2, 33), torch.zeros(2, 1, 10, 12)), torch.export.Dim.AUTO
    sizes = ({0: any_, 1: any_}, {0: any_, 2: any_, 3: any_})
    torch.export.save(torch.export.export(net, given, dynamic_shapes=sizes), tmp_path / "wave.pt2")
    artifact = pcq.quantize(tmp_path / "wave.pt2", "w8", out=tmp_path / "w.safetensors").path
    report = pcq.export_onnx(artifact, tmp_path / "wave.onnx").report
    assert seen == [[(33,), (1, 10, 12)], tried or [(32,), (1, 5, 6)]]
    assert report.dynamic_length


class Halves(nn.Module):
    """Of two lengths, one twice the other."""

    def forward(self, whole: Tensor, half: Tensor) -> Tensor:
        return whole.reshape(whole.shape[0], half.shape[1], 2).sum(2) + half


def test_sizes_that_do_not_go_together_are_not_tried() -> None:
    given, n, t = (torch.zeros(2, 12), torch.zeros(2, 6)), torch.export.Dim("n"), torch.export.Dim("t", max=99)
    program = torch.export.export(Halves(), given, dynamic_shapes=({0: n, 1: 2 * t}, {0: n, 1: t}))
    traced = trace(program, given, 20)
    assert traced.others == ({}, {})
    assert [str(value.shape[1]).isdigit() for value in traced.model.graph.inputs if value.shape] == [False, False]


def test_a_program_with_named_inputs_runs_in_int8(tmp_path: Path) -> None:
    net, spec = Pair().eval(), pictures(tmp_path)
    sizes = {"grey": {0: torch.export.Dim("n")}, "colour": {0: torch.export.Dim("n")}}
    given = {"grey": torch.zeros(2, 1, 8, 8), "colour": torch.zeros(2, 3, 8, 8)}
    torch.export.save(torch.export.export(net, (), given, dynamic_shapes=sizes), tmp_path / "p.pt2")
    artifact = pcq.quantize(tmp_path / "p.pt2", "w8", out=tmp_path / "p.safetensors").path
    made = pcq.export_onnx(artifact, tmp_path / "x.onnx", int8=Int8(spec, samples=20, max_drop=10))
    assert made.int8 is not None
    assert made.int8.drop is not None
    assert made.int8.drop.relative_l2 < 0.02
    np.savez(tmp_path / "other.npz", grey=np.zeros((9, 1, 8, 8), "f"), color=np.zeros((9, 3, 8, 8), "f"))
    with pytest.raises(PcqError, match="its arrays are grey, color"):
        pcq.export_onnx(artifact, tmp_path / "z.onnx", int8=Int8(f"npz:{tmp_path / 'other.npz'}"))


def test_int8_of_several_inputs_says_what_does_not_fit(tmp_path: Path) -> None:
    artifact, spec = packed(tmp_path, Pair()), pictures(tmp_path)
    np.savez(tmp_path / "small.npz", colour=np.zeros((9, 3, 4, 4), "f"), grey=np.zeros((9, 1, 8, 8), "f"))
    with pytest.raises(PcqError, match=r"its samples are \[3, 4, 4\], \[1, 8, 8\], the network takes \[3, 8, 8\]"):
        pcq.export_onnx(artifact, tmp_path / "x.onnx", example=spec, int8=Int8(f"npz:{tmp_path / 'small.npz'}"))
    with pytest.raises(PcqError, match="array for each input"):
        pcq.export_onnx(artifact, tmp_path / "x.onnx", example=spec, int8=Int8("digits"))
    assert not (tmp_path / "x.onnx").exists()


def sentences(path: Path, labels: bool = True, sizes: tuple[int, ...] = (240, 60)) -> str:
    """Tokens whose class is whether most are of the first half; of two splits, or of one."""
    arrays: dict[str, np.ndarray] = {}
    for n, split in zip(sizes, ("_train", "_test") if len(sizes) > 1 else ("",), strict=True):
        tokens = torch.randint(20, (n, 6), generator=torch.Generator().manual_seed(n))
        mask = torch.ones(n, 6, dtype=torch.int64)
        mask[::2, 4:] = 0
        arrays |= {f"attention_mask{split}": mask.numpy(), f"input_ids{split}": tokens.numpy()}
        if labels:
            arrays[f"y{split}"] = (((tokens < 10) & mask.bool()).sum(1) > mask.sum(1) // 2).long().numpy()
    np.savez(path, **arrays)
    return f"npz:{path}"


def tuned(folder: Path, data: str, out: str = "x.safetensors", **how: object) -> FinetuneResult:
    save_file(Tokens().state_dict(), folder / "m.safetensors")
    said: dict[str, object] = {"epochs": 20, "overrides": ["finetune.batch=40", "finetune.lr=0.02"]}
    said |= {"arch": f"{__file__}:network", "out": folder / out} | how
    return pcq.finetune(folder / "m.safetensors", "ternary-all", data, **said)  # type: ignore[arg-type]


def test_networks_of_several_inputs_are_trained(tmp_path: Path) -> None:
    data = sentences(tmp_path / "s.npz")
    result = tuned(tmp_path, data)
    rows = {row.weights: row for row in result.rows}
    assert rows["fine-tuned"].test is not None
    assert rows["fine-tuned"].test.n == 60
    untrained, trained = (rows[name].val.top1 for name in ("one-shot", "fine-tuned"))
    assert untrained is not None
    assert trained is not None
    assert trained > untrained + 40
    scores = pcq.evaluate(result.path, data).scores
    assert scores.top1 == rows["fine-tuned"].test.top1
    assert "216 samples of input_ids 6, attention_mask 6" in result.data


def test_without_labels_they_follow_the_float_network(tmp_path: Path) -> None:
    data = sentences(tmp_path / "s.npz", labels=False, sizes=(200,))
    result = tuned(tmp_path, data, calibration=data, samples=100)
    assert [row.weights for row in result.rows] == ["one-shot", "calibrated", "fine-tuned"]
    agreement = [row.val.agreement for row in result.rows]
    assert None not in agreement
    assert agreement[2] > agreement[0]  # type: ignore[operator]


def test_they_go_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcq.train import loop

    data = sentences(tmp_path / "s.npz")
    whole = tuned(tmp_path, data, "whole.safetensors").path.read_bytes()
    step, seen = loop.advance, []

    def stopped(*args: object) -> None:
        seen.append(step(*args))  # type: ignore[arg-type,func-returns-value]
        if len(seen) == 33:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "advance", stopped)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, data, save_every=7)
    monkeypatch.setattr(loop, "advance", step)
    sentences(tmp_path / "s.npz", sizes=(250, 60))
    with pytest.raises(PcqError, match="another data"):
        tuned(tmp_path, data, save_every=7, resume=True)
    sentences(tmp_path / "s.npz")
    again = tuned(tmp_path, data, save_every=7, resume=True)
    assert again.resumed_at == 28
    assert again.path.read_bytes() == whole


def test_what_is_not_the_networks_is_said_before_training(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", input_ids=np.zeros((40, 6), "i8"), masks=np.zeros((40, 6), "i8"))
    with pytest.raises(PcqError, match="the network has no input 'masks'.*attention_mask"):
        tuned(tmp_path, f"npz:{tmp_path / 's.npz'}")
    np.savez(tmp_path / "s.npz", input_ids=np.zeros((40, 6), "i8"), other=np.zeros((40, 6), "i8"))
    with pytest.raises(PcqError, match="it has no array for the input 'attention_mask'"):
        tuned(tmp_path, f"npz:{tmp_path / 's.npz'}")
    np.savez(
        tmp_path / "s.npz", input_ids_train=np.zeros((40, 6), "i8"), attention_mask_train=np.ones((40, 6), "i8"),
        input_ids_test=np.zeros((40, 5), "i8"), attention_mask_test=np.ones((40, 5), "i8"),
    )  # fmt: skip
    with pytest.raises(PcqError, match="its samples are 5 and 5, those of train 6 and 6"):
        tuned(tmp_path, f"npz:{tmp_path / 's.npz'}")


def test_splits_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    one = sentences(tmp_path / "one.npz", labels=False, sizes=(200,))
    two = sentences(tmp_path / "two.npz", labels=False, sizes=(100, 100))
    assert open_splits(one, network=Tokens()).test is None
    with np.load(tmp_path / "two.npz") as held:
        arrays = {name: array[::-1] if name == "input_ids_test" else array for name, array in held.items()}
    np.savez(tmp_path / "two.npz", **arrays)
    assert open_splits(two, network=Tokens()).test is not None


class States(Tokens):
    """Puts out every token's state."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        return self.norm(x + self.second(self.first(x).relu())) + (1 - attention_mask)[..., None] * 1e3  # type: ignore[no-any-return]


def states() -> nn.Module:
    return States()


def test_states_of_tokens_follow_the_float_networks(tmp_path: Path) -> None:
    data, arch = sentences(tmp_path / "s.npz", labels=False), f"{__file__}:states"
    result = tuned(tmp_path, data, arch=arch)
    before, after = (row.test for row in result.rows)
    assert before is not None
    assert after is not None
    assert before.explained is not None
    assert after.explained is not None
    assert before.explained + 5 < after.explained < 100
    module, float_ = pcq.open_network(result.path).module, States()
    with np.load(tmp_path / "s.npz") as held:
        x = {name: torch.from_numpy(held[f"{name}_test"]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        y, aim = (net(**x)[x["attention_mask"] != 0].double() for net in (module, float_))
    explained = 100 * (1 - (y - aim).square().sum() / (aim - aim.mean(0)).square().sum())
    assert after.explained == pytest.approx(float(explained), abs=1e-6)
    found = pcq.evaluate(result.path, data, reference=tmp_path / "m.safetensors", arch=arch, batch=7).scores
    assert found.explained == pytest.approx(after.explained, abs=1e-9)
    onnx = pcq.export_onnx(result.path, tmp_path / "x.onnx", example=data).path
    assert pcq.evaluate(onnx, data, reference=tmp_path / "m.safetensors", arch=arch).scores.explained == pytest.approx(
        after.explained, abs=1e-4
    )
    sentences(tmp_path / "labelled.npz")
    with pytest.raises(PcqError, match=r"its output is of shape \[40, 6, 8\].*Leave the labels out"):
        tuned(tmp_path, f"npz:{tmp_path / 'labelled.npz'}", "y.safetensors", arch=arch)


class Adrift(States):
    """What it puts out for masked tokens is a matter of rounding, as where a window of attention sees none but such."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None) -> Tensor:
        x = super().forward(input_ids, attention_mask)
        return torch.where(attention_mask[..., None] != 0, x, ((x * 1e-3).tanh() * 1e9).sin())


def test_masked_tokens_have_no_part_in_the_proof(tmp_path: Path) -> None:
    np.savez(tmp_path / "tokens.npz", **{name: array.numpy() for name, array in _samples().items()})
    made = pcq.export_onnx(packed(tmp_path, Adrift()), tmp_path / "x.onnx", example=f"npz:{tmp_path / 'tokens.npz'}")
    assert made.report.error < 1e-5


def test_masked_tokens_have_no_part_in_what_int8_costs(tmp_path: Path) -> None:
    """Theirs are large here: with them int8 would explain nearly everything."""
    found = {name: array.numpy() for name, array in _samples().items()}
    np.savez(tmp_path / "tokens.npz", **found)
    artifact, spec = packed(tmp_path, States()), f"npz:{tmp_path / 'tokens.npz'}"
    made = pcq.export_onnx(artifact, tmp_path / "x.onnx", int8=Int8(spec, samples=24, max_drop=50)).int8
    assert made is not None
    assert made.drop is not None
    exact = pcq.export_onnx(artifact, tmp_path / "y.onnx", example=spec).path
    judged = {name: array[1::2] for name, array in found.items()}
    seen = judged["attention_mask"] != 0
    batches = [{name: array[i : i + BATCH] for name, array in judged.items()} for i in range(0, 24, BATCH)]
    y, aim = (
        np.concatenate([session.run(None, batch)[0] for batch in batches])[seen].astype(np.float64)
        for session in map(InferenceSession, (made.path, exact))
    )
    assert made.drop.n == 24
    assert made.drop.relative_l2 == pytest.approx(np.linalg.norm(y - aim) / np.linalg.norm(aim), rel=1e-5)
    explained = 100 * (1 - np.square(y - aim).sum() / np.square(aim - aim.mean(0)).sum())
    assert made.drop.explained == pytest.approx(explained, abs=1e-4)
    assert explained < 99.9999


def test_masked_tokens_have_no_part_in_the_loss() -> None:
    out, aim = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    of_each = [(out[i] - aim[i]).square()[mask[i] != 0].mean() if mask[i].any() else torch.zeros(()) for i in range(3)]
    assert torch.allclose(loss_of(Finetune(), out, None, aim, mask), torch.stack(of_each).mean())
    assert torch.allclose(loss_of(Finetune(), out, None, aim, None), (out - aim).square().mean())
    assert torch.allclose(loss_of(Finetune(), out[:, 0, 0], None, aim[:, 0, 0]), (out - aim)[:, 0, 0].square().mean())


class Starts(Tokens):
    """Scores each token as a start [b, t], and masks what is padded, as networks that answer questions do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        x = self.norm(x + self.second(self.first(x).relu()))
        return x[..., 0].masked_fill(attention_mask == 0, -torch.inf)


class Spans(Starts):
    """The same of pairs [b, t, t], none of which ends before it starts."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        x = self.norm(x + self.second(self.first(x).relu()))
        return (x @ x.mT).masked_fill(torch.ones(6, 6).tril(-1).bool(), -torch.inf)


def starts() -> nn.Module:
    return Starts()


def spans() -> nn.Module:
    return Spans()


@pytest.mark.parametrize("kind", ["starts", "spans"])
def test_masked_outputs_are_followed_where_they_are_not(kind: str, tmp_path: Path) -> None:
    data = sentences(tmp_path / "s.npz", labels=False)
    result = tuned(tmp_path, data, arch=f"{__file__}:{kind}", epochs=8)
    before, after = (row.val.agreement if kind == "starts" else row.val.explained for row in result.rows)
    assert before is not None
    assert after is not None
    assert after > before


def test_outputs_without_a_gradient_are_refused(tmp_path: Path) -> None:
    data = sentences(tmp_path / "s.npz", labels=False)
    with pytest.raises(PcqError, match="the network: its output has no gradient: it is of whole numbers"):
        tuned(tmp_path, data, arch=f"{__file__}:chosen")


class Chosen(Starts):
    """The best token."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, attention_mask).argmax(1)


def chosen() -> nn.Module:
    return Chosen()


def value() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))


def test_one_number_follows_the_float_networks(tmp_path: Path) -> None:
    save_file(value().state_dict(), tmp_path / "v.safetensors")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(600, 6)).astype("f"))
    arch, data = f"{__file__}:value", f"npz:{tmp_path / 'x.npz'}"
    how = {"epochs": 10, "overrides": ["finetune.batch=50", "finetune.lr=0.01"], "out": tmp_path / "q.safetensors"}
    result = pcq.finetune(tmp_path / "v.safetensors", "ternary-all", data, arch=arch, **how)  # type: ignore[arg-type]
    before, after = (row.val for row in result.rows)
    assert before.agreement is None
    assert before.explained is not None
    assert after.explained is not None
    assert after.explained > before.explained + 2


class Padded(Starts):
    """Takes a mask of bools, as nn.MultiheadAttention does, and no other."""

    def forward(self, x: Tensor, mask: Tensor, other: Tensor | None = None) -> Tensor:
        assert mask.dtype == torch.bool
        return self.norm(self.words(x) + self.second(self.first(self.words(x)).relu())).masked_fill(mask[..., None], 0)


def padded() -> nn.Module:
    return Padded()


def test_bools_stay_bools(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 20, (60, 6))
    np.savez(tmp_path / "s.npz", x=x, mask=x > 15)
    data, arch = f"npz:{tmp_path / 's.npz'}", f"{__file__}:padded"
    result = tuned(tmp_path, data, arch=arch, epochs=1, calibration=data, samples=20)
    onnx = pcq.export_onnx(result.path, tmp_path / "x.onnx", example=data).path
    reference = tmp_path / "m.safetensors"
    got = [pcq.evaluate(path, data, reference=reference, arch=arch).scores.explained for path in (result.path, onnx)]
    assert got[0] == pytest.approx(got[1], abs=1e-4)
    np.savez(tmp_path / "s.npz", x=x, mask=x > 15, y=x[:, 0])
    said = r"the network takes 2 inputs \(x, mask\), and the data has one. Not read beside x and y: mask"
    with pytest.raises(PcqError, match=said):
        tuned(tmp_path, data, "y.safetensors", arch=arch)
    with pytest.raises(PcqError, match=said):
        pcq.evaluate(reference, data, arch=arch)


def test_images_and_nan_are_as_in_data_of_one_input(tmp_path: Path) -> None:
    colour, grey = (np.random.default_rng(0).integers(0, 256, (50, 8, 8, c), np.uint8) for c in (3, 1))
    floats = {"colour": colour.transpose(0, 3, 1, 2) / np.float32(255), "grey": grey[..., 0][:, None] / np.float32(255)}
    with torch.no_grad():
        labels = Pair()(*map(torch.from_numpy, floats.values())).argmax(1).numpy()
    np.savez(tmp_path / "i.npz", colour=colour, grey=grey[..., 0], y=labels)
    artifact = packed(tmp_path, Pair(), "w8")
    float_ = pcq.evaluate(tmp_path / "float.safetensors", f"npz:{tmp_path / 'i.npz'}", arch=f"{__file__}:Pair").scores
    assert float_.top1 == 100
    floats["grey"][7, 0, 1, 1] = np.nan
    np.savez(tmp_path / "n.npz", **floats)
    with pytest.raises(PcqError, match=r"n.npz, grey: 1 of 50 samples hold NaN, such as sample 7"):
        pcq.evaluate(artifact, f"npz:{tmp_path / 'n.npz'}", reference=tmp_path / "float.safetensors")


def splitted() -> dict[str, Tensor]:
    return {f"{name}_{split}": a[:n] for split, n in (("test", 10), ("val", 20)) for name, a in _samples().items()}


class Sentences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, ragged: bool = False, labels: bool = True) -> None:
        self.held, self.ragged, self.labels = _samples(), ragged, labels

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> dict[str, object]:
        item: dict[str, object] = {
            k: v[i][: 3 if self.ragged and i == 5 else None].tolist() for k, v in self.held.items()
        }
        return item | ({"labels": i % 8} if self.labels else {})


def padded_together(items: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {k: torch.tensor([item[k] for item in items]) + (k == "labels") for k in items[0]}


def dictionaries(kind: str) -> object:
    from torch.utils.data import DataLoader

    data = Sentences(labels=kind != "unlabelled")
    batches = [padded_together([data[i] for i in range(n, n + 12)]) for n in range(0, 48, 12)]  # type: ignore[misc]
    return {
        "collated": lambda: DataLoader(data, 5, shuffle=True, collate_fn=padded_together),  # type: ignore[arg-type]
        "loader": lambda: DataLoader(data, 5),
        "batches": lambda: batches,
        "iterable": lambda: iter(batches),
        "samples": lambda: iter([data[i] for i in range(48)]),
        "ragged": lambda: Sentences(ragged=True),
    }.get(kind, lambda: data)()


@pytest.mark.parametrize(
    "kind", ["set", "unlabelled", "loader", "collated", "batches", "iterable", "samples"],
)  # fmt: skip
def test_samples_that_are_dictionaries(kind: str) -> None:
    data = open_inputs(f"{__file__}:dictionaries?kind={kind}", "test", lambda arrays: inputs(arrays, Tokens(), "here"))
    expected = _samples()
    assert torch.equal(data.arrays["input_ids"], expected["input_ids"])
    assert torch.equal(data.arrays["attention_mask"], expected["attention_mask"])
    more = kind in ("collated", "batches", "iterable")
    assert (data.labels is None) == (kind == "unlabelled")
    assert data.labels is None or torch.equal(data.labels, torch.arange(48) % 8 + more)


def test_samples_of_different_lengths_are_to_be_padded() -> None:
    with pytest.raises(PcqError, match="differ in shape: 3, 6. Pad them"):
        open_data(f"{__file__}:dictionaries?kind=ragged", "test")


def test_a_functions_arrays_are_split_as_an_npzs(tmp_path: Path) -> None:
    found = [
        open_inputs(f"{__file__}:splitted", s, lambda arrays: inputs(arrays, Tokens(), "")) for s in ("test", "val")
    ]
    assert [data.n for data in found] == [10, 20]
    with pytest.raises(NoSplit, match="arrays of test, val but none of train"):
        open_data(f"{__file__}:splitted", "train")
    arrays = {f"{name}_train": array.numpy() for name, array in _samples().items()}
    np.savez(tmp_path / "s.npz", **arrays, y=np.zeros(48))
    with pytest.raises(PcqError, match=r'_train has no labels, and y no samples. Call the labels "y_train"'):
        open_data(f"npz:{tmp_path / 's.npz'}", "train")
