"""``pcq recipes``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pcq.cli.app import recipes_app
from pcq.cli.frame import answers, emit, starting
from pcq.cli.options import AllowGlobal, Arch, Json, Key, Set, UnsafePickle


@recipes_app.command(name="list")
@answers
def recipes_list(as_json: Json = False) -> None:
    """The recipes that come with pcq."""
    with starting():
        from pcq import commands

    emit(commands.recipes(), as_json)


@recipes_app.command(name="show")
@answers
def recipes_show(name: Annotated[str, typer.Argument(help="A shipped recipe's name.", show_default=False)]) -> None:
    """Print a recipe's YAML, to read or to start your own from."""
    from pcq.shipped import shipped_text

    print(shipped_text(name), end="")


@recipes_app.command(name="check")
@answers
def recipes_check(
    file: Annotated[str, typer.Argument(help="A recipe file, or a shipped one's name.", show_default=False)],
    model: Annotated[Path | None, typer.Argument(help="A checkpoint to plan it for.", show_default=False)] = None,
    arch: Arch = None,
    overrides: Set = None,
    key: Key = None,
    allow_global: AllowGlobal = None,
    unsafe_pickle: UnsafePickle = False,
    as_json: Json = False,
) -> None:
    """Report every mistake in a recipe; with a model, also what each rule would match."""
    with starting():
        from pcq import commands

    result = commands.check(
        file,
        model,
        arch=arch,
        overrides=overrides or (),
        key=key,
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
