"""What an error of a layer does to the network's output: against gradients of single samples."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcq.demo
from pcq import commands
from pcq import tape as tapes
from pcq.calibrate import sketch
from pcq.calibrate.layers import find
from pcq.calibrate.oneshot import LEAST, Settings, batches, calibrate, seen, together
from pcq.calibrate.quadratic import Quadratic
from pcq.calibrate.sketch import Shown, sketches
from pcq.calibrate.steps import all_outputs, output_error
from pcq.commands.calibrating import float_network
from pcq.data import open_data
from pcq.quantizers import Ternary
from pcq.rows import Rows

DEMO = Path(pcq.demo.__file__).parent
RESNET20 = "pcq.demo.nets:resnet20?num_classes=10&in_channels=1"


class Summed(nn.Module):
    """Layers, then one number for each sample: a fixed mixture of all that leaves them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x).flatten(1)
        return (torch.tanh(y) * torch.linspace(-1, 1, y.shape[1])).sum(1, keepdim=True)


def sampled(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, centred: bool = False) -> dict[str, Tensor]:
    """Sketches in the one direction there is."""
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.ones(shape))
    parts = batches((x,), 4)
    shown = {name: Shown(tuple(p.shape), centred) for name, p in module.named_parameters() if p.ndim > 1}
    return means(sketches(module, shown, parts, tapes.state(module)))


