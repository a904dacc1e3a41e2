"""The numbers of ``metrics.jsonl`` for TensorBoard."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pcq.atomic import unwritable
from pcq.errors import PcqError


def writer() -> Any:
    """torch's class that writes for TensorBoard.

    Raises:
        PcqError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        todo = "pip install tensorboard, or leave out --tensorboard: metrics.jsonl has the same numbers"
        raise PcqError("TensorBoard's package is not installed", where="--tensorboard", todo=todo) from error
    return SummaryWriter


class Board:
    """One run in TensorBoard's folder, under the name of its artifact.

    Going on (``first``: the step from which on) leaves out what the folder has of later steps; so does starting over.

    Raises:
        PcqError: TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str, first: int = 0) -> None:
        make = writer()
        try:
            self._writer = make(str(folder / name), purge_step=first)
        except OSError as error:
            what = f"cannot be written: {(error.strerror or type(error).__name__).lower()}"
            raise PcqError(what, where=str(folder), todo="Choose another folder") from error
        self._folder = folder

    def write(self, line: Mapping[str, Any]) -> None:
        """A scalar ``kind/name`` for each number of a line, at its step.

        Raises:
            PcqError: the disk is full, or the folder cannot be written any more.
        """
        try:
            for name, value in line.items():
                if name not in ("kind", "step") and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
            self._writer.flush()
        except OSError as error:
            raise unwritable(error, self._folder) from error

    def close(self) -> None:
        with suppress(OSError):  # each line was flushed, or has been told of
            self._writer.close()
