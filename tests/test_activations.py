"""Training with 8-bit activations: the simulation rounds what the exported file rounds, by the same names."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnxruntime import InferenceSession, SessionOptions
from torch import Tensor, nn

import pcq
from pcq import qtensor
from pcq.activations import HALF, Names, Range, sums
from pcq.commands.networks import load_network
from pcq.data import open_data
from pcq.demo import HERE
from pcq.errors import CheckFailed, PcqError
from pcq.export import verify, write_int8, write_onnx
from pcq.export.int8 import find_sites, place
from pcq.qtensor import QuantizedTensor
from pcq.quantizers import Ternary, Uniform
from pcq.rows import Rows
from pcq.train import batchnorm, looks
from pcq.train.activations import Simulation, onto, simulate, weights8
from pcq.train.job import Job
from pcq.train.learned import LEAST, Learned, Onto

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
DIGITS = HERE / "digits-resnet8.safetensors"
Weights = dict[str, QuantizedTensor]


class Residual(nn.Module):
    """BatchNorm, ReLU in place, ReLU6, depthwise, a shortcut that is padded, one that is not, SiLU, pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.norm2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.wide, self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(8, 16, 1, stride=2)
        self.last, self.head = nn.Conv2d(16, 16, 3), nn.Linear(16, 10)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.norm0(self.stem(x))), 2)
        y = F.relu6(self.norm1(self.deep(x)))
        y = self.norm2(self.point(y))
        y += x
        x = self.relu(y)
        x = F.relu(self.wide(x) + self.down(x))
        x = F.relu(F.pad(x, (1, 1, 1, 1)) + 0.1)
        x = F.silu(self.last(x)).mean((2, 3))
        return self.head(x)  # type: ignore[no-any-return]


class Before(nn.Module):
    """BatchNorm and ReLU before the convolutions, so that sums have two readers; and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.one = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.two = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.three, self.head = nn.Conv2d(24, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.one(torch.relu(self.norm1(x)))
        y = y + self.two(torch.relu(self.norm2(y)))
        z = torch.cat([x, y, self.one(torch.relu(y))], 1)
        z = torch.relu(self.three(z))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(z, 1), 1))  # type: ignore[no-any-return]


def quantized(network: nn.Module, last: str = "head.weight") -> Weights:
    """Ternary; the last layer in 8 bits. BatchNorms get something to do, one channel a negative factor."""
    weights: Weights = {}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.weight.data[2] = -1
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            quantizer = Uniform(8) if name == last else Ternary()
            weights[name] = qtensor.quantize(quantizer, parameter.detach(), Rows(tuple(parameter.shape)))
            parameter.data.copy_(weights[name].dequantize())
    network.eval()
    return weights


def simulated(network: nn.Module, weights: Weights, x: Tensor) -> Simulation:
    """With ranges observed on ``x``."""
    forms = {name: (weight.grid, weight.rows) for name, weight in weights.items()}
    levels = {name: weight.grid for name, weight in weights.items()}
    simulation = Simulation(network, weights8(dict(network.named_parameters()), forms), levels=levels)
    simulation.look(x)
    with simulation.watching(True), torch.no_grad():
        network(x)
    return simulation


def run(path: Path, x: Tensor) -> np.ndarray:
    session = verify.open_session(str(path), optimised=True)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("make", [Residual, Before])
def test_the_file_computes_what_was_simulated(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = make()
    weights = quantized(network)
    x = torch.randn(64, 3, 12, 12)
    exact, out = tmp_path / "exact.onnx", tmp_path / "int8.onnx"
    write_onnx(network, weights, (torch.zeros(1, 3, 12, 12),), exact, fold=False)
    with torch.no_grad():
        plain = network(x).numpy()
    simulation = simulated(network, weights, x)
    with torch.no_grad():
        ours = network(x).numpy()
    model = ir.load(exact)
    assert simulation.ranges.keys() == set(place(model, find_sites(model, weights).sites).names.values())
    report = write_int8(exact, out, None, known=simulation.ranges)
    assert report.unfused == 0
    assert report.seven_bits == ("head.weight",)
    assert report.saturating == ()
    theirs = run(out, x)
    far, near = np.abs(plain - theirs).max(1), np.abs(ours - theirs).max(1)
    scale = np.abs(theirs).max()
    assert np.median(far) > 1e-3 * scale  # rounding shows
    assert (near < 1e-6 * scale).mean() > 0.9  # all, but for codes on ties that another processor's sums may decide
    simulation.detach()
    with torch.no_grad():
        assert np.array_equal(network(x).numpy(), plain)


def test_layers_that_training_left_in_float_stay_there(tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Attending()
    weights = quantized(network)
    x, exact = torch.randn(4, 7, 8), tmp_path / "exact.onnx"
    write_onnx(network, weights, (torch.zeros(1, 7, 8),), exact, fold=False)
    simulation = simulated(network, weights, x)
    assert simulation.ranges.keys() == {"head.weight/input"}
    report = write_int8(exact, tmp_path / "int8.onnx", None, known=simulation.ranges)
    layers = {layer.weight: layer for layer in report.layers}
    assert layers["attention.out_proj.weight"].activations is None
    assert layers["attention.out_proj.weight"].reason == "the training saw no activations of it"
    assert layers["head.weight"].activations == "static"


def test_matrices_of_tokens_are_rounded_anew_in_each_call(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 48), nn.Linear(48, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.gelu(self.a(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Tokens()
    weights = quantized(network, "a.weight")
    x, exact = torch.randn(4, 7, 32), tmp_path / "exact.onnx"
    write_onnx(network, weights, (torch.zeros(1, 7, 32),), exact)
    simulation = simulated(network, weights, x)
    assert simulation.ranges == {}
    report = write_int8(exact, tmp_path / "int8.onnx", None)
    assert report.saturating == ("a.weight",)
    options = SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # sums of 32 bits without VNNI too
    session = InferenceSession(str(report.path), options)
    theirs = np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        ours = network(x).numpy()
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert not np.array_equal(network(x[:1]).detach().numpy()[0], ours[0])  # a sample depends on its batch


def test_what_a_convolution_and_a_matrix_read_is_rounded_for_each(tmp_path: Path) -> None:
    """Static for one and dynamic for the other, as in LeViT."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).tanh()
            return self.b(y) + self.c(y)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Both().eval()
    weights = quantized(network)
    x, exact = torch.randn(4, 3, 16), tmp_path / "exact.onnx"
    write_onnx(network, weights, (torch.zeros(1, 3, 16),), exact, fold=False)
    report = write_int8(exact, tmp_path / "int8.onnx", lambda: [(x,)])
    assert {layer.weight: layer.activations for layer in report.layers}["b.weight"] == "static"
    assert {layer.weight: layer.activations for layer in report.layers}["c.weight"] == "dynamic"
    y, aim = run(tmp_path / "int8.onnx", x), network(x).detach().numpy()
    assert np.abs(y - aim).max() < 0.05 * np.abs(aim).max()


