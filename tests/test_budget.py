"""Budgets: the knapsack against trying everything, the file against its budget, the allocation against uniform."""

import itertools
import json
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pcq
from pcq import cli, qtensor
from pcq.budget import OPTIONS, Bits, Bytes, Option, Solution, literal, parse_budget, solve
from pcq.commands import Calibration, allocate, budgeting, everything, plan
from pcq.commands.budgeting import Problem
from pcq.demo import HERE
from pcq.errors import PcqError
from pcq.quantizers import Binary, Ternary, Uniform
from pcq.recipe import Recipe, parse_recipe
from pcq.rules import Match, Rule

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
DIGITS = HERE / "digits-resnet8.safetensors"
FASHION = HERE / "fashion-mnist-resnet20.safetensors"
RESNET20 = "pcq.demo.nets:resnet20?num_classes=10&in_channels=1"


@pytest.fixture(scope="module", autouse=True)
def _measured_once():
    """What each weight of a file loses with each option is the same under every budget."""
    measure, known = Problem.losses, {}

    def losses(self, progress):
        key = self.planned.source.path, *(entry.parameter.name for entry in self.entries)
        if self.calibration is not None or key not in known:
            known[key] = measure(self, progress)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "losses", losses)
        yield


def tried(costs, losses, budget):
    """The slow twin: every combination."""
    fitting = [
        sum(loss[k] for loss, k in zip(losses, choice, strict=True))
        for choice in itertools.product(*(range(len(c)) for c in costs))
        if sum(c[k] for c, k in zip(costs, choice, strict=True)) <= budget
    ]
    return min(fitting, default=None)


option = st.tuples(st.integers(0, 30), st.integers(0, 40))
weights = st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=5)


@given(weights, st.integers(0, 120))
@settings(deadline=None, max_examples=300)
def test_the_solution_is_the_best_of_all_that_fit(options, budget):
    costs = [[cost for cost, _ in each] for each in options]
    losses = [[float(loss) for _, loss in each] for each in options]
    best, found = tried(costs, losses, budget), solve(costs, losses, budget)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.loss == best == sum(loss[k] for loss, k in zip(losses, found.choice, strict=True))
    assert found.cost == sum(cost[k] for cost, k in zip(costs, found.choice, strict=True)) <= budget
    assert found.gap == 0


@given(weights, st.integers(0, 120), st.integers(1, 3))
@settings(deadline=None, max_examples=200)
def test_a_solution_cut_short_states_a_true_bound(options, budget, states):
    costs = [[cost for cost, _ in each] for each in options]
    losses = [[float(loss) for _, loss in each] for each in options]
    best, found = tried(costs, losses, budget), solve(costs, losses, budget, states)
    if found is not None:
        assert found.bound <= best + 1e-6 <= found.loss + 2e-6
        assert found.cost <= budget


