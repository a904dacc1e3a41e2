"""Export: small networks of every kind go through whole; whatever is wrong leaves no file behind."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import onnxscript.optimizer
import pytest
import torch
from torch import Tensor, nn

from pcq.errors import CheckFailed, PcqError
from pcq.export import OnnxReport, facts, layouts, open_packed, passes, read_packed, verify, write_onnx, writing
from pcq.export.tracing import advice, trace
from pcq.grids import Affine, Codebook, Grid
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows

Weights = dict[str, QuantizedTensor]
Exported = tuple[nn.Module, Weights, Path, OnnxReport]


def grid_of(kind: str, g: int) -> Grid:
    scale = torch.rand(g) / 8 + 0.05
    match kind:
        case "binary":
            return Affine(scale, 0.5, 2)
        case "ternary":
            return Affine(scale, 1.0, 3)
        case "3 bit":
            return Affine(scale, 3.5, 8)
        case "affine":
            return Affine(scale, torch.randint(0, 16, (g,)).to(torch.uint8), 16)
        case "8 bit":
            return Affine(scale / 64, 127.0, 255)
        case "around 128":
            return Affine(scale / 64, 128.0, 256)
        case "shared":
            return Codebook(torch.tensor([[-0.3, -0.1, 0.0, 0.05, 0.25]]), scale)
        case _:
            return Codebook((torch.randn(g, 7) / 4).sort().values)


KINDS = ("binary", "ternary", "3 bit", "affine", "8 bit", "shared", "rows", "around 128")


def quantize(network: nn.Module, kinds: tuple[str, ...] = KINDS, group: int | None = None) -> Weights:
    """Random codes for every matrix and kernel of ``network``, which then holds their values; eval mode."""
    weights: Weights = {}
    modules = dict(network.named_modules())
    for i, (name, parameter) in enumerate((n, p) for n, p in network.named_parameters() if p.ndim > 1):
        owner = modules[name.rpartition(".")[0]]
        turned = isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        rows = Rows(tuple(parameter.shape), int(turned), owner.groups if turned else 1, group)
        grid = grid_of(kinds[i % len(kinds)], rows.g)
        codes = torch.randint(0, grid.count, rows.shape, dtype=torch.uint8)
        weights[name] = QuantizedTensor(codes, grid, rows)
        parameter.data.copy_(weights[name].dequantize())
    network.eval()
    return weights


class Convs(nn.Module):
    """Every convolution: plain, strided, depthwise, grouped, transposed, 1-D, 3-D; BatchNorm; a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2, groups=4)
        self.up2 = nn.ConvTranspose2d(12, 4, 3, bias=False)
        self.line = nn.Conv1d(4, 6, 3, groups=2)
        self.cube = nn.Conv3d(1, 2, (1, 1, 3))
        self.head = nn.Linear(12, 5)
        for norm in (self.norm, self.norm2):
            norm.running_mean, norm.running_var = torch.randn(8), torch.rand(8) + 0.5
            nn.init.uniform_(norm.weight, 0.5, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(image)))
        x = self.up2(self.up(torch.relu(self.norm2(self.depthwise(x)))))
        x = self.line(x.mean(-1))
        logits: Tensor = self.head(self.cube(x[:, None, None]).mean(-1).flatten(1))
        return logits


class Words(nn.Module):
    """Token ids and a mask -> logits; the head is tied to the embedding, the aside is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.tokens.weight
        self.aside = nn.Linear(4, 4)

    def forward(self, ids: Tensor, gain: Tensor) -> dict[str, Tensor]:
        hidden = self.block(self.tokens(ids)) * gain[:, None]
        return {"logits": self.head(hidden), "pooled": hidden.mean(1)}


class Mlp(nn.Module):
    """Two Linear layers on 3-D inputs (MatMul) and one on 2-D (Gemm)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.c(self.b(torch.relu(self.a(x))).mean(1))
        return logits


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    network = Mlp()
    weights = quantize(network)
    path = tmp_path_factory.mktemp("mlp") / "mlp.onnx"
    return network, weights, path, write_onnx(network, weights, (torch.zeros(1, 4, 6),), path)


