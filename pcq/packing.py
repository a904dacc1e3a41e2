"""Codes to bytes and back, without waste.

A code in ``0 .. count - 1`` is written as one digit per *plane*, ``code = d0 + r0 * (d1 + r1 * ...)``; a plane of radix
r puts as many digits into a byte as fit (``r ** digits <= 256``), least significant first. So two levels take 1 bit,
three take 1.6 (five base-3 digits a byte), eight take 3 (a base-4 plane and a base-2 plane). Each plane is a whole
number of bytes; planes follow one another. The same bytes go into the artifact and into ONNX.
"""

import math
from functools import cache

import torch
from torch import Tensor

DIGITS = {2: 8, 3: 5, 4: 4, 16: 2, 256: 1}
"""Radix of a plane -> digits per byte. Other radices never beat a product of these."""


@cache
def planes(count: int) -> tuple[int, ...]:
    """The radices that store ``count`` levels in the fewest bits per code; of equals, the fewest planes.

    ``planes(2) = (2,)``, ``planes(3) = (3,)``, ``planes(8) = (4, 2)``, ``planes(16) = (16,)``, ``planes(64) = (16, 4)``.
    """
    assert 2 <= count <= 256, count

    def search(need: int, largest: int) -> list[tuple[int, ...]]:
        if need <= 1:
            return [()]
        return [(r, *rest) for r in DIGITS if r <= largest for rest in search(math.ceil(need / r), r)]

    return min(search(count, 256), key=lambda radices: (round(sum(1 / DIGITS[r] for r in radices), 9), len(radices)))


def packed_size(count: int, numel: int) -> int:
    """Bytes that ``numel`` codes of ``count`` levels take."""
    return sum(math.ceil(numel / DIGITS[radix]) for radix in planes(count))


def pack(codes: Tensor, count: int) -> Tensor:
    """``codes`` (uint8, any shape, each < count) ``-> uint8 [packed_size]``, in row-major order."""
    assert codes.dtype == torch.uint8, codes.dtype
    assert not codes.numel() or int(codes.max()) < count, (int(codes.max()), count)
    flat = codes.reshape(-1)
    packed = []
    for radix in planes(count):
        digits, flat = (flat, flat) if radix == 256 else (flat % radix, flat // radix)
        per_byte = DIGITS[radix]
        digits = torch.nn.functional.pad(digits, (0, -digits.numel() % per_byte)).reshape(-1, per_byte)
        value = torch.zeros(digits.shape[0], dtype=torch.uint8, device=codes.device)
        for i in range(per_byte):
            value += digits[:, i] * radix**i
        packed.append(value)
    return torch.cat(packed)


def unpack(packed: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack`: uint8 ``[packed_size] -> codes [*shape]``.

    Raises:
        ValueError: the bytes are not as many as the shape needs, or hold a code >= count (a corrupt file).
    """
    numel = math.prod(shape)
    if packed.numel() != packed_size(count, numel):
        raise ValueError(f"{packed.numel()} bytes where {count} levels of shape {list(shape)} take "
                         f"{packed_size(count, numel)}")
    codes = torch.zeros(numel, dtype=torch.int16, device=packed.device)
    place, offset, valid = 1, 0, True
    for radix in planes(count):
        per_byte = DIGITS[radix]
        value = packed[offset : offset + math.ceil(numel / per_byte)]
        offset += value.numel()
        digits = value[:, None] if radix == 256 else torch.stack([value // radix**i % radix for i in range(per_byte)], 1)
        valid = valid and (numel == 0 or int(value.max()) < radix**per_byte)
        codes += digits.reshape(-1)[:numel].to(torch.int16) * place
        place *= radix
    if not valid or (numel and int(codes.max()) >= count):
        raise ValueError(f"a code that is not one of {count} levels")
    return codes.to(torch.uint8).reshape(shape)
