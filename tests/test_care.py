"""Data-free care: invented samples, the reference network, equalization and the whole."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pcq import tape as tapes
from pcq.calibrate.equalization import equalize, pairs
from pcq.calibrate.layers import find, norms
from pcq.calibrate.oneshot import Settings
from pcq.calibrate.steps import calibrate_measured, compared, last_kept, outputs
from pcq.care import care, reference, synthesize, transferred
from pcq.demo.nets import resnet8
from pcq.errors import PcqError
from pcq.quantizers import Quantizer, Uniform
from pcq.rows import Rows


def _net(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation,
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2.0)
            nn.init.normal_(module.bias, 0.2, 0.5)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.2, 2.0)
    return net.eval()


def _plan(net: nn.Module, quantizer: Quantizer) -> dict[str, tuple[Rows, Quantizer]]:
    return {n: (Rows(tuple(p.shape)), quantizer) for n, p in net.named_parameters() if p.ndim > 1}


def _pairs(net, x):
    tape = tapes.record(net, (x,))
    layers, _ = find(tape, {n: tuple(p.shape) for n, p in net.named_parameters() if p.ndim > 1})
    return pairs(tape, layers)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.Identity()])
def test_equalization_leaves_the_function_and_balances_the_ranges(activation):
    net, x = _net(activation), torch.randn(4, 3, 9, 9)
    found, refused = _pairs(net, x)
    assert [(pair.first.weight, pair.second.weight) for pair in found] == [("0.weight", "3.weight")]
    assert "grouped" in refused["6.weight"]
    tensors = tapes.state(net)
    changed = equalize(found, tensors)
    assert changed.keys() == {"1.weight", "1.bias", "3.weight"}
    with torch.no_grad():
        y, moved = net(x), torch.func.functional_call(net, changed, (x,))
    torch.testing.assert_close(moved, y, rtol=1e-5, atol=1e-5)
    assert not torch.equal(changed["3.weight"], tensors["3.weight"])
    slope = changed["1.weight"] / (tensors["1.running_var"] + 1e-5).sqrt()
    r1 = tensors["0.weight"].flatten(1).abs().amax(1) * slope
    r2 = changed["3.weight"].transpose(0, 1).flatten(1).abs().amax(1)
    torch.testing.assert_close(r1, r2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.SiLU(), nn.Hardswish()])
def test_equalization_is_refused_where_it_is_not_exact(activation):
    found, refused = _pairs(_net(activation), torch.randn(2, 3, 9, 9))
    assert not found
    assert "does not pass a scale on" in refused["3.weight"]


def test_equalization_is_refused_where_a_value_has_another_reader():
    net = resnet8().eval()
    found, refused = _pairs(net, torch.randn(2, 1, 8, 8))
    assert {pair.second.weight for pair in found} == {f"layer{i}.0.conv2.weight" for i in (1, 2, 3)}
    assert refused["layer1.0.conv1.weight"] == "its input is used elsewhere too"


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 50), (1, 5, 6, 7), (12,)])
def test_samples_are_the_seeds_alone(shape):
    a, b, c = (synthesize(shape, 3, seed) for seed in (0, 0, 1))
    assert a.shape == (3, *shape)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.isfinite().all()


def test_samples_have_neighbours_that_agree():
    x = synthesize((3, 64, 64), 4, 0)
    assert abs(float(x.mean())) < 1e-5
    assert abs(float(x.std()) - 1) < 1e-5
    near, far = (float((x[..., step:] * x[..., :-step]).mean()) for step in (1, 16))
    assert near > 0.7 > far > 0


def test_a_number_is_no_sample():
    with pytest.raises(PcqError):
        synthesize((), 3, 0)


def test_the_reference_has_the_trained_moments_at_every_batchnorm():
    net = _net(nn.ReLU6())
    x = synthesize((3, 16, 16), 8, 0)
    tape = tapes.record(net, (x,))
    tensors = tapes.state(net)
    statistics = reference(tape, tensors, [(x,)])
    assert statistics.keys() == {n for n in tensors if "running" in n}
    state = {**tensors, **statistics}
    for norm in norms(tape):
        op = tape.ops[norm.op]
        values = tapes.run(tape, state, {tape.inputs[0]: x}, 0, norm.op + 1)
        var, mean = torch.var_mean(values[op.outputs[0]], (0, 2, 3), unbiased=False)
        torch.testing.assert_close(mean, tensors[norm.bias], rtol=1e-4, atol=1e-4)
        own = statistics[norm.var]
        torch.testing.assert_close(
            var.sqrt(), tensors[norm.weight] * (own / (own + norm.eps)).sqrt(), rtol=1e-3, atol=1e-4
        )


def test_a_transferred_change_does_the_same_to_the_trained_statistics():
    """Where the quantized output really is ratio * y + shift, the trained network's function comes back exactly."""
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)).eval()
    torch.manual_seed(0)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    x, ratio, shift = torch.randn(50, 4), torch.tensor([0.5, 1.0, 3.0]), torch.tensor([1.0, -2.0, 0.1])
    tape = tapes.record(net, (x,))
    trained = tapes.state(net)
    teacher = {**trained, **reference(tape, trained, [(x,)])}
    (norm,) = norms(tape)
    changed = {
        norm.mean: teacher[norm.mean] * ratio + shift,
        norm.var: (teacher[norm.var] + norm.eps) * ratio.square() - norm.eps,
    }
    new = transferred([norm], changed, teacher, trained)
    with torch.no_grad():
        y, z = net(x), net[0](x) * ratio + shift
        back = torch.func.functional_call(net[1], {n[2:]: t for n, t in new.items()}, (z,))
    torch.testing.assert_close(back, y, rtol=1e-5, atol=1e-5)


