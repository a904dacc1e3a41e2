"""The options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pcq.errors import PcqError

Model = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint: .pt .pth .bin .ckpt .safetensors .pt2, an index of shards, or a folder.", show_default=False
    ),
]

Arch = Annotated[
    str | None,
    typer.Option(
        help="The architecture: torchvision:NAME, timm:NAME, hf:FOLDER, file.py:function or package.module:function, "
        "with ?key=value arguments.",
        show_default=False,
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

Force = Annotated[bool, typer.Option("--force", "-f", help="Replace a file that pcq did not write.")]

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe, as in rules.0.levels.bits=4; repeatable."),
]

Key = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which state dict to open, where a checkpoint holds several, such as ema; or which part of one.",
    ),
]

AllowGlobal = Annotated[
    list[str] | None,
    typer.Option(metavar="PKG.CLASS", help="Let a pickled model load this class; repeatable."),
]

UnsafePickle = Annotated[
    bool, typer.Option("--unsafe-pickle", help="Load a pickle that can run code. Only for files you trust.")
]

Samples = Annotated[int | None, typer.Option(help="Calibration samples (default: 512, or what is there).")]

CalibMethod = Annotated[
    Literal["proxconnect", "gptq", "rounding", "nearest"] | None,
    typer.Option(help="How each layer is reconstructed (default: proxconnect; for random gptq)."),
]

Refine = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Optimizer steps to refine each block in, after its layers (default: 160; 0: none)."
    ),
]

Input = Annotated[
    str | None,
    typer.Option("--input", metavar="SHAPE", help="One sample's shape without the batch: 3x224x224, or 128 (tokens)."),
]

Example = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Data with real samples to run on, instead of --input; of several inputs an array for each.",
        show_default=False,
    ),
]


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """``3x224x224 -> (3, 224, 224)``."""
    if text is None:
        return None
    sizes = text.lower().replace(",", "x").split("x")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise PcqError(f"'{text}' is not a shape", where="--input", allowed="sizes joined by x, such as 3x224x224")
    return tuple(int(size) for size in sizes)
