"""``pcq finetune``."""

from pathlib import Path
from typing import Annotated

import typer

from pcq.cli.app import app
from pcq.cli.exporting import propose
from pcq.cli.frame import answers, bar, emit, first, starting
from pcq.cli.options import AllowGlobal, Arch, CalibMethod, Force, Json, Key, Model, Refine, Samples, Set, UnsafePickle


@app.command()
@answers
def finetune(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe file, or a shipped one's name.")],
    data: Annotated[
        str, typer.Option("--data", "-d", help="What to train on: digits, fashion-mnist, cifar10:DIR, folder:DIR, ...")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The artifact (default: MODEL.RECIPE.ft.safetensors).")
    ] = None,
    arch: Arch = None,
    method: Annotated[
        str | None,
        typer.Option(help="The algorithm: binaryconnect, proxconnect, reverse, proxquant, binaryrelax, parq, bnn, ..."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data (default: 10).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to train, instead of epochs.")] = None,
    distill: Annotated[
        float | None, typer.Option(help="Share of the loss that follows the float network's outputs, 0 to 1.")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="Start from the calibrated network; samples of a data spec, or `random`: no data."
        ),
    ] = None,
    samples: Samples = None,
    calib_method: CalibMethod = None,
    refine: Refine = None,
    activations: Annotated[
        int | None, typer.Option(metavar="8", help="Train with activations of 8 bits, for `export --mode int8`.")
    ] = None,
    ranges: Annotated[
        str | None, typer.Option(metavar="observed|learned", help="Of these activations (default: observed).")
    ] = None,
    scratch: Annotated[bool, typer.Option("--scratch", help="Start from random weights.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of everything random (default: 0).")] = None,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted.")] = False,
    save_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Save the run so often (default: every two minutes).")
    ] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: each process holds a part of the weights (FSDP2).")
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the metrics for TensorBoard too.")
    ] = None,
    key: Key = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a checkpoint on its levels: wins back what rounding loses. Writes one .safetensors artifact."""
    with starting():
        from pcq import commands

    with bar("fine-tuning") as progress:
        result = commands.finetune(
            model,
            recipe,
            data,
            out=out,
            arch=arch,
            method=method,
            epochs=epochs,
            steps=steps,
            minutes=minutes,
            distill=distill,
            activations=activations,
            ranges=ranges,
            seed=seed,
            overrides=overrides or (),
            calibration=calib,
            samples=samples,
            calib_method=calib_method,
            refine=refine,
            scratch=scratch,
            resume=resume,
            save_every=save_every,
            shard=shard,
            tensorboard=tensorboard,
            key=key,
            allow_globals=allow_global or (),
            unsafe_pickle=unsafe_pickle,
            force=force,
            progress=progress,
        )
    emit(result, as_json)
    if not as_json and first():
        propose(result.path, result.planned, result.shape)
