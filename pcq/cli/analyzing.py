"""``pcq analyze``."""

from pathlib import Path
from typing import Annotated

import typer

from pcq.cli.app import app
from pcq.cli.frame import answers, bar, emit, starting
from pcq.cli.options import AllowGlobal, Arch, Force, Input, Json, Key, Model, Set, UnsafePickle, shape_of


@app.command()
@answers
def analyze(
    model: Model,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A recipe file, or a shipped one's name.", show_default=False)
    ],
    arch: Arch = None,
    overrides: Set = None,
    key: Key = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Run the network on unlabelled samples: a data spec, or `random`: invented samples, no data. "
            "Without it only the weights are looked at.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="How many samples (default: 128, or what is there).")] = None,
    seed: Annotated[int | None, typer.Option(help="Which samples are drawn (default: 0).")] = None,
    input_shape: Input = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the ranking.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Rank the weights by what quantizing them does to the network, and say what to write against it."""
    with starting():
        from pcq import commands

    with bar("analyzing") as progress:
        result = commands.analyze(
            model,
            recipe,
            calib=calib,
            samples=samples,
            seed=seed,
            input_shape=shape_of(input_shape),
            arch=arch,
            overrides=overrides or (),
            key=key,
            allow_globals=allow_global or (),
            unsafe_pickle=unsafe_pickle,
            plot=plot,
            force=force,
            progress=progress,
        )
    emit(result, as_json)
