"""The Typer application that the commands register with."""

from typing import Annotated

import typer

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
