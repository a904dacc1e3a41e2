"""ONNX in, ONNX out: weights wherever other tools put them are found, packed and proved; what is not is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pcq import cli
from pcq.commands import FileView, inspect, plan_onnx, quantize_onnx
from pcq.errors import CheckFailed, PcqError
from pcq.export import read_packed
from pcq.onnx_input import detect, graph, open_graph, packing, trials
from pcq.plan import Kept


def normal(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.asarray(np.random.standard_normal(shape), dtype)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    tensors: dict[str, np.ndarray],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[str],
    opset: int = 17,
    ir_version: int = 8,
    kind: int = TensorProto.FLOAT,
    **external: object,
) -> Path:
    made = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, made, [numpy_helper.from_array(a, n) for n, a in tensors.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    model.metadata_props.add(key="author", value="somebody else")
    onnx.save(model, path, **external)
    return path


def images(*shape: object, kind: int = TensorProto.FLOAT, name: str = "x") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def convolutions(
    path: Path, opset: int = 17, ir_version: int = 8, dtype: type = np.float32, **external: object
) -> Path:
    """Conv, grouped ConvTranspose, and a MatMul, in float32 or float16."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["h"], pads=[1] * 4),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("ConvTranspose", ["r", "t"], ["u"], group=4),
        helper.make_node("ReduceMean", ["u"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    tensors = {
        "c": normal(48, 3, 3, 3, dtype=dtype),
        "t": normal(48, 16, 2, 2, dtype=dtype),
        "w": normal(64, 40, dtype=dtype),
    }
    return save(path, nodes, tensors, [images("n", 3, 8, 8, kind=kind)], ["y"], opset, ir_version, kind, **external)


def words(path: Path) -> Path:
    """An embedding that is also the head's weight, an LSTM, and a Gemm without transB."""
    nodes = [
        helper.make_node("Gather", ["emb", "x"], ["e"]),
        helper.make_node("Transpose", ["e"], ["s"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["s", "W", "R", "B"], ["", "h"], hidden_size=24),
        helper.make_node("Squeeze", ["h", "axis"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "g"], ["z"]),
        helper.make_node("Identity", ["emb"], ["same"]),
        helper.make_node("Transpose", ["same"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["z", "head"], ["y"]),
    ]
    tensors = {
        "emb": normal(50, 24), "W": normal(1, 96, 24), "R": normal(1, 96, 24), "B": normal(1, 192),
        "g": normal(24, 24), "axis": np.array([0]),
    }  # fmt: skip
    return save(path, nodes, tensors, [images("n", 6, kind=TensorProto.INT64)], ["y"])


def branches(path: Path) -> Path:
    """Weights in Constants of both branches of an If, chosen by an input; one is sliced and joined again."""

    def branch(name: str, reorder: bool) -> onnx.GraphProto:
        held = numpy_helper.from_array(normal(32, 40), f"{name} w")
        nodes = [helper.make_node("Constant", [], [f"{name}.w"], value=held)]
        last = f"{name}.w"
        if reorder:
            for i, ends in enumerate(((0, 16), (16, 32))):
                for part, value in zip(("s", "e"), ends, strict=True):
                    nodes.append(helper.make_node("Constant", [], [f"{name}{part}{i}"], value_ints=[value]))
                nodes.append(helper.make_node("Slice", [last, f"{name}s{i}", f"{name}e{i}"], [f"{name}.part{i}"]))
            nodes.append(helper.make_node("Concat", [f"{name}.part1", f"{name}.part0"], [f"{name}.joined"], axis=0))
            last = f"{name}.joined"
        nodes.append(helper.make_node("MatMul", ["x", last], [f"{name}.y"]))
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)])

    nodes = [
        helper.make_node("Equal", ["rate", "sixteen"], ["wide"]),
        helper.make_node("If", ["wide"], ["y"], then_branch=branch("a", False), else_branch=branch("b", True)),
    ]
    inputs = [images("n", 32), helper.make_tensor_value_info("rate", TensorProto.INT64, [])]
    return save(path, nodes, {"sixteen": np.array(16000)}, inputs, ["y"])


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (convolutions, {"c": (48, 3, 3, 3), "t": (48, 16, 2, 2), "w": (40, 64)}),
        (words, {"emb": (50, 24), "W": (96, 24), "R": (96, 24), "g": (24, 24)}),
        (branches, {"a.w": (40, 32), "b.w": (40, 32)}),
    ],
)
def test_weights_are_found_packed_and_proved(
    tmp_path: Path, make: Callable[[Path], Path], names: dict[str, tuple[int, ...]]
) -> None:
    path = make(tmp_path / "model.onnx")
    before = path.read_bytes()
    result = quantize_onnx(path, "w4")
    assert result.path == tmp_path / "model.w4.onnx"
    assert {row.name: row.shape for row in result.ledger} == names
    read = read_packed(result.path)
    assert {name: tuple(weight.codes.shape) for name, weight in read.items()} == names
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.w4.onnx"]
    assert max(run.error for run in result.proof.agreements) < 1e-5
    old, new = onnx.load(path), onnx.load(result.path)
    assert [o.version for o in new.opset_import if not o.domain] == [o.version for o in old.opset_import]
    assert [i.SerializeToString() for i in new.graph.input] == [i.SerializeToString() for i in old.graph.input]
    assert [o.name for o in new.graph.output] == [o.name for o in old.graph.output]
    kept = {node.name for node in old.graph.node if node.op_type not in ("Transpose", "Identity")}
    assert kept <= {node.name for node in new.graph.node}
    assert ort.InferenceSession(result.path).get_modelmeta().custom_metadata_map["author"] == "somebody else"


