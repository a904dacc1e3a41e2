"""``pcq bench``."""

from pathlib import Path
from typing import Annotated

import typer

from pcq.cli.app import app
from pcq.cli.frame import answers, bar, emit, starting
from pcq.cli.options import AllowGlobal, Arch, Example, Force, Input, Json, Key, UnsafePickle, shape_of


@app.command()
@answers
def bench(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Checkpoints, artifacts and ONNX files; the first is the measure.", show_default=False),
    ],
    arch: Arch = None,
    input_shape: Input = None,
    example: Example = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Samples at once; repeatable (default: 1 and 8).", show_default=False)
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Threads, 0 for all cores; repeatable (default: 1 and all).", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each latency, files in turn.")] = 20,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes for load time and memory.")] = 3,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw it.", show_default=False)] = None,
    force: Force = False,
    key: Key = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    as_json: Json = False,
) -> None:
    """Compare files: size, time to load, memory, latency. Checkpoints and artifacts run in torch."""
    with starting():
        from pcq import commands

    with bar("measuring") as progress:
        result = commands.bench(
            paths,
            arch=arch,
            input_shape=shape_of(input_shape),
            example=example,
            batches=batch or (1, 8),
            threads=threads or (1, 0),
            rounds=rounds,
            processes=processes,
            plot=plot,
            force=force,
            key=key,
            allow_globals=allow_global or (),
            unsafe_pickle=unsafe_pickle,
            progress=progress,
        )
    emit(result, as_json)
