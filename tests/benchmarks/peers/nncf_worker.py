"""NNCF: post-training quantization with bias correction; the quantizers of activations are thrown away afterwards.

Its weight compression (GPTQ, AWQ, scale estimation) keeps every convolution at 8 bits. Its post-training quantization
takes the bit widths of a device's table: 4 bits for a convolution on one of them, and nothing below. Activations get 16
bits meanwhile.
"""

import os

os.environ["CXX"] = "false"  # it falls back on torch's operations: compiling its own takes minutes

import nncf
import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    AdvancedSmoothQuantParameters,
    OverflowFix,
    QuantizationParameters,
)
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    StatisticsCollectorParameters,
    StatisticsType,
)
from nncf.torch.function_hook.wrapper import get_hook_storage
from problem import Problem, Setting, State, serve


def settings(problem: Problem) -> list[Setting]:
    if problem.levels != "4":
        return []
    return [{"bias": bias, "range": span} for bias in ("fast", "none") for span in ("max", "quantile")]


def quantize(problem: Problem, setting: Setting) -> State:
    network = problem.network()
    spans = RangeEstimatorParameters()
    if setting["range"] == "quantile":
        outlier = {"statistics_type": StatisticsType.ABS_QUANTILE, "aggregator_type": AggregatorType.MEAN}
        spans = RangeEstimatorParameters(max=StatisticsCollectorParameters(**outlier, quantile_outlier_prob=0.01))
    asked = AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.DISABLE,
        weights_quantization_params=QuantizationParameters(
            num_bits=problem.bits, mode=QuantizationScheme.SYMMETRIC, per_channel=True
        ),
        weights_range_estimator_params=spans,
        activations_quantization_params=QuantizationParameters(num_bits=16),
        smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
        disable_bias_correction=setting["bias"] == "none",
    )
    made = nncf.quantize(
        network,
        nncf.Dataset(problem.batches(1)),
        subset_size=len(problem.samples),
        target_device=nncf.TargetDevice.NPU,
        advanced_parameters=asked,
    )
    out = {name: tensor for name, tensor in made.state_dict().items() if name in problem.state}
    kinds = dict(network.named_modules())
    hooks = get_hook_storage(made).pre_hooks
    for weight in problem.weights:
        module = weight.removesuffix(".weight")
        kind = "conv2d" if isinstance(kinds[module], torch.nn.Conv2d) else "linear"
        found = hooks[f"{module}/{kind}/0__1".replace(".", "/")]
        with torch.no_grad():
            out[weight] = next(iter(found.values()))(out[weight])
    return out


if __name__ == "__main__":
    serve(settings, quantize)