def test_every_branch_is_run(tmp_path: Path) -> None:
    result = quantize_onnx(branches(tmp_path / "m.onnx"), "w8")
    found = trials.find_trials(tmp_path / "m.onnx", open_graph(tmp_path / "m.onnx").model)
    assert {int(trial.feed["rate"]) for trial in found} == {16000, 8000}
    assert {trial.batch for trial in found} == {1, 3}
    assert len(result.proof.agreements) == 2 * len(found)


@pytest.mark.parametrize("constant", [False, True])
def test_branches_may_use_the_same_names(tmp_path: Path, constant: bool) -> None:
    def branch(name: str, width: int) -> onnx.GraphProto:
        tensors = [numpy_helper.from_array(normal(32, width), "w"), numpy_helper.from_array(normal(width, 40), "v")]
        held = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors if constant]
        nodes = [*held, helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], [name])]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        return helper.make_graph(nodes, name, [], made, [] if constant else tensors)

    chosen = helper.make_node("If", ["c"], ["y"], then_branch=branch("a", 48), else_branch=branch("b", 2))
    inputs = [images("n", 32), helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    path = save(tmp_path / "m.onnx", [chosen], {}, inputs, ["y"])
    result = quantize_onnx(path, "w8")
    chosen_by = [bool(trial.feed["c"]) for trial in trials.find_trials(path, open_graph(path).model)]
    assert sorted(chosen_by) == [False, False, True, True]  # each branch runs, on one sample and on three
    kept = {e.parameter.shape: e.reason for e in result.planned.plan.entries if isinstance(e, Kept)}
    assert {row.shape for row in result.ledger} == {(48, 32), (40, 48)}
    assert kept == dict.fromkeys([(2, 32), (40, 2)], "too small to gain by packing")
    before, after = ort.InferenceSession(path), ort.InferenceSession(result.path)
    for c in (False, True):
        feed = {"x": normal(3, 32), "c": np.array(c)}
        want, got = (session.run(None, feed)[0] for session in (before, after))
        assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
    tensors = plan_onnx(path, "w8").source.entries
    assert {tuple(tensor.read().shape) for tensor in tensors.values()} == {(2, 32), (40, 2), (48, 32), (40, 48)}


def compared(path: Path, kind: int, as_: int, bound: np.ndarray, samples: object = 1) -> Path:
    """An integer that is cast and compared with a constant."""
    nodes = [
        helper.make_node("Cast", ["i"], ["j"], to=as_),
        helper.make_node("Greater", ["j", "bound"], ["more"]),
        helper.make_node("Cast", ["more"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    inputs = [images("n", 64), images(samples, 1, kind=kind, name="i")]
    return save(path, nodes, {"bound": bound, "w": normal(64, 64)}, inputs, ["y"])


@pytest.mark.parametrize("bound", [np.inf, -np.inf, np.nan])
def test_a_number_compared_with_infinity(tmp_path: Path, bound: float) -> None:
    path = compared(tmp_path / "m.onnx", TensorProto.INT64, TensorProto.FLOAT, np.float32(bound))
    assert [row.name for row in quantize_onnx(path, "w8").ledger] == ["w"]


@pytest.mark.parametrize(
    ("kind", "as_", "bound"),
    [("UINT8", "INT64", np.array(300)), ("INT8", "FLOAT", np.float32(-3e9)), ("INT64", "FLOAT", np.float32(3e38))],
)
def test_a_number_compared_with_what_it_cannot_be(tmp_path: Path, kind: str, as_: str, bound: np.ndarray) -> None:
    path = compared(tmp_path / "m.onnx", TensorProto.DataType.Value(kind), TensorProto.DataType.Value(as_), bound)
    assert [row.name for row in quantize_onnx(path, "w8").ledger] == ["w"]


def test_shapes_that_would_fill_a_memory_are_not_tried(tmp_path: Path) -> None:
    """Of pictures of any size, of which those of 64 points alone run."""
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(192, 40)}, [images("n", 3, "h", "w")], ["y"])
    for batch in (1, 3):
        tried = [math.prod(shapes["x"]) for shapes in trials._shapes(trials.input_session(path), batch)]
        assert max(tried) == batch * 3 * 640 * 640
    found = trials.find_trials(path, open_graph(path).model)
    assert {math.prod(trial.feed["x"].shape[2:]) for trial in found} == {64}
    sound = save(tmp_path / "s.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(16000, 3)},
                 [images("n", "t")], ["y"])  # fmt: skip
    assert quantize_onnx(sound, "w8").ledger[0].name == "w"


def test_a_refusal_says_what_the_graph_says(tmp_path: Path) -> None:
    """Of weights that no rule can quantize, why, as `inspect` does."""
    nodes = [helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(64, 64)}, [images("n", 64)], ["y"])
    with pytest.raises(PcqError, match=r"matches only what cannot be quantized \(w: an operand of Einsum\)"):
        quantize_onnx(path, "w4")


def test_half_precision_stays(tmp_path: Path) -> None:
    result = quantize_onnx(convolutions(tmp_path / "m.onnx", dtype=np.float16), "w8")
    assert {row.name for row in result.ledger} == {"c", "t", "w"}
    x = normal(2, 3, 8, 8, dtype=np.float16)
    (y,) = ort.InferenceSession(result.path).run(None, {"x": x})
    assert y.dtype == np.float16


@pytest.mark.parametrize("detected", [False, True])
def test_what_is_rounded_on_its_way_to_a_layer_stays_so(tmp_path: Path, detected: bool) -> None:
    """A weight of two layers, one of which reads it through float16 and back."""
    nodes = [
        helper.make_node("Cast", ["w"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["rounded"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "rounded"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    levels = np.random.choice([-1, 0, 1], (64, 64)).astype(np.float32) * np.float32(0.1)
    path = save(tmp_path / "m.onnx", nodes, {"w": levels}, [images("n", 64)], ["y", "a"])
    result = quantize_onnx(path, None if detected else "w8", detect=detected)
    x = normal(3, 64)
    before, after = (ort.InferenceSession(each).run(None, {"x": x}) for each in (path, result.path))
    assert all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(before, after, strict=True))


def test_a_tied_weight_in_half_precision(tmp_path: Path) -> None:
    """Read as it is by one layer and transposed by the other, both in float16."""
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["e"]),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "t"], ["y"]),
    ]
    ids = images("n", "t", kind=TensorProto.INT64, name="ids")
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(80, 64, dtype=np.float16)}, [ids], ["y"], kind=10)
    assert [row.name for row in quantize_onnx(path, "w8").ledger] == ["w"]


