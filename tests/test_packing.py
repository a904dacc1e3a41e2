"""Codes to bytes: golden bytes, the slow twin, round trips, and what a corrupt file says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcq import packing
from pcq.packing import DIGITS, pack, packed_size, planes, unpack


def slow_pack(codes: list[int], count: int) -> list[int]:
    """Plane by plane and byte by byte, from the definition."""
    packed = []
    for radix in planes(count):
        digits, codes = [code % radix for code in codes], [code // radix for code in codes]
        for start in range(0, len(digits), DIGITS[radix]):
            packed.append(sum(digit * radix**i for i, digit in enumerate(digits[start : start + DIGITS[radix]])))
    return packed


def random_codes(count: int, numel: int, seed: int = 0) -> Tensor:
    return torch.randint(0, count, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_golden_bytes() -> None:
    assert pack(torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1], dtype=torch.uint8), 2).tolist() == [0b10001101, 1]
    assert pack(torch.tensor([2, 1, 0, 2, 1, 2], dtype=torch.uint8), 3).tolist() == [2 + 3 + 2 * 27 + 81, 2]
    assert pack(torch.tensor([5, 2, 7], dtype=torch.uint8), 8).tolist() == [1 + 2 * 4 + 3 * 16, 0b101]
    assert pack(torch.tensor([15, 1, 9], dtype=torch.uint8), 16).tolist() == [15 + 16, 9]
    assert pack(torch.tensor([200], dtype=torch.uint8), 256).tolist() == [200]


def test_golden_planes() -> None:
    known = {2: (2,), 3: (3,), 4: (4,), 8: (4, 2), 16: (16,), 32: (16, 2), 64: (16, 4), 128: (16, 4, 2), 256: (256,)}
    assert {count: planes(count) for count in known} == known


@pytest.mark.parametrize("count", range(2, 257))
def test_planes_hold_the_levels_in_no_more_than_whole_bits(count: int) -> None:
    assert math.prod(planes(count)) >= count
    assert sum(1 / DIGITS[radix] for radix in planes(count)) <= math.ceil(math.log2(count)) / 8
    assert packed_size(count, 1000) * 8 >= 1000 * math.log2(count)


@settings(deadline=None, max_examples=150)
@given(count=st.integers(2, 256), numel=st.integers(0, 200), seed=st.integers(0, 999))
def test_is_its_slow_twin_and_comes_back(count: int, numel: int, seed: int) -> None:
    codes = random_codes(count, numel, seed)
    packed = pack(codes, count)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == slow_pack(codes.tolist(), count)
    assert packed.numel() == packed_size(count, numel)
    assert torch.equal(unpack(packed, count, (numel,)), codes)


@pytest.mark.parametrize("count", [2, 3, 6, 8, 9, 12, 200])
def test_pieces_fit_together(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(count, 40 * 7 + 3)
    whole = pack(codes, count)
    monkeypatch.setattr(packing, "_CHUNK", 40)
    assert torch.equal(pack(codes, count), whole)
    assert torch.equal(unpack(whole, count, (codes.numel(),)), codes)


def test_shapes_and_strides() -> None:
    codes = random_codes(5, 24).reshape(4, 6).t()
    assert torch.equal(unpack(pack(codes, 5), 5, (6, 4)), codes)
    assert torch.equal(pack(codes, 5), pack(codes.contiguous(), 5))
    assert unpack(pack(codes[:0], 5), 5, (0, 4)).shape == (0, 4)


def test_a_code_too_large_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        pack(torch.tensor([3], dtype=torch.uint8), 3)


@pytest.mark.parametrize(
    ("values", "count", "numel", "message"),
    [
        ([0, 0], 3, 4, "2 bytes where 3 levels of shape .4. take 1"),
        ([], 2, 1, "0 bytes"),
        ([243], 3, 5, "not 5 digits of 3"),
        ([2, 1], 5, 1, "not one of 5 levels"),
        ([255], 3, 1, "not 5 digits of 3"),
        ([3, 1], 7, 1, "not one of 7 levels"),
    ],
)
def test_corrupt_bytes_are_found(values: list[int], count: int, numel: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(torch.tensor(values, dtype=torch.uint8), count, (numel,))


@pytest.mark.parametrize("count", [3, 5, 6, 7, 12, 100, 255])
def test_every_byte_string_is_codes_or_an_error(count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        values = torch.randint(0, 256, (packed_size(count, 3),), dtype=torch.uint8, generator=generator)
        try:
            codes = unpack(values, count, (3,))
        except ValueError:
            continue
        assert int(codes.max()) < count


def test_pieces_are_whole_bytes_in_every_plane() -> None:
    assert not any(packing._CHUNK % digits for digits in packing.DIGITS.values())
