"""int8 activations: integers equal a slow twin's, layers are fused, what costs too much goes back to float."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pcq.activations import Range
from pcq.errors import CheckFailed, PcqError
from pcq.export import drop, int8, int8_file, read_packed, verify, write_int8, write_onnx
from pcq.export.drop import compare
from pcq.export.integers import Channels, Integers, expected, integers, integers_of, lower_int8
from pcq.export.ranges import Method, narrowed, observe
from pcq.grids import Affine, Codebook
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows

Weights = dict[str, QuantizedTensor]
KINDS = ("binary", "ternary", "2 bit", "3 bit", "affine 4 bit", "half 4 bit", "5 levels", "255 levels", "256 levels")


def weight_of(kind: str, shape: tuple[int, ...], axis: int | None = 0) -> QuantizedTensor:
    rows = Rows(shape, axis)
    scale = torch.rand(rows.g) / 8 + 0.05
    grid = {
        "binary": Affine(scale, 0.5, 2),
        "ternary": Affine(scale, 1.0, 3),
        "2 bit": Affine(scale, 1.5, 4),
        "3 bit": Affine(scale / 4, 3.5, 8),
        "affine 4 bit": Affine(scale / 8, torch.randint(0, 16, (rows.g,)).to(torch.uint8), 16),
        "half 4 bit": Affine(scale / 8, (torch.arange(rows.g) % 31).half() / 2, 16),
        "5 levels": Affine(scale, 2.0, 5),
        "255 levels": Affine(scale / 64, 127.0, 255),
        "256 levels": Affine(scale / 64, 128.0, 256),
    }[kind]
    return QuantizedTensor(torch.randint(0, grid.count, shape, dtype=torch.uint8), grid, rows)


def quantize(network: nn.Module, kinds: Sequence[str]) -> Weights:
    weights: Weights = {}
    for i, (name, parameter) in enumerate((n, p) for n, p in network.named_parameters() if p.ndim > 1):
        weights[name] = weight_of(kinds[i % len(kinds)], tuple(parameter.shape))
        parameter.data.copy_(weights[name].dequantize())
    network.eval()
    return weights


class Residual(nn.Module):
    """A stem with pooling, a residual block with a depthwise layer and ReLU6, SiLU, a head. BatchNorms have negative
    and zero factors, one of them with a bias that its channel's weights cannot be seen beside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.point, self.norm3 = nn.Conv2d(16, 16, 1, bias=True), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 24, 3, stride=2)
        self.head = nn.Linear(24, 10)
        for norm in (self.norm1, self.norm2, self.norm3):
            norm.running_mean, norm.running_var = torch.randn(16), torch.rand(16) * 4 + 2
            norm.weight.data = torch.randn(16)
            norm.bias.data = torch.randn(16)
        self.norm3.weight.data[3] = 0.0
        self.norm1.weight.data[5] = 1e-12

    def forward(self, image: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.norm1(self.stem(image))), 2)
        y = nn.functional.relu6(self.norm2(self.deep(x)))
        x = torch.relu(x + self.norm3(self.point(y)))
        logits: Tensor = self.head(nn.functional.silu(self.last(x)).mean((2, 3)))
        return logits


class Tokens(nn.Module):
    """Linear layers on 3-D inputs; two of them read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.gelu(self.a(x) * self.b(x))).mean(1)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    torch.manual_seed(1)
    network = Residual()
    weights = quantize(network, ("ternary", "255 levels", "2 bit", "binary", "256 levels"))
    path = tmp_path_factory.mktemp("residual") / "exact.onnx"
    write_onnx(network, weights, (torch.zeros(1, 3, 16, 16),), path, fold=False)
    return path, weights


@pytest.fixture(scope="module")
def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(8)]


def dumped(path: Path, folder: Path) -> Counter[str]:
    """Operators of ONNX Runtime's own graph of the file."""
    verify.open_session(str(path), optimised=True, dump=folder / "dump.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "dump.onnx", load_external_data=False).graph.node)


def run(path: Path, batches: Sequence[Tensor], optimised: bool = True) -> np.ndarray:
    session = verify.open_session(str(path), optimised=optimised)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x.numpy()})[0] for x in batches])


