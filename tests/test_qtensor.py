"""Quantized tensors: sizes known beforehand, tails fitted on real weights, and what comes back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcq.grids import Affine, Codebook
from pcq.packing import pack
from pcq.qtensor import Quantizer, blank, encode, fit, quantize, stored_bytes
from pcq.quantizers import AdditivePowersOfTwo, Binary, Fixed, KMeans, LeastSquaresBinary, Ternary, Uniform
from pcq.rows import Rows

EVERY: tuple[Quantizer, ...] = (
    Binary(),
    Ternary(),
    LeastSquaresBinary(1),
    LeastSquaresBinary(2),
    Uniform(1),
    Uniform(4),
    Uniform(8),
    Uniform(3, symmetric=False),
    Uniform(8, symmetric=False, scale="absmax"),
    KMeans(2),
    KMeans(5),
    KMeans(16),
    AdditivePowersOfTwo(4),
    Fixed((-1.0, 0.0, 1.0)),
    Fixed((-1.0, -0.3, 0.3, 1.0), "mse"),
    Fixed("nf4", "absmax"),
)

CUTS = st.sampled_from([
    Rows((4, 6)),
    Rows((4, 6), axis=None),
    Rows((4, 6), group=4),
    Rows((4, 6), axis=None, group=7),
    Rows((1, 6), group=4),  # one group and one tail
    Rows((1, 6), group=3),
    Rows((5, 1, 3, 3), group=2),
    Rows((4, 3, 2, 2), axis=1, blocks=2),
    Rows((4, 3, 2), axis=1, group=5),
    Rows((7,), axis=0),
    Rows((1, 1)),
    Rows((), axis=None),
])  # fmt: skip
WEIGHTS = st.sampled_from(["normal", "zero", "constant"])


def some_weight(kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "normal":
        return torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return torch.full(shape, 0.0 if kind == "zero" else -0.7)


@settings(deadline=None, max_examples=120)
@given(quantizer=st.sampled_from(EVERY), rows=CUTS, kind=WEIGHTS)
def test_the_size_is_known_beforehand_and_is_the_size_of_what_is_stored(
    quantizer: Quantizer, rows: Rows, kind: str
) -> None:
    weight = some_weight(kind, rows.shape)
    quantized, empty = quantize(quantizer, weight, rows), blank(quantizer, rows)
    assert type(empty) is type(quantized.grid)
    assert empty.count == quantized.grid.count
    assert stored_bytes(empty, weight.numel()) == quantized.nbytes
    stored = [pack(quantized.codes, quantized.grid.count)]
    grid = quantized.grid
    stored += [grid.scale, grid.zero_point] if isinstance(grid, Affine) else [grid.table, grid.scale]
    assert quantized.nbytes == sum(t.numel() * t.element_size() for t in stored if isinstance(t, Tensor))


@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_blank_grids_are_zero_but_for_shared_tables(quantizer: Quantizer) -> None:
    rows = Rows((300, 20), group=7)
    grid = blank(quantizer, rows)
    if isinstance(grid, Affine):
        assert grid.scale.shape == (900,)
        assert not grid.scale.any()
    elif grid.scale is not None:
        assert not grid.scale.any()
    else:
        assert not grid.table.any() or grid.table.shape[0] == 1


@settings(deadline=None, max_examples=50)
@given(quantizer=st.sampled_from(EVERY), rows=CUTS, kind=WEIGHTS)
def test_each_row_is_fitted_on_its_own_real_weights(quantizer: Quantizer, rows: Rows, kind: str) -> None:
    """The slow twin: one row at a time, padding cut off by hand."""
    weight = some_weight(kind, rows.shape)
    quantized = quantize(quantizer, weight, rows)
    wanted = torch.zeros(rows.g, rows.width)
    for i, row in enumerate(rows.split(weight)):
        real = row[: rows.tail] if i % rows.groups == rows.groups - 1 else row
        grid = quantizer.fit(real[None])
        wanted[i, : real.numel()] = grid.decode(grid.encode(real[None]))[0]
    assert torch.equal(quantized.dequantize(), rows.merge(wanted))


@settings(deadline=None, max_examples=60)
@given(quantizer=st.sampled_from(EVERY), rows=CUTS)
def test_quantizing_the_quantized_changes_nothing(quantizer: Quantizer, rows: Rows) -> None:
    quantized = quantize(quantizer, some_weight("normal", rows.shape), rows)
    again = encode(quantized.dequantize(), quantized.grid, rows)
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_quantized_as_float32(dtype: torch.dtype) -> None:
    weight = some_weight("normal", (4, 9)).to(dtype).requires_grad_()
    quantized = quantize(Ternary(), weight, Rows((4, 9)))
    assert torch.equal(quantized.codes, quantize(Ternary(), weight.detach().float(), Rows((4, 9))).codes)
    assert quantized.dequantize().dtype == torch.float32
    assert not quantized.dequantize().requires_grad


def test_the_weight_is_left_alone() -> None:
    for quantizer in EVERY:
        weight = some_weight("normal", (4, 9))
        before = weight.clone()
        quantize(quantizer, weight, Rows((4, 9)))
        assert torch.equal(weight, before)


def test_ternary_takes_its_bytes() -> None:
    rows = Rows((64, 64, 3, 3))
    quantized = quantize(Ternary(), some_weight("normal", rows.shape), rows)
    assert quantized.nbytes == math.ceil(64 * 64 * 9 / 5) + 4 * 64


def test_an_empty_weight_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="empty"):
        fit(Ternary(), torch.zeros(0, 4), Rows((0, 4)))


def test_one_table_for_all_is_stored_once() -> None:
    quantized = quantize(Fixed((-1.0, 0.0, 1.0)), some_weight("normal", (50, 9)), Rows((50, 9), group=2))
    assert isinstance(quantized.grid, Codebook)
    assert quantized.nbytes == math.ceil(450 / 5) + 12


def test_codes_lie_in_memory_as_the_weight_does() -> None:
    weight = torch.randn(3, 4, 2)
    assert quantize(Ternary(), weight, Rows((3, 4, 2), 1)).codes.is_contiguous()
