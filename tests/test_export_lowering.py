"""The unpacking functions: whatever the grid, rows and layout, ONNX Runtime gives the very bits of dequantize()."""

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from pcq.errors import PcqError
from pcq.export.body import Lowered
from pcq.export.facts import RUNTIMES, target
from pcq.export.frame import Frame, can_transpose
from pcq.export.lowering import lower
from pcq.export.reading import decode
from pcq.export.scheme import describe, from_json, to_json
from pcq.grids import Affine, Codebook, Grid
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows

LEVELS = (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)


@st.composite
def all_rows(draw: st.DrawFn) -> Rows:
    group = draw(st.none() | st.integers(1, 12))
    kind = draw(st.sampled_from(["tensor", "linear", "conv", "transposed", "grouped"]))
    size = st.integers(1, 6)
    if kind == "tensor":
        return Rows(tuple(draw(st.lists(size, min_size=1, max_size=4))), None, 1, group)
    if kind == "linear":
        return Rows((draw(size), draw(st.integers(1, 20))), 0, 1, group)
    shape = tuple(draw(st.lists(size, min_size=3, max_size=5)))
    if kind == "conv":
        return Rows(shape, 0, 1, group)
    blocks = draw(st.integers(1, 3)) if kind == "grouped" else 1
    return Rows((shape[0] * blocks, *shape[1:]), 1, blocks, group)


@st.composite
def all_weights(draw: st.DrawFn) -> QuantizedTensor:
    rows = draw(all_rows())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = draw(st.integers(2, 9) | st.sampled_from([13, 16, 17, 32, 48, 64, 100, 128, 200, 255, 256]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    grid: Grid
    size = draw(st.sampled_from([1.0, 1e-3, 1e30, 1e-38, 1e-42, 0.0]))
    scale = normal(rows.g).abs() * size
    zero = draw(st.none() | st.integers(0, 2 * count).map(lambda z: z / 2))
    match draw(st.sampled_from(["affine", "shared", "scaled", "rows", "scaled rows"])):
        case "affine":
            per_row = torch.randint(0, count, (rows.g,), generator=generator).to(torch.uint8)
            if draw(st.booleans()):
                per_row = per_row.half() + torch.randint(0, 2, (rows.g,), generator=generator).half() / 2
            grid = Affine(scale, per_row if zero is None else zero, count)
        case "shared":
            grid = Codebook(normal(1, count).sort().values)
        case "scaled":
            grid = Codebook(normal(1, count).sort().values, scale)
        case "rows":
            grid = Codebook(normal(rows.g, count).sort().values)
        case _:
            grid = Codebook(normal(rows.g, count).sort().values, scale)
    codes = torch.randint(0, count, rows.shape, generator=generator, dtype=torch.uint8)
    return QuantizedTensor(codes, grid, rows)


def model_of(lowered: Lowered, opset: int = 20) -> onnx.ModelProto:
    """A model without inputs whose output is the unpacked weight."""
    inputs = [ir.Value(name=part, const_value=ir.tensor(array, name=part)) for part, array in lowered.arrays.items()]
    output = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(lowered.shape))
    attributes = ir.convenience.convert_attributes(lowered.attributes)
    node = ir.Node("pcq", lowered.function.name, inputs, attributes, outputs=[output])
    graph = ir.Graph(
        [], [output], nodes=[node], initializers=inputs, opset_imports={"": opset, "pcq": 1}, name="unpack"
    )
    return ir.to_proto(ir.Model(graph, ir_version=9, functions=[lowered.function]))


def bits(values: Tensor | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.int32)


@settings(max_examples=150, deadline=None)
@given(all_weights(), st.booleans(), st.sampled_from([15, 20]))
def test_unpacking_gives_the_bits_of_dequantize(weight: QuantizedTensor, transposed: bool, opset: int) -> None:
    transposed = transposed and can_transpose(weight.rows)
    lowered = lower(weight, opset, transposed)
    model = model_of(lowered, opset)
    onnx.checker.check_model(model, full_check=True)
    wanted = weight.dequantize().numpy()
    wanted = wanted.T if transposed else wanted
    for level in LEVELS:
        options = ort.SessionOptions()
        options.graph_optimization_level, options.log_severity_level, options.intra_op_num_threads = level, 3, 1
        (got,) = ort.InferenceSession(model.SerializeToString(), options).run(None, {})
        assert got.shape == wanted.shape
        np.testing.assert_array_equal(bits(got), bits(wanted))


@settings(max_examples=100, deadline=None)
@given(all_weights(), st.booleans())
def test_the_numpy_reader_is_the_inverse_and_nothing_is_stored_twice(weight: QuantizedTensor, transposed: bool) -> None:
    transposed = transposed and can_transpose(weight.rows)
    lowered = lower(weight, 20, transposed)
    assert sum(array.nbytes for array in lowered.arrays.values()) == weight.nbytes
    described = {"w": describe(weight, lowered.function.name, transposed)}
    assert from_json(to_json(described), "here") == described
    read = decode(described["w"], {part: np.array(array) for part, array in lowered.arrays.items()})
    assert torch.equal(read.codes, weight.codes)
    assert read.rows == weight.rows
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert read.nbytes == weight.nbytes
    assert type(read.grid) is type(weight.grid)


@settings(max_examples=25, deadline=None)
@given(all_weights())
def test_the_reference_evaluator_agrees(weight: QuantizedTensor) -> None:
    (got,) = ReferenceEvaluator(model_of(lower(weight, 20))).run(None, {})
    np.testing.assert_array_equal(got, weight.dequantize().numpy())


@settings(max_examples=100, deadline=None)
@given(st.lists(all_weights(), min_size=2, max_size=6))
def test_functions_of_one_name_have_one_body(weights: list[QuantizedTensor]) -> None:
    bodies: dict[str, bytes] = {}
    for weight in weights:
        function = lower(weight, 20).function
        body = ir.to_proto(function).SerializeToString(deterministic=True)
        assert bodies.setdefault(function.name, body) == body


def ternary(shape: tuple[int, ...], scale: float = 1.0) -> QuantizedTensor:
    codes = torch.arange(math.prod(shape)).remainder(3).to(torch.uint8).reshape(shape)
    return QuantizedTensor(codes, Affine(torch.full((shape[0],), scale), 1.0, 3), Rows(shape))


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (ternary((4, 5)), "Ternary"),
        (ternary((4, 4)), "TernaryCut"),
        (QuantizedTensor(torch.zeros(2, 8, dtype=torch.uint8), Affine(torch.ones(2), 0.5, 2), Rows((2, 8))), "Binary"),
        (
            QuantizedTensor(
                torch.zeros(4, 8, dtype=torch.uint8), Affine(torch.ones(12), 7.5, 16), Rows((4, 8), 0, 1, 3)
            ),
            "Symmetric16Ragged",
        ),
        (
            QuantizedTensor(
                torch.zeros(4, 8, dtype=torch.uint8), Codebook(torch.arange(32.0).reshape(8, 4)), Rows((4, 8), 0, 1, 4)
            ),
            "RowCodebook4Grouped",
        ),
    ],
)
def test_names_say_what_a_function_does(weight: QuantizedTensor, name: str) -> None:
    assert lower(weight, 20).function.name == name


