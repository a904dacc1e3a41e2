"""Padded tokens do not count: their rows are found, and calibration is as if they were not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

from pcq import tape as tapes
from pcq.calibrate.layers import find
from pcq.calibrate.moments import influence
from pcq.calibrate.oneshot import Settings, View, batches, moments
from pcq.calibrate.padding import counted, mask_at
from pcq.calibrate.steps import calibrate_measured, outputs
from pcq.calibrate.streams import Streams
from pcq.commands import analyze
from pcq.onnx_input import calibrating
from pcq.onnx_input.calibrating import calibrate as calibrate_onnx
from pcq.onnx_input.feeds import Feeds
from pcq.quantizers import Uniform
from pcq.rows import Rows
from pcq.sensitivity import Bench
from tests.test_onnx_input import normal, save

NOT_TOKENS = {"pooled.weight"}


class Reader(nn.Module):
    """Attention (torch's own, which turns tokens outermost), an MLP, a head on the first token; puts out the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(30, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.second, self.pooled = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        h = self.norm(x)
        x = x + self.attention(h, h, h, key_padding_mask=attention_mask == 0, need_weights=False)[0]
        x = x + self.second(F.gelu(self.first(self.norm(x))))
        out: Tensor = x + self.pooled(x[:, 0])[:, None]
        return out


class Placed(Reader):
    """With a layer that sees a table of its own only, as those of DeBERTa's relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(7, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask) + self.place(self.norm(self.table.weight))


def _texts(width: int, n: int = 40) -> tuple[Tensor, Tensor]:
    """Texts of 3 to 7 tokens, the rest to ``width`` filled with token 0: the same ones for every width."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 8, (n,), generator=g)
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    ids = torch.randint(1, 30, (n, 7), generator=g)
    return F.pad(ids, (0, width - 7)) * mask, mask


def _plan(module: nn.Module) -> dict[str, tuple[Rows, Uniform]]:
    names = [name for name, p in module.named_parameters() if p.ndim > 1 and name != "words.weight"]
    return {name: (Rows(tuple(module.state_dict()[name].shape)), Uniform(2)) for name in names}


def test_the_rows_of_padded_tokens_are_found_in_whatever_order_they_lie() -> None:
    module, (ids, mask) = Reader().eval(), _texts(9)
    tape = tapes.record(module, (ids, mask))
    layers, _ = find(tape, {name: rows.shape for name, (rows, _) in _plan(module).items()})
    places = [(layer.op, layer.x) for layer in layers]
    assert mask_at(module, (ids, mask)) == 1
    found = counted(tape, tapes.state(module), (ids, mask), 1, places)
    assert {layer.weight for layer in layers if layer.x not in found} == NOT_TOKENS
    orders = {tuple(found[layer.x].flatten().tolist()) for layer in layers if layer.x in found}
    assert orders == {tuple(mask.bool().flatten().tolist()), tuple(mask.T.bool().flatten().tolist())}
    assert counted(tape, tapes.state(module), (ids, torch.ones_like(mask)), 1, places) == {}
    assert counted(tape, tapes.state(module), (ids, mask), None, places) == {}


def test_moments_are_those_of_the_texts_one_by_one_without_padding() -> None:
    module, (ids, mask) = Reader().eval(), _texts(9)
    plan, seen = _plan(module), dict[str, list[Tensor]]()
    for name, part in (("first", module.first), ("second", module.second), ("pooled", module.pooled)):
        part.register_forward_hook(lambda _, x, __, n=name: seen.setdefault(n, []).append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for i, length in enumerate(mask.sum(1).tolist()):
            module(ids[i : i + 1, :length], mask[i : i + 1, :length])
    twins = {f"{name}.weight": torch.cat(rows) for name, rows in seen.items()}
    parts, state = batches((ids, mask), 16), tapes.state(module)
    tape = tapes.record(module, parts[0])
    layers, _ = find(tape, {name: rows.shape for name, (rows, _) in plan.items()})
    real = [counted(tape, state, part, 1, [(layer.op, layer.x) for layer in layers]) for part in parts]
    streams = Streams(tape, parts, state, state, 2**30)
    for layer in layers:
        if layer.weight in twins:
            weight = View.of(layer, plan[layer.weight][0]).split(state[layer.weight])
            found = moments(layer, weight, streams, Settings(), real)
            each = [len(ids) if layer.weight in NOT_TOKENS else int(mask.sum()) for ids, mask in parts]
            twin = twins.pop(layer.weight)[: sum(each)]
            share = torch.cat([influence((rows @ weight[0].T)[None])[0, :, 0] for rows in twin.split(each)])
            mean = (twin * share[:, None]).sum(0) / share.sum()
            torch.testing.assert_close(found.mean[0], mean, rtol=1e-4, atol=1e-5)
            cov = torch.cov(twin.T, correction=0, aweights=share)
            torch.testing.assert_close(found.cov[0], cov, rtol=1e-3, atol=1e-5)
    assert not twins


@pytest.mark.parametrize("padded", [True, False])
def test_a_layer_that_sees_nothing_of_the_samples_is_only_rounded(padded: bool) -> None:
    module, (ids, mask) = Placed().eval(), _texts(7)
    texts = (ids, mask if padded else torch.ones_like(mask))
    plan = {name: each for name, each in _plan(module).items() if name != "table.weight"}
    made = calibrate_measured(module, plan, texts, tuple(x[:12] for x in texts), Settings(batch=20, refine=2))
    assert made.plain == {"place.weight": "what enters it is the same for all samples"}
    assert Bench.of(module, texts).local({name: [] for name in plan}).keys() == plan.keys() - made.plain.keys()


@pytest.mark.parametrize("refined", [0, 6])
def test_how_much_is_padded_changes_nothing(refined: int) -> None:
    """Codes, levels and errors are the same, of the layers and of refined blocks."""
    module = Reader().eval()
    settings = Settings(batch=20, refine=refined, corrected=False)
    made = []
    for width in (7, 12):
        texts = _texts(width)
        made.append(calibrate_measured(module, _plan(module), texts, tuple(x[:12] for x in texts), settings))
    for name, weight in made[0].quantized.items():
        other = made[1].quantized[name]
        assert torch.equal(weight.codes, other.codes), name
        torch.testing.assert_close(weight.dequantize(), other.dequantize(), rtol=1e-3, atol=1e-4)
    for one, two in zip(made[0].steps, made[1].steps, strict=True):
        assert (one.name, one.reason, one.agreement) == (two.name, two.reason, two.agreement)
        assert one.error == (None if two.error is None else pytest.approx(two.error, rel=1e-3))
    for one, two in zip(made[0].blocks, made[1].blocks, strict=True):
        assert (one.before, one.after) == (pytest.approx(two.before, rel=1e-2), pytest.approx(two.after, rel=1e-2))


def test_outputs_are_those_of_the_tokens_that_count() -> None:
    module, (ids, mask) = Reader().eval(), _texts(9)
    y = outputs(module, {}, (ids, mask))
    assert y.shape == (int(mask.sum()), 1, 8)
    with torch.no_grad():
        torch.testing.assert_close(y[: int(mask[0].sum()), 0], module(ids[:1], mask[:1])[0, : int(mask[0].sum())])


def test_analyze_does_not_count_them_either() -> None:
    module = Reader().eval()
    rounded = {name: (module.state_dict()[name] * 4).round() / 4 for name in _plan(module)}
    found = []
    for width in (7, 12):
        bench = Bench.of(module, _texts(width))
        found.append(
            (bench.one_by_one({}, rounded), bench.local({name: [lambda n=name: rounded[n]] for name in rounded}))
        )
    for name in rounded:
        one, two = (each[0][name] for each in found)
        assert one.error == pytest.approx(two.error, rel=1e-3)
        assert (one.agreement, two.agreement) == (None, None)
        if name not in NOT_TOKENS:
            assert found[0][1][name][0].error == pytest.approx(found[1][1][name][0].error, rel=1e-3)


def reader() -> Reader:
    return Reader()


def texts() -> dict[str, Tensor]:
    return dict(zip(("input_ids", "attention_mask"), _texts(12), strict=True))


def test_analyze_counts_texts_where_outputs_are_of_tokens(tmp_path: Path) -> None:
    torch.save(Reader().state_dict(), tmp_path / "reader.pt")
    found = analyze(
        tmp_path / "reader.pt", "ternary-all", arch=f"{__file__}:reader", calib=f"{__file__}:texts", samples=32
    )
    assert found.samples == 32


def _onnx_reader(path: Path) -> Path:
    """Each token is given the mean over those that the mask leaves, then an MLP; puts out the tokens."""
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["e"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "two"], ["real"]),
        helper.make_node("Mul", ["e", "real"], ["left"]),
        helper.make_node("ReduceSum", ["left", "one"], ["sum"]),
        helper.make_node("ReduceSum", ["real", "one"], ["count"]),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("Add", ["e", "mean"], ["x"]),
        helper.make_node("MatMul", ["x", "first"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "second"], ["y"]),
    ]
    tensors = {"words": normal(30, 8), "first": normal(8, 16), "second": normal(16, 8), "one": np.array([1]),
               "two": np.array([2])}  # fmt: skip
    texts = [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", "t"]) for n in ("input_ids", "attention_mask")]
    return Path(save(path, nodes, tensors, texts, ["y"]))


def test_of_onnx_models_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And other tokens behind the mask are looked at once, though the layers are gone through twice."""
    looked, otherwise = [], calibrating._otherwise
    monkeypatch.setattr(calibrating, "_otherwise", lambda batch: (looked.append(batch), otherwise(batch))[1])
    path = _onnx_reader(tmp_path / "m.onnx")
    plan = {name: (Rows((b, a)), Uniform(2)) for name, a, b in (("first", 8, 16), ("second", 16, 8))}
    made = []
    for width in (7, 12):
        ids, mask = (x.numpy() for x in _texts(width))
        batches = [{"input_ids": ids[i : i + 8], "attention_mask": mask[i : i + 8]} for i in range(0, 40, 8)]
        made.append(calibrate_onnx(path, plan, Feeds(tuple(batches[:4]), 8), Feeds(tuple(batches[4:]), 8), Settings()))
    assert len(looked) == 2 * 4 * len(plan)
    for name in plan:
        assert torch.equal(made[0].quantized[name].codes, made[1].quantized[name].codes)
    for one, two in zip(made[0].steps, made[1].steps, strict=True):
        assert (one.name, one.reason, one.agreement) == (two.name, two.reason, two.agreement)
        assert one.error == pytest.approx(two.error, rel=1e-3)