def test_control_flow_and_a_branch_that_was_never_seen() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, image: Tensor) -> Tensor:
            x = torch.relu(self.a(image))
            for _ in range(3 if image.abs().mean() > 10 else 1):
                x = torch.relu(self.b(x))
            return x

    torch.manual_seed(0)
    network = Branches()
    weights = quantized(network, "")
    x = torch.randn(2, 3, 6, 6)
    simulation = simulated(network, weights, x)
    assert set(simulation.ranges) == {"a.weight/input", "a.weight/output", "b.weight/output"}
    assert network(100 * x).isfinite().all()
    with simulation.watching(True):
        network(100 * x)
    assert {"b.weight/output#2", "b.weight/output#3"} < set(simulation.ranges)


def test_scoring_holds_no_tensor_longer_than_the_network_does() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(part for _ in range(6) for part in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1, 1)))
    )
    x, made = torch.randn(2, 4, 8, 8), []
    simulated(network, quantized(network, ""), x)
    alive: list[int] = []

    def watched(module: nn.Module, args: Any, result: Tensor) -> None:
        made.append(weakref.ref(result))
        alive.append(sum(each() is not None for each in made))

    for part in network:
        part.register_forward_hook(watched)
    with torch.no_grad():
        network(x)
    assert len(made) == 18
    assert max(alive) <= 3  # what a part reads, what it makes, and what that was pooled from


def test_the_gradient_passes_within_the_range() -> None:
    span = Range(-1.0, 2.0)
    x = torch.tensor([-1.5, -0.999, 0.0, 0.5003, 1.9, 2.5], requires_grad=True)
    made = onto(x, span)
    codes = made.detach().numpy() / span.scale + span.zero_point
    assert np.allclose(codes, np.clip(np.rint(x.detach().numpy() / span.scale) + span.zero_point, 0, 255), atol=1e-4)
    made.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_what_a_layer_adds_is_whole_numbers_of_its_sums_unit() -> None:
    scale, factor = np.float32([0.5, 0.5, 0]), np.array([2.0, -2.0, 1.0])
    found = sums(scale, 64, factor, np.array([1.0, -1.001, 3.0]), np.float32(0.25))
    assert found.step[:2].tolist() == [2**-6, 2**-6]
    assert found.lost.tolist() == [False, False, True]
    assert found.unit[:2].tolist() == [2**-8, 2**-8]
    assert found.added[:2].tolist() == [256, -256]
    assert abs(found.added[2] - 2**29) < 64  # fits into 32 bits, to float32's rounding of the step
    assert found.unit[2] * found.added[2] == pytest.approx(3, rel=2**-29)


