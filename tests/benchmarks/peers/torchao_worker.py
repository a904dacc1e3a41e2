"""torchao: weights rounded with its affine scales or HQQ's; linear layers only, and no data.

Its GPTQ is for int8, nvfp4, and int4 through a package mslk («mslk is not installed»): not here.
"""

import torch
from problem import Problem, Setting, State, serve
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm


def settings(problem: Problem) -> list[Setting]:
    kinds = dict(problem.network().named_modules())
    linear = all(isinstance(kinds[name.removesuffix(".weight")], torch.nn.Linear) for name in problem.weights)
    if problem.levels not in ("2", "3", "4") or not linear:
        return []
    return [
        {"scale": "HQQ_SCALE_ONLY", "mapping": "SYMMETRIC"},
        {"scale": "AFFINE", "mapping": "ASYMMETRIC"},
        {"scale": "AFFINE", "mapping": "SYMMETRIC"},
    ]


def quantize(problem: Problem, setting: Setting) -> State:
    network = problem.network()
    wanted = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{problem.bits}"),
        granularity=PerGroup(problem.group) if problem.group else PerAxis(0),
        mapping_type=MappingType[setting["mapping"]],
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm[setting["scale"]],
    )
    quantize_(network, wanted, lambda _, name: f"{name}.weight" in problem.weights)
    modules = dict(network.named_modules())
    return {name: modules[name.removesuffix(".weight")].weight.dequantize().float() for name in problem.weights}


if __name__ == "__main__":
    serve(settings, quantize)
