"""The command line: the only place that prints, colours, or chooses an exit code.

Exit codes: 0 it worked; 2 the input is wrong; 3 the work failed a check; 130 interrupted; 1 a bug, with a traceback.
Results go to standard output (``--json`` for machines), everything else to standard error. Heavy imports wait until a
command runs, so ``pcq --help`` imports no torch.
"""

import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from pcq.errors import PcqError

if TYPE_CHECKING:
    from rich.console import Console

    from pcq.progress import Progress

INTERRUPTED = 130
LOG_SECONDS = 5

app = typer.Typer(
    name="pcq",
    help="Pretrained networks made tiny: 1- to 8-bit weights by proximal quantizers, exported as really packed ONNX.",
    epilog="Start with: pcq demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(no_args_is_help=True, help="List, show and check recipes.")
app.add_typer(recipes_app, name="recipes")

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
AllowGlobal = Annotated[
    list[str] | None,
    typer.Option(metavar="PKG.CLASS", help="Let a pickled model load this class; repeatable."),
]
UnsafePickle = Annotated[
    bool, typer.Option("--unsafe-pickle", help="Load a pickle that can run code. Only for files you trust.")
]
Input = Annotated[
    str | None, typer.Option("--input", metavar="SHAPE", help="One sample's shape without the batch, as in 3x224x224.")
]

P = ParamSpec("P")


def console(*, stderr: bool = False) -> "Console":
    """A rich console; wide where nobody is looking, so that tables in logs and pipes are not folded."""
    from rich.console import Console

    shown = Console(stderr=stderr, highlight=False)
    return shown if shown.is_terminal else Console(stderr=stderr, highlight=False, width=max(shown.width, 160))


def say(message: str) -> None:
    """One line on standard error."""
    console(stderr=True).print(message, markup=False, soft_wrap=True)


def answers(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into one message and the exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PcqError as error:
            if kwargs.get("as_json"):
                print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
            say(f"pcq: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say("pcq: interrupted; no output file was changed.")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(0) from None

    return wrapped


def emit(result: object, as_json: bool) -> None:
    """Print a result on standard output."""
    from pcq import report

    if as_json:
        print(json.dumps(report.to_json(result), indent=1))
    else:
        console().print(report.render(result))


@contextmanager
def bar(label: str) -> Iterator["Progress"]:
    """Progress on standard error: a bar with the time left in a terminal, elsewhere a line every few seconds."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=shown, transient=True, redirect_stdout=False) as bars:
        task = bars.add_task(label, total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bars.update(task, description=stage, completed=done, total=total or None)

        yield progress


def lines() -> "Progress":
    """Progress for logs: at most one line every five seconds, none for what is quicker."""
    last = time.monotonic()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > LOG_SECONDS:
            last = time.monotonic()
            say(f"{stage} ({done:,} of {total:,})" if total else stage)

    return progress


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """``3x224x224 -> (3, 224, 224)``."""
    if text is None:
        return None
    sizes = text.lower().replace(",", "x").split("x")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise PcqError(f"'{text}' is not a shape", where="--input", allowed="sizes joined by x, such as 3x224x224")
    return tuple(int(size) for size in sizes)


def version(wanted: bool) -> None:
    """Print versions and stop."""
    if wanted:
        from importlib.metadata import version as installed

        print("pcq", installed("pcq"))
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pretrained networks made tiny: 1- to 8-bit weights by proximal quantizers, exported as really packed ONNX."""


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


@app.command()
@answers
def export(
    artifact: Annotated[Path, typer.Argument(help="An artifact of pcq quantize.", show_default=False)],
    out: Annotated[Path | None, typer.Argument(help="The ONNX file (default: ARTIFACT with .onnx).")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX (the only format so far).")] = True,
    arch: Arch = None,
    input_shape: Input = None,
    target_ort: Annotated[str, typer.Option(metavar="X.Y", help="The oldest ONNX Runtime to run on.")] = "1.17",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write ONNX whose weights stay packed, and prove it: bit-exact codes, the same outputs as torch, the size."""
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
    levels: Annotated[str, typer.Option(help="With --prox: the levels, separated by commas.")] = "-1,0,1",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --prox: the PNG (default: prox-KIND.png).")
    ] = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    as_json: Json = False,
) -> None:
    """Say what a file is: tensors and architecture, levels and bytes, rules, or how an ONNX file is packed."""
    from pcq import commands

    if prox is not None:
        emit(commands.plot_prox(prox, levels, out), as_json)
        return
    if path is None:
        raise PcqError("nothing to inspect", todo="Name a file, or a proximal map with --prox KIND")
    emit(commands.inspect(path, allow_globals=allow_global or (), unsafe_pickle=unsafe_pickle), as_json)


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
        int | None, typer.Option(min=1, help="Only the first so many samples.", show_default=False)
    ] = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    as_json: Json = False,
) -> None:
    """Score a network on data: top-1 and top-5, and agreement with a float model."""
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
            allow_globals=allow_global or (),
            unsafe_pickle=unsafe_pickle,
            progress=progress,
        )
    emit(result, as_json)


@recipes_app.command(name="list")
@answers
def recipes_list(as_json: Json = False) -> None:
    """The recipes that come with pcq."""
    from pcq import commands

    emit(commands.recipes(), as_json)


@recipes_app.command(name="show")
@answers
def recipes_show(name: Annotated[str, typer.Argument(help="A shipped recipe's name.", show_default=False)]) -> None:
    """Print a recipe's YAML, to read or to start your own from."""
    from pcq.recipe import shipped_text

    print(shipped_text(name), end="")


@recipes_app.command(name="check")
@answers
def recipes_check(
    file: Annotated[str, typer.Argument(help="A recipe file, or a shipped one's name.", show_default=False)],
    model: Annotated[Path | None, typer.Argument(help="A checkpoint to plan it for.", show_default=False)] = None,
    arch: Arch = None,
    overrides: Set = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    as_json: Json = False,
) -> None:
    """Report every mistake in a recipe; with a model, also what each rule would match."""
    from pcq import commands

    result = commands.check(
        file,
        model,
        arch=arch,
        overrides=overrides or (),
        allow_globals=allow_global or (),
        unsafe_pickle=unsafe_pickle,
    )
    emit(result, as_json)


@recipes_app.command(name="schema")
@answers
def recipes_schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from pcq.recipe import json_schema

    print(json.dumps(json_schema(), indent=1))


@app.command()
@answers
def demo(
    data: Annotated[str, typer.Option(help="digits, or fashion-mnist[:DIR].")] = "digits",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the files go.")] = Path("pcq-demo"),
    as_json: Json = False,
) -> None:
    """Quantize a small pretrained network, export it, check it in ONNX Runtime, and say what to type next."""
    from pcq import demo as rooms

    with bar("demo") as progress:
        result = rooms.run(data, out, progress=progress)
    emit(result, as_json)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(arguments: list[str] | None = None) -> int:
    """Run the command line on ``arguments`` (default: the process's) and return the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(args=arguments, prog_name="pcq")
    except SystemExit as stop:
        code: Any = stop.code
        return code if isinstance(code, int) else int(code is not None)
    return 0
