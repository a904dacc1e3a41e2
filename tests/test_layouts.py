"""Layouts: the planner's choices, and files of each layout on real networks, proved and refused."""

import json
import math
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import pcq
from pcq import cli
from pcq.demo import HERE
from pcq.errors import CheckFailed, PcqError
from pcq.export import layouts, open_packed, verify, write_onnx
from pcq.export.body import Lowered
from pcq.export.facts import RUNTIMES, target
from pcq.export.layouts import Aim, Choice, Need, options, plan
from pcq.export.nbits import blocks
from pcq.export.reading import decode
from pcq.export.scheme import describe, from_json, to_json
from pcq.export.typed import lower_dequantize, lower_native
from pcq.grids import Affine, Codebook, Grid
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
DIGITS = HERE / "digits-resnet8.safetensors"
TARGETS = [runtime.name for runtime in RUNTIMES]
AIMS: tuple[Aim, ...] = ("size", "speed", "ram")


# The planner


def grids(g: int) -> dict[str, Grid]:
    scale = torch.rand(g) + 0.1
    return {
        "binary": Affine(scale, 0.5, 2),
        "ternary": Affine(scale, 1.0, 3),
        "2 bit": Affine(scale, 1.5, 4),
        "3 bit": Affine(scale, 3.5, 8),
        "4 bit": Affine(scale, 7.5, 16),
        "4 bit around 8": Affine(scale, 8.0, 16),
        "zero points": Affine(scale, torch.randint(0, 16, (g,)).to(torch.uint8), 16),
        "half zero points": Affine(scale, torch.randint(0, 31, (g,)).half() / 2, 16),
        "2 bit half zero points": Affine(scale, torch.randint(0, 7, (g,)).half() / 2, 4),
        "8 bit": Affine(scale, 127.0, 255),
        "8 bit zero points": Affine(scale, torch.randint(0, 256, (g,)).to(torch.uint8), 256),
        "list": Codebook(torch.randn(1, 5).sort().values, scale),
    }


ROWS = {
    "tensor": Rows((32, 64), None),
    "channel": Rows((32, 64), 0),
    "groups": Rows((32, 64), 0, 1, 32),
    "ragged": Rows((32, 64), 0, 1, 24),
    "conv": Rows((16, 8, 3, 3), 0),
    "grouped conv": Rows((16, 8, 3, 3), 0, 1, 36),
    "transposed conv": Rows((16, 8, 3, 3), 1),
}


@st.composite
def all_needs(draw: st.DrawFn) -> list[Need]:
    found = []
    for i in range(draw(st.integers(1, 3))):
        rows = ROWS[draw(st.sampled_from([*ROWS]))]
        known = grids(rows.g)
        grid = known[draw(st.sampled_from([*known]))]
        matrix = len(rows.shape) == 2
        transposed = matrix and draw(st.booleans())
        reader = ("MatMul" if transposed else "Gemm") if matrix else ("ConvTranspose" if rows.axis == 1 else "Conv")
        others = draw(st.lists(st.sampled_from(["Gather in another way", "Conv"]), max_size=1))
        found.append(Need(str(i), grid, rows, transposed, tuple(dict.fromkeys([reader, *others]))))
    return found


@given(all_needs(), st.sampled_from(TARGETS))
@settings(max_examples=60, deadline=None)
def test_plans_keep_to_what_every_runtime_can(needs: list[Need], ort_version: str) -> None:
    goal = target(ort_version)
    exact = plan(needs, goal)
    assert {choice.layout for choice in exact.choices} == {"exact"}
    assert (exact.opset, exact.ir_version) == (20, 9)
    made = {aim: plan(needs, goal, aim=aim) for aim in AIMS}
    for one in made.values():
        assert all(one.opset <= min(r.opset, r.fast_opset) and one.ir_version <= r.ir_version for r in goal.runtimes)
        for choice, need in zip(one.choices, needs, strict=True):
            assert choice.name == need.name
            assert choice.reason
            if choice.layout == "native":
                assert choice.stored is not None
                spans = [runtime.folded_casts[choice.stored.kind] for runtime in goal.runtimes]
                assert all(low <= one.opset <= high for low, high in spans)
            if choice.layout == "low-memory":
                assert "MatMul" not in need.readers
                assert choice.resident < 4 * need.numel
            if choice.layout == "matmulnbits":
                assert set(need.readers) <= {"MatMul", "Gemm"}
                assert choice.reason.endswith("in float32")
    assert all(made["size"].nbytes <= other.nbytes for other in (exact, made["speed"]))
    assert all(made["ram"].resident <= other.resident for other in (exact, *made.values()))
    assert {choice.layout for choice in (*made["size"].choices, *made["speed"].choices)} <= {"exact", "native"}
    newer = plan(needs, target(TARGETS[-1]), aim="ram")
    assert newer.resident <= made["ram"].resident


