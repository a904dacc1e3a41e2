"""The target that a layer's moments give, and how far it is pulled to the float weights."""

import pytest
import torch
from torch import Tensor, nn

from pcq.calibrate import moments, oneshot
from pcq.calibrate.moments import PULLS, Sums, influence, noise, pull, target
from pcq.calibrate.oneshot import Settings, calibrate
from pcq.quantizers import Uniform
from pcq.rows import Rows


def drawn(seed: int, m: int, n: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """A weight ``[1, 3, n]``, and what enters it in the float and in the quantized network: ``[1, m, n]``."""
    g = torch.Generator().manual_seed(seed)
    x_f = torch.randn(1, m, n, generator=g) @ torch.randn(1, n, n, generator=g) / n**0.5 + 1
    mixed = torch.eye(n) + noise * torch.randn(1, n, n, generator=g) / n**0.5
    return torch.randn(1, 3, n, generator=g), x_f, x_f @ mixed + 0.1 * torch.randn(1, m, n, generator=g)


def summed(weight: Tensor, x_f: Tensor, x_q: Tensor, batches: int, centred: bool = True) -> Sums:
    sums = Sums(weight, centred)
    for p_f, p_q in zip(x_f.chunk(batches, 1), x_q.chunk(batches, 1), strict=True):
        sums.add(p_f, p_q)
    return sums


@pytest.mark.parametrize("part", PULLS)
@pytest.mark.parametrize("centred", [True, False])
def test_the_target_is_least_squares_with_rows_more(part: float, centred: bool) -> None:
    """Ridge regression about W is least squares with a row ``sqrt(pull d)`` for each weight, seen as data."""
    weight, x_f, x_q = drawn(0, 60, 7, 0.5)
    found = summed(weight, x_f, x_q, 5, centred).moments()
    f, q = (x[0].double() - (x[0].double().mean(0) if centred else 0.0) for x in (x_f, x_q))
    d = float(q.square().mean(0).mean()) * part
    more = (len(q) * d) ** 0.5 * torch.eye(7, dtype=torch.float64)
    w = weight[0].double()
    twin = torch.linalg.lstsq(torch.cat([q, more]), torch.cat([f @ w.T, more @ w.T])).solution.T
    torch.testing.assert_close(target(weight, found.cov, found.cross, part)[0].double(), twin, rtol=1e-3, atol=1e-4)


def test_the_halves_make_the_whole_and_are_different_batches() -> None:
    weight, x_f, x_q = drawn(1, 80, 5, 0.5)
    found = summed(weight, x_f, x_q, 4, centred=False).moments()
    assert len(found.halves) == 2
    for (cov, cross), batches in zip(found.halves, ((0, 2), (1, 3)), strict=True):
        f, q = (torch.cat([x.chunk(4, 1)[i] for i in batches], 1)[0] for x in (x_f, x_q))
        torch.testing.assert_close(cov[0], q.T @ q / len(q), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cross[0], f.T @ q / len(q), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((found.halves[0][0] + found.halves[1][0]) / 2, found.cov, rtol=1e-4, atol=1e-4)
    assert summed(weight, x_f, x_q, 1).moments().halves == ()


@pytest.mark.parametrize("crossed", [True, False])
def test_rows_that_count_alike_need_no_weighing(crossed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit what weighing them by ones gives."""
    weight, x_f, x_q = drawn(2, 90, 6, 0.5)
    monkeypatch.setattr(moments, "influence", lambda y: torch.ones_like(y[..., :1]))
    plain, weighed = (Sums(weight, False, bounded, crossed) for bounded in (False, True))
    for sums in (plain, weighed):
        for p_f, p_q in zip(x_f.chunk(4, 1), x_q.chunk(4, 1), strict=True):
            sums.add(p_f, p_q)
    for one, other in zip(plain.halves, weighed.halves, strict=True):
        assert one.count == other.count
        for name in ("q", "f", "y", "qq", "fq", "yy"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_channel_that_is_constant_leaves_no_rounding_errors() -> None:
    """Dead in every batch but the first, at 1e4: its variance in the other half is nothing, not a negative number."""
    weight, x_f, x_q = drawn(3, 60, 5, 0.5)
    x_q[:, :, 2] = 0
    x_q[:, :15, 2] = 1e4 + torch.rand(15)
    found = summed(weight, x_f, x_q, 4).moments()
    assert float(found.halves[1][0][0, 2].abs().max()) == 0
    for cov, cross in (*found.halves, (found.cov, found.cross)):
        assert bool(torch.linalg.eigvalsh(cov.double()).min() > -1e-6 * cov.max())
        assert bool(torch.isfinite(target(weight, cov, cross, PULLS[0])).all())


def test_few_samples_pull_harder_and_lose_less_on_others() -> None:
    """On fresh samples the chosen pull is about as good as the least one, and far better where samples are few."""

    def lost(part: float, weight: Tensor, found: Sums, fresh: tuple[Tensor, Tensor]) -> float:
        moments = found.moments()
        aim = target(weight, moments.cov, moments.cross, part)
        x_f, x_q = (x - x.mean(1, keepdim=True) for x in fresh)
        return float((x_f @ weight.transpose(1, 2) - x_q @ aim.transpose(1, 2)).square().mean())

    chosen = {}
    for m in (44, 40_000):
        weight, x_f, x_q = drawn(2, m + 4000, 40, 0.1)
        sums = summed(weight, x_f[:, :m], x_q[:, :m], 4)
        chosen[m] = pull(weight, sums.moments())
        fresh = x_f[:, m:], x_q[:, m:]
        ratio = lost(chosen[m], weight, sums, fresh) / lost(PULLS[0], weight, sums, fresh)
        assert ratio < (0.8 if m == 44 else 1.0001), ratio
    assert chosen[44] > chosen[40_000] == PULLS[0], chosen


@pytest.mark.parametrize("m", [64, 400, 40_000])
def test_the_noise_of_a_covariance_is_about_the_best_damping(m: int) -> None:
    """Of 16 draws: what is added brings the covariance nearer to the true one, and nearly as near as can be."""
    n, losses = 30, torch.zeros(3)
    mix = torch.randn(n, n, generator=torch.Generator().manual_seed(5)) / n**0.5
    true = mix.T @ mix
    for seed in range(16):
        x = torch.randn(1, m, n, generator=torch.Generator().manual_seed(seed)) @ mix
        found = summed(torch.randn(1, 2, n), x, x, 4).moments()
        cov, flat = found.cov[0], found.cov[0].diagonal().mean() * torch.eye(n)
        chosen = noise(found)
        parts = [0.0, chosen / (1 + chosen), *torch.linspace(0, 1, 51).tolist()]
        apart = torch.stack([((1 - rho) * cov + rho * flat - true).square().sum() for rho in parts])
        losses += torch.stack([apart[0], apart[1], apart[2:].min()])
    none, ours, best = losses.tolist()
    assert ours < 1.1 * best
    assert ours < (0.75 if m == 64 else 1.001) * none


def test_a_mean_that_nothing_takes_up_is_in_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Linear without bias and BatchNorm: an error of the mean would stay, so it counts."""
    torch.manual_seed(0)
    x, net = torch.rand(512, 24) + 2, nn.Sequential(nn.Linear(24, 16, bias=False)).eval()

    def apart() -> Tensor:
        found = calibrate(net, {"0.weight": (Rows((16, 24)), Uniform(2))}, (x,), Settings(method="gptq"))
        now = {"0.weight": found.quantized["0.weight"].dequantize()}
        with torch.no_grad():
            return torch.func.functional_call(net, now, (x,)) - net(x)

    ours = apart()
    monkeypatch.setattr(oneshot, "centred", lambda *_: True)
    assert float(ours.square().mean()) < 0.1 * float(apart().square().mean())


def test_a_few_tokens_far_out_do_not_have_the_layer_to_themselves() -> None:
    """Of 400 tokens 6 are a hundred times as large: the others keep what they would lose to them."""
    torch.manual_seed(0)
    x = torch.randn(1, 400, 24)
    x[0, :6] *= 100 * torch.rand(24).round()
    net = nn.Sequential(nn.Linear(24, 16)).eval()
    plan = {"0.weight": (Rows((16, 24)), Uniform(3))}

    def relative(tokens: Tensor) -> float:
        """The mean of the others' errors, each over its own output."""
        found = calibrate(net, plan, (tokens.expand(4, -1, -1),), Settings(method="gptq", batch=2))
        now = {"0.weight": found.quantized["0.weight"].dequantize(), **found.changed}
        with torch.no_grad():
            y = net(x)[0, 6:]
            off = torch.func.functional_call(net, now, (x,))[0, 6:] - y
        return float((off.square().sum(1) / y.square().sum(1)).mean())

    assert relative(x) < 1.25 * relative(x[:, 6:])


def test_the_influence_of_a_row_ends_at_the_median() -> None:
    y = torch.randn(2, 31, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(31.0)[:, None]
    energy = y.square().sum(2)
    share = influence(y)[..., 0]
    median = energy.median(1, keepdim=True).values
    assert torch.equal(share[energy <= median], torch.ones(2 * 16))
    torch.testing.assert_close((share * energy)[energy > median], median.expand(2, 15).flatten())
    assert torch.equal(influence(torch.zeros(1, 3, 2)), torch.ones(1, 3, 1))