def test_tight_budgets_are_solved_exactly_and_cut_short_with_a_true_bound():
    """Where what goes by the best multiplier is often not the best of all."""
    random, missed = np.random.default_rng(0), 0
    for _ in range(200):
        costs = random.integers(1, 12, (5, 4)).tolist()
        losses = random.integers(0, 40, (5, 4)).astype(float).tolist()
        least, most = (sum(map(end, costs)) for end in (min, max))
        budget = int(random.integers(least, (least + most) // 2))
        best, found, short = tried(costs, losses, budget), solve(costs, losses, budget), solve(costs, losses, budget, 1)
        assert found.loss == found.bound == best
        assert short.bound <= best + 1e-6 <= short.loss + 2e-6
        assert max(found.cost, short.cost) <= budget
        missed += short.loss > best
    assert missed > 5


def test_hundreds_of_weights_are_solved_exactly():
    random = np.random.default_rng(0)
    sizes, scale = random.integers(500, 2_000_000, 300), 10 ** random.normal(size=300)
    bits = (1.1, 1.7, 2.1, 2.3, 3.1, 4.1, 5.1, 6.1, 8.1)
    costs = [[int(size * b / 8) for b in bits] for size in sizes]
    losses = [[float(s * 4.0**-b) for b in bits] for s in scale]
    budget = int(sum(sizes) * 2.5 / 8)
    found = solve(costs, losses, budget)
    assert found is not None
    assert found.gap == 0
    assert 0.999 * budget < found.cost <= budget


def test_a_budget_beyond_all_numbers_of_a_machine_takes_what_loses_least():
    found = solve([[3, 9, 5], [1, 2, 4]], [[4.0, 0.5, 1.0], [3.0, 1.0, 0.2]], 10**40)
    assert found is not None
    assert (found.choice, found.cost, found.gap) == ((1, 2), 13, 0.0)


@pytest.mark.parametrize(
    ("text", "means"),
    [("3MB", Bytes(3_000_000)), ("2.5 MiB", Bytes(2_621_440)), ("900kB", Bytes(900_000)), ("120 bytes", Bytes(120)),
     ("2kB", Bytes(2_000)), ("1.5GB", Bytes(1_500_000_000)), ("3KiB", Bytes(3_072)), ("2gib", Bytes(2_147_483_648)),
     ("7B", Bytes(7)), ("1.9999kb", Bytes(1_999)), ("2.5bits", Bits(2.5)), ("1bit", Bits(1.0))],
)  # fmt: skip
def test_what_a_budget_says(text, means):
    assert parse_budget(text) == means


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "MB",
        "-3MB",
        "3 parsecs",
        "0MB",
        "0bits",
        "1e3kB",
        "",
        f"{'9' * 400}MB",
        f"{'9' * 308}MB",
        f"{'9' * 400}bits",
    ],
)
def test_what_is_no_budget(text):
    with pytest.raises(PcqError, match="is not a budget"):
        parse_budget(text)


def test_options_say_what_shares_levels():
    texts = [option.text for option in (Option(Ternary()), Option(Ternary(), "tensor"), Option(Ternary(), group=64))]
    assert texts == ["ternary, per channel", "ternary, per tensor", "ternary, groups of 64"]


names = st.text("a*?[]!-0.", max_size=6)


@given(names, names)
def test_a_literal_matches_its_name_and_no_other(name, other):
    assert fnmatchcase(name, literal(name))
    assert fnmatchcase(other, literal(name)) == (other == name)


def test_names_stand_for_themselves_only():
    rule = Option(Uniform(2)).rule(["a*[0]?"])
    assert rule.match[0].name == (literal("a*[0]?"),)
    planned = plan(DIGITS, Recipe("x", "", (Option(Uniform(2)).rule(["conv1.weight"]),)), arch=ARCH)
    assert [entry.parameter.name for entry in planned.plan.quantized] == ["conv1.weight"]


@pytest.mark.parametrize("budget", ["140kB", "90kB", "75kB", "1.7bits", "3bits"])
def test_the_file_lands_within_a_percent_under_the_budget_and_beats_uniform_levels(budget, tmp_path):
    result = pcq.quantize(FASHION, arch=RESNET20, budget=budget, out=tmp_path / "x.safetensors")
    found = result.allocation
    spent = result.bytes_after if budget.endswith("B") else sum(row.nbytes for row in result.ledger)
    assert 0.99 * found.limit <= spent <= found.limit
    assert spent == found.nbytes
    assert not found.note
    assert found.gap < 0.05 if budget.endswith("B") else found.gap == 0  # the header of many options takes room
    assert all(found.loss <= each.loss for each in found.uniform)
    assert all(each.nbytes <= found.limit for each in found.uniform)
    assert found.loss < 0.8 * found.uniform[0].loss
    assert pcq.read_artifact(result.path).recipe["rules"] == found.planned.recipe.to_json()["rules"]


def test_a_header_a_byte_too_long_does_not_end_with_the_smallest_options(tmp_path):
    """Each trial had taken only as much room away as was lacking, not what the last one had left unused as well."""
    found = pcq.quantize(DIGITS, arch=ARCH, budget="56767B", out=tmp_path / "x.safetensors").allocation
    assert 0.99 * 56767 <= found.nbytes <= 56767
    assert found.loss < 0.5 * found.uniform[0].loss
    assert found.gap < 0.1


