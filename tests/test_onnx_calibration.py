"""Calibration of ONNX models: what is said to enter a layer gives its output, and new samples lose less."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pcq import cli
from pcq.calibrate.layers import patches
from pcq.commands import Calibration, plan_onnx, quantize_onnx
from pcq.commands.onnx_calibrating import feeds
from pcq.errors import PcqError
from pcq.export import read_packed
from pcq.onnx_input import open_graph, take_inventory
from pcq.onnx_input.feeds import Feeds
from pcq.onnx_input.sites import find_sites
from tests.test_onnx_input import branches, compared, convolutions, images, normal, save, words

NODES = [
    ("Conv", (6, 4, 3, 3), (2, 4, 9, 8), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    (
        "Conv",
        (6, 2, 3, 2),
        (2, 4, 9, 8),
        {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 3]},
    ),
    ("Conv", (6, 4, 4, 3), (2, 4, 9, 8), {"auto_pad": "SAME_LOWER", "strides": [3, 2]}),
    ("Conv", (6, 4, 3), (2, 4, 9), {"auto_pad": "VALID"}),
    ("ConvTranspose", (4, 3, 3, 2), (2, 4, 5, 6), {"group": 2, "strides": [2, 3], "pads": [1, 0, 0, 1]}),
    ("ConvTranspose", (4, 6, 3, 2), (2, 4, 5, 6), {"strides": [2, 3], "output_padding": [1, 2], "dilations": [1, 2]}),
    ("Gemm", (6, 4), (5, 4), {"transB": 1}),
    ("Gemm", (4, 6), (4, 5), {"transA": 1}),
    ("MatMul", (4, 6), (2, 5, 4), {}),
]


@pytest.mark.parametrize(("kind", "shape", "entering", "attributes"), NODES)
def test_patches_times_weight_is_the_output(
    tmp_path: Path, kind: str, shape: tuple[int, ...], entering: tuple[int, ...], attributes: dict[str, object]
) -> None:
    node = helper.make_node(kind, ["x", "w"], ["y"], **attributes)
    path = save(tmp_path / "m.onnx", [node], {"w": normal(*shape)}, [images(*entering)], ["y"])
    opened = open_graph(path)
    inventory = take_inventory(opened)
    (site,), refused = find_sites(opened.model, inventory, ["w"])
    assert refused == {}
    x = normal(*entering)
    (want,) = ort.InferenceSession(path).run(None, {"x": x})
    weight = inventory.weights["w"].read()
    rows = site.layer.channels(tuple(weight.shape))
    matrix = rows.split(weight).reshape(site.layer.groups, -1, rows.length)
    got = patches(site.layer, site.entering(torch.from_numpy(x))) @ matrix.transpose(1, 2)  # [G, positions, r]
    got = got.transpose(0, 1).reshape(got.shape[1], -1)  # [positions, channels]
    flat = want.reshape(-1, want.shape[-1]) if site.layer.geometry is None else np.moveaxis(want, 1, -1)
    np.testing.assert_allclose(got.numpy(), flat.reshape(got.shape), atol=2e-5)


def correlated(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Samples of a few directions and a mean: what a layer's second moments say is worth knowing."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(3, int(np.prod(shape))))
    made = generator.normal(size=(n, 3)) @ mixing + 1 + 0.1 * generator.normal(size=(n, mixing.shape[1]))
    return made.reshape(n, *shape).astype(np.float32)


def layers(path: Path, bias: bool) -> Path:
    """Two convolutions and a Gemm, with biases or without."""
    third = (lambda name: [name]) if bias else lambda name: []
    nodes = [
        helper.make_node("Conv", ["x", "a", *third("ab")], ["h"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b", *third("bb")], ["i"]),
        helper.make_node("Relu", ["i"], ["s"]),
        helper.make_node("ReduceMean", ["s"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["m", "c", *third("cb")], ["y"], transB=1),
    ]
    tensors = {"a": normal(24, 3, 3, 3), "b": normal(32, 24, 3, 3), "c": normal(40, 32)}
    tensors |= {"ab": normal(24), "bb": normal(32), "cb": normal(40)} if bias else {}
    return save(path, nodes, tensors, [images("n", 3, 12, 12)], ["y"])


@pytest.mark.parametrize(("bias", "method"), [(True, "proxconnect"), (False, "gptq")])
def test_new_samples_lose_less(tmp_path: Path, bias: bool, method: str) -> None:
    path = layers(tmp_path / "m.onnx", bias)
    np.savez(tmp_path / "some.npz", x=correlated(60, 3, 12, 12))
    plain = quantize_onnx(path, "ternary-all", out=tmp_path / "plain.onnx").path
    asked = Calibration(f"npz:{tmp_path / 'some.npz'}", method=method)  # type: ignore[arg-type]
    result = quantize_onnx(path, "ternary-all", out=tmp_path / "calibrated.onnx", calibration=asked)
    assert result.calibrated is not None
    outcome = result.calibrated.outcome
    assert set(outcome.changed) == ({"ab", "bb", "cb"} if bias else set())
    assert (outcome.samples, outcome.held_out, dict(outcome.plain)) == (48, 12, {})
    assert len(outcome.steps) == 3
    assert sum(not step.reason for step in outcome.steps[1:]) == 1  # of two ways to aim the better is kept
    errors = [step.error for step in outcome.steps if step.error is not None]
    assert next(step.error for step in outcome.steps[1:] if not step.reason) == min(errors)
    x = correlated(64, 3, 12, 12, seed=1)
    want, rounded, calibrated = (ort.InferenceSession(p).run(None, {"x": x})[0] for p in (path, plain, result.path))
    assert np.square(calibrated - want).sum() < 0.5 * np.square(rounded - want).sum()
    assert all(torch.equal(read_packed(result.path)[n].codes, q.codes) for n, q in outcome.quantized.items())
    again = quantize_onnx(path, "ternary-all", out=tmp_path / "again.onnx", calibration=asked)
    assert again.path.read_bytes() == result.path.read_bytes()
    kept = {entry.key: entry.value for entry in onnx.load(result.path).metadata_props}["pcq.calibration"]
    assert json.loads(kept) == {"data": asked.data, "method": method, "samples": 48, "seed": 0}


def test_a_recipe_of_any_name_is_calibrated(tmp_path: Path) -> None:
    recipe = tmp_path / "exact.yaml"
    recipe.write_text('pcq: 1\nrules:\n  - match: "*"\n    levels: {kind: uniform, bits: 4}\n')
    assert quantize_onnx(layers(tmp_path / "m.onnx", True), recipe, calibration="random").calibrated is not None


def test_several_inputs_and_what_is_only_rounded(tmp_path: Path) -> None:
    path = branches(tmp_path / "m.onnx")
    np.savez(tmp_path / "feeds.npz", x=normal(40, 32), rate=np.array(16000))
    asked = Calibration(f"npz:{tmp_path / 'feeds.npz'}")
    samples, held_out, _ = feeds(path, asked)
    assert {array.shape for batch in samples.batches for array in batch.values()} == {(8, 32), ()}
    assert (samples.n, held_out.n) == (32, 8)
    result = quantize_onnx(path, "w4", calibration=asked)
    assert result.calibrated is not None
    assert set(result.calibrated.outcome.plain) == {"a.w", "b.w"}
    assert "subgraph" in result.calibrated.outcome.plain["a.w"]
    with pytest.raises(PcqError, match="there are 40 samples, and 100 with .* are more. Allowed: --samples 8 to 32"):
        feeds(path, replace(asked, samples=100))
    with pytest.raises(PcqError, match="feeds one input, and the model has 2"):
        quantize_onnx(path, "w4", out=tmp_path / "o.onnx", calibration="digits")


def test_8_bit_images_by_name_are_divided_as_elsewhere(tmp_path: Path) -> None:
    """They had been fed as they are to models of several inputs, and refused to those of one."""
    x = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x=x, z=normal(40, 4))
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"]),
        helper.make_node("ReduceMean", ["h"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Concat", ["m", "z"], ["y"], axis=1),
    ]
    two = save(
        tmp_path / "two.onnx",
        nodes,
        {"a": normal(24, 3, 3, 3)},
        [images("n", 3, 12, 12), helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4])],
        ["y"],
    )
    for path in (layers(tmp_path / "one.onnx", True), two):
        samples, held_out, _ = feeds(path, Calibration(f"npz:{tmp_path / 'x.npz'}"))
        seen = np.concatenate([batch["x"] for each in (samples, held_out) for batch in each.batches])
        assert seen.shape == (40, 3, 12, 12)
        assert seen.mean() == pytest.approx(x.mean() / 255, rel=1e-5)


def test_a_map_agrees_in_nothing(tmp_path: Path) -> None:
    """The largest of a map's columns is no prediction."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Reshape", ["y", "shape"], ["map"]),
    ]
    path = save(
        tmp_path / "m.onnx", nodes, {"w": normal(32, 24), "shape": np.array([-1, 2, 3, 4])},
        [helper.make_tensor_value_info("x", 1, ["n", 32])], ["map"],
    )  # fmt: skip
    np.savez(tmp_path / "x.npz", x=correlated(400, 32))
    result = quantize_onnx(path, "binary-all", calibration=f"npz:{tmp_path / 'x.npz'}")
    assert result.calibrated is not None
    assert {step.agreement for step in result.calibrated.outcome.steps} == {None}


