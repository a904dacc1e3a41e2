"""Run a network over a data set: top-1, top-5, and agreement with another network, exact whatever the batches.

A prediction is the first of the largest outputs; a sample counts for top-5 if fewer than five outputs are larger than
its label's, or equal and before it. So a network whose outputs are all equal predicts class 0 and gains nothing by it.

Outputs that are not [b, classes] (a token's states, a map, one number) have no prediction: without labels they are
compared with another network's by how much of their variance they explain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcq.data import Data, Inputs
from pcq.data.inputs import filled, held_batch, of_tokens, refuse_kind, refuse_others, refusing
from pcq.errors import CheckFailed, PcqError, first_line
from pcq.likeness import Likeness
from pcq.logits import flat, main_name, main_output, predicts
from pcq.progress import Progress, silent
from pcq.words import dimensions

Predictor = Callable[..., Tensor]
"""Samples [b, ...], a tensor for each input -> outputs [b, classes], or others [b, ...]."""


def misfit(data: Data, outputs: int, where: str, todo: str) -> PcqError | None:
    """Why labels or classes of ``data`` are not those of a network of so many outputs; None: they are.

    ``todo``: what else to do where there is one output for labels.
    """
    if data.labels is not None and outputs < 2:
        what = "the data has labels and the network one output, by which no class can be told from another"
        return PcqError(what, where=where, allowed="an output for each class", todo=f"Leave the labels out{todo}")
    if data.classes and len(data.classes) != outputs:
        what = f"the data has {len(data.classes)} classes and the network {outputs} outputs"
        todo = "For a folder with some of the classes only, list all of them in a file: folder:DIR?classes=FILE"
        return PcqError(what, where=where, todo=todo)
    if data.highest is not None and data.highest >= outputs:
        return PcqError(f"a label is {data.highest}", where=where, allowed=f"0 to {outputs - 1}, the outputs")
    return None


@dataclass(frozen=True)
class Scores:
    """Percent of ``n`` samples; None where there are no labels, or no reference.

    Attributes:
        n: samples scored.
        top1: the label is the prediction.
        top5: the label is among the first five; None below six classes.
        agreement: the prediction is the reference's.
        reference_top1: the reference's top-1.
        likeness: of outputs that are not [b, classes] to the reference's; of tokens, those that no mask hides.
    """

    n: int
    top1: float | None
    top5: float | None
    agreement: float | None
    reference_top1: float | None
    likeness: Likeness | None = None

    @property
    def explained(self) -> float | None:
        """Percent of the variance of the reference's outputs."""
        return None if self.likeness is None else self.likeness.explained

    def to_json(self) -> dict[str, float | None]:
        """Every number by its name."""
        names = ("n", "top1", "top5", "agreement", "reference_top1", "explained")
        return {name: getattr(self, name) for name in names}