def test_external_data(tmp_path: Path) -> None:
    """Of what is packed and of what stays float, biases here; torch.onnx.export writes all of it so."""
    path = convolutions(tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert quantize_onnx(path, "w8", out=tmp_path / "w8.onnx").bytes_before > 20_000
    assert quantize_onnx(path, "w8", calibration="random").calibrated is not None
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:-1])
    for use in (lambda: quantize_onnx(path, "w8"), lambda: inspect(path)):
        with pytest.raises(PcqError, match=rf"is cut off: .*m\.data has {len(data) - 1:,} bytes of {len(data):,}\."):
            use()
    (tmp_path / "m.data").unlink()
    with pytest.raises(PcqError, match=r"its external data is missing: .*m\.data"):
        quantize_onnx(path, "w8")


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    """In branches too."""
    places = numpy_helper.from_array(np.arange(40), "w")
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(normal(40), "w"), places, [64, 64])

    def body(name: str) -> onnx.GraphProto:
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        nodes = [helper.make_node("MatMul", ["x", "w"], [name])]
        return helper.make_graph(nodes, name, [], made, sparse_initializer=[sparse])

    chosen = helper.make_node("If", ["c"], ["y"], then_branch=body("a"), else_branch=body("b"))
    path = save(tmp_path / "m.onnx", [chosen], {"c": np.array(True)}, [images("n", 64)], ["y"])
    for use in (lambda: quantize_onnx(path, "w8"), lambda: inspect(path)):
        with pytest.raises(PcqError, match="2 of its tensors are stored as sparse ones, such as 'w'. Allowed: dense"):
            use()