def test_the_output_called_logits_says_what_agrees(tmp_path: Path) -> None:
    """The columns of the first output are equal: its argmax agrees whatever the weights are."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
        helper.make_node("MatMul", ["x", "ones"], ["sum"]),
    ]
    path = save(
        tmp_path / "m.onnx", nodes, {"w": normal(32, 24), "ones": np.ones((32, 2), np.float32)},
        [helper.make_tensor_value_info("x", 1, ["n", 32])], ["sum", "logits"],
    )  # fmt: skip
    np.savez(tmp_path / "x.npz", x=correlated(400, 32))
    result = quantize_onnx(path, "binary-all", calibration=f"npz:{tmp_path / 'x.npz'}")
    assert result.calibrated is not None
    rounded = result.calibrated.outcome.steps[0].agreement
    assert rounded is not None
    assert rounded < 90


def test_embeddings_and_recurrent_weights_are_rounded_and_said(tmp_path: Path) -> None:
    result = quantize_onnx(words(tmp_path / "m.onnx"), "w4", calibration="random")
    assert result.calibrated is not None
    assert dict(result.calibrated.outcome.plain) == {
        "emb": "2 nodes read it", "W": "calibration does not know LSTM", "R": "calibration does not know LSTM",
    }  # fmt: skip
    assert [layer.weight for layer in result.calibrated.outcome.layers] in (["g"], [])


def test_half_precision_and_fixed_batches(tmp_path: Path) -> None:
    path = convolutions(tmp_path / "m.onnx", dtype=np.float16)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    np.savez(tmp_path / "x.npz", x=correlated(41, 3, 8, 8))
    samples, held_out, _ = feeds(path, Calibration(f"npz:{tmp_path / 'x.npz'}"))
    assert (samples.batch, samples.n, held_out.n) == (2, 32, 8)
    assert quantize_onnx(path, "w4", calibration=f"npz:{tmp_path / 'x.npz'}").calibrated is not None


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64])
def test_unsigned_inputs(tmp_path: Path, kind: type) -> None:
    number = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    path = compared(tmp_path / "m.onnx", number, TensorProto.FLOAT, np.float32(2), samples="n")
    np.savez(tmp_path / "x.npz", x=normal(40, 64), i=np.arange(40).astype(kind)[:, None])
    for data in ("random", f"npz:{tmp_path / 'x.npz'}"):
        assert quantize_onnx(path, "w4", calibration=data, force=True).calibrated is not None


@pytest.mark.parametrize("kind", ["STRING", "BFLOAT16"])
def test_inputs_that_are_no_numbers(tmp_path: Path, kind: str) -> None:
    """NumPy has none of bfloat16 either."""
    path = compared(tmp_path / "m.onnx", TensorProto.DataType.Value(kind), TensorProto.FLOAT, np.float32(2))
    np.savez(tmp_path / "x.npz", x=normal(40, 64), i=np.ones((40, 1)))
    says = rf"its input 'i' is a tensor\({kind.lower()}\), and pcq can run it on arrays of numbers only.*extract_model"
    for data in (None, "random", f"npz:{tmp_path / 'x.npz'}"):
        with pytest.raises(PcqError, match=says):
            quantize_onnx(path, "w4", calibration=data)


def test_too_few_and_wrong_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = layers(tmp_path / "m.onnx", True)
    np.savez(tmp_path / "few.npz", x=correlated(6, 3, 12, 12))
    np.savez(tmp_path / "other.npz", x=correlated(40, 2, 12, 12))
    for file, says in (
        ("few", "too few"),
        ("other", r"does not take the samples \(x 8x2x12x12\): .*. Allowed: x nx3x12x12. Give an array for each input"),
    ):
        with pytest.raises(PcqError, match=says):
            quantize_onnx(path, "w4", calibration=f"npz:{tmp_path / file}.npz")
    np.savez(tmp_path / "many.npz", x=correlated(200, 3, 12, 12))
    for samples, taken in ((40, 40), (12, 12)):
        made = quantize_onnx(
            path,
            "w4",
            calibration=Calibration(f"npz:{tmp_path / 'many.npz'}", samples),
            out=tmp_path / f"{samples}.onnx",
        ).calibrated
        assert made is not None
        assert made.outcome.samples == taken
    assert cli.run(["quantize", str(path), "--detect", "--calib", "random"]) == 2
    capsys.readouterr()
    assert cli.run(["quantize", str(path), "-r", "w4", "--calib", "random", "--samples", "8", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert next(step["name"] for step in answer["calibration"]["steps"]) == "nearest levels"


def test_samples_that_are_no_numbers(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reciprocal", ["x"], ["l"]), helper.make_node("MatMul", ["l", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(64, 64)}, [images("n", 64)], ["y"])
    x = np.abs(normal(40, 64)) + 1
    for number, says in (
        (np.nan, r"x.npz, x: 2 of 40 samples hold NaN, such as sample 3. Repair them, or leave them out"),
        (0, "^w: NaN or infinity enters its layer on the samples"),
    ):
        x[[3, 4], 5] = number
        np.savez(tmp_path / "x.npz", x=x)
        with pytest.raises(PcqError, match=says):
            quantize_onnx(path, "w4", calibration=f"npz:{tmp_path / 'x.npz'}")


def test_files_that_are_no_samples_of_several_inputs(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "s"], ["y"])]
    tensors = {"w": normal(64, 64)}
    path = save(tmp_path / "m.onnx", nodes, tensors, [images("n", 64), images("n", 1, name="s")], ["y"])
    np.savez(tmp_path / "less.npz", x=normal(40, 64))
    np.savez(tmp_path / "words.npz", x=normal(40, 64), s=np.array([["a"]] * 40))
    np.save(tmp_path / "one.npz", normal(40, 64))
    (tmp_path / "one.npz.npy").rename(tmp_path / "one.npz")
    (tmp_path / "text.npz").write_text("text")
    for file, says in (
        ("less", "it has no array 's'. Allowed: an array for each input: x, s"),
        ("words", "its array 's' is not made of numbers"),
        ("one", "it is not an .npz of arrays of numbers"),
        ("text", "it is not an .npz of arrays of numbers"),
        ("none", "there is no such file"),
    ):
        with pytest.raises(PcqError, match=says):
            quantize_onnx(path, "w4", calibration=f"npz:{tmp_path / file}.npz")
    np.savez(tmp_path / "more.npz", x=normal(40, 64), s=normal(40, 1), label=np.array(["a"] * 40))
    assert quantize_onnx(path, "w4", calibration=f"npz:{tmp_path / 'more.npz'}").calibrated is not None


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64)])
def test_a_constant_may_enter_a_layer(tmp_path: Path, shape: tuple[int, ...], ir_version: int) -> None:
    """The model of IR version 3 lists it among its inputs."""
    nodes = [
        helper.make_node("MatMul", ["k", "w"], ["a"]),
        helper.make_node("MatMul", ["x", "v"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    tensors = {"k": normal(*shape), "w": normal(64, 64), "v": normal(64, 64)}
    inputs = [images("n", 64), *(images(*a.shape, name=name) for name, a in tensors.items())]
    path = save(tmp_path / "m.onnx", nodes, tensors, inputs if ir_version == 3 else inputs[:1], ["y"], 13, ir_version)
    np.savez(tmp_path / "x.npz", x=normal(40, 64))
    for data in ("random", f"npz:{tmp_path / 'x.npz'}"):
        made = quantize_onnx(path, "w4", calibration=data, force=True).calibrated
        assert made is not None
        assert dict(made.outcome.plain) == {}


def test_models_that_cannot_be_calibrated(tmp_path: Path) -> None:
    """Of no inputs, which is packed all the same; and of ones so large that random samples would fill a memory."""
    nodes = [helper.make_node("MatMul", ["a", "w"], ["y"])]
    alone = save(tmp_path / "a.onnx", nodes, {"a": normal(8, 64), "w": normal(64, 64)}, [], ["y"])
    assert [row.name for row in quantize_onnx(alone, "w4").ledger] == ["a", "w"]
    with pytest.raises(PcqError, match="it takes no inputs, so there is nothing to calibrate on. Leave --calib out"):
        quantize_onnx(alone, "w4", calibration="random")
    nodes = [helper.make_node("Slice", ["x", "zero", "some"], ["s"]), helper.make_node("MatMul", ["s", "w"], ["y"])]
    tensors = {"zero": np.array([0, 0]), "some": np.array([1, 64]), "w": normal(64, 64)}
    large = save(tmp_path / "l.onnx", nodes, tensors, [images(1, 2**24)], ["y"])
    with pytest.raises(PcqError, match="80 samples of the model's inputs take 5.4 GB. Allowed: up to 4.3 GB"):
        quantize_onnx(large, "w4", calibration="random")


def test_loop_bodies_are_packed_too(tmp_path: Path) -> None:
    held = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(32, 32), "w"))
    body = helper.make_graph(
        [
            held,
            helper.make_node("MatMul", ["s", "w"], ["t"]),
            helper.make_node("Tanh", ["t"], ["s2"]),
            helper.make_node("Identity", ["c"], ["c2"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s2", TensorProto.FLOAT, None),
        ],
    )
    nodes = [helper.make_node("Loop", ["count", "", "x"], ["y"], body=body)]
    path = save(tmp_path / "m.onnx", nodes, {"count": np.array(3)}, [images("n", 32)], ["y"])
    result = quantize_onnx(path, "w8")
    assert [row.name for row in result.ledger] == ["w"]
    planned = plan_onnx(path, "w8")
    assert planned.plan.quantized[0].parameter.shape == (32, 32)


def test_feeds_split_in_whole_batches() -> None:
    parts = Feeds(tuple({"x": np.zeros((4, 1))} for _ in range(5)), 4).split(18)
    assert [part.n for part in parts] == [16, 4]
