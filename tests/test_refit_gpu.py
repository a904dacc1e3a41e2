"""The GPU's refits are those of refit.py: by their source compiled for the CPU, and on a GPU where there is one."""

import ctypes
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pcq import refit
from pcq.gpu import refit as refit_gpu
from pcq.grids import Codebook, Grid
from pcq.methods import METHODS
from pcq.proxconnect import ProxConnect, Target
from pcq.quantizers import Binary, LeastSquaresBinary, Quantizer, Ternary, Uniform
from pcq.refit import Refitted, refit_together
from pcq.rows import Rows
from pcq.schedules import Linear
from tests.kernel_source import by_source, source
from tests.test_refit import QUANTIZERS, moved

AT_ONCE = [q for q in [*QUANTIZERS, Uniform(3, scale="mean")] if q not in (Uniform(6), Uniform(3, scale="absmax"))]


def cells(rows: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The same in a few words: the nearest level of each weight, the lower one of two."""
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    codes = (rows[:, :, None] > middles[:, None, :]).sum(2)
    chosen = torch.nn.functional.one_hot(codes, levels.shape[1]).double()
    return chosen.sum(1), (chosen * rows[:, :, None]).sum(1)


def some(seed: int, shapes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check_cells(weights: list[tuple[Tensor, Tensor]]) -> None:
    counts, sums = (t.cpu() for t in refit_gpu.cells(weights))
    at = 0
    for rows, levels in weights:
        here, k = slice(at, at := at + len(rows)), levels.shape[1]
        count, total = cells(rows.cpu(), levels.cpu().expand(len(rows), -1))
        assert torch.equal(counts[here, :k], count)
        torch.testing.assert_close(sums[here, :k], total, rtol=1e-9, atol=1e-9)
        assert not counts[here, k:].any()
        assert not sums[here, k:].any()
    assert at == len(counts)


LONG = [(1, 3 * refit_gpu.PIECE), (2, refit_gpu.PIECE + 1), (3, 5), (40, 27), (1, 1), (17, 300)]


@source
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(st.tuples(st.integers(1, 40), st.integers(1, 600)), st.integers(2, 16)), min_size=1, max_size=5),
    st.booleans(),
)
def test_the_source_sums_cells(
    host: dict[str, ctypes.CDLL], seed: int, asked: list[tuple[tuple[int, int], int]], shared: bool
) -> None:
    weights = some(seed, [shape for shape, _ in asked])
    tables = some(seed + 1, [(1 if shared else shape[0], k) for shape, k in asked])
    with by_source(host):
        check_cells([(rows, table.sort(1).values) for rows, table in zip(weights, tables, strict=True)])


@source
def test_rows_of_several_pieces_and_networks_of_several_launches(host: dict[str, ctypes.CDLL]) -> None:
    for shapes in (LONG, [(5, 30)] * 100):
        weights = some(0, shapes)
        with by_source(host):
            check_cells([(rows, torch.tensor([[-1.0, -0.2, 0.3, 0.9]])) for rows in weights])
    with by_source(host):
        at_middles = torch.tensor([[-0.5, 0.5, -0.5000001, 0.5000001]])
        counts, _ = refit_gpu.cells([(at_middles, torch.tensor([[-1.0, 0.0, 1.0]]))])
    assert counts[0, :3].tolist() == [2, 1, 1]


def close(ours: Grid, theirs: Grid, quantizer: Quantizer) -> None:
    assert type(ours) is type(theirs)
    assert ours.count == theirs.count
    torch.testing.assert_close(ours.levels(), theirs.levels(), rtol=1e-5, atol=1e-6, msg=str(quantizer))


def on(place: str, grid: Grid) -> Grid:
    moved = grid.map(lambda t: t.to(place))
    return Codebook(moved.table.to(place), moved.scale) if isinstance(moved, Codebook) else moved


def check_together(place: str) -> None:
    for seed in range(3):
        weights, wanted = [], []
        for quantizer in [*AT_ONCE, *AT_ONCE[::-1]]:
            for g, n in ((3, 40), (1, 700), (5, 64)):
                before, after = moved(seed, g, n)
                grid = quantizer.fit(before)
                wanted.append((refit.refit(quantizer, after, grid), quantizer))
                weights.append(Refitted(quantizer, after.to(place), on(place, grid)))
        fits = [weight.at_once for weight in weights]
        assert sum(fits) >= 0.8 * len(fits), [w.quantizer for w, fit in zip(weights, fits, strict=True) if not fit]
        found = refit_together([weight for weight, fit in zip(weights, fits, strict=True) if fit])
        for ours, (theirs, quantizer) in zip(found, (w for w, f in zip(wanted, fits, strict=True) if f), strict=True):
            close(on("cpu", ours), theirs, quantizer)


@source
def test_refits_at_once_are_the_refits(host: dict[str, ctypes.CDLL]) -> None:
    with by_source(host):
        check_together("cpu")


@source
@pytest.mark.parametrize("quantizer", [Ternary("mse"), Uniform(2), LeastSquaresBinary(2)])
def test_rows_of_which_the_codes_say_nothing_are_fitted_anew(
    host: dict[str, ctypes.CDLL], quantizer: Quantizer
) -> None:
    before, after = moved(1, 4, 50)
    other, there = moved(2, 3, 50)
    grid = quantizer.fit(before)
    stuck = after.clone()
    stuck[2] = 1e-4 * after[2] if isinstance(quantizer, Ternary) else after[2].abs() + 10
    with by_source(host):
        first, second = refit_together(
            [Refitted(quantizer, stuck, grid), Refitted(quantizer, there, quantizer.fit(other))]
        )
    close(first, refit.refit(quantizer, stuck, grid), quantizer)
    close(second, refit.refit(quantizer, there, quantizer.fit(other)), quantizer)


@source
@pytest.mark.parametrize("quantizer", [Ternary(), Binary(), LeastSquaresBinary(2), Uniform(6)])
def test_a_network_trains_as_weight_by_weight(host: dict[str, ctypes.CDLL], quantizer: Quantizer) -> None:
    """Transposed convolutions and six bits are refitted by themselves."""

    def trained() -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 5, 2))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        rows = [Rows(tuple(m.weight.shape), int(isinstance(m, nn.ConvTranspose2d))) for m in net]
        weights = {str(i): Target(m.weight, rows[i], quantizer) for i, m in enumerate(net)}
        hooked = ProxConnect(optimizer, weights, METHODS["parq"], Linear(0.2, 0.8), steps=12, refit=3)
        for _ in range(12):
            optimizer.zero_grad()
            net(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        grids = [weight.grid.levels() for weight in hooked.weights.values()]
        return [p.detach().clone() for p in net.parameters()], grids

    calls: list[int] = []
    plain, levels = trained()
    with by_source(host), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcq.proxconnect.weights.swaps", lambda parameter: False)
        cells_ = refit_gpu.cells

        def counted(weights: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            calls.append(len(weights))
            return cells_(weights)

        patch.setattr(refit_gpu, "cells", counted)
        ours, ours_levels = trained()
    assert calls == ([] if quantizer == Uniform(6) else [2] * 4)
    for a, b in zip([*plain, *levels], [*ours, *ours_levels], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_sums_the_same() -> None:
    for shapes in (LONG, [(5, 30)] * 100, [(64, 27), (512, 4608), (1, 2_000_000)]):
        for k in (2, 3, 16):
            tables = [table.sort(1).values.cuda() for table in some(7, [(rows, k) for rows, _ in shapes])]
            weights = [(rows.cuda(), table) for rows, table in zip(some(3, shapes), tables, strict=True)]
            assert all(refit_gpu.fits(rows, k) for rows, _ in weights)
            if shapes[-1][1] < 2**20:
                check_cells(weights)
            first, again = refit_gpu.cells(weights), refit_gpu.cells(weights)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_refits_the_same() -> None:
    check_together("cuda")