def need(kind: str = "ternary", rows: str = "conv", reader: str = "Conv", transposed: bool = False) -> Need:
    return Need("w", grids(ROWS[rows].g)[kind], ROWS[rows], transposed, (reader,))


@pytest.mark.parametrize(
    ("ort_version", "layout", "kind", "stored", "opset"),
    [
        ("1.17", "low-memory", "ternary", "int8", 20),
        ("1.18", "low-memory", "ternary", "int8", 20),
        ("1.20", "low-memory", "ternary", "int4", 21),
        ("1.24", "low-memory", "ternary", "int4", 21),  # opset 25 has int2, and there slow convolutions
        ("1.26", "low-memory", "ternary", "int2", 25),
        ("1.26", "low-memory", "4 bit", "int8", 20),
        ("1.26", "low-memory", "4 bit around 8", "int4", 21),
        ("1.26", "low-memory", "zero points", "uint4", 21),
        ("1.23", "native", "ternary", "int4", 21),
        ("1.24", "native", "ternary", "int4", 21),
        ("1.26", "native", "ternary", "int2", 25),
        ("1.26", "native", "4 bit", "uint4", 21),
    ],
)
def test_types_by_target(ort_version: str, layout: layouts.Layout, kind: str, stored: str, opset: int) -> None:
    made = plan([need(kind)], target(ort_version), layout)
    (choice,) = made.choices
    assert choice.stored is not None
    assert (choice.layout, choice.stored.kind, made.opset) == (layout, stored, opset)


@pytest.mark.parametrize(
    ("ort_version", "layout", "given", "says"),
    [
        ("1.17", "native", need(), "on ONNX Runtime 1.17. Allowed: 1.23 and later. Give --target-ort 1.23"),
        ("1.22.1", "native", need(), "Allowed: 1.23 and later"),
        ("1.32", "native", need("8 bit"), "more than 4 bits are bytes already"),
        ("1.32", "native", need("list"), "its levels are a list"),
        ("1.32", "low-memory", need("ternary", "channel", "MatMul", True), "would run in int8, unasked"),
        ("1.32", "low-memory", need(reader="Gather in another way"), "Gather in another way reads it"),
        ("1.32", "low-memory", need("ternary", "ragged", "Gemm"), "has no such rows"),
        ("1.32", "matmulnbits", need(), "it multiplies matrices only). Allowed: exact, native, low-memory. Take"),
        ("1.17", "matmulnbits", need("list"), "). Allowed: exact. Take"),
        ("1.32", "matmulnbits", need("ternary", "ragged", "Gemm"), "its groups are no blocks of 128, 64, 32, 16"),
        ("1.22", "matmulnbits", need("8 bit", "channel", "Gemm"), "Allowed: 1.23 and later"),
    ],
)
def test_what_a_target_cannot_run_is_refused(ort_version: str, layout: layouts.Layout, given: Need, says: str) -> None:
    with pytest.raises(PcqError) as error:
        plan([given], target(ort_version), layout, level=1)
    assert says in str(error.value)
    assert error.value.exit_code == 2


@given(all_needs(), st.sampled_from(TARGETS), st.sampled_from(["native", "low-memory", "matmulnbits"]),
       st.sampled_from([1, 4]))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_nothing_is_refused_beforehand_that_could_be_laid_out(
    needs: list[Need], ort_version: str, layout: layouts.Layout, level: layouts.Level
) -> None:
    weights = {one.name: QuantizedTensor(torch.zeros(one.rows.shape, dtype=torch.uint8), one.grid, one.rows)
               for one in needs}  # fmt: skip
    goal = target(ort_version)
    try:
        plan(needs, goal, layout, level=level)
    except PcqError:
        return
    layouts.refuse(weights, goal, layout, level)


