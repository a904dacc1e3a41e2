"""Two hooks on any optimizer: equal to explicit loops, deterministic, convergent, and each method what it says."""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcq import qtensor
from pcq.errors import CheckFailed, PcqError
from pcq.grids import Affine, Codebook, Grid
from pcq.methods import METHODS, Inside, Method, SignSwish
from pcq.prox import BinaryRelax, Hard, L, Parq, ProxQuant, Shifts, proximal
from pcq.proxconnect import ProxConnect, Target, targets
from pcq.proxconnect.state import grid_from, grid_state
from pcq.quantizers import AdditivePowersOfTwo, Binary, Fixed, KMeans, LeastSquaresBinary, Quantizer, Ternary, Uniform
from pcq.refit import refit_weight
from pcq.rows import Rows
from pcq.schedules import Linear, MirroredSigmoid, Schedule, Theory

STEPS = 24
TERNARY = Ternary("mse")
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sgd-momentum foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=True),
    "sgd-momentum fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5),
    "rmsprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.005, foreach=True),
    "muon": lambda p: torch.optim.Muon(p, lr=0.02),
    "schedule-free adamw": lambda p: schedule_free("AdamWScheduleFree", p, lr=0.01, warmup_steps=3),
    "schedule-free sgd": lambda p: schedule_free("SGDScheduleFree", p, lr=0.5, foreach=False),
    "schedule-free radam": lambda p: schedule_free("RAdamScheduleFree", p, lr=0.01),
}


def schedule_free(kind: str, parameters: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    optimizer = getattr(pytest.importorskip("schedulefree"), kind)(parameters, **options)
    optimizer.train()
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5, bias=False))


def weights(model: nn.Module, quantizer: Quantizer = TERNARY) -> dict[str, Target]:
    return {name: Target(p, Rows(tuple(p.shape), 0), quantizer) for name, p in model.named_parameters() if p.ndim >= 2}


def matrix(model: nn.Module, layer: int = 0) -> nn.Parameter:
    weight = model.get_submodule(str(layer)).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def backward(model: nn.Module, step: int) -> Tensor:
    batch = slice(16 * (step % 4), 16 * (step % 4) + 16)
    loss = F.mse_loss(model(X[batch]), Y[batch])
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = STEPS) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def reference(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: Method, schedule: Schedule, refit: int | None
) -> dict[str, Tensor]:
    """What the hooks are to do, said once more and explicitly."""
    params, mu = dict(model.named_parameters()), 1.0
    rows: dict[str, Rows] = {}
    grids: dict[str, Grid] = {}
    latent: dict[str, Tensor] = {}
    weight: dict[str, Tensor] = {}

    def prox(name: str, strength: float) -> Tensor:
        split = rows[name].split(latent[name])
        if isinstance(method.prox, SignSwish) and strength < 1:
            return rows[name].merge(method.prox.value(split, grids[name].levels()))
        family = Hard() if isinstance(method.prox, SignSwish) else method.prox
        return rows[name].merge(proximal(split, grids[name], family.shifts(strength)))

    for name, p in params.items():
        rows[name], latent[name], weight[name] = Rows(tuple(p.shape), 0), p.data.clone(), p.data.clone()
        grids[name] = qtensor.fit(TERNARY, p, rows[name])
        if method.updates == "latent" or method.gradient_at == "latent":
            weight[name] = prox(name, schedule.strength(0.0, 1.0))
    for step in range(STEPS):
        for name, p in params.items():
            p.data = (weight if method.gradient_at == "weight" else latent)[name].clone()
        optimizer.zero_grad()
        backward(model, step)
        for name, p in params.items():
            if method.backward is not None:
                assert p.grad is not None
                p.grad *= method.backward.slope(latent[name], grids[name].levels())
            p.data = (weight if method.updates == "weight" else latent)[name].clone()
        optimizer.step()
        mu += float(optimizer.param_groups[0]["lr"])
        for name, p in params.items():
            latent[name] = p.data.clone()
            if refit and (step + 1) % refit == 0:
                grids[name] = refit_weight(TERNARY, latent[name], grids[name], rows[name])
            weight[name] = prox(name, schedule.strength((step + 1) / STEPS, mu))
    return weight


# -- the quartet: equal to a reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["proxconnect", "proxquant", "reverse"])
@pytest.mark.parametrize("swapped", [True, False])
def test_bit_equal_to_the_explicit_loop_on_every_optimizer(
    kind: str, name: str, swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcq.proxconnect.weights.swaps", lambda _: swapped)
    model, other = network(), network()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), METHODS[name], Linear(), steps=STEPS, refit=5)
    train(model, optimizer)
    prox.finish()
    want = reference(other, OPTIMIZERS[kind](list(other.parameters())), METHODS[name], Linear(), 5)
    for key, p in model.named_parameters():
        assert torch.equal(p.data, want[key])


@pytest.mark.parametrize("name", [name for name in METHODS if name != "posttraining"])
@pytest.mark.parametrize("schedule", [MirroredSigmoid(0.1, 0.8), Theory(0.8, 0.1)])
@pytest.mark.parametrize("refit", [None, 1, 7])
def test_bit_equal_to_the_explicit_loop_for_every_method(name: str, schedule: Schedule, refit: int | None) -> None:
    model, other = network(), network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), METHODS[name], schedule, steps=STEPS, refit=refit)
    train(model, optimizer)
    prox.finish()
    want = reference(other, OPTIMIZERS["adamw"](list(other.parameters())), METHODS[name], schedule, refit)
    for key, p in model.named_parameters():
        assert torch.equal(p.data, want[key])


