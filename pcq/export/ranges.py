"""Ranges of activations: what 8-bit codes of a tensor have to span, from runs of the float network.

All give an interval that contains 0 and lies within what was seen: ``minmax`` all of it, ``percentile`` all but 1e-4 of
the numbers at each end that is not 0, ``mse`` the one whose 8-bit rounding has the least squared error, ``entropy`` the
one whose 8-bit histogram has the least Kullback-Leibler divergence from the numbers' own. The last three look at a
histogram of 2048 bins and cost a second run.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch

from pcq.activations import FULL, Range
from pcq.errors import CheckFailed
from pcq.export.drop import Batch, arrays
from pcq.progress import Progress, silent

Method = Literal["minmax", "percentile", "mse", "entropy"]
BINS, TAIL, STEPS = 2048, 1e-4, 48
Histogram = npt.NDArray[np.float64]


def observe(
    path: Path,
    tops: Mapping[str, int],
    batches: Callable[[], Iterable[Batch]],
    method: Method,
    progress: Progress = silent,
) -> dict[str, Range]:
    """Run the float ONNX file and choose a range for each tensor in ``tops``, which says its last code.

    Args:
        path: the file.
        batches: gives the samples, anew at each call.

    Raises:
        CheckFailed: a tensor is not finite.
    """
    from pcq.export.verify import open_session

    names, model = list(tops), onnx.load_model(path)
    given = [value.name for value in model.graph.input]
    known = {output.name for output in model.graph.output}
    inner = [name for name in names if name not in given]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inner if name not in known)
    session = open_session(model.SerializeToString(), optimised=True)

    def runs(stage: str) -> Iterable[Mapping[str, npt.NDArray[np.float32]]]:
        for done, batch in enumerate(batches()):
            progress(stage, done, 0)
            feed = dict(zip(given, arrays(batch), strict=True))
            seen = session.run(inner, feed) if inner else []  # asked for nothing, it gives all outputs
            yield dict(zip(inner, seen, strict=True)) | feed

    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for tensors in runs("observe ranges"):
        for name in names:
            ends = float(tensors[name].min()), float(tensors[name].max())
            if not np.isfinite(ends).all():
                raise CheckFailed("it is not finite on the calibration samples", where=name)
            low[name], high[name] = min(low[name], ends[0]), max(high[name], ends[1])
    if method == "minmax":
        return {name: Range(low[name], high[name], top) for name, top in tops.items()}
    counts = {name: np.zeros(BINS) for name in names}
    for tensors in runs("count ranges"):
        for name in names:
            seen, ends = torch.from_numpy(tensors[name]), (low[name], max(high[name], low[name] + 1e-9))
            counts[name] += torch.histc(seen, BINS, *ends).numpy()
    return {name: narrowed(counts[name], low[name], high[name], method, top) for name, top in tops.items()}


def narrowed(counts: Histogram, low: float, high: float, method: Method, top: int = FULL) -> Range:
    """The interval within ``low .. high`` that ``method`` prefers for numbers with this histogram."""
    edges = np.linspace(low, high, len(counts) + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    share = counts / max(1.0, counts.sum())
    if method == "percentile":
        below = np.cumsum(share)
        first, last = int(np.searchsorted(below, TAIL)), int(np.searchsorted(below, 1 - TAIL))
        return Range(min(0.0, float(edges[first])), max(0.0, float(edges[min(last + 1, len(counts))])), top)
    loss = _squared if method == "mse" else _divergence
    parts = np.linspace(1, 0.1, STEPS)
    candidates = [Range(low * part, high * part, top) for part in parts]
    best = min(candidates, key=lambda one: loss(share, middles, one))
    candidates = [Range(best.low * part, best.high, top) for part in parts] + [
        Range(best.low, best.high * part, top) for part in parts
    ]
    return min([best, *candidates], key=lambda one: loss(share, middles, one))


def _rounded(middles: Histogram, span: Range) -> Histogram:
    scale, zero = float(span.scale), float(span.zero_point)
    return (np.clip(np.rint(middles / scale) + zero, 0, span.top) - zero) * scale


def _squared(share: Histogram, middles: Histogram, span: Range) -> float:
    return float((share * (middles - _rounded(middles, span)) ** 2).sum())


def _divergence(share: Histogram, middles: Histogram, span: Range) -> float:
    """KL(numbers || codes): each code's numbers are spread evenly over the bins that it stands for; what is clipped has
    its own bins' share against nothing but the end code. The bin of 0, which every range holds exactly, does not count:
    behind a Relu it has half of the numbers, and the rest would weigh little beside it."""
    share = np.where(np.abs(middles) > 0.501 * (middles[1] - middles[0]), share, 0)
    codes = np.rint((_rounded(middles, span) - span.low) / float(span.scale)).astype(int).clip(0, span.top)
    used = share > 0
    total = np.bincount(codes, share, 256)
    inside = used & (middles >= span.low) & (middles <= span.high)
    bins = np.bincount(codes[inside], minlength=256)
    spread = total[codes] / np.maximum(bins[codes], 1)
    kept = np.where(inside, spread, 1e-9)
    return float((share[used] * np.log(share[used] / np.maximum(kept[used], 1e-12))).sum())
