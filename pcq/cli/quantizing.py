"""``pcq quantize``."""

from pathlib import Path
from typing import Annotated

import typer

from pcq.cli.app import app
from pcq.cli.frame import answers, bar, emit, say
from pcq.cli.options import AllowGlobal, Arch, Force, Json, Model, Set, UnsafePickle


@app.command()
@answers
def quantize(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe file, or a shipped one's name.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The artifact (default: MODEL.RECIPE.safetensors).")
    ] = None,
    arch: Arch = None,
    overrides: Set = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint in one shot: no data, no training. Writes one .safetensors artifact."""
    from pcq import commands

    planned = commands.plan(
        model,
        recipe,
        arch=arch,
        overrides=overrides or (),
        allow_globals=allow_global or (),
        unsafe_pickle=unsafe_pickle,
    )
    for note in planned.notes:
        say(note)
    if dry_run:
        emit(planned, as_json)
        return
    if not as_json:
        emit(planned, False)
    with bar("quantizing") as progress:
        result = commands.run(planned, out, force=force, progress=progress)
    emit(result, as_json)
    if not as_json:
        say(f"Next: pcq export {result.path} --onnx")
