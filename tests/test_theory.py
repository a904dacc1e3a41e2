"""The theory of METHOD.md sections 1 to 3 as running code; docs/theory.md says which equation is where."""

import math

import pytest
import torch
from torch import Tensor, nn

from pcq.grids import Codebook
from pcq.methods import METHODS, Method
from pcq.prox import BinaryRelax, Hard, L, Parq, Prox, ProxQuant, Shifts, proximal
from pcq.proxconnect import ProxConnect, Target
from pcq.quantizers import Fixed
from pcq.rows import Rows
from pcq.schedules import Linear, Schedule, Theory

LEVELS = (-1.0, -0.3, 0.3, 1.0)
G, N = 3, 8


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A least-squares loss l(w) = ½ ||w A - B||² / rows(A), w [G, N], in double precision."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(N, 24, generator=generator, dtype=torch.float64)
    return a, torch.randn(G, 24, generator=generator, dtype=torch.float64)


def gradient(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (w @ a - b) @ a.T / a.shape[1]


def start() -> Tensor:
    return torch.randn(G, N, generator=torch.Generator().manual_seed(9))


def run(method: Method, schedule: Schedule, rates: list[float]) -> list[Tensor]:
    """The weights w_0, w_1, .. of ProxConnect on the problem, SGD with the given learning rates, fixed levels."""
    parameter = nn.Parameter(start())
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    ProxConnect(
        optimizer,
        {"w": Target(parameter, Rows((G, N), 0), Fixed(LEVELS))},
        method,
        schedule,
        steps=len(rates) * 100,
        refit=None,
    )
    a, b = problem()
    seen = [parameter.data.clone()]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient(parameter.data.double(), a, b).float()
        optimizer.step()
        seen.append(parameter.data.clone())
    return seen


def distance(w: Tensor) -> Tensor:
    """r: the L1 distance to the levels, weight by weight."""
    return (w[..., None] - torch.tensor(LEVELS, dtype=torch.float64)).abs().amin(-1)


def prox_by_definition(latent: Tensor, weight: float) -> Tensor:
    """argmin over w of weight * r(w) + ½ (w - latent)², within the levels: the best of each level's own minimum."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    rest = latent[..., None] - levels
    candidates = (levels + rest.sign() * (rest.abs() - weight).clamp(min=0)).clamp(LEVELS[0], LEVELS[-1])
    values = weight * distance(candidates) + (candidates - latent[..., None]) ** 2 / 2
    return candidates.gather(-1, values.argmin(-1, keepdim=True))[..., 0]


# -- BinaryConnect is dual averaging ----------------------------------------------------------------------------------


def test_binaryconnect_is_dual_averaging_iterate_by_iterate() -> None:
    """w_{t+1} = argmin over w in Q of <w, sum of eta_s grad l(w_s)> + ½ ||w - w*_0||², found by trying every level."""
    rates = [0.5 / math.sqrt(t + 1) for t in range(60)]
    seen = run(METHODS["binaryconnect"], Linear(), rates)
    a, b = problem()
    total, levels = torch.zeros(G, N, dtype=torch.float64), torch.tensor(LEVELS, dtype=torch.float64)
    flips = 0
    for t, weight in enumerate(seen):
        objective = total[..., None] * levels + (levels - start().double()[..., None]) ** 2 / 2
        want = levels[objective.argmin(-1)].float()
        assert torch.equal(weight, want)
        flips += int((weight != seen[t - 1]).sum()) if t else 0
        if t < len(rates):
            total += rates[t] * gradient(want.double(), a, b).float().double()
    assert flips > 20


# -- ProxConnect is the generalized conditional gradient on the smoothed dual -----------------------------------------


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_proxconnect_is_gcg_on_the_smoothed_dual(exponent: float) -> None:
    """GCG: w_t = argmin r(w) + ||w||²/(2 mu_t) - <w, u_t>, u_{t+1} = (1-lam_t) u_t - lam_t grad l(w_t).

    With pi_t = prod over s<=t of (1-lam_s) and eta_t = lam_t / pi_t this is ProxConnect, w*_t = mu_t u_t,
    mu_t = 1 + sum over s<t of eta_s = 1 / pi_{t-1}.
    """
    first = 0.05
    c = first * 0.35  # r = c * distance: the schedule's strength is in half widths of the widest gap, 0.35
    shares = [0.4 / (t + 2) ** exponent for t in range(40)]
    pi, rates = 1.0, []
    for share in shares:
        pi *= 1 - share
        rates.append(share / pi)
    method = Method("weight", "latent", L(relative=False))
    seen = run(method, Theory(0.9, first), rates)
    a, b = problem()
    dual, mu = start().double(), 1.0
    for weight, share, rate in zip(seen, shares, rates, strict=False):
        # mu r(w) + ½||w||² - <w, mu u>: the prox of mu r at mu u
        want = prox_by_definition(mu * dual, mu * c)
        torch.testing.assert_close(weight.double(), want, rtol=1e-5, atol=1e-5)
        dual = (1 - share) * dual - share * gradient(want, a, b)
        mu += rate
    assert mu > 3.9  # the prox has grown well into its range
    assert pi == pytest.approx(1 / mu)


def test_hard_rounding_does_not_depend_on_mu() -> None:
    """For r the indicator of Q, P^mu = P_Q for all mu: ProxConnect with the hard prox is BinaryConnect."""
    rates = [0.3] * 30
    one, other = (
        run(METHODS["binaryconnect"], schedule, rates) for schedule in (Theory(0.9, 0.01), Linear(0.0, 0.5, 0.9))
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- the gap identity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gap_identity_holds_for_every_w_and_any_r(c: float, seed: int) -> None:
    """sum eta [<w_s - w, grad l(w_s)> + r(w_s) - r(w)] = Delta_{s-1}(w) - Delta_t(w) + sum Delta_s(w_s)."""
    a, b = problem(seed)
    generator = torch.Generator().manual_seed(seed)
    latent, mu, trail = torch.randn(G, N, generator=generator, dtype=torch.float64), 1.0, []
    table = torch.tensor([LEVELS], dtype=torch.float64)
    rates = [0.4 / math.sqrt(t + 1) for t in range(25)]
    for rate in [*rates, 0.0]:
        weight = proximal(latent, table, Shifts(mu * c, mu * c, "weight"))
        grad = gradient(weight, a, b)
        trail.append((weight, latent, mu, rate, grad))
        latent, mu = latent - rate * grad, mu + rate

    def r(w: Tensor) -> float:
        return c * float(distance(w).sum())

    def delta(t: int, w: Tensor) -> float:
        """Delta_t(w) = R_t(w) - R_t(w_{t+1}) - <w - w_{t+1}, w*_{t+1}>, R_t(w) = mu_{t+1} r(w) + ½ ||w||²."""
        after, latent_after, mu_after, _, _ = trail[t + 1]

        def big(value: Tensor) -> float:
            return mu_after * r(value) + float(value.square().sum()) / 2

        return big(w) - big(after) - float(((w - after) * latent_after).sum())

    for first, last in ((0, 24), (5, 17), (10, 10)):
        for _ in range(4):
            w = torch.rand(G, N, generator=generator, dtype=torch.float64) * 2 - 1
            left = sum(
                rate * (float(((weight - w) * grad).sum()) + r(weight) - r(w))
                for weight, _, _, rate, grad in trail[first : last + 1]
            )
            right = delta(first - 1, w) - delta(last, w) + sum(delta(t, trail[t][0]) for t in range(first, last + 1))
            assert left == pytest.approx(right, rel=1e-9, abs=1e-9)
            assert all(delta(t, w) >= -1e-12 for t in range(-1, 24))


# -- convergence on a convex problem ---------------------------------------------------------------------------------


def test_averaged_and_best_iterate_converge_at_the_stated_rate() -> None:
    """l + r with r = c |w| (convex: one level within reach), eta_t = eta_0 / sqrt(t + 1): O(log t / sqrt t).

    From the gap identity, f(average) - f(w) <= (Delta_{-1}(w) + sum of Delta_t(w_t)) / sum of eta_t, and
    Delta_t(w_t) <= ½ eta_t² ||grad l(w_t) + a subgradient of r at w_t||².
    """
    a, b = problem(4)
    c, eta0 = 0.05, 0.5
    table = torch.tensor([[-64.0, 0.0, 64.0]], dtype=torch.float64)

    def f(w: Tensor) -> float:
        return float(((w @ a - b) ** 2).sum()) / (2 * a.shape[1]) + c * float(w.abs().sum())

    best = torch.zeros(G, N, dtype=torch.float64)
    for _ in range(5000):  # ISTA
        best = best - 0.3 * gradient(best, a, b)
        best = best.sign() * (best.abs() - 0.3 * c).clamp(min=0)
    least = f(best)

    latent, mu, average, total = torch.full((G, N), 2.0, dtype=torch.float64), 1.0, torch.zeros(G, N).double(), 0.0
    lowest, slack, start_gap, gaps = math.inf, 0.0, 0.0, {}
    for t in range(10_000):
        weight = proximal(latent, table, Shifts(min(32.0, mu * c), min(32.0, mu * c), "weight"))
        if t == 0:
            start_gap = c * float(best.abs().sum() - weight.abs().sum())
            start_gap += float(best.square().sum() - weight.square().sum()) / 2
            start_gap -= float(((best - weight) * latent).sum())
        rate, grad = eta0 / math.sqrt(t + 1), gradient(weight, a, b)
        slack += rate**2 * float((grad.abs() + c).square().sum()) / 2
        total += rate
        average += rate * weight
        lowest = min(lowest, f(weight))
        latent, mu = latent - rate * grad, mu + rate
        gaps[t + 1] = (f(average / total) - least, lowest - least, (start_gap + slack) / total)
    assert mu * c < 32  # the prox never met its cap
    for t in (10, 100, 1000, 10_000):
        averaged, lowest_gap, bound = gaps[t]
        assert -1e-9 <= lowest_gap <= bound
        assert -1e-9 <= averaged <= bound
        assert bound * math.sqrt(t) / math.log(t + 1) <= 1.05 * gaps[10][2] * math.sqrt(10) / math.log(11)
    assert gaps[10_000][0] < gaps[100][0] / 5
    assert gaps[10_000][1] <= gaps[10_000][0]


# -- ProxQuant flattens, ProxConnect grows ---------------------------------------------------------------------------


def test_proxquants_prox_flattens_with_the_step_while_proxconnects_grows() -> None:
    """Prox-SGD applies the prox of eta_t r, whose shift eta_t c goes to 0; ProxConnect that of mu_t r, mu_t growing."""
    table, c = torch.tensor([LEVELS], dtype=torch.float64), 0.02
    rows = torch.linspace(-1, 1, 201, dtype=torch.float64)[None]
    mu, moves = 1.0, []
    for t in range(200):
        eta = 1 / math.sqrt(t + 1)
        quant, connect = (
            (proximal(rows, table, Shifts(c * x, c * x, "weight")) - rows).abs().amax().item() for x in (eta, mu)
        )
        assert quant <= c * eta + 1e-12
        moves.append((quant, connect))
        mu += eta
    assert moves[-1][0] < moves[0][0] / 10
    assert all(after >= before - 1e-12 for (_, before), (_, after) in zip(moves, moves[1:], strict=False))  # noqa: RUF007
    hard = proximal(rows, table, Hard().shifts(1.0))
    assert moves[-1][1] == pytest.approx((hard - rows).abs().amax().item())
    schedule = Theory(end=0.9, first=0.1)
    assert [schedule.strength(0.0, m) for m in (1.0, 2.0, 9.0, 11.0)] == pytest.approx([0.1, 0.2, 0.9, 1.0])


# -- each special case of L -----------------------------------------------------------------------------------------

ROWS = torch.linspace(-1.5, 1.5, 193, dtype=torch.float64)[None]
HALF = torch.tensor([0.35, 0.3, 0.35], dtype=torch.float64)


def _nearest() -> Tensor:
    grid = Codebook(torch.tensor([LEVELS]))
    return grid.decode(grid.encode(ROWS.float())).double()


def _clipped() -> Tensor:
    return ROWS.clamp(-1, 1)


def _half() -> Tensor:
    """Half the width of the gap that each weight is in."""
    inner = torch.tensor(LEVELS, dtype=torch.float64)[1:-1]
    return HALF[torch.searchsorted(inner, _clipped())]


def _soft(lam: Tensor, weights: Tensor) -> Tensor:
    rest = weights - _nearest()
    return _nearest() + rest.sign() * (rest.abs() - lam).clamp(min=0)


def _ramp(s: float) -> Tensor:
    """PARQ: through the middle of each gap with slope 1/s, flat where that would leave the gap."""
    inner = torch.tensor(LEVELS, dtype=torch.float64)
    gap = torch.searchsorted(inner[1:-1], _clipped())
    middle = (inner[gap] + inner[gap + 1]) / 2
    return (middle + (ROWS - middle) / s).maximum(inner[gap]).minimum(inner[gap + 1])


@pytest.mark.parametrize(
    ("prox", "strength", "want"),
    [
        (L(), 0.0, _clipped),
        (L(1.0, 0.0), 1.0, _nearest),
        (L(0.0, 1.0), 1.0, _nearest),
        (L(), 0.4, lambda: _soft(0.4 * _half(), _clipped())),
        (ProxQuant(), 0.4, lambda: _soft(0.4 * _half(), ROWS)),
        (L(clip=False), 0.4, lambda: _soft(0.4 * _half(), ROWS)),
        (ProxQuant(relative=False), 0.4, lambda: _soft(torch.full_like(ROWS, 0.4 * 0.35), ROWS)),
        (ProxQuant(), 0.0, lambda: ROWS),
        (ProxQuant(), 1.0, _nearest),
        (BinaryRelax(), 0.75, lambda: (3 * _nearest() + ROWS) / (1 + 3)),
        (L(0.0, 1.0), 0.75, lambda: (3 * _nearest() + _clipped()) / (1 + 3)),
        (Parq(), 0.75, lambda: _ramp(0.25)),
        (L(1.0, 0.0), 0.75, lambda: _ramp(0.25)),
        (Hard(), 0.0, _nearest),
    ],
)
def test_each_special_case_of_l(prox: Prox, strength: float, want: object) -> None:
    """The table of METHOD.md section 2, each row from its own formula."""
    assert callable(want)
    got = proximal(ROWS, torch.tensor([LEVELS], dtype=torch.float64), prox.shifts(strength))
    torch.testing.assert_close(got, want(), rtol=0, atol=1e-6)
