"""Scores are exact counts: equal to a slow reading of the definition, whatever the batches, in torch and in ORT."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.torch import load_file
from torch import Tensor, nn

from pcq import qtensor
from pcq.data import Data, from_arrays, open_data
from pcq.data.inputs import refusing
from pcq.demo.nets import resnet8
from pcq.errors import CheckFailed, PcqError
from pcq.export import write_onnx
from pcq.quantizers import Uniform
from pcq.rows import Rows
from pcq.scores import Likeness, Scores, evaluate, merged, module_predictor, onnx_predictor


def table(outputs: list[list[float]], labels: list[int] | None) -> tuple[Data, Tensor]:
    """A data set whose samples are row numbers, and the outputs to look them up in."""
    x = torch.arange(len(outputs), dtype=torch.float32)[:, None]
    y = None if labels is None else torch.tensor(labels)
    return from_arrays("table", "test", x, y), torch.tensor(outputs, dtype=torch.float32)


def lookup(outputs: Tensor):  # type: ignore[no-untyped-def]
    return lambda x: outputs[x[:, 0].long()]


def in_order(row: list[float]) -> list[int]:
    """Class numbers from the largest output down, equal ones by number."""
    return sorted(range(len(row)), key=lambda c: (-row[c], c))


@given(st.data(), st.integers(1, 30), st.integers(2, 9), st.integers(1, 40))
@settings(deadline=None, max_examples=150)
def test_scores_are_the_definition_for_every_batch_size(data: st.DataObject, n: int, classes: int, batch: int) -> None:
    rows = st.lists(st.lists(st.integers(0, 3), min_size=classes, max_size=classes), min_size=n, max_size=n)
    mine, other = data.draw(rows), data.draw(rows)
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    samples, outputs = table(mine, labels)
    seen: list[tuple[int, int]] = []
    scores = evaluate(
        lookup(outputs),
        samples,
        reference=lookup(torch.tensor(other).float()),
        batch=batch,
        progress=lambda stage, done, total: seen.append((done, total)),
    )
    first = [in_order(row)[0] for row in mine]
    theirs = [in_order(row)[0] for row in other]
    assert scores.n == n
    assert scores.top1 == 100 * sum(a == b for a, b in zip(first, labels, strict=True)) / n
    fifth = 100 * sum(label in in_order(row)[:5] for row, label in zip(mine, labels, strict=True)) / n
    assert scores.top5 == (fifth if classes > 5 else None)
    assert scores.agreement == 100 * sum(a == b for a, b in zip(first, theirs, strict=True)) / n
    assert scores.reference_top1 == 100 * sum(a == b for a, b in zip(theirs, labels, strict=True)) / n
    assert seen[0] == (0, n)
    assert seen[-1] == (n, n)


def test_a_dead_network_gains_nothing() -> None:
    samples, outputs = table([[0.0] * 10] * 10, list(range(10)))
    scores = evaluate(lookup(outputs), samples)
    assert (scores.top1, scores.top5) == (10.0, 50.0)


def test_limit_scores_evenly_spaced_samples() -> None:
    samples, outputs = table([[0.0, 1.0]] * 5 + [[1.0, 0.0]] * 5, [1] * 10)
    assert evaluate(lookup(outputs), samples, limit=4).top1 == 50.0
    assert evaluate(lookup(outputs), samples, limit=99).n == 10


def test_without_labels_only_agreement() -> None:
    samples, outputs = table([[0.0, 1.0], [1.0, 0.0]], None)
    scores = evaluate(lookup(outputs), samples, reference=lookup(-outputs))
    assert (scores.top1, scores.top5, scores.agreement, scores.reference_top1) == (None, None, 0.0, None)
    with pytest.raises(PcqError, match=r"no labels.*--reference"):
        evaluate(lookup(outputs), samples)


@pytest.mark.parametrize(("bad", "told"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_an_output_that_is_no_number_is_named(bad: float, told: str) -> None:
    outputs = [[0.0, 1.0]] * 10
    outputs[7] = outputs[8] = [0.0, bad]
    samples, looked_up = table(outputs, [0] * 10)
    with pytest.raises(CheckFailed, match=f"sample 7 of table: .*{told} for 2 of a batch of 3"):
        evaluate(lookup(looked_up), samples, batch=3)
    outputs[7] = outputs[9] = [0.0, -bad if bad > 0 else 0.0]
    samples, looked_up = table(outputs, [0] * 10)
    with pytest.raises(CheckFailed, match="sample 8 of table"):
        evaluate(lookup(looked_up), samples, batch=4, limit=5)


def test_outputs_that_do_not_fit() -> None:
    samples, outputs = table([[0.0, 1.0]] * 3, [0, 1, 2])
    with pytest.raises(PcqError, match=r"a label is 2\. Allowed: 0 to 1"):
        evaluate(lookup(outputs), samples)
    samples, outputs = table([[0.0, 1.0]] * 3, [0, 1, 1])
    for wrong in (outputs[:, 0], outputs[:1], outputs[:, :, None, None].expand(3, 2, 2, 2)):
        with pytest.raises(PcqError, match="its output for 3 samples has shape"):
            evaluate(lambda x, wrong=wrong: wrong, samples)
    assert evaluate(lambda x: outputs[:, :, None, None], samples).n == 3
    with pytest.raises(PcqError, match="reference: it has 3 outputs and the network 2"):
        evaluate(lookup(outputs), samples, reference=lookup(torch.zeros(3, 3)))
    with pytest.raises(PcqError, match="10 classes and the network 4 outputs"):
        evaluate(lambda x: torch.zeros(len(x), 4), open_data("digits"))


class Net(nn.Module):
    """Linear with dropout, to see eval mode; returns what ``wrap`` makes of its output."""

    def __init__(self, wrap=lambda out: out):  # type: ignore[no-untyped-def]
        super().__init__()
        self.fc, self.drop, self.wrap = nn.Linear(3, 4), nn.Dropout(0.9), wrap

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wrap(self.fc(self.drop(x)))
        return out


class Output(dict):  # type: ignore[type-arg]
    """As Hugging Face's: a dict with attributes."""

    @property
    def logits(self) -> Tensor:
        out: Tensor = self["logits"]
        return out


