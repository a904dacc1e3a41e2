"""From an artifact to packed ONNX."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from pcq import checkpoint
from pcq.commands.networks import ONNX_SUFFIX, load_network
from pcq.errors import PcqError, refuse_other
from pcq.progress import Progress, silent

if TYPE_CHECKING:
    from pcq.commands.networks import Network
    from pcq.data import Data
    from pcq.export import Int8Report, OnnxReport
    from pcq.export.tracing import Example

SAMPLES = 256
BATCH = 8


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export_onnx` wrote: the ONNX file, and the proof it passed (see ``pcq.export``).

    Attributes:
        path: the file.
        artifact: what it was made of.
        arch: the architecture.
        report: the proof of the exact file.
        int8: what became of it with int8 activations; None in mode ``exact``.
        data: the samples of int8 in words.
        mode: ``int8``, the layout that was asked for, or ``optimized for`` an aim.
    """

    path: Path
    artifact: Path
    arch: str
    report: "OnnxReport"
    int8: "Int8Report | None" = None
    data: str = ""
    mode: str = "exact"


@dataclass(frozen=True)
class Int8:
    """What to run on int8 activations with.

    Attributes:
        data: a data spec. Ranges are observed on its split ``train``, the drop is measured on its split ``val``; where
            the data has no splits, on every other sample. Where the artifact has the ranges that it was trained with,
            these are used. None: without such ranges only layers that need none run in int8.
        samples: how many for each.
        ranges: how a range is chosen from what was seen; see ``pcq.export.ranges``.
        max_drop: points of top-1 that int8 may cost against the exact file; without labels percent of predictions, and
            where there are none (states of tokens, maps) percent of the outputs' variance.
        keep: layers that stay float: names of weights, patterns, ``first``, ``last``.
        vnni: every x86 processor that will run the file has VNNI, so no layer's input needs to be cut to 7 bits for the
            sums of 16 bits that the others add in.
    """

    data: str | None = None
    samples: int = SAMPLES
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    max_drop: float = 0.5
    keep: tuple[str, ...] = ()
    vnni: bool = False

    def __post_init__(self) -> None:
        from pcq.export.ranges import Method

        refuse_other(self.ranges, get_args(Method), "--ranges")
        if self.samples < 2:
            raise PcqError(f"{self.samples} samples are too few", where="--samples", allowed="2 or more")
        if not 0 <= self.max_drop <= 100:
            raise PcqError(f"{self.max_drop:g} is no drop", where="--max-drop", allowed="0 to 100 points")


