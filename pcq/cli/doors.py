"""The forms of ``pcq export`` other than ONNX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pcq.cli.frame import bar, emit, starting
from pcq.cli.options import shape_of
from pcq.errors import PcqError

StateDict = Annotated[bool, typer.Option("--state-dict", help="Write the float weights as plain safetensors instead.")]
Pt2 = Annotated[bool, typer.Option("--pt2", help="Write the float network as an exported program (.pt2) instead.")]
Compressed = Annotated[
    bool,
    typer.Option("--compressed-tensors", help="Write a folder for compressed-tensors instead (Linear, Embedding)."),
]

TAKES = {"--state-dict": (), "--pt2": ("--arch", "--input", "--example"), "--compressed-tensors": ("--arch",)}
"""Which of the options of ``pcq export`` each form uses, besides those of every output."""


def export_other(
    wanted: dict[str, bool],
    given: Sequence[str],
    artifact: Path,
    out: Path | None,
    arch: str | None,
    input_shape: str | None,
    example: str | None,
    force: bool,
    as_json: bool,
) -> bool:
    """Write the form that is wanted; False where none is, and ONNX is meant. ``given`` are the options typed."""
    chosen = [name for name, asked in wanted.items() if asked]
    if chosen in ([], ["--onnx"]):
        return False
    if len(chosen) > 1:
        raise PcqError("several forms at once", where=" ".join(chosen), todo="Run pcq export once for each")
    lost = [option for option in given if option not in TAKES[chosen[0]]]
    if lost:
        raise PcqError(f"it has no part in {chosen[0]}", where=lost[0], todo="Leave it out")
    with starting():
        from pcq import commands

    with bar("exporting") as progress:
        match chosen[0]:
            case "--state-dict":
                result = commands.export_state_dict(artifact, out, force=force)
            case "--pt2":
                shape = shape_of(input_shape)
                result = commands.export_pt2(artifact, out, arch=arch, input_shape=shape, example=example, force=force)
            case _:
                result = commands.export_compressed(artifact, out, arch=arch, force=force, progress=progress)
    emit(result, as_json)
    return True