def evaluate(
    predict: Predictor,
    data: Data,
    *,
    reference: Predictor | None = None,
    batch: int = 256,
    limit: int | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score ``predict`` on ``data``, and against ``reference``.

    Args:
        predict: the network.
        data: labelled; or unlabelled, with a reference.
        reference: another network of as many outputs.
        batch: samples at once; the scores do not depend on it.
        limit: only so many samples, evenly spaced.
        progress: called with "scoring", samples done and samples in all.

    Raises:
        PcqError: there is nothing to score by, the network does not take the data, or their outputs differ.
        CheckFailed: an output is not a number.
    """
    if data.labels is None and reference is None:
        todo = "Give a network to compare with, such as the float one: --reference CHECKPOINT"
        raise PcqError("the data has no labels", where=data.name, todo=todo)
    order = data.order(limit)
    n = len(order)
    done = first = fifth = agreeing = theirs = width = 0
    likeness: Likeness | None = None
    progress("scoring", 0, n)
    for x, y in data.batches(batch, order=order):
        inputs = data.inputs(x)
        out = _outputs(predict, inputs, data, order[done:])
        other = None if reference is None else _outputs(reference, inputs, data, order[done:])
        if other is not None and other.shape != out.shape:
            has, wants = (dimensions(each.shape[1:]) for each in (other, out))
            raise PcqError(f"it has {has} outputs and the network {wants}", where="reference")
        guess = out.argmax(-1)
        if other is not None and (y is not None or predicts(out)):
            compared = other.argmax(-1)
            agreeing += int((guess == compared).sum())
        elif other is not None:
            part = Likeness.of(*(of_tokens(each, inputs, data.mask) for each in (out, other)))
            likeness = part if likeness is None else likeness + part
        if y is not None:
            width = out.shape[1]
            first += int((guess == y).sum())
            fifth += int((_rank(out, y) < 5).sum())
            theirs += 0 if reference is None else int((compared == y).sum())
        done += len(x)
        progress("scoring", done, n)
    assert done == n
    labelled, compares = data.labels is not None, reference is not None
    return Scores(
        n,
        100 * first / n if labelled else None,
        100 * fifth / n if labelled and width > 5 else None,
        100 * agreeing / n if compares and likeness is None else None,
        100 * theirs / n if labelled and compares else None,
        likeness,
    )


def merged(parts: Sequence[Scores]) -> Scores:
    """The scores of a set from those of its parts, exact."""
    n = sum(part.n for part in parts)

    def percent(values: Sequence[float | None]) -> float | None:
        counts = [round(v * part.n / 100) for v, part in zip(values, parts, strict=True) if v is not None]
        return 100 * sum(counts) / n if len(counts) == len(parts) else None

    columns = ("top1", "top5", "agreement", "reference_top1")
    alike = [part.likeness for part in parts if part.likeness is not None]
    top1, top5, agreement, reference_top1 = (percent([getattr(part, column) for part in parts]) for column in columns)
    return Scores(n, top1, top5, agreement, reference_top1, reduce(add, alike) if alike else None)


def _rank(out: Tensor, y: Tensor) -> Tensor:
    """How many outputs come before the label's: larger ones, and equal ones of lower number."""
    own = out.gather(1, y[:, None])
    before = torch.arange(out.shape[1])[None] < y[:, None]
    return ((out > own) | ((out == own) & before)).sum(1)


def _outputs(predict: Predictor, inputs: Inputs, data: Data, numbers: Tensor) -> Tensor:
    """Checked: [b, classes], no NaN and no infinity (masked outputs may be -infinity), as many classes as the data.

    Without labels others of any shape, [b, ...].
    """
    out, b = flat(predict(*inputs), data.labels is not None), len(inputs[0])
    if out.ndim == 0 or len(out) != b or (out.ndim != 2 and data.labels is not None):
        raise PcqError(f"its output for {b} samples has shape {list(out.shape)}", where="the network",
                       allowed=f"[{b}, classes]")  # fmt: skip
    instead = ", and say what to compare with: --reference MODEL"
    if out.ndim == 2 and (wrong := misfit(data, out.shape[1], data.name, instead)) is not None:
        raise wrong
    if bad := (out.isnan() | (out == torch.inf)).reshape(b, -1).any(1).nonzero().flatten().tolist():
        kind = "NaN" if out.isnan().any() else "infinite"
        where = f"sample {int(numbers[bad[0]])} of {data.name}"
        raise CheckFailed(f"the network's output is {kind} for {len(bad)} of a batch of {b} samples", where=where)
    return out


def channels_last(x: Tensor) -> str:
    """What to do about samples that are refused, where they may be images in another order; else nothing."""
    last = x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3)
    return "If the channels are last, put them first: [n, c, h, w]" if last else ""


