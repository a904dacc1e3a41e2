"""Zip archives that hold tensors as their bytes, and the sentence for a file that is damaged."""

import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from pcq.errors import CheckFailed

BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError, RuntimeError)
"""What reading a damaged archive raises (``RuntimeError`` covers unknown compressions and passwords)."""


def damaged(path: Path, what: str) -> CheckFailed:
    """``what`` is wrong with the file."""
    return CheckFailed(f"the file is damaged: {what}", where=str(path), todo="Fetch or write it again")


def members(path: Path) -> list[str]:
    """The names in an archive.

    Raises:
        CheckFailed: it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except BROKEN as error:
        size = f"{path.stat().st_size:,}"
        raise damaged(path, f"it begins as a zip archive, but its end is missing ({size} bytes)") from error


def read_strided(
    path: Path, member: str, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> Tensor:
    """One record as a tensor, contiguous; the archive's checksum is compared on the way.

    Raises:
        CheckFailed: the record is damaged, or too short for the view.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            data = bytearray(archive.read(member))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.as_strided(shape, stride, offset).contiguous()
    except BROKEN as error:
        raise damaged(path, f"{member} ({error})") from error


def check_sums(path: Path) -> None:
    """Compare every record with its checksum, which torch itself never does. A checksum of 0 means there is none.

    Raises:
        CheckFailed: a record does not fit its checksum.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as file:
                    while record.CRC and file.read(1 << 20):
                        pass
            except BROKEN as error:
                raise damaged(path, f"its record {record.filename} does not fit its checksum") from error