def test_uniform_levels_are_taken_where_the_header_of_others_leaves_no_room(monkeypatch):
    budget = "30kB"
    planned = plan(DIGITS, everything(budget), arch=ARCH)
    problem = Problem(planned, budget, parse_budget(budget), list(planned.plan.quantized), None)
    losses = problem.losses(lambda *_: None)
    uniform = problem.uniform(losses)
    monkeypatch.setattr(budgeting, "solve", lambda costs, losses, room: Solution(tuple(problem.smallest), 0, 9.0, 0.0))
    choice, loss, gap = problem.solve(losses, uniform)
    assert {OPTIONS[k] for k in choice} == {uniform[0].option}
    assert (loss, gap) == (pytest.approx(uniform[0].loss), 1)


def three(*shapes):
    torch.manual_seed(0)
    return {f"{name}.weight": torch.randn(shape) for name, shape in zip("abc", shapes, strict=True)}


def test_a_small_network_fits_into_what_its_smallest_file_takes(tmp_path):
    """Each weight's own smallest levels take a longer header than one kind for all: budgets between were refused."""
    torch.save(three((32, 8), (32, 32), (4, 32)), tmp_path / "n.pt")
    planned = plan(tmp_path / "n.pt", everything("9999B"))
    problem = Problem(planned, "9999B", Bytes(9999), list(planned.plan.quantized), None)
    own = [min(range(len(OPTIONS)), key=cost.__getitem__) for cost in problem.costs]
    assert len(set(own)) > 1
    assert problem.least == min(problem.alike) < problem.size(problem.plan(problem._named(own)))
    result = pcq.quantize(tmp_path / "n.pt", budget=f"{problem.least}B", out=tmp_path / "x.safetensors")
    assert result.bytes_after <= problem.least
    with pytest.raises(PcqError, match=f"{problem.least:,} bytes"):
        allocate(plan(tmp_path / "n.pt", everything(f"{problem.least - 1}B")), f"{problem.least - 1}B")


