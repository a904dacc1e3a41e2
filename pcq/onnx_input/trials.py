"""Inputs that a model nobody here knows will run on: random ones of the shapes and kinds that it says it takes.

Dimensions without a size are tried in turn until the model runs; integers that index a table stay below its length;
integers that are compared with constants take these constants in turn, so that every branch is seen.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from pcq.errors import PcqError, first_line
from pcq.export.verify import open_session
from pcq.onnx_input.chains import REARRANGING, stored_in, users
from pcq.onnx_input.graph import external_bytes, read

Array = npt.NDArray[np.generic]

SIZES = (64, 224, 512, 48, 32, 320, 128, 16, 1, 640, 400, 1600, 16000, 2, 8)
"""What unknown dimensions are tried with, all alike; the first is mostly a batch, and is 1 or 2."""

MOST = 2**21
"""What the sizes tried for an input's open dimensions may multiply to: pictures of 16000 by 16000 fill a memory."""

FREE = 3
"""Dimensions without a name that may be a batch or not; further ones are long."""

KINDS = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16, "tensor(uint16)": np.uint16, "tensor(uint32)": np.uint32, "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}  # fmt: skip


QUIET = ort.RunOptions()
QUIET.log_severity_level = 4


@dataclass(frozen=True)
class Trial:
    """Named inputs; ``kind`` is ``random`` or ``sample``."""

    kind: str
    feed: Mapping[str, Array]

    @property
    def batch(self) -> int:
        first = next(iter(self.feed.values()), None)
        return 1 if first is None or not first.ndim else int(first.shape[0])


def find_trials(path: Path, model: ir.Model) -> list[Trial]:
    """Random inputs that the model at ``path`` runs on: one or two numbers of samples, and every compared integer.

    Raises:
        PcqError: none was found, or ONNX Runtime does not load the model.
    """
    session = input_session(path)
    refuse_strange(session, path)
    compared, tables = _compared(model), _tables(model)
    trials, last = [], ""
    for batch in (1, 3):
        found: list[dict[str, Array]] = []
        for shapes in _shapes(session, batch):
            feeds = list(_feeds(session, shapes, compared, tables))
            try:
                seen = [session.run(None, feed, QUIET) for feed in feeds]
            except Exception as error:  # onnxruntime's exceptions share no class of their own
                last = first_line(error)
                continue
            if all(_numbers(outputs) == 1 for outputs in seen):
                found = feeds
                break
            last = "it puts out no finite number"
            if not found and all(_numbers(outputs) for outputs in seen):
                found = feeds
        trials += [Trial("random", feed) for feed in found]
        if not found or not any(_open(value.shape) for value in session.get_inputs()):
            break
    if not trials:
        raise PcqError(f"no random input was found that the model runs on ({last[:200]})", where=str(path), todo=SAMPLE)
    return trials


def refuse_strange(session: ort.InferenceSession, path: Path) -> None:
    """Raise PcqError if the model takes anything but arrays of numbers that NumPy has."""
    if strange := [value for value in session.get_inputs() if value.type not in KINDS]:
        what = f"its input '{strange[0].name}' is a {strange[0].type}, and pcq can run it on arrays of numbers only"
        todo = "Give the part of the model behind that input, which onnx.utils.extract_model cuts out"
        raise PcqError(what, where=str(path), allowed=", ".join(KINDS), todo=todo)


SAMPLE = "Give real inputs with --sample FILE.npz, an array for each input's name"


def read_sample(path: Path, inputs: Sequence[str]) -> Trial:
    """An ``.npz`` with an array for each of the model's ``inputs``, and no others.

    Raises:
        PcqError: it cannot be read, or its arrays are not named like the inputs.
    """
    if others := [name for name in listed(path) if name not in inputs]:
        raise PcqError(f"the model has no input '{others[0]}'", where=str(path), allowed=_each(inputs))
    return Trial("sample", read_arrays(path, inputs))


