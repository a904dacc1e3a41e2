"""Read packed weights back out of an ONNX file with NumPy and the file's own scheme.

This shares no code with the writer (pcq.packing, lowering), so that what it reads proves what was written; and it is
the model for anyone who wants the codes without pcq.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import torch

from pcq.errors import CheckFailed, PcqError
from pcq.export.scheme import KEY, Scheme, from_json
from pcq.grids import Affine, Codebook, Grid
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows
from pcq.sources.opening import unfetched

PARTS = ("packed", "scale", "zero_point", "levels")


@dataclass(frozen=True)
class PackedFile:
    """A packed ONNX file.

    Attributes:
        weights: the packed weights.
        schemes: how each is stored.
        metadata: all of the file's metadata.
        weight_bytes: for each weight the bytes of its initializers.
        float_bytes: bytes of all other initializers.
        file_bytes: the file, and its external data.
        functions: names of the model-local functions.
        opset: the operator set.
        ir_version: the IR version.
    """

    weights: dict[str, QuantizedTensor]
    schemes: dict[str, Scheme]
    metadata: dict[str, str]
    weight_bytes: dict[str, int]
    float_bytes: int
    file_bytes: int
    functions: tuple[str, ...]
    opset: int
    ir_version: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per packed weight, with scales, zero points and levels."""
        return 8 * sum(self.weight_bytes.values()) / max(1, sum(weight.numel for weight in self.weights.values()))


def read_packed(path: Path | str) -> dict[str, QuantizedTensor]:
    """The packed weights of an ONNX file that pcq wrote, by parameter name; see :func:`open_packed`."""
    return open_packed(path).weights


def is_packed(path: Path | str) -> bool:
    """Whether pcq packed this ONNX file, unpacked or stripped of its metadata since or not.

    Raises:
        PcqError: it cannot be opened or is not ONNX.
    """
    model = _load(Path(path))
    ours = any(function.domain == "pcq" for function in model.functions) or model.producer_name == "pcq"
    return ours or any(entry.key == KEY for entry in model.metadata_props)


def open_packed(path: Path | str) -> PackedFile:
    """Read an ONNX file that pcq wrote.

    Raises:
        PcqError: it cannot be opened, is not ONNX, was not written by pcq, or its weights were unpacked since.
        CheckFailed: the packed weights are damaged.
    """
    path = Path(path)
    model = _load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if KEY not in metadata:
        ours = model.producer_name == "pcq" or any(function.domain == "pcq" for function in model.functions)
        raise PcqError(
            "pcq wrote this file, but another tool has removed its metadata" if ours else "pcq did not pack this file",
            where=str(path), todo=f"Packed files carry the metadata '{KEY}'; make one with `pcq export`",
        )  # fmt: skip
    schemes = from_json(metadata[KEY], str(path))
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    unpacked = [name for name in schemes if f"{name}/packed" not in initializers]
    if unpacked:
        raise PcqError(
            f"{len(unpacked)} of {len(schemes)} packed weights, such as {unpacked[0]}, have been unpacked into floats",
            where=str(path),
            todo="Graph optimisers such as onnxsim, onnxslim and onnxscript's optimize() do that; run none on a packed "
            "file and export it again",
        )
    weights, weight_bytes, used = {}, {}, set()
    for name, scheme in schemes.items():
        parts = {part: f"{name}/{part}" for part in PARTS if f"{name}/{part}" in initializers}
        used |= set(parts.values())
        arrays = {part: _array(initializers[key], path) for part, key in parts.items()}
        weight_bytes[name] = sum(_nbytes(initializers[key]) for key in parts.values())
        try:
            weights[name] = decode(scheme, arrays)
        except (ValueError, KeyError, IndexError, AssertionError) as error:
            raise CheckFailed(f"its packed weight is damaged: {error}", where=f"{path}: {name}") from error
    return PackedFile(
        weights, schemes, metadata, weight_bytes,
        sum(_nbytes(tensor) for name, tensor in initializers.items() if name not in used),
        _file_bytes(path, model),
        tuple(function.name for function in model.functions),
        next((entry.version for entry in model.opset_import if entry.domain == ""), 0),
        model.ir_version,
    )  # fmt: skip