def same(read: Weights, written: Weights) -> bool:
    return read.keys() == written.keys() and all(
        torch.equal(read[name].codes, weight.codes)
        and torch.equal(read[name].dequantize(), weight.dequantize())
        and read[name].rows == weight.rows
        for name, weight in written.items()
    )


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options)


@pytest.mark.parametrize("group", [None, 5])
def test_convolutions_of_all_kinds(tmp_path: Path, group: int | None) -> None:
    network = Convs()
    weights = quantize(network, group=group)
    stages: list[str] = []
    report = write_onnx(
        network, weights, (torch.zeros(1, 3, 6, 6),), tmp_path / "convs.onnx", samples=[(torch.randn(2, 3, 6, 6),)],
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == [report.path]
    assert report.folded == ("stem.weight", "depthwise.weight")
    read = read_packed(report.path)
    assert all(torch.equal(read[name].codes, weight.codes) for name, weight in weights.items())
    assert same(*({name: w for name, w in each.items() if name not in report.folded} for each in (read, weights)))
    assert [(a.inputs, a.batch, a.optimised) for a in report.agreements] == [
        (inputs, batch, optimised)
        for optimised in (True, False)
        for inputs, batch in [("random", 1), ("random", 3), ("sample", 2)]
    ]
    assert report.error < 1e-5
    assert report.nbytes == report.path.stat().st_size
    assert abs(report.nbytes - report.predicted) < 0.05 * report.nbytes + 1024
    assert 8 * sum(weight.nbytes for weight in weights.values()) == pytest.approx(
        report.bits_per_weight * sum(weight.numel for weight in weights.values())
    )
    assert (report.opset, report.ir_version, report.unused, report.dynamic_batch) == (20, 9, (), True)
    assert list(dict.fromkeys(stages)) == [
        "trace", "pack", "optimise", "write", "check codes", "check unpacking", "check outputs",
    ]  # fmt: skip
    names = {tensor.name for tensor in onnx.load(report.path).graph.initializer}
    assert {"stem.weight/packed", "stem.weight/scale", "stem.bias", "depthwise.bias"} <= names
    assert not names & {*weights, "norm.running_var", "norm2.weight"}


def test_the_graph_is_readable_and_carries_its_metadata(tmp_path: Path) -> None:
    network = Mlp()
    weights = quantize(network, ("ternary",))
    recipe = json.dumps({"name": "ternary ω"})
    path = tmp_path / "m.onnx"
    write_onnx(network, weights, (torch.zeros(1, 4, 6),), path, metadata={"recipe": recipe}, tied={"d": "c.weight"})
    meta = session(path).get_modelmeta()
    assert meta.producer_name == "pcq"
    assert meta.custom_metadata_map["pcq.recipe"] == recipe
    assert json.loads(meta.custom_metadata_map["pcq.tied"]) == {"d": "c.weight"}
    assert meta.custom_metadata_map["pcq.version"]
    scheme = json.loads(meta.custom_metadata_map["pcq.scheme"])
    assert list(scheme) == ["a.weight", "b.weight", "c.weight"]
    assert scheme["c.weight"]["shape"] == [3, 6]
    assert scheme["c.weight"]["levels"] == 3
    model = onnx.load(path)
    calls = {node.name: node for node in model.graph.node if node.domain == "pcq"}
    assert set(calls) == {"a.weight/unpack", "b.weight/unpack", "c.weight/unpack"}
    assert list(calls["c.weight/unpack"].output) == ["c.weight"]
    assert list(calls["a.weight/unpack"].output) == ["a.weight/transposed"]
    assert list(calls["c.weight/unpack"].input) == ["c.weight/packed", "c.weight/scale"]
    assert {function.name for function in model.functions} == {"Ternary", "TernaryCut"}
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    # the Transposes before MatMul are gone, Gemm keeps its transB
    assert not any(node.op_type == "Transpose" for node in model.graph.node)
    assert [node.op_type for node in model.graph.node].count("Gemm") == 1


def test_token_ids_tied_head_and_unused_weight(tmp_path: Path) -> None:
    network = Words()
    weights = quantize(network, ("8 bit", "ternary", "binary", "rows"))
    assert "head.weight" not in weights
    assert "aside.weight" in weights
    example = {"gain": torch.rand(2, 16), "ids": torch.randint(0, 40, (2, 5))}
    report = write_onnx(network, weights, example, tmp_path / "w.onnx", tied={"head.weight": "tokens.weight"})
    assert report.unused == ("aside.weight",)
    used = {name: weight for name, weight in weights.items() if name != "aside.weight"}
    assert same(read_packed(report.path), used)
    inputs = {value.name: value.shape for value in session(report.path).get_inputs()}
    assert inputs == {"ids": ["batch", "length"], "gain": ["batch", 16]}
    assert report.dynamic_length
    assert {agreement.batch for agreement in report.agreements} == {1, 3}
    model = onnx.load(report.path)
    assert sum(node.name == "tokens.weight/unpack" for node in model.graph.node) == 1
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert not any(np.prod(tensor.dims) == 40 * 16 for tensor in floats)
    # both names of one tensor, as an artifact without ties would give them
    both = {**used, "head.weight": weights["tokens.weight"]}
    report = write_onnx(network, both, example, tmp_path / "w.onnx")
    assert len(report.shared) == 1
    assert len(read_packed(report.path)) == len(used)


def test_weights_of_equal_value_stay_apart(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.relu(self.a(x)))
            return y

    network = Twins()
    weights = quantize(network, ("ternary",))
    network.b.weight.data.copy_(network.a.weight.data)
    network.b.weight.data[network.b.weight == 0] = -0.0
    weights["b.weight"] = weights["a.weight"]
    report = write_onnx(network, weights, (torch.zeros(1, 4),), tmp_path / "t.onnx")
    names = [tensor.name for tensor in onnx.load(report.path).graph.initializer if "/" in tensor.name]
    assert sorted(names) == ["a.weight/packed", "a.weight/scale", "b.weight/packed", "b.weight/scale"]
    assert same(read_packed(report.path), weights)


@pytest.mark.parametrize("kind", ["dynamic", "static", "module", "static module"])
def test_exported_programs(tmp_path: Path, kind: str) -> None:
    network = Mlp()
    weights = quantize(network)
    batch = torch.export.Dim("n", min=2, max=64)
    shapes = None if "static" in kind else ({0: batch},)
    program = torch.export.export(network, (torch.zeros(4, 4, 6),), dynamic_shapes=shapes)
    report = write_onnx(
        program.module() if "module" in kind else program, weights, (torch.zeros(4, 4, 6),), tmp_path / "p.onnx"
    )
    assert same(read_packed(report.path), weights)
    assert report.dynamic_batch is ("static" not in kind)
    expected = {"dynamic": {2, 4}, "module": {1, 3}}.get(kind, {4})
    assert {agreement.batch for agreement in report.agreements} == expected


def test_two_exports_give_the_same_bytes(tmp_path: Path, mlp: Exported) -> None:
    network, weights, path, _ = mlp
    report = write_onnx(network, weights, (torch.zeros(1, 4, 6),), tmp_path / path.name)
    assert report.path.read_bytes() == path.read_bytes()


def test_large_models_have_external_data_that_is_replaced_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64))
    weights = quantize(network)
    example, path = (torch.zeros(1, 6),), tmp_path / "m.onnx"
    ones = np.ones((2, 6), np.float32)
    report = write_onnx(network, weights, example, path, external_above=100)
    assert report.data_path is not None
    assert sorted(tmp_path.iterdir()) == sorted([path, report.data_path])
    assert report.nbytes == path.stat().st_size + report.data_path.stat().st_size
    assert same(read_packed(path), weights)
    before = session(path).run(None, {"input": ones})

    other = quantize(network)
    for moved in (0, 1):  # interrupted before its data has its name, and after
        names: list[Path] = []

        def interrupted(source: Path, target: Path, names: list[Path] = names, moved: int = moved) -> None:
            names += [target] if Path(target).parent == tmp_path else []
            if len(names) > moved:
                raise KeyboardInterrupt
            os.rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_onnx(network, other, example, path, external_above=100)
        assert len(names) == moved + 1
        assert not list(tmp_path.glob(".*"))
        np.testing.assert_array_equal(session(path).run(None, {"input": ones})[0], before[0])

    hidden = report.data_path.rename(tmp_path / "hidden")
    with pytest.raises(CheckFailed, match="cannot be read"):
        read_packed(path)
    hidden.rename(report.data_path)
    write_onnx(network, other, example, path)
    assert list(tmp_path.iterdir()) == [path]
    assert same(read_packed(path), other)


