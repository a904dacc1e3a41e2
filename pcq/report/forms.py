"""The two dispatchers, and how sizes, shapes and scores are written."""

import math
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

UNITS = ("B", "kB", "MB", "GB", "TB")
WORD = 12


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


def smaller(before: float, after: float) -> str:
    """``4.1x smaller``, ``1.2x larger``."""
    return f"{before / after:.1f}x smaller" if after <= before else f"{after / before:.1f}x larger"


def percent(value: float | None) -> str:
    """A score in percent, two decimals."""
    return "-" if value is None else f"{value:.2f} %"


def decibels(value: float) -> str:
    """A signal-to-noise ratio; exact is ``exact``."""
    return "exact" if math.isinf(value) else f"{value:.1f}"


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


@dataclass
class Listing:
    """Rows of cells: a table, or where that would break words, a line for each cell under the row's first.

    Words of what is no number, such as names of weights, may be broken in a table, but not into less than ``WORD``.
    """

    title: str
    columns: tuple[str, ...]
    right: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, "bold")
        widths = self._widths(options.max_width - 3 * len(self.columns) - 1)
        if widths is not None:
            made = Table(header_style="bold")
            for column, width in zip(self.columns, widths, strict=True):
                justify: Literal["left", "right"] = "right" if column in self.right else "left"
                made.add_column(Text(column), justify=justify, overflow="fold", width=width)
            for row in self.rows:
                made.add_row(*map(Text, row))
            yield made
            return
        for first, *others in self.rows:
            yield Text(first, overflow="fold")
            for column, cell in zip(self.columns[1:], others, strict=True):
                if cell.strip():
                    said = f"{column}: {' '.join(cell.split())}" if column else cell
                    yield Padding(Text(said, overflow="fold"), (0, 0, 0, 2), expand=False)

    def _widths(self, room: int) -> list[int] | None:
        """The columns' widths within ``room`` altogether; None where words do not fit.

        Room that is left goes to columns whose words are broken, then to the narrowest.
        """
        cells = list(zip(self.columns, *self.rows, strict=True))
        most = [max(map(cell_len, "\n".join(column).split("\n"))) for column in cells]
        words = [max(map(cell_len, " ".join(column).split()), default=0) for column in cells]
        found = [
            word if name in self.right else min(word, WORD) for name, word in zip(self.columns, words, strict=True)
        ]
        while sum(found) < min(room, sum(most)):
            open_ = [i for i in range(len(found)) if found[i] < most[i]]
            found[min(open_, key=lambda i: (found[i] >= words[i], found[i]))] += 1
        return found if sum(found) <= room else None


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Listing:
    """A table with a left-aligned title; the columns named in ``right`` hold numbers."""
    return Listing(title, columns, right)


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
