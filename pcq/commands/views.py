"""What is shown of a file and of each tensor in it."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from pcq.qtensor import QuantizedTensor


@dataclass(frozen=True)
class TensorView:
    """One tensor of an inspected file: its levels in words (or its dtype) and what it takes there."""

    name: str
    shape: tuple[int, ...]
    form: str
    bits: float
    nbytes: int


@dataclass(frozen=True)
class FileView:
    """What :func:`inspect` found in a checkpoint, an artifact or an ONNX file.

    Attributes:
        path: the file.
        kind: what it is, in words.
        facts: further findings, label and value.
        tensors: one row a tensor.
        nbytes: size on disk (of all its files; of a checkpoint in several, of its tensors).
    """

    path: Path
    kind: str
    facts: tuple[tuple[str, str], ...]
    tensors: tuple[TensorView, ...]
    nbytes: int


def float_view(name: str, shape: tuple[int, ...], dtype: str) -> TensorView:
    """A tensor as it is."""
    bits = 8 * getattr(torch, dtype).itemsize
    return TensorView(name, shape, dtype, bits, math.prod(shape) * bits // 8)


def quantized_view(name: str, stored: QuantizedTensor, text: str = "") -> TensorView:
    """A quantized tensor; ``text`` are its levels in words."""
    words = text or f"{stored.grid.count} levels"
    bits = 8 * stored.nbytes / max(1, stored.numel)
    return TensorView(name, stored.rows.shape, f"{words}, {stored.grid.g:,} rows", bits, stored.nbytes)
