"""Quantizers choose the set Q of levels for each row of weights: ``fit(rows [g, n]) -> Grid``.

Each minimises the squared error ``sum (w - nearest level)**2`` of every row within its family of level sets, or says
which simple rule it follows instead. They are frozen records of plain fields, the ``levels:`` of a recipe. The form of
the grid (kind, number of levels, what is shared by all rows) depends on these fields only, never on the weights.

Rows are float32, finite, and at least one weight long; all-zero, constant, denormal and huge rows get finite levels.
A field out of range raises ``ValueError`` with what is allowed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from pcq.grids import Affine, Codebook
from pcq.kmeans import kmeans
from pcq.leastsquares import PIECE, SortedRows, best_affine, best_scale, power_sum, sort_rows, zero_steps
from pcq.threads import each

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 4-bit NormalFloat levels of QLoRA (arXiv 2305.14314), as bitsandbytes publishes them."""

GAUSSIAN_STEP = (1.595769, 0.995687, 0.586019, 0.335201, 0.188139, 0.104063, 0.056868, 0.030762)
"""Step of the least-squares uniform grid of 2**bits levels around 0 for a Gaussian of deviation 1, bits = 1 .. 8.

Max, «Quantizing for minimum distortion», 1960; recomputed in the tests.
"""

_CHUNK = 2**19  # weights that are worked on at a time, in whole rows


@dataclass(frozen=True)
class Binary:
    """Levels ``-v, v`` with v the mean magnitude: the least-squares optimum (arXiv 1603.05279)."""

    per_magnitude = 2.0
    """The scale is this many mean magnitudes; None, in other quantizers: it does not go by these alone."""

    @property
    def text(self) -> str:
        return "binary"

    def fit(self, rows: Tensor) -> Affine:
        (scale,) = _by_chunk(rows, lambda chunk: (_mean_magnitude(chunk) * self.per_magnitude,))
        return Affine(scale, 0.5, 2)


@dataclass(frozen=True)
class Ternary:
    """Levels ``-v, 0, v``, by default the exact least-squares optimum.

    With k weights nonzero the best are the k largest and v their mean magnitude, which lowers the error by
    ``(sum of the k largest)**2 / k``; of all k the best is taken. The heuristic it replaces: arXiv 1605.04711.

    Attributes:
        scale: ``mse``: that; ``mean``: v is 1.1 times the mean magnitude of all weights, smaller and with fewer zeros,
            the default of torchao's PARQ (arXiv 2503.15748): worse for rounding, better to train on, as it moves
            smoothly with the weights where the optimum jumps; ``auto``: ``mean`` where levels follow weights that
            train, ``mse`` everywhere else.
    """

    scale: Literal["auto", "mse", "mean"] = "auto"

    def __post_init__(self) -> None:
        _check_choice("scale", self.scale, ("auto", "mse", "mean"))

    @property
    def text(self) -> str:
        return "ternary" if self.scale == "auto" else f"ternary, {self.scale} scale"

    @property
    def per_magnitude(self) -> float | None:
        return 1.1 if self.scale == "mean" else None

    def fit(self, rows: Tensor) -> Affine:
        (scale,) = _by_chunk(rows, self._mean if self.scale == "mean" else _ternary)
        return Affine(scale, 1.0, 3)

    def _mean(self, chunk: Tensor) -> tuple[Tensor]:
        assert self.per_magnitude is not None
        return ((_mean_magnitude(chunk) * self.per_magnitude).clamp(max=torch.finfo(chunk.dtype).max),)