@pytest.mark.parametrize(
    ("ort_version", "layout", "says"),
    [
        ("1.17", "native", "cannot have the layout 'native' on ONNX Runtime 1.17. Allowed: 1.23 and later"),
        (
            "1.32",
            "matmulnbits",
            "no weight of this network can have the layout 'matmulnbits' (c.weight: not matmulnbits: it",
        ),
        ("1.16", "exact", "are not known to run on ONNX Runtime 1.16"),
        ("one", "exact", "'one' is not an ONNX Runtime version. Allowed: 1.17 to 1.32, such as 1.23"),
    ],
)
def test_refused_before_the_network_is_looked_at(
    ort_version: str, layout: layouts.Layout, says: str, tmp_path: Path
) -> None:
    """It is not even built, as its architecture cannot be: so it is not traced."""
    save_file({"c.weight": torch.randn(8, 4, 3, 3)}, tmp_path / "c.safetensors")
    made = pcq.quantize(tmp_path / "c.safetensors", "ternary-all", out=tmp_path / "q.safetensors").path
    with pytest.raises(PcqError, match=re.escape(says)):
        pcq.export_onnx(made, arch="no.such:network", layout=layout, target_ort=ort_version)
    weight = pcq.read_artifact(made).quantized["c.weight"]
    network = nn.Module()
    network.c = nn.Conv2d(4, 8, 3, bias=False)
    network.load_state_dict({"c.weight": weight.dequantize()})
    with pytest.raises(PcqError, match=re.escape(says)):
        write_onnx(network.eval(), {"c.weight": weight}, None, tmp_path / "m.onnx", layout=layout,
                   target_ort=ort_version)  # fmt: skip


def test_level_4_is_said() -> None:
    (choice,) = plan([need("ternary", "channel", "Gemm")], target("1.32"), "matmulnbits", level=4).choices
    assert choice.reason == "2 bits in blocks of 64, activations in int8"
    (choice,) = plan([need("4 bit", "channel", "Gemm")], target("1.32"), "matmulnbits", level=4).choices
    assert choice.reason == "4 bits in blocks of 64, in float32"  # zero between two levels: no int8 kernel


# What is stored


@pytest.mark.parametrize("rows", [*ROWS])
def test_every_layout_gives_the_very_bits_and_reads_back(rows: str) -> None:
    torch.manual_seed(0)
    goal, shape = target(TARGETS[-1]), ROWS[rows]
    matrix = len(shape.shape) == 2
    for kind, grid in grids(shape.g).items():
        weight = QuantizedTensor(torch.randint(0, grid.count, shape.shape, dtype=torch.uint8), grid, shape)
        for transposed in (False, True) if matrix and shape.groups == 1 else (False,):
            reader = ("MatMul" if transposed else "Gemm") if matrix else "ConvTranspose" if shape.axis == 1 else "Conv"
            for choice in options(Need("w", grid, shape, transposed, (reader,)), goal, 25, 1):
                if isinstance(choice, Choice) and choice.stored is not None:
                    _check(weight, choice, transposed and choice.layout != "matmulnbits", kind)


def _check(weight: QuantizedTensor, choice: Choice, transposed: bool, kind: str) -> None:
    assert choice.stored is not None
    scheme = describe(weight, "f", transposed, choice.layout, choice.stored)
    assert from_json(to_json({"w": scheme}), "here") == {"w": scheme}
    if choice.layout == "matmulnbits":
        arrays = blocks(weight, choice.stored, 1).arrays
    else:
        lowering = lower_native if choice.layout == "native" else lower_dequantize
        lowered = lowering(weight, choice.stored, 25, transposed)
        arrays = lowered.arrays
        got, wanted = _run(lowered), weight.dequantize().numpy()
        wanted = np.ascontiguousarray(wanted.T) if transposed else wanted
        np.testing.assert_array_equal(got.view(np.int32), wanted.view(np.int32), err_msg=f"{choice} {kind}")
    assert sum(ir.tensor(array).nbytes for array in arrays.values()) == choice.nbytes, (choice, kind)
    read = decode(scheme, {key: np.asarray(array) for key, array in arrays.items()})
    assert torch.equal(read.codes, weight.codes)
    assert verify._same(read.grid, weight.grid), (choice, kind)
    assert read.rows == weight.rows


def _run(lowered: Lowered) -> np.ndarray:
    parts = [ir.Value(name=key, const_value=ir.tensor(array, name=key)) for key, array in lowered.arrays.items()]
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(lowered.shape))
    given = ir.convenience.convert_attributes(lowered.attributes)
    node = ir.Node("pcq", lowered.function.name, parts, given, outputs=[y])
    graph = ir.Graph([], [y], nodes=[node], initializers=parts, opset_imports={"": 25, "pcq": 1}, name="g")
    proto = ir.to_proto(ir.Model(graph, ir_version=13, functions=[lowered.function]))
    onnx.checker.check_model(proto, full_check=True)
    (got,) = ort.InferenceSession(proto.SerializeToString()).run(None, {})
    return got