# -- deterministic, convergent ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_are_the_same_run(name: str) -> None:
    ends = []
    for _ in range(2):
        model = network()
        optimizer = OPTIMIZERS["sgd-momentum"](list(model.parameters()))
        prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)
        train(model, optimizer)
        prox.finish()
        ends.append([p.data.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "posttraining"])
def test_finds_a_quantized_teacher_that_rounding_does_not(name: str) -> None:
    """Data from a linear map with ternary weights, a start far from it: each method ends near zero loss.

    With binary weights for BNN+ and BNN++, whose factor is nearly 0 at the levels, so weights that start there stay.
    """
    binary = name in ("bnn+", "bnn++")
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randint(-1, 2, (6, 10), generator=generator).float()
    teacher = torch.where(teacher == 0, 1.0, teacher) if binary else teacher
    inputs = torch.randn(256, 10, generator=generator)
    model = nn.Linear(10, 6, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(6, 10, generator=generator) * (0.1 if binary else 0.3))
    quantizer = Fixed((-1.0, 1.0) if binary else (-1.0, 0.0, 1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 if binary else 0.5)

    def loss() -> Tensor:
        return F.mse_loss(model(inputs), inputs @ teacher.T)

    start = qtensor.quantize(quantizer, model.weight, Rows((6, 10), 0)).dequantize()
    rounded = F.mse_loss(inputs @ start.T, inputs @ teacher.T)
    prox = ProxConnect(optimizer, weights(model, quantizer), METHODS[name], steps=400)
    for _ in range(400):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    prox.finish()
    assert loss().item() < 0.02 * rounded.item()


# -- the characteristic property of each method ----------------------------------------------------------------------


def one_step(name: str, **changes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Grid]:
    """One SGD step with the gradient sin(held): start, held before, latent after, held after, grid."""
    start = torch.linspace(-1.4, 1.4, 12).reshape(2, 6)
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    quantizer = Fixed((-1.0, -0.3, 0.3, 1.0))
    method = replace(METHODS[name], **changes)
    schedule = Linear(0.0, 0.9, first=0.4)
    prox = ProxConnect(
        optimizer, {"w": Target(parameter, Rows((2, 6), 0), quantizer)}, method, schedule, steps=10, refit=None
    )
    held = parameter.data.clone()
    parameter.grad = held.sin()
    optimizer.step()
    return start, held, prox.state_dict()["weights"]["w"]["latent"], parameter.data, quantizer.fit(start)


def mapped(value: Tensor, grid: Grid, prox: Any, step: int = 1) -> Tensor:
    return proximal(value, grid, prox.shifts(Linear(0.0, 0.9, first=0.4).strength(step / 10, 1.0)))


@pytest.mark.parametrize("name", ["proxconnect", "binaryconnect", "binaryrelax", "parq", "bnn"])
def test_proxconnect_accumulates_in_the_latent_the_gradient_at_the_weight(name: str) -> None:
    start, held, latent, after, grid = one_step(name, backward=None)
    assert torch.equal(held, mapped(start, grid, METHODS[name].prox, 0))
    assert torch.equal(latent, start.add(held.sin(), alpha=-0.3))
    assert torch.equal(after, mapped(latent, grid, METHODS[name].prox))


def test_proxquant_steps_from_the_weight_and_keeps_no_latent() -> None:
    start, held, latent, after, grid = one_step("proxquant")
    assert torch.equal(held, start)
    assert torch.equal(after, mapped(start.add(held.sin(), alpha=-0.3), grid, ProxQuant()))
    assert torch.equal(latent, after)


def test_reverse_takes_the_gradient_at_the_latent_and_steps_from_the_weight() -> None:
    start, held, latent, after, grid = one_step("reverse")
    assert torch.equal(held, start)
    assert torch.equal(latent, mapped(start, grid, L(clip=False), 0).add(held.sin(), alpha=-0.3))
    assert torch.equal(after, latent)


@pytest.mark.parametrize("name", ["proxquant", "reverse"])
def test_levels_refitted_to_weights_that_lie_on_them_stay(name: str) -> None:
    """Without a latent the mean magnitude would shrink with the levels that it gives, refit by refit, down to 0."""
    on_levels = torch.tensor([[0.5, 0.0, -0.5, 0.0, 0.5, 0.0]])
    parameter = nn.Parameter(on_levels.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    target = Target(parameter, Rows((1, 6), 0), Ternary())
    prox = ProxConnect(optimizer, {"w": target}, METHODS[name], steps=50, refit=5)
    parameter.grad = torch.zeros_like(on_levels)
    for _ in range(50):
        optimizer.step()
    torch.testing.assert_close(prox.finish()["w"].dequantize(), on_levels)


@pytest.mark.parametrize("quantizer", [Ternary("mean"), Uniform(2, scale="mean"), Uniform(4, False, "mean")], ids=str)
@pytest.mark.parametrize("name", ["proxquant", "reverse"])
def test_levels_by_the_mean_magnitude_stay_where_there_are_no_latents(name: str, quantizer: Quantizer) -> None:
    """Refitted to weights on them they ended at 0, or many times too large."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    prox = ProxConnect(
        optimizer, {"w": Target(parameter, Rows((4, 32), 0), quantizer)}, METHODS[name], steps=200, refit=5
    )
    parameter.grad = torch.zeros_like(weight)
    for _ in range(200):
        optimizer.step()
    assert torch.equal(prox.finish()["w"].grid.levels(), quantizer.fit(weight).levels())


def test_posttraining_trains_as_if_there_were_no_levels_and_rounds_once() -> None:
    model, other = network(), network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), METHODS["posttraining"], steps=STEPS)
    train(model, optimizer)
    train(other, OPTIMIZERS["adamw"](list(other.parameters())))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    done = prox.finish()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        want = qtensor.quantize(Ternary(), q, Rows(tuple(q.shape), 0))
        assert torch.equal(done[name].codes, want.codes)
        assert torch.equal(p.data, want.dequantize())


def test_ternary_levels_that_the_recipe_leaves_open_follow_the_mean_magnitude_in_training_only() -> None:
    """So they move smoothly with the weights; known ones to start from, and weights at rest, keep to least squares."""

    def trained(quantizer: Quantizer, method: str = "binaryconnect", start: bool = False) -> tuple[Tensor, Tensor]:
        model = network()
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        rows = Rows((8, 6))
        grid = qtensor.fit(Ternary("mse"), matrix(model).detach(), rows) if start else None
        target = Target(matrix(model), rows, quantizer, grid)
        prox = ProxConnect(optimizer, {"w": target}, METHODS[method], steps=STEPS, refit=4)
        train(model, optimizer)
        latent = prox.state_dict()["weights"]["w"]["latent"].clone()
        return prox.finish()["w"].grid.levels(), qtensor.fit(Ternary("mean"), latent, rows).levels()

    assert STEPS % 4 == 0
    assert torch.equal(*trained(Ternary()))
    for other in (trained(Ternary("mse")), trained(Ternary(), start=True), trained(Ternary(), "posttraining")):
        assert not torch.isclose(*other).all(1).any()
    assert torch.equal(trained(Ternary(), start=True)[0], trained(Ternary("mse"), start=True)[0])


def test_bnn_stops_gradients_of_latents_outside_of_the_levels() -> None:
    start, held, latent, _, _ = one_step("bnn")
    outside = start.abs() > 1
    assert bool(outside.any())
    assert torch.equal(latent[outside], start[outside])
    assert torch.equal(latent[~outside], start.add(held.sin(), alpha=-0.3)[~outside])


@pytest.mark.parametrize("levels", [[-1.0, 1.0], [-0.25, 0.25], [-1.0, -0.3, 0.3, 1.0], [0.0, 0.0, 1.0]])
def test_sign_swish_and_its_slope(levels: list[float]) -> None:
    """SS(x) = 2 sig(5x)(1 + 5x(1 - sig(5x))) - 1, scaled to each gap; the slope is its derivative."""
    table = torch.tensor([levels], dtype=torch.float64)
    rows = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)[None].requires_grad_()
    value = SignSwish(5.0).value(rows, table)
    (slope,) = torch.autograd.grad(value.sum(), rows)
    torch.testing.assert_close(SignSwish(5.0).slope(rows, table).detach(), slope, rtol=1e-12, atol=1e-12)
    if len(levels) == 2:
        x = 5 * rows / levels[1]
        want = levels[1] * (2 * torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))) - 1)
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)


def test_the_methods_are_those_of_the_papers() -> None:
    smooth = SignSwish(5.0)
    assert {
        "binaryconnect": Method("weight", "latent", Hard()),  # arXiv 1511.00363
        "proxconnect": Method("weight", "latent", L(1.0, 1.0, clip=True)),  # arXiv 2110.13220
        "reverse": Method("latent", "weight", L(1.0, 1.0, clip=False)),  # the same
        "proxquant": Method("weight", "weight", ProxQuant()),  # arXiv 1810.00861
        "binaryrelax": Method("weight", "latent", BinaryRelax()),  # arXiv 1801.06313
        "parq": Method("weight", "latent", Parq()),  # arXiv 2503.15748
        "bnn": Method("weight", "latent", Hard(), Inside()),  # arXiv 2402.17710, down to bnn++
        "bnn+": Method("weight", "latent", Hard(), smooth),
        "bnn++": Method("weight", "latent", smooth, smooth),
        "posttraining": Method("latent", "latent", Hard()),
    } == METHODS
    assert [name for name, method in METHODS.items() if method.posttraining] == ["posttraining"]


def test_inside_is_one_on_the_levels_and_between() -> None:
    rows = torch.tensor([[-1.1, -1.0, 0.0, 1.0, 1.1]])
    assert Inside().slope(rows, torch.tensor([[-1.0, 1.0]])).tolist() == [[0, 1, 1, 1, 0]]


def test_hard_proxconnect_is_the_straight_through_estimator() -> None:
    """BinaryConnect's update equals plain SGD on the latent of a layer that rounds with identity backward."""
    model = network()
    quantizer = Fixed((-0.3, 0.3))
    latents = [p.data.clone().requires_grad_() for p in model.parameters()]
    optimizer, other = (torch.optim.SGD(p, lr=0.05, momentum=0.9) for p in (list(model.parameters()), latents))
    prox = ProxConnect(optimizer, weights(model, quantizer), METHODS["binaryconnect"], steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        other.zero_grad()
        batch = slice(16 * (step % 4), 16 * (step % 4) + 16)
        first, second = (w + ((torch.where(w > 0, 0.3, -0.3)) - w).detach() for w in latents)
        F.mse_loss((X[batch] @ first.T).tanh() @ second.T, Y[batch]).backward()
        for p, latent in zip(model.parameters(), latents, strict=True):
            torch.testing.assert_close(p.grad, latent.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        other.step()
    for saved, latent in zip(prox.state_dict()["weights"].values(), latents, strict=True):
        torch.testing.assert_close(saved["latent"], latent.detach(), rtol=1e-4, atol=1e-5)


# -- everything around an optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["proxconnect", "proxquant", "reverse", "bnn"])
def test_a_step_that_grad_scaler_skips_leaves_nothing_changed(fused: bool, name: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
    prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS, refit=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(10):
        optimizer.zero_grad()
        backward(model, step)
        before = copy.deepcopy((prox.state_dict(), model.state_dict()))
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(scaler.get_scale())
            if step % 3 == 2:
                p.grad[0, 0] = torch.inf
        scaler.scale(torch.ones(()))  # starts the scaler
        scaler.step(optimizer)
        scaler.update()
        if step % 3 == 2:
            same(before, (prox.state_dict(), model.state_dict()))
    assert prox.step == 7


def same(a: Any, b: Any) -> None:
    """Equal to the bit, all the way down."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


def test_grad_scaler_with_a_power_of_two_changes_no_bit() -> None:
    ends = []
    for scaled in (False, True):
        model = network()
        optimizer = OPTIMIZERS["sgd-momentum"](list(model.parameters()))
        prox = ProxConnect(optimizer, weights(model), METHODS["parq"], steps=STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(F.mse_loss(model(X), Y)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert prox.step == step + 1
        ends.append([p.data.clone() for p in model.parameters()])
    same(*ends)


def test_mu_sums_the_rates_of_an_optimizer_that_was_loaded_anew_too() -> None:
    model = network()
    first, second = ([p] for p in model.parameters())
    optimizer = torch.optim.SGD([{"params": first, "lr": 0.5}, {"params": second, "lr": 0.25}])
    hooked = ProxConnect(optimizer, weights(model), METHODS["proxconnect"], steps=STEPS)
    train(model, optimizer, stop=1)
    state = optimizer.state_dict()
    state["param_groups"][1]["lr"] = 2.0
    optimizer.load_state_dict(state)
    train(model, optimizer, stop=1)
    optimizer.param_groups[0]["lr"] = 1.0
    train(model, optimizer, stop=1)
    assert [weight["mu"] for weight in hooked.state_dict()["weights"].values()] == [1 + 0.5 + 0.5 + 1, 1 + 0.25 + 2 + 2]


class Relative(torch.optim.SGD):
    """Makes up its own learning rate, as Adafactor of transformers does."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad, alpha=0.1)


def test_an_optimizer_without_a_learning_rate_trains_by_any_schedule_but_that_of_the_rates() -> None:
    model = network()
    optimizer = Relative(list(model.parameters()))
    with pytest.raises(PcqError, match="the optimizer has no learning rate"):
        ProxConnect(optimizer, weights(model), METHODS["proxconnect"], Theory(), steps=STEPS)
    prox = ProxConnect(optimizer, weights(model), METHODS["proxconnect"], steps=STEPS)
    train(model, optimizer)
    prox.finish()


def test_accumulation_clipping_scheduler_and_autocast_around_an_attached_optimizer() -> None:
    def run(attach: bool) -> list[Tensor]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=STEPS)
        if attach:
            method = replace(METHODS["proxconnect"], prox=L())
            ProxConnect(optimizer, weights(model), method, Constant(0.0), steps=STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for part in range(4):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.mse_loss(model(X[16 * part : 16 * part + 16]).float(), Y[16 * part : 16 * part + 16])
                (loss / 4).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
        return [p.data for p in model.parameters()]

    # With a prox that changes nothing, nothing about training changes: same bits as without.
    same(run(attach=False), run(attach=True))


@dataclass(frozen=True)
class Constant:
    """A schedule that never hardens: strength 0 on wide levels is no prox at all."""

    value: float
    end: float = 1.0

    def strength(self, progress: float, mu: float) -> float:
        return self.value


@pytest.fixture(autouse=True)
def _wide_levels_for_constant(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "accumulation" in request.node.name:
        monkeypatch.setattr(L, "shifts", lambda self, strength: Shifts(0.0, 0.0, outside=1.0))


def test_other_parameters_and_other_optimizers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    first = torch.optim.Muon([matrix(model)], lr=0.02)
    second = torch.optim.AdamW([p for p in model.parameters() if p is not matrix(model)], lr=0.01)
    chosen = weights(model)
    one = ProxConnect(first, {"0.weight": chosen["0.weight"]}, steps=STEPS)
    two = ProxConnect(second, {"2.weight": chosen["2.weight"]}, METHODS["parq"], steps=STEPS)
    for step in range(STEPS):
        first.zero_grad()
        second.zero_grad()
        backward(model, step)
        first.step()
        second.step()
    assert one.finish().keys() | two.finish().keys() == {"0.weight", "2.weight"}
    assert len(model.get_parameter("2.bias").data.unique()) == 5


QUANTIZERS = [
    Binary(),
    Ternary(),
    LeastSquaresBinary(2),
    Uniform(2),
    Uniform(3, symmetric=False),
    KMeans(5),
    AdditivePowersOfTwo(3),
    Fixed((-1.0, -0.3, 0.3, 1.0)),
    Fixed("nf4", "mse"),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("layout", ["channel", "tensor", "group", "transposed", "channels last"])
def test_every_quantizer_and_layout_ends_on_its_levels(quantizer: Quantizer, layout: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = nn.Conv2d(4, 6, 3, bias=False)
        if layout == "transposed":
            model = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
        inputs = torch.randn(8, 4, 6, 6)
    weight = model.weight
    assert isinstance(weight, Tensor)
    if layout == "channels last":
        weight.data = weight.data.to(memory_format=torch.channels_last)
    shape = tuple(weight.shape)
    rows = {
        "tensor": Rows(shape, None),
        "group": Rows(shape, 0, group=16),
        "transposed": Rows(shape, 1 if layout == "transposed" else 0, blocks=2 if layout == "transposed" else 1),
    }.get(layout, Rows(shape, 0))
    if layout == "group" and isinstance(quantizer, Fixed) and quantizer.scale == "none":
        rows = Rows(shape, 0)  # one table for all rows has no groups of its own
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    prox = ProxConnect(optimizer, {"weight": Target(weight, rows, quantizer)}, METHODS["parq"], steps=20, refit=3)
    for _ in range(20):
        optimizer.zero_grad()
        model(inputs).square().sub(1).square().mean().backward()
        optimizer.step()
    done = prox.finish()["weight"]
    assert torch.equal(done.dequantize(), weight.data)
    if layout == "channels last":
        assert weight.is_contiguous(memory_format=torch.channels_last)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_closure_is_refused_before_anything_moves() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd-momentum"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), steps=STEPS)
    before = copy.deepcopy((prox.state_dict(), model.state_dict()))
    with pytest.raises(PcqError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(PcqError, match="closure"):
        optimizer.step(closure=lambda: 0.0)
    same(before, (prox.state_dict(), model.state_dict()))
    optimizer.step(None)
    assert prox.step == 1


@pytest.mark.parametrize("name", METHODS)
def test_what_takes_the_weights_of_training_is_refused_within_quantized(name: str) -> None:
    """A step was lost; ProxQuant's saved state had the rounded weights; what finish() rounded was float after it."""
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)
    train(model, optimizer, 0, 2)
    before = copy.deepcopy((prox.state_dict(), model.state_dict(), optimizer.state_dict()))
    with prox.quantized():
        with prox.quantized():
            pass
        for asked in (
            lambda: train(model, optimizer, 2, 3),
            prox.state_dict,
            prox.telemetry,
            prox.harden,
            prox.finish,
            lambda: prox.load_state_dict(before[0]),
            lambda: copy.deepcopy((model, optimizer, prox)),
        ):
            with pytest.raises(PcqError, match=r"(\(\)|a copy|step) within quantized\(\), .* Do it outside of it"):
                asked()
    same(before, (prox.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2, 3)
    assert prox.step == 3


@pytest.mark.parametrize("name", ["proxconnect", "reverse", "proxquant"])
def test_a_schedule_free_optimizer_is_refused_while_it_shows_averages(name: str) -> None:
    """Its eval mode puts averages in the parameters' place; its train mode takes them back, and all goes on."""
    model, other = network(), network()
    optimizer, plain = (OPTIMIZERS["schedule-free adamw"](list(net.parameters())) for net in (model, other))
    prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)
    straight = ProxConnect(plain, weights(other), METHODS[name], steps=STEPS)
    train(model, optimizer, 0, 10)
    optimizer.eval()  # type: ignore[attr-defined]
    for ask in (prox.finish, prox.state_dict, lambda: prox.quantized().__enter__()):
        with pytest.raises(PcqError, match=r"in its eval mode.*averages.*train\(\) first"):
            ask()
    prox.detach()
    with pytest.raises(PcqError, match="in its eval mode"):
        ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)
    optimizer.train()  # type: ignore[attr-defined]
    train(other, plain, 0, 10)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p, dict(other.named_parameters())[key], rtol=0, atol=1e-6)
    straight.detach()


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    model = network()
    with pytest.raises(PcqError, match=r"LBFGS is not taken: its step needs a closure.*such as SGD, AdamW, Muon"):
        ProxConnect(torch.optim.LBFGS(model.parameters()), weights(model), steps=3)


def test_a_wrapper_without_hooks_is_refused() -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper: Any = type("Wrapper", (), {"optimizer": inner, "param_groups": inner.param_groups})()
    with pytest.raises(PcqError, match=r"a Wrapper has no step hooks.*Attach to the optimizer in it"):
        ProxConnect(wrapper, weights(model), METHODS["proxconnect"], steps=3)
    accelerate = pytest.importorskip("accelerate")
    accelerated = accelerate.Accelerator(cpu=True).prepare(inner)
    with pytest.raises(PcqError, match=r"a AcceleratedOptimizer has no step hooks.*Attach to the optimizer in it"):
        ProxConnect(accelerated, weights(model), METHODS["proxconnect"], steps=3)
    ProxConnect(accelerated.optimizer, weights(model), METHODS["proxconnect"], steps=3).detach()


def test_a_second_attachment_is_refused_until_the_first_is_off() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    first = ProxConnect(optimizer, weights(model), steps=STEPS)
    with pytest.raises(PcqError, match="attached already"):
        ProxConnect(optimizer, weights(model), steps=STEPS)
    first.detach()
    ProxConnect(optimizer, weights(model), steps=STEPS).detach()
    before = [p.data.clone() for p in model.parameters()]
    train(model, optimizer, 0, 1)
    assert all(len(p.data.unique()) > 30 for p in model.parameters())
    assert not any(torch.equal(p.data, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_parameter_of_two_optimizers_gets_one_prox_connect() -> None:
    """The second mapped what the first had mapped."""
    model = network()
    one, other = (OPTIMIZERS["adamw"](list(model.parameters())) for _ in range(2))
    first = ProxConnect(one, {"a": weights(model)["0.weight"]}, steps=STEPS)
    with pytest.raises(
        PcqError, match=r"0\.weight: has a ProxConnect already, by another optimizer.*detach\(\)"
    ) as told:
        ProxConnect(other, weights(model), steps=STEPS)
    assert "2.weight" not in str(told.value)
    ProxConnect(other, {"b": weights(model)["2.weight"]}, steps=STEPS).detach()
    first.detach()
    ProxConnect(other, weights(model), steps=STEPS).detach()


def test_a_prox_connect_that_is_gone_holds_no_parameter() -> None:
    model = network()
    for _ in range(3):  # each holds itself by its optimizer's hooks
        ProxConnect(OPTIMIZERS["adamw"](list(model.parameters())), weights(model), steps=STEPS)


def test_all_that_is_wrong_with_the_weights_is_said_at_once() -> None:
    good, half, nan, foreign = (nn.Parameter(torch.ones(2, 2)) for _ in range(4))
    half.data = half.data.to(torch.bfloat16)
    nan.data[0, 0] = torch.nan
    optimizer = torch.optim.SGD([good, half, nan], lr=0.1)
    rows = Rows((2, 2), 0)
    named = {"good": good, "half": half, "nan": nan, "foreign": foreign, "again": good}
    with pytest.raises(PcqError) as raised:
        ProxConnect(optimizer, {n: Target(p, rows, Binary()) for n, p in named.items()}, steps=0, refit=0)
    text = str(raised.value)
    for words in (
        "half: is bfloat16",
        "torch.autocast",
        "nan: has infinite or NaN",
        "foreign: is not one of the optimizer's",
        "again: is the same parameter as good",
        "steps is 0",
        "refit is 0",
    ):
        assert words in text
    assert "good: " not in text
    with pytest.raises(PcqError, match="no weights"):
        ProxConnect(optimizer, {}, steps=1)


# -- ending -----------------------------------------------------------------------------------------------------------


def test_finish_before_the_hard_phase_is_refused_and_harden_rounds() -> None:
    for name in ("proxconnect", "proxquant", "reverse", "binaryrelax"):
        model = network()
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)
        train(model, optimizer, 0, 10)
        with pytest.raises(CheckFailed, match="step 10 of 24, before its hard phase"):
            prox.finish()
        prox.harden()
        done = prox.finish()
        for key, p in model.named_parameters():
            assert torch.equal(done[key].dequantize(), p.data)
            assert all(len(row.unique()) <= 3 for row in p.data)


def test_finish_finds_weights_that_were_moved_off_their_levels() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), steps=STEPS)
    train(model, optimizer)
    with torch.no_grad():
        matrix(model)[0, :2] += 1e-4
    with pytest.raises(CheckFailed, match=r"0\.weight: 2 of 48 weights are not on their levels"):
        prox.finish()


def test_finish_says_that_the_training_has_diverged() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), METHODS["proxconnect"], steps=1)
    (model(X).sum() * float("nan")).backward()
    optimizer.step()
    with pytest.raises(PcqError, match="0.weight: has infinite or NaN weights. Training has diverged"):
        prox.finish()


def test_a_method_by_its_name_is_refused() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    with pytest.raises(PcqError, match=r"the method is a str\. Allowed: a pcq\.methods\.Method"):
        ProxConnect(optimizer, weights(model), "parq", steps=STEPS)  # type: ignore[arg-type]


def test_weights_are_on_their_levels_all_through_the_hard_phase() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd-momentum"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), METHODS["parq"], Linear(0.0, 0.5), steps=STEPS, refit=2)
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        seen = prox.telemetry()
        assert seen.step == step + 1
        assert (seen.on_levels == 1) == (step + 1 >= STEPS / 2)
        assert (seen.strength == 1) == (step + 1 >= STEPS / 2)


def test_telemetry_counts() -> None:
    parameter = nn.Parameter(torch.tensor([[0.9, 0.2, -0.7, -1.0]]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    target = {"w": Target(parameter, Rows((1, 4), 0), Fixed((-1.0, 1.0)))}
    prox = ProxConnect(optimizer, target, METHODS["proxconnect"], Linear(0.5, 0.9), steps=10)
    first = prox.telemetry()
    assert (first.step, first.strength, first.on_levels, first.flips) == (0, 0.0, 0.25, 0.0)
    assert first.distance == pytest.approx(((0.01 + 0.64 + 0.09) / (0.81 + 0.04 + 0.49 + 1)) ** 0.5)
    for gradient in ([0.0, 0.4, 0.0, 0.0], [0.0, 0.0, -0.9, 0.0]):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
    assert prox.telemetry().flips == pytest.approx(2 / 4 / 2)
    assert prox.telemetry().flips == 0


def test_quantized_shows_the_rounded_weights_and_puts_everything_back() -> None:
    for name in METHODS:
        model = network()
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)
        train(model, optimizer, 0, 5)
        before = copy.deepcopy((prox.state_dict(), model.state_dict()))
        with prox.quantized():
            assert all(len(row.unique()) <= 3 for p in model.parameters() for row in p.data)
        same(before, (prox.state_dict(), model.state_dict()))


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "quantizer", [Ternary(), KMeans(4), AdditivePowersOfTwo(3), Uniform(3, symmetric=False)], ids=str
)
def test_resume_is_bit_equal(name: str, quantizer: Quantizer) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, ProxConnect]:
        model = network()
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        chosen = weights(model, quantizer)
        return model, optimizer, ProxConnect(optimizer, chosen, METHODS[name], Theory(0.8, 0.5), steps=STEPS, refit=4)

    model, optimizer, prox = fresh()
    train(model, optimizer, 0, 13)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "prox": prox.state_dict()}, file)
    train(model, optimizer, 13)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_optimizer, other_prox = fresh()
    train(other, other_optimizer, 0, 3)  # whatever it held before is overwritten
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    other_prox.load_state_dict(saved["prox"])
    same(saved["model"], dict(other.state_dict()))
    train(other, other_optimizer, 13)
    same(prox.state_dict(), other_prox.state_dict())
    same(dict(model.state_dict()), dict(other.state_dict()))
    done, other_done = prox.finish(), other_prox.finish()
    for key in done:
        assert torch.equal(done[key].codes, other_done[key].codes)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_trains_on_as_the_original(name: str, copied: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)
    train(model, optimizer, 0, 10)
    other, its, others = copied((model, optimizer, prox))
    train(other, its, 10, STEPS)
    assert prox.step == 10
    train(model, optimizer, 10, STEPS)
    same((prox.state_dict(), model.state_dict()), (others.state_dict(), other.state_dict()))
    prox.finish()
    others.finish()
    assert not copied(prox)._hooks