@dataclass(frozen=True)
class LeastSquaresBinary:
    """Levels ``±v1 ± .. ± vb``: the sum of b scaled binary codes (2**bits levels).

    Started greedily, each v the mean magnitude of what the ones before leave, and from the best evenly spaced grid,
    which is one of these; then nearest codes and least squares for the v alternate (arXiv 1802.00150). Never worse than
    either start; ``refine=0`` is the greedy fit alone (LSBQ).

    Attributes:
        bits: 1 to 4.
        refine: alternations, 0 to 1000.
    """

    bits: int
    refine: int = 10

    def __post_init__(self) -> None:
        _check_range("bits", self.bits, 1, 4)
        _check_range("refine", self.refine, 0, 1000)

    @property
    def text(self) -> str:
        return f"least-squares binary, {_bits(self.bits)}"

    def fit(self, rows: Tensor) -> Codebook:
        (table,) = _by_chunk(rows, lambda chunk: (_least_squares_binary(chunk, self.bits, self.refine),))
        return Codebook(table)


@dataclass(frozen=True)
class Uniform:
    """2**bits evenly spaced levels.

    Symmetric: up to 4 bits the levels are ``±1/2, ±3/2, .. * scale`` (1 bit is binary); from 5 bits on they are
    ``-2**(bits-1) .. 2**(bits-1) - 1`` times scale, with zero a level and integers all. On the convolutions of
    EfficientNet-Lite0 the first form has 0.90, 0.33, 0.12, 0.04, 0.00, -0.02, -0.03 dB more signal to noise than the
    second at 2 .. 8 bits, so it is used where that is worth having no zero.
    Affine: ``scale * (code - zero_point)`` with a zero point per row in 0 .. 2**bits - 1. Up to 4 bits, with the scale
    ``mse``, it is a multiple of 1/2, so that these levels fit no worse than the symmetric ones; else an integer, and
    zero is a level.

    Attributes:
        bits: 1 to 8.
        symmetric: whether the levels lie around zero.
        scale: ``mse``: least squares (see ``leastsquares.best_scale`` and ``best_affine`` for how exact);
            ``absmax``: the levels just span the row, if affine the row and zero; ``mean``: the step that is best for
            Gaussian weights of the row's mean magnitude, if affine of its mean absolute deviation from its mean.
    """

    bits: int
    symmetric: bool = True
    scale: Literal["mse", "absmax", "mean"] = "mse"

    def __post_init__(self) -> None:
        _check_range("bits", self.bits, 1, 8)
        _check_choice("scale", self.scale, ("mse", "absmax", "mean"))

    @property
    def text(self) -> str:
        return f"uniform {self.bits}-bit {'symmetric' if self.symmetric else 'affine'}, {self.scale} scale"

    def fit(self, rows: Tensor) -> Affine:
        count = 2**self.bits
        if not self.symmetric:
            scale, zero = _by_chunk(rows, self._affine, reach=count - 1)
            return Affine(scale, zero, count)
        zero_point, table = self._around_zero(rows)
        kernels: dict[str, Kernel] = {
            "mse": lambda chunk: (_least_squares_scale(chunk, table, self._step(chunk)),),
            "absmax": lambda chunk: (torch.maximum(chunk.amax(1) / table[-1], chunk.amin(1) / table[0]),),
            "mean": lambda chunk: (self._step(chunk),),
        }
        (scale,) = _by_chunk(rows, kernels[self.scale], reach=count / 2)
        return Affine(scale, zero_point, count)

    def _around_zero(self, rows: Tensor) -> tuple[float, Tensor]:
        """The zero point of symmetric levels, and these in units of the scale: float64 ``[k]``."""
        count = 2**self.bits
        middle = (count - 1) / 2 if zero_steps(count) == 2 else count / 2
        return middle, torch.arange(count, dtype=torch.float64, device=rows.device) - middle

    @property
    def per_magnitude(self) -> float | None:
        return self._gaussian if self.symmetric and self.scale == "mean" else None

    @property
    def _gaussian(self) -> float:
        return GAUSSIAN_STEP[self.bits - 1] * math.sqrt(math.pi / 2)

    def _step(self, rows: Tensor) -> Tensor:
        """The step that suits Gaussian weights of the mean magnitude of ``rows``: float64 ``[c]``."""
        return _mean_magnitude(rows) * self._gaussian

    def _affine(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        top = 2**self.bits - 1
        if self.scale == "absmax":
            low, high = rows.amin(1).clamp(max=0).double(), rows.amax(1).clamp(min=0).double()
            scale = (high - low) / top
            zero = -low / scale
        else:
            center = rows.mean(1).double()
            scale = self._step(rows - center[:, None])
            zero = top / 2 - center / scale
        zero = zero.nan_to_num(nan=0.0).round().clamp(0, top)
        if self.scale != "mse":
            return scale, zero.to(torch.uint8)
        middle, table = self._around_zero(rows)
        symmetric = _least_squares_scale(rows.clone(), table, self._step(rows))
        rules = (scale, zero), (symmetric, torch.full_like(zero, middle))
        scale, zero = best_affine(sort_rows(rows), top + 1, rules)
        return scale, zero.to(torch.float16 if zero_steps(top + 1) == 2 else torch.uint8)


@dataclass(frozen=True)
class KMeans:
    """The k levels of least squared error without any other condition: optimal one-dimensional k-means.

    How exact: ``kmeans.kmeans``. A row with fewer distinct weights than levels is met exactly.

    Attributes:
        levels: 2 to 256.
    """

    levels: int

    def __post_init__(self) -> None:
        _check_range("levels", self.levels, 2, 256)

    @property
    def text(self) -> str:
        return f"k-means, {self.levels} levels"

    def fit(self, rows: Tensor) -> Codebook:
        (table,) = _by_chunk(rows, lambda chunk: (kmeans(sort_rows(chunk), self.levels),))
        return Codebook(table)


@dataclass(frozen=True)
class AdditivePowersOfTwo:
    """Levels ``± scale * sum of one power of two (or none) from each of several lists`` (arXiv 1909.13144).

    The ``bits - 1`` bits of the magnitude are dealt to the terms; a term of m bits is one of ``2**m - 1`` powers of two
    or zero. The powers 1, 1/2, 1/4, .. go round the terms, the longer terms beginning earlier, as in the paper's code,
    so all sums differ: ``2**bits - 1`` levels. One term: plain powers of two. The scale is the least-squares one.

    Attributes:
        bits: 2 to 8.
        terms: 1 to bits - 1; None: one for every two bits of the magnitude, as in the paper.
    """

    bits: int
    terms: int | None = None

    def __post_init__(self) -> None:
        _check_range("bits", self.bits, 2, 8)
        if self.terms is not None:
            _check_range(f"terms of {self.bits} bits", self.terms, 1, self.bits - 1)

    @property
    def text(self) -> str:
        terms = self._terms
        return f"powers of two, {self.bits} bits" if terms == 1 else f"sums of {terms} powers of two, {self.bits} bits"

    @property
    def _terms(self) -> int:
        return self.bits // 2 if self.terms is None else self.terms

    def fit(self, rows: Tensor) -> Codebook:
        return _scaled_table(rows, additive_powers(self.bits - 1, self._terms), "mse")


@dataclass(frozen=True)
class Fixed:
    """Listed levels, the same for all rows.

    Attributes:
        levels: 2 to 256 different numbers, or ``nf4`` (arXiv 2305.14314).
        scale: ``none``: the levels are used as they are; ``absmax``: each row's levels are scaled so that the largest
            in magnitude meets the row's largest magnitude; ``mse``: so that the squared error is least
            (``leastsquares.best_scale``).
    """

    levels: tuple[float, ...] | Literal["nf4"]
    scale: Literal["none", "absmax", "mse"] = "none"

    def __post_init__(self) -> None:
        _check_choice("scale", self.scale, ("none", "absmax", "mse"))
        if isinstance(self.levels, str):
            _check_choice("levels", self.levels, ("nf4",))
            return
        table: list[float] = torch.tensor(self.levels, dtype=torch.float32).tolist()
        if not 2 <= len(set(table)) == len(table) <= 256 or not all(map(math.isfinite, table)):
            raise ValueError(f"levels has to be 2 to 256 different finite numbers or nf4, not {self.levels}")

    @property
    def text(self) -> str:
        levels = "nf4" if self.levels == "nf4" else f"{{{', '.join(f'{level:g}' for level in sorted(self._levels))}}}"
        return f"fixed {levels}" + ("" if self.scale == "none" else f", {self.scale} scale")

    @property
    def _levels(self) -> tuple[float, ...]:
        return NF4 if isinstance(self.levels, str) else self.levels

    def fit(self, rows: Tensor) -> Codebook:
        return _scaled_table(rows, tuple(sorted(self._levels)), self.scale)


Quantizer = Binary | Ternary | LeastSquaresBinary | Uniform | KMeans | AdditivePowersOfTwo | Fixed

Kernel = Callable[[Tensor], tuple[Tensor, ...]]


def as_they_are(quantizer: object) -> bool:
    """Whether its levels are listed, and used whatever the weights are."""
    return isinstance(quantizer, Fixed) and quantizer.scale == "none"


def _by_chunk(rows: Tensor, kernel: Kernel, reach: float = 1.0) -> tuple[Tensor, ...]:
    """Apply ``kernel`` to a few rows at a time, in units in which their sums and squares are harmless.

    Each row is divided by the power of two that brings its largest magnitude into [1, 2), which is exact, and the
    kernel's floating results ``[c]`` or ``[c, k]`` are multiplied by it again and rounded to float32. The kernel may
    overwrite the chunk. ``reach`` times a result stays finite too.
    """
    assert rows.ndim == 2, rows.shape
    assert rows.dtype == torch.float32, rows.dtype
    assert rows.numel(), rows.shape
    limit = torch.finfo(torch.float32).max / max(1.0, reach) * (1 - 1e-6)

    def work(part: Tensor) -> tuple[Tensor, ...]:
        largest = torch.linalg.vector_norm(part, ord=torch.inf, dim=1)
        unit = torch.where(largest > 0, largest / (torch.frexp(largest).mantissa * 2), 1.0)
        results = kernel((part / unit[:, None]).contiguous())
        units = [unit.double().reshape(-1, *[1] * (result.ndim - 1)) for result in results]
        return tuple(
            (result * unit).clamp(-limit, limit).float() if result.dtype in (torch.float32, torch.float64) else result
            for result, unit in zip(results, units, strict=True)
        )

    done = each(work, torch.split(rows, max(1, _CHUNK // rows.shape[1])), rows.device)
    return tuple(torch.cat(columns) for columns in zip(*done, strict=True))


def _mean_magnitude(rows: Tensor) -> Tensor:
    return power_sum(rows, 1) / rows.shape[1]


def _ternary(rows: Tensor) -> tuple[Tensor]:
    sums = sort_rows(rows.abs_().neg_()).sums
    best, scale = rows.new_zeros(2, rows.shape[0], dtype=torch.float64)
    for start in range(1, sums.shape[1], PIECE):
        part = sums[:, start : start + PIECE]
        k = torch.arange(start, start + part.shape[1], dtype=torch.float64, device=rows.device)
        gain, at = (part.square() / k).max(1)
        mean = -part.gather(1, at[:, None])[:, 0] / k[at]
        best, scale = best.maximum(gain), mean.where(gain > best, scale)
    return (scale,)


def _least_squares_scale(rows: Tensor, table: Tensor, rule: Tensor | None = None) -> Tensor:
    """``best_scale`` of rows that need not be sorted; the half of a symmetric table does for the magnitudes."""
    if torch.equal(table, -table.flip(0)):
        rows, table = rows.abs_(), table[table >= 0]
    return best_scale(sort_rows(rows), table, rule)


def _scaled_table(rows: Tensor, levels: tuple[float, ...], scale: Literal["none", "absmax", "mse"]) -> Codebook:
    table = torch.tensor([levels], dtype=torch.float32, device=rows.device)
    if scale == "none":
        return Codebook(table)
    reach, listed = float(table.abs().max()), table[0].double()

    def absmax(chunk: Tensor) -> tuple[Tensor]:
        return (torch.linalg.vector_norm(chunk, ord=torch.inf, dim=1).double() / reach,)

    def mse(chunk: Tensor) -> tuple[Tensor]:
        return (_least_squares_scale(chunk, listed),)

    (scales,) = _by_chunk(rows, mse if scale == "mse" else absmax, reach)
    return Codebook(table, scales)


@cache
def additive_powers(bits: int, terms: int) -> tuple[float, ...]:
    """The sums of ``AdditivePowersOfTwo`` with ``bits`` bits of magnitude, both signs, ascending, the largest 1."""
    powers: list[list[float]] = [[0.0] for _ in range(terms)]
    counts = [2 ** (bits // terms + (term < bits % terms)) - 1 for term in range(terms)]
    exponent = 0
    for left in range(counts[0], 0, -1):
        for term in sorted(range(terms), key=lambda term: counts[term]):
            if counts[term] >= left:
                powers[term].append(2.0**-exponent)
                exponent += 1
    sums = sorted({sum(choice) for choice in product(*powers)})
    return tuple(-level / sums[-1] for level in sums[:0:-1]) + tuple(level / sums[-1] for level in sums)


def _least_squares_binary(rows: Tensor, bits: int, refine: int) -> Tensor:
    """Levels float64 ``[c, 2**bits]``. By symmetry the magnitudes and the nonnegative levels do."""
    rest, greedy = rows.abs(), []
    for _ in range(bits):
        greedy.append(_mean_magnitude(rest))
        rest = rest.sub_(greedy[-1][:, None]).abs_()
    del rest
    magnitudes = sort_rows(rows.abs_())
    signs = torch.tensor([(1.0, *rest) for rest in product((1.0, -1.0), repeat=bits - 1)]).to(rows.device).double()
    error, best = torch.full_like(magnitudes.square, torch.inf), torch.stack(greedy, 1)
    starts = [best]
    if refine:
        halves = torch.arange(2 ** (bits - 1), dtype=torch.float64, device=rows.device) + 0.5
        steps = 2.0 ** torch.arange(bits - 2, -2, -1, dtype=torch.float64, device=rows.device)
        starts.append(best_scale(magnitudes, halves)[:, None] * steps)
    for values in starts:
        for _ in range(refine + 1):
            found, refit = _judge_binary(magnitudes, signs, values)
            better = found < error
            error, best = found.where(better, error), values.where(better[:, None], best)
            values = refit
    levels = (best @ signs.T).abs().sort(1).values
    return torch.cat([-levels.flip(1), levels], 1)


def _judge_binary(rows: SortedRows, signs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error ``[c]`` of the levels of ``values [c, b]``, and the least-squares values for their codes."""
    sums = values @ signs.T
    patterns = signs * torch.where(sums < 0, -1.0, 1.0)[:, :, None]
    levels, order = sums.abs().sort(1)
    patterns = patterns.gather(1, order[:, :, None].expand(patterns.shape))
    counts, totals = rows.runs(rows.cuts((levels[:, 1:] + levels[:, :-1]) / 2))
    error = rows.square + (levels * (levels * counts - 2 * totals)).sum(1)
    normal = torch.einsum("cm,cmi,cmj->cij", counts, patterns, patterns)
    ridge = 1e-12 * counts.sum(1)[:, None, None] * torch.eye(signs.shape[1], dtype=signs.dtype, device=signs.device)
    right = torch.einsum("cm,cmi->ci", totals, patterns)
    return error, torch.linalg.solve(normal + ridge, right)


def _bits(bits: int) -> str:
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} has to be a whole number from {low} to {high}, not {value!r}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} has to be one of {', '.join(allowed)}, not {value!r}")