def test_damaged_integers_are_noticed() -> None:
    rows = ROWS["channel"]
    weight = QuantizedTensor(torch.randint(0, 4, rows.shape, dtype=torch.uint8), grids(rows.g)["2 bit"], rows)
    (choice,) = plan([Need("w", weight.grid, rows, False, ("Gemm",))], target("1.32"), "low-memory").choices
    assert choice.stored is not None
    assert choice.stored.unit == 2
    arrays = lower_dequantize(weight, choice.stored, 21).arrays
    scheme = describe(weight, "f", False, choice.layout, choice.stored)
    with pytest.raises(ValueError, match="an integer that no code gives"):
        decode(scheme, {**arrays, "packed": (arrays["packed"].astype(np.int8) + 1)})
    with pytest.raises(ValueError, match="its zero point is another one"):
        decode(scheme, {**arrays, "zero_point": np.ones(rows.g, np.uint8)})


# Files


class Mlp(nn.Module):
    """MatMul and Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(torch.relu(self.a(x)).mean(1))
        return logits


def _mlp(kinds: tuple[str, str]) -> tuple[nn.Module, dict[str, QuantizedTensor]]:
    torch.manual_seed(0)
    network, weights = Mlp().eval(), {}
    for name, kind in zip(("a.weight", "b.weight"), kinds, strict=True):
        parameter = network.get_parameter(name)
        rows = Rows(tuple(parameter.shape), 0)
        grid = grids(rows.g)[kind]
        weights[name] = QuantizedTensor(torch.randint(0, grid.count, rows.shape, dtype=torch.uint8), grid, rows)
        parameter.data.copy_(weights[name].dequantize())
    return network, weights


@pytest.mark.parametrize("level", [1, 4])
def test_matmulnbits_says_what_it_costs(tmp_path: Path, level: layouts.Level) -> None:
    network, weights = _mlp(("ternary", "zero points"))
    report = write_onnx(network, weights, (torch.zeros(1, 5, 48),), tmp_path / "m.onnx", target_ort="1.32",
                        layout="matmulnbits", level=level)  # fmt: skip
    assert [row.layout for row in report.tensors] == ["matmulnbits"] * 2
    assert report.error < 1e-6
    assert (report.level4 is None) is (level == 1)
    if report.level4 is not None:
        assert 1e-4 < report.level4.relative_l2 < 0.05
    nodes = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 2
    assert {next(one.i for one in node.attribute if one.name == "accuracy_level") for node in nodes} == {level}
    assert list(tmp_path.iterdir()) == [report.path]
    packed = sum(row.nbytes for row in report.tensors)
    assert packed < report.resident < 4 * sum(weight.numel for weight in weights.values())


def test_the_layout_for_size_counts_functions(tmp_path: Path) -> None:
    """A ternary weight takes 1.6 bits in bytes and 2 in ONNX's own type, but its function is longer."""
    network, weights = _mlp(("ternary", "ternary"))
    needs = [Need(name, weight.grid, weight.rows, False, ("Gemm",)) for name, weight in weights.items()]
    assert {choice.layout for choice in plan(needs, target("1.32"), aim="size").choices} == {"exact"}
    report = write_onnx(network, weights, (torch.zeros(1, 5, 48),), tmp_path / "m.onnx", target_ort="1.32", aim="size")
    assert [row.layout for row in report.tensors] == ["native", "native"]
    assert abs(report.nbytes - report.predicted) < 1000


def test_int8_arithmetic_that_nobody_asked_for_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planner refuses before MatMul is what ONNX Runtime would do."""
    network, weights = _mlp(("4 bit around 8", "4 bit around 8"))
    low = layouts._low_memory

    def unaware(need: Need, *rest: object) -> object:
        return low(Need(need.name, need.grid, need.rows, need.transposed, ("Gemm",)), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(layouts, "_low_memory", unaware)
    with pytest.raises(CheckFailed, match=r"outputs differ from torch|does not keep this weight packed"):
        write_onnx(network, weights, (torch.zeros(1, 5, 48),), tmp_path / "m.onnx", target_ort="1.32",
                   layout="low-memory")  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network in ternary, first and last layer in 8 bits."""
    folder = tmp_path_factory.mktemp("digits")
    return pcq.quantize(DIGITS, "ternary", arch=ARCH, out=folder / "net.ternary.safetensors").path


def _optimised(path: Path, folder: Path) -> onnx.GraphProto:
    verify.open_session(str(path), optimised=True, dump=folder / "optimised.onnx")
    return onnx.load_model(folder / "optimised.onnx", load_external_data=False).graph


