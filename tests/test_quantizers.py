"""The levels: least squares against slow twins, never worse than the heuristics, and finite on every row."""

import dataclasses
import math
from collections.abc import Callable
from itertools import combinations, product
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import TypeAdapter
from torch import Tensor

from pcq import kmeans, leastsquares, quantizers
from pcq.grids import Affine, Codebook, Grid
from pcq.quantizers import (
    GAUSSIAN_STEP,
    NF4,
    AdditivePowersOfTwo,
    Binary,
    Fixed,
    KMeans,
    LeastSquaresBinary,
    Quantizer,
    Ternary,
    Uniform,
    additive_powers,
)

EVERY: tuple[Quantizer, ...] = (
    Binary(),
    Ternary(),
    Ternary("mean"),
    *(LeastSquaresBinary(bits, refine) for bits in (1, 3) for refine in (0, 10)),
    *(Uniform(bits, symmetric, scale) for bits in (1, 3, 8) for symmetric in (True, False)
      for scale in ("mse", "absmax", "mean")),
    *(KMeans(levels) for levels in (2, 3, 16, 256)),
    *(AdditivePowersOfTwo(bits, terms) for bits, terms in ((2, 1), (4, None), (4, 1), (8, 1), (8, None))),
    *(Fixed(levels, scale) for levels in ((-1.0, 1.0), (-1.0, -0.3, 0.3, 1.0), (0.5, 0.25), "nf4")
      for scale in ("none", "absmax", "mse")),
)  # fmt: skip
TIGHT = 1 + 1e-5  # the levels are found in float64 and rounded to float32


def normal(g: int, n: int, seed: int = 0, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(g, n, generator=generator)
    if kind == "heavy":
        rows = rows / torch.randn(g, n, 3, generator=generator).square().mean(2).sqrt()
    if kind == "outliers":
        rows[:, : 1 + n // 300] *= 20
    return rows * 0.05


def squared_error(grid: Grid, rows: Tensor) -> Tensor:
    """float64 ``[g]``."""
    return (grid.decode(grid.encode(rows)).double() - rows.double()).square().sum(1)


def error_to(levels: Tensor, rows: Tensor) -> Tensor:
    """The same from listed levels ``[g, k]``, without any grid."""
    return (rows.double()[:, :, None] - levels.double()[:, None, :]).square().amin(2).sum(1)


short_rows = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 8)),
    elements=st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5, 100.0]), st.floats(-4, 4, width=32)),
).map(lambda array: torch.from_numpy(array.copy()))


# ---- laws of every quantizer


@pytest.mark.parametrize("quantizer", EVERY, ids=lambda quantizer: quantizer.text)
def test_the_form_never_depends_on_the_weights(quantizer: Quantizer) -> None:
    def form(rows: Tensor) -> tuple[object, ...]:
        grid, g = quantizer.fit(rows), rows.shape[0]
        if isinstance(grid, Affine):
            zero = grid.zero_point if not isinstance(grid.zero_point, Tensor) else grid.zero_point.shape[0] == g
            return Affine, grid.count, grid.scale.shape[0] == g, zero
        shared = grid.scale is not None or isinstance(quantizer, Fixed)
        assert grid.table.shape[0] == (1 if shared else g)
        return Codebook, grid.count, grid.scale is None or grid.scale.shape[0] == g

    forms = {form(rows) for rows in (torch.zeros(2, 8), normal(5, 300), torch.ones(1, 1), -torch.ones(3, 40))}
    assert len(forms) == 1


NASTY = {
    "zero": torch.zeros(2, 7),
    "constant": torch.full((1, 9), -0.3),
    "one weight": torch.tensor([[0.25], [0.0], [-3e38]]),
    "denormal": torch.tensor([[1e-45, -1e-44, 0.0, 3e-42], [1e-45, 0.0, 0.0, 0.0]]),
    "huge": torch.tensor([[3.4e38, -3.4e38, 1e38, 3.4e38], [3.4028235e38, 3.4028235e38, -1.0, 1e-30]]),
    "tiny and huge": torch.tensor([[3e38, 1e-45, -1e-20, 0.0, 1.0]]),
    "one outlier": torch.cat([torch.full((1, 600), 1e-3), torch.full((1, 1), 1e6)], 1),
    "positive": normal(2, 300).abs() + 1,
    "two values": torch.tensor([[0.5, -0.25]]).repeat(3, 400),
    "long and constant": torch.full((1, 2000), 0.7),
}


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("quantizer", EVERY, ids=lambda quantizer: quantizer.text)
def test_nasty_rows_get_finite_levels(quantizer: Quantizer, name: str) -> None:
    rows = NASTY[name]
    grid = quantizer.fit(rows)
    levels, result = grid.levels(), grid.decode(grid.encode(rows))
    assert bool(levels.isfinite().all())
    assert bool((levels.diff(dim=1) >= 0).all())
    assert bool(result.isfinite().all())
    if isinstance(grid, Affine) or grid.scale is not None:
        assert bool((grid.scale >= 0).all())  # type: ignore[operator]
    if isinstance(grid, Affine) and isinstance(grid.zero_point, Tensor):
        assert int(grid.zero_point.max()) < grid.count
    fitted = not isinstance(quantizer, Fixed) or quantizer.scale != "none"
    if fitted and "zero" in name and not (isinstance(quantizer, Fixed) and quantizer.scale == "none"):
        assert not result.any()


