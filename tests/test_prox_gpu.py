"""The GPU's kernel is the map of prox.py: its source compiled for the CPU, and on a GPU itself where there is one."""

import ctypes
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pcq.gpu import prox as prox_gpu
from pcq.gpu import refit as refit_gpu
from pcq.grids import Affine, Codebook, Grid
from pcq.methods import METHODS
from pcq.prox import BinaryRelax, Hard, L, Parq, Prox, ProxQuant, Shifts, proximal
from pcq.proxconnect import ProxConnect, Target
from pcq.quantizers import Ternary
from pcq.rows import Rows
from pcq.schedules import Linear
from tests.kernel_source import by_source, source
from tests.test_prox import dyadic_grids, grids, kinds, rounding, strengths

laws = settings(deadline=None, max_examples=200)


def exact(grid: Grid, shifts: Shifts) -> bool:
    """Whether the two ways are one, operation by operation: ramps are summed, and not searched, on listed levels, and
    where one row has no gap a CPU takes the map's way outside of the levels for all rows."""
    return isinstance(grid, Affine) and (shifts.outside == 0 or grid.positive)


def mapped(rows: Tensor, grid: Grid, shifts: Shifts, library: dict[str, ctypes.CDLL], in_place: bool) -> Tensor:
    with by_source(library):
        if in_place:
            return proximal(rows := rows.clone(), grid, shifts, out=rows)
        return proximal(rows.contiguous(), grid, shifts)


@source
@laws
@given(grids() | dyadic_grids(), kinds, strengths, st.booleans())
def test_the_source_is_the_map(
    host: dict[str, ctypes.CDLL], case: tuple[Tensor, Grid], kind: Prox, strength: float, in_place: bool
) -> None:
    rows, grid = case
    shifts = kind.shifts(strength)
    ours, theirs = mapped(rows, grid, shifts, host, in_place), proximal(rows, grid, shifts)
    if exact(grid, shifts) or shifts.hard:
        assert torch.equal(ours, theirs), (ours - theirs).abs().max()
    else:
        assert bool(((ours - theirs).abs() <= rounding(grid, shifts, rows)).all())


@source
@laws
@given(grids(), st.floats(0, 2), st.floats(0, 2), st.sampled_from(["gap", "row", "weight"]), st.floats(0, 1))
def test_the_source_searches_listed_levels(
    host: dict[str, ctypes.CDLL], case: tuple[Tensor, Grid], rho: float, varrho: float, unit: Any, outside: float
) -> None:
    rows, grid = case
    table = Codebook(grid.levels())
    shifts = Shifts(rho, varrho, unit, outside)
    ours, theirs = mapped(rows, table, shifts, host, False), proximal(rows, table, shifts)
    assert bool(((ours - theirs).abs() <= rounding(table, shifts, rows)).all())


@source
@laws
@given(grids() | dyadic_grids())
def test_the_source_takes_the_level_that_the_grid_encodes(
    host: dict[str, ctypes.CDLL], case: tuple[Tensor, Grid]
) -> None:
    rows, grid = case
    assert torch.equal(mapped(rows, grid, Hard().shifts(1.0), host, False), grid.decode(grid.encode(rows)))


@source
@pytest.mark.parametrize(
    "method", ["binaryconnect", "proxconnect", "parq", "proxquant", "reverse", "binaryrelax", "bnn+"]
)
def test_a_network_in_one_launch_trains_as_weight_by_weight(host: dict[str, ctypes.CDLL], method: str) -> None:
    """A transposed convolution's rows are no view of it: it is mapped by itself."""

    def trained() -> tuple[list[Tensor], dict[str, Any], int]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 5, 2))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        rows = [Rows(tuple(m.weight.shape), int(isinstance(m, nn.ConvTranspose2d))) for m in net]
        weights = {str(i): Target(m.weight, rows[i], Ternary()) for i, m in enumerate(net)}
        hooked = ProxConnect(optimizer, weights, METHODS[method], Linear(0.2, 0.8), steps=12, refit=3)
        for _ in range(12):
            optimizer.zero_grad()
            net(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        batch = hooked._batch
        return [p.detach().clone() for p in net.parameters()], hooked.state_dict(), len(batch[2]) if batch else -1

    plain, state, none = trained()
    with by_source(host), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcq.proxconnect.weights.swaps", lambda parameter: False)
        patch.setattr(refit_gpu, "fits", lambda rows, count: False)  # which sums in another order
        together, same, alone = trained()
    assert (none, alone) == (-1, 1)
    assert all(torch.equal(a, b) for a, b in zip(plain, together, strict=True))
    for name, weight in state["weights"].items():
        assert torch.equal(weight["latent"], same["weights"][name]["latent"])


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
        if exact(grid, shifts):
            assert torch.equal(ours.cpu(), close)
        else:
            assert bool(((ours.cpu() - close).abs() <= rounding(grid, shifts, values)).all())
