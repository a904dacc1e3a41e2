"""Where ONNX Runtime's int8 kernels saturate: its integers beside exact ones, on adversarial inputs.

    python -m tests.benchmarks.saturation

runs every kernel that ``pcq export --mode int8`` uses on inputs and weights made to provoke it, with integers up to 64
and up to 127, inputs in 8 bits and in 7, and with the session option ``session.x64quantprecision``; writes
``results/saturation.json`` and ``.md``. What real networks lose by it: ``int8_accuracy.py``.
"""

import datetime
import itertools
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from pcq.export import cpu

Array = np.ndarray[Any, Any]
RESULTS = Path(__file__).parent / "results"
WEIGHTS = ("one sign", "negative", "either end", "uniform", "normal")
INPUTS = ("largest", "large", "uniform", "after ReLU")
PRECISE = {"session.x64quantprecision": "1"}


def weights(kind: str, shape: tuple[int, ...], most: int, random: np.random.Generator) -> Array:
    """int8 from ``-most`` to ``most``."""
    match kind:
        case "one sign":
            made = np.full(shape, most)
        case "negative":
            made = np.full(shape, -most)
        case "either end":
            made = random.choice([-most, most], shape)
        case "uniform":
            made = random.integers(-most, most + 1, shape)
        case _:
            made = np.clip(np.rint(random.normal(0, most / 4, shape)), -most, most)
    return made.astype(np.int8)


def inputs(kind: str, shape: tuple[int, ...], top: int, random: np.random.Generator) -> Array:
    """uint8 from 0 to ``top``."""
    match kind:
        case "largest":
            made = np.full(shape, top)
        case "large":
            made = random.integers(3 * top // 4, top + 1, shape)
        case "uniform":
            made = random.integers(0, top + 1, shape)
        case _:
            made = np.clip(np.rint(np.abs(random.normal(0, top / 6, shape))), 0, top)
    return made.astype(np.uint8)


def run(node: onnx.NodeProto, x: Array, constants: Mapping[str, Array], options: Mapping[str, str]) -> Array:
    """One node on ``x``, on default optimisation."""
    kind = {"MatMulInteger": TensorProto.INT32, "QGemm": TensorProto.FLOAT}.get(node.op_type, TensorProto.UINT8)
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=9)
    said = onnxruntime.SessionOptions()
    said.log_severity_level, said.intra_op_num_threads = 3, 1
    for key, value in options.items():
        said.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), said, providers=["CPUExecutionProvider"])
    got: Array = session.run(None, {"x": x})[0]
    return got


def matmul(x: Array, w: Array, options: Mapping[str, str]) -> tuple[Array, Array]:
    """MatMulInteger of ``[m, k]`` and ``[k, n]``: int32, and exact ones."""
    node = helper.make_node("MatMulInteger", ["x", "w", "z"], ["y"])
    return run(node, x, {"w": w, "z": np.uint8(0)}, options), x.astype(np.int64) @ w.astype(np.int64)


def gemm(x: Array, w: Array, options: Mapping[str, str]) -> tuple[Array, Array]:
    """QGemm of ``[m, k]`` and ``[n, k]``, its sums in float32 (which holds them)."""
    names = ["x", "one", "zero", "w", "steps", "zeros"]
    node = helper.make_node("QGemm", names, ["y"], domain="com.microsoft", transB=1)
    ones, zeros = np.ones(len(w), np.float32), np.zeros(len(w), np.int8)
    constants = {"one": np.float32(1), "zero": np.uint8(0), "w": w, "steps": ones, "zeros": zeros}
    return run(node, x, constants, options), (x.astype(np.int64) @ w.T.astype(np.int64)).astype(np.float32)


def convolution(x: Array, w: Array, options: Mapping[str, str]) -> tuple[Array, Array]:
    """QLinearConv, its output in codes of a scale that the exact sums just fit, and the exact codes."""
    rank, groups = x.ndim - 2, x.shape[1] // w.shape[1]
    pad = w.shape[-1] // 2
    made = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d}[rank]
    sums = made(torch.from_numpy(x).double(), torch.from_numpy(w).double(), padding=pad, groups=groups).numpy()
    scale = np.float32(np.abs(sums).max() / 127)
    exact = np.clip(np.rint(sums.astype(np.float32) * (np.float32(1) / scale)) + 128, 0, 255)
    names = ["x", "one", "zero", "w", "steps", "zeros", "scale", "middle"]
    node = helper.make_node("QLinearConv", names, ["y"], pads=[pad] * 2 * rank, group=groups)
    ones, zeros = np.ones(len(w), np.float32), np.zeros(len(w), np.int8)
    constants = {"one": np.float32(1), "zero": np.uint8(0), "w": w, "steps": ones, "zeros": zeros}
    return run(node, x, {**constants, "scale": scale, "middle": np.uint8(128)}, options).astype(np.float64), exact


