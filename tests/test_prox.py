"""The family L: its laws, its named instances, and equality of the fast maps with the formulas written out."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcq import prox
from pcq.errors import PcqError
from pcq.grids import Affine, Codebook, Grid
from pcq.prox import BinaryRelax, Hard, L, Parq, Prox, ProxQuant, Shifts, proximal

KINDS: list[Prox] = [
    Hard(),
    *(kind(relative=relative) for kind in (ProxQuant, BinaryRelax, Parq) for relative in (True, False)),
    BinaryRelax(clip=True),
    L(1.0, 0.5),
    L(0.25, 1.0, relative=False),
    L(0.25, 1.0, clip=False),
    L(0.5, 1.0, relative=False, clip=False),
]
ULP = 2.0**-23
laws = settings(deadline=None, max_examples=60)


def twin(w: float, levels: list[float], shifts: Shifts) -> float:
    """L(w) with the shifts of METHOD.md section 2 (arXiv 2110.13220, eq. 13), case by case, one weight."""
    q = levels
    if w <= q[0] or w >= q[-1]:
        end, half = (q[0], (q[1] - q[0]) / 2) if w <= q[0] else (q[-1], (q[-1] - q[-2]) / 2)
        unit = {"gap": half, "row": max(b - a for a, b in pairwise(q)) / 2, "weight": 1.0}[shifts.unit]
        return end + shifts.outside * math.copysign(max(0.0, abs(w - end) - shifts.rho * unit), w - end)
    k = max(i for i in range(len(q) - 1) if q[i] <= w)
    half = (q[k + 1] - q[k]) / 2
    unit = {"gap": half, "row": max(b - a for a, b in pairwise(q)) / 2, "weight": 1.0}[shifts.unit]
    rho, varrho = shifts.rho * unit, shifts.varrho * unit
    p = (q[k] + q[k + 1]) / 2
    q_plus, q_minus = min(p, q[k] + rho), max(p, q[k + 1] - rho)
    p_minus, p_plus = max(q[k], p - varrho), min(q[k + 1], p + varrho)
    if w <= q_plus and w != p:
        return q[k]
    if w < p:
        return q[k] + (w - q_plus) * (p_minus - q[k]) / (p - q_plus)
    if w == p:
        return p_minus
    if w < q_minus:
        return p_plus + (w - p) * (q[k + 1] - p_plus) / (q_minus - p)
    return q[k + 1]


def slow(rows: Tensor, levels: Tensor, shifts: Shifts) -> Tensor:
    levels = levels.expand(rows.shape[0], -1)
    return torch.tensor(
        [
            [twin(w, q, shifts) for w in row]
            for row, q in zip(rows.double().tolist(), levels.double().tolist(), strict=True)
        ],
        dtype=torch.float64,
    ).reshape(rows.shape)


@st.composite
def dyadic_grids(draw: st.DrawFn) -> tuple[Tensor, Grid]:
    """Rows and levels that are multiples of 1/64, so that float32 computes every map of dyadic slope exactly."""
    g, n, k = draw(st.integers(1, 3)), draw(st.integers(1, 24)), draw(st.integers(2, 12))
    rows = torch.tensor(draw(st.lists(st.integers(-320, 320), min_size=g * n, max_size=g * n))).reshape(g, n) / 64
    if draw(st.booleans()):
        scale = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=g, max_size=g)))
        zero: float | Tensor = draw(st.integers(0, 2 * k - 2)) / 2
        if draw(st.booleans()):
            zero = torch.tensor(draw(st.lists(st.integers(0, k - 1), min_size=g, max_size=g)), dtype=torch.uint8)
        return rows, Affine(scale, zero, k)
    g_table = draw(st.sampled_from([1, g]))
    gap = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])  # 1 / half a gap must be exact too
    gaps = torch.tensor(draw(st.lists(gap, min_size=g_table * k, max_size=g_table * k))).reshape(g_table, k)
    return rows, Codebook(gaps.cumsum(1) - draw(st.integers(-4, 16)) / 4)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, Grid]:
    """Random rows and grids: listed or even, shared or per row, some rows zero, some levels repeated."""
    g, n, k = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.sampled_from([2, 3, 4, 8, 9, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = 10.0 ** draw(st.integers(-6, 3))
    rows = torch.randn(g, n, generator=generator) * spread
    zeroed = draw(st.booleans())
    if zeroed:
        rows[0] = 0
    if draw(st.booleans()):
        scale = torch.rand(g, generator=generator) * spread
        scale[0] = 0 if zeroed else scale[0]
        zero: float | Tensor = draw(st.sampled_from([(k - 1) / 2, float(k // 2), 0.0]))
        if draw(st.booleans()):
            zero = torch.randint(0, k, (g,), generator=generator).to(torch.uint8)
        return rows, Affine(scale, zero, k)
    table = torch.randn(draw(st.sampled_from([1, g])), k, generator=generator).sort(1).values * spread
    if draw(st.booleans()):
        table[:, k // 2] = table[:, k // 2 - 1]
    table[0] = 0 if zeroed and table.shape[0] > 1 else table[0]
    return rows, Codebook(table)


kinds, strengths = st.sampled_from(KINDS), st.floats(0, 1)


def rounding(grid: Grid, shifts: Shifts, rows: Tensor) -> Tensor:
    """How far float32 may be off, ``[g, 1]``: a few ulps of the largest number met, times the largest slope."""
    levels = grid.levels()
    size = torch.maximum(levels.abs().amax(1, keepdim=True), rows.abs().amax(1, keepdim=True)).double()
    half = (levels[:, 1:] - levels[:, :-1]).double() / 2
    unit = {"gap": half, "row": half.amax(1, keepdim=True), "weight": torch.ones(1, 1)}[shifts.unit]
    r, v = (torch.where(half > 0, s * unit / half, 1.0).clamp(max=1) for s in (shifts.rho, shifts.varrho))
    slope = torch.where((r < 1) & (v < 1), (1 - v) / (1 - r), 0.0).amax(1, keepdim=True)
    count = levels.shape[1] + (float(torch.as_tensor(grid.zero_point).max()) if isinstance(grid, Affine) else 0)
    return (4 + count) * ULP * size * slope.clamp(min=1)


# -- equality with the formulas ---------------------------------------------------------------------------------------


@laws
@given(
    dyadic_grids(),
    st.sampled_from([(0.0, 0.0), (0.5, 0.5), (0.0, 0.5), (0.5, 0.0), (0.0, 0.25), (0.75, 0.5), (1.0, 0.0), (1.0, 1.0)]),
    st.sampled_from([0.0, 0.25, 1.0, 2.0]),
)
@example((torch.tensor([[1.0, -1.0]] * 2), Affine(torch.tensor([0.0, 1.0]), 1.0, 3)), (0.5, 0.5), 1.0)  # no gaps
@example((torch.tensor([[3.0, 0.25, -3.0]]), Affine(torch.ones(1), 0.5, 2)), (0.5, 0.0), 2.0)  # ramps that go on
def test_even_and_listed_maps_equal_the_formulas_exactly_where_float32_is_exact(
    case: tuple[Tensor, Grid], shift: tuple[float, float], outside: float
) -> None:
    rows, grid = case
    shifts = Shifts(*shift, outside=outside)
    got, want = proximal(rows, grid, shifts).double(), slow(rows, grid.levels(), shifts)
    at_a_tie = _ties(rows, grid.levels())
    assert torch.equal(got[~at_a_tie], want[~at_a_tie])


def _ties(rows: Tensor, levels: Tensor) -> Tensor:
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    return (rows[:, :, None] == middles.expand(rows.shape[0], -1)[:, None, :]).any(2)


@laws
@given(grids(), kinds, strengths)
def test_every_map_equals_the_formulas_up_to_rounding(case: tuple[Tensor, Grid], kind: Prox, strength: float) -> None:
    rows, grid = case
    shifts = kind.shifts(strength)
    got, levels = proximal(rows, grid, shifts).double(), grid.levels()
    allowed = rounding(grid, shifts, rows)
    # Where a weight is within rounding of the middle of a gap, either side of the jump is right.
    near = 8 * ULP * (rows.abs().amax(1, keepdim=True) + levels.abs().amax(1, keepdim=True)).double()
    wants = [slow(rows.double() + move * near, levels, shifts) for move in (-1, 0, 1)]
    low, high = torch.stack(wants).amin(0), torch.stack(wants).amax(0)
    assert ((got >= low - allowed) & (got <= high + allowed)).all()


@laws
@given(st.floats(0, 1))
def test_no_slope_takes_what_is_left_of_half_a_step_past_its_middle(rho: float) -> None:
    slope, rest = np.float32(Shifts(rho, 0.0).slope), np.float32(0.5) - np.float32(rho / 2)
    assert float(slope) * float(rest) <= 0.5


@laws
@given(grids(), st.floats(0, 2), st.floats(0, 2), st.sampled_from(["gap", "row", "weight"]))
def test_listed_maps_equal_the_formulas_in_double_precision(
    case: tuple[Tensor, Grid], rho: float, varrho: float, unit: str
) -> None:
    rows, grid = case
    rows, levels = rows.double(), grid.levels().double()
    shifts = Shifts(rho, varrho, unit)  # type: ignore[arg-type]
    got, want = proximal(rows, levels, shifts), slow(rows, levels, shifts)
    allowed = rounding(grid, shifts, rows) * 2.0**-28
    ties = _ties(rows, levels)
    assert ((got - want).abs() <= allowed)[~ties].all()


@laws
@given(grids(), kinds, strengths, st.integers(1, 50))
def test_chunks_and_in_place_change_no_bit(case: tuple[Tensor, Grid], kind: Prox, strength: float, chunk: int) -> None:
    rows, grid = case
    shifts = kind.shifts(strength)
    whole = proximal(rows, grid, shifts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prox, "CHUNK", chunk)
        assert torch.equal(proximal(rows, grid, shifts), whole)
        out = torch.full_like(rows, math.nan)
        assert proximal(rows, grid, shifts, out=out) is out
        assert torch.equal(out, whole)
        own = rows.clone()
        proximal(own, grid, shifts, out=own)
        assert torch.equal(own, whole)


def test_in_place_what_lies_outside_of_even_levels_is_not_lost() -> None:
    rows, grid, shifts = torch.linspace(-3, 3, 13)[None], Affine(torch.ones(1), 1.0, 3), Shifts(0.5, 0.5, outside=0.25)
    own = rows.clone()
    proximal(own, grid, shifts, out=own)
    assert torch.equal(own, proximal(rows, grid, shifts))


@laws
@given(grids(), kinds, strengths)
def test_searching_the_gap_equals_summing_the_ramps(case: tuple[Tensor, Grid], kind: Prox, strength: float) -> None:
    rows, grid = case
    shifts, levels = kind.shifts(strength), grid.levels()
    results = []
    for few in (2, 256):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prox, "FEW", few)
            results.append(proximal(rows, levels, shifts).double())
    assert ((results[0] - results[1]).abs() <= rounding(grid, shifts, rows)).all()


@laws
@given(grids(), st.floats(0.01, 0.999))
def test_ramps_of_one_slope_equal_the_formulas(case: tuple[Tensor, Grid], strength: float) -> None:
    rows, grid = case
    levels, shifts = grid.levels(), Parq().shifts(strength)
    rows = torch.cat([rows, levels.expand(rows.shape[0], -1)], 1)
    got, want = proximal(rows, levels, shifts).double(), slow(rows, levels, shifts)
    assert ((got - want).abs() <= rounding(grid, shifts, rows))[~_ties(rows, levels)].all()


# -- laws -------------------------------------------------------------------------------------------------------------


@laws
@given(grids(), kinds, strengths)
def test_monotone(case: tuple[Tensor, Grid], kind: Prox, strength: float) -> None:
    rows, grid = case
    levels = grid.levels()
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).expand(rows.shape[0], -1)
    around = torch.cat([torch.nextafter(middles, torch.tensor(s)) for s in (-math.inf, math.inf)], 1)
    rows = torch.cat([rows, middles, around, levels.expand(rows.shape[0], -1)], 1).sort(1).values
    mapped = proximal(rows, grid, kind.shifts(strength))
    slack = 0.0 if isinstance(grid, Affine) and kind.shifts(strength).outside == 0 else rounding_sum(grid, rows)
    assert (mapped[:, 1:] - mapped[:, :-1] >= -slack).all()


@pytest.mark.parametrize(
    ("strength", "scale"),
    [(0.06252065263209139, 3.3014550), (0.08290358875809611, 0.65916842), (0.1634339464407789, 0.41712171)],
)
def test_a_steep_map_does_not_pass_the_middle_by_rounding(strength: float, scale: float) -> None:
    """Strengths whose slope in float32 is too large by itself."""
    grid, middle = Affine(torch.tensor([scale]), 1.0, 3), torch.tensor([scale / 2])
    around = [middle]
    for _ in range(40):
        ends = ((around[0], -math.inf), (around[-1], math.inf))
        below, above = (torch.nextafter(x, torch.tensor(to)) for x, to in ends)
        around = [below, *around, above]
    mapped = proximal(torch.cat(around)[None], grid, Parq().shifts(strength))
    assert (mapped[:, 1:] >= mapped[:, :-1]).all()


def rounding_sum(grid: Grid, rows: Tensor) -> Tensor:
    return 2 * ULP * torch.maximum(grid.levels().abs().amax(1, keepdim=True), rows.abs().amax(1, keepdim=True))


@laws
@given(grids(), kinds, strengths)
def test_levels_are_fixed_points(case: tuple[Tensor, Grid], kind: Prox, strength: float) -> None:
    rows, grid = case
    levels = grid.levels().expand(rows.shape[0], -1).contiguous()
    shifts = kind.shifts(strength)
    fixed = proximal(levels, grid, shifts)
    exact = shifts.rho > 1e-3 and shifts.outside == 0 if isinstance(grid, Affine) else shifts.hard
    if shifts.identity or exact:
        assert torch.equal(fixed, levels)
    else:
        assert ((fixed - levels).abs() <= rounding(grid, shifts, levels)).all()


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, 1e-7, 1e-12])
def test_ramps_so_steep_that_rounding_shows_still_rise_from_level_to_level(distance: float) -> None:
    for scale, zero in ((0.3, 1.0), (7e-5, 0.5), (123.0, 7.0)):
        grid = Affine(torch.tensor([scale]), zero, 16)
        levels = grid.levels()
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        rows = (middles[0, :, None] * (1 + torch.linspace(-1e-5, 1e-5, 401))).reshape(1, -1).sort(1).values
        mapped = proximal(rows, grid, Parq().shifts(1 - distance))
        assert (mapped[:, 1:] >= mapped[:, :-1]).all()
        # Every weight here is within 1e-5 of a middle, so the ends of its gap are half a gap away.
        assert ((mapped - rows).abs() <= scale * 0.5 + 2e-5 * rows.abs()).all()


@laws
@given(grids(), kinds)
def test_strength_0_is_the_identity_within_the_levels(case: tuple[Tensor, Grid], kind: Prox) -> None:
    rows, grid = case
    levels = grid.levels()
    mapped = proximal(rows, grid, kind.shifts(0.0))
    if isinstance(kind, Hard):
        assert torch.equal(mapped, proximal(rows, grid, kind.shifts(1.0)))
    elif isinstance(kind, ProxQuant) or (isinstance(kind, BinaryRelax | L) and not kind.clip):
        assert torch.equal(mapped, rows)
    else:
        assert torch.equal(mapped, torch.maximum(torch.minimum(rows, levels[:, -1:]), levels[:, :1]))


NEIGHBOURS = torch.tensor([[1.0, 1.0 + ULP]])


@laws
@given(grids(), kinds)
@example((torch.tensor([[0.5, -0.5]]), Affine(torch.ones(1), 1.0, 3)), Hard())
@example((NEIGHBOURS, Codebook(NEIGHBOURS)), Hard())
@example((-NEIGHBOURS.flip(1), Codebook(-NEIGHBOURS.flip(1))), Hard())
@example((torch.tensor([[3.1e38, 3.3e38]]), Codebook(torch.tensor([[3e38, 3.3e38]]))), Hard())
def test_strength_1_is_the_nearest_level_as_the_grid_encodes_it(case: tuple[Tensor, Grid], kind: Prox) -> None:
    rows, grid = case
    levels = grid.levels()
    rows = torch.cat([rows, ((levels[:, 1:] + levels[:, :-1]) / 2).expand(rows.shape[0], -1)], 1)
    mapped = proximal(rows, grid, kind.shifts(1.0))
    assert torch.equal(mapped, grid.decode(grid.encode(rows)))


@laws
@given(grids(), kinds, strengths)
def test_closed_graph_the_value_at_a_jump_is_one_of_its_ends(
    case: tuple[Tensor, Grid], kind: Prox, strength: float
) -> None:
    rows, grid = case
    levels = grid.levels().double()
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).expand(rows.shape[0], -1).contiguous()
    shifts = kind.shifts(strength)
    here = proximal(middles, levels, shifts)
    sides = [proximal(middles + step * levels.abs().amax(1, keepdim=True), levels, shifts) for step in (-1e-13, 1e-13)]
    allowed = 1e-5 * rounding(grid, shifts, middles)
    assert torch.minimum((here - sides[0]).abs(), (here - sides[1]).abs()).le(allowed).all()


@laws
@given(grids(), kinds, st.sampled_from([0.0, 1e-45, 1e-7, 0.5, 1 - 1e-7, 1 - 2**-53, 1.0]))
def test_nothing_is_ever_nan(case: tuple[Tensor, Grid], kind: Prox, strength: float) -> None:
    rows, grid = case
    tiny = torch.tensor([[0.0, 1e-45, -1e-45, 1e-38, 1e6, -1e6]]).expand(rows.shape[0], -1)
    assert torch.isfinite(proximal(torch.cat([rows, tiny], 1), grid, kind.shifts(strength))).all()
    squeezed = Codebook(grid.levels() * 1e-42)
    assert torch.isfinite(proximal(torch.cat([rows, tiny], 1), squeezed, kind.shifts(strength))).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_middle_of_a_gap_without_a_reciprocal_is_no_nan(kind: Prox) -> None:
    levels = torch.tensor([[-1e-44, 1e-44]])
    assert torch.isfinite(proximal(torch.zeros(1, 1), levels, kind.shifts(0.5))).all()


# -- the named instances ----------------------------------------------------------------------------------------------


@laws
@given(grids(), st.floats(0, 1e4))
def test_binary_relax_is_its_published_formula(case: tuple[Tensor, Grid], e: float) -> None:
    rows, grid = case
    nearest = grid.decode(grid.encode(rows)).double()
    want = (e * nearest + rows.double()) / (1 + e)
    got = proximal(rows, grid, BinaryRelax().shifts(e / (1 + e)))
    # Close to a middle, nearest itself may fall either way between a fast map and encode.
    near = _near_a_middle(rows, grid)
    assert ((got.double() - want).abs() <= rounding(grid, Shifts(0, 0), rows))[~near].all()


def _near_a_middle(rows: Tensor, grid: Grid) -> Tensor:
    levels = grid.levels()
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).expand(rows.shape[0], -1)
    size = levels.abs().amax(1, keepdim=True) + rows.abs().amax(1, keepdim=True)
    return ((rows[:, :, None] - middles[:, None, :]).abs() <= 8 * ULP * size[:, :, None]).any(2)


@laws
@given(grids(), st.floats(0.01, 0.99))
def test_proxquant_is_the_soft_threshold_towards_the_nearest_level(case: tuple[Tensor, Grid], lam: float) -> None:
    """arXiv 1810.00861: w = nearest + sign(w* - nearest) * max(|w* - nearest| - lam, 0), outside of the levels too."""
    rows, grid = case
    levels = grid.levels()
    widest = (levels[:, 1:] - levels[:, :-1]).amax(1, keepdim=True).double() / 2
    nearest = grid.decode(grid.encode(rows)).double()
    rest = rows.double() - nearest
    want = nearest + rest.sign() * (rest.abs() - lam * widest).clamp(min=0)
    got = proximal(rows, grid, ProxQuant(relative=False).shifts(lam)).double()
    near = _near_a_middle(rows, grid)
    assert ((got - want).abs() <= rounding(grid, Shifts(0, 0), rows))[~near].all()


def test_proxquant_minimises_the_l1_distance_to_the_levels_plus_half_the_squared_step() -> None:
    levels, lam = torch.tensor([[-1.0, -0.25, 0.5, 1.0]], dtype=torch.float64), 0.1
    rows = torch.linspace(-1, 1, 97, dtype=torch.float64)[None]
    candidates = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    distance = (candidates[:, None] - levels).abs().amin(1)
    best = candidates[(lam * distance + (candidates - rows.T) ** 2 / 2).argmin(1)]
    got = proximal(rows, levels, Shifts(lam, lam, "weight"))
    assert (got - best).abs().max() <= 1e-4


@laws
@given(grids(), st.floats(0.01, 0.99))
def test_parq_has_no_jump_and_slope_one_over_s(case: tuple[Tensor, Grid], s: float) -> None:
    rows, grid = case
    levels = grid.levels().double()
    rows = rows.double().sort(1).values
    mapped = proximal(rows, levels, Parq().shifts(1 - s))
    rise, run = mapped[:, 1:] - mapped[:, :-1], rows[:, 1:] - rows[:, :-1]
    assert (rise <= run / s + 1e-9 * (1 + levels.abs().amax(1, keepdim=True))).all()


def test_absolute_shifts_harden_narrow_gaps_first_and_relative_ones_all_together() -> None:
    levels = torch.tensor([[0.0, 0.5, 2.0]])
    rows = torch.tensor([[0.125, 0.75]])
    assert proximal(rows, levels, ProxQuant(relative=False).shifts(0.4)).tolist() == [[0.0, 0.5]]
    assert proximal(torch.tensor([[0.375, 1.4375]]), levels, ProxQuant(relative=False).shifts(0.5)).tolist() == [
        [0.5, 1.8125]
    ]
    got = proximal(torch.tensor([[0.1875, 0.6875]]), levels, ProxQuant().shifts(0.5))
    assert got.tolist() == [[0.0625, 0.5]]


@pytest.mark.parametrize("kind", [ProxQuant, BinaryRelax, Parq, L])
def test_shifts_that_are_not_relative_are_those_of_the_row(kind: type[ProxQuant | BinaryRelax | Parq | L]) -> None:
    assert kind(relative=False).shifts(0.5).unit == "row"
    assert kind().shifts(0.5).unit == "gap"


@pytest.mark.parametrize("shifts", [Shifts(0.5, 0.0, "weight"), Shifts(0.0, 0.5, "weight")])
def test_a_shift_of_half_a_gap_is_the_nearest_level(shifts: Shifts) -> None:
    """METHOD.md section 2: rho >= D/2 or varrho >= D/2 is BC."""
    levels = torch.tensor([[-1.0, 0.0, 0.5]])
    rows = torch.linspace(-1.3, 1.1, 53)[None]
    assert torch.allclose(proximal(rows, levels, shifts), Codebook(levels).decode(Codebook(levels).encode(rows)))


def test_empty_rows_stay_empty() -> None:
    for shape in ((0, 3), (3, 0)):
        grid = Affine(torch.ones(shape[0]), 1.0, 3)
        assert proximal(torch.zeros(shape), grid, Parq().shifts(0.5)).shape == shape


def test_a_family_member_that_never_hardens_is_refused() -> None:
    with pytest.raises(PcqError, match="the larger of them 1"):
        L(0.5, 0.25)
    with pytest.raises(PcqError, match="the larger of them 1"):
        L(-0.5, 1.0)
    with pytest.raises(PcqError, match="push weights away"):
        L(1.0, 0.5, clip=False)
