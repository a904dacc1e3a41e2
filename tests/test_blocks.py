"""Blocks refined after their layers: where they are cut, where their training starts, and that it helps."""

import pytest
import torch
from torch import Tensor, nn

from pcq import qtensor
from pcq import tape as tapes
from pcq.calibrate.blocks import Block, blocks, latents, norms_and_biases, refine
from pcq.calibrate.layers import find
from pcq.calibrate.oneshot import Settings, batches, calibrate
from pcq.calibrate.steps import calibrate_measured
from pcq.demo.nets import resnet8
from pcq.quantizers import AdditivePowersOfTwo, Binary, Fixed, KMeans, LeastSquaresBinary, Quantizer, Ternary, Uniform
from pcq.rows import Rows
from tests.test_calibrate import calibration_net

QUANTIZERS: list[Quantizer] = [
    Binary(), Ternary(), Uniform(2), Uniform(3, symmetric=False), KMeans(4), LeastSquaresBinary(2),
    AdditivePowersOfTwo(4), Fixed((-1.0, -0.3, 0.3, 1.0)),
]  # fmt: skip


def _plan(module: nn.Module, quantizer: Quantizer) -> dict[str, tuple[Rows, Quantizer]]:
    return {n: (Rows(tuple(p.shape)), quantizer) for n, p in module.named_parameters() if p.ndim > 1}


def _blocks(module: nn.Module, x: Tensor) -> tuple[tapes.Tape, list[Block]]:
    tape = tapes.record(module, (x,))
    weights = {n: tuple(p.shape) for n, p in module.named_parameters() if p.ndim > 1}
    layers, _ = find(tape, weights)
    return tape, blocks(tape, layers, list(weights))


def test_a_residual_network_is_cut_at_its_additions():
    tape, found = _blocks(resnet8().eval(), torch.randn(2, 1, 8, 8))
    assert [block.weights for block in found] == [
        ("conv1.weight",),
        *((f"layer{i}.0.conv1.weight", f"layer{i}.0.conv2.weight") for i in (1, 2, 3)),
        ("fc.weight",),
    ]
    assert [block.start for block in found] == [0, *(block.stop for block in found[:-1])]
    assert found[-1].stop == len(tape.ops)
    assert all(tape.makers[block.leaves] == block.stop - 1 for block in found)


def test_a_transformer_is_cut_after_attention_and_after_the_mlp():
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    _, found = _blocks(module, torch.randn(2, 5, 8))
    assert [block.weights for block in found] == [
        ("self_attn.in_proj_weight", "self_attn.out_proj.weight"), ("linear1.weight", "linear2.weight"),
    ]  # fmt: skip


def test_layers_in_a_row_make_blocks_of_three():
    net = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())))
    _, found = _blocks(net, torch.randn(2, 4))
    assert [len(block.weights) for block in found] == [3, 2]


def test_a_block_is_judged_by_an_output_that_its_weights_have_a_part_in():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scores, self.boxes = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(16, 6)

        def forward(self, x):
            x = self.body(x).relu()
            return self.scores(x), self.boxes(x), x.abs()

    torch.manual_seed(0)
    module = Detector()
    tape, found = _blocks(module, torch.randn(4, 4))
    assert found[-1].weights == ("scores.weight", "boxes.weight")
    assert found[-1].leaves == tape.results[1]
    x = torch.randn(32, 4)
    start = calibrate(module, _plan(module, Binary()), (x,), Settings(method="nearest"))
    refined = refine(tape, found, start.quantized, start.changed, tapes.state(module), batches((x,), 4), 40)
    assert refined.blocks[-1].after < refined.blocks[-1].before


def test_what_all_blocks_see_unchanged_does_not_join_them():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            mask = (x > 0).float()
            x = x + self.a(x).relu() * mask
            return x + self.b(x).relu() * mask

    _, found = _blocks(Masked(), torch.randn(2, 4))
    assert [block.weights for block in found] == [("a.weight", "b.weight")]  # no branch, so layers in a row
    assert found[0].stop > found[0].start


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.text)
@pytest.mark.parametrize("rows", [Rows((6, 10)), Rows((6, 10), axis=None), Rows((6, 10), group=4)])
def test_latents_round_to_the_codes_and_stay_where_they_were_otherwise(quantizer, rows):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 10, generator=g)
    start = qtensor.quantize(quantizer, weight, rows)
    near = qtensor.encode(weight, start.grid, rows)
    torch.testing.assert_close(qtensor.encode(latents(weight, near), near.grid, rows).codes, near.codes)
    other = torch.randint(near.grid.count, near.codes.shape, generator=g).to(torch.uint8)
    moved = qtensor.QuantizedTensor(
        torch.where(torch.rand(6, 10, generator=g) < 0.3, other, near.codes), near.grid, rows
    )
    found = latents(weight, moved)
    distinct = moved.dequantize() == qtensor.encode(found, moved.grid, rows).dequantize()
    assert distinct.all()
    if near.grid.count == 2:  # far inside its cell nothing moves
        far = (moved.codes == near.codes) & (weight.abs() > 0.2 * weight.abs().max())
        assert torch.equal(found[far], weight[far])


