"""What an ONNX file's outputs lose against another's, on samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from pcq.data.inputs import named_mask, of_tokens
from pcq.errors import PcqError, first_line
from pcq.export import verify
from pcq.likeness import Likeness
from pcq.logits import flat, main_name, predicts
from pcq.progress import Progress, silent

Batch = Tensor | tuple[Tensor, ...]
"""Of the network's input, or of all of its inputs in their order."""

Samples = Sequence[tuple[Batch, Tensor | None]]
"""Batches with their labels, if there are any."""

Outputs = Sequence[npt.NDArray[np.float32]]
"""Those of a network on all samples, the one that counts first."""


SURE = 0.5
"""Probability of a prediction that is no matter of luck."""


@dataclass(frozen=True)
class Drop:
    """The int8 file beside the exact one on held-out samples.

    Attributes:
        n: samples.
        relative_l2: distance of the outputs, relative to the exact ones; of several that of the farthest.
        agreement: percent of equal predictions; None where the output is not ``[n, classes]``.
        exact, int8: top-1 in percent; None without labels.
        explained: of outputs that are not, percent of their variance about their mean, without tokens that a mask
            hides; see ``pcq.likeness.Likeness``.
        sure: of predictions, how many the exact file gives a probability of ``SURE`` or more.
        sure_equal: how many of these are equal.
    """

    n: int
    relative_l2: float
    agreement: float | None
    exact: float | None
    int8: float | None
    explained: float | None = None
    sure: int = 0
    sure_equal: int = 0

    @property
    def points(self) -> float:
        """What int8 costs: points of top-1, without labels percent of predictions, without these of the variance."""
        if self.exact is not None and self.int8 is not None:
            return self.exact - self.int8
        return 100 - next(value for value in (self.agreement, self.explained) if value is not None)


def compare(exact: Outputs, int8: Outputs, labels: Sequence[Tensor | None], mask: Tensor | None = None) -> Drop:
    """Both files' outputs, and the labels batch by batch; of outputs of tokens those that ``mask`` [n, t] leaves."""
    inputs, at = ((), None) if mask is None else ((mask,), 0)
    seen = [[of_tokens(torch.from_numpy(y), inputs, at).numpy() for y in each] for each in (int8, exact)]
    distance = max(_distance(a, b) for a, b in zip(*seen, strict=True))
    known = [y for y in labels if y is not None]
    ours, theirs = (flat(each[0], bool(known)) for each in (int8, exact))
    if not predicts(theirs):
        alike = Likeness.of(*(torch.from_numpy(each[0]) for each in seen))
        return Drop(len(theirs), distance, None, None, None, alike.explained)
    sure = _sure(theirs)
    ours, theirs = ours.argmax(1), theirs.argmax(1)
    truth = torch.cat(known).numpy() if known and len(known) == len(labels) else None
    return Drop(
        len(theirs), distance, 100 * float((ours == theirs).mean()),
        None if truth is None else 100 * float((theirs == truth).mean()),
        None if truth is None else 100 * float((ours == truth).mean()),
        sure=int(sure.sum()), sure_equal=int((ours == theirs)[sure].sum()),
    )  # fmt: skip


def _sure(y: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Which rows have a choice of probability ``SURE`` or more; what are no probabilities are taken for logits."""
    shares = torch.from_numpy(y).double()
    if not (bool((shares >= 0).all()) and torch.allclose(shares.sum(1), shares.new_ones(()), atol=1e-3)):
        shares = shares.softmax(1)
    found: npt.NDArray[np.bool_] = (shares.amax(1) >= SURE).numpy()
    return found


def _distance(ours: npt.NDArray[np.float32], exact: npt.NDArray[np.float32]) -> float:
    masked = np.isinf(exact) & (ours == exact)
    ours, exact = (np.where(masked, 0, each) for each in (ours, exact))
    distance = float(np.linalg.norm((ours - exact).astype(np.float64)) / max(1e-30, float(np.linalg.norm(exact))))
    return distance if np.isfinite(distance) else float("inf")


def each_input(batch: Batch) -> tuple[Tensor, ...]:
    """A tensor for each input."""
    return batch if isinstance(batch, tuple) else (batch,)


def token_mask(names: Sequence[str], samples: Samples) -> Tensor | None:
    """The samples' mask of tokens [n, t], by the names of the inputs; None where there is none."""
    at = named_mask(names, each_input(samples[0][0]))
    return None if at is None else torch.cat([each_input(x)[at] for x, _ in samples])


def arrays(batch: Batch) -> list[npt.NDArray[Any]]:
    """One for each input."""
    return [x.numpy() for x in each_input(batch)]


def outputs(path: Path, samples: Samples, stage: str = "", progress: Progress = silent) -> Outputs:
    """The output that counts, on all samples; behind it the others that hold floats for each sample."""
    session: ort.InferenceSession = verify.open_session(str(path), optimised=True)
    names = [value.name for value in session.get_inputs()]
    made = {value.name: value for value in session.get_outputs()}
    main, batch = main_name(list(made)), session.get_inputs()[0].shape[:1]
    others = [
        n for n, v in made.items() if n != main and v.type == "tensor(float)" and v.shape and v.shape[:1] == batch
    ]
    try:
        feeds = (dict(zip(names, arrays(x), strict=True)) for x, _ in samples)
        runs: list[list[npt.NDArray[np.float32]]] = []
        progress(stage, 0, len(samples))
        for feed in feeds:
            runs.append(session.run([main, *others], feed))
            progress(stage, len(runs), len(samples))
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]
    except Exception as error:  # onnxruntime's exceptions share no class of their own
        raise PcqError(f"the network does not take the samples: {first_line(error)}", where="--calib") from error
