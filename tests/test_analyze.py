"""``pcq analyze``: every measurement against a slow twin, and rules to paste that do what they say."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pcq
from pcq import cli, qtensor
from pcq.calibrate.steps import all_outputs, better, compared, output_error
from pcq.commands.analyzing import paste, worst
from pcq.commands.calibrating import Calibration, draw
from pcq.demo import HERE
from pcq.plan import Parameter, Quantized, make_plan
from pcq.quantizers import Ternary
from pcq.recipe import parse_recipe, shipped_text
from pcq.rows import Rows
from pcq.sensitivity import Bench, drift, weight_noise

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
DIGITS = HERE / "digits-resnet8.safetensors"


@pytest.fixture(scope="module")
def found():
    return pcq.analyze(DIGITS, "ternary", arch=ARCH, calib="digits", samples=40)


@pytest.fixture(scope="module")
def network():
    return pcq.open_network(DIGITS, ARCH).module


def samples():
    return draw(Calibration("digits", 40))[0]


def outputs(network, changed):
    with torch.no_grad():
        return torch.func.functional_call(network, changed, (samples(),))


def rounded(found):
    plan = {e.parameter.name: e for e in found.planned.plan.quantized}
    tensors = {name: found.planned.source.tensor(name) for name in plan}
    return {n: qtensor.quantize(e.quantizer, tensors[n], e.rows) for n, e in plan.items()}


def close(a, b):
    assert a.error == pytest.approx(b.error, rel=1e-3)
    assert a.agreement == pytest.approx(b.agreement)
    assert a.kl == pytest.approx(b.kl, rel=1e-3, abs=1e-6)


def test_one_quantized_and_one_left_float_are_what_the_whole_network_does(found, network):
    """The replay from the place of first use against a plain pass through the module."""
    exact = dict(network.named_parameters())
    values = {name: q.dequantize() for name, q in rounded(found).items()}
    aim = outputs(network, {})
    close(found.whole, drift(outputs(network, values), aim))
    assert len(found.weights) == len(values) > 5
    for row in found.weights:
        close(row.alone, drift(outputs(network, {row.name: values[row.name]}), aim))
        close(row.spared, drift(outputs(network, {**values, row.name: exact[row.name].detach()}), aim))


def test_the_layer_error_is_that_of_its_output(found, network):
    """All positions of so few samples are looked at, so the figures are exact."""
    values = {name: q.dequantize() for name, q in rounded(found).items()}
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, x, y, name=name: seen.update({f"{name}.weight": (m, x[0], y)}))
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    outputs(network, {})
    for hook in hooks:
        hook.remove()
    assert seen
    for row in found.weights:
        if row.name in seen:
            m, x, y = seen[row.name]
            off = F.conv2d(x, values[row.name], None, m.stride, m.padding, m.dilation, m.groups) - y
            spread = (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
            centred = (off - off.mean((0, 2, 3), keepdim=True)).square().sum()
            assert row.local.error == pytest.approx(float(off.square().sum() / spread), rel=1e-3)
            assert row.local.centred == pytest.approx(float(centred / spread), rel=1e-3)


@pytest.mark.parametrize(("size", "offset"), [(1.0, 1e5), (1e20, 0.0), (1e-20, 0.0)])
def test_the_layer_error_is_that_of_differences_whatever_the_size_of_what_enters(size, offset):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(6, 4, bias=False), torch.randn(100, 6)
    other = layer.weight.detach() + 0.1 * torch.randn(4, 6)
    errors = []
    for samples in (x, (x + offset) * size):
        bench = Bench.of(layer, (samples,))
        (local,) = bench.local({"weight": [lambda: other]})["weight"]
        errors.append(local.centred)
        kept = [part[0].clone() for part in bench.parts]
        assert all(map(torch.equal, kept, samples.chunk(len(kept))))
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


def test_nan_is_infinitely_far():
    """So a network that rounding makes put it out is the worst there is, and whatever mends it is kept."""
    aim = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    broken, mended = (compared("step", y, aim) for y in (aim.index_fill(0, torch.tensor(0), torch.nan), aim + 5))
    assert broken.error == torch.inf
    assert better(mended, broken)


def test_errors_are_parts_of_the_outputs_whatever_their_size():
    aim = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    errors = [output_error([(aim + 0.1 * aim.flip(0)) * size], [aim * size]) for size in (1.0, 2.0**-70)]
    assert errors[0] == pytest.approx(errors[1])


def test_the_error_of_constant_outputs_is_no_number_without_bounds():
    aim = torch.full((8, 3), 0.7)
    assert 0 < output_error([aim * (1 + 1e-7)], [aim]) < 1


def test_the_ranking_is_by_the_output_error_of_one_weight_alone(found):
    damages = [row.alone.error for row in found.weights]
    assert damages == sorted(damages, reverse=True) == [row.damage for row in found.weights]
    assert found.weights[0].override


def test_drift_by_hand():
    aim = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    found = drift(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), aim)
    assert found.error == pytest.approx(8 / 4)
    assert found.agreement == 50
    p = torch.tensor([2.0, 0.0]).softmax(0)
    assert found.kl == pytest.approx(float((p * (p / p.flip(0)).log()).sum()) / 2)
    assert drift(aim, aim) == type(found)(0.0, 100.0, 0.0)
    assert drift(aim[:, :1], aim[:, :1]).agreement is None


def test_outputs_that_both_networks_mask_do_not_count():
    aim = torch.tensor([[0.0, 2.0, -torch.inf], [2.0, 0.0, -torch.inf]])
    y = torch.tensor([[0.0, 2.0, -torch.inf], [0.0, 2.0, -torch.inf]])
    plain, found = drift(y[:, :2], aim[:, :2]), drift(y, aim)
    assert (found.error, found.agreement) == (plain.error, plain.agreement)
    assert found.kl == pytest.approx(plain.kl)
    assert drift(torch.zeros(2, 3), aim).error == torch.inf
    with pytest.raises(pcq.PcqError, match="the float network: it puts out NaN for 1 of 2 samples"):
        drift(y, torch.tensor([[0.0, torch.nan, 1.0], [0.0, 1.0, 1.0]]))


class Detector(torch.nn.Module):
    """Puts out a loss of the batch, scores and boxes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scores, self.boxes = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3), torch.nn.Linear(8, 4)

    def forward(self, x):
        x = self.body(x).relu()
        return x.mean(), {"scores": self.scores(x), "boxes": self.boxes(x)}


