"""Brevitas: GPTQ, GPFQ, Qronos or learned rounding, with bias correction, on folded or re-estimated BatchNorm.

Steps and their order are those of its own ``brevitas_examples/imagenet_classification/ptq``, without quantizers of
activations. Ternary is its two-bit narrow range, binary its ``QuantType.BINARY`` with each channel's mean magnitude.
"""

from argparse import Namespace
from functools import partial

import torch
from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
from brevitas.core.zero_point import ParameterFromStatsFromParameterZeroPoint
from brevitas.graph.calibrate import bias_correction_mode, norm_correction_mode
from brevitas.graph.gpfq import GPFQ, gpfq_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.qronos import Qronos
from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import (
    BitWidthImplType,
    QuantType,
    RestrictValueType,
    ScalingImplType,
    ScalingPerOutputType,
    StatsOp,
)
from brevitas.nn import QuantConv2d, QuantLinear
from brevitas.quant.scaled_int import (
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatHQO,
    Int8WeightPerChannelFloatMSE,
)
from brevitas.quant.shifted_scaled_int import (
    ShiftedUint8WeightPerChannelFloat,
    ShiftedUint8WeightPerChannelFloatHQO,
    ShiftedUint8WeightPerChannelFloatMSE,
)
from brevitas.quant.solver.weight import WeightQuantSolver
from problem import Problem, Setting, State, conv_norms, folded, serve
from torch import nn

BATCH, NUMBERS = 64, 2**20
"""Samples of a batch; at most how many numbers where what enters a depthwise convolution is unfolded."""


class BinaryPerChannel(WeightQuantSolver):
    """``-v`` and ``v`` for each channel, v the float weights' mean magnitude: the least-squares scale."""

    quant_type = QuantType.BINARY
    bit_width_impl_type = BitWidthImplType.CONST
    bit_width = 1
    signed = True
    narrow_range = True
    restrict_scaling_type = RestrictValueType.FP
    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.AVE
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    scaling_min_val = 1e-10


UNIFORM = {
    ("sym", "mse"): Int8WeightPerChannelFloatMSE,
    ("sym", "stats"): Int8WeightPerChannelFloat,
    ("sym", "hqo"): Int8WeightPerChannelFloatHQO,
    ("asym", "mse"): ShiftedUint8WeightPerChannelFloatMSE,
    ("asym", "stats"): ShiftedUint8WeightPerChannelFloat,
    ("asym", "hqo"): ShiftedUint8WeightPerChannelFloatHQO,
}


def settings(problem: Problem) -> list[Setting]:
    if problem.levels == "binary":
        levels = [{"levels": "binary"}]
    elif problem.levels == "ternary":
        levels = [{"levels": "sym", "scale": "mse"}, {"levels": "sym", "scale": "stats"}]
    else:
        levels = [{"levels": "asym", "scale": "mse"}, {"levels": "sym", "scale": "mse"}]
    out: list[Setting] = [{"method": each, "norms": "folded", **levels[0]} for each in ("gptq", "qronos", "gpfq")]
    out += [{"method": "gptq", "norms": "anew", **levels[0]}]
    out += [{"method": "gptq", "norms": "folded", **each} for each in levels[1:]]
    out += [{"method": method, "norms": "anew", **levels[0]} for method in ("qronos", "gpfq")]
    if problem.levels != "binary":
        out += [{"method": "gptq", "norms": "folded", **levels[0], "equalize": 20}]
    if problem.levels not in ("binary", "ternary"):
        out += [{"method": "learned", "norms": "folded", **levels[0], "rate": rate} for rate in (1e-3, 1e-2)]
    return out


def quantizer(problem: Problem, setting: Setting) -> type[ExtendedInjector]:
    if setting["levels"] == "binary":
        return BinaryPerChannel
    quantizer = UNIFORM[setting["levels"], setting["scale"]].let(
        bit_width=problem.bits,
        narrow_range=problem.levels == "ternary",
        scaling_impl=ParameterFromStatsFromParameterScaling,
    )
    if setting["levels"] == "asym":
        quantizer = quantizer.let(zero_point_impl=ParameterFromStatsFromParameterZeroPoint)
    return quantizer


def quantize(problem: Problem, setting: Setting) -> State:
    network = problem.network()
    norms = conv_norms(network)
    model = preprocess_for_quantize(
        network,
        relu6_to_relu=False,
        equalize_iters=setting.get("equalize", 0),
        merge_bn=setting["norms"] == "folded",
    )
    model.eval()
    wanted = {"weight_quant": quantizer(problem, setting), "return_quant_tensor": False}
    model = layerwise_quantize(model, {nn.Conv2d: (QuantConv2d, wanted), nn.Linear: (QuantLinear, wanted)})
    batches = problem.batches(max(1, min(BATCH, NUMBERS // problem.samples[0].numel())))
    with torch.no_grad():
        model(batches[0])
        match setting["method"]:
            case "gptq":
                with gptq_mode(model, act_order=True, use_quant_activations=False) as gptq:
                    for _ in range(gptq.num_layers):
                        for x in batches:
                            gptq.model(x)
                        gptq.update()
            case "gpfq" | "qronos":
                chosen = GPFQ if setting["method"] == "gpfq" else partial(Qronos, alpha=1e-6)
                with gpfq_mode(model, act_order=True, algorithm_impl=chosen) as algorithm:
                    for _ in range(algorithm.num_layers):
                        for x in batches:
                            algorithm.model(x)
                        algorithm.update()
    if setting["method"] == "learned":
        learned_round(model, batches, setting["rate"])
    batches = problem.batches(BATCH)  # BatchNorm is taken anew over batches
    with torch.no_grad():
        if setting["norms"] == "anew":
            with norm_correction_mode(model):
                for x in batches:
                    model(x)
        with bias_correction_mode(model):
            for x in batches:
                model(x)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantConv2d | QuantLinear)}
    found = {name: (m.quant_weight().value, m.bias) for name, m in layers.items()}
    return folded(problem, norms, found, dict(model.named_modules()))


def learned_round(model: nn.Module, batches: list[torch.Tensor], rate: float) -> None:
    """Its learned rounding, layer by layer: AdaRound's function, the example's defaults (their rate is 0.001), but for
    batches of 32 and single precision."""
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as own

    asked = Namespace(
        learned_round="hard_sigmoid", learned_round_mode="layerwise", learned_round_iters=1000, learned_round_lr=rate,
        learned_round_lr_scheduler=None, learned_round_batch_size=32, learned_round_loss="regularised_mse",
    )  # fmt: skip
    parsed = own.parse_args_to_dataclass

    def single(args: Namespace) -> object:
        config = parsed(args)
        config.training_args.use_amp = False
        return config

    own.parse_args_to_dataclass = single
    own.apply_learned_round(model, [(x, torch.zeros(len(x))) for x in batches], asked)


if __name__ == "__main__":
    serve(settings, quantize)