def test_care_takes_steps_that_help_and_says_what_they_bought():
    net = _net(nn.ReLU())
    before = {n: t.clone() for n, t in net.state_dict().items()}
    plan = _plan(net, Uniform(2))
    first, second = (care(net, plan, (3, 12, 12), count=16) for _ in range(2))
    assert [replace(step, seconds=0.0) for step in first.steps] == [replace(step, seconds=0.0) for step in second.steps]
    assert all(torch.equal(q.codes, second.quantized[n].codes) for n, q in first.quantized.items())
    assert all(torch.equal(t, second.changed[n]) for n, t in first.changed.items())
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    kept = [step.error for step in first.steps if not step.reason]
    assert len(first.steps) == 4
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0] / 2


def test_equalization_and_matched_moments_are_steps_with_samples_too():
    """Of channels out of balance equalization is kept, and everything after it starts from the moved weights."""
    net = _net(nn.ReLU())
    with torch.no_grad():
        net[1].weight[:4] *= 8
        net[1].bias[:4] *= 8
        net[3].weight[:, :4] /= 8
    x = torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    samples, held_out = (x[:32],), (x[32:],)
    result = calibrate_measured(net, _plan(net, Uniform(3)), samples, held_out, Settings(refine=2, batch=16))
    names = ["nearest levels", "equalization of 1 pairs", "nearest levels, means and deviations matched"]
    assert [step.name for step in result.steps][:3] == names
    assert not result.steps[1].reason
    assert result.steps[1].error < result.steps[0].error
    assert result.moved.keys() == {"3.weight"}
    kept = last_kept(result.steps)
    again = compared("", outputs(net, result.tensors(), held_out), outputs(net, {}, held_out))
    assert again.error == pytest.approx(kept.error, rel=1e-4)
    assert kept.error < result.steps[1].error


def test_care_without_batchnorm_rounds_to_nearest_and_says_so():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    result = care(net, _plan(net, Uniform(4)), (3, 8, 8))
    assert not result.changed
    assert "no BatchNorm" in result.steps[-1].reason


def test_care_of_a_network_that_cannot_be_replayed_says_so():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x + torch.rand_like(x))

    net = Random()
    result = care(net, _plan(net, Uniform(4)), (4,))
    assert not result.layers
    assert "run again" in result.steps[-1].reason


class _Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.b(self.norm(self.a(x)).relu()))


@pytest.mark.parametrize(
    ("net", "why"),
    [(_Shared(), "its BatchNorms are each used more than once"), (nn.Linear(8, 4), "the network has no BatchNorm")],
)
def test_why_there_is_no_record_of_the_activations_is_said(net, why):
    found = care(net.eval(), _plan(net, Uniform(3)), (8,))
    assert found.steps[-1].reason == f"{why}, and so there is no record of its activations"
