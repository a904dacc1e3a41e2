"""``pcq export``."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pcq.cli.app import app
from pcq.cli.doors import Compressed, Pt2, StateDict, export_other
from pcq.cli.frame import answers, bar, emit, say, starting
from pcq.cli.options import Arch, Example, Force, Input, Json, shape_of
from pcq.errors import PcqError

if TYPE_CHECKING:
    from pcq.commands import Planned


class Mode(StrEnum):
    """What the file computes with."""

    exact = "exact"
    int8 = "int8"
    native = "native"
    low_memory = "low-memory"
    matmulnbits = "matmulnbits"


class Aim(StrEnum):
    """What layouts are chosen for."""

    size = "size"
    speed = "speed"
    ram = "ram"


class Ranges(StrEnum):
    """How ranges of activations are chosen."""

    minmax = "minmax"
    percentile = "percentile"
    mse = "mse"
    entropy = "entropy"


OF_INT8 = ("--calib", "--samples", "--ranges", "--max-drop", "--float", "--vnni")
FOR_ALL = {"artifact", "out", "named", "onnx", "state_dict", "pt2", "compressed_tensors", "force", "as_json"}
"""Parameters that every form and mode uses, or that choose one."""


def typed(context: typer.Context) -> list[str]:
    """The options on the command line that not every form and mode uses."""
    parameters = [parameter for parameter in context.command.params if parameter.name not in FOR_ALL]
    sources = {parameter: context.get_parameter_source(parameter.name or "") for parameter in parameters}
    return [each.opts[0] for each, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def propose(path: Path, planned: "Planned", shape: tuple[int, ...] | None) -> None:
    """Say how an artifact is exported, with all that the command needs; ``shape``: one sample's, where it is known."""
    from pcq import models
    from pcq.data.inputs import MASK

    arch, source = planned.arch, planned.source
    ready = arch is not None or source.program is None or source.precision == "float32"
    words = ["pcq", "export", str(path), "--onnx" if ready else "--pt2"]
    if arch is not None or source.program is None:  # an exported program brings both along
        words += [] if arch is not None else ["--arch", "ARCH"]
        if len(planned.inputs) > 1 or MASK in planned.inputs or shape == ():  # arrays, each with a shape of its own
            words += ["--example", "SPEC"]
        elif arch is None or models.example_shape(arch) is None:
            words += ["--input", "SHAPE" if shape is None else "x".join(map(str, shape))]
    say(f"Next: {shlex.join(words)}")


@app.command()
@answers
def export(
    context: typer.Context,
    artifact: Annotated[Path, typer.Argument(help="An artifact of pcq quantize.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Argument(
            help="The file, or the folder (default: ARTIFACT with .onnx, .float.safetensors, .pt2 or .compressed)."
        ),
    ] = None,
    named: Annotated[
        Path | None, typer.Option("--out", "-o", help="The same, in the words of the other commands.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX, which is the default.")] = False,
    arch: Arch = None,
    input_shape: Input = None,
    example: Example = None,
    target_ort: Annotated[str, typer.Option(metavar="X.Y", help="The oldest ONNX Runtime to run on.")] = "1.17",
    state_dict: StateDict = False,
    pt2: Pt2 = False,
    compressed_tensors: Compressed = False,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="exact (default): float speed, torch's outputs. int8: activations in 8 bits too, "
            "1.5 to 3.4 times as fast. native: loads quicker, on ONNX Runtime 1.23 and later. low-memory: convolutions "
            "stay packed in memory, and run slower. matmulnbits: so do matrices, by an operator of ONNX Runtime's own.",
            show_default=False,
        ),
    ] = None,
    optimize: Annotated[
        Aim | None,
        typer.Option(
            help="Choose a layout for each weight instead: fewest bytes, quickest (int8 with --calib), least memory.",
            show_default=False,
        ),
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            help="matmulnbits: 4 may round activations to int8 (default; what it costs is measured), 1 does not.",
            show_default=False,
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="int8: data to observe ranges on and to judge by.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(help="int8: how many samples for each.")] = 256,
    ranges: Annotated[Ranges, typer.Option(help="int8: how a range follows from the samples.")] = Ranges.mse,
    max_drop: Annotated[
        float,
        typer.Option(help="int8: points of top-1 (without labels: of predictions, or variance) it may cost."),
    ] = 0.5,
    keep: Annotated[
        list[str] | None,
        typer.Option("--float", metavar="PATTERN", help="int8: layers that stay float; also first, last; repeatable."),
    ] = None,
    vnni: Annotated[
        bool,
        typer.Option("--vnni", help="int8: every x86 that runs it has VNNI; inputs of 8-bit layers need no 7 bits."),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write ONNX whose weights stay packed, and prove it: bit-exact codes, the same outputs as torch, the size."""
    given = typed(context)
    if out is not None and named is not None:
        raise PcqError(f"the file is named twice, {out} and {named}", where="--out", todo="Give one of them")
    out = out or named
    forms = {"--onnx": onnx, "--state-dict": state_dict, "--pt2": pt2, "--compressed-tensors": compressed_tensors}
    if export_other(forms, given, artifact, out, arch, input_shape, example, force, as_json):
        return
    with starting():
        from pcq import commands

    if mode is not None and optimize is not None:
        raise PcqError("--mode and --optimize both choose the layout", where="export", todo="Give one of them")
    fast = mode is Mode.int8 or (optimize is Aim.speed and calib is not None)
    if not fast and (alone := [option for option in given if option in OF_INT8]):
        todo = "Give --mode int8 or, with --calib, --optimize speed; or leave it out"
        raise PcqError("it belongs to --mode int8", where=alone[0], todo=todo)
    if accuracy_level is not None and mode is not Mode.matmulnbits:
        raise PcqError("it belongs to --mode matmulnbits", where="--accuracy-level", todo="Leave it out")
    if accuracy_level not in (None, 1, 4):
        raise PcqError(f"{accuracy_level} is no accuracy level that is offered", where="--accuracy-level",
                       allowed="1 (float32) or 4 (int8 where ONNX Runtime can)")  # fmt: skip
    asked = commands.Int8(calib, samples, ranges.value, max_drop, tuple(keep or ()), vnni)
    int8 = asked if fast else None
    with bar("exporting") as progress:
        result = commands.export_onnx(
            artifact,
            out,
            arch=arch,
            input_shape=shape_of(input_shape),
            example=example,
            target_ort=target_ort,
            layout="exact" if mode is None or fast else mode.value,  # type: ignore[arg-type]
            aim=None if optimize is None or fast else optimize.value,
            level=1 if accuracy_level == 1 else 4,
            int8=int8,
            force=force,
            progress=progress,
        )
    emit(result, as_json)
    if not as_json:
        say(f"Next: {shlex.join(['pcq', 'eval', str(result.path), '--data', 'SPEC'])}")
