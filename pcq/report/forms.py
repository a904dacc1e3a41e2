"""The two dispatchers, and how sizes, shapes and scores are written."""

import math
from functools import singledispatch
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

UNITS = ("B", "kB", "MB", "GB", "TB")


def size(nbytes: float) -> str:
    """Bytes in decimal units: ``5.76 MB``."""
    for unit in UNITS:
        if nbytes < 1000 or unit == UNITS[-1]:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def shape(sizes: tuple[int, ...]) -> str:
    """``(64, 3, 7, 7) -> 64x3x7x7``."""
    return "x".join(map(str, sizes)) or "scalar"


def percent(value: float | None) -> str:
    """A score in percent, two decimals."""
    return "-" if value is None else f"{value:.2f} %"


def decibels(value: float) -> str:
    """A signal-to-noise ratio; exact is ``exact``."""
    return "exact" if math.isinf(value) else f"{value:.1f}"


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table with a left-aligned title; the columns named in ``right`` hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def verbatim(text: str) -> Text:
    """What is to be pasted: its lines are not folded, however narrow the terminal."""
    return Text(text, no_wrap=True, overflow="ignore")


@singledispatch
def render(result: object) -> RenderableType:
    """What a person sees."""
    raise AssertionError(f"no rendering for {type(result)}")


@singledispatch
def to_json(result: object) -> dict[str, Any]:
    """What ``--json`` prints."""
    raise AssertionError(f"no JSON for {type(result)}")