@pytest.mark.parametrize("quantizer", EVERY, ids=lambda quantizer: quantizer.text)
@pytest.mark.parametrize("n", [5, 300])
def test_rows_do_not_see_one_another(quantizer: Quantizer, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor pieces, nor threads: bit by bit the same."""
    rows = normal(7, n)
    whole = quantizer.fit(rows).levels()
    if whole.shape[0] > 1:
        assert torch.equal(torch.cat([quantizer.fit(row[None]).levels() for row in rows]), whole)
    monkeypatch.setattr(quantizers, "_CHUNK", 3 * n)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(quantizer.fit(rows).levels(), whole)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("quantizer", EVERY, ids=lambda quantizer: quantizer.text)
def test_rows_that_are_summed_piece_by_piece_get_the_same_levels(
    quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = normal(3, 300)
    whole = quantizer.fit(rows)
    for module in (leastsquares, quantizers):
        monkeypatch.setattr(module, "PIECE", 70)
    pieces = quantizer.fit(rows)
    assert torch.allclose(squared_error(pieces, rows), squared_error(whole, rows), rtol=1e-6, atol=0)
    assert torch.allclose(pieces.levels(), whole.levels(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("quantizer", EVERY, ids=lambda quantizer: quantizer.text)
def test_powers_of_two_scale_the_levels_exactly(quantizer: Quantizer) -> None:
    if quantizer == AdditivePowersOfTwo(8, 1) or (isinstance(quantizer, Fixed) and quantizer.scale == "none"):
        return  # levels down to 2**-126 of the largest are no float32 for small rows; others are as given
    rows = normal(3, 50)
    for factor in (2.0**-80, 8.0, 2.0**100):
        assert torch.equal(quantizer.fit(rows * factor).levels(), quantizer.fit(rows).levels() * factor)


@pytest.mark.parametrize("quantizer", EVERY, ids=lambda quantizer: quantizer.text)
def test_rows_are_read_only(quantizer: Quantizer) -> None:
    rows = normal(4, 30)
    strided = normal(30, 4, seed=1).t()
    before, before_strided = rows.clone(), strided.clone()
    assert not quantizer.fit(rows.requires_grad_()).levels().requires_grad
    assert torch.equal(quantizer.fit(strided).levels(), quantizer.fit(strided.contiguous()).levels())
    assert torch.equal(rows.detach(), before)
    assert torch.equal(strided, before_strided)


# ---- binary, ternary


@settings(deadline=None, max_examples=100)
@given(short_rows)
def test_binary_is_the_mean_magnitude(rows: Tensor) -> None:
    means = [math.fsum(abs(weight) for weight in row) / len(row) for row in rows.tolist()]
    levels = Binary().fit(rows).levels()
    wanted = torch.tensor([[-mean, mean] for mean in means])
    assert bool(((levels - wanted).abs() <= 1.5e-45).all())  # equal, or the half of an odd denormal scale


def slow_ternary(row: list[float]) -> tuple[float, float]:
    """Error and level of the best of all choices of what is nonzero: not only the largest ones."""
    best = (math.fsum(w * w for w in row), 0.0)
    for k in range(1, len(row) + 1):
        for chosen in combinations(row, k):
            level = math.fsum(map(abs, chosen)) / k
            best = min(best, (math.fsum(w * w for w in row) - level * level * k, level))
    return best


@settings(deadline=None, max_examples=60)
@given(short_rows)
def test_ternary_is_the_best_of_all_choices(rows: Tensor) -> None:
    found = squared_error(Ternary().fit(rows), rows)
    wanted = torch.tensor([slow_ternary(row)[0] for row in rows.tolist()], dtype=torch.float64)
    assert bool((found <= wanted * TIGHT + 1e-6 * rows.double().square().sum(1)).all())


@pytest.mark.parametrize("seed", range(20))
def test_ternary_codes_are_those_of_the_slow_twin(seed: int) -> None:
    rows = normal(8, 30 + seed, seed)
    grid = Ternary().fit(rows)
    for row, codes, scale in zip(rows.tolist(), grid.encode(rows), grid.scale.tolist(), strict=True):
        sizes = sorted(map(abs, row), reverse=True)
        totals = [math.fsum(sizes[:k]) for k in range(1, len(sizes) + 1)]
        k = max(range(1, len(sizes) + 1), key=lambda k: totals[k - 1] ** 2 / k)
        assert scale == torch.tensor(totals[k - 1] / k, dtype=torch.float32).item()
        assert codes.tolist() == [1 + (0 if abs(w) < sizes[k - 1] else 1 if w > 0 else -1) for w in row]


def test_ternary_by_the_mean_follows_the_rule_of_torchaos_parq() -> None:
    rows = normal(5, 300)
    v = 1.1 * rows.abs().mean(1, keepdim=True)
    assert torch.allclose(Ternary("mean").fit(rows).levels(), torch.cat([-v, 0 * v, v], 1), rtol=1e-6)
    with pytest.raises(ValueError, match="mse"):
        Ternary("max")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_ternary_is_no_worse_than_the_heuristics(kind: str) -> None:
    rows = normal(40, 600, kind=kind)
    mean = rows.abs().mean(1, keepdim=True)
    found = squared_error(Ternary().fit(rows), rows)
    for factor in (0.7, 1.1):
        above = rows.abs() > factor * mean
        level = (rows.abs() * above).sum(1, keepdim=True) / above.sum(1, keepdim=True).clamp_min(1)
        for v in (level, factor * mean):
            assert bool((found <= error_to(torch.cat([-v, 0 * v, v], 1), rows) * TIGHT).all())
            threshold = (rows - rows.sign() * above * v).double().square().sum(1)
            assert bool((found <= threshold * TIGHT).all())


# ---- k-means


def slow_kmeans(row: list[float], k: int) -> float:
    """The textbook dynamic programme over the sorted row, in exact order of sums."""
    row = sorted(row)

    def cost(i: int, j: int) -> float:
        mean = math.fsum(row[i:j]) / (j - i)
        return math.fsum((w - mean) ** 2 for w in row[i:j])

    best = [cost(0, j) if j else 0.0 for j in range(len(row) + 1)]
    for _ in range(k - 1):
        best = [min([best[j], *(best[i] + cost(i, j) for i in range(j))]) for j in range(len(row) + 1)]
    return best[-1]


@settings(deadline=None, max_examples=60)
@given(short_rows, st.integers(2, 5))
def test_kmeans_is_the_best_of_all_partitions(rows: Tensor, k: int) -> None:
    found = error_to(KMeans(k).fit(rows).levels(), rows)
    wanted = torch.tensor([slow_kmeans(row, k) for row in rows.tolist()], dtype=torch.float64)
    assert bool((found <= wanted * TIGHT + 1e-12 * rows.double().square().sum(1)).all())


@pytest.mark.parametrize(("n", "k"), [(40, 3), (60, 8), (60, 30), (90, 2)])
def test_kmeans_is_its_slow_twin(n: int, k: int) -> None:
    rows = normal(3, n, seed=n)
    wanted = torch.tensor([slow_kmeans(row, k) for row in rows.tolist()], dtype=torch.float64)
    assert torch.allclose(squared_error(KMeans(k).fit(rows), rows), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", [2, 3, 16, 100, 256])
@pytest.mark.parametrize("n", [3, 200, 3000])
def test_kmeans_meets_rows_of_few_different_weights_exactly(k: int, n: int) -> None:
    values = torch.randn(min(k, n), generator=torch.Generator().manual_seed(2))
    pick = torch.randint(0, len(values), (2, n), generator=torch.Generator().manual_seed(3))
    rows = values[pick] ** 3
    grid = KMeans(k).fit(rows)
    assert torch.equal(grid.decode(grid.encode(rows)), rows)


@pytest.mark.parametrize("n", [3, 200, 3000])
def test_kmeans_repeats_a_level_rather_than_invent_one(n: int) -> None:
    rows = torch.full((2, n), 0.7)
    rows[1, n // 2 :] = 2
    assert KMeans(5).fit(rows).levels().unique(dim=1).unique().tolist() == torch.tensor([0.7, 2.0]).tolist()


@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers"])
@pytest.mark.parametrize(("k", "n", "slack"), [(4, 600, 1e-3), (16, 600, 3e-3), (64, 600, 5e-2), (100, 1200, 5e-2)])
def test_kmeans_of_longer_rows_is_nearly_optimal(
    k: int, n: int, slack: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = normal(2, n, kind=kind)
    found = squared_error(KMeans(k).fit(rows), rows)
    monkeypatch.setattr(kmeans, "EXACT_POINTS", n)
    exact = squared_error(KMeans(k).fit(rows), rows)
    assert bool((exact <= found * TIGHT).all())
    assert bool((found <= exact * (1 + slack)).all())


def test_kmeans_leaves_half_of_the_bins_to_the_others_where_one_weight_is_far_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By gaps alone all bins but a few would lie in the one before it: 36 times the least error."""
    rows = normal(2, 600)
    rows[:, 0] = 500
    found = squared_error(KMeans(64).fit(rows), rows)
    monkeypatch.setattr(kmeans, "EXACT_POINTS", 600)
    assert bool((found <= 4 * squared_error(KMeans(64).fit(rows), rows)).all())


@pytest.mark.parametrize("k", [4, 16, 64])
def test_kmeans_of_few_different_weights_is_optimal_however_long_the_row(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick = torch.randint(0, 256, (2, 900), generator=torch.Generator().manual_seed(k))
    rows = normal(1, 256, kind="heavy")[0][pick]
    found = squared_error(KMeans(k).fit(rows), rows)
    monkeypatch.setattr(kmeans, "EXACT_POINTS", 900)
    assert bool((found <= squared_error(KMeans(k).fit(rows), rows) * TIGHT).all())


@pytest.mark.parametrize(("n", "k"), [(100, 6), (700, 6), (2000, 24)])
def test_kmeans_levels_are_the_means_of_what_they_are_nearest_to(n: int, k: int) -> None:
    rows = normal(4, n)
    grid = KMeans(k).fit(rows)
    codes = grid.encode(rows).long()
    for row, code, levels in zip(rows, codes, grid.levels(), strict=True):
        means = torch.tensor([row[code == j].double().mean() for j in range(k)])
        assert torch.allclose(levels, means.float(), rtol=1e-6)


# ---- scales


def finest_scale(rows: Tensor, table: Tensor, steps: int = 6000) -> Tensor:
    """The least error over a fine grid of scales: the slow twin of ``best_scale``, float64 ``[g]``."""
    top = rows.double().abs().amax(1) / table.abs().max()
    best = rows.double().square().sum(1)
    for step in range(1, steps + 1):
        best = torch.minimum(best, error_to((top * 3 * step / steps)[:, None] * table.double(), rows))
    return best


TABLES = {
    "ternary": (-1.0, 0.0, 1.0),
    "quaternary": (-1.0, -0.3, 0.3, 1.0),
    "lopsided": (-0.25, 0.5, 2.0),
    "without a small level": (-3.0, 2.0),
    "one side": (0.5, 1.0),
    "nf4": NF4,
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("n", [1, 2, 9, 60])
def test_the_scale_of_short_rows_is_the_best_of_all(name: str, n: int) -> None:
    table = torch.tensor(TABLES[name])
    rows = torch.cat([normal(4, n, seed=n), normal(4, n, seed=n).abs(), -normal(2, n, seed=n).abs()])
    found = squared_error(Fixed(TABLES[name], "mse").fit(rows), rows)
    assert bool((found <= finest_scale(rows, table, 3000) * TIGHT + 1e-12).all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_the_uniform_scale_of_short_rows_is_the_best_of_all(bits: int) -> None:
    rows = torch.cat([normal(6, 9, seed=bits), normal(6, 9, seed=bits, kind="heavy")])
    grid = Uniform(bits).fit(rows)
    table = torch.arange(2**bits) - torch.tensor(grid.zero_point)
    assert bool((squared_error(grid, rows) <= finest_scale(rows, table) * TIGHT + 1e-12).all())


@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers"])
@pytest.mark.parametrize(("bits", "slack"), [(2, 1e-4), (3, 1e-3), (4, 2e-3), (6, 2e-2), (8, 4e-2)])
def test_the_scale_of_longer_rows_is_nearly_the_best(bits: int, slack: float, kind: str) -> None:
    """What the scan leaves on the table, against the exact sweep, which is too slow to be used there."""
    rows = normal(8 if bits < 8 else 2, 700, kind=kind)
    table = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    scan = leastsquares._scanned_scale(leastsquares.sort_rows(rows.clone()), table.expand(len(rows), -1))[1]
    sweep = leastsquares._swept_scale(rows, table)
    found, exact = (error_to(scale[:, None] * table, rows) for scale in (scan, sweep))
    assert bool((exact <= found * TIGHT).all())
    assert bool((found <= exact * (1 + slack)).all())


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("n", [3, 9, 100, 1500])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_mse_scale_is_no_worse_than_the_rules(bits: int, symmetric: bool, n: int, kind: str) -> None:
    rows = normal(12, n, seed=bits, kind=kind) + (0 if symmetric else 0.03)
    found = squared_error(Uniform(bits, symmetric).fit(rows), rows)
    assert bool((found <= squared_error(Uniform(bits, symmetric, "absmax").fit(rows), rows) * TIGHT + 1e-12).all())
    assert bool((found <= squared_error(Uniform(bits, symmetric, "mean").fit(rows), rows) * TIGHT + 1e-12).all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [0.0, 0.04, -0.2])
def test_affine_is_nearly_the_best_of_all_scales_and_zero_points(bits: int, offset: float) -> None:
    rows = normal(30, 200, seed=bits) + offset
    best = torch.full((30,), torch.inf, dtype=torch.float64)
    for twice in range(2 * 2**bits - 1):
        best = torch.minimum(best, finest_scale(rows, torch.arange(2**bits) - twice / 2, 600))
    over = squared_error(Uniform(bits, symmetric=False).fit(rows), rows) / best
    assert float(over.mean()) <= (1.002 if bits <= 2 else 1.02)
    assert float(over.max()) <= (1.002 if bits <= 2 else 1.15)


@pytest.mark.parametrize("n", [5, 9, 33, 100, 1500])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_affine_levels_fit_no_worse_than_symmetric_ones(bits: int, n: int) -> None:
    rows = normal(40, n, seed=n) + torch.linspace(-0.05, 0.05, 40)[:, None]
    affine = squared_error(Uniform(bits, symmetric=False).fit(rows), rows)
    symmetric = squared_error(Uniform(bits).fit(rows), rows)
    assert bool((affine <= symmetric * TIGHT + 1e-12).all())
    assert float((affine / symmetric).mean()) < 0.99


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_absmax_clips_nothing(bits: int, symmetric: bool) -> None:
    rows = normal(20, 50) + torch.linspace(-0.1, 0.1, 20)[:, None]
    grid = Uniform(bits, symmetric, "absmax").fit(rows)
    levels = grid.levels()
    room = grid.scale * (0.5 if not symmetric else 1e-5)  # an affine zero point is rounded, which shifts the span
    assert bool((levels[:, -1] >= rows.amax(1) - room * 1.001).all())
    assert bool((levels[:, 0] <= rows.amin(1) + room * 1.001).all())
    if symmetric:
        touched = torch.maximum(rows.amax(1) / levels[:, -1], rows.amin(1) / levels[:, 0])
        assert torch.allclose(touched, torch.ones(20))


@pytest.mark.parametrize("scale", ["mse", "absmax"])
def test_the_zero_point_is_that_of_the_range(scale: Literal["mse", "absmax"]) -> None:
    rows = torch.stack([torch.zeros(16), torch.arange(16.0), torch.arange(16.0) - 5, -torch.arange(16.0)])
    grid = Uniform(4, symmetric=False, scale=scale).fit(rows)
    assert isinstance(grid.zero_point, Tensor)
    assert grid.zero_point.tolist() == [0, 0, 5, 15]
    assert grid.scale.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_from_five_bits_on_zero_is_a_level(bits: int) -> None:
    rows = normal(5, 40)
    affine = Uniform(bits, symmetric=False).fit(rows)
    assert affine.halves == (2 if bits < 5 else 1)
    assert bool((affine.levels() == 0).any(1).all()) is (bits >= 5)
    assert bool((Uniform(bits, symmetric=False, scale="absmax").fit(rows).levels() == 0).any(1).all())
    symmetric = Uniform(bits).fit(rows)
    assert bool((symmetric.levels() == 0).any()) is (bits >= 5)
    assert symmetric.zero_point == ((2**bits - 1) / 2 if bits < 5 else 2 ** (bits - 1))


def test_where_zero_is_a_level_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (leastsquares, quantizers):
        monkeypatch.setattr(module, "zero_steps", lambda count: 1 if count > 4 else 2)
    rows = normal(50, 40)
    for bits in (2, 3):
        for grid in (Uniform(bits).fit(rows), Uniform(bits, symmetric=False).fit(rows)):
            assert grid.halves == (2 if bits == 2 else 1)
            assert bool((grid.levels() == 0).any(1).all()) is (bits == 3)
        _, zero = leastsquares.best_affine(leastsquares.sort_rows(rows.clone()), 2**bits, ())
        assert torch.equal(zero, zero.round()) is (bits == 3)


# ---- least-squares binary, powers of two


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("n", [4, 33, 900])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_least_squares_binary_is_no_worse_than_its_starts(bits: int, n: int, kind: str) -> None:
    rows = normal(12, n, seed=bits, kind=kind)
    found = squared_error(LeastSquaresBinary(bits).fit(rows), rows)
    assert bool((found <= squared_error(LeastSquaresBinary(bits, 0).fit(rows), rows) * TIGHT + 1e-12).all())
    assert bool((found <= squared_error(Uniform(bits).fit(rows), rows) * TIGHT + 1e-12).all())
    more = squared_error(LeastSquaresBinary(bits, 40).fit(rows), rows)
    assert bool((more <= found * TIGHT + 1e-12).all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_greedy_least_squares_binary_is_its_slow_twin(bits: int) -> None:
    rows = normal(5, 40, seed=bits)
    levels = LeastSquaresBinary(bits, 0).fit(rows).levels()
    for row, found in zip(rows.tolist(), levels, strict=True):
        rest, values = row, []
        for _ in range(bits):
            values.append(math.fsum(map(abs, rest)) / len(rest))
            rest = [w - math.copysign(values[-1], w) for w in rest]
        wanted = sorted(
            sum(s * v for s, v in zip(signs, values, strict=True)) for signs in product((-1, 1), repeat=bits)
        )
        assert torch.allclose(found, torch.tensor(wanted), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_least_squares_binary_levels_are_sums_of_signed_values(bits: int) -> None:
    """b values make all 2**b levels: half the spread between levels that differ in one sign."""
    levels = LeastSquaresBinary(bits).fit(normal(1, 500)).levels()[0].tolist()
    for values in combinations([(levels[-1] - level) / 2 for level in levels[:-1]], bits):
        sums = sorted(sum(s * v for s, v in zip(signs, values, strict=True)) for signs in product((-1, 1), repeat=bits))
        if all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-7) for a, b in zip(sums, levels, strict=True)):
            return
    pytest.fail(f"no {bits} values give {levels}")


@pytest.mark.parametrize("values", [(3.0, 1.0, 0.4), (1.0, 0.8, 0.7), (0.5, 0.1, -0.9)])
def test_one_alternation_of_least_squares_binary_is_its_slow_twin(values: tuple[float, ...]) -> None:
    """Also where the values are so close that their signed sums change places."""
    rows = normal(1, 80) * 40
    signs = torch.tensor([(1.0, *rest) for rest in product((1.0, -1.0), repeat=2)]).double()
    magnitudes = leastsquares.sort_rows(rows.abs())
    error, refit = quantizers._judge_binary(magnitudes, signs, torch.tensor([values]).double())
    choices = torch.cat([signs, -signs])
    levels = choices @ torch.tensor(values).double()
    nearest = (rows.double().T - levels).abs().argmin(1)
    assert torch.allclose(error, (rows[0].double() - levels[nearest]).square().sum())
    assert torch.allclose(refit[0], torch.linalg.lstsq(choices[nearest], rows[0].double()).solution)


def test_powers_of_two_golden() -> None:
    assert [level * 10 for level in additive_powers(3, 2)[7:]] == [0, 1, 2, 3, 4, 6, 8, 10]  # the paper's code, 4 bits
    assert [level * 16 for level in additive_powers(3, 1)[7:]] == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert additive_powers(2, 1) == (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
    five = sorted({a + b for a in (0, 2**-1, 2**-3, 2**-5) for b in (0, 2**-2, 2**-4, 2**-6)})  # arXiv 1909.13144
    assert additive_powers(4, 2)[15:] == tuple(level / five[-1] for level in five)


@pytest.mark.parametrize(("bits", "terms"), [(b, t) for b in range(2, 9) for t in range(1, b)])
def test_sums_of_powers_of_two_all_differ(bits: int, terms: int) -> None:
    grid = AdditivePowersOfTwo(bits, terms).fit(normal(2, 30))
    assert grid.count == 2**bits - 1
    assert grid.table.shape == (1, grid.count)
    assert bool((grid.table.diff() > 0).all())
    assert torch.equal(grid.table, -grid.table.flip(1))
    assert grid.table[0, -1] == 1


# ---- between the families


def test_families_meet_where_they_are_the_same() -> None:
    for rows in (normal(6, 9), normal(6, 700), NASTY["two values"]):
        binary = Binary().fit(rows).levels()
        assert torch.equal(LeastSquaresBinary(1, 0).fit(rows).levels(), binary)
        for same in (Uniform(1), Uniform(1, scale="mean"), LeastSquaresBinary(1), Fixed((-1.0, 1.0), "mse")):
            assert torch.allclose(same.fit(rows).levels(), binary, rtol=2e-6)
        ternary = Ternary().fit(rows).levels()
        for same in (Fixed((-1.0, 0.0, 1.0), "mse"), AdditivePowersOfTwo(2)):
            assert torch.allclose(same.fit(rows).levels(), ternary, rtol=2e-6)


@pytest.mark.parametrize("n", [5, 100, 1200])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_kmeans_is_no_worse_than_any_other_levels_of_the_same_number(n: int, kind: str) -> None:
    rows = normal(10, n, kind=kind)
    for quantizer in EVERY:
        grid = quantizer.fit(rows)
        if grid.count <= 16:
            best = squared_error(KMeans(grid.count).fit(rows), rows)
            assert bool((best <= squared_error(grid, rows) * TIGHT + 1e-12).all()), quantizer


# ---- golden numbers


def gaussian_row(n: int = 200_001) -> Tensor:
    """A row as Gaussian as can be: the quantiles."""
    return torch.special.ndtri(((torch.arange(n) + 0.5) / n).double()).float()[None]


@pytest.mark.parametrize(
    ("quantizer", "positive"),
    [
        (Binary(), [math.sqrt(2 / math.pi)]),
        (Ternary(), [1.2240]),
        (KMeans(2), [math.sqrt(2 / math.pi)]),
        (KMeans(3), [1.2240]),
        (KMeans(4), [0.4528, 1.510]),
        (KMeans(8), [0.2451, 0.7560, 1.344, 2.152]),
        (Uniform(2), [0.9957 / 2, 0.9957 * 3 / 2]),
        (Uniform(3), [0.5860 * (i + 0.5) for i in range(4)]),
        (Uniform(4), [0.3352 * (i + 0.5) for i in range(8)]),
        (Uniform(4, scale="mean"), [0.3352 * (i + 0.5) for i in range(8)]),
    ],
    ids=lambda value: getattr(value, "text", ""),
)
def test_gaussian_levels_are_those_of_max_1960(quantizer: Quantizer, positive: list[float]) -> None:
    """«Quantizing for minimum distortion», IRE Transactions on Information Theory 6, tables I and II."""
    levels = quantizer.fit(gaussian_row()).levels()[0]
    assert torch.allclose(levels[levels > 1e-3], torch.tensor(positive), rtol=1e-3, atol=1e-3)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-3)


@pytest.mark.parametrize(
    ("quantizer", "distortion"),
    [
        (Ternary(), 0.1902), (KMeans(4), 0.1175), (KMeans(8), 0.03454), (KMeans(16), 0.009497),
        (Uniform(2), 0.1188), (Uniform(3), 0.03744), (Uniform(4), 0.01154), (LeastSquaresBinary(2), 0.1175),
    ],
    ids=lambda value: getattr(value, "text", ""),
)  # fmt: skip
def test_gaussian_errors_are_those_of_max_1960(quantizer: Quantizer, distortion: float) -> None:
    rows = gaussian_row()
    assert math.isclose(squared_error(quantizer.fit(rows), rows) / rows.numel(), distortion, rel_tol=5e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_steps_are_where_the_error_has_its_minimum(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2

    def error(step: float) -> float:
        levels = codes * step
        middles = torch.cat(
            [codes.new_tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2, codes.new_tensor([torch.inf])]
        )
        mass = torch.special.ndtr(middles).diff()
        first = -(torch.exp(-middles.square() / 2) / math.sqrt(2 * math.pi)).diff()
        return float(1 - 2 * (levels * first).sum() + (levels.square() * mass).sum())

    step = GAUSSIAN_STEP[bits - 1]
    assert error(step) < min(error(step - 2e-6 - 1e-5 * step), error(step + 2e-6 + 1e-5 * step))


def test_nf4_golden() -> None:
    """The values of arXiv 2305.14314 as bitsandbytes publishes them, and its absmax scaling."""
    assert len(NF4) == 16
    assert NF4[0] == -1.0
    assert NF4[7] == 0.0
    assert NF4[8] == 0.07958029955625534
    assert NF4[-1] == 1.0
    grid = Fixed("nf4", "absmax").fit(torch.tensor([[0.5, -2.0, 0.1, 0.0, 1.5]]))
    assert grid.scale is not None
    assert grid.scale.tolist() == [2.0]
    assert grid.encode(torch.tensor([[0.5, -2.0, 0.1, 0.0, 1.5]])).tolist() == [[10, 0, 8, 7, 14]]


def test_paper_sets_are_used_as_they_are() -> None:
    rows = torch.tensor([[0.7, -0.2, 0.1, -3.0]])
    for levels, wanted in (
        ((-1.0, 1.0), [1, -1, 1, -1]),
        ((-1.0, 0.0, 1.0), [1, 0, 0, -1]),
        ((0.3, 1.0, -1.0, -0.3), [1, -0.3, 0.3, -1]),
    ):
        grid = Fixed(levels).fit(rows)
        assert torch.equal(grid.decode(grid.encode(rows)), torch.tensor([wanted]))
        assert grid.table.shape == (1, len(levels))
        assert grid.scale is None


# ---- as records


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeastSquaresBinary(5), "bits has to be a whole number from 1 to 4, not 5"),
        (lambda: LeastSquaresBinary(2, -1), "refine"),
        (lambda: Uniform(0), "bits has to be a whole number from 1 to 8, not 0"),
        (lambda: Uniform(9), "bits"),
        (lambda: Uniform(True), "bits"),
        (lambda: Uniform(4.0), "bits"),  # type: ignore[arg-type]
        (lambda: Uniform(4, scale="max"), "scale has to be one of mse, absmax, mean, not 'max'"),  # type: ignore[arg-type]
        (lambda: KMeans(1), "levels has to be a whole number from 2 to 256, not 1"),
        (lambda: KMeans(257), "levels"),
        (lambda: AdditivePowersOfTwo(9), "bits"),
        (lambda: AdditivePowersOfTwo(4, 4), "terms of 4 bits has to be a whole number from 1 to 3, not 4"),
        (lambda: Fixed((1.0,)), "2 to 256 different finite numbers or nf4"),
        (lambda: Fixed((1.0, 1.0)), "different"),
        (lambda: Fixed((1.0, 1.0 + 1e-12)), "different"),
        (lambda: Fixed((1.0, math.nan)), "finite"),
        (lambda: Fixed((1.0, 1e39)), "finite"),
        (lambda: Fixed("nf5"), "levels has to be one of nf4, not 'nf5'"),  # type: ignore[arg-type]
        (lambda: Fixed((1.0, 2.0), "mean"), "scale has to be one of none, absmax, mse"),  # type: ignore[arg-type]
    ],
)
def test_fields_out_of_range_say_what_is_allowed(make: Callable[[], Quantizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("quantizer", EVERY, ids=lambda quantizer: quantizer.text)
def test_a_quantizer_is_a_record_of_plain_fields(quantizer: Quantizer) -> None:
    adapter = TypeAdapter(type(quantizer))
    assert adapter.validate_json(adapter.dump_json(quantizer)) == quantizer
    assert hash(quantizer) == hash(dataclasses.replace(quantizer))
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantizer.bits = 3  # type: ignore[misc,union-attr]


def test_what_they_are_called() -> None:
    assert [quantizer.text for quantizer in (
        Binary(), Ternary(), LeastSquaresBinary(1), LeastSquaresBinary(2), Uniform(4),
        Uniform(8, symmetric=False, scale="absmax"), KMeans(16), AdditivePowersOfTwo(4, 1), AdditivePowersOfTwo(4),
        AdditivePowersOfTwo(3), AdditivePowersOfTwo(5), AdditivePowersOfTwo(8),
        Fixed((1.0, -0.3)), Fixed("nf4", "absmax"),
    )] == [
        "binary", "ternary", "least-squares binary, 1 bit", "least-squares binary, 2 bits",
        "uniform 4-bit symmetric, mse scale", "uniform 8-bit affine, absmax scale", "k-means, 16 levels",
        "powers of two, 4 bits", "sums of 2 powers of two, 4 bits",
        "powers of two, 3 bits", "sums of 2 powers of two, 5 bits", "sums of 4 powers of two, 8 bits",
        "fixed {-0.3, 1}", "fixed nf4, absmax scale",
    ]  # fmt: skip