def test_of_several_outputs_each_counts():
    module, x = Detector().eval(), torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    rounded = {f"{name}.weight": getattr(module, name).weight.detach().sign() / 4 for name in ("scores", "boxes")}
    bench = Bench.of(module, (x,))
    alone = bench.one_by_one({}, rounded)
    with torch.no_grad():
        exact, coarse = (torch.func.functional_call(module, w, (x,))[1] for w in ({}, rounded))
    spread = sum((y - y.mean(0)).square().sum() for y in exact.values())
    for name, y in exact.items():
        off = (coarse[name] - y).square().sum() / spread
        assert alone[f"{name}.weight"].error == pytest.approx(float(off), rel=1e-4)
    assert alone["boxes.weight"].agreement == 100
    step = compared("", all_outputs(module, rounded, x), all_outputs(module, {}, x))
    assert step.error == pytest.approx(sum(each.error for each in alone.values()), rel=1e-4)


class WithTable(torch.nn.Module):
    """Puts out a table as well, of as many rows as the last batch of 80 samples has."""

    def __init__(self):
        super().__init__()
        self.a, self.table = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.randn(16, 5))

    def forward(self, x):
        return self.a(x), self.table * 1


def test_a_tensor_that_has_a_row_for_each_sample_by_chance_is_no_output():
    net, x = WithTable().eval(), torch.randn(80, 4)
    (y,) = all_outputs(net, {}, x)
    assert torch.equal(y, net(x)[0].detach())


def test_a_network_in_half_precision_is_not_told_that_the_samples_have_another_shape():
    with pytest.raises(pcq.PcqError, match="export or build it in float32"):
        all_outputs(torch.nn.Linear(4, 3).bfloat16(), {}, torch.randn(8, 4))


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.body(x).relu()
        return {"hidden": hidden, "logits": self.head(hidden)}


