"""NumPy's ``.npz``: named arrays, read one at a time; pickled objects in it are never loaded."""

import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pcq.errors import PcqError
from pcq.sources.archive import BROKEN, damaged
from pcq.sources.safetensors import DTYPES
from pcq.sources.source import Entry


def npz_entries(path: Path) -> dict[str, Entry]:
    """The arrays of an ``.npz`` file.

    Raises:
        PcqError: an array is of a kind that is not a tensor's.
        CheckFailed: the file is damaged.
    """
    entries = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            try:
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else (
                        np.lib.format.read_array_header_2_0)  # fmt: skip
                    shape, _, dtype = header(file)
            except BROKEN as error:
                raise damaged(path, f"'{name}' ({error})") from error
            if dtype.name not in DTYPES.values():
                raise PcqError(f"the array '{name}' is of type {dtype}, which is no tensor's", where=str(path))
            entries[name] = Entry(tuple(shape), dtype.name, partial(read, path, name))
    return entries


def read(path: Path, name: str) -> Tensor:
    """One array as a tensor, in native byte order."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array = arrays[name]
    except BROKEN as error:
        raise damaged(path, f"'{name}' ({error})") from error
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))).reshape(array.shape)
