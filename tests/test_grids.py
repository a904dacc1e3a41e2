"""The two grids: nearest levels, fixed points, exact ties, pieces, and rows moved about."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcq import grids
from pcq.grids import Affine, Codebook, Grid, interleave


def affine(count: int, zero: float | str, g: int = 3, scale: float = 0.37) -> Affine:
    scales = scale * torch.arange(1, g + 1).float()
    return Affine(scales, torch.arange(g).to(torch.uint8) if zero == "per row" else float(zero), count)


def codebook(count: int, g: int = 3, scaled: bool = False, seed: int = 0) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(1 if scaled else g, count, generator=generator).sort(1).values
    return Codebook(table, torch.arange(1, g + 1).float() if scaled else None)


EVERY: dict[str, Grid] = {
    "binary": affine(2, 0.5),
    "ternary": affine(3, 1.0),
    "uniform": affine(16, 7.5),
    "int8": affine(256, 128.0),
    "affine": affine(16, "per row"),
    "affine, halves": replace(affine(16, "per row"), zero_point=torch.tensor([0.5, 7.0, 8.5]).half()),
    "codebook": codebook(5),
    "codebook of 256": codebook(256),
    "shared table, scaled": codebook(7, scaled=True),
    "shared table": Codebook(torch.tensor([[-1.0, -0.3, 0.3, 1.0]])),
}


@pytest.fixture(params=EVERY, name="grid")
def every_grid(request: pytest.FixtureRequest) -> Grid:
    return EVERY[request.param]


def some_rows(g: int = 3, n: int = 501) -> Tensor:
    return 3 * torch.randn(g, n, generator=torch.Generator().manual_seed(1))


def test_encode_finds_the_nearest_level(grid: Grid) -> None:
    rows = some_rows()
    distance = (rows[:, :, None].double() - grid.levels().double()[:, None, :]).abs()
    chosen = distance.gather(2, grid.encode(rows).long()[:, :, None])[:, :, 0]
    slack = 1e-6 * grid.levels().abs().max()  # the middle between two levels is itself rounded to float32
    assert bool((chosen <= distance.amin(2) + slack).all())
    assert (chosen == distance.amin(2)).double().mean() > 0.99


def test_levels_are_fixed_points_and_ascend(grid: Grid) -> None:
    levels = grid.levels()
    assert levels.shape == (grid.g, grid.count)
    assert levels.dtype == torch.float32
    assert bool((levels.diff(dim=1) > 0).all())
    codes = torch.arange(grid.count, dtype=torch.uint8).expand(3, -1)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)


def test_decode_looks_up_the_levels(grid: Grid) -> None:
    codes = grid.encode(some_rows())
    assert codes.dtype == torch.uint8
    looked_up = grid.levels().expand(3, -1).gather(1, codes.long())
    assert torch.equal(grid.decode(codes), looked_up)
    assert grid.decode(codes).dtype == torch.float32


def test_encode_is_monotone(grid: Grid) -> None:
    codes = grid.encode(some_rows().sort(dim=1).values).int()
    assert bool((codes.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("tile", [1, 7, 500, 501, 502, 1002])
def test_pieces_fit_together(grid: Grid, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows()
    whole = grid.encode(rows)
    monkeypatch.setattr(grids, "_TILE", tile if tile > 1 else 101)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(grid.encode(rows), whole)
            assert torch.equal(grid.decode(whole), grid.levels().expand(3, -1).gather(1, whole.long()))
            assert torch.equal(grid.encode(rows.t().contiguous().t()), whole)
    finally:
        torch.set_num_threads(before)


def test_ties() -> None:
    two = Affine(torch.tensor([2.0]), 1.0, 4)  # levels -2 0 2 4: the code that is even wins
    assert two.encode(torch.tensor([[-1.0, 1.0, 3.0, 9.0, -9.0]])).tolist() == [[0, 2, 2, 3, 0]]
    listed = Codebook(torch.tensor([[-2.0, 0.0, 2.0, 4.0]]))  # the lower level wins
    assert listed.encode(torch.tensor([[-1.0, 1.0, 3.0, 9.0, -9.0]])).tolist() == [[0, 1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("zero", "halves"),
    [(1.0, 1), (1.5, 2), (torch.tensor([1], dtype=torch.uint8), 1), (torch.tensor([1.0], dtype=torch.float16), 2)],
)
def test_codes_from_the_zero_point_are_integers_or_halves(zero: float | Tensor, halves: int) -> None:
    assert Affine(torch.ones(1), zero, 4).halves == halves


def test_a_row_of_scale_zero_has_all_its_levels_at_zero() -> None:
    for grid in (
        Affine(torch.tensor([0.0, 1.0]), 1.0, 3),
        Affine(torch.zeros(2), torch.tensor([0, 3], dtype=torch.uint8), 4),
        Codebook(torch.tensor([[-1.0, 0.5]]), torch.zeros(2)),
    ):
        assert not grid.decode(grid.encode(torch.tensor([[-1.0, 5.0], [0.0, 0.0]])))[0].any()
    assert Affine(torch.zeros(1), 1.0, 3).encode(torch.zeros(1, 2)).tolist() == [[1, 1]]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=9, unique=True))
def test_any_different_floats_are_fixed_points_of_their_codebook(levels: list[float]) -> None:
    """Also neighbouring floats, between which there is no other, and levels whose sum overflows."""
    table = torch.tensor([sorted(set(levels))])
    if bool((table.diff() <= 0).any()):
        return  # 0.0 and -0.0
    codes = torch.arange(table.shape[1], dtype=torch.uint8)[None]
    assert torch.equal(Codebook(table).encode(table), codes)
    assert torch.equal(Codebook(table.repeat(2, 1)).encode(table.repeat(2, 1)), codes.repeat(2, 1))


def test_neighbouring_floats() -> None:
    one = torch.tensor(1.0)
    table = torch.stack([one, torch.nextafter(one, torch.tensor(2.0))])[None]
    assert Codebook(table).encode(table).tolist() == [[0, 1]]
    after = torch.nextafter(table, torch.tensor(2.0))
    assert Codebook(after).encode(after).tolist() == [[0, 1]]


def test_no_rows_have_no_codes(grid: Grid) -> None:
    none = grid.map(lambda tensor: tensor[:0])
    assert none.encode(torch.zeros(0, 4)).shape == (0, 4)
    assert none.decode(torch.zeros(0, 4, dtype=torch.uint8)).shape == (0, 4)
    assert grid.encode(torch.zeros(3, 0)).shape == (3, 0)


def test_levels_whose_sum_is_no_float_have_a_middle() -> None:
    rows = torch.tensor([[3.1e38, 3.2e38, -3.4e38]])
    assert Codebook(torch.tensor([[3e38, 3.3e38]])).encode(rows).tolist() == [[0, 1, 0]]


def test_map_moves_the_rows(grid: Grid) -> None:
    rows, order = some_rows(), torch.tensor([2, 0])
    moved = grid.map(lambda tensor: tensor[order])
    assert torch.equal(moved.encode(rows[order]), grid.encode(rows)[order])
    assert torch.equal(moved.decode(grid.encode(rows)[order]), grid.decode(grid.encode(rows))[order])
    assert moved.count == grid.count


def test_map_repeats_a_single_row(grid: Grid) -> None:
    rows = some_rows()
    one = grid.map(lambda tensor: tensor[:1])
    three = one.map(lambda tensor: tensor.repeat(3, *[1] * (tensor.ndim - 1)))
    assert torch.equal(three.encode(rows), torch.cat([one.encode(rows[i : i + 1]) for i in range(3)]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("make", ["affine", "halves", "ternary", "codebook", "scaled"])
def test_interleave_puts_each_channels_tail_behind_its_groups(make: str, m: int, channels: int) -> None:
    def grid(g: int, offset: int) -> Grid:
        number = torch.arange(g).float() + offset
        if make == "affine":
            return Affine(number, number.to(torch.uint8), 8)
        if make == "halves":
            return Affine(number, number.half() / 2, 8)
        if make == "ternary":
            return Affine(number, 1.0, 3)
        if make == "codebook":
            return Codebook(torch.stack([number, number + 1], 1))
        return Codebook(torch.tensor([[-1.0, 2.0]]), number)

    joined = interleave(grid(channels * m, 0), grid(channels, 100), channels)
    wanted = [row for c in range(channels) for row in (*range(c * m, c * m + m), 100 + c)]
    found = joined.table[:, 0] if make == "codebook" else joined.scale  # type: ignore[union-attr]
    assert found is not None
    assert found.tolist() == wanted
    assert joined.g == channels * (m + 1)
    if make == "affine":
        assert joined.zero_point.tolist() == wanted  # type: ignore[union-attr]
    if make == "halves":
        assert joined.zero_point.tolist() == [row / 2 for row in wanted]  # type: ignore[union-attr]
    if make == "scaled":
        assert joined.table.shape == (1, 2)  # type: ignore[union-attr]


def test_interleaved_tables_stay_apart_even_when_they_are_equal() -> None:
    zeros = Codebook(torch.zeros(1, 4))
    assert interleave(zeros, zeros, 1).table.shape == (2, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(torch.ones(2), 0.0, 257),
        lambda: Affine(torch.ones(2), 0.0, 1),
        lambda: Affine(torch.ones(2).double(), 0.0, 4),
        lambda: Affine(torch.ones(2), torch.zeros(2), 4),
        lambda: Affine(torch.ones(2), torch.zeros(3, dtype=torch.uint8), 4),
        lambda: Codebook(torch.zeros(4)),
        lambda: Codebook(torch.zeros(2, 1)),
        lambda: Codebook(torch.zeros(2, 4), torch.ones(3)),
    ],
)
def test_malformed_grids_are_our_mistake(make: object) -> None:
    with pytest.raises(AssertionError):
        make()  # type: ignore[operator]
