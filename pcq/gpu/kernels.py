"""Kernels for a GPU, from the ``.cu`` files beside it: compiled when first needed, launched by their name.

torch compiles them with the NVRTC that comes with it; no CUDA toolkit is asked. Where that does not work there is no
kernel, which is said once, and what asked for it goes another way.
"""

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from importlib.resources import files

import torch

from pcq.errors import first_line

THREADS = 256
"""Of a block."""

WEIGHTS = 48
"""Tensors of a launch: as many as the 4 KiB of a kernel's arguments hold."""

Arguments = ctypes.Array[ctypes.c_char]
"""The memory of the one struct that a kernel takes."""


def built(device: int, source: str, *names: str) -> bool:
    """Whether the kernels ``names`` of the file ``source`` run on that GPU."""
    return all(_kernel(device, source, name) is not None for name in names)


def launch(device: torch.device, source: str, name: str, arguments: Arguments, blocks: int) -> None:
    """Put the kernel ``name`` of ``source`` on the device's current stream, ``blocks`` of THREADS threads each."""
    kernel = _kernel(device.index, source, name)
    assert kernel is not None, (source, name)
    if torch.cuda.current_device() == device.index:
        kernel(arguments, blocks)
        return
    with torch.cuda.device(device):
        kernel(arguments, blocks)


@cache
def _kernel(device: int, source: str, name: str) -> Callable[[Arguments, int], None] | None:
    """What launches it with these arguments on so many blocks; None, and a warning, where it cannot be built."""
    from torch.utils import cpp_extension

    text = f"#define THREADS {THREADS}\n#define WEIGHTS {WEIGHTS}\n" + files("pcq.gpu").joinpath(source).read_text()
    home = cpp_extension.CUDA_HOME
    try:
        from torch.cuda import _utils

        # torch asks for the CUDA toolkit's headers, of which the kernels need none.
        cpp_extension.CUDA_HOME = home or "/usr"
        with torch.cuda.device(device):
            compiled = torch.cuda._compile_kernel(text, name)
        start, check = _utils._get_gpu_runtime_library().cuLaunchKernel, _utils._check_cuda
        function = compiled.func
    except Exception as error:  # private to torch: whatever it is, there is another way
        told = first_line(error)
        warnings.warn(f"pcq takes slower ways on this GPU, for want of a kernel ({name}): {told}", stacklevel=2)
        return None
    finally:
        cpp_extension.CUDA_HOME = home

    def start_it(arguments: Arguments, blocks: int) -> None:
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream(device)._as_parameter_
        check(start(function, blocks, 1, 1, THREADS, 1, 1, 0, stream, pointer, None))

    return start_it