def unpacked(weight: QuantizedTensor, form: Integers, channels: Channels, transposed: bool) -> list[np.ndarray]:
    """What ONNX Runtime's run of the function gives."""
    lowered = lower_int8(weight, form, channels, 20, transposed)
    parts = [ir.Value(name=key, const_value=ir.tensor(array, name=key)) for key, array in lowered.arrays.items()]
    outputs = [ir.Value(name=name, type=ir.TensorType(kind)) for name, kind in
               (("q", ir.DataType.INT8), ("s", ir.DataType.FLOAT))]  # fmt: skip
    attributes = ir.convenience.convert_attributes(lowered.attributes)
    node = ir.Node("pcq", lowered.function.name, parts, attributes, outputs=outputs)
    graph = ir.Graph([], outputs, nodes=[node], initializers=parts, opset_imports={"": 20, "pcq": 1}, name="g")
    model = ir.Model(graph, ir_version=9, functions=[lowered.function])
    session = verify.open_session(ir.to_proto(model).SerializeToString(), optimised=True)
    got: list[np.ndarray] = session.run(None, {})
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("form", ["conv", "matrix", "transposed", "flipped"])
def test_the_integers_are_a_twins(kind: str, axis: int | None, form: str) -> None:
    shape = (6, 5) if form in ("matrix", "transposed") else (6, 3, 3, 1)
    weight = weight_of(kind, shape, axis)
    whole = integers(weight)
    assert isinstance(whole, Integers)
    factor = np.linspace(0.2, 3, 6).astype(np.float32)
    channels = Channels(factor / whole.unit)
    if form == "flipped":
        sign = np.array([1, -1, 0, 1, -1, 1], np.int8)
        channels = Channels(channels.gain, sign, np.where(sign == 0, 0.5, 0).astype(np.float32))
        factor = factor * sign
    q, s = unpacked(weight, whole, channels, form == "transposed")
    if form == "transposed":
        q = q.T
    wanted, scales = expected(weight, whole, channels)
    assert torch.equal(torch.from_numpy(np.ascontiguousarray(q)), wanted)
    assert np.array_equal(s, np.broadcast_to(scales, s.shape))
    rest = [1] * (len(shape) - 1)
    real = weight.dequantize().double().numpy() * factor.reshape(-1, *rest)
    assert np.allclose(wanted.numpy() * s.reshape(-1, *rest).astype(float), real, rtol=1e-6)
    if kind not in ("255 levels", "256 levels"):
        assert np.abs(q).max() <= 64


@example([0], 129, False)
@example([128], 256, False)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(2, 256), st.booleans())
def test_integers_are_as_large_as_they_may_be(zeros: list[int], count: int, half: bool) -> None:
    """Every code of every row, one by one: within int8, and within 64 where they can be."""
    zero = torch.tensor(zeros, dtype=torch.float16) + 0.5 if half else torch.tensor(zeros, dtype=torch.uint8)
    form = integers_of(Affine(torch.ones(len(zeros)), zero, count), Rows((len(zeros), 4)))
    every = [(1 + half) * (code - z) for z in zero.tolist() for code in (0, count - 1)]
    if isinstance(form, str):
        assert min(every) < -128 or max(every) > 127
        return
    assert form.halves == 1 + half
    assert form.multiplier * min(every) >= -128
    assert form.multiplier * max(every) <= 127
    largest = max(map(abs, every))
    assert form.multiplier == 1 or form.multiplier * largest <= 64
    assert (form.multiplier + 1) * largest > 64


def test_a_matrix_cut_along_its_inputs_is_integers_and_blocks_are_not() -> None:
    grid = Affine(torch.ones(8), 1.0, 3)
    assert integers_of(grid, Rows((4, 8), 1)) == Integers(1, 64)
    assert "transposed" in str(integers_of(grid, Rows((4, 4, 3), 1, 2)))


def test_weights_that_are_no_integers_say_why() -> None:
    rows = Rows((4, 8), 0, 1, 4)
    grouped = QuantizedTensor(torch.zeros(4, 8, dtype=torch.uint8), Affine(torch.ones(8), 1.0, 3), rows)
    listed = QuantizedTensor(torch.zeros(4, 8, dtype=torch.uint8), Codebook(torch.tensor([[0.0, 1.0]])), Rows((4, 8)))
    wide = QuantizedTensor(torch.zeros(4, 8, dtype=torch.uint8), Affine(torch.ones(4), 127.5, 256), Rows((4, 8)))
    turned = QuantizedTensor(torch.zeros(4, 8, 1, dtype=torch.uint8), Affine(torch.ones(8), 1.0, 3), Rows((4, 8, 1), 1))
    reasons = [integers(weight) for weight in (grouped, listed, wide, turned)]
    for reason, word in zip(reasons, ("groups", "list", "-255 to 255", "transposed"), strict=True):
        assert isinstance(reason, str)
        assert word in reason


