"""AIMET: AdaRound on folded BatchNorm, without quantizers of activations; 2 to 4 bits.

Its own default is 15,000 iterations a layer, the last setting; with fewer, at its fixed rate of 1e-3, fewer weights
change their rounding. Three levels it has not: its AdaRound uses the fourth of two bits too.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from problem import Problem, Setting, State, conv_norms, folded, serve
from torch import nn

sys.path.append(str(Path(__file__).parents[3]))
from pcq.torchvision_compat import declare_operators

BATCH = 32


def settings(problem: Problem) -> list[Setting]:
    if problem.levels not in ("2", "3", "4"):
        return []
    plain = {"scale": "enhanced", "levels": "sym", "iterations": 2000}
    return [
        plain,
        {**plain, "levels": "asym"},
        {**plain, "equalize": True},
        {**plain, "scale": "range"},
        {**plain, "iterations": 15000},
    ]


def configuration(setting: Setting) -> dict[str, object]:
    """Weights by channel; that it quantizes no outputs is «not supported», and they do not enter the answer."""
    symmetric = str(setting["levels"] == "sym")
    return {
        "defaults": {
            "ops": {"is_output_quantized": "True"},
            "params": {"is_quantized": "True", "is_symmetric": symmetric},
            "per_channel_quantization": "True",
        },
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {},
        "supergroups": [],
        "model_input": {},
        "model_output": {},
    }


def quantize(problem: Problem, setting: Setting) -> State:
    declare_operators()  # AIMET imports torchvision, which refuses to be imported beside a CPU build of torch
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    network = problem.network()
    norms = conv_norms(network)
    x = problem.samples[:1]
    model = prepare_model(network).eval()
    if setting.get("equalize"):
        equalize_model(model, dummy_input=x)
    else:
        fold_all_batch_norms(model, None, dummy_input=x)
    batches = problem.batches(BATCH)
    asked = AdaroundParameters(batches, len(batches), default_num_iterations=setting["iterations"])
    scheme = QuantScheme.post_training_tf_enhanced if setting["scale"] == "enhanced" else QuantScheme.post_training_tf
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(configuration(setting)))
        rounded = Adaround.apply_adaround(
            model, x, asked, folder, "found", problem.bits, default_quant_scheme=scheme, default_config_file=str(config)
        )
        sim = QuantizationSimModel(
            rounded, x, quant_scheme=scheme, default_param_bw=problem.bits, config_file=str(config)
        )
        sim.set_and_freeze_param_encodings(str(Path(folder) / "found.encodings"))
    layers = {name: m for name, m in sim.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    with torch.no_grad():
        found = {name: (m.param_quantizers["weight"](m.weight).dequantize(), m.bias) for name, m in layers.items()}
    return folded(problem, norms, found, dict(sim.model.named_modules()))


if __name__ == "__main__":
    serve(settings, quantize)