def test_new_data_replaces_old_data_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    old = hashlib.sha256(b"old").hexdigest()[:8]
    kept = ("m.onnx.01234567.data", "m.onnx.20251231.data", "m.onnx.external.data", f"other.onnx.{old}.data")
    for name in ("m.onnx", f"m.onnx.{old}.data", *kept):
        (tmp_path / name).write_text("old")
    draft, data = tmp_path / "draft" / "m.onnx", tmp_path / "draft" / "m.onnx.89abcdef.data"
    draft.write_text("new")
    data.write_text("new")
    assert writing.commit(draft, data, tmp_path / "m.onnx") == tmp_path / data.name
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {
        "m.onnx": "new", data.name: "new", **dict.fromkeys(kept, "old"),
    }  # fmt: skip


# What users get wrong


def _wrong_values(network: nn.Module, weights: Weights) -> None:
    network.get_parameter("a.weight").data.add_(1e-3)


def _half(network: nn.Module, weights: Weights) -> None:
    network.half()


def _training(network: nn.Module, weights: Weights) -> None:
    network.train()


def _projected(network: nn.Module, weights: Weights) -> None:
    network.add_module("rnn", nn.LSTM(6, 4, proj_size=2).eval())


def _unknown(network: nn.Module, weights: Weights) -> None:
    weights["a.wieght"] = weights.pop("a.weight")


