"""Quantizing a checkpoint tensor by tensor, and a large tensor slice by slice."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pcq import qtensor
from pcq.errors import PcqError, raise_all
from pcq.grids import Affine, Codebook, Grid
from pcq.plan import Kept, Plan, Quantized
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor, Quantizer
from pcq.rows import Rows
from pcq.sources import Source

SLICE = 1 << 23
"""Weights that are quantized at a time: 32 MB of float32."""


@dataclass(frozen=True)
class Done:
    """One tensor that is ready to be stored.

    Attributes:
        entry: what the plan says about it.
        value: codes and grid, or the tensor as it was.
        signal: sum of its squared weights (0 for a tensor that is kept).
        noise: sum of its squared errors (0 for a tensor that is kept); ``10 log10(signal / noise)`` is its SQNR in dB.
    """

    entry: Quantized | Kept
    value: QuantizedTensor | Tensor
    signal: float = 0.0
    noise: float = 0.0

    @property
    def name(self) -> str:
        return self.entry.parameter.name


def quantize_source(source: Source, plan: Plan, progress: Progress = silent) -> Iterator[Done]:
    """Carry out ``plan``, one tensor in memory at a time; tied parameters come once, under their first name.

    Raises:
        PcqError: weights to be quantized hold NaN or infinity; all such weights are named together.
    """
    entries = [entry for entry in plan.entries if entry.parameter.tied_to is None]
    total = sum(entry.parameter.numel for entry in entries)
    done = 0
    for i, entry in enumerate(entries):
        name = entry.parameter.name
        progress(f"quantizing {name}" if isinstance(entry, Quantized) else f"copying {name}", done, total)
        weight = source.tensor(name)
        done += weight.numel()
        if isinstance(entry, Quantized):
            if non_finite(weight):
                rest = [name, *(other.parameter.name for other in entries[i + 1 :] if isinstance(other, Quantized))]
                raise_all(non_finite_problems(source, rest))
            yield Done(entry, *quantize_sliced(entry.quantizer, weight, entry.rows))
        else:
            yield Done(entry, weight)
        del weight
    progress("writing", total, total)


def quantize_sliced(
    quantizer: Quantizer, weight: Tensor, rows: Rows, most: int = SLICE
) -> tuple[QuantizedTensor, float, float]:
    """``qtensor.quantize`` with the same codes and grid, but temporaries for ``most`` weights only.

    Rows do not know of one another, so channels are taken a few at a time where they lie one behind the other (axis 0);
    a weight of one channel or of another axis is taken whole.

    Returns:
        The quantized weight, the sum of its squares, and the sum of its squared errors.
    """
    step = max(1, most // max(1, rows.length))
    if rows.axis != 0 or step >= rows.channels:
        return measured(quantizer, weight, rows)
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    grids: list[Grid] = []
    signal = noise = 0.0
    for start in range(0, rows.channels, step):
        part = weight[start : start + step]
        quantized, power, error = measured(quantizer, part, replace(rows, shape=tuple(part.shape)))
        codes[start : start + step] = quantized.codes
        grids.append(quantized.grid)
        signal, noise = signal + power, noise + error
    return QuantizedTensor(codes, stack(grids, qtensor.blank(quantizer, rows)), rows), signal, noise


def measured(quantizer: Quantizer, weight: Tensor, rows: Rows) -> tuple[QuantizedTensor, float, float]:
    """Quantize, and measure signal and noise in float64 sums."""
    exact = weight.detach().to(torch.float32)
    quantized = qtensor.quantize(quantizer, exact, rows)
    noise = float(quantized.dequantize().sub_(exact).square_().sum(dtype=torch.float64))
    return quantized, float(exact.square().sum(dtype=torch.float64)), noise


def stack(grids: list[Grid], form: Grid) -> Grid:
    """Put the grids of consecutive channels behind one another; what ``form`` shares between rows stays shared."""
    first = grids[0]
    scale = None if first.scale is None else torch.cat([grid.scale for grid in grids if grid.scale is not None])
    if isinstance(first, Affine) and isinstance(form, Affine):
        assert scale is not None
        if not isinstance(form.zero_point, Tensor):
            return replace(first, scale=scale)
        zeros = [grid.zero_point for grid in grids if isinstance(grid, Affine) and isinstance(grid.zero_point, Tensor)]
        return replace(first, scale=scale, zero_point=torch.cat(zeros))
    assert isinstance(first, Codebook)
    assert isinstance(form, Codebook)
    tables = [grid.table for grid in grids if isinstance(grid, Codebook)]
    return Codebook(tables[0] if form.table.shape[0] == 1 else torch.cat(tables), scale)


def refuse_non_finite(name: str, tensor: Tensor) -> None:
    """Let pass only a weight that is finite in float32, which is what levels are fitted in.

    Raises:
        PcqError: how many of its values are not.
    """
    if bad := non_finite(tensor):
        where = " in float32" if tensor.dtype == torch.float64 else ""
        what = f"{bad:,} of its {tensor.numel():,} values are NaN or infinite{where}"
        todo = "Repair the checkpoint, or keep this weight in float by a rule of the recipe"
        raise PcqError(what, where=name, todo=todo)


def non_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite in float32, without a copy of a large tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.itemsize > 1 and all(bool(torch.isfinite(end.float())) for end in torch.aminmax(tensor)):
        return 0
    flat, step = tensor.reshape(-1), 1 << 22
    return sum(int((~torch.isfinite(flat[i : i + step].float())).sum()) for i in range(0, flat.numel(), step))


def non_finite_problems(source: Source, names: list[str]) -> list[PcqError]:
    """The sentence for each of ``names`` that is not finite."""
    problems = []
    for name in names:
        try:
            refuse_non_finite(name, source.tensor(name))
        except PcqError as problem:
            problems.append(problem)
    return problems
