"""The comparison with other tools: what its driver tells of an answer, and of a difference."""

import argparse
import base64
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent / "benchmarks" / "peers"
NETS = Path(__file__).parents[1] / "pcq" / "demo" / "nets.py"


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> Any:
    names = (
        "problem",
        "nets",
        "table",
        "compare",
        "efficientnet",
    )  # as they are named in there; another test has a `nets` of its own
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(HERE))
    import problem

    yield problem
    for name in names:
        sys.modules.pop(name, None)


def made(module: Any) -> Any:
    torch.manual_seed(0)
    network = module.build(f"{NETS}:resnet8", {}).train()
    network(torch.randn(64, 1, 8, 8))  # BatchNorm statistics that are not those of the start
    names = tuple(f"{n}.weight" for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return module.Problem("2", f"{NETS}:resnet8", {}, names, 0, network.state_dict(), torch.randn(20, 1, 8, 8))


def test_a_problem_is_read_as_it_was_written(problem: Any, tmp_path: Path) -> None:
    asked = made(problem)
    problem.write(tmp_path / "p", asked)
    again = problem.read(tmp_path / "p")
    assert (again.levels, again.count, again.bits, again.weights) == ("2", 4, 2, asked.weights)
    assert torch.equal(again.samples, asked.samples)
    x = asked.samples
    assert torch.equal(again.network()(x), asked.network()(x))


@pytest.mark.parametrize("fold", [True, False])
def test_folded_batchnorm_is_told_in_the_networks_own_tensors(problem: Any, fold: bool) -> None:
    """A tool folds each BatchNorm into its convolution, or only gives the convolutions biases: the same outputs."""
    asked = made(problem)
    network, theirs = asked.network(), asked.network()
    norms = problem.conv_norms(network)
    assert norms["conv1"] == "bn1"
    assert len(norms) == 7
    layers: dict[str, tuple[Tensor, Tensor | None]] = {"fc": (theirs.fc.weight, theirs.fc.bias + 1)}
    for conv, norm in norms.items():
        one, two = theirs.get_submodule(conv), theirs.get_submodule(norm)
        ratio = two.weight / (two.running_var + two.eps).sqrt()
        weight, bias = one.weight, torch.randn(len(ratio))
        if fold:
            weight = weight * ratio[:, None, None, None]
            bias = bias + two.bias - two.running_mean * ratio
            theirs.set_submodule(norm, nn.Identity())
        layers[conv] = weight, bias
        new = nn.Conv2d(one.in_channels, one.out_channels, 3, one.stride, 1)
        new.load_state_dict({"weight": weight, "bias": bias})
        theirs.set_submodule(conv, new)
    theirs.fc.bias.data += 1
    answer = problem.checked(asked, problem.folded(asked, norms, layers, dict(theirs.named_modules())))
    network.load_state_dict(answer)
    aim = theirs.eval()(asked.samples)
    assert (network(asked.samples) - aim).abs().max() < 1e-4 * aim.abs().max()


def test_values_of_the_worst_channel_are_counted(problem: Any) -> None:
    weight = torch.tensor([[[0.5, -0.5, 0.5]], [[0.1, 0.2, 0.3]]])
    assert problem.values(weight) == 3
    assert problem.values(weight[:1]) == 2
    grouped = torch.tensor([[1.0, 1.0, 2.0, 3.0]])
    assert (problem.values(grouped), problem.values(grouped, 2)) == (3, 2)


def test_an_answer_with_unknown_or_infinite_tensors_is_refused(problem: Any) -> None:
    asked = made(problem)
    with pytest.raises(ValueError, match="unknown tensors"):
        problem.checked(asked, {"conv9.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not finite"):
        problem.checked(asked, {"fc.bias": torch.full((10,), torch.nan)})


def test_the_plain_efficientnet_pads_as_tensorflow_does(problem: Any) -> None:
    """«Same»: the output has half the size, and what is padded is split with the greater half at the far side."""
    import efficientnet

    x = torch.arange(36.0).reshape(1, 1, 6, 6) + 1
    assert [efficientnet.padding(k, s)(x).shape[2] for k, s in ((3, 1), (5, 1), (3, 2), (5, 2))] == [8, 10, 7, 9]
    assert torch.equal(efficientnet.padding(3, 2)(x)[0, 0, :6, :6], x[0, 0])
    assert torch.equal(efficientnet.padding(5, 2)(x)[0, 0, 1:7, 1:7], x[0, 0])
    network = efficientnet.efficientnet()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008  # timm 1.0's efficientnet_lite0 has as many
    norms = problem.conv_norms(network)
    assert len(norms) == 49
    assert norms["blocks.1.depthwise_conv"] == "blocks.1.bn1"


def test_answers_are_scored_by_agreement_and_by_part(problem: Any, tmp_path: Path) -> None:
    import compare
    from safetensors.torch import save_file

    asked = made(problem)
    x = torch.randn(30, 1, 8, 8)
    np.savez(tmp_path / "x.npz", x_test=x.numpy())
    save_file(asked.state, tmp_path / "float.safetensors")
    network = compare.Network(tmp_path / "float.safetensors", asked.arch, {}, f"npz:{tmp_path / 'x.npz'}", "agreement")
    scorer = compare.Scorer(tmp_path, network, "test", None)
    assert scorer.right(tmp_path / "float.safetensors").all()
    other = asked.state | {"fc.bias": asked.state["fc.bias"] + 100 * torch.eye(10)[3]}  # always says 3
    save_file(other, tmp_path / "0.safetensors")
    right = scorer.right(tmp_path / "0.safetensors")
    assert right.tolist() == (asked.network()(x).argmax(1) == 3).tolist()
    assert compare.parts(np.arange(30) < 20, {"a": (10, 5), "b": (20, 2)}) == {"a": 100, "b": 50}


def test_answers_to_another_problem_are_not_taken(problem: Any, tmp_path: Path) -> None:
    import compare
    from safetensors.torch import save_file

    asked = made(problem)
    file = tmp_path / "float.safetensors"
    save_file(asked.state, file)
    np.savez(tmp_path / "x.npz", x_train=torch.randn(20, 1, 8, 8).numpy())
    network = compare.Network(file, asked.arch, {}, f"npz:{tmp_path / 'x.npz'}", "agreement")
    args = argparse.Namespace(samples=12, search_samples=8)

    def posed(seed: int) -> Any:
        return compare.posed(args, network, "2", seed, tmp_path / f"seed{seed}")

    for seed, count in ((0, 12), (compare.SEARCH_SEED, 8)):
        assert len(posed(seed).samples) == count
    assert torch.equal(posed(0).samples, posed(0).samples)
    args.samples = 16
    with pytest.raises(SystemExit, match="12 samples, 16 are asked for"):
        posed(0)
    args.samples = 12
    save_file(asked.state | {"fc.bias": asked.state["fc.bias"] + 1}, file)
    with pytest.raises(SystemExit, match="another network than"):
        posed(0)


def test_differences_within_the_interval_are_ties(problem: Any) -> None:
    from table import difference, standard_error, table

    x = np.random.RandomState(1).randn(40)
    alone = x.std(ddof=1) / np.sqrt(40)
    assert np.isclose(standard_error(x, None), alone)
    assert np.isclose(
        standard_error(np.repeat(x, 9), {"a": (20 * 9, 9), "b": (20 * 9, 9)}), alone
    )  # nine times the same
    random = np.random.RandomState(0)

    def cell(tool: str, rate: float) -> dict[str, Any]:
        bits = [np.packbits(random.rand(10_000) < rate) for _ in range(3)]
        runs = [{"right": base64.b85encode(zlib.compress(b.tobytes())).decode(), "cpu_seconds": 1, "peak_mb": 1,
                 "test": 100 * float(np.unpackbits(b)[:10_000].mean())} for b in bits]  # fmt: skip
        return {"tool": tool, "levels": "2", "runs": runs, "images": 10_000, "float": 91.0, "chosen": {"method": "x"},
                "tried": [{"val": 90.0}]}  # fmt: skip

    own, same, worse = cell("pcq", 0.9), cell("a", 0.9), cell("b", 0.88)
    by, width = difference(own, worse)
    assert 0 < width < by
    assert abs(by - 2) < 0.6
    assert difference(own, own)[0] == 0
    once = [{**each, "runs": each["runs"][:1]} for each in (own, worse)]
    assert 0 < difference(*once)[1] < 2 * width
    text = table([own, same, worse])
    assert text.count("tie") == 1
    assert text.count("pcq better") == 1
