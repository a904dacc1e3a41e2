"""``pcq export``."""

from pathlib import Path
from typing import Annotated

import typer

from pcq.cli.app import app
from pcq.cli.doors import Compressed, Pt2, StateDict, export_other
from pcq.cli.frame import answers, bar, emit, say
from pcq.cli.options import Arch, Force, Input, Json, shape_of


@app.command()
@answers
def export(
    artifact: Annotated[Path, typer.Argument(help="An artifact of pcq quantize.", show_default=False)],
    out: Annotated[Path | None, typer.Argument(help="The ONNX file (default: ARTIFACT with .onnx).")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX (the only format so far).")] = True,
    arch: Arch = None,
    input_shape: Input = None,
    target_ort: Annotated[str, typer.Option(metavar="X.Y", help="The oldest ONNX Runtime to run on.")] = "1.17",
    state_dict: StateDict = False,
    pt2: Pt2 = False,
    compressed_tensors: Compressed = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write ONNX whose weights stay packed, and prove it: bit-exact codes, the same outputs as torch, the size."""
    other = {"--state-dict": state_dict, "--pt2": pt2, "--compressed-tensors": compressed_tensors}
    if export_other(other, artifact, out, arch, input_shape, force, as_json):
        return
    from pcq import commands

    with bar("exporting") as progress:
        result = commands.export_onnx(
            artifact,
            out,
            arch=arch,
            input_shape=shape_of(input_shape),
            target_ort=target_ort,
            force=force,
            progress=progress,
        )
    emit(result, as_json)
    if not as_json:
        say(f"Next: pcq eval {result.path} --data SPEC")