def _shape(network: nn.Module, weights: Weights) -> None:
    weights["a.weight"] = weights["b.weight"]


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (_wrong_values, "a.weight: the network holds other values than the codes stand for"),
        (_half, "a.weight: the network holds it in float16. Allowed: float32"),
        (_training, "the network is in training mode. Call .eval() first"),
        (_projected, "rnn: it is an LSTM with proj_size, which ONNX has not: torch leaves its projection out. Export"),
        (_unknown, "a.wieght: the network has no such parameter. Did you mean 'a.weight'?"),
        (_shape, "has shape [10, 6] in the network and [6, 10] in its codes"),
        (lambda network, weights: weights.clear(), "there are no quantized weights"),
    ],
)
def test_mistakes(tmp_path: Path, mistake: Callable[[nn.Module, Weights], None], says: str) -> None:
    network = Mlp()
    weights = quantize(network)
    mistake(network, weights)
    example = torch.zeros(1, 4, 6, dtype=next(network.parameters()).dtype)
    with pytest.raises(PcqError) as error:
        write_onnx(network, weights, (example,), tmp_path / "m.onnx")
    assert says in str(error.value)
    assert error.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    network = Mlp()
    weights = quantize(network)
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "missing" / "m.onnx", tmp_path / "folder", Path("/proc/m.onnx")):
        with pytest.raises(PcqError, match="cannot be written"):
            write_onnx(network, weights, (torch.zeros(1, 4, 6),), place)
    with pytest.raises(PcqError, match=r"Allowed: 1\.17 to"):
        write_onnx(network, weights, (torch.zeros(1, 4, 6),), tmp_path / "m.onnx", target_ort="1.16")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_samples_that_the_network_does_not_take_are_named() -> None:
    with pytest.raises(PcqError, match=r"^samples of 4x7: the network does not take them: .*4x7 and 6x10"):
        trace(Mlp().eval(), (torch.zeros(1, 4, 7),), 20)


