"""The target that a layer's moments give, and how far it is pulled to the float weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pcq.calibrate import moments, oneshot
from pcq.calibrate.moments import PULLS, Sums, damped, influence, noise, pull, target
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


@pytest.mark.parametrize("centred", [True, False])
def test_batches_of_any_sizes_give_what_all_rows_at_once_do(centred: bool) -> None:
    weight, x_f, x_q = drawn(3, 90, 5, 0.5)
    sizes, sums = [40, 10, 10, 10, 20], Sums(weight, centred)
    for p_f, p_q in zip(x_f.split(sizes, 1), x_q.split(sizes, 1), strict=True):
        sums.add(p_f, p_q)
    found, y = sums.moments(), (x_f @ weight.transpose(1, 2))[0]
    f, q = (x[0] - x[0].mean(0) if centred else x[0] for x in (x_f, x_q))
    wanted = (x_q[0].mean(0), q.T @ q / 90, f.T @ q / 90, y.mean(0), y.var(0, correction=0))
    for got, want in zip((found.mean, found.cov, found.cross, found.y_mean, found.y_var), wanted, strict=True):
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)
    (first, _), _ = found.halves
    q = q if not centred else x_q[0, :40] - x_q[0, :40].mean(0)
    torch.testing.assert_close(first[0], q[:40].T @ q[:40] / 40, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mean", "cov", "cross", "y_mean", "y_var"])
def test_one_overflow_is_enough(name: str) -> None:
    found = summed(*drawn(0, 20, 3, 0.5), 1).moments()
    assert found.finite
    assert not replace(found, **{name: getattr(found, name) * torch.inf}).finite


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


def test_without_the_cross_moments_all_others_are_the_same() -> None:
    weight, x_f, x_q = drawn(5, 60, 4, 0.5)
    found = []
    for crossed in (True, False):
        sums = Sums(weight, centred=True, crossed=crossed)
        for p_f, p_q in zip(x_f.chunk(5, 1), x_q.chunk(5, 1), strict=True):
            sums.add(p_f, p_q)
        found.append(sums.moments())
    one, other = found
    for name in ("mean", "cov", "y_mean", "y_var"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert all(torch.equal(mine[0], theirs[0]) for mine, theirs in zip(one.halves, other.halves, strict=True))


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
    alone = torch.zeros(1, 5, 2)
    alone[0, 0] = 3  # a row among zeros is not made one of them
    assert torch.equal(influence(alone), torch.ones(1, 5, 1))


def test_bounded_moments_are_those_of_weighed_rows() -> None:
    weight, x_f, x_q = drawn(4, 70, 5, 0.5)
    sums = Sums(weight, centred=True, bounded=True)
    sums.add(x_f, x_q)
    found, y = sums.moments(), x_f @ weight.transpose(1, 2)
    share = influence(y)[0]
    f, q, y = (x[0] - (share * x[0]).sum(0) / share.sum() for x in (x_f, x_q, y))
    torch.testing.assert_close(found.mean[0], (share * x_q[0]).sum(0) / share.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cov[0], (share * q).T @ q / share.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cross[0], (share * f).T @ q / share.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.y_var[0], (share * y.square()).sum(0) / share.sum(), rtol=1e-4, atol=1e-4)


def test_the_pull_does_not_know_which_half_came_first() -> None:
    chosen = []
    for seed in range(12):
        weight, x_f, x_q = drawn(seed, 24, 16, 0.3)
        found = summed(weight, x_f, x_q, 2).moments()
        chosen.append(pull(weight, found))
        assert pull(weight, replace(found, halves=found.halves[::-1])) == chosen[-1]
    assert len(set(chosen)) > 1
    assert pull(weight, replace(found, halves=())) == PULLS[0]


def test_the_pull_is_that_of_a_twin_that_looks_at_the_samples() -> None:
    """Targets of half the samples tried on the other half, harder and harder until it is worse."""
    chosen = []
    for seed in range(30):
        weight, x_f, x_q = drawn(seed, (20, 40, 400)[seed % 3], 16, (0.05, 0.3, 2.0)[seed // 3 % 3])
        found = summed(weight, x_f, x_q, 2, centred=False).moments()
        halves = list(zip(x_f.double().chunk(2, 1), x_q.double().chunk(2, 1), strict=True))
        losses = []
        for part in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
            lost = 0.0
            for (cov, cross), (f, q) in zip(found.halves, halves[::-1], strict=True):
                aim = target(weight, cov, cross, part).double()
                lost += float((f @ weight.double().mT - q @ aim.mT).square().mean())
            losses.append(lost)
        rising = [i for i in range(6) if losses[i + 1] > losses[i]]
        chosen.append(pull(weight, found))
        assert chosen[-1] == (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)[rising[0] if rising else 6], seed
    assert len(set(chosen)) > 4


def test_the_noise_is_the_formula_and_no_more_than_what_there_is() -> None:
    cov, off = torch.diag(torch.tensor([1.0, 3.0]))[None], torch.diag(torch.tensor([0.5, 0.0]))[None]
    found = summed(*drawn(0, 20, 2, 0.5), 1).moments()
    assert noise(found) == 0

    def halved(apart: Tensor) -> float:
        return noise(replace(found, cov=cov, halves=((cov + apart, cov), (cov - apart, cov))))

    assert halved(off) == pytest.approx(1 / 7)  # rho = 1/4 of 1 over 2
    assert halved(100 * off) == 1


def test_what_nothing_enters_is_damped_by_ones() -> None:
    assert torch.equal(damped(torch.zeros(1, 2, 2), 0.5), torch.eye(2)[None] / 2)
