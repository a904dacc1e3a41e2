"""Refits: least squares for the codes at hand, never worse, of the same form, and never stuck at zero."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcq import prox, qtensor, refit
from pcq.grids import Affine, Codebook, Grid
from pcq.quantizers import AdditivePowersOfTwo, Binary, Fixed, KMeans, LeastSquaresBinary, Quantizer, Ternary, Uniform
from pcq.rows import Rows

QUANTIZERS: list[Quantizer] = [
    Binary(),
    Ternary(),
    *(LeastSquaresBinary(bits) for bits in (1, 2, 3, 4)),
    Uniform(2),
    Uniform(6),
    Uniform(4, symmetric=False),
    Uniform(3, scale="absmax"),
    KMeans(3),
    KMeans(12),
    AdditivePowersOfTwo(4),
    Fixed((-1.0, 0.0, 1.0)),
    Fixed("nf4", "mse"),
    Fixed("nf4", "absmax"),
    Ternary("mean"),
]
EXACT = {"absmax"}
laws = settings(deadline=None, max_examples=60)


def error(grid: Grid, rows: Tensor) -> Tensor:
    return (grid.decode(grid.encode(rows)).double() - rows.double()).square().sum(1)


def moved(seed: int, g: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(g, n, generator=generator) * torch.rand(g, 1, generator=generator) * 3
    return rows, rows + 0.2 * torch.randn(g, n, generator=generator) * rows.std()


@laws
@given(st.sampled_from(QUANTIZERS), st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 90))
def test_never_worse_than_before_and_of_the_same_form(quantizer: Quantizer, seed: int, g: int, n: int) -> None:
    before, after = moved(seed, g, n)
    grid = quantizer.fit(before)
    again = refit.refit(quantizer, after, grid)
    fitted = quantizer.fit(after)
    assert type(again) is type(fitted)
    assert again.count == fitted.count
    assert again.levels().shape == fitted.levels().shape
    levels = again.levels()
    assert (levels[:, 1:] >= levels[:, :-1]).all()
    if getattr(quantizer, "scale", "mse") in ("auto", "mse", "none"):
        assert (error(again, after) <= error(grid, after) * (1 + 1e-5) + 1e-10).all()
    else:
        assert torch.equal(levels, fitted.levels())


@laws
@given(
    st.sampled_from([Ternary(), Uniform(2), Uniform(4, symmetric=False), AdditivePowersOfTwo(4)]), st.integers(0, 999)
)
def test_scales_are_the_least_squares_scales_of_the_codes(quantizer: Quantizer, seed: int) -> None:
    before, after = moved(seed, 3, 70)
    grid = quantizer.fit(before)
    again = refit.refit(quantizer, after, grid)
    assert grid.scale is not None
    assert again.scale is not None
    units = (grid.decode(grid.encode(after)) / grid.scale[:, None]).double()
    for row in range(3):
        want = torch.linalg.lstsq(units[row, :, None], after[row, :, None].double()).solution.item()
        assert again.scale[row].item() == pytest.approx(want, rel=1e-5)


@laws
@given(st.integers(2, 12), st.integers(0, 999))
def test_listed_levels_are_the_means_of_their_weights(k: int, seed: int) -> None:
    before, after = moved(seed, 2, 60)
    grid = KMeans(k).fit(before)
    codes, again = grid.encode(after), refit.refit(KMeans(k), after, grid)
    for row, level in itertools.product(range(2), range(k)):
        mine = after[row][codes[row] == level].double()
        want = mine.mean() if len(mine) else grid.levels()[row, level]
        # The difference of two float32 sums.
        rounding = 2 * torch.finfo(torch.float32).eps * float(after[row].abs().sum()) / max(1, len(mine))
        assert again.levels()[row, level].item() == pytest.approx(float(want), rel=1e-5, abs=rounding)


@laws
@given(st.integers(1, 4), st.integers(0, 999))
def test_least_squares_binary_levels_stay_sums_of_their_values(bits: int, seed: int) -> None:
    before, after = moved(seed, 2, 200)
    grid = LeastSquaresBinary(bits).fit(before)
    again = refit.refit(LeastSquaresBinary(bits), after, grid).levels().double()
    codes = grid.encode(after).long()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), dtype=torch.float64)
    for row in range(2):
        # Which values give these levels is found anew here: least squares over every way to sort the sign patterns.
        table = grid.levels()[row].double()
        values = _values(table, bits)
        assert torch.allclose((signs @ values).sort().values, table, atol=1e-4 * float(table.abs().max()))
        order = (signs @ values).sort(stable=True).indices
        if torch.linalg.matrix_rank(signs[order][codes[row]]) < bits:  # the codes leave values open: an exact fit
            assert torch.equal(again[row], LeastSquaresBinary(bits).fit(after).levels()[row].double())
            continue
        solved = torch.linalg.lstsq(signs[order][codes[row]], after[row, :, None].double()).solution[:, 0]
        want = (signs @ solved).sort().values
        torch.testing.assert_close(again[row], want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def _values(table: Tensor, bits: int) -> Tensor:
    """The values of the levels, by trying: the lowest level is minus their sum, the next ones leave one out."""
    half = ((table - table[0]) / 2).tolist()
    top = -float(table[0])
    best = min(
        (
            (abs(sum(choice) - top), choice)
            for some in itertools.combinations(half[1 : 2 ** (bits - 1) + 1], bits - 1)
            for choice in [(*some, top - sum(some))]
            if all(
                min(abs(sum(c for c, on in zip(choice, mask, strict=True) if on) - h) for h in half) < 1e-4 * top
                for mask in itertools.product((False, True), repeat=bits)
            )
        ),
        key=lambda found: found[0],
    )
    return torch.tensor(best[1], dtype=torch.float64)


@pytest.mark.parametrize("quantizer", [Ternary(), KMeans(3), AdditivePowersOfTwo(3), LeastSquaresBinary(2)], ids=str)
def test_rows_that_were_zero_do_not_stay_zero(quantizer: Quantizer) -> None:
    before, after = moved(0, 3, 50)
    before[1] = 0
    again = refit.refit(quantizer, after, quantizer.fit(before))
    assert torch.equal(again.levels()[1], quantizer.fit(after).levels()[1])
    tiny = after * 1e-3  # every weight now rounds to the level 0, where there is one
    again = refit.refit(quantizer, tiny, quantizer.fit(after))
    assert (error(again, tiny) < 0.9 * tiny.double().square().sum(1)).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_zero_rows_give_finite_levels(quantizer: Quantizer) -> None:
    rows = torch.zeros(3, 20)
    grid = quantizer.fit(rows + torch.linspace(-1, 1, 20))
    assert torch.isfinite(refit.refit(quantizer, rows, grid).levels()).all()
    assert torch.isfinite(refit.refit(quantizer, rows, quantizer.fit(rows)).levels()).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("shape", [(3, 100), (1, 40)])
def test_chunks_change_nothing_that_rounding_would_not(
    quantizer: Quantizer, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = moved(5, *shape)
    grid = quantizer.fit(before)
    whole = refit.refit(quantizer, after, grid).levels()
    monkeypatch.setattr(refit, "CHUNK", 33)
    monkeypatch.setattr(refit, "FEW", 2)
    torch.testing.assert_close(refit.refit(quantizer, after, grid).levels(), whole, rtol=1e-5, atol=1e-6)
    assert prox.CHUNK != 33


@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if q != Fixed((-1.0, 0.0, 1.0))], ids=str)
def test_short_last_groups_are_refitted_on_their_real_weights(quantizer: Quantizer) -> None:
    before, after = (part.reshape(2, 25) for part in moved(7, 1, 50))
    rows = Rows((2, 25), 0, group=10)
    grid = qtensor.fit(quantizer, before, rows)
    again = refit.refit_weight(quantizer, after, grid, rows).levels().reshape(2, 3, -1)
    for channel, (group, part) in itertools.product(range(2), enumerate((slice(0, 10), slice(10, 20), slice(20, 25)))):
        row = channel * 3 + group

        def one(tensor: Tensor, row: int = row) -> Tensor:
            return tensor[row : row + 1]

        want = refit.refit(quantizer, after[channel : channel + 1, part].contiguous(), grid.map(one)).levels()
        torch.testing.assert_close(again[channel, group], want[0], rtol=1e-5, atol=1e-6)


def test_levels_that_all_rows_share_stay_one_table_beside_short_last_groups() -> None:
    quantizer, rows = Fixed((-1.0, 0.0, 1.0)), Rows((2, 25), 0, group=10)
    weight = torch.linspace(-2, 2, 50).reshape(2, 25)
    again = refit.refit_weight(quantizer, weight, qtensor.fit(quantizer, weight, rows), rows)
    assert again.levels().tolist() == [[-1, 0, 1]]


def test_weights_on_the_other_side_of_all_levels_do_not_turn_them_round() -> None:
    quantizer, rows = Fixed((1.0, 2.0), "mse"), torch.linspace(0.5, 2, 9)[None]
    again = refit.refit(quantizer, -rows, quantizer.fit(rows))
    assert torch.equal(again.levels(), quantizer.fit(-rows).levels())


def test_where_the_recipe_leaves_it_open_ternary_levels_follow_by_the_mean() -> None:
    assert refit.following(Ternary()) == Ternary("mean")
    for kept in (Ternary("mse"), Ternary("mean"), Uniform(2)):
        assert refit.following(kept) == kept


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_levels_settle_unless_they_go_by_a_mean(quantizer: Quantizer) -> None:
    before, _ = moved(11, 3, 80)
    levels = [(grid := quantizer.fit(before)).levels()]
    for _ in range(5):
        grid = refit.refit(quantizer, grid.decode(grid.encode(before)), grid)
        levels.append(grid.levels())
    assert torch.allclose(levels[-1], levels[0], rtol=1e-5) == refit.settles(quantizer)


def test_an_unknown_quantizer_is_simply_fitted() -> None:
    class Own:
        def fit(self, rows: Tensor) -> Grid:
            return Affine(rows.abs().amax(1), 1.0, 3)

    before, after = moved(3, 2, 30)
    assert torch.equal(refit.refit(Own(), after, Own().fit(before)).levels(), Own().fit(after).levels())


def test_unscaled_fixed_levels_stay() -> None:
    quantizer = Fixed((-1.0, 0.0, 1.0))
    again = refit.refit(quantizer, torch.randn(4, 9), quantizer.fit(torch.randn(4, 9)))
    assert isinstance(again, Codebook)
    assert again.table.tolist() == [[-1, 0, 1]]
