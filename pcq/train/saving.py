"""What a run can go on from, on disk: whole or not at all, and only for the same recipe, model and data."""

import json
import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pcq.atomic import atomic, unwritable
from pcq.errors import CheckFailed, PcqError, first_line, raise_all
from pcq.train.board import Board

FORMAT = 1


def save(path: Path, state: Mapping[str, Any], fingerprint: Mapping[str, str]) -> None:
    """Write ``state`` (tensors and plain values) beside ``path``, flush, rename."""
    # Through an open file torch says why a write failed; by its name it does not.
    with atomic(path) as draft, open(draft, "wb") as file:
        torch.save({"pcq_run": FORMAT, "fingerprint": dict(fingerprint), "state": dict(state)}, file)


def load(path: Path, fingerprint: Mapping[str, str]) -> dict[str, Any]:
    """The state that :func:`save` wrote.

    Raises:
        PcqError: nothing is there, or it belongs to another run.
        CheckFailed: the file is damaged.
    """
    return dict(_read(path, fingerprint)["state"])


def check(path: Path, fingerprint: Mapping[str, str]) -> None:
    """Raise what :func:`load` would, by as much of the fingerprint as is known; tensors are not read."""
    _read(path, fingerprint, mmap=True)


def _read(path: Path, fingerprint: Mapping[str, str], mmap: bool = False) -> dict[str, Any]:
    if not path.is_file():
        raise PcqError("there is no interrupted run to go on with", where=str(path), todo="Leave out --resume")
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        version, theirs, _ = saved["pcq_run"], saved["fingerprint"], saved["state"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        told = first_line(error)
        todo = "Start over with --force"
        raise CheckFailed(f"the saved run cannot be read: {told}", where=str(path), todo=todo) from error
    if version != FORMAT:
        raise PcqError(f"the saved run has format {version}", where=str(path), allowed=f"format {FORMAT}")
    raise_all(
        [
            PcqError(
                f"the interrupted run had another {key} ({_difference(theirs.get(key, 'nothing'), mine)})",
                where=str(path),
                todo="Give the command as it was, or start over with --force instead of --resume",
            )
            for key, mine in fingerprint.items()
            if theirs.get(key) != mine
        ]
    )
    return saved


def _difference(theirs: str, mine: str) -> str:
    """Both, or of two recipes the settings that differ."""
    try:
        a, b = (_flat(json.loads(text)) for text in (theirs, mine))
    except ValueError:
        return f"{theirs}, now {mine}"
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return ", ".join(f"{key} {a.get(key)}, now {b.get(key)}" for key in keys[:3]) or "written otherwise"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, each in items for k, v in _flat(each, f"{path}.{key}" if path else str(key)).items()}


class Metrics:
    """``metrics.jsonl``: a line for each measurement; going on cuts off what came after the saved step.

    Without a path nothing is written: of several processes one does. A ``board`` gets the same numbers.
    """

    def __init__(self, path: Path | None, keep: int = 0, board: Board | None = None) -> None:
        self._board = board
        self._path = path
        self._file: BinaryIO | None = None
        if path is not None and keep and path.is_file() and path.stat().st_size >= keep:
            self._file = open(path, "r+b")  # noqa: SIM115  (closed by close)
            self._file.truncate(keep)
            self._file.seek(keep)

    def write(self, line: Mapping[str, Any]) -> None:
        """
        Raises:
            PcqError: the disk is full, or a file cannot be written any more.
        """
        if self._path is not None:
            try:
                if self._file is None:  # only now: a run that cannot begin leaves the last one's
                    self._file = open(self._path, "wb")  # noqa: SIM115  (closed by close)
                self._file.write(json.dumps(line).encode() + b"\n")
                self._file.flush()
            except OSError as error:
                raise unwritable(error, self._path) from error
        if self._board is not None:
            self._board.write(line)

    def flushed(self) -> int:
        """Bytes so far, all of them on the disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # each line was flushed, or has been told of
                self._file.close()
        if self._board is not None:
            self._board.close()
