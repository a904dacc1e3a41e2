"""What refits of levels sum, on a GPU: two kernels (``refit.cu``) for the weights of a whole network."""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from pcq.gpu.kernels import WEIGHTS, built, launch

_WEIGHT = struct.Struct("QQ7i4x")
_OUT = struct.Struct("QQQQi4x")

SOURCE = "refit.cu"
LEVELS, PIECE, ROWS = 16, 16384, 16
"""Of the kernels: levels at most, weights of a piece of a row, and rows that a block of ``combine`` adds up."""


def fits(rows: Tensor, count: int) -> bool:
    """Whether the kernels take these rows, with so many levels."""
    return (
        rows.device.type == "cuda"
        and rows.dtype == torch.float32
        and rows.is_contiguous()
        and rows.numel() > 0
        and count <= LEVELS
        and max(rows.shape) < 2**31 - PIECE
        and rows.shape[0] * -(-rows.shape[1] // PIECE) < 2**31
        and built(rows.device.index, SOURCE, "cells", "combine")
    )


def cells(weights: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """How many weights are nearest to each level, and their sum; a weight in the middle belongs to the lower level.

    Args:
        weights: rows ``[g, n]`` and their levels ``[g, k]`` or ``[1, k]``, ascending, k up to LEVELS; all on one GPU.

    Returns:
        float64 ``[rows of all weights, LEVELS]`` each, 0 where there is no such level.
    """
    device = weights[0][0].device
    counts, sums = torch.empty(2, sum(len(rows) for rows, _ in weights), LEVELS, dtype=torch.float64, device=device)
    at = 0
    for begin in range(0, len(weights), WEIGHTS):
        some = weights[begin : begin + WEIGHTS]
        memory, kept = ctypes.create_string_buffer(WEIGHTS * _WEIGHT.size + _OUT.size), []
        blocks, start = 0, at
        for i, (rows, levels) in enumerate(some):
            (g, n), pieces = rows.shape, -(-rows.shape[1] // PIECE)
            kept.append(levels.contiguous())
            numbers = g, n, levels.shape[1], levels.shape[0] > 1, pieces, blocks, at
            _WEIGHT.pack_into(memory, i * _WEIGHT.size, rows.data_ptr(), kept[-1].data_ptr(), *numbers)
            blocks, at = blocks + g * pieces, at + g
        parts = torch.empty(2, blocks, LEVELS, dtype=torch.float64, device=device)
        pointers = [t.data_ptr() for t in (parts[0], parts[1], counts, sums)]
        _OUT.pack_into(memory, WEIGHTS * _WEIGHT.size, *pointers, len(some))
        launch(device, SOURCE, "cells", memory, blocks)
        launch(device, SOURCE, "combine", memory, -(-(at - start) // ROWS))
    return counts, sums
