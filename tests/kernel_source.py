"""The GPU's kernels without a GPU: their source compiled for the CPU, behind the calls that would launch them."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pcq.gpu import kernels
from pcq.gpu import prox as prox_gpu
from pcq.gpu import refit as refit_gpu

SHIM = f"""
#include <cmath>
#define HOST
#define THREADS {kernels.THREADS}
#define WEIGHTS {kernels.WEIGHTS}
#define __device__
#define __forceinline__ inline
static float __fadd_rn(float a, float b) {{ return a + b; }}
static float __fsub_rn(float a, float b) {{ return a - b; }}
static float __fmul_rn(float a, float b) {{ return a * b; }}
static float __fdiv_rn(float a, float b) {{ return a / b; }}
"""

PROX = """
#include "prox.cu"
extern "C" void proximal(const Batch* b, int blocks) {
  for (int i = 0; i < b->count; i++) {
    const Weight& w = b->weights[i];
    for (long long at = 0; at < (long long)w.g * w.n; at++)
      w.out[at] = mapped(w.rows[at], w, w.apart ? at / w.n : 0, b->map);
  }
}
"""

REFIT = """
#include "refit.cu"
extern "C" void cells(const Batch* b, int blocks) {
  for (int block = 0; block < blocks; block++) {
    Shared s;
    for (int thread = 0; thread < THREADS; thread++) gather(*b, block, thread, s);
    for (int thread = 0; thread < THREADS; thread++) fold(*b, block, thread, s);
  }
}
extern "C" void combine(const Batch* b, int blocks) {
  const Weight& last = b->weights[b->count - 1];
  for (int row = b->weights[0].at; row < last.at + last.g; row++)
    for (int level = 0; level < LEVELS; level++) add(*b, row, level);
}
"""

compiler = shutil.which("c++") or shutil.which("g++")
source = pytest.mark.skipif(compiler is None, reason="there is no C++ compiler to run the kernels' source with")


def compiled(folder: Path) -> dict[str, ctypes.CDLL]:
    """A library for each ``.cu`` file."""
    found = {}
    for name, text in ((prox_gpu.SOURCE, PROX), (refit_gpu.SOURCE, REFIT)):
        file = folder / f"{name}.cpp"
        file.write_text(SHIM + text)
        command = [str(compiler), "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{Path(kernels.__file__).parent}"]
        subprocess.run([*command, "-o", str(file.with_suffix(".so")), str(file)], check=True)
        found[name] = ctypes.CDLL(str(file.with_suffix(".so")))
    return found


@contextmanager
def by_source(libraries: dict[str, ctypes.CDLL]) -> Iterator[None]:
    """What a GPU would do is done, by the kernels' source, to tensors of the CPU."""

    def launch(device: torch.device, source: str, name: str, arguments: kernels.Arguments, blocks: int) -> None:
        getattr(libraries[source], name)(arguments, blocks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prox_gpu, "fits", lambda rows, out: True)
        patch.setattr(refit_gpu, "fits", lambda rows, count: rows.is_contiguous() and count <= refit_gpu.LEVELS)
        for module in (prox_gpu, refit_gpu):
            patch.setattr(module, "launch", launch)
        yield