@pytest.mark.parametrize(
    "wrap",
    [
        lambda out: out,
        lambda out: (out, out + 1),
        lambda out: {"out": out, "aux": out + 1},
        lambda out: {"hidden": out + 1, "logits": out},
        lambda out: ({"hidden": out + 1, "logits": (out, out + 2)}, out + 3),
        lambda out: Output(loss=out.sum(), logits=out),
    ],
)
def test_a_module_runs_in_eval_mode_without_gradients(wrap) -> None:  # type: ignore[no-untyped-def]
    net, x = Net(wrap), torch.randn(5, 3)
    out = module_predictor(net)(x)
    assert not out.requires_grad
    assert torch.equal(out, net.fc(x))


def test_a_module_runs_in_its_own_precision() -> None:
    net, x = Net().bfloat16(), torch.randn(5, 3)
    out = module_predictor(net)(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, net.fc(x.bfloat16()).float())


def test_a_module_that_does_not_take_the_samples() -> None:
    with pytest.raises(PcqError, match="samples of 7: the network does not take them: mat1 and mat2"):
        module_predictor(Net())(torch.randn(2, 7))
    with pytest.raises(PcqError, match="it returns a str"):
        module_predictor(Net(lambda out: "logits"))(torch.randn(2, 3))


def onnx_linear(
    path: Path, batch: str | int, dtype: int = TensorProto.FLOAT, inputs: int = 1, width: str | int = 3
) -> tuple[Tensor, Tensor]:
    """x [batch, width] @ w [3, 4] + b, saved; ``-> w, b``."""
    w, b = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.arange(4.0)
    half = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x0", "w", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info(f"x{i}", dtype, [batch, width]) for i in range(inputs)],
        [helper.make_tensor_value_info("y", dtype, [batch, 4])],
        [onnx.numpy_helper.from_array(v.numpy().astype(half), n) for n, v in (("w", w), ("b", b))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)
    return w, b


@pytest.mark.parametrize("batch", ["n", 1, 4, 16])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_onnx_runs_any_number_of_samples(tmp_path: Path, batch: str | int, dtype: int) -> None:
    w, b = onnx_linear(tmp_path / "m.onnx", batch, dtype)
    predict = onnx_predictor(tmp_path / "m.onnx")
    for n in (1, 3, 4, 9):
        x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
        out = predict(x)
        assert out.shape == (n, 4)
        assert torch.allclose(out, x @ w + b, atol=1e-5 if dtype == TensorProto.FLOAT else 2e-2)


def test_logits_in_a_dictionary_are_scored_in_the_onnx_file_too(tmp_path: Path) -> None:
    net, x = Net(lambda out: {"hidden": out[:, :2] + 1, "logits": out}).eval(), torch.randn(5, 3)
    weight = net.fc.weight.detach()
    kept = qtensor.quantize(Uniform(8), weight, Rows(tuple(weight.shape), 0))
    with torch.no_grad():
        net.fc.weight.copy_(kept.dequantize())
    write_onnx(net, {"fc.weight": kept}, (x,), tmp_path / "m.onnx")
    out = onnx_predictor(tmp_path / "m.onnx")(x)
    assert out.shape == (5, 4)
    assert torch.allclose(out, module_predictor(net)(x), atol=1e-5)