def test_a_fixed_batch_is_named(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.f(x.reshape(2, 12))
            return y

    network = Fixed()
    with pytest.raises(PcqError, match="fixes the batch size"):
        write_onnx(network, quantize(network), (torch.zeros(2, 3, 4),), tmp_path / "m.onnx")


# What the proof catches


def _tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    assert isinstance(tensor, onnx.TensorProto)
    return tensor


def _flip(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = _tensor(model, name)
        tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]

    return change


def _wrong_function(model: onnx.ModelProto) -> None:
    function = next(function for function in model.functions if function.name.startswith("Binary"))
    table = next(node for node in function.node if node.name == "table").attribute[0].t
    table.raw_data = table.raw_data[::-1]


def _wrong_bias(model: onnx.ModelProto) -> None:
    tensor = _tensor(model, "c.bias")
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) + np.float32(0.01)).tobytes()


def _float_copy(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(20_000, np.float32), "copy"))


def _unfoldable(model: onnx.ModelProto) -> None:
    """The packed bytes depend on an input: right, but unpacked in every run."""
    inputs = next(node for node in model.graph.node if node.name == "a.weight/unpack").input
    first = [
        onnx.helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        onnx.helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        onnx.helper.make_node("Cast", ["nothing"], ["no bits"], to=onnx.TensorProto.UINT8),
        onnx.helper.make_node("BitwiseOr", [inputs[0], "no bits"], ["bytes"]),
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.float32), "zero"))
    inputs[0] = "bytes"
    nodes = [*first, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_flip("a.weight/packed"), "a.weight: its packed weight is damaged: the codes are not those"),
        (_flip("a.weight/scale"), "a.weight: the file holds other codes or levels"),
        (_wrong_function, "ONNX Runtime unpacks other weights than were packed"),
        (_wrong_bias, "outputs differ from torch by"),
        (_float_copy, "were predicted"),
        (lambda model: model.graph.node[-1].output.__setitem__(0, "y"), "the ONNX checker refuses it"),
    ],
)
def test_the_proof_fails(tmp_path: Path, damage: Callable[[onnx.ModelProto], None], says: str, mlp: Exported) -> None:
    network, weights, path, report = mlp
    trial = verify.Trial("random", (torch.randn(1, 4, 6),))

    def run(values: object) -> list[Tensor]:
        with torch.no_grad():
            return [network(trial.values[0])]

    verify.prove(path, weights, report.predicted, run, [trial])
    model = onnx.load(path)
    damage(model)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(CheckFailed) as error:
        verify.prove(tmp_path / "m.onnx", weights, report.predicted, run, [trial])
    assert says in str(error.value)
    assert error.value.exit_code == 3


def test_unpacking_in_every_run_is_noticed(tmp_path: Path, mlp: Exported) -> None:
    network, weights, path, _ = mlp
    model = onnx.load(path)
    _unfoldable(model)
    onnx.save(model, tmp_path / "m.onnx")
    trial = verify.Trial("random", (torch.randn(1, 4, 6),))

    def run(values: object) -> list[Tensor]:
        with torch.no_grad():
            return [network(trial.values[0])]

    with pytest.raises(CheckFailed, match=r"a\.weight: ONNX Runtime would unpack this weight in every run"):
        verify.check_outputs(tmp_path / "m.onnx", run, [trial], weights)