def test_names() -> None:
    give = Names()
    assert [give.of("w", "output"), give.of("w", "output"), give.of("w", "input")] == [
        "w/output", "w/output#2", "w/input",
    ]  # fmt: skip
    assert give.combined("sum", ["a.b/sum", "w/output#2"]) == "w/sum"
    assert give.combined("sum", ["a.b/sum", "c/concat"]) == "a.b/sum"


def slow_onto(x: Tensor, logs: Tensor, signs: Tensor) -> Tensor:
    """LSQ+ (arXiv 2004.09576) on the ends of a range, by autograd: nothing is derived, roundings pass the gradient."""

    def straight(value: Tensor) -> Tensor:
        return value + (value.round() - value).detach()

    low, high = signs * logs.exp()
    scale = (high - low) / 255
    zero = straight(-low / scale)
    codes = (straight(x / scale) + zero).clamp(0, 255)
    return scale * (codes - zero)


@pytest.mark.parametrize(("low", "high"), [(-1.03, 2.0), (-0.5, 0.0), (0.0, 3.7), (-1e-3, 40.0)])
def test_the_gradient_of_a_learned_range_is_that_of_a_slow_twin(low: float, high: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(500, dtype=torch.float64).mul_(1.5).float().requires_grad_()
    pull = torch.randn(500)
    logs = torch.tensor([-low, high], dtype=torch.float64).log()
    ours, theirs = logs.clone().requires_grad_(), logs.clone().requires_grad_()
    made = Onto.apply(x, ours, Range(low, high))  # type: ignore[no-untyped-call]
    assert torch.equal(made, onto(x, Range(low, high)))
    (made * pull).sum().backward()
    assert x.grad is not None
    mine, x.grad = x.grad, None
    wanted = slow_onto(x.double(), theirs, torch.tensor([-1.0, 1.0]))
    (wanted * pull).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(mine, x.grad)
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad.nan_to_num(0), rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()))


