"""ONNX Runtime's MatMulNBits quantizers: rounding, k-quant, HQQ and GPTQ; 4 and 2 bits, matrices only.

Each weight is a MatMul of its own with an input of its own: its GPTQ takes what enters each MatMul from the float
network anyway, so this is the same as quantizing the exported network. What MatMulNBits computes from the unit matrix
is the dequantized weight.
"""

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import matmul_nbits_quantizer as own
from problem import Problem, Setting, State, serve
from torch import Tensor, nn


def settings(problem: Problem) -> list[Setting]:
    kinds = dict(problem.network().named_modules())
    linear = all(isinstance(kinds[name.removesuffix(".weight")], nn.Linear) for name in problem.weights)
    if problem.levels not in ("2", "4") or not linear:
        return []
    plain: list[Setting] = [
        {"method": "hqq", "symmetric": False},
        {"method": "default", "symmetric": False},
        {"method": "default", "symmetric": True},
    ]
    if problem.levels == "2":
        return plain
    gptq = [{"method": "gptq", "symmetric": False, "mse": mse} for mse in (True, False)]
    return [*gptq, *plain, {"method": "k_quant", "symmetric": False}]


class Reader(CalibrationDataReader):
    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches = iter(batches)
        self.all = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)

    def __deepcopy__(self, memo: object) -> "Reader":
        return Reader(self.all)


def inputs(problem: Problem) -> list[dict[str, np.ndarray]]:
    """What enters each layer of the float network, a dictionary for each batch."""
    network = problem.network()
    modules = dict(network.named_modules())
    found: list[dict[str, np.ndarray]] = []

    def keep(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[-1][f"x:{name}"] = args[0].reshape(-1, args[0].shape[-1]).numpy()

        return hook

    for name in problem.weights:
        modules[name.removesuffix(".weight")].register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for x in problem.batches(32):
            found.append({})
            network(x)
    return found


def model(problem: Problem) -> onnx.ModelProto:
    """A MatMul for each weight, ``y = x W^T``."""
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    nodes, ins, outs, weights = [], [], [], []
    for name in problem.weights:
        weight = problem.state[name]
        nodes.append(helper.make_node("MatMul", [f"x:{name}", f"w:{name}"], [f"y:{name}"], name))
        ins.append(helper.make_tensor_value_info(f"x:{name}", real, ["n", weight.shape[1]]))
        outs.append(helper.make_tensor_value_info(f"y:{name}", real, ["n", weight.shape[0]]))
        weights.append(onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T.numpy()), f"w:{name}"))
    graph = helper.make_graph(nodes, "weights", ins, outs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def quantize(problem: Problem, setting: Setting) -> State:
    size = problem.group
    config = {
        "gptq": lambda: own.GPTQWeightOnlyQuantConfig(Reader(inputs(problem)), actorder=False, mse=setting["mse"]),
        "hqq": lambda: own.HQQWeightOnlyQuantConfig(block_size=size, bits=problem.bits),
        "k_quant": own.KQuantWeightOnlyQuantConfig,
        "default": lambda: own.DefaultWeightOnlyQuantConfig(
            block_size=size, is_symmetric=setting["symmetric"], bits=problem.bits
        ),
    }[setting["method"]]()
    quantizer = own.MatMulNBitsQuantizer(
        model(problem), bits=problem.bits, block_size=size, is_symmetric=setting["symmetric"], algo_config=config
    )
    quantizer.process()
    made = quantizer.model.model
    if any(node.op_type == "MatMul" for node in made.graph.node):
        raise RuntimeError("a MatMul was not quantized")
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    out: State = {}
    small = {f"x:{name}": np.zeros((1, problem.state[name].shape[1]), np.float32) for name in problem.weights}
    for name in problem.weights:
        unit = np.eye(problem.state[name].shape[1], dtype=np.float32)
        out[name] = torch.from_numpy(session.run([f"y:{name}"], {**small, f"x:{name}": unit})[0].T.copy())
    return out


if __name__ == "__main__":
    serve(settings, quantize)