def read_arrays(path: Path, inputs: Sequence[str]) -> dict[str, Array]:
    """Of an ``.npz`` the arrays that are named like the model's ``inputs``.

    Raises:
        PcqError: it cannot be read, or one is missing.
    """
    if not path.is_file():
        raise PcqError("there is no such file", where=str(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in inputs if name in file.files}
    except Exception as error:  # zip, npy header and zlib errors are of many kinds, and a single array is no archive
        what = "it is not an .npz of arrays of numbers"
        raise PcqError(what, where=str(path), todo="Write it with `np.savez`") from error
    for name in inputs:
        if name not in found:
            raise PcqError(f"it has no array '{name}'", where=str(path), allowed=_each(inputs))
        if found[name].dtype.kind not in "biuf":
            raise PcqError(f"its array '{name}' is not made of numbers", where=str(path))
    return found


def listed(path: Path) -> list[str]:
    """The names of an ``.npz``'s arrays; none where it is no such file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return list(file.files)
    except Exception:  # as above
        return []


def _each(inputs: Sequence[str]) -> str:
    return f"an array for each input: {', '.join(inputs)}"


def input_session(path: Path) -> ort.InferenceSession:
    """The model as it was handed in.

    Raises:
        PcqError: it is no ONNX file, its external data is missing, or ONNX Runtime does not load it.
    """
    try:
        return open_session(str(path), optimised=False)
    except PcqError as error:
        external_bytes(path, read(path))
        raise PcqError(error.what, where=str(path)) from error


def _shapes(session: ort.InferenceSession, batch: int) -> Iterator[dict[str, list[int]]]:
    """Shapes to try: dimensions of one name alike, each of the others the batch or long."""
    inputs = session.get_inputs()
    groups: dict[object, None] = {}
    for value in inputs:
        for axis in _open(value.shape):
            groups[_group(value.name, axis, value.shape[axis])] = None
    free = [group for group in groups if not _is_batch(group)]
    first = free[:FREE]
    for size in SIZES if free else SIZES[:1]:
        for chosen in product((size, batch), repeat=len(first)):
            sizes: dict[object, int] = dict(zip(first, chosen, strict=True))
            sizes |= {group: batch for group in groups if _is_batch(group)}
            shapes = {
                value.name: [
                    sizes.get(_group(value.name, axis, length), size) if axis in _open(value.shape) else int(length)
                    for axis, length in enumerate(value.shape)
                ]
                for value in inputs
            }
            if all(math.prod(shapes[value.name][axis] for axis in _open(value.shape)) <= MOST for value in inputs):
                yield shapes


def _open(shape: list[object]) -> list[int]:
    return [axis for axis, length in enumerate(shape) if not (isinstance(length, int) and length > 0)]


def _group(name: str, axis: int, length: object) -> object:
    """What dimensions are one: those of one name; the first of every input is the batch."""
    if axis == 0 or _named_batch(length):
        return "batch"
    return length if isinstance(length, str) and length not in ("", "?") else (name, axis)


def _is_batch(group: object) -> bool:
    return group == "batch"


def _feeds(
    session: ort.InferenceSession,
    shapes: Mapping[str, list[int]],
    compared: Mapping[str, list[int]],
    tables: Mapping[str, int],
) -> Iterator[dict[str, Array]]:
    generator = np.random.default_rng(0)
    feed: dict[str, Array] = {}
    for value in session.get_inputs():
        kind, shape = KINDS[value.type], shapes[value.name]
        if np.issubdtype(kind, np.floating):
            feed[value.name] = np.asarray(generator.normal(size=shape)).astype(kind)
        else:
            top = tables.get(value.name, 2)
            feed[value.name] = np.asarray(generator.integers(0, max(1, top), size=shape)).astype(kind)
    choices = [[(name, number) for number in compared[name]] for name in feed if compared.get(name)]
    for chosen in product(*choices):
        yield feed | {name: np.full_like(feed[name], number) for name, number in chosen}


def _named_batch(length: object) -> bool:
    return isinstance(length, str) and length.lower() in ("batch", "batch_size", "n", "b")


def _numbers(outputs: list[Array]) -> float:
    """The share of numbers that are finite, of outputs that have any; 0 where there is nothing to compare."""
    arrays = [output for output in outputs if isinstance(output, np.ndarray) and output.size]
    floats = [array for array in arrays if np.issubdtype(array.dtype, np.floating)]
    if not floats:
        return float(bool(arrays))
    shares = [float(np.isfinite(array).mean()) for array in floats]
    return min(shares) or max(shares) / 2


def _compared(model: ir.Model) -> dict[str, list[int]]:
    """Integer input -> the numbers that it can hold of those that it is compared with, and one more; one truth value ->
    both."""
    found: dict[str, list[int]] = {}
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.BOOL and value.shape is not None and all(length == 1 for length in value.shape):
            found[value.name or ""] = [0, 1]
        if value.dtype is None or not value.dtype.is_integer():
            continue
        numbers: set[int] = set()
        for alike in _alike(value):
            for node, _ in users(alike):
                if node.op_type in ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"):
                    numbers.update(*(_scalar(other) for other in node.inputs if other is not None))
        held = np.iinfo(value.dtype.numpy())
        if numbers := {number for number in numbers if held.min <= number <= held.max}:
            lowest = min(numbers)
            found[value.name or ""] = [*sorted(numbers, reverse=True), lowest // 2 if lowest > 1 else lowest + 1]
    return found


def _alike(value: ir.Value) -> list[ir.Value]:
    """The value and what only rearranges or casts it."""
    found, at = [value], 0
    while at < len(found):
        for node, index in users(found[at]):
            if index == 0 and node.op_type in (*REARRANGING, "Gather"):
                found.append(node.outputs[0])
        at += 1
    return found


def _scalar(value: ir.Value) -> list[int]:
    """A constant's one number; empty where it is none, or infinite."""
    tensor = stored_in(value)
    numbers = [] if tensor is None or tensor.size != 1 else tensor.numpy().reshape(-1).tolist()
    return [int(number) for number in numbers if isinstance(number, (int, float)) and math.isfinite(number)]


def _tables(model: ir.Model) -> dict[str, int]:
    """Integer input -> the length of the table that it indexes."""
    found: dict[str, int] = {}
    for value in model.graph.inputs:
        for node, index in users(value):
            if node.op_type == "Gather" and index == 1 and node.inputs[0] is not None:
                tensor = stored_in(node.inputs[0])
                if tensor is not None:
                    found[value.name or ""] = int(tensor.shape.numpy()[0])
    return found
