"""Weights in the format ``pack-quantized`` of compressed-tensors, a folder that vLLM and transformers read.

For a module ``m`` (Linear or Embedding) with integers ``q`` of b bits, ``-2^(b-1) <= q < 2^(b-1)``:

    m.weight_packed       int32 ``[out, ceil(in * b / 32)]``: ``q + 2^(b-1)``, b bits each, the first in the lowest bits
    m.weight_scale        float32 ``[out, groups]``, ``[1]`` per tensor; the weight is ``scale * q``
    m.weight_shape        int64 ``[2]``

Levels around zero are such integers: ``q = code - zero_point``, or, where zero lies between two levels (binary, 4 bits
symmetric), ``q = 2 code - 2 zero_point`` with half the scale, which takes a bit more. b is 2, 4 or 8: every version of
the format packs these alike. What is no integer times a scale of its row is left float, with the reason.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcq.grids import Affine
from pcq.qtensor import QuantizedTensor

BITS = (2, 4, 8)


@dataclass(frozen=True)
class Integers:
    """A weight as ``scale * q``.

    Attributes:
        q: int8 ``[out, in]``.
        scale: float32 ``[out, groups]``, or ``[1]`` per tensor.
        bits: 2, 4 or 8.
        group: weights in a group; None: one scale a row, or one in all.
    """

    q: Tensor
    scale: Tensor
    bits: int
    group: int | None

    @property
    def strategy(self) -> str:
        """In the format's words."""
        return "tensor" if self.scale.ndim == 1 else "channel" if self.group is None else "group"

    def dequantize(self) -> Tensor:
        """float32, as the format's readers compute it."""
        if self.group is None:
            return self.q.float() * self.scale
        grouped = self.q.float().reshape(len(self.q), -1, self.group) * self.scale[..., None]
        return grouped.reshape(self.q.shape)


def integers(weight: QuantizedTensor) -> Integers | str:
    """The weight as integers times scales, or why it is not."""
    grid, rows = weight.grid, weight.rows
    if len(rows.shape) != 2:
        return "it is not the weight of a Linear or an Embedding"
    if not isinstance(grid, Affine):
        return "its levels are a list, not integers times a scale"
    if rows.axis not in (0, None) or (rows.axis is None and rows.group is not None):
        return "its groups cross rows"
    if rows.group is not None and rows.tail != rows.width:
        return f"groups of {rows.group} do not divide its {rows.length} columns"
    factor = grid.halves
    zero = (factor * grid.zeros()).int()
    q = rows.merge(rows.split(weight.codes.int() * factor) - zero)
    low, high = int(-zero.max()), int(factor * (grid.count - 1) - zero.min())
    bits = next((b for b in BITS if low >= -(2 ** (b - 1)) and high < 2 ** (b - 1)), None)
    if bits is None:
        return f"its integers run from {low} to {high}, and the format ends at 8 bits"
    scale = grid.scale / factor
    shaped = scale.reshape(1) if rows.axis is None else scale.reshape(rows.channels, rows.groups)
    made = Integers(q.to(torch.int8), shaped, bits, None if rows.groups == 1 else rows.width)
    if not torch.equal(made.dequantize(), weight.dequantize()):
        return "half of a scale is too small for float32"
    return made


def pack(made: Integers) -> Tensor:
    """int32 ``[out, ceil(in * bits / 32)]``."""
    each = 32 // made.bits
    shifted = made.q.long() + 2 ** (made.bits - 1)
    padded = torch.nn.functional.pad(shifted, (0, -shifted.shape[1] % each)).reshape(len(shifted), -1, each)
    words = (padded << (made.bits * torch.arange(each))).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: int8 ``[out, columns]``."""
    each = 32 // bits
    words = packed.long() & 0xFFFFFFFF
    digits: Tensor = (words[..., None] >> (bits * torch.arange(each))) & (2**bits - 1)
    return (digits.reshape(len(packed), -1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


def tensors(name: str, made: Integers) -> dict[str, Tensor]:
    """What is stored for parameter ``name``, which ends in ``.weight``."""
    module = name.removesuffix(".weight")
    return {
        f"{module}.weight_packed": pack(made),
        f"{module}.weight_scale": made.scale.contiguous(),
        f"{module}.weight_shape": torch.tensor(made.q.shape, dtype=torch.int64),
    }


def config(packed: Mapping[str, Integers], kept: Iterable[str]) -> dict[str, Any]:
    """``config.json``: modules of one form in one group; ``kept`` are the modules left float."""
    groups: dict[tuple[int, str, int | None], list[str]] = {}
    for name, made in packed.items():
        groups.setdefault((made.bits, made.strategy, made.group), []).append(name.removesuffix(".weight"))
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": sorted(kept),
            "config_groups": {
                f"group_{i}": {
                    "targets": names,
                    "weights": {
                        "num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group,
                        "dynamic": False,
                    },
                }
                for i, ((bits, strategy, group), names) in enumerate(groups.items())
            },
        }
    }  # fmt: skip