class Net(torch.nn.Module):
    """Its middle weight lies on 8 levels already."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (torch.nn.Linear(n, m, bias=False) for n, m in ((8, 32), (32, 32), (32, 4)))
        with torch.no_grad():
            self.b.weight.copy_(torch.randint(0, 8, (32, 32)) - 3.5).mul_(0.05)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


class Overflowing(Net):
    """Outputs that grow a little are infinite."""

    def __init__(self):
        super().__init__()
        self.top = float(super().forward(samples()).max().detach())

    def forward(self, x):
        return (super().forward(x) * (88.5 / self.top)).exp()


def net():
    return Net()


def overflowing():
    return Overflowing()


def samples():
    return torch.randn(80, 8, generator=torch.Generator().manual_seed(0))


def test_where_a_weight_makes_the_output_infinite_the_others_are_still_told_apart(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "n.pt")
    planned = plan(tmp_path / "n.pt", everything("4bits"), arch=f"{__file__}:overflowing")
    asked = Calibration(f"{__file__}:samples", method="nearest", refine=0)
    problem = Problem(planned, "4bits", Bits(4), list(planned.plan.quantized), asked)
    losses = problem.losses(lambda *_: None)
    assert np.isfinite(losses).all()
    assert max(map(max, losses)) > 1e6
    found = allocate(planned, "4bits", asked)
    assert found.nbytes <= found.limit


def test_a_weight_that_lies_on_the_levels_it_is_measured_with_is_not_taken_for_one_that_nothing_hurts(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "n.pt")
    planned = plan(tmp_path / "n.pt", everything("3bits"), arch=f"{__file__}:net")
    asked = Calibration(f"{__file__}:samples", method="nearest", refine=0)
    problem = Problem(planned, "3bits", Bits(3), list(planned.plan.quantized), asked)
    first, second, _ = problem.losses(lambda *_: None)
    binary, exact = OPTIONS.index(Option(Binary())), OPTIONS.index(Option(Uniform(3)))
    assert second[exact] < 1e-9
    assert 0.1 < second[binary] / first[binary] < 10


def test_the_loss_is_the_noise_of_the_levels_chosen():
    """Without samples: the sum over the weights of noise / signal, recomputed from the written network."""
    planned = plan(FASHION, everything("2.2bits"), arch=RESNET20)
    found = allocate(planned, "2.2bits")
    result = 0.0
    for entry in found.planned.plan.quantized:
        weight = planned.source.tensor(entry.parameter.name)
        noise = qtensor.quantize(entry.quantizer, weight, entry.rows).dequantize() - weight
        result += float(noise.square().sum() / weight.square().sum())
    assert found.loss == pytest.approx(result, rel=1e-4)


def test_more_than_is_needed_is_left_and_the_reason_given(capsys):
    assert cli.run(["quantize", str(DIGITS), "--budget", "1MB", "--arch", ARCH, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["note"] == "every weight has the levels that lose least, and more bytes would gain nothing"
    assert found["loss"] < min(each["loss"] for each in found["uniform"])
    planned = plan(DIGITS, everything("1MB"), arch=ARCH)
    finest = 0.0
    for entry in planned.plan.quantized:
        weight = planned.source.tensor(entry.parameter.name)
        noises = [qtensor.quantize(each.levels, weight, each.rows(entry.parameter)).dequantize() - weight
                  for each in OPTIONS]  # fmt: skip
        finest += min(float(noise.square().sum() / weight.square().sum()) for noise in noises)
    assert found["loss"] == pytest.approx(finest, rel=1e-4)


def test_what_a_recipe_keeps_stays_float_and_its_budget_holds(tmp_path):
    text = "pcq: 1\nbudget: 30kB\nrules:\n  - match: first\n    keep: fragile\n  - match: '*'\n    levels: ternary\n"
    recipe = parse_recipe(text, "mine.yaml")
    assert recipe.budget == "30kB"
    assert Recipe.from_json(recipe.to_json()) == recipe
    result = pcq.quantize(DIGITS, recipe, arch=ARCH, out=tmp_path / "x.safetensors")
    assert result.bytes_after <= 30_000
    assert "conv1.weight" in pcq.read_artifact(result.path).floats
    assert result.planned.recipe.name == "mine-30kB"
    assert result.planned.recipe.budget is None


def test_with_samples_the_better_on_those_held_out_is_taken(tmp_path):
    result = pcq.quantize(DIGITS, arch=ARCH, budget="2.2bits", out=tmp_path / "x.safetensors",
                          calibration=Calibration("digits", 64, "gptq", refine=8))  # fmt: skip
    found = result.allocation
    allocated, uniform = found.errors
    assert found.uniformly == (uniform < allocated)
    kept = [step.error for step in result.calibrated.outcome.steps if not step.reason][-1]
    assert kept == min(allocated, uniform)
    assert result.calibrated is found.calibrated
    assert sum(row.nbytes for row in result.ledger) <= found.limit


def test_fewer_samples_than_usual_are_enough(tmp_path):
    """Each of the two halves of the work takes what there is."""
    np.savez(tmp_path / "few.npz", x=np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32))
    result = pcq.quantize(DIGITS, arch=ARCH, budget="2.2bits", out=tmp_path / "x.safetensors",
                          calibration=Calibration(f"npz:{tmp_path}/few.npz", method="nearest", refine=0))  # fmt: skip
    assert result.calibrated.outcome.samples == 16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "3parsecs"], "such as 3MB, 900kB"),
        (["--budget", "9kB"], "less than the smallest levels for every weight take"),
        (["--budget", "0.5bits"], "bits. Give it more."),
        (["--budget", "3MB", "--set", "rules.0.levels=ternery"], "Did you mean 'ternary'"),
        (["--set", "budget=much", "-r", "w4"], "'much' is not a budget"),
    ],
)
def test_mistakes_are_answered_and_leave_nothing(options, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Problem, "losses", lambda *_: pytest.fail("this takes time, and the answer is known before"))
    extra = ["-r", "w4"] if "--set" in options and "-r" not in options else []
    assert cli.run(["quantize", str(DIGITS), "--arch", ARCH, "-o", "x.safetensors", *extra, *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(Path().iterdir())


def test_every_option_is_a_rule_that_takes_fewer_bytes_than_floats():
    assert len(set(OPTIONS)) == len(OPTIONS)
    planned = plan(FASHION, Recipe("x", "", (Rule((Match(name=("*",)),), Uniform(4)),)), arch=RESNET20)
    for entry in planned.plan.quantized:
        for each in OPTIONS:
            assert each.rows(entry.parameter).shape == entry.parameter.shape