def decode(scheme: Scheme, arrays: dict[str, np.ndarray]) -> QuantizedTensor:
    """One weight from its initializers.

    Raises:
        ValueError, KeyError, IndexError: they do not fit the scheme.
    """
    rows = Rows(scheme.shape, scheme.axis, scheme.blocks, scheme.group)
    codes = _codes(scheme, arrays["packed"])
    if codes.size and not 0 <= codes.min() <= codes.max() < scheme.levels:
        raise ValueError(f"codes from {codes.min()} to {codes.max()} of {scheme.levels} levels")
    shape = scheme.shape[::-1] if scheme.transposed else scheme.shape
    weight = codes.astype(np.uint8).reshape(shape)
    weight = np.ascontiguousarray(weight.T if scheme.transposed else weight)
    if hashlib.sha256(weight.data).hexdigest() != scheme.sha256:
        raise ValueError("the codes are not those that were written")

    def by_row(part: str, rest: int = 0) -> torch.Tensor:
        """``[g, ...]`` from the shape it broadcasts in; a transposed matrix has its groups before its channels."""
        array = arrays[part] if scheme.layout != "matmulnbits" else _by_block(scheme, rows, part, arrays[part])
        if array.dtype.kind not in "fiu":  # ml_dtypes' types of 2 and 4 bits
            array = array.astype(np.uint8)
        if scheme.transposed and array.ndim - rest == 3:
            array = array[:, 0].swapaxes(0, 1)
        return torch.from_numpy(np.array(array.reshape((rows.g, *array.shape[array.ndim - rest :]))))

    grid: Grid
    scale = by_row("scale") if "scale" in arrays else None
    if scheme.kind == "affine":
        if scale is None:
            raise KeyError("scale")
        scale = scale * scheme.unit
        if scheme.zero_point is None:
            zero = by_row("zero_point") / scheme.unit
            whole = scheme.unit == 1 and arrays["zero_point"].dtype.kind != "f"
            grid = Affine(scale, zero.to(torch.uint8 if whole else torch.float16), scheme.levels)
        else:
            _check_zero(scheme, by_row("zero_point") if "zero_point" in arrays else None)
            grid = Affine(scale, scheme.zero_point, scheme.levels)
    else:
        table = arrays["levels"]
        grid = Codebook(torch.from_numpy(np.array(table))[None] if table.ndim == 1 else by_row("levels", 1), scale)
    return QuantizedTensor(torch.from_numpy(weight), grid, rows)