def export_onnx(
    artifact: str | Path,
    out: str | Path | None = None,
    *,
    arch: str | None = None,
    input_shape: Sequence[int] | None = None,
    example: str | None = None,
    target_ort: str = "1.17",
    layout: Literal["exact", "native", "low-memory", "matmulnbits"] = "exact",
    aim: Literal["size", "speed", "ram"] | None = None,
    level: Literal[1, 4] = 4,
    int8: Int8 | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Turn an artifact into ONNX whose weights stay packed, and prove that the file computes what torch computes.

    Args:
        artifact: a file that :func:`quantize` wrote.
        out: the ONNX file; default: the artifact's name with ``.onnx``.
        arch: the architecture, where the artifact does not record it.
        input_shape: one sample's shape without the batch, such as ``(3, 224, 224)``; default: what the architecture
            is made for.
        example: a data spec instead, whose first samples the file is compared with torch on, too. It also says what the
            inputs of a network of several are: an array for each by its name, as for calibration. Without it and
            ``input_shape`` the samples of ``int8`` say so, where the architecture does not.
        target_ort: the oldest ONNX Runtime that must run the file.
        layout: how weights lie in the file where that serves, ``exact`` elsewhere; see ``pcq.export.layouts``.
        aim: choose a layout for each weight instead.
        level: accuracy level of MatMulNBits in layout ``matmulnbits``: 4 may round activations to int8, 1 does not.
        int8: run on int8 activations, chosen and measured so; None: exact.
        force: replace a file at ``out`` that pcq did not write.
        progress: called at each stage.

    Raises:
        PcqError: the artifact, the architecture or the target is not usable.
        CheckFailed: the exported file is not bit-exact, does not agree with torch, or has not the size predicted.
    """
    from pcq.data.inputs import needed, sample_shape, taken, varied
    from pcq.export import write_int8, write_onnx, writing
    from pcq.export.facts import target
    from pcq.export.layouts import Aim, Layout, Level, refuse

    refuse_other(layout, get_args(Layout), "layout")
    refuse_other(aim, (*get_args(Aim), None), "aim")
    refuse_other(level, get_args(Level), "level")
    goal, input_shape = target(target_ort), sample_shape(input_shape)
    if int8 is not None and (layout != "exact" or aim is not None):
        raise PcqError(
            "int8 activations take the layout exact", where="export", todo="Leave out the layout and the aim"
        )

    source = Path(artifact)
    path = Path(out) if out is not None else checkpoint.beside(source, ONNX_SUFFIX)
    if source.is_file() and source.suffix != ".safetensors" and not checkpoint.is_artifact(source):
        raise PcqError("this is not an artifact of pcq", where=str(source), todo="Make one first with `pcq quantize`")
    checkpoint.refuse_overwrite(path, ".onnx", inputs=[source], force=force)
    stored = checkpoint.read_artifact(source)
    refuse(stored.quantized, goal, layout, level)
    network = load_network(stored, source, arch)
    observed = None if int8 is None or int8.data is None else network.data(int8.data, "train")
    given = first(example, network, input_shape)
    unknown = not (given or network.inputs or input_shape)
    if observed is not None and unknown and (observed.arrays or network.input_shape is None):
        given = _beginning(observed)
    shape = tuple(given[0].shape[1:]) if len(given) == 1 else input_shape or network.input_shape
    named = isinstance(network.inputs, dict)
    if (named or len(network.inputs) > 1) and input_shape:
        raise PcqError("the exported program says the shapes of its inputs", where="--input", todo="Leave it out")
    own = () if input_shape else network.inputs
    if not own and len(given) < len(needed(network.module)):
        network.refuse_several(source)
    if shape is None and not own and not given:
        raise PcqError(
            f"the input shape of {network.arch} is not known",
            where=str(source),
            todo="Give one sample's shape without the batch, such as --input 3x224x224",
        )
    values: Example
    if own:
        numbers = varied(network.run, network.values)
        values = dict(zip(own, numbers, strict=True)) if isinstance(own, dict) else numbers
    else:
        values = given or (taken(network.module, shape or ()).example,)
    calibration, held_out, said = (
        ([], [], "") if int8 is None or observed is None else _samples(int8, observed, network, values)
    )
    if stored.activations:
        judged = sum(len(x[0]) for x, _ in held_out)
        said = "ranges of its training" + (f", judged on {judged} samples" if held_out else "")

    def write(out: Path) -> "OnnxReport":
        return write_onnx(
            network.module,
            stored.quantized,
            values,
            out,
            samples=[given] if given else [],
            metadata={"recipe": json.dumps(stored.recipe), "arch": network.arch, "source": source.name},
            tied=stored.tied,
            target_ort=target_ort,
            layout=layout,
            aim=aim,
            level=level,
            fold=int8 is None,
            progress=progress,
        )

    if int8 is None:
        mode = layout if aim is None else f"optimized for {aim}"
        return ExportResult(path, source, network.arch, write(path), mode=mode)
    with writing.draft(path) as exact:
        report = write(exact)
        made = write_int8(
            exact,
            path,
            (lambda: calibration) if calibration else None,
            held_out,
            ranges=int8.ranges,
            vnni=int8.vnni,
            known=stored.activations,
            keep=int8.keep,
            max_drop=int8.max_drop,
            progress=progress,
        )
    return ExportResult(path, source, network.arch, replace(report, path=path), made, said, "int8")


FIRST = 4
"""Samples of an example."""


def first(spec: str | None, network: "Network", input_shape: Sequence[int] | None) -> tuple[Tensor, ...]:
    """The first samples of the data: a tensor for each input, in the order of the network's; empty without data.

    Raises:
        PcqError: the data is not usable, or a shape is given too.
    """
    if spec is None:
        return ()
    if input_shape:
        raise PcqError("the example says the shapes of the inputs", where="--input", todo="Leave it out")
    return _beginning(network.data(spec, "train"))


def _beginning(data: "Data") -> tuple[Tensor, ...]:
    """Its first samples."""
    return data.given(list(range(min(FIRST, data.n))))


def _samples(
    int8: Int8, data: "Data", network: "Network", example: "Example"
) -> tuple[list[tuple[Tensor, ...]], list[tuple[tuple[Tensor, ...], Tensor | None]], str]:
    """Batches to observe ranges on, batches held out of them, and both in words."""
    where = int8.data or ""
    held_out = network.data(where, "val")
    takes = [list(x.shape[1:]) for x in (example.values() if isinstance(example, Mapping) else example)]
    shapes = [list(x.shape[1:]) for x in data.given([0])]
    if shapes != takes:
        said, wanted = (", ".join(map(str, some)) for some in (shapes, takes))
        todo = "Give an array for each input, named like it: npz:FILE"
        if len(takes) == 1:
            open_ = len(shapes) == 1 and not network.inputs  # else a program says what it takes
            said_so = f", or export for that of the samples: --input {'x'.join(map(str, shapes[0]))}"
            todo = "Give samples of that shape" + said_so * open_
        raise PcqError(f"its samples are {said}, the network takes {wanted}", where=where, todo=todo)
    if data.n < 2:
        raise PcqError("one sample cannot both calibrate and judge", where=where, allowed="2 or more samples")
    order, judging = data.order(int8.samples), held_out.order(int8.samples)
    if (data.name, data.n) == (held_out.name, held_out.n):  # no splits
        order = data.order(min(2 * int8.samples, data.n))
        order, judging = order[::2], order[1::2]
    said = f"ranges from {len(order)} samples of {data.name} ({data.split}), judged on {len(judging)} others"
    seen = [data.inputs(x) for x, _ in data.batches(BATCH, order=order)]
    return seen, [(held_out.inputs(x), y) for x, y in held_out.batches(BATCH, order=judging)], said