def test_a_conv_net_runs_in_int8(residual: tuple[Path, Weights], samples: list[Tensor], tmp_path: Path) -> None:
    exact, weights = residual
    out = tmp_path / "int8.onnx"
    held_out: list[tuple[Tensor, Tensor | None]] = [(x, None) for x in samples[4:]]
    report = write_int8(exact, out, lambda: samples[:4], held_out, max_drop=15)
    assert list(tmp_path.iterdir()) == [out]
    assert report.fused == {"QLinearConv": 4, "QGemm": 1}
    assert (report.unfused, report.fallen_back) == (0, ())
    assert all(layer.activations == "static" for layer in report.layers)
    kinds = dumped(out, tmp_path)
    assert kinds["QLinearAdd"] == 1
    assert kinds["Conv"] == kinds["Relu"] == kinds["Clip"] == kinds["BatchNormalization"] == 0
    again = read_packed(out)
    for name, weight in weights.items():
        assert torch.equal(again[name].codes, weight.codes)
        assert torch.equal(again[name].dequantize(), weight.dequantize())
    wanted = run(exact, samples[4:])
    for optimised in (True, False):
        assert compare([wanted], [run(out, samples[4:], optimised)], []).relative_l2 < 0.05
    assert report.drop is not None
    assert report.drop.relative_l2 == compare([wanted], [run(out, samples[4:])], []).relative_l2
    model = onnx.load(out)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["pcq.mode"] == "int8"
    assert json.loads(metadata["pcq.int8"]).keys() == weights.keys()
    assert not [tensor.name for tensor in model.graph.initializer if "running" in tensor.name]


class Clipped(nn.Module):
    """A clip behind a depthwise layer whose outputs go beyond its bounds, read by a layer of large integers."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.deep, self.point = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.point(nn.functional.hardtanh(self.deep(x), self.low, self.high))
        return y


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, 2.0), (0.0, 1e4)])
def test_a_clip_before_seven_bits_is_clipped_in_codes(
    bounds: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Clipped(*bounds)
    weights = quantize(network, ("256 levels",))
    exact = tmp_path / "exact.onnx"
    write_onnx(network, weights, (torch.zeros(1, 8, 9, 9),), exact)
    batches = [torch.randn(8, 8, 9, 9) * scale for scale in (10, 30)]  # the second goes beyond what is observed
    made = {}
    for name in ("codes", "floats"):
        if name == "floats":
            monkeypatch.setattr(int8, "_outlasting", lambda after, span: None)
        report = write_int8(exact, tmp_path / f"{name}.onnx", lambda: batches[:1], max_drop=100)
        made[name] = report, run(report.path, batches, optimised=False)
    in_codes = bounds[1] < 1e4  # else they end far below the bound, and nothing needs clipping
    assert np.abs(run(exact, batches)).max() > 0
    assert (made["codes"][0].fused["QLinearConv"], made["codes"][0].unfused) == (2, 0)
    assert made["floats"][0].unfused == (1 if in_codes else 0)
    kinds = [dumped(made[name][0].path, tmp_path) for name in ("codes", "floats")]
    assert [each["Conv"] + each["FusedConv"] for each in kinds] == [0, int(in_codes)]
    assert made["codes"][0].seven_bits == ("point.weight",)
    assert np.array_equal(made["codes"][1], made["floats"][1])


def test_matrices_run_dynamically_without_samples(tmp_path: Path) -> None:
    network = Tokens()
    weights = quantize(network, ("ternary", "3 bit", "256 levels"))
    exact, out = tmp_path / "exact.onnx", tmp_path / "int8.onnx"
    write_onnx(network, weights, (torch.zeros(1, 7, 32),), exact)
    report = write_int8(exact, out, None)
    assert sum(report.fused.values()) == 3
    assert [layer.activations for layer in report.layers] == ["dynamic"] * 3
    assert report.drop is None
    x = [torch.randn(2, 7, 32)]
    assert compare([run(exact, x)], [run(out, x)], []).relative_l2 < 0.03
    assert dumped(out, tmp_path)["DynamicQuantizeLinear"] == 1  # shared by two layers
    meta = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"]).get_modelmeta()
    assert json.loads(meta.custom_metadata_map["pcq.int8"])["a.weight"] == "dynamic"


class Branches(nn.Module):
    """A layer, then one of two by what it puts out, then another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.d(torch.cond(x.sum() > 0, self.b, self.c, (x,)))  # type: ignore[no-any-return]


