"""``pcq quantize``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pcq.cli.app import app
from pcq.cli.exporting import propose
from pcq.cli.frame import answers, bar, emit, say, starting
from pcq.cli.options import (
    AllowGlobal,
    Arch,
    CalibMethod,
    Force,
    Input,
    Json,
    Key,
    Model,
    Refine,
    Samples,
    Set,
    UnsafePickle,
    shape_of,
)
from pcq.errors import PcqError

if TYPE_CHECKING:
    from pcq.commands import Calibration, Planned


@app.command()
@answers
def quantize(
    model: Model,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="A recipe file, or a shipped one's name.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The artifact (default: MODEL.RECIPE.safetensors, for ONNX .onnx)."),
    ] = None,
    arch: Arch = None,
    overrides: Set = None,
    key: Key = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Calibrate on unlabelled samples: a data spec, such as folder:DIR; or `random`: invented samples, "
            "no data. ONNX: npz:FILE with an array for each input.",
        ),
    ] = None,
    samples: Samples = None,
    calib_method: CalibMethod = None,
    refine: Refine = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Choose each weight's levels so that it fits: 3MB, 900kB, 2.5bits. Needs no recipe."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which calibration samples are drawn (default: 0).")] = None,
    input_shape: Input = None,
    detect: Annotated[
        bool, typer.Option("--detect", help="ONNX: no recipe; pack weights that have few values already, losslessly.")
    ] = False,
    sample: Annotated[
        list[Path] | None,
        typer.Option(metavar="NPZ", help="ONNX: an array for each input, to compare on as well; repeatable."),
    ] = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint in one shot, without training. Writes one .safetensors artifact; for ONNX, packed ONNX."""
    with starting():
        from pcq import commands

    calibration = None
    given = {"--samples": samples, "--calib-method": calib_method, "--refine": refine, "--seed": seed,
             "--input": input_shape}  # fmt: skip
    if calib is not None:
        calibration = commands.Calibration(calib, samples, calib_method, seed or 0, shape_of(input_shape), refine)
    elif said := [option for option, value in given.items() if value is not None]:
        todo = "Say on what: --calib folder:DIR, or --calib random"
        raise PcqError("this is about calibration, which was not asked for", where=said[0], todo=todo)

    if model.suffix == ".onnx":
        theirs = {"--arch": arch, "--input": input_shape, "--key": key, "--allow-global": allow_global,
                  "--unsafe-pickle": unsafe_pickle or None}  # fmt: skip
        if said := [option for option, value in theirs.items() if value is not None]:
            raise PcqError("this is about checkpoints, and an ONNX model was given", where=", ".join(said))
        if budget is not None:
            todo = "Choose the levels by a recipe: -r w4"
            raise PcqError("budgets are for checkpoints, and an ONNX model was given", where="--budget", todo=todo)
        if refine is not None:
            raise PcqError("blocks are refined in checkpoints, and an ONNX model was given", where="--refine")
        planned = commands.plan_onnx(model, recipe, overrides=overrides or (), detect=detect)
        _onnx(planned, out, calibration, sample or [], force, dry_run, as_json)
        return
    if detect or sample:
        raise PcqError("this is about ONNX models, and a checkpoint was given", where="--detect, --sample")
    if recipe is None and budget is None:
        raise PcqError("a recipe is needed", where="--recipe", todo="`pcq recipes list` shows those that come with pcq")
    planned = commands.plan(
        model,
        recipe if recipe is not None else commands.everything(budget or ""),
        arch=arch,
        overrides=overrides or (),
        key=key,
        allow_globals=allow_global or (),
        unsafe_pickle=unsafe_pickle,
    )
    for note in planned.notes:
        say(note)
    budget = budget or planned.recipe.budget
    if dry_run and budget is not None:
        with bar("allocating") as progress:
            emit(commands.allocate(planned, budget, calibration, progress), as_json)
        return
    if dry_run:
        emit(planned, as_json)
        return
    if not as_json and budget is None:
        emit(planned, False)
    with bar("quantizing") as progress:
        result = commands.run(planned, out, calibration=calibration, budget=budget, force=force, progress=progress)
    emit(result, as_json)
    if not as_json:
        calibrated = result.calibrated  # without a shape: by several arrays
        propose(result.path, planned, None if calibrated is None else calibrated.shape or ())


def _onnx(
    planned: "Planned",
    out: Path | None,
    calibration: "Calibration | None",
    samples: list[Path],
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """ONNX in, ONNX out."""
    from pcq import commands

    for note in planned.notes:
        say(note)
    if dry_run or not as_json:
        emit(planned, as_json)
    if dry_run:
        return
    with bar("quantizing") as progress:
        result = commands.run_onnx(
            planned, out, calibration=calibration, samples=samples, force=force, progress=progress
        )
    emit(result, as_json)