def test_an_old_operator_set_is_raised_and_said(tmp_path: Path) -> None:
    path = convolutions(tmp_path / "m.onnx", opset=11, ir_version=6)
    result = quantize_onnx(path, "w8")
    assert (result.proof.opset, result.proof.ir_version) == (12, 8)
    assert result.planned.notes == (
        "Raised the operator set from 11 to 12: packed weights need it.",
        "Raised the IR version from 6 to 8: packed weights need it.",
    )


def test_lines_of_source_code_are_left_out_and_said(tmp_path: Path) -> None:
    """As torch.onnx.export(dynamo=True) writes them, often more bytes than packed weights; none are predicted."""
    path = convolutions(tmp_path / "m.onnx")
    model = onnx.load(path)
    for node in model.graph.node:
        trace = 200 * 'File "/home/me/net.py", line 3'
        for key, value in {"pkg.torch.onnx.stack_trace": trace, "namespace": ": net.Net", "mine": "1"}.items():
            node.metadata_props.add(key=key, value=value)
    model.ir_version = 10
    onnx.save(model, path)
    result = quantize_onnx(path, "w8")
    assert any("lines of source code" in note for note in result.planned.notes)
    kept = [entry.key for node in onnx.load(result.path).graph.node for entry in node.metadata_props]
    assert set(kept) == {"mine"}
    assert result.proof.nbytes < path.stat().st_size - 6000


