"""BatchNorm folded into packed weights: the same function, fewer bytes, codes untouched where nothing is negative."""

import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from pcq.commands import inspect
from pcq.errors import PcqError
from pcq.export import open_packed, read_packed, write_int8, write_onnx
from pcq.export.norms import scaled
from pcq.grids import Affine, Codebook, Grid
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows

KINDS = ("binary", "ternary", "symmetric", "around 128", "by row", "halves", "shared", "shared, uneven", "tables")


def _grid(kind: str, g: int) -> Grid:
    scale = torch.rand(g) + 0.05
    match kind:
        case "binary":
            return Affine(scale, 0.5, 2)
        case "ternary":
            return Affine(scale, 1.0, 3)
        case "symmetric":
            return Affine(scale, 3.5, 8)
        case "around 128":
            return Affine(scale, 128.0, 256)
        case "by row":
            return Affine(scale, torch.randint(0, 16, (g,)).to(torch.uint8), 16)
        case "halves":
            return Affine(scale, torch.randint(0, 31, (g,)).to(torch.float16) / 2, 16)
        case "shared":
            return Codebook(torch.tensor([[-2.0, -0.5, 0.5, 2.0]]), scale)
        case "shared, uneven":
            return Codebook(torch.tensor([[-2.0, -0.5, 0.25, 2.0]]), scale)
    return Codebook(torch.randn(g, 5).sort().values)


def _weight(kind: str, rows: Rows, lowest: int = 0) -> QuantizedTensor:
    grid = _grid(kind, rows.g)
    return QuantizedTensor(torch.randint(lowest, grid.count, rows.shape, dtype=torch.uint8), grid, rows)


ROWS = (Rows((4, 3, 2)), Rows((4, 6), group=4), Rows((4, 6), None), Rows((6, 2, 3), 1, 2), Rows((6, 2, 3), 1, 2, 4))


@settings(deadline=None)
@given(
    st.sampled_from(KINDS), st.sampled_from(ROWS), st.sampled_from(["positive", "mixed", "zero"]), st.integers(0, 99)
)
def test_scaled_is_the_weight_times_the_factors(kind: str, rows: Rows, signs: str, seed: int) -> None:
    torch.manual_seed(seed)
    weight, axis = _weight(kind, rows, lowest=int(kind == "around 128")), rows.axis or 0
    channels = 4
    factor = np.random.RandomState(seed).rand(channels) + 0.1
    factor *= {"positive": np.ones(4), "mixed": np.array([1, -1, -2, 1]), "zero": np.array([0, 1, 1, 0])}[signs]
    found = scaled(weight, factor, axis)
    if found is None:
        assert signs == "mixed"
        assert kind == "shared, uneven" or (kind == "tables" and rows.axis is None)
        return
    each = torch.from_numpy(factor)
    if axis:
        wanted = weight.dequantize().double().reshape(2, 3, 2, 3) * each.reshape(2, 1, 2, 1)
        wanted = wanted.reshape(rows.shape)
    else:
        wanted = weight.dequantize().double() * each.reshape(-1, *[1] * (len(rows.shape) - 1))
    torch.testing.assert_close(found.dequantize().double(), wanted, rtol=3e-7, atol=1e-30)
    changed = found.rows.split((found.codes != weight.codes).float()).any(1)  # padding, too, is zero
    assert not changed[(each >= 0).repeat_interleave(found.rows.groups)].any()
    assert (found.grid.levels().diff() >= 0).all()
    assert found.grid.count == weight.grid.count


def test_what_cannot_be_mirrored_is_left() -> None:
    lowest = _weight("around 128", Rows((2, 3)))
    lowest.codes[1, 0] = 0  # -128, and there is no 128
    assert scaled(lowest, np.array([1.0, -1.0])) is None
    assert scaled(lowest, np.array([1.0, 2.0])) is not None
    assert scaled(_weight("ternary", Rows((4, 6), None, 1, 4)), np.ones(4)) is None  # groups across channels
    assert scaled(_weight("ternary", Rows((2, 6))), np.array([np.inf, 1.0])) is None