def test_layers_in_branches_stay_float(tmp_path: Path) -> None:
    network = Branches()
    weights = quantize(network, ("ternary", "3 bit"))
    exact, out = tmp_path / "exact.onnx", tmp_path / "int8.onnx"
    write_onnx(network, weights, (torch.zeros(1, 32),), exact, fold=False)
    samples = [torch.randn(2, 32) for _ in range(8)]
    report = write_int8(exact, out, lambda: samples, [(x, None) for x in samples], max_drop=100)
    said = {layer.weight: (layer.activations, layer.reason) for layer in report.layers}
    float_ = (None, "Gemm in a branch or a loop stays float")
    static = ("static", "")
    assert said == {"a.weight": static, "b.weight": float_, "c.weight": float_, "d.weight": static}


def test_float_layers_stay_float(residual: tuple[Path, Weights], samples: list[Tensor], tmp_path: Path) -> None:
    exact, _ = residual
    out = tmp_path / "int8.onnx"
    report = write_int8(exact, out, lambda: samples[:2], keep=("deep.*", "first"))
    assert report.fused == {"QLinearConv": 2, "QGemm": 1}
    assert dumped(out, tmp_path)["Conv"] == 2  # ONNX Runtime did not quantize them itself
    reasons = {layer.weight: layer.reason for layer in report.layers if layer.activations is None}
    assert reasons == dict.fromkeys(("stem.weight", "deep.weight"), "kept in float as asked")
    with pytest.raises(PcqError, match="'nothing' matches no layer"):
        write_int8(exact, out, lambda: samples[:2], keep=("nothing",))
    with pytest.raises(PcqError, match=rf"^{re.escape(str(out))}: .* need samples .* Give some: --calib"):
        write_int8(exact, out, None)


def test_what_costs_too_much_goes_back_worst_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's input has a number 10,000 times the others': its 8 bits see nothing else."""

    class Spiked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)
            self.c = nn.Conv2d(8, 6, 3)
            for layer in (self.a, self.b, self.c):
                nn.init.zeros_(layer.bias)
            nn.init.ones_(self.b.bias[:1])  # the spiked channel is alive

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.b(torch.relu(self.a(x))))
            x = x * torch.tensor([1e4, *[1.0] * 7])[:, None, None]
            return self.c(x)[:, :, 0, 0]

    network = Spiked()
    weights = quantize(network, ("255 levels",))
    weights["c.weight"].codes[:, 0] = 127  # the spiked channel counts for nothing
    network.c.weight.data.copy_(weights["c.weight"].dequantize())
    exact, out = tmp_path / "exact.onnx", tmp_path / "int8.onnx"
    write_onnx(network, weights, (torch.zeros(1, 4, 8, 8),), exact)
    x = torch.randn(544, 4, 8, 8)
    held_out: list[tuple[Tensor, Tensor | None]] = [(x[32:288], None), (x[288:], None)]
    ran, stages, outputs = [], [], int8_file.outputs

    def noted(path: Path, samples: drop.Samples, *rest: Any) -> drop.Outputs:
        ran.append((path, sum(len(drop.each_input(x)[0]) for x, _ in samples)))
        return outputs(path, samples, *rest)

    monkeypatch.setattr(int8_file, "outputs", noted)
    report = write_int8(exact, out, lambda: [x[:32]], held_out, max_drop=10, progress=lambda *one: stages.append(one))
    assert ran.count((exact, 512)) == 1  # however often it is compared with
    assert [one for one in stages if "measure" in one[0]][:3] == [("measure 3 layers in int8", i, 2) for i in range(3)]
    assert report.fallen_back == ("c.weight",)
    assert report.first_drop is not None
    assert report.drop is not None
    assert report.first_drop.points is not None
    assert report.drop.points is not None
    assert report.drop.points <= 10 < report.first_drop.points
    before = out.read_bytes()
    with pytest.raises(CheckFailed, match="no part of it stays within"):
        write_int8(exact, out, lambda: [x[:32] * 1e-3], held_out, max_drop=0)
    assert out.read_bytes() == before


class TwoHeads(nn.Module):
    """As a detector's. What enters ``box`` has a number 10,000 times the others: its 8 bits see nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cls, self.box = nn.Conv2d(4, 8, 3), nn.Linear(8, 6), nn.Conv2d(8, 4, 1)
        for layer in (self.a, self.cls, self.box):
            nn.init.zeros_(layer.bias)
        nn.init.ones_(self.a.bias[:1])  # the spiked channel is alive

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(self.a(x))
        spiked = x * torch.tensor([1e4, *[1.0] * 7])[:, None, None]
        logits = self.cls(x.mean((2, 3)))
        return logits, self.box(spiked), logits.argmax(1)


