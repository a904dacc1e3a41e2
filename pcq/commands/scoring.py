"""Scores of a checkpoint, an artifact or an ONNX file on data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pcq.commands.networks import ONNX_SUFFIX, keys, open_network, recorded
from pcq.progress import Progress, silent

if TYPE_CHECKING:
    from pcq.scores import Scores


@dataclass(frozen=True)
class EvalResult:
    """Scores of one network on one data set (percent); see ``pcq.scores.Scores``."""

    path: Path
    data: str
    runtime: str
    scores: "Scores"


def evaluate(
    path: str | Path,
    data: str,
    *,
    arch: str | None = None,
    reference: str | Path | None = None,
    split: str = "test",
    batch: int = 256,
    limit: int | None = None,
    key: str | None = None,
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
    progress: Progress = silent,
) -> EvalResult:
    """Score a float checkpoint, an artifact, or an ONNX file (through ONNX Runtime) on a data spec.

    Args:
        path: what to score.
        data: a data spec, such as ``digits`` or ``folder:DIR``; see ``pcq.data``.
        arch: the architecture, where it is neither recorded nor recognised.
        reference: a float checkpoint; agreement (equal top-1) with it is reported, and is all there is to report
            where the data has no labels. Its architecture is the one recorded at ``path``, where nothing else says it.
        split: ``test``, ``val`` or ``train``.
        batch: samples per batch; the scores do not depend on it.
        limit: stop after so many samples.
        key: which state dict to open, where a checkpoint, or the reference, holds several.
        allow_globals, unsafe_pickle: as for :func:`pcq.quantize`.

    Raises:
        PcqError: the file, the architecture or the data is not usable.
    """
    from pcq.data import open_data
    from pcq.scores import evaluate as score

    opened = open_data(data, split)
    files = [Path(each) for each in (path, reference) if each is not None]
    chosen = keys(files, key, allow_globals, unsafe_pickle)
    predict, runtime = predictor(Path(path), arch, None, chosen[0], allow_globals, unsafe_pickle)
    compared = None
    if reference is not None:
        known = None if arch is not None else recorded(Path(path))
        compared, _ = predictor(Path(reference), arch, known, chosen[1], allow_globals, unsafe_pickle)
    scores = score(predict, opened, reference=compared, batch=batch, limit=limit, progress=progress)
    return EvalResult(Path(path), opened.describe(), runtime, scores)


def predictor(
    path: Path,
    arch: str | None,
    otherwise: str | None,
    key: str | None,
    allow_globals: Sequence[str],
    unsafe_pickle: bool,
) -> "tuple[Callable[[Tensor], Tensor], str]":
    """What runs the file, and in which runtime."""
    from pcq.scores import module_predictor, onnx_predictor

    if path.suffix == ONNX_SUFFIX:
        return onnx_predictor(path), "ONNX Runtime"
    network = open_network(
        path, arch, otherwise=otherwise, key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle
    )
    return module_predictor(network.module), "torch"
