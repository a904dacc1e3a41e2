"""Scores of a checkpoint, an artifact or an ONNX file on data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pcq.commands.networks import ONNX_SUFFIX, keys, open_network, recorded
from pcq.errors import PcqError
from pcq.progress import Progress, silent

if TYPE_CHECKING:
    from pcq.data import Data
    from pcq.scores import Predictor, Scores


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
        data: a data spec, such as ``digits`` or ``folder:DIR``; see ``pcq.data``. Of a network of several inputs an
            ``.npz`` or a function with an array for each, named as the arguments of its ``forward`` or the inputs of
            the ONNX file, and labels as ``y``.
        arch: the architecture, where it is neither recorded nor recognised.
        reference: a float checkpoint; agreement (equal top-1) with it is reported, and is all there is to report
            where the data has no labels. Its architecture is the one recorded at ``path``, where nothing else says it.
        split: ``test``, ``val`` or ``train``.
        batch: samples per batch; the scores do not depend on it.
        limit: only so many samples, evenly spaced.
        key: which state dict to open, where a checkpoint, or the reference, holds several.
        allow_globals, unsafe_pickle: as for :func:`pcq.quantize`.

    Raises:
        PcqError: the file, the architecture or the data is not usable.
    """
    from pcq.data import open_inputs
    from pcq.data.inputs import numbers
    from pcq.scores import evaluate as score

    files = [Path(each) for each in (path, reference) if each is not None]
    theirs = {"--arch": arch, "--allow-global": allow_globals, "--unsafe-pickle": unsafe_pickle}
    if all(file.suffix == ONNX_SUFFIX for file in files) and (asked := [name for name, said in theirs.items() if said]):
        what = "this is about checkpoints, and an ONNX file was given"
        raise PcqError(what, where=", ".join(asked), todo="Leave it out")
    opened = open_inputs(data, split, lambda arrays: numbers(arrays, data))
    chosen = keys(files, key, allow_globals, unsafe_pickle)
    predict, runtime = predictor(Path(path), arch, None, chosen[0], allow_globals, unsafe_pickle, opened)
    compared = None
    if reference is not None:
        known = None if arch is not None else recorded(Path(path))
        compared, _ = predictor(Path(reference), arch, known, chosen[1], allow_globals, unsafe_pickle, opened)
    scores = score(predict, opened, reference=compared, batch=batch, limit=limit, progress=progress)
    return EvalResult(Path(path), opened.describe(), runtime, scores)


def predictor(
    path: Path,
    arch: str | None,
    otherwise: str | None,
    key: str | None,
    allow_globals: Sequence[str],
    unsafe_pickle: bool,
    data: "Data",
) -> "tuple[Predictor, str]":
    """What runs the file on ``data``, and in which runtime.

    Raises:
        PcqError: the file is not usable, or takes other inputs.
    """
    from pcq.data.inputs import in_order, refuse_one
    from pcq.scores import module_predictor, onnx_predictor

    if path.suffix == ONNX_SUFFIX:
        return onnx_predictor(path, tuple(data.arrays)), "ONNX Runtime"
    network = open_network(
        path, arch, otherwise=otherwise, key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle
    )
    run = module_predictor(network.module)
    if data.arrays:
        order = [list(data.arrays).index(name) for name in in_order(data.arrays, network.module, data.name)]
        return lambda *samples: run(*(samples[i] for i in order)), "torch"
    refuse_one(network.module, str(path), data.notes)
    return run, "torch"
