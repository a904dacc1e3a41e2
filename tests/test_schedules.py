"""Schedules: from 0 to 1, never down, a hard phase at the end, and each the formula it is named after."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcq.errors import PcqError, Problems
from pcq.schedules import Cosine, Geometric, Linear, MirroredSigmoid, Schedule, Theory

laws = settings(deadline=None, max_examples=80)
shares = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    start, end = sorted((draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))))
    kinds: list[Schedule] = [
        Linear(start, end, first=draw(shares)),
        Cosine(start, end),
        MirroredSigmoid(start, end, steepness=draw(st.floats(1e-3, 500))),
        Geometric(start, end, first=0.1, last=draw(st.floats(0.1, 1e6))),
        Theory(end, first=draw(shares)),
    ]
    return draw(st.sampled_from(kinds))


@laws
@given(schedules(), shares, shares, st.floats(0, 1e3))
def test_every_schedule_rises_from_0_to_1_and_is_hard_from_end_on(
    schedule: Schedule, one: float, other: float, rates: float
) -> None:
    early, late = sorted((one, other))
    # mu grows with the steps
    before, after = (schedule.strength(progress, 1 + rates * progress) for progress in (early, late))
    assert 0 <= before <= after + 1e-15
    assert after <= 1
    assert schedule.strength(schedule.end, 1.0) == schedule.strength(1.0, 1.0) == 1
    assert schedule.end < 1


@pytest.mark.parametrize("kind", [Linear, Cosine, MirroredSigmoid])
def test_nothing_happens_before_start(kind: type[Linear | Cosine | MirroredSigmoid]) -> None:
    schedule = kind(start=0.25, end=0.75)
    assert schedule.strength(0.0, 5.0) == schedule.strength(0.25, 5.0) == 0
    assert schedule.strength(0.26, 5.0) > 0
    assert schedule.strength(0.5, 5.0) == pytest.approx(0.5, abs=1e-15)


def test_linear_starts_from_first() -> None:
    schedule = Linear(0.0, 0.5, first=0.2)
    assert [schedule.strength(p, 1.0) for p in (0.0, 0.25, 0.5)] == [0.2, pytest.approx(0.6), 1.0]


def test_cosine_is_half_a_wave() -> None:
    schedule = Cosine(0.2, 0.8)
    strengths = [schedule.strength(0.2 + 0.6 * share, 1.0) for share in (1 / 4, 1 / 3, 1 / 2, 2 / 3)]
    assert strengths == pytest.approx([(1 - math.sqrt(0.5)) / 2, 1 / 4, 1 / 2, 3 / 4])


def test_what_is_not_said() -> None:
    assert Linear() == Linear(0.0, 0.75, 0.0)
    assert Cosine() == Cosine(0.0, 0.75)
    assert MirroredSigmoid() == MirroredSigmoid(0.0, 0.75, 10.0)
    assert Geometric() == Geometric(0.0, 0.75, 1.0, 100.0)
    assert Theory() == Theory(0.75, 0.01)


@pytest.mark.parametrize("f", [0.0, 0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("steepness", [1.0, 10.0, 40.0])
def test_mirrored_sigmoid_is_parqs_inverse_slope(f: float, steepness: float) -> None:
    """METHOD.md section 5, arXiv 2503.15748: the inverse slope is a mirrored sigmoid, normalised to 1 and 0."""

    def sigmoid(x: float) -> float:
        return (1 + math.tanh(x / 2)) / 2

    s = steepness
    inverse = (sigmoid(-s * (f - 0.5)) - sigmoid(-s / 2)) / (sigmoid(s / 2) - sigmoid(-s / 2))
    got = MirroredSigmoid(0.2, 0.7, steepness).strength(0.2 + f * 0.5, 1.0)
    assert got == pytest.approx(1 - inverse, abs=1e-12)


def test_geometric_multiplies_e_by_a_constant_factor() -> None:
    schedule = Geometric(0.0, 0.8, first=0.5, last=32.0)
    strengths = [schedule.strength(0.8 * i / 6, 1.0) for i in range(6)]
    es = [strength / (1 - strength) for strength in strengths]
    assert es[0] == pytest.approx(0.5)
    assert [b / a for a, b in zip(es, es[1:], strict=False)] == pytest.approx([2.0] * 5)  # noqa: RUF007
    assert schedule.strength(0.8, 1.0) == 1


def test_theory_follows_mu_and_not_the_clock() -> None:
    schedule = Theory(end=0.9, first=0.1)
    assert schedule.strength(0.0, 1.0) == 0.1
    assert schedule.strength(0.5, 4.0) == schedule.strength(0.8, 4.0) == 0.4
    assert schedule.strength(0.5, 40.0) == 1
    assert schedule.strength(0.9, 1.0) == 1


@pytest.mark.parametrize("end", [1.0, 1.5, -0.1, math.nan])
def test_a_schedule_without_a_hard_phase_is_refused(end: float) -> None:
    with pytest.raises(PcqError, match="hard phase"):
        Linear(0.0, end)
    with pytest.raises(PcqError, match="hard phase"):
        Theory(end)


def test_other_mistakes_are_refused_in_words() -> None:
    with pytest.raises(PcqError, match="start <= end"):
        Cosine(0.5, 0.25)
    with pytest.raises(Problems) as raised:
        Linear(-1.0, 2.0)
    assert "start is -1.0" in str(raised.value)
    assert "end is 2.0" in str(raised.value)
    for make in (
        lambda: Linear(first=1.5),
        lambda: Theory(first=-0.5),
        lambda: Geometric(first=0.0),
        lambda: Geometric(first=2.0, last=1.0),
        lambda: Geometric(last=math.inf),
        lambda: MirroredSigmoid(steepness=0.0),
        lambda: MirroredSigmoid(steepness=1e-20),
        lambda: MirroredSigmoid(steepness=501.0),
    ):
        with pytest.raises(PcqError, match="schedule"):
            make()
