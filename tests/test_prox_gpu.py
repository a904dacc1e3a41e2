"""The GPU's kernel is the map of prox.py: its source compiled for the CPU, and on a GPU itself where there is one."""

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcq import prox, prox_gpu
from pcq.grids import Affine, Codebook, Grid
from pcq.prox import BinaryRelax, Hard, L, Parq, Prox, ProxQuant, Shifts, proximal
from tests.test_prox import dyadic_grids, grids, kinds, rounding, strengths

SHIM = """
#include <cmath>
#include <cstring>
#define __device__
#define __forceinline__ inline
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
#include "prox.cu"
static float real(int bits) { float x; std::memcpy(&x, &bits, 4); return x; }
extern "C" void even(const float* rows, float* out, int g, int n, int apart, const float* scales, const float* zeros,
                     int zero, int count, int slope, int shrink, int end, int hard, int ramps, int clipped, int outside,
                     int zeros_apart) {
  for (int r = 0; r < g; r++) {
    const float z = zeros_apart ? zeros[r * apart] : real(zero);
    const float top = count - 1;
    const Even e = {scales[r * apart], z, top, real(slope), real(shrink), real(end), hard, ramps, clipped};
    for (int i = r * n; i < (r + 1) * n; i++) out[i] = whole(rows[i], e, real(outside));
  }
}
extern "C" void listed(const float* rows, float* out, int g, int n, int apart, const float* table, int count, int rho,
                       int varrho, int unit, int hard, int outside) {
  for (int r = 0; r < g; r++) {
    const Listed e = {table + r * apart * count, count, real(rho), real(varrho), unit, hard};
    for (int i = r * n; i < (r + 1) * n; i++) out[i] = whole(rows[i], e, real(outside));
  }
}
"""

laws = settings(deadline=None, max_examples=200)
compiler = shutil.which("c++") or shutil.which("g++")
source = pytest.mark.skipif(compiler is None, reason="there is no C++ compiler to run the kernel's source with")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "shim.cpp").write_text(SHIM)
    command = [str(compiler), "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{Path(prox.__file__).parent}"]
    subprocess.run([*command, "-o", str(folder / "shim.so"), str(folder / "shim.cpp")], check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


@contextmanager
def by_source(library: ctypes.CDLL) -> Iterator[None]:
    """:func:`proximal` takes the way it takes on a GPU, to the source compiled for the CPU."""

    def launch(name: str, rows: Tensor, out: Tensor, apart: bool, *rest: Any) -> None:
        given = [rows, out, *rows.shape, apart, *rest]
        pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int(int(x)) for x in given]
        getattr(library, name)(*pointers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prox_gpu, "fits", lambda rows, out: True)
        patch.setattr(prox_gpu, "_launch", launch)
        yield


def mapped(rows: Tensor, grid: Grid, shifts: Shifts, library: ctypes.CDLL, in_place: bool) -> Tensor:
    with by_source(library):
        if in_place:
            return proximal(rows := rows.clone(), grid, shifts, out=rows)
        return proximal(rows.contiguous(), grid, shifts)


@source
@laws
@given(grids() | dyadic_grids(), kinds, strengths, st.booleans())
def test_the_source_is_the_map(
    host: ctypes.CDLL, case: tuple[Tensor, Grid], kind: Prox, strength: float, in_place: bool
) -> None:
    """Bit by bit on evenly spaced levels and at strength 1; ramps are summed, and not searched, elsewhere."""
    rows, grid = case
    shifts = kind.shifts(strength)
    ours, theirs = mapped(rows, grid, shifts, host, in_place), proximal(rows, grid, shifts)
    if isinstance(grid, Affine) or shifts.hard:
        assert torch.equal(ours, theirs), (ours - theirs).abs().max()
    else:
        assert bool(((ours - theirs).abs() <= rounding(grid, shifts, rows)).all())


@source
@laws
@given(grids(), st.floats(0, 2), st.floats(0, 2), st.sampled_from(["gap", "row", "weight"]), st.floats(0, 1))
def test_the_source_searches_listed_levels(
    host: ctypes.CDLL, case: tuple[Tensor, Grid], rho: float, varrho: float, unit: Any, outside: float
) -> None:
    rows, grid = case
    table = Codebook(grid.levels())
    shifts = Shifts(rho, varrho, unit, outside)
    ours, theirs = mapped(rows, table, shifts, host, False), proximal(rows, table, shifts)
    assert bool(((ours - theirs).abs() <= rounding(table, shifts, rows)).all())


@source
@laws
@given(grids() | dyadic_grids())
def test_the_source_takes_the_level_that_the_grid_encodes(host: ctypes.CDLL, case: tuple[Tensor, Grid]) -> None:
    rows, grid = case
    assert torch.equal(mapped(rows, grid, Hard().shifts(1.0), host, False), grid.decode(grid.encode(rows)))


PROXES: list[Prox] = [Hard(), ProxQuant(), BinaryRelax(), BinaryRelax(clip=True), Parq(), L(1, 0.5), L(0.5, 1, False)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("n", [27, 144, 4608])
def test_a_gpu_has_the_cpus_values(n: int) -> None:
    g = 37
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(g, n, generator=generator)
    scale = torch.linspace(0.0, 1.3, g)
    zeros = torch.randint(0, 15, (g,), generator=generator)
    tables = [torch.randn(rows_, k, generator=generator).sort(1).values for rows_ in (1, g) for k in (2, 4, 16)]
    one = torch.tensor([0.7])
    cases: list[tuple[Tensor, Grid]] = [
        (rows, Affine(scale, 1.0, 3)), (rows, Affine(scale, 0.5, 2)), (rows, Affine(scale / 8, zeros.byte(), 16)),
        (rows, Affine(scale / 8, zeros.half() / 2, 16)), (rows.reshape(1, -1), Affine(one, 1.5, 4)),
        *((rows, Codebook(table)) for table in tables),
    ]  # fmt: skip
    assert prox_gpu.fits(rows.cuda(), rows.cuda())
    for (values, grid), kind in itertools.product(cases, PROXES):
        shifts = kind.shifts(0.6)
        there = values.cuda()
        on_gpu = grid.map(lambda t: t.cuda()) if isinstance(grid, Affine) else Codebook(grid.table.cuda())
        close = proximal(values, grid, shifts)
        assert torch.equal(proximal(there, on_gpu, Hard().shifts(1)).cpu(), grid.decode(grid.encode(values)))
        ours = proximal(there, on_gpu, shifts)
        assert torch.equal(proximal(there, on_gpu, shifts, out=there), ours)
        if isinstance(grid, Affine):
            assert torch.equal(ours.cpu(), close)
        else:
            assert bool(((ours.cpu() - close).abs() <= rounding(grid, shifts, values)).all())