class Net(nn.Module):
    """BatchNorm behind a convolution without and with a bias, a depthwise, a transposed one and a matrix; one whose
    input others read too, and one in front of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.deep, self.norm1 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.up, self.norm2 = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.BatchNorm2d(6)
        self.side, self.norm3 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.first, self.after = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        self.head, self.norm4 = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.deep(torch.relu(self.norm0(self.stem(x))))))
        x = torch.relu(self.norm2(self.up(x)))
        side = self.side(x)
        x = self.after(self.first(torch.relu(self.norm3(side) + side)))
        logits: Tensor = self.norm4(self.head(x.mean((2, 3))))
        return logits


FOLDED = ("stem.weight", "deep.weight", "up.weight", "head.weight")


def _quantized(net: nn.Module, kind: str) -> dict[str, QuantizedTensor]:
    weights = {}
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            turned = isinstance(module, nn.ConvTranspose2d)
            rows = Rows(tuple(module.weight.shape), int(turned), module.groups if turned else 1)
            weight = weights[f"{name}.weight"] = _weight(kind, rows, lowest=int(kind == "around 128"))
            module.weight.data.copy_(weight.dequantize())
    net.eval()
    return weights


@pytest.mark.parametrize("kind", ["ternary", "around 128", "by row", "tables"])
def test_a_network_without_its_batchnorms(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    net = Net()
    weights = _quantized(net, kind)
    example = (torch.zeros(1, 3, 8, 8),)
    with_norms = write_onnx(net, weights, example, tmp_path / "norms.onnx", fold=False)
    report = write_onnx(net, weights, example, tmp_path / "net.onnx")
    assert report.error < 1e-5  # against torch
    assert report.folded == FOLDED
    assert json.loads(open_packed(report.path).metadata["pcq.folded"]) == [*FOLDED]
    assert ("BatchNorm folded into scales", "behind 4 of the layers") in inspect(report.path).facts
    assert with_norms.folded == ()
    kinds = [node.op_type for node in onnx.load(report.path).graph.node]
    assert kinds.count("BatchNormalization") == 2
    assert [n.op_type for n in onnx.load(with_norms.path).graph.node].count("BatchNormalization") == 6
    assert with_norms.nbytes - report.nbytes > 12 * (8 + 8 + 6 + 5)
    read, whole = read_packed(report.path), read_packed(with_norms.path)
    assert all(torch.equal(whole[name].dequantize(), weight.dequantize()) for name, weight in weights.items())
    norm = net.norm0
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # type: ignore[operator]
    assert (factor < 0).any()
    assert (factor > 0).any()
    wanted = weights["stem.weight"].dequantize() * factor.detach()[:, None, None, None]
    torch.testing.assert_close(read["stem.weight"].dequantize(), wanted, rtol=1e-6, atol=1e-9)
    for name in weights.keys() - set(FOLDED):
        assert torch.equal(read[name].dequantize(), weights[name].dequantize())


def test_a_weight_that_two_layers_use_keeps_its_batchnorm(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.layer(torch.relu(self.layer(x))))
            return y

    net = Twice()
    weights = _quantized(net, "ternary")
    report = write_onnx(net, weights, (torch.zeros(1, 3, 4, 4),), tmp_path / "net.onnx")
    assert report.folded == ()
    assert torch.equal(read_packed(report.path)["layer.weight"].dequantize(), weights["layer.weight"].dequantize())


def test_integers_of_training_need_the_batchnorms(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = Net()
    report = write_onnx(net, _quantized(net, "ternary"), (torch.zeros(1, 3, 8, 8),), tmp_path / "net.onnx")
    with pytest.raises(PcqError, match="fold=False"):
        write_int8(report.path, tmp_path / "int8.onnx", None, known={"x": None})  # type: ignore[dict-item]
