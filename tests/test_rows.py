"""How weights are cut into rows: round trips, and that a row really is an output channel."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pcq.rows import Rows


@st.composite
def any_rows(draw: st.DrawFn) -> Rows:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    axis = draw(st.sampled_from([None, 0, 1] if len(shape) > 1 else [None, 0]))
    blocks = draw(st.sampled_from([b for b in range(1, shape[0] + 1) if shape[0] % b == 0])) if axis == 1 else 1
    return Rows(shape, axis, blocks, draw(st.none() | st.integers(1, 40)))


@settings(deadline=None, max_examples=200)
@given(any_rows())
def test_split_and_merge_are_inverse(rows: Rows) -> None:
    weight = torch.arange(1, math.prod(rows.shape) + 1).float().reshape(rows.shape)
    split = rows.split(weight)
    assert split.shape == (rows.g, rows.width)
    assert torch.equal(rows.merge(split), weight)
    assert rows.channels * rows.length == weight.numel()
    assert rows.g == rows.channels * rows.groups


@settings(deadline=None, max_examples=200)
@given(any_rows())
def test_only_the_end_of_a_channel_is_padded(rows: Rows) -> None:
    split = rows.split(torch.ones(rows.shape)).reshape(rows.channels, rows.groups, rows.width)
    assert 0 < rows.tail <= rows.width
    assert bool((split[:, :-1] == 1).all())
    assert bool((split[:, -1, : rows.tail] == 1).all())
    assert not split[:, -1, rows.tail :].any()


@settings(deadline=None, max_examples=100)
@given(any_rows())
def test_uint8_codes_are_cut_alike(rows: Rows) -> None:
    codes = torch.randint(0, 256, rows.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert rows.merge(rows.split(codes)).dtype == torch.uint8
    assert torch.equal(rows.merge(rows.split(codes)), codes)


def test_groups_are_runs_of_a_channel() -> None:
    split = Rows((2, 5), group=2).split(torch.arange(10.0).reshape(2, 5))
    assert split.tolist() == [[0, 1], [2, 3], [4, 0], [5, 6], [7, 8], [9, 0]]
    assert Rows((2, 5), group=100).split(torch.zeros(2, 5)).shape == (2, 5)
    assert Rows((2, 5), axis=None, group=4).g == 3


def test_whole_tensor_is_one_row() -> None:
    assert Rows((3, 4), axis=None).split(torch.zeros(3, 4)).shape == (1, 12)
    assert Rows((), axis=None).split(torch.tensor(2.0)).tolist() == [[2.0]]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_row_of_a_transposed_convolution_feeds_one_output_channel(groups: int) -> None:
    rows = Rows((8, 3, 2, 2), axis=1, blocks=groups)
    image = torch.rand(1, 8, 3, 3) + 0.5
    assert rows.g == 3 * groups
    for row in range(rows.g):
        split = torch.zeros(rows.g, rows.width)
        split[row] = 1
        out = F.conv_transpose2d(image, rows.merge(split), groups=groups)
        alive = out.abs().sum((0, 2, 3)) > 0
        assert alive.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_row_of_a_convolution_feeds_one_output_channel(groups: int) -> None:
    rows = Rows((4, 8 // groups, 3))
    for row in range(rows.g):
        split = torch.zeros(rows.g, rows.width)
        split[row] = 1
        out = F.conv1d(torch.rand(1, 8, 5) + 0.5, rows.merge(split), groups=groups)
        assert (out.abs().sum((0, 2)) > 0).nonzero().flatten().tolist() == [row]


def test_splitting_rows_of_a_plain_weight_copies_nothing() -> None:
    weight = torch.rand(4, 3, 3, 3)
    assert Rows(tuple(weight.shape)).split(weight).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("wrong", [{"axis": 2}, {"axis": 1, "blocks": 3}, {"group": 0}, {"blocks": 2}])
def test_impossible_rows_are_our_mistake(wrong: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        Rows((4, 3, 2), **wrong)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.parametrize("group", [None, 3])
def test_empty_weights_have_empty_rows(shape: tuple[int, ...], group: int | None) -> None:
    rows = Rows(shape, group=group)
    split = rows.split(torch.zeros(shape))
    assert split.shape == (shape[0], 0)
    assert rows.merge(split).shape == shape


def test_another_shape_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        Rows((2, 6)).split(torch.zeros(3, 4))
    with pytest.raises(AssertionError):
        Rows((2, 6), group=4).merge(torch.zeros(2, 8))