def test_old_attributes_become_inputs(tmp_path: Path) -> None:
    """Clip is what there is to convert."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Clip", ["h"], ["y"], min=0.0, max=6.0)]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(64, 64)}, [images("n", 64)], ["y"], 9, 4)
    assert quantize_onnx(path, "w8").proof.opset == 12


def enlarged(path: Path, opset: int, mode: str, factor: float, branch: bool) -> Path:
    """A convolution whose output an old Resize or Upsample enlarges; or both branches of an If do."""
    kind = "Upsample" if opset < 10 else "Resize"

    def resize(name: str) -> onnx.NodeProto:
        if opset < 9:
            return helper.make_node(kind, ["h"], [name], mode=mode, scales=[1.0, 1.0, factor, factor])
        return helper.make_node(kind, ["h", "s"], [name], mode=mode)

    def body(name: str) -> onnx.GraphProto:
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        return helper.make_graph([resize(name)], name, [], made)

    choice = helper.make_node("If", ["c"], ["y"], then_branch=body("a"), else_branch=body("b"))
    nodes = [helper.make_node("Conv", ["x", "w"], ["h"]), choice if branch else resize("y")]
    tensors = {"w": normal(32, 3, 3, 3), "c": np.array(True)}
    tensors |= {"s": np.array([1, 1, factor, factor], np.float32)} if opset >= 9 else {}
    return save(path, nodes, tensors, [images("n", 3, 8, 8)], ["y"], opset, 4)


@pytest.mark.parametrize("opset", [8, 9, 10])
@pytest.mark.parametrize(("mode", "factor"), [("linear", 2.0), ("nearest", 1.5)])
@pytest.mark.parametrize("branch", [False, True])
def test_old_resizing_stays_what_it_was(tmp_path: Path, opset: int, mode: str, factor: float, branch: bool) -> None:
    path = enlarged(tmp_path / "m.onnx", opset, mode, factor, branch)
    result = quantize_onnx(path, "w8")
    assert result.proof.opset == 12
    assert result.proof.drift < 0.01


@pytest.mark.parametrize("calibration", [None, "random"])
def test_a_model_that_raising_changes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: str | None
) -> None:
    path = enlarged(tmp_path / "m.onnx", 10, "linear", 2.0, False)
    monkeypatch.setattr(graph, "OLD_RESIZE", {})
    with pytest.raises(PcqError, match=r"raised from operator set 10 to 12 it computes something else: outputs differ"):
        quantize_onnx(path, "w8", calibration=calibration)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_that_are_no_longer_inputs_are_said(tmp_path: Path, ir_version: int) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs = [images("n", 64), images(64, 64, name="w")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(64, 64)}, inputs, ["y"], 12, ir_version)
    result = quantize_onnx(path, "w8")
    assert result.planned.notes[-1:] == ("Weights that are no longer listed as inputs: 1.",)
    assert [value.name for value in onnx.load(result.path).graph.input] == ["x"]


def test_what_stays_float_has_a_reason(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "stack"], ["a"]),
        helper.make_node("Mul", ["a", "gain"], ["b"]),
        helper.make_node("MatMul", ["b", "added"], ["c"]),
        helper.make_node("Add", ["c", "added"], ["y"]),
        helper.make_node("Transpose", ["both"], ["turned"]),
        helper.make_node("MatMul", ["y", "turned"], ["z"]),
        helper.make_node("MatMul", ["z", "both"], ["z2"]),
        helper.make_node("MatMul", ["z2", "w"], ["q"]),
        helper.make_node("MatMul", ["q", "tiny"], ["p"]),
    ]
    tensors = {
        "stack": normal(2, 30, 30), "gain": normal(30, 30), "both": normal(30, 30), "added": normal(30, 30),
        "w": normal(30, 40), "tiny": normal(40, 2),
    }  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, tensors, [images(2, 30, 30)], ["p"])
    planned = plan_onnx(path, "w4")
    kept = {entry.parameter.name: entry.reason for entry in planned.plan.entries if isinstance(entry, Kept)}
    assert kept == {
        "stack": "a 3-dimensional operand of MatMul",
        "gain": "an operand of Mul",
        "both": "layers read it in different arrangements",
        "tiny": "too small to gain by packing",
    }
    result = quantize_onnx(path, "w4")  # what the weight's other readers see is dequantized as well
    assert {row.name for row in result.ledger} == {"added", "w"}


def test_weights_without_numbers_stay(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}y"]) for name in ("none", "w")]
    nodes.append(helper.make_node("Concat", ["noney", "wy"], ["y"], axis=1))
    path = save(tmp_path / "m.onnx", nodes, {"none": normal(64, 0), "w": normal(64, 64)}, [images("n", 64)], ["y"])
    assert [row.name for row in quantize_onnx(path, "w8").ledger] == ["w"]


@pytest.mark.parametrize("parts", [("packed", "scale"), ("zero_point",), ("transposed",), ("turned",)])
def test_names_that_packing_uses_may_be_taken(tmp_path: Path, parts: tuple[str, ...]) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["0"]), helper.make_node("Gemm", ["0", "w"], ["1"], transB=1)]
    for i, part in enumerate(parts):
        nodes.append(helper.make_node("Add", [f"{i + 1}", f"w/{part}"], [f"{i + 2}"]))
    nodes.append(helper.make_node("MatMul", [f"{len(parts) + 1}", "v"], ["y"]))
    tensors = {"w": normal(64, 64), "v": normal(64, 64)} | {f"w/{part}": normal(64) for part in parts}
    path = save(tmp_path / "m.onnx", nodes, tensors, [images("n", 64)], ["y"])
    result = quantize_onnx(path, "w4")
    assert [row.name for row in result.ledger] == ["w_2", "v"]
    assert set(read_packed(result.path)) == {"w_2", "v"}
    view = inspect(result.path)
    assert isinstance(view, FileView)
    assert [row.name for row in view.tensors] == ["w_2", "v"]


def test_quantized_and_packed_models_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    tensors = {"q": np.ones((4, 4), np.int8), "scale": np.array(0.5, np.float32)}
    path = save(tmp_path / "qdq.onnx", nodes, tensors, [images("n", 4)], ["y"])
    with pytest.raises(PcqError, match=r"quantized already \(1 DequantizeLinear\)"):
        quantize_onnx(path, "w8")
    packed = quantize_onnx(convolutions(tmp_path / "m.onnx"), "w8").path
    with pytest.raises(PcqError, match="pcq has packed this file already"):
        quantize_onnx(packed, "w4")


@pytest.mark.parametrize(
    ("values", "bits"),
    [([-1.0, 1.0], 1.1), ([-1.0, 0.0, 1.0], 1.7), ([-3.0, -1.0, 1.0, 3.0], 2.1), ([-0.7, 0.1, 0.2, 0.9], 2.1)],
)
def test_detection_loses_nothing(values: list[float], bits: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(32, 1, generator=generator) + 0.1
    picked = torch.randint(len(values), (32, 2048), generator=generator)
    weight = torch.tensor(values)[picked] * (scale if values[0] != -0.7 else 1)
    found = detect(weight)
    assert found is not None
    exact, rows = found
    from pcq.qtensor import encode

    coded = encode(weight, exact.grid, rows)
    assert torch.equal(coded.dequantize(), weight)
    assert 8 * coded.nbytes / weight.numel() < bits
    assert detect(torch.randn(32, 2048)) is None


def test_detected_models_compute_the_same_bits(tmp_path: Path) -> None:
    path = convolutions(tmp_path / "m.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = np.sign(numpy_helper.to_array(tensor)) * np.float32(0.3)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    result = quantize_onnx(path, detect=True)
    x = normal(2, 3, 8, 8)
    (before,), (after,) = (ort.InferenceSession(p).run(None, {"x": x}) for p in (path, result.path))
    np.testing.assert_array_equal(before, after)
    assert result.bits < 1.1
    array = np.sign(normal(64, 40))
    array[0, 0] = np.inf
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(array, "w"))
    onnx.save(model, path)
    with pytest.raises(PcqError, match="nothing is rounded with --detect"):
        quantize_onnx(path, detect=True, calibration="random")
    planned = plan_onnx(path, None, detect=True)
    assert [entry.reason for entry in planned.plan.entries if isinstance(entry, Kept)] == ["it holds NaN or infinity"]
    with pytest.raises(PcqError, match="no weight has few enough different values"):
        quantize_onnx(convolutions(tmp_path / "float.onnx"), detect=True)


def test_the_proof_fails_on_wrong_wiring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(
        tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(32, 32)},
        [images("n", 32)], ["y"],
    )  # fmt: skip
    right = packing.oriented
    monkeypatch.setattr(packing, "oriented", lambda array, view: right(array, "same"))
    with pytest.raises(CheckFailed, match="outputs differ by"):
        quantize_onnx(path, "w8")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_directions_that_are_joined(tmp_path: Path, kind: str) -> None:
    """torch's newer exporter writes the weights of a bidirectional layer so, and to each node where it comes from."""
    gates, shape = {"LSTM": 4, "GRU": 3}[kind], {"i": (24,), "h": (32,)}
    tensors = {f"{part}{way}": normal(32 * gates, *shape[part]) for part in "ih" for way in "ab"}
    tensors |= {"axis": np.array([0]), "one": np.array([32]), "end": np.array([32 * gates])}
    nodes = []
    for name in ("ia", "ib", "ha", "hb"):
        nodes += [
            helper.make_node("Slice", [name, "axis", "one"], [f"{name}1"]),
            helper.make_node("Slice", [name, "one", "end"], [f"{name}2"]),
            helper.make_node("Concat", [f"{name}2", f"{name}1"], [f"{name}c"], axis=0),
            helper.make_node("Unsqueeze", [f"{name}c", "axis"], [f"{name}u"]),
        ]
    nodes += [helper.make_node("Concat", [f"{part}au", f"{part}bu"], [part], axis=0) for part in "ih"]
    nodes.append(helper.make_node(kind, ["x", "i", "h"], ["y"], hidden_size=32, direction="bidirectional"))
    for node in nodes:
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="return self.lstm(x)\n" * 150)
    result = quantize_onnx(save(tmp_path / "m.onnx", nodes, tensors, [images("n", "b", 24)], ["y"]), "w8")
    assert {row.name for row in result.ledger} == {"ia", "ib", "ha", "hb"}
    assert result.proof.drift < 0.05