def test_agreement_is_that_of_what_is_called_logits():
    module, x = Named().eval(), torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    other = {"head.weight": -module.head.weight.detach()}
    exact, flipped = (torch.func.functional_call(module, w, (x,))["logits"].argmax(1) for w in ({}, other))
    agreement = pytest.approx(100 * float((exact == flipped).float().mean()))
    assert agreement != 100
    assert Bench.of(module, (x,)).one_by_one({}, other)["head.weight"].agreement == agreement
    assert compared("", all_outputs(module, other, x), all_outputs(module, {}, x)).agreement == agreement


class Shaped(torch.nn.Module):
    """Puts out ``[n, *shape]``."""

    def __init__(self, *shape):
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.body = shape, torch.nn.Linear(6, math.prod(shape))

    def forward(self, x):
        return self.body(x).reshape(len(x), *self.shape)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 3), (4, 1), (2, 1, 1), (5,)])
def test_what_is_no_prediction_agrees_in_nothing(shape):
    """A number each, a map, states of tokens: what is largest in them says nothing."""
    module, x = Shaped(*shape).eval(), torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    other = {"body.weight": module.body.weight.detach().sign()}
    step = compared("", all_outputs(module, other, x), all_outputs(module, {}, x))
    alone = Bench.of(module, (x,)).one_by_one({}, other)["body.weight"]
    with torch.no_grad():
        exact, coarse = (torch.func.functional_call(module, w, (x,)).reshape(40, -1) for w in ({}, other))
    spread = (exact - exact.mean(0)).square().sum()
    assert step.error == pytest.approx(float((coarse - exact).square().sum() / spread), rel=1e-4)
    assert alone.error == pytest.approx(step.error)
    assert alone.agreement == step.agreement
    known = shape in ((2, 1, 1), (5,))
    assert (step.agreement is not None) == (alone.kl is not None) == known