@pytest.mark.parametrize(
    ("options", "layouts_wanted", "kept"),
    [
        (("--mode", "native", "--target-ort", "1.26"), {"native", "exact"}, False),
        (("--mode", "low-memory"), {"low-memory"}, True),
        (("--optimize", "ram", "--target-ort", "1.32"), {"low-memory"}, True),
        (("--optimize", "speed", "--target-ort", "1.23"), {"native", "exact"}, False),
        (("--optimize", "size", "--target-ort", "1.32"), {"exact"}, False),
    ],
)
def test_a_real_network_in_each_layout(
    ternary: Path, tmp_path: Path, options: tuple[str, ...], layouts_wanted: set[str], kept: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "net.onnx"
    command = ["export", str(ternary), str(out), "--onnx", "--arch", ARCH, "--input", "1x8x8", *options]
    assert cli.run([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {row["layout"] for row in said["tensors"]} == layouts_wanted
    assert all(row["reason"] for row in said["tensors"])
    assert said["bytes"] == out.stat().st_size
    assert abs(said["bytes"] - said["bytes_predicted"]) < 0.05 * said["bytes"] + 1024
    file, artifact = open_packed(out), pcq.checkpoint.read_artifact(ternary).quantized
    assert all(torch.equal(file.weights[name].codes, weight.codes) for name, weight in artifact.items())
    graph = _optimised(out, tmp_path)
    packed = {tensor.name for tensor in graph.initializer if tensor.name.endswith("/packed")}
    assert packed == ({f"{name}/packed" for name in artifact} if kept else set())
    held = sum(math.prod(t.dims) * {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 22: 0.5, 25: 0.25, 26: 0.25}.get(t.data_type, 4)
               for t in graph.initializer)  # fmt: skip
    assert held == pytest.approx(said["memory"]["resident"], rel=0.1, abs=4096)
    assert cli.run(["inspect", str(out), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["kind"] == "packed ONNX"
    assert dict(map(tuple, seen["facts"]))["weights in memory, predicted"] == f"{said['memory']['resident']:,} bytes"
    assert cli.run(["eval", str(out), "--data", "digits", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert cli.run(["eval", str(ternary), "--arch", ARCH, "--data", "digits", "--json"]) == 0
    assert scores["top1"] == json.loads(capsys.readouterr().out)["top1"]


def test_the_plan_is_printed(ternary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(ternary), str(tmp_path / "m.onnx"), "--onnx", "--arch", ARCH, "--input", "1x8x8"]
    assert cli.run([*command, "--mode", "low-memory"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "low-memory" in out
    assert "loads shorter than float: codes stay packed" in out
    assert "more for a moment in every run" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--mode", "native"), "Allowed: 1.23 and later. Give --target-ort 1.23"),
        (("--mode", "native", "--optimize", "ram"), "--mode and --optimize both choose the layout"),
        (("--accuracy-level", "1"), "it belongs to --mode matmulnbits"),
        (("--mode", "matmulnbits", "--accuracy-level", "3"), "Allowed: 1 (float32) or 4"),
        (("--optimize", "ram", "--calib", "digits"), "it belongs to --mode int8"),
        (("--mode", "low-memory", "--target-ort", "1.16"), "are not known to run on ONNX Runtime 1.16"),
    ],
)
def test_mistakes(
    ternary: Path, tmp_path: Path, options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(ternary), str(tmp_path / "m.onnx"), "--onnx", "--arch", ARCH, "--input", "1x8x8"]
    assert cli.run([*command, *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_damage(ternary: Path, tmp_path: Path) -> None:
    pcq.export_onnx(ternary, tmp_path / "m.onnx", arch=ARCH, input_shape=(1, 8, 8), layout="low-memory")
    model = onnx.load(tmp_path / "m.onnx")
    packed = next(tensor for tensor in model.graph.initializer if tensor.name == "layer1.0.conv1.weight/packed")
    packed.raw_data = bytes([packed.raw_data[0] ^ 1]) + packed.raw_data[1:]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(CheckFailed, match=r"layer1\.0\.conv1\.weight: its packed weight is damaged"):
        open_packed(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        ((), ("exact", None, False)),
        (("--optimize", "speed"), ("exact", "speed", False)),
        (("--optimize", "speed", "--calib", "digits"), ("exact", None, True)),
        (("--mode", "int8", "--calib", "digits"), ("exact", None, True)),
        (("--mode", "low-memory"), ("low-memory", None, False)),
    ],
)
def test_options_become_arguments(
    options: tuple[str, ...], passed: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def export(*_: object, **given: object) -> None:
        seen.update(given)
        raise PcqError("enough")

    monkeypatch.setattr(pcq.commands, "export_onnx", export)
    assert cli.run(["export", "x.safetensors", "--onnx", *options]) == 2
    assert (seen["layout"], seen["aim"], seen["int8"] is not None) == passed