Compute = Callable[[Array, Array, Mapping[str, str]], tuple[Array, Array]]
KERNELS: dict[str, tuple[Compute, tuple[int, ...], tuple[int, ...]]] = {
    "MatMulInteger": (matmul, (7, 133), (133, 37)),
    "MatMulInteger, one row": (matmul, (1, 256), (256, 64)),
    "QGemm": (gemm, (3, 64), (10, 64)),
    "QLinearConv 3x3": (convolution, (2, 16, 9, 9), (24, 16, 3, 3)),
    "QLinearConv 3x3, 3 channels": (convolution, (2, 3, 9, 9), (24, 3, 3, 3)),
    "QLinearConv 1x1": (convolution, (2, 32, 9, 9), (24, 32, 1, 1)),
    "QLinearConv, 4 groups": (convolution, (2, 16, 9, 9), (16, 4, 3, 3)),
    "QLinearConv, 2 outputs of each channel": (convolution, (2, 16, 9, 9), (32, 1, 3, 3)),
    "QLinearConv, 1-D": (convolution, (2, 16, 33), (24, 16, 5)),
    "QLinearConv, depthwise 1-D": (convolution, (2, 32, 33), (32, 1, 5)),
    "QLinearConv, depthwise 3x3": (convolution, (2, 32, 9, 9), (32, 1, 3, 3)),
    "QLinearConv, depthwise 5x5": (convolution, (2, 17, 9, 9), (17, 1, 5, 5)),
}
"""Kernel -> how to compare it, shapes of input and weight."""


def wrong(kernel: str, w: str, x: str, most: int, top: int = 255, options: Mapping[str, str] | None = None) -> float:
    """Percent of a kernel's outputs that are not the exact integers."""
    compute, x_shape, w_shape = KERNELS[kernel]
    random = np.random.default_rng(0)
    got, exact = compute(inputs(x, x_shape, top, random), weights(w, w_shape, most, random), options or {})
    return float(100 * (got != exact).mean())


SETTINGS: dict[str, tuple[int, int, Mapping[str, str]]] = {
    "to 64": (64, 255, {}),
    "to 127": (127, 255, {}),
    "to 127, inputs in 7 bits": (127, 127, {}),
    "to 127, x64quantprecision": (127, 255, PRECISE),
}


def main() -> None:
    rows = []
    for kernel, (setting, (most, top, options)) in itertools.product(KERNELS, SETTINGS.items()):
        found = {f"{w}, {x}": wrong(kernel, w, x, most, top, options) for w in WEIGHTS for x in INPUTS}
        rows.append({"kernel": kernel, "integers": setting, "wrong": found})
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    born = {
        "date": datetime.date.today().isoformat(), "commit": head.stdout.strip(), "seed": 0,
        "processor": cpu.described(), "onnxruntime": onnxruntime.__version__,
    }  # fmt: skip
    (RESULTS / "saturation.json").write_text(json.dumps({"born": born, "rows": rows}, indent=1) + "\n")
    lines = [
        "# Where int8 kernels saturate\n",
        f"Made by `tests/benchmarks/saturation.py` on {born['processor']}; ONNX Runtime {born['onnxruntime']}, "
        f"{born['date']}, commit {born['commit']}. Percent of outputs that are not the exact integers: the worst of "
        f"{len(WEIGHTS) * len(INPUTS)} kinds of inputs and weights, and normal weights on what is left after a ReLU.\n",
        "| kernel | " + " | ".join(f"{setting}: worst | normal" for setting in SETTINGS) + " |",
        "|---|" + "---:|---:|" * len(SETTINGS),
    ]
    for kernel in KERNELS:
        mine = [row["wrong"] for row in rows if row["kernel"] == kernel]
        cells = [f"{max(one.values()):.1f} | {one['normal, after ReLU']:.1f}" for one in mine]  # type: ignore[attr-defined]
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    (RESULTS / "saturation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