def test_a_state_of_another_run_is_refused_with_all_differences() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), METHODS["parq"], steps=STEPS)
    state = prox.state_dict()
    prox.detach()
    only = {"0.weight": weights(model)["0.weight"]}
    other = ProxConnect(optimizer, only, METHODS["proxquant"], steps=STEPS + 1)
    with pytest.raises(PcqError) as raised:
        other.load_state_dict(state)
    for words in ("method", "steps 24, this one has 25", "2.weight: only in the saved state"):
        assert words in str(raised.value)
    with pytest.raises(PcqError, match="format 7"):
        other.load_state_dict({**state, "format": 7})
    with pytest.raises(PcqError, match=r"no state of a ProxConnect: its keys are state, param_groups\. Allowed: what"):
        other.load_state_dict(other.optimizer.state_dict())
    for key in ("run", "step", "weights"):
        with pytest.raises(PcqError, match=f"ProxConnect state: it is not whole: {key} missing"):
            other.load_state_dict({name: value for name, value in state.items() if name != key})
    name, saved = next(iter(state["weights"].items()))
    for key in saved:
        cut = {**state["weights"], name: {k: value for k, value in saved.items() if k != key}}
        with pytest.raises(PcqError, match=f"it is not whole: {key} of {name} missing"):
            other.load_state_dict({**state, "weights": cut})