def test_onnx_files_that_cannot_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PcqError, match="no such file"):
        onnx_predictor(tmp_path / "no.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(PcqError, match=r"ONNX Runtime \S+ cannot load it"):
        onnx_predictor(tmp_path / "bad.onnx")
    onnx_linear(tmp_path / "two.onnx", "n", inputs=2)
    with pytest.raises(PcqError, match=r"it has 2 inputs \(x0, x1\)"):
        onnx_predictor(tmp_path / "two.onnx")
    onnx_linear(tmp_path / "m.onnx", "n")
    with pytest.raises(PcqError, match=r"m\.onnx: samples of 5: the model takes 3"):
        onnx_predictor(tmp_path / "m.onnx")(torch.randn(2, 5))
    with pytest.raises(PcqError, match=r"takes floats as x0, and the data has whole numbers\. Store them as float32"):
        onnx_predictor(tmp_path / "m.onnx")(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(PcqError, match="samples of 5x4x1.*If the channels are last, put them first"):
        onnx_predictor(tmp_path / "m.onnx")(torch.randn(2, 5, 4, 1))
    with pytest.raises(PcqError, match="network does not take them.*If the channels are last, put them first"):
        module_predictor(Net())(torch.randn(2, 5, 7, 1))
    onnx_linear(tmp_path / "open.onnx", "n", width="k")  # its widths are known to the weights only
    with pytest.raises(PcqError, match=r"open\.onnx: ONNX Runtime \S+ cannot run it: "):
        onnx_predictor(tmp_path / "open.onnx")(torch.randn(2, 5))
    assert capfd.readouterr() == ("", "")  # ONNX Runtime's own words are in the sentence


def test_the_demo_network_scores_what_its_record_says() -> None:
    net = resnet8()
    net.load_state_dict(load_file(Path(__file__).parents[1] / "pcq/demo/digits-resnet8.safetensors"))
    for split in ("test", "val"):
        assert evaluate(module_predictor(net), open_data("digits", split), batch=150).top1 == 99.5


def test_one_number_is_no_prediction() -> None:
    x = torch.randn(40, 1)
    data = from_arrays("a", "test", x, None)
    scores = evaluate(lambda x: x * 0.5, data, reference=lambda x: x, batch=7)
    assert scores.agreement is None
    variance = (x - x.mean()).double().square().sum()
    assert scores.explained == pytest.approx(100 * (1 - float((x / 2).double().square().sum() / variance)), abs=1e-4)
    labelled = from_arrays("a", "test", x, torch.zeros(40))
    with pytest.raises(PcqError, match=r"labels and the network one output, .* --reference MODEL"):
        evaluate(lambda x: x, labelled, reference=lambda x: x)


def test_what_both_mask_does_not_count() -> None:
    aim, y = torch.randn(2, 9, 4, 3)
    hidden = torch.rand(9, 4, 3) < 0.3
    found = Likeness.of(y.masked_fill(hidden, -torch.inf), aim.masked_fill(hidden, -torch.inf)).explained
    mean = aim.masked_fill(hidden, 0).sum(0) / (~hidden).sum(0)
    apart, spread = ((each.double().square() * ~hidden).sum() for each in (y - aim, aim - mean))
    assert found == pytest.approx(100 * (1 - float(apart / spread)), abs=1e-3)


def test_few_rows_and_none_have_a_likeness() -> None:
    aim = torch.randn(1, 3, 4)
    assert Likeness.of(aim * 0.9, aim).explained == pytest.approx(99)
    assert Likeness.of(torch.ones(5, 2) * 1.1, torch.ones(5, 2)).explained < -1e6
    none = Likeness.of(aim[:0], aim[:0])
    assert (none + Likeness.of(aim, aim)).explained == 100


def test_parts_make_the_whole_exactly() -> None:
    y, aim = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    for n, k in [(m, k) for m in range(1, 120) for k in range(m + 1)]:
        parts = [
            Scores(n, 100 * k / n, None, 50.0, 0.0, Likeness.of(y[:10], aim[:10])),
            Scores(200, 29.0, None, 50.0, None, Likeness.of(y[10:], aim[10:])),
        ]
        assert merged(parts).top1 == 100 * (k + 58) / (n + 200)
    whole = merged(parts)
    assert whole.n == 319
    assert whole.top5 is whole.reference_top1 is None
    assert whole.explained == pytest.approx(Likeness.of(y, aim).explained)


def test_what_torchvisions_compiled_half_is_needed_for_is_told() -> None:
    told = r"samples of 3x2: .* Install the torchvision that is built for this torch"
    with pytest.raises(PcqError, match=told), refusing([torch.zeros(4, 3, 2)], "Give other samples"):
        raise RuntimeError("Couldn't load custom C++ ops. This can happen if your PyTorch and torchvision differ")
