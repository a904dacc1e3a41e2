"""The map of :mod:`pcq.prox` on a GPU: one kernel (``prox.cu``) for the weights of a whole network.

Operation by operation it is what :mod:`pcq.prox` does with several passes a weight, which is what a GPU does where the
kernel cannot be built: torch compiles it when it is first needed, with the NVRTC that comes with torch; no CUDA
toolkit is asked.
"""

import ctypes
import struct
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from pcq.errors import first_line
from pcq.grids import Affine, Grid

THREADS = 256
WEIGHTS = 48
"""Tensors of a launch: as many as the 4 KiB of a kernel's arguments hold."""

_WEIGHT = struct.Struct("QQQQ7if")
_MAP = struct.Struct("6f5ii")


def fits(rows: Tensor, out: Tensor) -> bool:
    """Whether the kernel takes these tensors."""
    return (
        rows.device.type == "cuda"
        and rows.dtype == out.dtype == torch.float32
        and rows.is_contiguous()
        and out.is_contiguous()
        and rows.numel() > 0
        and max(rows.shape) < 2**31
        and _kernel(rows.device.index) is not None
    )


class Batch:
    """Maps of ``rows [g, n]`` to ``out [g, n]``, all on one GPU, in one launch for each WEIGHTS of them.

    The tensors have to stay where they are. ``weights`` are (rows, grid, out), as :func:`pcq.prox.proximal` takes them;
    ``listed``: take evenly spaced levels as listed ones, for shifts in the unit of the weights.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor | Grid, Tensor]], listed: bool = False) -> None:
        self.device = weights[0][0].device
        self.kept: list[Tensor] = []
        self.launches: list[tuple[ctypes.Array[ctypes.c_char], int, int]] = []
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
            _launch(self.device, memory, blocks)


def _launch(device: torch.device, memory: "ctypes.Array[ctypes.c_char]", blocks: int) -> None:
    kernel = _kernel(device.index)
    assert kernel is not None
    if torch.cuda.current_device() == device.index:
        kernel(memory, blocks)
        return
    with torch.cuda.device(device):
        kernel(memory, blocks)


@cache
def _kernel(device: int) -> Callable[["ctypes.Array[ctypes.c_char]", int], None] | None:
    """What launches it with these arguments on so many blocks; None, and a warning, where it cannot be built."""
    from torch.utils import cpp_extension

    source = f"#define THREADS {THREADS}\n#define WEIGHTS {WEIGHTS}\n" + files("pcq").joinpath("prox.cu").read_text()
    home = cpp_extension.CUDA_HOME
    try:
        from torch.cuda import _utils

        # torch asks for the CUDA toolkit's headers, of which the kernel needs none.
        cpp_extension.CUDA_HOME = home or "/usr"
        with torch.cuda.device(device):
            built = torch.cuda._compile_kernel(source, "proximal")
        start, check = _utils._get_gpu_runtime_library().cuLaunchKernel, _utils._check_cuda
        function = built.func
    except Exception as error:  # private to torch: whatever it is, there is another way
        told = first_line(error)
        warnings.warn(f"proximal maps take several passes on this GPU, for want of a kernel: {told}", stacklevel=2)
        return None
    finally:
        cpp_extension.CUDA_HOME = home

    def launch(memory: "ctypes.Array[ctypes.c_char]", blocks: int) -> None:
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(memory))
        stream = torch.cuda.current_stream(device)._as_parameter_
        check(start(function, blocks, 1, 1, THREADS, 1, 1, 0, stream, arguments, None))

    return launch