def two_heads(path: Path) -> None:
    network = TwoHeads()
    weights = quantize(network, ("255 levels",))
    weights["box.weight"].codes[:, 0] = 127  # the spiked channel counts for nothing
    network.box.weight.data.copy_(weights["box.weight"].dequantize())
    write_onnx(network, weights, (torch.zeros(1, 4, 8, 8),), path)


class Aside(nn.Module):
    """A map and another beside it, as a segmentation's auxiliary one: 8 bits see little of what enters either."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.main, self.aux = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.a(x))
        some, more = (torch.tensor([spike, *[1.0] * 7])[:, None, None] for spike in (10, 30))
        return self.main(x * some), self.aux(x * more)


def test_what_only_moves_an_output_that_does_not_count_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, exact, out = Aside(), tmp_path / "exact.onnx", tmp_path / "int8.onnx"
    weights = quantize(network, ("255 levels",))
    for name in ("main.weight", "aux.weight"):
        weights[name].codes[:, 0] = 127  # the spiked channel counts for nothing
        network.get_parameter(name).data.copy_(weights[name].dequantize())
    write_onnx(network, weights, (torch.zeros(1, 4, 8, 8),), exact)
    x = torch.randn(64, 4, 8, 8)
    report = write_int8(exact, out, lambda: [x[:32]], [(x[32:], None)], max_drop=0.2)
    assert report.first_drop is not None
    assert report.first_drop.points > 0.2
    assert report.first_drop.relative_l2 < 0.5
    assert report.fallen_back == ("main.weight",)


def test_every_output_is_measured(tmp_path: Path) -> None:
    """One that int8 destroys is not passed over because predictions come from another."""
    exact, out = tmp_path / "exact.onnx", tmp_path / "int8.onnx"
    two_heads(exact)
    x = torch.randn(96, 4, 8, 8)
    held_out: list[tuple[Tensor, Tensor | None]] = [(x[32:64], None), (x[64:], None)]
    report = write_int8(exact, out, lambda: [x[:32]], held_out, max_drop=100)
    assert report.fallen_back == ("box.weight",)
    assert report.first_drop is not None
    assert report.drop is not None
    assert report.first_drop.relative_l2 > 0.5 > 0.1 > report.drop.relative_l2
    assert report.drop.agreement is not None
    feed = {"x": x[32:].numpy()}
    ours, theirs = (verify.open_session(str(path), True).run(None, feed) for path in (out, exact))
    apart = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours[:2], theirs[:2], strict=True)]
    assert report.drop.relative_l2 == pytest.approx(max(apart), rel=1e-5)


def test_outputs_too_far_away_are_said_where_there_are_no_points(tmp_path: Path) -> None:
    exact, out = tmp_path / "exact.onnx", tmp_path / "int8.onnx"
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))  # a map
    weights = quantize(network, ("255 levels",))
    write_onnx(network, weights, (torch.zeros(1, 4, 8, 8),), exact)
    x = torch.randn(64, 4, 8, 8)
    with pytest.raises(CheckFailed, match=r"outputs move by (\d+|inf) % .*no part of it stays within .*up to 50 %"):
        write_int8(exact, out, lambda: [x[:32] * 1e-3], [(x[32:], None)], max_drop=100)
    assert not out.exists()


def test_the_drop_is_points_with_labels_and_agreement_without() -> None:
    exact, int8 = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[[0, 1, 2, 2]]
    labelled = compare([exact], [int8], [torch.tensor([0, 1]), torch.tensor([2, 2])])
    assert (labelled.exact, labelled.int8, labelled.points) == (75.0, 100.0, -25.0)
    assert compare([exact], [int8], [None]).points == 25.0
    maps, moved = exact.reshape(1, *exact.shape).repeat(3, 0), exact.reshape(1, *exact.shape).repeat(3, 0)
    maps[0] += 1
    moved[0] += 1.1
    variance = np.square(maps - maps.mean(0)).sum()
    assert compare([maps], [moved], [None]).points == pytest.approx(100 * 0.01 * exact.size / variance, rel=1e-5)
    assert compare([exact], [int8 * np.nan], [None]).relative_l2 == float("inf")


def test_how_many_of_the_sure_predictions_are_equal() -> None:
    """Of logits, and of probabilities, which a softmax would flatten."""
    logits = np.array([[9, 0, 0], [0, 9, -30], [0.1, 0, 0], [0, 0, 0.2]], np.float32)
    other = logits[[0, 0, 1, 3]]
    found = compare([logits], [other], [])
    assert (found.sure, found.sure_equal, found.agreement) == (2, 1, 50.0)
    shares = torch.from_numpy(logits).softmax(1).numpy()
    found = compare([shares], [shares[[0, 0, 1, 3]]], [])
    assert (found.sure, found.sure_equal, found.agreement) == (2, 1, 50.0)
    maps = logits.reshape(1, 4, 3).repeat(5, 0).clip(0)
    assert compare([maps], [maps * 1.1], []).sure == 0


def test_outputs_that_are_masked_have_no_distance() -> None:
    exact = np.random.default_rng(0).normal(size=(8, 3, 4)).astype(np.float32)
    hidden = np.arange(12).reshape(3, 4) % 5 == 0
    plain = compare([np.where(hidden, 0, exact)], [np.where(hidden, 0, exact * 1.01)], [])
    drop = compare([np.where(hidden, -np.inf, exact)], [np.where(hidden, -np.inf, exact * 1.01)], [])
    assert drop == plain
    assert drop.relative_l2 == pytest.approx(0.01, rel=1e-3)
    assert drop.explained is not None
    assert 99.9 < drop.explained < 100


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.booleans())
def test_ranges_hold_zero_and_lie_within_what_was_seen(seed: int, positive: bool) -> None:
    random = np.random.default_rng(seed)
    numbers = random.standard_t(3, 20_000)
    numbers = np.abs(numbers) if positive else numbers
    low, high = min(0.0, numbers.min()), numbers.max()
    counts = np.histogram(numbers, 2048, (low, high))[0].astype(float)

    def squared(span: Range) -> float:
        scale, zero = float(span.scale), float(span.zero_point)
        codes = np.clip(np.rint(numbers / scale) + zero, 0, 255)
        return float((((codes - zero) * scale - numbers) ** 2).sum())

    methods: tuple[Method, ...] = ("percentile", "mse", "entropy")
    spans = {method: narrowed(counts, low, high, method) for method in methods}
    for span in spans.values():
        assert low <= span.low <= 0 <= span.high <= high
        assert span.high - span.low > 0
    assert squared(spans["mse"]) <= squared(Range(low, high)) * 1.001
    assert squared(spans["mse"]) <= squared(spans["entropy"]) * 1.02


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_observed_ranges_are_those_of_all_batches_together(method: Method, tmp_path: Path) -> None:
    """Of an input, of what is computed within and of an output; 0 lies within, also where it was not seen."""
    nodes = [onnx.helper.make_node("Neg", ["x"], ["inner"]), onnx.helper.make_node("Exp", ["inner"], ["y"])]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 50]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "m.onnx")
    x = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)) / torch.tensor([1.0, 0.2, 4.0] * 10)[:, None]
    tops = {"y": 255, "x": 127, "inner": 63}
    found = observe(tmp_path / "m.onnx", tops, lambda: x.split(8), method)
    for name, numbers in {"x": x, "inner": -x, "y": (-x).exp()}.items():
        low, high = min(0.0, float(numbers.min())), float(numbers.max())
        counts = np.histogram(numbers.numpy(), 2048, (low, high))[0].astype(float)
        want = narrowed(counts, low, high, method, tops[name]) if method != "minmax" else Range(low, high, tops[name])
        assert found[name].top == tops[name]
        assert (found[name].low, found[name].high) == pytest.approx((want.low, want.high), rel=1e-2, abs=1e-2)
    assert observe(tmp_path / "m.onnx", {"x": 127}, lambda: x.split(8), method) == {"x": found["x"]}
    with pytest.raises(CheckFailed, match="not finite"):
        observe(tmp_path / "m.onnx", tops, lambda: [x, x * torch.inf], method)


@pytest.mark.parametrize(("low", "high"), [(-2.0, 3.0), (0.0, 3.0), (-2.0, 0.0)])
def test_percentiles_leave_as_little_as_they_may_at_either_end(low: float, high: float) -> None:
    counts = np.random.default_rng(0).integers(0, 20, 2048).astype(float)
    counts[:30] = counts[-30:] = 0
    span, edges, most = narrowed(counts, low, high, "percentile"), np.linspace(low, high, 2049), 1e-4 * counts.sum()
    for end, of, ends in (("low", edges[1:] <= span.low, low), ("high", edges[:-1] >= span.high, high)):
        assert counts[of].sum() < most or ends == 0, end
        assert ends or (span.low if end == "low" else span.high) == 0
    assert not low or counts[edges[:-1] <= span.low].sum() >= most
    assert not high or counts[edges[1:] >= span.high].sum() >= most


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_narrowed_ranges_are_a_slow_twins(method: Method, seed: int) -> None:
    """The best of 48 common factors, then of 48 for either end; losses bin by bin."""
    random, top = np.random.default_rng(seed), (15, 255)[seed % 2]
    numbers = random.standard_t(2 + seed // 2, 5_000)
    low, high = min(0.0, numbers.min()) * (seed != 3), numbers.max()
    counts, edges = np.histogram(numbers, 400, (low, high))
    share, middles, width = counts / counts.sum(), (edges[1:] + edges[:-1]) / 2, (high - low) / 400

    def loss(span: Range) -> float:
        scale, zero = float(span.scale), int(span.zero_point)
        codes = [min(max(round(x / scale) + zero, 0), top) for x in middles]
        if method == "mse":
            return float(sum(p * (x - (c - zero) * scale) ** 2 for p, x, c in zip(share, middles, codes, strict=True)))
        seen = [(p, c, span.low <= x <= span.high) for p, x, c in zip(share, middles, codes, strict=True)
                if p > 0 and abs(x) > 0.501 * width]  # fmt: skip
        apart = 0.0
        for p, c, inside in seen:
            fellows = [within for _, other, within in seen if other == c]
            whole = sum(q for q, other, _ in seen if other == c)
            apart += p * np.log(p / (whole / sum(fellows) if inside else 1e-9))
        return float(apart)

    parts = np.linspace(1, 0.1, 48)
    best = min((Range(low * part, high * part, top) for part in parts), key=loss)
    ends = [Range(best.low * a, best.high * b, top) for a, b in [(p, 1) for p in parts] + [(1, p) for p in parts]]
    assert loss(narrowed(counts.astype(float), low, high, method, top)) == pytest.approx(min(map(loss, ends)), rel=1e-9)


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_zeros_behind_a_relu_do_not_narrow_a_range(method: Method) -> None:
    """By all numbers' divergence 0 to 2.2 had been best of a Relu6's 0 to 6: its zeros weigh most, and are exact."""
    random = np.random.default_rng(0)
    numbers = np.where(random.random(50_000) < 0.9, 0, np.minimum(random.exponential(1.5, 50_000), 6))
    counts = np.histogram(numbers, 2048, (0, 6))[0].astype(float)
    assert narrowed(counts, 0, 6, method).high > 5


def test_codes_of_a_range_have_an_exact_zero() -> None:
    for low, high in ((-1.0, 2.0), (0.0, 6.0), (-3.0, 0.0), (0.0, 0.0)):
        span = Range(low, high)
        assert 0 <= int(span.zero_point) <= 255
        assert span.scale > 0
    assert Range(0.0, 6.0).zero_point == 0
    assert Range(-3.0, 0.0).zero_point == 255
    assert Range(-3.0, 0.0, 127).zero_point == 127
    assert Range(0.0, 6.0, 127).scale == np.float32(6 / 127)