class Net(torch.nn.Module):
    """Its last output is masked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))

    def forward(self, x):
        return self.b(self.a(x).relu()) + self.mask


def network_of_masked_outputs():
    return Net()


def numbers():
    return torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


def test_a_network_of_masked_outputs_is_calibrated_and_its_json_is_json(tmp_path, capsys):
    torch.save(Net().state_dict(), tmp_path / "m.pt")
    given = [str(tmp_path / "m.pt"), "-r", "ternary-all", "--arch", f"{__file__}:network_of_masked_outputs"]
    given += ["--calib", f"{__file__}:numbers", "--json"]
    assert cli.run(["quantize", *given, "-o", str(tmp_path / "q.safetensors"), "--refine", "5"]) == 0
    steps = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["calibration"]["steps"]
    assert all(step["error"] > 0 for step in steps if step["error"] is not None)
    assert any(step["kept"] for step in steps[1:])
    assert cli.run(["analyze", *given]) == 0
    whole = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["whole"]
    assert whole["error"] > 0 < whole["kl"]


def test_weights_that_are_not_finite_are_refused_and_huge_ones_measured(tmp_path, capsys):
    torch.save({"w.weight": torch.tensor([[1.0, torch.nan], [2.0, 1.0]])}, tmp_path / "nan.pt")
    assert cli.run(["analyze", str(tmp_path / "nan.pt"), "-r", "ternary-all"]) == 2
    assert "w.weight: 1 of its 4 values are NaN or infinite" in capsys.readouterr().err
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    sizes = [weight * size for size in (1.0, 2.0**100, 2.0**-80)]
    noises = [weight_noise(w, qtensor.quantize(Ternary(), w, Rows((4, 64)))) for w in sizes]
    assert noises[0] == noises[1] == noises[2]


def test_noise_signs_and_outliers_by_hand():
    weight = torch.tensor([[1.0, -1.0, 0.1, -1.0], [2.0, -2.0, 2.0, 0.0]])
    q = qtensor.quantize(Ternary(), weight, Rows((2, 4)))
    assert torch.equal(q.dequantize(), torch.tensor([[1.0, -1.0, 0.0, -1.0], [2.0, -2.0, 2.0, 0.0]]))
    noise = weight_noise(weight, q)
    assert noise.share == pytest.approx(0.01 / float(weight.square().sum()))
    assert noise.flips == 12.5
    assert noise.outliers == 0
    spike = torch.zeros(1, 100)
    spike[0, 3] = 1.0
    assert weight_noise(spike, qtensor.quantize(Ternary(), spike, Rows((1, 100)))).outliers == pytest.approx(1)


def test_the_rules_to_paste_do_what_they_say(found):
    text = shipped_text("ternary").replace("rules:\n", "rules:\n" + found.overrides)
    planned = make_plan(parse_recipe(text, "pasted.yaml"), [e.parameter for e in found.planned.plan.entries])
    named = {row.name for row in found.weights if row.override}
    assert named
    assert {e.parameter.name for e in planned.entries if isinstance(e, Quantized) and e.rule == 0} == named
    assert planned.bytes_after - found.planned.plan.bytes_after == found.added > 0


@pytest.mark.parametrize("shared", ["per: tensor", "group: 8", ""])
def test_the_rules_to_paste_add_what_is_said_whatever_shares_levels(shared):
    text = f"pcq: 1\nrules:\n  - match: '*'\n    levels: ternary\n    {shared}\n"
    found = pcq.analyze(DIGITS, parse_recipe(text, "mine.yaml"))
    pasted = parse_recipe(text.replace("rules:\n", "rules:\n" + found.overrides), "pasted.yaml")
    planned = make_plan(pasted, [e.parameter for e in found.planned.plan.entries])
    assert planned.bytes_after - found.planned.plan.bytes_after == found.added > 0


def test_any_name_can_be_pasted():
    names = ["a[0]*", 'b"c', "d\\e", "f\ng", "é\t?", "h: #'"]
    weights = [Parameter(name, (8, 8), "float32", "linear") for name in [*names, "other"]]
    planned = make_plan(parse_recipe(f"pcq: 1\nrules:\n{paste(names)}", "pasted.yaml"), weights)
    assert [e.parameter.name for e in planned.entries if isinstance(e, Quantized)] == names


@pytest.mark.parametrize(
    ("damages", "count"), [([8, 1, 1, 1], 1), ([1] * 12, 3), ([5, 4, 1] + [0] * 9, 1), ([0.0, 0.0], 0), ([3], 1)]
)
def test_the_fewest_that_do_half_of_the_damage_and_no_more_than_a_quarter(damages, count):
    assert worst(damages) == count


def test_without_samples_only_the_weights_are_looked_at(capsys):
    assert cli.run(["analyze", str(DIGITS), "-r", "ternary-all", "--arch", ARCH, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["whole"] is got["data"] is None
    assert all(row["alone"] is row["layer_error"] is None for row in got["weights"])
    noises = [10 ** (-row["sqnr_db"] / 10) for row in got["weights"]]
    assert noises == sorted(noises, reverse=True)


def test_invented_samples_are_called_so_and_a_picture_is_drawn(tmp_path, capsys):
    picture = tmp_path / "a.png"
    arguments = ["analyze", str(DIGITS), "-r", "w2", "--arch", ARCH, "--calib", "random", "--input", "1x8x8"]
    assert cli.run([*arguments, "--samples", "16", "--plot", str(picture)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "16 invented samples of 1x8x8: no real data was seen" in said
    assert "what the figures are on real data is not known" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--samples", "16"], "--calib random"),
        (["--calib", "digits", "--samples", "2"], "8 or more"),
        (["--calib", "random", "--input", "1x8x8", "--seed", str(2**63)], "0 to 2147483647"),
        (["--calib", "random"], "--input 3x224x224"),
        (["--plot", "a.jpg"], "Let it end in .png"),
        (["--calib", "digits", "--set", "rules.0.levels=null"], "null"),
        (["--set", "budget=20kB"], "has a budget, 20kB, which chooses the levels"),
    ],
)
def test_mistakes_are_answered(options, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["analyze", str(DIGITS), "-r", "w4", "--arch", ARCH, *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(Path().iterdir())
