"""The picture of a result that took its time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pcq.atomic import atomic
from pcq.errors import PcqError

if TYPE_CHECKING:
    from pcq.commands.analyzing import AnalyzeResult
    from pcq.commands.benching import BenchResult

R = TypeVar("R", "AnalyzeResult", "BenchResult")


def drawn(result: R, path: Path, draw: Callable[[R], bytes]) -> R:
    """The result with its picture, which is written to ``path``.

    Raises:
        PcqError: it cannot be drawn or written; ``error.finished`` is the result without it.
    """
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(draw(result))
    except PcqError as error:
        error.finished = result
        raise
    return replace(result, plot=path)