def _codes(scheme: Scheme, packed: np.ndarray) -> np.ndarray:
    """int64, row-major in the stored shape."""
    numel = math.prod(scheme.shape)
    if scheme.layout == "exact":
        digits = [max(d for d in range(1, 9) if radix**d <= 256) for radix in scheme.planes]
        ends = np.cumsum([-(-numel // per_byte) for per_byte in digits])
        signed = packed.dtype == np.int8 and scheme.planes == (256,)
        if not (signed or packed.dtype == np.uint8) or packed.size != ends[-1]:
            raise ValueError(f"{packed.size} packed bytes where {ends[-1]} are needed")
        codes, place = np.zeros(numel, np.int64), 1
        pieces = np.split(packed.reshape(-1).astype(np.int64) + 128 * signed, ends[:-1])
        for radix, per_byte, plane in zip(scheme.planes, digits, pieces, strict=True):
            codes += place * np.stack([plane // radix**i % radix for i in range(per_byte)], 1).reshape(-1)[:numel]
            place *= radix
        return codes
    if scheme.layout == "matmulnbits":
        shifted = packed.astype(np.int64)[..., None] >> np.arange(0, 8, scheme.bits) & 2**scheme.bits - 1
        integers = shifted.reshape(len(packed), -1)[:, : scheme.shape[1]].reshape(-1)
    else:
        integers = packed.astype(np.int64).reshape(-1)
    if integers.size != numel:
        raise ValueError(f"{integers.size} integers where {numel} are needed")
    if ((integers + scheme.offset) % scheme.unit).any():
        raise ValueError("an integer that no code gives")
    whole: np.ndarray = (integers + scheme.offset) // scheme.unit
    return whole


def _by_block(scheme: Scheme, rows: Rows, part: str, array: np.ndarray) -> np.ndarray:
    """``[g]``: what MatMulNBits has for each block, which is the same in all blocks of a row."""
    outputs, count = scheme.shape[0], -(-scheme.shape[1] // scheme.block)
    if part == "zero_point" and array.dtype == np.uint8:
        each = array.reshape(outputs, -1, 1) >> np.arange(0, 8, scheme.bits, dtype=np.uint8) & 2**scheme.bits - 1
        array = each.reshape(outputs, -1)[:, :count]
    by_row = array.reshape(rows.g, -1)
    if (by_row != by_row[:, :1]).any():
        raise ValueError(f"{part} differs between the blocks of a row")
    return np.ascontiguousarray(by_row[:, 0])


def _check_zero(scheme: Scheme, stored: torch.Tensor | None) -> None:
    """Zero points that all rows share stand in the file for the one in the scheme."""
    assert scheme.zero_point is not None, scheme
    wanted = scheme.zero_point * scheme.unit - scheme.offset
    half = 2 ** (scheme.bits - 1) if scheme.layout == "matmulnbits" else 0
    if scheme.layout in ("low-memory", "matmulnbits") and not (
        wanted == half if stored is None else bool((stored.double() == wanted).all())
    ):
        raise ValueError("its zero point is another one")


def not_onnx(path: Path) -> PcqError:
    """What to say of a file that is no ONNX model."""
    with open(path, "rb") as file:
        head = file.read(512)
    return unfetched(path, head) or PcqError("is not an ONNX file", where=str(path))


def load(path: Path) -> onnx.ModelProto:
    """What is in the file, but for external data.

    Raises:
        PcqError: it cannot be read, or is no ONNX file.
    """
    try:
        return onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise PcqError(f"cannot be read ({error.strerror or error})", where=str(path)) from error
    except Exception as error:  # protobuf's DecodeError has no public home
        raise not_onnx(path) from error


def _load(path: Path) -> onnx.ModelProto:
    model = load(path)
    if not model.ir_version or not model.HasField("graph"):
        raise not_onnx(path)
    return model


def _locations(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def file_bytes(path: Path | str) -> int:
    """What an ONNX file takes on disk, with its external data.

    Raises:
        PcqError: it cannot be opened or is not ONNX.
        CheckFailed: its external data is missing.
    """
    return _file_bytes(Path(path), _load(Path(path)))


def _file_bytes(path: Path, model: onnx.ModelProto) -> int:
    try:
        return sum(file.stat().st_size for file in {path, *(path.parent / place for place in _locations(model))})
    except OSError as error:
        raise CheckFailed("its external data is missing", where=str(error.filename)) from error


def _array(tensor: onnx.TensorProto, path: Path) -> np.ndarray:
    try:
        return onnx.numpy_helper.to_array(tensor, str(path.parent))
    except (OSError, onnx.checker.ValidationError, ValueError) as error:
        raise CheckFailed(f"its data cannot be read ({error})", where=f"{path}: {tensor.name}") from error


def _nbytes(tensor: onnx.TensorProto) -> int:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
    return len(tensor.raw_data) if tensor.HasField("raw_data") else onnx.numpy_helper.to_array(tensor).nbytes
