"""The map of :mod:`pcq.prox` on a GPU: one kernel (``prox.cu``) for the weights of a whole network.

Operation by operation it is what :mod:`pcq.prox` does with several passes a weight, which is what a GPU does where the
kernel cannot be built.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from pcq.gpu.kernels import THREADS, WEIGHTS, Arguments, built, launch
from pcq.grids import Affine, Grid

_WEIGHT = struct.Struct("QQQQ7if")
_MAP = struct.Struct("5f5ii")

SOURCE = "prox.cu"


def fits(rows: Tensor, out: Tensor) -> bool:
    """Whether the kernel takes these tensors."""
    return (
        rows.device.type == "cuda"
        and rows.dtype == out.dtype == torch.float32
        and rows.is_contiguous()
        and out.is_contiguous()
        and rows.numel() > 0
        and max(rows.shape) < 2**31
        and built(rows.device.index, SOURCE, "proximal")
    )


class Batch:
    """Maps of ``rows [g, n]`` to ``out [g, n]``, all on one GPU, in one launch for each WEIGHTS of them.

    The tensors have to stay where they are. ``weights`` are (rows, grid, out), as :func:`pcq.prox.proximal` takes them;
    ``listed``: take evenly spaced levels as listed ones, for shifts in the unit of the weights.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor | Grid, Tensor]], listed: bool = False) -> None:
        self.device = weights[0][0].device
        self.kept: list[Tensor] = []
        self.launches: list[tuple[Arguments, int, int]] = []
        for begin in range(0, len(weights), WEIGHTS):
            some, blocks = weights[begin : begin + WEIGHTS], 0
            memory = ctypes.create_string_buffer(WEIGHTS * _WEIGHT.size + _MAP.size)
            for i, (rows, grid, out) in enumerate(some):
                _WEIGHT.pack_into(memory, i * _WEIGHT.size, *self._described(rows, grid, out, blocks, listed))
                blocks += -(-rows.numel() // (4 * THREADS))
            self.launches.append((memory, len(some), blocks))

    def _described(
        self, rows: Tensor, grid: Tensor | Grid, out: Tensor, first: int, listed: bool
    ) -> tuple[int | float, ...]:
        even = isinstance(grid, Affine) and not listed
        zero, zeros = 0.0, 0
        if isinstance(grid, Affine) and even:
            levels, count = grid.scale.contiguous(), grid.count
            if isinstance(grid.zero_point, Tensor):
                self.kept.append(grid.zero_point.float().contiguous())
                zeros = self.kept[-1].data_ptr()
            else:
                zero = grid.zero_point
        else:
            levels = (grid if isinstance(grid, Tensor) else grid.levels()).contiguous()
            count = levels.shape[1]
        self.kept += [rows, out, levels]
        (g, n), pointers = rows.shape, (rows.data_ptr(), out.data_ptr(), levels.data_ptr(), zeros)
        vector = n % 4 == 0 and pointers[0] % 16 == pointers[1] % 16 == 0
        return *pointers, g, n, count, levels.shape[0] > 1, first, vector, even, zero

    def __call__(self, *numbers: float | int) -> None:
        """Map them, by the member of the family with these ``numbers`` of :class:`pcq.prox.Shifts`."""
        for memory, count, blocks in self.launches:
            _MAP.pack_into(memory, WEIGHTS * _WEIGHT.size, *numbers, count)
            launch(self.device, SOURCE, "proximal", memory, blocks)
