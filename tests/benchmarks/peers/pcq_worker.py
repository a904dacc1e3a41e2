"""pcq itself, as a user calls it: ``pcq.quantize`` with an ``.npz`` of all samples, of which it holds a fifth back."""

import tempfile
from pathlib import Path

import numpy as np
from problem import Problem, Setting, State, serve
from safetensors.torch import save_file

import pcq
from pcq.commands import Calibration

RECIPE = "pcq: 1\nrules:\n  - match: {}\n    levels: {}\n"


def settings(problem: Problem) -> list[Setting]:
    """``refine``: steps of the refinement of blocks that follows the layers; 160 is the default."""
    uniform = [f"{{kind: uniform, bits: {problem.bits}, symmetric: {symmetric}}}" for symmetric in ("true", "false")]
    kinds = [problem.levels] if problem.levels in ("ternary", "binary") else uniform
    plain: list[Setting] = [
        {"method": method, "levels": levels, "refine": 0}
        for method in ("proxconnect", "gptq", "rounding")
        for levels in kinds
    ]
    refined = [{"method": method, "levels": kinds[0], "refine": 160} for method in ("proxconnect", "gptq")]
    return [*plain, *refined]


def quantize(problem: Problem, setting: Setting) -> State:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        group = f"    group: {problem.group}\n" if problem.group else ""
        save_file(problem.state, folder / "float.safetensors")
        np.savez(folder / "samples.npz", x=problem.samples.numpy())
        (folder / "recipe.yaml").write_text(RECIPE.format(list(problem.weights), setting["levels"]) + group)
        arguments = "&".join(f"{key}={value}" for key, value in problem.arguments.items())
        made = pcq.quantize(
            folder / "float.safetensors",
            folder / "recipe.yaml",
            arch=f"{problem.arch}?{arguments}" if arguments else problem.arch,
            out=folder / "out.safetensors",
            calibration=Calibration(
                f"npz:{folder / 'samples.npz'}", method=setting["method"], seed=problem.seed, refine=setting["refine"]
            ),
        )
        return dict(pcq.open_network(made.path).module.state_dict())


if __name__ == "__main__":
    serve(settings, quantize)
