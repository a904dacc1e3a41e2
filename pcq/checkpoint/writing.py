"""Streaming an artifact to disk: the header first, then each tensor to its place, whole or not at all."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pcq.atomic import atomic, reserve
from pcq.checkpoint.header import PROGRAM, ArtifactHeader, predicted_size
from pcq.errors import CheckFailed
from pcq.grids import Codebook
from pcq.packing import pack
from pcq.qtensor import QuantizedTensor
from pcq.threads import pieces_only


def write_artifact(
    path: str | Path, header: ArtifactHeader, tensors: Iterable[tuple[str, QuantizedTensor | Tensor]]
) -> int:
    """Write an artifact, taking its tensors one by one in any order; ``-> its size in bytes``.

    Whatever goes wrong, also in ``tensors``, leaves nothing behind, and an older file at ``path`` as it was.

    Raises:
        PcqError: ``path`` cannot be written, or the disk is full (found out before the first tensor is asked for).
        CheckFailed: a tensor does not take the bytes that were predicted, or the file does not.
    """
    assert sys.byteorder == "little"
    size = predicted_size(header)
    missing = dict(header.slots)
    written = len(header.prefix)
    with atomic(path) as temporary, pieces_only():
        with open(temporary, "rb+") as file:
            reserve(file, size)
            file.write(header.prefix)

            def put(key: str, tensor: Tensor) -> None:
                nonlocal written
                slot = missing.pop(key, None)
                found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                if slot is None or found != (slot.dtype, slot.shape):
                    planned = "nothing" if slot is None else f"{slot.dtype} {list(slot.shape)}"
                    what = f"'{key}' is {found[0]} {list(found[1])} where {planned} was planned"
                    raise CheckFailed(what, where=str(path))
                file.seek(len(header.prefix) + slot.start)
                written += file.write(bytes_of(tensor))

            for name, value in tensors:
                if isinstance(value, Tensor):
                    put(name, value)
                else:
                    for part, tensor in parts_of(value).items():
                        put(f"{header.stored_as[name]}.{part}", tensor)
            if header.program is not None:
                put(PROGRAM, torch.frombuffer(bytearray(header.program), dtype=torch.uint8))
        assert not missing, f"no value for {list(missing)}"
        if not written == temporary.stat().st_size == size:
            raise CheckFailed(f"it took {written:,} bytes where {size:,} were predicted", where=str(path))
    return size


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def parts_of(value: QuantizedTensor) -> dict[str, Tensor]:
    """What a quantized tensor is stored as: :func:`part_shapes` with values."""
    grid = value.grid
    parts = {"codes": pack(value.codes, grid.count)}
    if grid.scale is not None:
        parts["scale"] = grid.scale
    if isinstance(grid, Codebook):
        parts["levels"] = grid.table
    elif isinstance(grid.zero_point, Tensor):
        parts["zero_point"] = grid.zero_point
    return parts