def test_outputs_without_a_number_to_compare(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Div", ["none", "none"], ["n"]),
             helper.make_node("Add", ["h", "n"], ["y"])]  # fmt: skip
    tensors = {"w": normal(64, 64), "none": np.float32(0)}
    path = save(tmp_path / "m.onnx", nodes, tensors, [images("n", 64)], ["y"])
    with pytest.raises(PcqError, match=r"runs on \(it puts out no finite number\)"):
        quantize_onnx(path, "w8")


def test_calibration_needs_an_output_to_judge_by(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ArgMax", ["h"], ["y"], axis=1)]
    tensors = {"w": normal(64, 64)}
    path = save(tmp_path / "m.onnx", nodes, tensors, [images("n", 64)], ["y"], kind=TensorProto.INT64)
    with pytest.raises(PcqError, match="no float output to judge by. Leave --calib out, or give the model without"):
        quantize_onnx(path, "w8", calibration="random")


def drawing(path: Path, kind: str, reads: list[str], inside: bool) -> Path:
    """A MatMul, and what an operator draws from its result, in a branch or not."""
    tensors = {"w": normal(64, 64), "half": np.float32(0.5), "on": np.array(True)}
    drawn = helper.make_node(kind, reads, ["r"])
    if inside:
        made = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        body = helper.make_graph([drawn], "branch", [], [made])
        drawn = helper.make_node("If", ["on"], ["r"], then_branch=body, else_branch=body)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Sigmoid", ["h"], ["p"]), drawn]
    return save(path, nodes, tensors, [images("n", 64)], ["h", "r"])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("kind", "reads"),
    [("RandomNormalLike", ["h"]), ("RandomUniformLike", ["h"]), ("Bernoulli", ["p"]), ("Dropout", ["h", "half", "on"])],
)
def test_random_numbers_are_the_same_on_both_sides(tmp_path: Path, kind: str, reads: list[str], inside: bool) -> None:
    """Speech synthesis draws noise, and networks that were exported for training drop numbers."""
    result = quantize_onnx(drawing(tmp_path / "m.onnx", kind, reads, inside), "w8")
    assert result.proof.drift < 0.1
    assert len(result.proof.agreements) == 4
    session = ort.InferenceSession(result.path)
    feed = {"x": normal(2, 64)}
    one, other = (session.run(["r"], feed)[0] for _ in range(2))
    assert not np.array_equal(one, other)  # the file goes on drawing