class Spiked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.one(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_learned_ranges_let_go_of_an_outlier() -> None:
    """A pixel in 16 images that should not count spans most of the codes of the observed range."""
    torch.manual_seed(0)
    network = Spiked()
    weights = quantized(network)
    clean = torch.randn(64, 1, 8, 8)
    x = clean.clone()
    x[::16, :, 3, 4] = 12
    with torch.no_grad():
        wanted = network(clean)
    simulation = simulated(network, weights, x)
    observed = F.mse_loss(network(x), wanted).item()
    simulation.learn()
    for _ in range(110):
        F.mse_loss(network(x), wanted).backward()
        simulation.update(1.0)
    assert simulation.ranges["one.weight/input"].high < 6
    assert simulation.ranges["one.weight/output"].low == 0
    assert F.mse_loss(network(x), wanted).item() < 0.4 * observed


def test_a_learned_range_holds_zero_does_not_collapse_and_goes_no_further_than_what_is_seen() -> None:
    learned = Learned({"a": Range(-2.0, 4.0), "half": Range(-2.0, 4.0, HALF), "empty": Range(0.0, 0.0)})
    assert ["a" in learned, "half" in learned, "empty" in learned] == [True, False, False]
    learned.rounded(torch.tensor([-2.0, 1.0, 5.0]), "a", Range(-2.0, 4.0))
    for way, (low, high) in ((-20.0, (-2.0 * LEAST, 5.0 * LEAST)), (20.0, (-2.0, 5.0)), (0.0, (-2.0, 5.0))):
        learned.logs.data += way
        span = learned.update(1.0)["a"]
        assert (span.low, span.high) == pytest.approx((low, high), rel=1e-12)
    assert span.high <= 5
    learned.rounded(torch.tensor([7.0]), "a", span)
    for _ in range(100):
        learned.logs.grad = torch.full_like(learned.logs, -1.0)
        span = learned.update(1.0)["a"]
    assert (span.low, span.high) == pytest.approx((-2.0, 7.0), rel=1e-12)
    learned.logs.grad = torch.full_like(learned.logs, float("nan"))
    assert np.isfinite(learned.update(1.0)["a"].high)


def test_trained_exported_and_resumed(tmp_path: Path) -> None:
    """Ranges learned; those of 7 bits observed."""
    common = {
        "arch": ARCH,
        "activations": 8,
        "ranges": "learned",
        "steps": 8,
        "overrides": ("finetune.anneal_end=0.5",),
    }
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    result = pcq.finetune(DIGITS, "ternary", "digits", out=path, **common)  # type: ignore[arg-type]
    assert [row.weights for row in result.rows][2:] == ["fine-tuned", "fine-tuned, 8-bit activations"]

    def dying(stage: str, done: int, total: int) -> None:
        if done == 5 and stage.startswith("epoch"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        pcq.finetune(DIGITS, "ternary", "digits", out=other, save_every=3, progress=dying, **common)  # type: ignore[arg-type]
    again = pcq.finetune(DIGITS, "ternary", "digits", out=other, resume=True, **common)  # type: ignore[arg-type]
    assert again.resumed_at == 3
    assert other.read_bytes() == path.read_bytes()

    known = pcq.read_artifact(path).activations
    assert known["conv1.weight/input"].top == known["fc.weight/input"].top == HALF  # 8-bit weights
    assert known["layer1.0.conv2.weight/sum"].low == 0
    assert known["layer1.0.conv2.weight/output"].low < 0
    made = pcq.export_onnx(path, input_shape=(1, 8, 8), int8=pcq.commands.Int8())
    assert made.report.path == made.path
    assert made.int8 is not None
    assert made.int8.fused == {"QLinearConv": 7, "QGemm": 1}
    assert pcq.evaluate(made.path, "digits").scores.top1 == result.rows[3].test.top1  # type: ignore[union-attr]
    said = str(json.loads(json.dumps(pcq.read_artifact(path).recipe))["finetune"]["activations"])
    assert said == "8"

    damaged = path.read_bytes().replace(b'"conv1.weight/input\\": [-', b'"conv1.weight/input\\": [9')
    assert damaged != path.read_bytes()
    (tmp_path / "z.safetensors").write_bytes(damaged)
    with pytest.raises(CheckFailed, match="have the range"):
        pcq.read_artifact(tmp_path / "z.safetensors")


def test_held_out_scores_in_training_are_of_what_the_file_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases rounded, those of frozen layers too, whatever the BatchNorm statistics."""
    path, x = tmp_path / "x.safetensors", open_data("digits", "val").take(list(range(50)))
    scored, seen = looks.scored, []

    def watched(module: nn.Module, job: Job, *rest: Any) -> Any:
        scores = scored(module, job, *rest)
        with torch.no_grad():
            seen.append((batchnorm.statistics(module), module(x)))
        return scores

    monkeypatch.setattr(looks, "scored", watched)
    changes = ("finetune.anneal_end=0.5", "finetune.freeze=[layer2.*]")
    pcq.finetune(DIGITS, "ternary", "digits", out=path, arch=ARCH, activations=8, steps=2, overrides=changes)
    stored = pcq.read_artifact(path)
    network = load_network(stored, path, None).module.float().eval()
    simulate(network, stored.quantized, stored.activations, x[:1])
    assert len(seen) == 3  # after the last step, and with statistics of training and anew
    for statistics, y in seen:
        batchnorm.put(network, statistics)
        with torch.no_grad():
            assert torch.equal(network(x), y)


def test_what_cannot_be_trained_so() -> None:
    with pytest.raises(PcqError, match="no layer of this network can run in int8"):
        pcq.finetune(DIGITS, "nf4", "digits", arch=ARCH, activations=8, steps=1)
    with pytest.raises(PcqError, match="activations is 4"):
        pcq.finetune(DIGITS, "ternary", "digits", arch=ARCH, activations=4, steps=1)
    with pytest.raises(PcqError, match="ranges is learned, which has to be observed where activations are float"):
        pcq.finetune(DIGITS, "ternary", "digits", arch=ARCH, ranges="learned", steps=1)
    with pytest.raises(PcqError, match="float32 where activations"):
        pcq.finetune(
            DIGITS, "ternary", "digits", arch=ARCH, activations=8, steps=1, overrides=("finetune.precision=bf16",)
        )


def test_nothing_to_learn(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))\n"
    )
    torch.save(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)).state_dict(), tmp_path / "x"
    )
    with pytest.raises(PcqError, match="there are no ranges to learn"):
        pcq.finetune(
            tmp_path / "x", "w8", "digits", arch=f"{tmp_path / 'own.py'}:net", activations=8, ranges="learned", steps=1
        )