def test_a_file_that_fails_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Mlp()
    weights = quantize(network, ("ternary",))
    (tmp_path / "m.onnx").write_bytes(b"older")
    save = writing.save

    def damaged(model: ir.Model, path: Path, external_above: int) -> None:
        save(model, path, external_above)
        proto = onnx.load(path)
        _wrong_bias(proto)
        onnx.save(proto, path)

    monkeypatch.setattr(writing, "save", damaged)
    with pytest.raises(CheckFailed, match="outputs differ from torch by"):
        write_onnx(network, weights, (torch.zeros(1, 4, 6),), tmp_path / "m.onnx")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.onnx", b"older")]


# Reading


def test_foreign_and_unpacked_files_are_recognised(tmp_path: Path, mlp: Exported) -> None:
    _, weights, path, report = mlp
    packed = open_packed(path)
    assert same(packed.weights, weights)
    assert (packed.opset, packed.ir_version, packed.file_bytes) == (20, 9, report.nbytes)
    assert sum(packed.weight_bytes.values()) + packed.float_bytes < packed.file_bytes

    model = ir.load(path)
    onnxscript.optimizer.optimize(model)  # inlines, then folds: what users must not do
    ir.save(model, tmp_path / "unpacked.onnx")
    with pytest.raises(PcqError, match=r"3 of 3 packed weights, such as a\.weight, have been unpacked"):
        read_packed(tmp_path / "unpacked.onnx")

    plain = onnx.load(path)
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "stripped.onnx")
    with pytest.raises(PcqError, match="another tool has removed its metadata"):
        read_packed(tmp_path / "stripped.onnx")
    plain.producer_name = "torch"
    del plain.functions[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    with pytest.raises(PcqError, match="pcq did not pack this file"):
        read_packed(tmp_path / "plain.onnx")

    (tmp_path / "text.onnx").write_text("no ONNX at all")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-100])
    for name in ("text.onnx", "empty.onnx", "cut.onnx"):
        with pytest.raises(PcqError, match="is not an ONNX file"):
            read_packed(tmp_path / name)
    with pytest.raises(PcqError, match="No such file"):
        read_packed(tmp_path / "absent.onnx")
    scheme = onnx.load(path)
    next(entry for entry in scheme.metadata_props if entry.key == "pcq.scheme").value = '{"a": 3}'
    onnx.save(scheme, tmp_path / "scheme.onnx")
    with pytest.raises(CheckFailed, match="packing scheme is unreadable"):
        read_packed(tmp_path / "scheme.onnx")


def test_the_reader_in_the_docs_reads_every_form(tmp_path: Path, mlp: Exported) -> None:
    text = (Path(__file__).parent.parent / "docs" / "onnx.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(code, names)
    network = nn.Sequential(*(nn.Linear(6, 6) for _ in KINDS), nn.ConvTranspose1d(6, 4, 3), nn.ConvTranspose1d(4, 3, 2))
    weights = quantize(network, (*KINDS, "rows", "3 bit"))
    write_onnx(network, weights, (torch.zeros(1, 6, 6),), tmp_path / "m.onnx")
    for path, wanted in ((tmp_path / "m.onnx", weights), (mlp[2], mlp[1])):
        read = dict(names["read"](path))
        assert read.keys() == wanted.keys()
        for name, weight in wanted.items():
            np.testing.assert_array_equal(read[name], weight.dequantize().numpy())


# Finding weights in graphs that torch did not make


def _graph(build: Callable[[ir.tape.Tape, ir.Value], ir.Value], constants: dict[str, np.ndarray]) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))
    tape = ir.tape.Tape()
    held = {name: tape.initializer(ir.tensor(array, name=name)) for name, array in constants.items()}
    tape.held = held  # type: ignore[attr-defined]
    y = build(tape, x)
    y.name, y.type, y.shape = "y", x.type, ir.Shape(["n", None])
    graph = ir.Graph([x], [y], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=9)