def test_calibration_draws_the_same_random_numbers(tmp_path: Path) -> None:
    path = drawing(tmp_path / "m.onnx", "RandomNormalLike", ["h"], False)
    result = quantize_onnx(path, "w8", calibration="random")
    assert result.calibrated is not None
    assert result.calibrated.outcome.steps[0].error < 1e-3


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = words(tmp_path / "m.onnx"), tmp_path / "small.onnx"
    np.savez(tmp_path / "real.npz", x=np.arange(6)[None])
    arguments = ["quantize", path, "--recipe", "w4", "-o", out, "--sample", tmp_path / "real.npz"]
    assert cli.run([str(argument) for argument in [*arguments, "--dry-run"]]) == 0
    assert not out.exists()
    capsys.readouterr()
    assert cli.run([str(argument) for argument in [*arguments, "--json"]]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes_after"] == out.stat().st_size
    assert "sample" in {run["inputs"] for run in answer["agreements"]}
    assert cli.run([str(argument) for argument in arguments]) == 0
    assert "Proved: every code and level bit-exact" in capsys.readouterr().out
    np.savez(tmp_path / "more.npz", x=np.arange(6)[None], y=np.arange(6))
    np.savez(tmp_path / "less.npz", z=np.arange(6))
    (tmp_path / "text.npz").write_text("text")
    for name, told in (
        ("more", "the model has no input 'y'. Allowed: an array for each input: x."),
        ("less", "the model has no input 'z'. Allowed: an array for each input: x."),
        ("text", "it is not an .npz of arrays of numbers. Write it with `np.savez`"),
        ("none", "there is no such file."),
    ):
        arguments[-1] = tmp_path / f"{name}.npz"
        assert cli.run([str(argument) for argument in arguments]) == 2
        assert f"{name}.npz: {told}" in capsys.readouterr().err
    for wrong in (
        ["quantize", path],
        ["quantize", path, "-r", "w4", "--detect"],
        ["quantize", path, "-r", "w4", "--calib", "x"],
    ):
        assert cli.run([str(argument) for argument in wrong]) == 2
    capsys.readouterr()
    for option in (["--arch", "a:b"], ["--key", "ema"], ["--allow-global", "a.B"], ["--unsafe-pickle"]):
        assert cli.run(["quantize", str(path), "-r", "w4", "-o", str(tmp_path / "o.onnx"), *option]) == 2
        told = f"{option[0]}: this is about checkpoints, and an ONNX model was given."
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "todo"),
    [(["--budget", "2kB"], "Choose the levels by a recipe: -r w4"),
     (["-r", "w4", "--set", "budget=2kB"], "Choose the levels by its rules alone")],
)  # fmt: skip
def test_budgets_are_for_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], todo: str
) -> None:
    assert cli.run(["quantize", str(words(tmp_path / "m.onnx")), *option]) == 2
    assert f"and an ONNX model was given. {todo}." in capsys.readouterr().err


