"""The map of :mod:`pcq.prox` on a GPU: one kernel (``prox.cu``) that reads and writes each weight once.

Operation by operation it is what :mod:`pcq.prox` does with several passes, which is what a GPU does where the kernel
cannot be built: torch compiles it when it is first needed, with the NVRTC that comes with torch; nothing else is asked.
"""

import struct
import warnings
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from pcq.grids import Affine

THREADS = 256

Kernel = Callable[..., None]

UNITS = ("gap", "row", "weight")


def fits(rows: Tensor, out: Tensor) -> bool:
    """Whether the kernel takes these tensors."""
    return (
        rows.device.type == "cuda"
        and rows.dtype == out.dtype == torch.float32
        and rows.is_contiguous()
        and out.is_contiguous()
        and rows.numel() > 0
        and max(rows.shape) < 2**31
        and _kernel("even", _vector(rows, out), rows.device.index) is not None
    )


def even(rows: Tensor, grid: Affine, r: float, v: float, clipped: bool, outside: float, out: Tensor) -> Tensor:
    """Evenly spaced levels, as ``prox._even``; ``r`` and ``v`` in half gaps, ``outside`` added beyond the levels."""
    hard = max(r, v) == 1
    slope = 0.0 if hard else (1 - v) / (1 - r)
    apart = isinstance(grid.zero_point, Tensor)
    zeros = grid.zero_point.float() if isinstance(grid.zero_point, Tensor) else grid.scale
    zero = 0.0 if isinstance(grid.zero_point, Tensor) else grid.zero_point
    _launch("even", rows, out, grid.g > 1, grid.scale, zeros, _bits(zero), grid.count, _bits(slope), _bits(r / 2),
            _bits((1 - v) / 2), hard, v == 0 and not hard, clipped, _bits(outside), apart)  # fmt: skip
    return out


def listed(
    rows: Tensor, table: Tensor, rho: float, varrho: float, unit: str, hard: bool, outside: float, out: Tensor
) -> Tensor:
    """Listed levels ``[g, k]`` or ``[1, k]``, as ``prox._search``, or ``prox._nearest`` if ``hard``."""
    _launch("listed", rows, out, table.shape[0] > 1, table.contiguous(), table.shape[1], _bits(rho), _bits(varrho),
            UNITS.index(unit), hard, _bits(outside))  # fmt: skip
    return out


def _launch(name: str, rows: Tensor, out: Tensor, apart: bool, *rest: Any) -> None:
    g, n = rows.shape
    vector = _vector(rows, out)
    kernel = _kernel(name, vector, rows.device.index)
    assert kernel is not None
    arguments = [rows, out, g, n, apart, *rest]
    grid = (-(-rows.numel() // (THREADS * vector)), 1, 1)
    with torch.cuda.device(rows.device):
        kernel(grid, (THREADS, 1, 1), [int(a) if isinstance(a, bool) else a for a in arguments])


def _vector(rows: Tensor, out: Tensor) -> int:
    """How many weights a thread takes: those of a row, 16 bytes at once where they lie so."""
    return 4 if rows.shape[1] % 4 == 0 and rows.data_ptr() % 16 == out.data_ptr() % 16 == 0 else 1


def _bits(number: float) -> int:
    return int(struct.unpack("i", struct.pack("f", number))[0])


@cache
def _kernel(name: str, vector: int, device: int) -> Kernel | None:
    """None, and a warning, where it cannot be built."""
    from torch.utils import cpp_extension

    source = f"#define VECTOR {vector}\n" + files("pcq").joinpath("prox.cu").read_text()
    home = cpp_extension.CUDA_HOME
    try:
        # torch asks for the CUDA toolkit's headers, of which the kernel needs none.
        cpp_extension.CUDA_HOME = home or "/usr"
        with torch.cuda.device(device):
            kernel: Kernel = torch.cuda._compile_kernel(source, name)
    except Exception as error:  # private to torch: whatever it is, there is another way
        told = str(error).strip().partition("\n")[0]
        warnings.warn(f"proximal maps take several passes on this GPU, for want of a kernel: {told}", stacklevel=2)
        return None
    finally:
        cpp_extension.CUDA_HOME = home
    return kernel
