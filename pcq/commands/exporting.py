"""From an artifact to packed ONNX."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pcq import checkpoint
from pcq.commands.networks import ONNX_SUFFIX, load_network
from pcq.errors import PcqError
from pcq.progress import Progress, silent

if TYPE_CHECKING:
    from pcq.export import OnnxReport


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export_onnx` wrote: the ONNX file, and the proof it passed (see ``pcq.export``)."""

    path: Path
    artifact: Path
    arch: str
    report: "OnnxReport"


def export_onnx(
    artifact: str | Path,
    out: str | Path | None = None,
    *,
    arch: str | None = None,
    input_shape: Sequence[int] | None = None,
    target_ort: str = "1.17",
    force: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Turn an artifact into ONNX whose weights stay packed, and prove that the file computes what torch computes.

    Args:
        artifact: a file that :func:`quantize` wrote.
        out: the ONNX file; default: the artifact's name with ``.onnx``.
        arch: the architecture, where the artifact does not record it.
        input_shape: one sample's shape without the batch, such as ``(3, 224, 224)``; default: what the architecture
            is made for.
        target_ort: the oldest ONNX Runtime that must run the file.
        force: replace a file at ``out`` that pcq did not write.
        progress: called at each stage.

    Raises:
        PcqError: the artifact, the architecture or the target is not usable.
        CheckFailed: the exported file is not bit-exact, does not agree with torch, or has not the size predicted.
    """
    from pcq.export import write_onnx

    source = Path(artifact)
    path = Path(out) if out is not None else source.with_suffix(ONNX_SUFFIX)
    checkpoint.refuse_overwrite(path, inputs=[source], force=force)
    if source.is_file() and source.suffix != ".safetensors" and not checkpoint.is_artifact(source):
        raise PcqError("this is not an artifact of pcq", where=str(source), todo="Make one first with `pcq quantize`")
    stored = checkpoint.read_artifact(source)
    network = load_network(stored, source, arch)
    shape = tuple(input_shape) if input_shape else network.input_shape
    if shape is None:
        raise PcqError(
            f"the input shape of {network.arch} is not known",
            where=str(source),
            todo="Give one sample's shape without the batch, such as --input 3x224x224",
        )
    report = write_onnx(
        network.module,
        stored.quantized,
        (torch.zeros(1, *shape),),
        path,
        metadata={"recipe": json.dumps(stored.recipe), "arch": network.arch, "source": source.name},
        tied=stored.tied,
        target_ort=target_ort,
        progress=progress,
    )
    return ExportResult(path, source, network.arch, report)