def test_inspect_lists_what_would_be_quantized(tmp_path: Path) -> None:
    import onnxscript.optimizer

    path = words(tmp_path / "m.onnx")
    view = inspect(path)
    assert isinstance(view, FileView)
    assert view.kind == "float ONNX"
    assert {row.name: row.form for row in view.tensors} == {
        "emb": "float32, embedding", "W": "float32, linear", "R": "float32, linear", "g": "float32, linear",
        "B": "float32, bias",
    }  # fmt: skip
    packed = quantize_onnx(path, "w4").path
    view = inspect(packed)
    assert isinstance(view, FileView)
    assert (view.kind, len(view.tensors)) == ("packed ONNX", 4)
    facts = dict(view.facts)
    numbers = sum(int(np.prod(row.shape)) for row in view.tensors)
    others = int(facts["other tensors"].split()[0].replace(",", ""))
    assert facts["weights in memory, predicted"] == f"{4 * numbers + others:,} bytes"
    assert facts["nodes that run in int8"] == "none"
    assert "2 to a byte" in view.tensors[0].form
    onnx.save(onnxscript.optimizer.optimize(onnx.load(packed)), tmp_path / "script.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "runtime.onnx")
    ort.InferenceSession(packed, options)
    for inflated in ("script.onnx", "runtime.onnx"):
        view = inspect(tmp_path / inflated)
        assert isinstance(view, FileView)
        assert view.kind == "packed ONNX that was re-inflated"
        assert dict(view.facts)["re-inflated"].startswith("4 of 4 packed weights are floats now")
        with pytest.raises(PcqError, match="have been unpacked into floats"):
            read_packed(tmp_path / inflated)


def test_inspect_says_what_runs_in_int8(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    path = save(
        tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(32, 32)},
        [images("n", 32)], ["y"],
    )  # fmt: skip
    quantize_dynamic(path, tmp_path / "q.onnx")
    view = inspect(tmp_path / "q.onnx")
    assert isinstance(view, FileView)
    assert view.kind == "ONNX that another tool quantized"
    assert dict(view.facts)["nodes that run in int8"] in ("1 DynamicQuantizeMatMul", "1 MatMulIntegerToFloat")