def _pack_and_run(model: ir.Model, weights: Weights, x: np.ndarray) -> tuple[np.ndarray, onnx.ModelProto]:
    found = passes.find(model, weights)
    placed = [one for name, held in found.items() if held and (one := passes.pack(model, name, weights[name], held))]
    passes.optimise(model)
    made = layouts.plan(passes.needs(model, weights, placed), facts.target("1.17"))
    passes.fill(model, passes.lay_out(model, weights, placed, made))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0], proto


def _square() -> QuantizedTensor:
    grid = Affine(torch.tensor([0.5, 1.0, 0.25, 2.0]), 1.0, 3)
    return QuantizedTensor(torch.randint(0, 3, (4, 4), dtype=torch.uint8), grid, Rows((4, 4)))


def test_a_weight_that_is_stored_transposed_and_in_a_constant() -> None:
    weight = _square()
    values = weight.dequantize().numpy()

    def build(tape: ir.tape.Tape, x: ir.Value) -> ir.Value:
        constant = tape.op("Constant", [], {"value": ir.tensor(values)})
        first = tape.op("MatMul", [x, tape.held["anything"]])  # type: ignore[attr-defined]
        return tape.op("MatMul", [first, tape.op("Transpose", [constant], {"perm": [1, 0]})])

    model = _graph(build, {"anything": np.ascontiguousarray(values.T)})
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    got, proto = _pack_and_run(model, {"w": weight}, x)
    np.testing.assert_allclose(got, x @ values.T @ values.T, rtol=1e-5)
    assert [node.op_type for node in proto.graph.node] == ["TernaryCut", "MatMul", "MatMul"]
    assert [tensor.name for tensor in proto.graph.initializer] == ["w/packed", "w/scale"]
    assert proto.graph.node[0].output[0] == "w/transposed"


def test_a_weight_that_is_used_both_ways_and_is_an_output() -> None:
    weight = _square()
    values = weight.dequantize().numpy()

    def build(tape: ir.tape.Tape, x: ir.Value) -> ir.Value:
        held = tape.held["w"]  # type: ignore[attr-defined]
        return tape.op("MatMul", [tape.op("MatMul", [x, held]), tape.op("Transpose", [held])])

    model = _graph(build, {"w": values})
    model.graph.outputs.append(model.graph.initializers["w"])
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    got, proto = _pack_and_run(model, {"w": weight}, x)
    np.testing.assert_allclose(got, x @ values @ values.T, rtol=1e-5)
    assert [output.name for output in proto.graph.output] == ["y", "w"]
    assert sum(node.domain == "pcq" for node in proto.graph.node) == 1


def test_other_values_of_the_same_name_and_shape_are_left_alone() -> None:
    weight = _square()
    other = weight.dequantize().numpy() + np.float32(1)

    def build(tape: ir.tape.Tape, x: ir.Value) -> ir.Value:
        return tape.op("MatMul", [x, tape.held["w"]])  # type: ignore[attr-defined]

    model = _graph(build, {"w": other})
    assert passes.find(model, {"w": weight}) == {"w": []}


def test_a_weight_that_torch_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Mlp()
    weights = quantize(network)
    find = passes.find
    monkeypatch.setattr(passes, "find", lambda model, given: {**find(model, given), "b.weight": []})
    with pytest.raises(PcqError, match=r"b\.weight: torch changed this weight while exporting"):
        write_onnx(network, weights, (torch.zeros(1, 4, 6),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_what_to_do_about_experts_is_said() -> None:
    told = "No ONNX function found for <OpOverload(op='transformers.grouped_mm_fallback', overload='default')>."
    assert "'hf:FOLDER?experts_implementation=batched_mm'" in advice(told)