def means(found: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {name: (one + other) / 2 for name, (one, other) in found.items()}


def of_samples(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Gradients of each sample's number ``[s, ...]``."""
    weight = dict(module.named_parameters())[name]
    return torch.stack([torch.autograd.grad(module(one[None]).sum(), weight)[0] for one in x])


def unit(found: Tensor) -> Tensor:
    return found / torch.diagonal(found, dim1=1, dim2=2).mean(1)[:, None, None]


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1, groups=3)], (4, 9, 9)),
        ([nn.Conv1d(4, 6, 3, dilation=2), nn.Tanh(), nn.Conv1d(6, 2, 1)], (4, 12)),
        ([nn.ConvTranspose2d(4, 6, 3, 2, groups=2)], (4, 5, 5)),
    ],
)
def test_sketches_are_products_of_the_samples_gradients(
    layers: list[nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, x = Summed(*layers).eval(), torch.randn(12, *shape)
    expected = {}
    for at, layer in enumerate(module.layers):
        if not isinstance(layer, nn.Tanh):
            grads = of_samples(module, f"layers.{at}.weight", x)
            groups = getattr(layer, "groups", 1)
            if isinstance(layer, nn.ConvTranspose2d):  # [in, out / groups, ...]
                grads = grads.unflatten(1, (groups, -1)).transpose(2, 3).flatten(1, 2)
            rows = grads.reshape(len(x), groups, grads.shape[1] // groups, -1)
            expected[f"layers.{at}.weight"] = unit(torch.einsum("sgrn,sgrm->gnm", rows, rows))
    found = sampled(module, x, monkeypatch)
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-4, atol=1e-4)


def test_a_mean_that_is_taken_up_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs less their mean over a batch the gradient is ``sum g (x - E x)``."""
    torch.manual_seed(0)
    module, x = Summed(nn.Conv2d(2, 3, 3)).eval(), torch.randn(4, 2, 6, 6) + 3
    columns = F.unfold(x, 3)  # [s, n, positions]
    mean = columns.mean((0, 2))
    grads = of_samples(module, "layers.0.weight", x).flatten(2) - (
        of_samples(module, "layers.0.bias", x)[:, :, None] * mean
    )
    (found,) = sampled(module, torch.cat([x, x]), monkeypatch, centred=True).values()
    torch.testing.assert_close(found, unit(torch.einsum("srn,srm->nm", grads, grads)[None]), rtol=1e-4, atol=1e-4)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 2, 1)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2).sum(2, keepdim=True)


def test_masked_tokens_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(8, 6, 5), (torch.arange(6) < torch.arange(1, 9)[:, None].clamp(max=6)).long()
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.ones(shape))
    module = Tokens().eval()
    name = "conv.weight"
    found = means(sketches(module, {name: Shown((2, 5, 1), False)}, batches((x, mask), 4), tapes.state(module), mask=1))
    sums = (x * mask[..., None]).sum(1)
    torch.testing.assert_close(found[name], unit((sums.T @ sums)[None]), rtol=1e-4, atol=1e-4)


def test_of_many_channels_combinations_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = Summed(nn.Conv1d(6, 300, 1)).eval(), torch.randn(400, 6, 1) * torch.linspace(0.2, 2, 6)[:, None]
    name = "layers.0.weight"

    def found() -> Tensor:
        return means(sketches(module, {name: Shown((300, 6, 1), False)}, batches((x,), 8), tapes.state(module)))[name]

    few = found()
    monkeypatch.setattr(sketch, "CHANNELS", 300)
    assert F.cosine_similarity(few.flatten(), found().flatten(), 0) > 0.98


def test_the_covariance_has_the_part_that_the_halves_do_not_agree_on() -> None:
    torch.manual_seed(0)
    h = torch.eye(3)[None] * 4
    h[:, 0, 1] = h[:, 1, 0] = 1
    root = torch.randn(1, 3, 3)
    s = unit(root @ root.transpose(1, 2))
    q, settings, apart = Quadratic(torch.zeros(1, 2, 3), h), Settings(damp=0.25), torch.diag(torch.tensor([1.0, -1, 0]))
    distance = (s - h / 4).square().sum()
    for wish, rho in ((0.0, LEAST), (0.5, 0.5), (3.0, 1.0)):
        half = apart * (wish * distance / 2).sqrt()  # |2 half|^2 / 4 = 2 half_11^2 = wish * distance
        mixed = seen(q, (s + half, s - half), settings).h
        torch.testing.assert_close(mixed, rho * h + (1 - rho) * (4 * s + torch.eye(3)))


def test_where_nothing_reaches_the_output_the_covariance_is_all() -> None:
    h = torch.eye(3)[None].repeat(2, 1, 1) * 4
    s = torch.stack([torch.eye(3) + 0.5, torch.zeros(3, 3)])
    q = Quadratic(torch.zeros(2, 2, 3), h)
    mixed = seen(q, (s, s), Settings()).h
    assert not torch.equal(mixed[0], h[0])
    assert torch.equal(mixed[1], h[1])
    assert seen(q, None, Settings()) is q


def test_what_follows_may_write_into_what_a_layer_puts_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, found = torch.randn(8, 3, 6, 6), []
    one, two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    for inplace in (False, True):
        module = Summed(one, nn.ReLU(inplace), two, nn.ReLU(inplace)).eval()
        found.append(sampled(module, x, monkeypatch))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])


class Cut(nn.Module):
    """One branch is rounded before it goes on: its layer is out of the output's sight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).argmax(1, keepdim=True) + x)


def test_a_layer_out_of_sight_has_none_and_is_calibrated_all_the_same() -> None:
    torch.manual_seed(0)
    module, x = Cut().eval(), torch.randn(64, 8, 3)
    plan: dict[str, Any] = {name: (Rows((n, 8, 1)), Ternary()) for name, n in (("one.weight", 8), ("two.weight", 4))}
    shown = {name: Shown(rows.shape, True) for name, (rows, _) in plan.items()}
    found = sketches(module, shown, batches((x,), 8), tapes.state(module))
    assert found.keys() == {"two.weight"}
    assert calibrate(module, plan, (x,)).quantized.keys() == plan.keys()


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError("no derivative")


@pytest.mark.parametrize("count", [8, 16])
def test_nothing_is_said_of_one_batch_or_without_a_derivative(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = Summed(nn.Conv1d(3, 2, 1)).eval(), torch.randn(count, 3, 4)
    shown, parts = {"layers.0.weight": Shown((2, 3, 1), False)}, batches((x,), 8)
    assert bool(sketches(module, shown, parts, tapes.state(module))) == (count > 8)
    monkeypatch.setattr(sketch, "of_each_sample", lambda result, n: {0: _Blocked.apply(result)})
    assert sketches(module, shown, parts, tapes.state(module)) == {}


def test_outputs_come_nearer_than_by_the_covariance_alone() -> None:
    """The demo's ResNet-20 on other images of Fashion-MNIST than it is calibrated on."""
    planned = commands.plan(DEMO / "fashion-mnist-resnet20.safetensors", "ternary-all", arch=RESNET20)
    module = float_network(planned)
    plan = {e.parameter.name: (e.rows, e.quantizer) for e in planned.plan.quantized}
    data = open_data("fashion-mnist", "train")
    samples, others = data.take(range(128)), data.take(range(1000, 1500))
    aim = all_outputs(module, {}, others)
    errors = []
    for part in (True, False):
        made = calibrate(module, plan, (samples,), Settings(output=part))
        tensors = {**made.changed, **{name: q.dequantize() for name, q in made.quantized.items()}}
        errors.append(output_error(all_outputs(module, tensors, others), aim))
    assert errors[0] < 0.97 * errors[1]


def test_layers_are_looked_at_together_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass or in several: the same codes."""
    monkeypatch.setattr(sketch, "CHANNELS", 6)
    torch.manual_seed(0)
    layers = [nn.Conv1d(8, 12, 1), nn.ReLU(), nn.Conv1d(12, 10, 1), nn.ReLU(), nn.Conv1d(10, 4, 1), nn.Flatten()]
    module, x = nn.Sequential(*layers, nn.Linear(12, 2)).eval(), torch.randn(64, 8, 3)
    plan: dict[str, Any] = {n: (Rows(tuple(p.shape)), Ternary()) for n, p in module.named_parameters() if p.ndim > 1}
    found, _ = find(tapes.record(module, (x[:32],)), {name: rows.shape for name, (rows, _) in plan.items()})

    def passes(memory: int) -> list[list[str]]:
        return [list(each) for each in together(found, plan, Settings(memory=memory)).values()]

    one, two, three, _ = plan
    sizes = [16 * n**2 for n in (8, 12, 10)]
    assert passes(sum(sizes)) == [[one, two, three]]
    assert passes(sum(sizes) - 1) == [[one, two], [three]]
    assert passes(sizes[1]) == [[one], [two], [three]]
    assert passes(0) == [[one], [two], [three]]
    made = [calibrate(module, plan, (x,), Settings(memory=memory)).quantized for memory in (2**30, sizes[1])]
    for name in plan:
        assert torch.equal(made[0][name].codes, made[1][name].codes)
