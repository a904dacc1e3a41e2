"""What every command shares: the console, progress, one message and an exit code for what went wrong.

Exit codes: 0 it worked; 2 the input is wrong; 3 the work failed a check; 130 interrupted (143 by SIGTERM, 141 by a
closed pipe); 1 a bug, with a traceback.
Results go to standard output (``--json`` for machines), everything else to standard error.
"""

import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO

import typer

from pcq.atomic import FULL
from pcq.errors import Elsewhere, PcqError

if TYPE_CHECKING:
    from rich.console import Console

    from pcq.progress import Progress

INTERRUPTED = "pcq: interrupted; no output file was changed."

CLOSED_PIPE = 141

LOG_SECONDS = 5

P = ParamSpec("P")


def console(*, stderr: bool = False) -> "Console":
    """A rich console; wide where nobody is looking, so that tables in logs and pipes are not folded.

    Text is text: ``net.py:boom`` and ``[1]`` in the names of files and weights are no emoji and no markup.
    """
    from rich.console import Console

    class Pipe(Console):
        """Rich ends the process here, by exit code 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    shown = Pipe(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not shown.is_terminal:
        shown.width = max(shown.width, 160)
    return shown


def alone() -> bool:
    """Whether ``torchrun`` started no others beside this process."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def first() -> bool:
    """Whether this is the process that speaks: of those that ``torchrun`` started, one."""
    return alone() or os.environ.get("RANK", "0") == "0"


_stopped = 0
"""The signal that was to stop this command, if there was one."""


def _interrupt(number: int, _frame: FrameType | None) -> None:
    global _stopped
    _stopped = number
    raise KeyboardInterrupt


def leave(number: int, _frame: FrameType | None) -> None:
    """Before anything is written: end at once, for some of what PyTorch imports catches KeyboardInterrupt."""
    if first():
        console(stderr=True).show_cursor(True)
        say(INTERRUPTED)
    os._exit(128 + number)


@contextmanager
def interruptible(then: "Callable[[int, FrameType | None], None]" = _interrupt) -> Iterator[None]:
    """Within it SIGINT and SIGTERM call ``then``; a process that was started to ignore one goes on ignoring it."""
    global _stopped
    _stopped = 0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    wanted = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in wanted:
        signal.signal(number, then)
    try:
        yield
    finally:
        for number in wanted:
            signal.signal(number, before[number])


def say(message: str) -> None:
    """One line on standard error."""
    console(stderr=True).print(message, soft_wrap=True)


def answers(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into one message and the exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with interruptible():
                command(*args, **kwargs)
            if sys.stdout is not None:  # it was closed
                sys.stdout.flush()
        except Elsewhere as error:
            time.sleep(1)  # torchrun ends all processes after the first: let the one that failed have its say
            raise typer.Exit(error.exit_code) from None
        except PcqError as error:
            if kwargs.get("as_json"):
                found = {} if error.finished is None else _json(error.finished)
                print(json.dumps({**found, "error": str(error), "exit_code": error.exit_code}))
            elif error.finished is not None:
                emit(error.finished, False)
            say(f"pcq: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            if first():
                say(f"pcq: {stop}" if str(stop) else INTERRUPTED)
            raise typer.Exit(128 + (getattr(stop, "number", 0) or _stopped or signal.SIGINT)) from None
        except ModuleNotFoundError as error:
            package = (error.name or "pcq").partition(".")[0]
            if package == "pcq" or find_spec(package) is not None:
                raise
            say(f"pcq: this needs {package}, which is not installed. Run `pip install {package.replace('_', '-')}`")
            raise typer.Exit(2) from None
        except OSError as error:
            raise typer.Exit(unsaid(error)) from None

    return wrapped


@contextmanager
def starting() -> Iterator[None]:
    """Around the import of what needs PyTorch, which takes seconds: in a terminal a line says so and goes again."""
    if "torch" in sys.modules:
        yield
        return
    shown = console(stderr=True)
    seen = shown.status("starting: PyTorch is imported") if first() and shown.is_terminal else nullcontext()
    with interruptible(leave), seen:
        yield


def unsaid(error: OSError) -> int:
    """The exit code where standard output is closed or full, which is said; any other error is raised again."""
    if isinstance(error, BrokenPipeError):
        _to_nowhere(sys.stdout, sys.stderr)
        return CLOSED_PIPE
    if error.errno not in FULL or error.filename is not None:
        raise error
    _to_nowhere(sys.stdout)
    try:
        say("pcq: standard output: no room left to write it. Free some space, or choose another disk.")
    except OSError:  # nor has standard error any
        _to_nowhere(sys.stderr)
    return 2


def _to_nowhere(*streams: TextIO) -> None:
    """What is left in their buffers would end in a traceback when Python flushes them at its end."""
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _numbers(found: object) -> object:
    """JSON has neither NaN nor infinity: null in their place."""
    if isinstance(found, dict):
        return {key: _numbers(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_numbers(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def emit(result: object, as_json: bool) -> None:
    """Print a result on standard output."""
    if not first():
        return
    if as_json:
        print(json.dumps(_json(result), indent=1, allow_nan=False))
    else:
        from pcq import report

        console().print(report.render(result), crop=False)


def _json(result: object) -> "dict[str, Any]":
    from pcq import report

    return {key: _numbers(value) for key, value in report.to_json(result).items()}


def _still_wanted() -> None:
    """Raise KeyboardInterrupt again: some libraries catch it where they import one another."""
    if _stopped:
        raise KeyboardInterrupt


@contextmanager
def bar(label: str) -> Iterator["Progress"]:
    """Progress on standard error: a bar with the time left in a terminal, elsewhere a line every few seconds."""
    from pcq.progress import silent

    shown = console(stderr=True)
    if not first():
        yield silent
        return
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
            _still_wanted()
            bars.update(task, description=stage, completed=done, total=total or None)

        yield progress


def lines() -> "Progress":
    """Progress for logs: at most one line every five seconds, none for what is quicker.

    The time left is that of the work at hand, which is another where what is done falls back or the total changes.
    """
    last = begun = time.monotonic()
    start = before = 0
    known: int | None = None

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last, start, begun, before, known
        _still_wanted()
        if total != known or done < before:
            begun, start, known = time.monotonic(), done, total
        before = done
        if time.monotonic() - last > LOG_SECONDS:
            last = time.monotonic()
            left = (last - begun) / max(1, done - start) * (total - done)
            soon = "" if left < 2 * LOG_SECONDS or done <= start else f", about {duration(left)} left"
            say(f"{stage} ({done:,} of {total:,}{soon})" if total else stage)

    return progress


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