@pytest.mark.parametrize(
    ("axis", "quantizer", "said"),
    [
        (0, Binary(), r"0\.weight: saved with Ternary\(.*, here it has Binary\("),
        (None, TERNARY, r"2\.weight: saved with Rows"),
    ],
)
def test_a_state_of_other_levels_or_rows_is_refused(axis: Literal[0] | None, quantizer: Quantizer, said: str) -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    prox = ProxConnect(optimizer, weights(model), steps=STEPS)
    state = prox.state_dict()
    prox.detach()
    others = {name: Target(t.parameter, Rows(t.rows.shape, axis), quantizer) for name, t in weights(model).items()}
    with pytest.raises(PcqError, match=said):
        ProxConnect(optimizer, others, steps=STEPS).load_state_dict(state)


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_parameters_in_other_memory_are_followed(name: str, swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``model.double().float()`` and helpers leave them that put averages into ``p.data`` for a while."""
    monkeypatch.setattr("pcq.proxconnect.weights.swaps", lambda _: swapped)
    ends = []
    for moves in (False, True):
        model = network()
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)
        for step in range(STEPS):
            if moves and step in (0, 7):
                for p in model.parameters():
                    p.data = p.data.clone()
            train(model, optimizer, step, step + 1)
        if moves:
            for p in model.parameters():
                p.data = p.data.clone()
        prox.finish()
        ends.append(dict(model.state_dict()))
    same(ends[0], ends[1])


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_channels_put_last_later_stay_there(name: str, swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcq.proxconnect.weights.swaps", lambda _: swapped)
    ends = []
    for moves in (False, True):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
        with torch.no_grad():
            matrix(model).copy_(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)
        for step in range(STEPS):
            if moves and step == 7:
                model.to(memory_format=torch.channels_last)
            matrix(model).grad = torch.sin(torch.arange(108.0) * (1 + step)).view(4, 3, 3, 3)
            optimizer.step()
        prox.finish()
        assert matrix(model).is_contiguous(memory_format=torch.channels_last) == moves
        ends.append(dict(model.state_dict()))
    same(ends[0], ends[1])


def test_parameters_of_another_type_are_refused_at_the_next_step() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd-momentum"](list(model.parameters()))
    ProxConnect(optimizer, weights(model), METHODS["proxquant"], steps=STEPS)
    matrix(model).data = matrix(model).data.double()
    matrix(model).grad = torch.zeros(8, 6, dtype=torch.float64)
    with pytest.raises(PcqError, match=r"0\.weight: was float32 on cpu .* and is float64 on cpu of shape \(8, 6\) now"):
        optimizer.step()


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_fails_does_not_leave_latents_in_the_model(
    name: str, swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcq.proxconnect.weights.swaps", lambda _: swapped)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    prox = ProxConnect(optimizer, weights(model), METHODS[name], steps=STEPS)

    def fail() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules["torch.optim.sgd"], "sgd", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                optimizer.step()

    train(model, optimizer, 0, 4)
    before = copy.deepcopy(dict(model.state_dict()))
    fail()
    if METHODS[name].gradient_at != METHODS[name].updates:
        with pytest.raises(PcqError, match=r"last step failed .* take the gradient once more"):
            optimizer.step()
    if METHODS[name].updates == "latent" or METHODS[name].gradient_at == "weight":
        same(before, dict(model.state_dict()))
    assert prox.step == 4
    train(model, optimizer, 4)
    assert prox.step == STEPS
    fail()
    assert prox.finish().keys() == weights(model).keys()


def test_a_parameter_that_leaves_the_optimizer_stays_on_its_levels() -> None:
    model = network()
    optimizer = torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=0.01)
    prox = ProxConnect(optimizer, weights(model), steps=STEPS)
    train(model, optimizer, 0, 4)
    optimizer.param_groups = optimizer.param_groups[:1]
    train(model, optimizer, 4)
    assert prox.finish().keys() == weights(model).keys()


def test_a_weight_without_elements_is_refused() -> None:
    empty = nn.Parameter(torch.zeros(5, 0))
    optimizer = torch.optim.SGD([empty], lr=0.1)
    with pytest.raises(PcqError, match="w: has no elements"):
        ProxConnect(optimizer, {"w": Target(empty, Rows((5, 0)), TERNARY)}, steps=1)


def test_optimizer_state_stays_the_optimizers_own() -> None:
    model, other = network(), network()
    optimizer, plain = (OPTIMIZERS["adamw"](list(m.parameters())) for m in (model, other))
    ProxConnect(optimizer, weights(model), steps=STEPS)
    assert optimizer.state_dict() == plain.state_dict()
    train(model, optimizer, 0, 2)
    train(other, plain, 0, 2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == plain.state[q].keys()


def test_references_into_the_model_stay_true_after_every_step() -> None:
    """A state dict taken once, and views of weights, see the weights of every later step."""
    model = network()
    alias, view = model.state_dict()["0.weight"], matrix(model).data.view(-1)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    ProxConnect(optimizer, weights(model), METHODS["parq"], steps=STEPS)
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        assert torch.equal(alias, matrix(model).data)
        assert torch.equal(view, matrix(model).data.flatten())


def test_targets_come_from_a_plan() -> None:
    from pcq.plan import Parameter, Plan, Quantized

    model = network()

    def entry(name: str, shape: tuple[int, ...], tied_to: str | None = None) -> Quantized:
        parameter = Parameter(name, shape, "float32", "linear", tied_to=tied_to)
        return Quantized(parameter, Rows(shape, 0), Ternary(), 0)

    plan = Plan((entry("0.weight", (8, 6)), entry("tied", (8, 6), "0.weight"), entry("2.weight", (5, 8))))
    found = targets(plan, dict(model.named_parameters()))
    assert list(found) == ["0.weight", "2.weight"]
    assert found["0.weight"] == Target(matrix(model), Rows((8, 6), 0), Ternary())
    bad = Plan((entry("0.weight", (8, 7)), entry("9.weight", (1, 1))))
    with pytest.raises(PcqError) as raised:
        targets(bad, dict(model.named_parameters()))
    assert "0.weight: planned with shape (8, 7), but the model's is (8, 6)" in str(raised.value)
    assert "9.weight: planned, but the model has no parameter of that name" in str(raised.value)
    wrapped = {f"_orig_mod.{name}": parameter for name, parameter in model.named_parameters()}
    with pytest.raises(PcqError, match=r"The model calls it _orig_mod\.2\.weight: give the names of the module inside"):
        targets(plan, wrapped)
    names = {**dict(model.named_parameters()), "alias": matrix(model)}
    assert targets(Plan((entry("alias", (8, 6)),)), names)["alias"].parameter is matrix(model)
    twice = Plan((entry("0.weight", (8, 6)), entry("alias", (8, 6))))
    with pytest.raises(PcqError, match=r"alias: is one with 0\.weight in the model, but two in the checkpoint"):
        targets(twice, names)


def test_grids_survive_a_save() -> None:
    for grid in (
        Affine(torch.rand(3), 0.5, 2),
        Affine(torch.rand(3), torch.tensor([1, 2, 3], dtype=torch.uint8), 4),
        Codebook(torch.rand(1, 4).sort().values),
        Codebook(torch.rand(1, 4).sort().values, torch.rand(3)),
    ):
        back = grid_from(grid_state(grid), torch.device("cpu"))
        same(vars(back), vars(grid))
        assert type(back) is type(grid)


def test_every_prox_keeps_its_promise_as_a_method() -> None:
    """Any prox with any of the four update rules trains and finishes: the choices are orthogonal."""
    values: tuple[Literal["weight"], Literal["latent"]] = ("weight", "latent")
    for gradient_at in values:
        for updates in values:
            for prox_kind in (Hard(), ProxQuant(relative=False), Parq(), L(0.5, 1.0), SignSwish()):
                model = network()
                optimizer = OPTIMIZERS["rmsprop"](list(model.parameters()))
                method = Method(gradient_at, updates, prox_kind)
                prox = ProxConnect(optimizer, weights(model, Uniform(2)), method, steps=8)
                train(model, optimizer, 0, 8)
                assert prox.finish().keys() == {"0.weight", "2.weight"}


def test_rows_of_any_size_are_counted_alike() -> None:
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))

    def on_levels(*scales: float) -> float:
        weight = nn.Parameter(torch.cat([row * scale for scale in scales]))
        optimizer = torch.optim.SGD([weight], 1e-9)
        target = Target(weight, Rows(tuple(weight.shape)), Ternary())
        prox = ProxConnect(optimizer, {"w": target}, METHODS["proxconnect"], steps=40)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        return prox.telemetry().on_levels

    assert on_levels(2.0**-24, 1.0) == on_levels(1.0) < 0.5
