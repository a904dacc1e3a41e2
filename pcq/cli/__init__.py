"""The command line: the only place that prints, colours, or chooses an exit code.

Heavy imports wait until a command runs, so ``pcq --help`` imports no torch.
"""

import sys
from io import TextIOWrapper
from typing import Any

from pcq.cli import analyzing, benching, demo, exporting, finetuning, looking, quantizing, recipes  # noqa: F401  (they register)
from pcq.cli.app import app
from pcq.cli.frame import interruptible, leave, unsaid


def run(arguments: list[str] | None = None) -> int:
    """Run the command line on ``arguments`` (default: the process's) and return the exit code."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names that its encoding has no letters for
    code: Any = 0
    with interruptible(leave):
        try:
            try:
                app(args=arguments, prog_name="pcq")
            except SystemExit as stop:
                if isinstance(stop.__context__, BrokenPipeError):  # while parsing, which Typer ends by exit code 1
                    return unsaid(stop.__context__)
                code = stop.code
            if sys.stdout is not None:  # it was closed
                sys.stdout.flush()
        except OSError as error:
            return unsaid(error)
    return code if isinstance(code, int) else int(code is not None)
