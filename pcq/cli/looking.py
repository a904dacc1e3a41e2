"""``pcq inspect`` and ``pcq eval``."""

from pathlib import Path
from typing import Annotated

import typer

from pcq.cli.app import app
from pcq.cli.frame import answers, bar, emit, starting
from pcq.cli.options import AllowGlobal, Arch, Json, Key, UnsafePickle
from pcq.errors import PcqError


@app.command()
@answers
def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint, an artifact, a recipe or an ONNX file.", show_default=False),
    ] = None,
    prox: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Plot a proximal map instead: hard, binaryrelax, proxquant or parq."),
    ] = None,
    levels: Annotated[
        str | None, typer.Option(help="With --prox: the levels, separated by commas (default: -1,0,1).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --prox: the PNG (default: prox-KIND.png).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="With --prox: replace a file that pcq did not draw.")
    ] = False,
    key: Key = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    as_json: Json = False,
) -> None:
    """Say what a file is: tensors and architecture, levels and bytes, rules, or how an ONNX file is packed."""
    with starting():
        from pcq import commands

    if prox is not None:
        if path is not None:
            raise PcqError("a file and a proximal map are two things", where=str(path), todo="Leave one of them out")
        emit(commands.plot_prox(prox, "-1,0,1" if levels is None else levels, out, force=force), as_json)
        return
    theirs = {"--levels": levels, "--out": out, "--force": force or None}
    if said := [option for option, value in theirs.items() if value is not None]:
        raise PcqError("it belongs to --prox", where=said[0], todo="Say which map: --prox parq")
    if path is None:
        raise PcqError("nothing to inspect", todo="Name a file, or a proximal map with --prox KIND")
    emit(commands.inspect(path, key=key, allow_globals=allow_global or (), unsafe_pickle=unsafe_pickle), as_json)


@app.command(name="eval")
@answers
def evaluate(
    path: Annotated[Path, typer.Argument(help="A checkpoint, an artifact or an ONNX file.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            help="digits, fashion-mnist[:DIR], cifar10:DIR, folder:DIR, npz:FILE, package.module:function or "
            "file.py:function.",
        ),
    ],
    arch: Arch = None,
    reference: Annotated[
        Path | None, typer.Option(help="The float checkpoint to measure agreement with.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="Which part of the data: test, val or train.")] = "test",
    batch: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 256,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many samples, evenly spaced.", show_default=False)
    ] = None,
    key: Key = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    as_json: Json = False,
) -> None:
    """Score a network on data: top-1 and top-5, and agreement with a float model."""
    with starting():
        from pcq import commands

    with bar("evaluating") as progress:
        result = commands.evaluate(
            path,
            data,
            arch=arch,
            reference=reference,
            split=split,
            batch=batch,
            limit=limit,
            key=key,
            allow_globals=allow_global or (),
            unsafe_pickle=unsafe_pickle,
            progress=progress,
        )
    emit(result, as_json)