def test_only_operators_that_onnxruntime_1_17_has() -> None:
    allowed = {"Constant", "Cast", "Gather", "Reshape", "Slice", "BitwiseOr", "Add", "Sub", "Mul"}
    for_rows = {"Div", "Range", "Transpose"}

    @settings(max_examples=60, deadline=None)
    @given(all_weights())
    def check(weight: QuantizedTensor) -> None:
        used = {node.op_type for node in lower(weight, 20).function}
        assert used <= allowed | for_rows
        assert Frame(weight.rows, False).way == "ragged" or isinstance(weight.grid, Codebook) or used <= allowed
        assert "BitwiseOr" not in {node.op_type for node in lower(weight, 17).function}

    check()


def test_an_empty_weight_is_refused() -> None:
    empty = QuantizedTensor(torch.zeros(0, 3, dtype=torch.uint8), Affine(torch.zeros(0), 1.0, 3), Rows((0, 3)))
    with pytest.raises(PcqError, match="empty tensor"):
        lower(empty, 20)


@pytest.mark.parametrize("damage", ["short", "code", "float", "sha"])
def test_damage_is_noticed(damage: str) -> None:
    weight = ternary((4, 6))
    lowered = lower(weight, 20)
    arrays = {part: np.array(array) for part, array in lowered.arrays.items()}
    scheme = describe(weight, "Ternary", False)
    change: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "short": lambda a: a[:-1],
        "code": lambda a: np.full_like(a, 255),
        "float": lambda a: a.astype(np.float32),
        "sha": lambda a: a[::-1],
    }
    arrays["packed"] = change[damage](arrays["packed"])
    with pytest.raises(ValueError, match=r"bytes|code"):
        decode(scheme, arrays)


def test_target_runtimes() -> None:
    for runtime in RUNTIMES:
        goal = target(".".join(map(str, runtime.version)))
        assert goal.opset <= runtime.opset
        assert goal.ir_version <= runtime.ir_version
        assert 18 <= goal.opset <= 20
        assert 8 <= goal.ir_version <= 9
    assert target("1.19.2") == target("1.19.2")
    for wrong, says in {
        "1.16": "Update",
        "1.99": "1.17 to 1.32",
        "two": "is not an ONNX Runtime",
        "": "is not",
    }.items():
        with pytest.raises(PcqError, match=says):
            target(wrong)
