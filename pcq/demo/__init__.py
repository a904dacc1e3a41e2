"""The demo: small pretrained networks that come with the installation, quantized, exported and checked.

The checkpoints were trained by ``tests/benchmarks/train_float.py``; the JSON beside each says how and how well.
"""

import filecmp
import itertools
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pcq import checkpoint, commands
from pcq.atomic import atomic, unwritable
from pcq.errors import PcqError
from pcq.progress import Progress, silent

HERE = Path(__file__).parent
NETWORKS = {
    "digits": ("digits-resnet8", "pcq.demo.nets:resnet8?num_classes=10&in_channels=1", (1, 8, 8)),
    "fashion-mnist": ("fashion-mnist-resnet20", "pcq.demo.nets:resnet20?num_classes=10&in_channels=1", (1, 28, 28)),
}
RECIPES = ("w4", "ternary")


@dataclass(frozen=True)
class DemoRow:
    """One network of the table; ``onnx_*`` are None for the float one."""

    weights: str
    artifact_bytes: int
    onnx_bytes: int | None
    bits: float
    torch_top1: float
    onnx_top1: float | None


@dataclass(frozen=True)
class DemoResult:
    """The whole table, float first, and the commands to go on with."""

    network: str
    data: str
    rows: tuple[DemoRow, ...]
    next_steps: tuple[str, ...]
    seconds: float


def run(
    data: str = "digits", out: str | Path = "pcq-demo", *, force: bool = False, progress: Progress = silent
) -> DemoResult:
    """Float, one-shot 4-bit and ternary: quantize, score in torch, export, score in ONNX Runtime.

    Args:
        data: ``digits`` (scikit-learn's, 400 test images), or ``fashion-mnist[:DIR]`` (10,000 test images).
        out: folder for the checkpoint, the artifacts and the ONNX files; files of an earlier demo are replaced.
        force: replace files of these names that pcq did not write.
        progress: called at each step.

    Raises:
        PcqError: there is no demo for that data, the data is not there, or files cannot be written to ``out``.
    """
    kind = data.partition(":")[0]
    if kind not in NETWORKS:
        raise PcqError(f"there is no demo for '{data}'", where="--data", allowed=", ".join(NETWORKS))
    start = time.perf_counter()
    stem, arch, input_shape = NETWORKS[kind]
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(error, folder) from error
    model = folder / f"{stem}.safetensors"
    earlier = model.is_file() and filecmp.cmp(model, HERE / model.name, shallow=False)
    checkpoint.refuse_overwrite(model, ".safetensors", force=force or earlier)
    for name, suffix in itertools.product(RECIPES, (".safetensors", ".onnx")):
        checkpoint.refuse_overwrite(folder / f"{stem}.{name}{suffix}", suffix, force=force)
    with atomic(model) as draft:
        shutil.copyfile(HERE / model.name, draft)
    steps = 1 + 4 * len(RECIPES)
    progress("scoring the float network", 0, steps)
    scored = commands.evaluate(model, data, arch=arch)
    assert scored.scores.top1 is not None
    rows = [DemoRow("float32", model.stat().st_size, None, 32.0, scored.scores.top1, None)]
    for i, recipe in enumerate(RECIPES):
        progress(f"{recipe}: quantizing", 1 + 4 * i, steps)
        quantized = commands.quantize(model, recipe, arch=arch, force=force)
        progress(f"{recipe}: scoring in torch", 2 + 4 * i, steps)
        in_torch = commands.evaluate(quantized.path, data)
        progress(f"{recipe}: exporting and checking", 3 + 4 * i, steps)
        exported = commands.export_onnx(quantized.path, input_shape=input_shape, force=force)
        progress(f"{recipe}: scoring in ONNX Runtime", 4 + 4 * i, steps)
        in_ort = commands.evaluate(exported.path, data)
        assert in_torch.scores.top1 is not None
        rows.append(
            DemoRow(
                recipe,
                quantized.bytes_after,
                exported.path.stat().st_size,
                quantized.bits,
                in_torch.scores.top1,
                in_ort.scores.top1,
            )
        )
    last = f"{stem}.ternary"
    next_steps = (
        shlex.join(["pcq", "inspect", str(folder / f"{last}.onnx")]),
        shlex.join(["pcq", "eval", str(folder / f"{last}.safetensors"), "--data", data, "--reference", str(model)]),
        "pcq recipes list",
        "pcq quantize YOUR-MODEL.pt --recipe w4",
    )
    return DemoResult(stem, scored.data, tuple(rows), next_steps, time.perf_counter() - start)