def module_predictor(module: nn.Module) -> Callable[..., Tensor]:
    """``module`` in eval mode without gradients, on the device and in the precision of its first parameter.

    It takes samples, one tensor for each input. Of several outputs the one called ``logits`` counts, else the
    first. The fixed batch of an exported program is filled up with zeros.
    """
    module.eval()
    held = held_batch(module)
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)

    def predict(*inputs: Tensor) -> Tensor:
        if parameter is not None:
            inputs = tuple(x.to(parameter.device, parameter.dtype if x.is_floating_point() else None) for x in inputs)
        if held is None or len(inputs[0]) == held:
            return run(inputs)
        parts = zip(*(x.split(held) for x in inputs), strict=True)
        return torch.cat([run(tuple(filled(x, held) for x in part))[: len(part[0])] for part in parts])

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        todo = next((said for x in inputs if (said := channels_last(x))), "")
        with refusing(inputs, todo), torch.no_grad():
            out: Any = module(*inputs)
        out = main_output(out)
        if not isinstance(out, Tensor):
            raise PcqError(f"it returns a {type(out).__name__}", where="the network", allowed="a tensor [b, classes]")
        return out.float().cpu()

    return predict


def onnx_predictor(path: str | Path, names: Sequence[str] = ()) -> Callable[..., Tensor]:
    """The ONNX file in ONNX Runtime on the CPU. Of its outputs ``logits`` counts, else the first.

    A fixed batch is filled up with zeros.

    Args:
        path: the file.
        names: what samples it will be given, where it has several inputs: one tensor for each name.

    Raises:
        PcqError: no such file, no ONNX model, a model that this ONNX Runtime cannot run, or one of other inputs.
    """
    import onnxruntime as ort

    path = Path(path)
    if not path.is_file():
        raise PcqError("there is no such file", where=str(path))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        told = first_line(error)
        raise PcqError(f"ONNX Runtime {ort.__version__} cannot load it: {told}", where=str(path)) from error
    inputs = {value.name: value for value in session.get_inputs()}
    refuse_others(list(inputs), names, str(path))
    taken = [inputs[name] for name in names] or list(inputs.values())
    output = main_name([value.name for value in session.get_outputs()])
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    dtypes |= {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}  # type: ignore[dict-item]
    if strange := [value.type for value in taken if value.type not in dtypes]:
        raise PcqError(f"its input is a {strange[0]}", where=str(path), allowed=", ".join(dtypes))
    fixed = next((value.shape[0] for value in taken if value.shape and isinstance(value.shape[0], int)), None)

    def run(parts: Sequence[Tensor]) -> Tensor:
        feed = {
            value.name: np.ascontiguousarray(x.numpy(), dtype=dtypes[value.type])
            for value, x in zip(taken, parts, strict=True)
        }
        try:
            return torch.from_numpy(np.asarray(session.run([output], feed)[0], dtype=np.float32))
        except Exception as error:
            told = first_line(error)
            raise PcqError(f"ONNX Runtime {ort.__version__} cannot run it: {told}", where=str(path)) from error

    def check(value: Any, x: Tensor) -> None:
        refuse_kind(x.is_floating_point(), np.dtype(dtypes[value.type]), value.name, str(path), only=len(taken) == 1)
        takes = [size if isinstance(size, int) else None for size in (value.shape or [])[1:]]
        sizes = list(x.shape[1:])
        if value.shape and (
            len(sizes) != len(takes) or any(b not in (None, a) for a, b in zip(sizes, takes, strict=True))
        ):
            what = f"samples of {dimensions(sizes)}: the model takes {dimensions(takes)}"
            what += f" as {value.name}" if len(taken) > 1 else ""
            raise PcqError(what, where=str(path), todo=channels_last(x))

    def predict(*samples: Tensor) -> Tensor:
        for value, x in zip(taken, samples, strict=True):
            check(value, x)
        if fixed is None:
            return run(samples)
        parts = zip(*(x.split(fixed) for x in samples), strict=True)
        return torch.cat([run([filled(x, fixed) for x in part])[: len(part[0])] for part in parts])

    return predict