def test_refinement_lowers_the_error_on_other_samples():
    net, x = calibration_net(), torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    fresh = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    plan, parts = _plan(net, Binary()), batches((x,), 32)
    start = calibrate(net, plan, (x,), Settings(rounds=1, steps=20))
    tape, found = _blocks(net, parts[0][0])
    own = tapes.state(net)
    before = {n: t.clone() for n, t in own.items()}
    result = refine(tape, found, start.quantized, start.changed, own, parts, 160)
    assert all(torch.equal(before[n], t) for n, t in tapes.state(net).items())
    assert [report.weights for report in result.blocks] == [block.weights for block in found]
    assert sum(report.after < report.before for report in result.blocks) >= 3
    assert result.samples == 256

    def error(tensors: dict[str, Tensor]) -> float:
        with torch.no_grad():
            y, y_q = net(fresh), torch.func.functional_call(net, tensors, (fresh,))
        return float((y_q - y).square().sum() / (y - y.mean(0)).square().sum())

    def dense(result) -> dict[str, Tensor]:
        return {**result.changed, **{n: q.dequantize() for n, q in result.quantized.items()}}

    assert error(dense(result)) < error(dense(start)) < 1
    # what the last block reports is what the network does on the samples
    with torch.no_grad():
        y, y_q = net(x), torch.func.functional_call(net, dense(result), (x,))
    least = min(result.blocks[-1].before, result.blocks[-1].after)
    assert float((y_q - y).square().sum() / (y - y.mean(0)).square().sum()) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.text)
@pytest.mark.parametrize("axis", [0, None, "group"])
def test_every_kind_of_levels_and_rows_is_refined_and_the_same_each_time(quantizer, axis):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(64, 7)
    plan = {
        n: (Rows(tuple(p.shape), axis=None if axis is None else 0, group=4 if axis == "group" else None), quantizer)
        for n, p in net.named_parameters() if p.ndim > 1
    }  # fmt: skip
    start = calibrate(net, plan, (x,), Settings(method="nearest"))
    tape, found = _blocks(net, x)
    first, second = (
        refine(tape, found, start.quantized, start.changed, tapes.state(net), [(x,)], 40) for _ in range(2)
    )
    (report,) = first.blocks
    with torch.no_grad():
        tensors = {**first.changed, **{n: q.dequantize() for n, q in first.quantized.items()}}
        y, y_q = net(x), torch.func.functional_call(net, tensors, (x,))
    error = float((y_q - y).square().sum() / (y - y.mean(0)).square().sum())
    assert error == pytest.approx(min(report.before, report.after), rel=1e-3)
    for name, (rows, _) in plan.items():
        q = first.quantized[name]
        assert q.rows == rows
        assert (q.grid.levels().diff(dim=1) >= 0).all()
        assert torch.equal(q.codes, second.quantized[name].codes)
        assert torch.equal(q.dequantize(), second.quantized[name].dequantize())


def test_a_block_that_training_does_not_help_stays_as_it_was():
    net, x = calibration_net(), torch.randn(64, 1, 8, 8)
    plan, parts = _plan(net, Uniform(2)), batches((x,), 32)
    start = calibrate(net, plan, (x,), Settings(method="nearest"))
    tape, found = _blocks(net, parts[0][0])
    same = refine(tape, found, start.quantized, start.changed, tapes.state(net), parts, 0)
    assert all(report.after == report.before for report in same.blocks)
    assert all(same.quantized[n] is q for n, q in start.quantized.items())
    assert same.changed == start.changed


def test_little_memory_means_fewer_samples():
    net, x = calibration_net(), torch.randn(64, 1, 8, 8)
    plan, parts = _plan(net, Uniform(4)), batches((x,), 8)
    start = calibrate(net, plan, (x,), Settings(method="nearest"))
    tape, found = _blocks(net, parts[0][0])
    assert refine(tape, found, start.quantized, {}, tapes.state(net), parts, 1, memory=1).samples == 8


def test_statistics_are_not_trained():
    net = resnet8().eval()
    tape, found = _blocks(net, torch.randn(2, 1, 8, 8))
    assert norms_and_biases(tape, found[1], tapes.state(net)) == [
        "layer1.0.bn1.weight", "layer1.0.bn1.bias", "layer1.0.bn2.weight", "layer1.0.bn2.bias",
    ]  # fmt: skip


def test_listed_levels_are_used_as_they_are():
    torch.manual_seed(0)
    net, levels = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), (-0.3, -0.1, 0.0, 0.1, 0.3)
    x = torch.randn(160, 8)
    settings = Settings(method="gptq", refine=60, output=False)
    found = calibrate_measured(net, _plan(net, Fixed(levels)), (x[:128],), (x[128:],), settings)
    assert found.blocks
    for quantized in found.quantized.values():
        assert torch.equal(quantized.grid.levels(), torch.tensor([levels]))


class _Made(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.stored = nn.Linear(4, 4), nn.Buffer(torch.ones(4))
        self.made = nn.Buffer(torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.made * self.stored


def test_what_no_file_holds_is_not_trained():
    net = _Made().eval()
    tape, (block,) = _blocks(net, torch.randn(2, 4))
    assert norms_and_biases(tape, block, tapes.state(net)) == ["linear.bias", "stored"]
