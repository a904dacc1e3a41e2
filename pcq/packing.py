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

    ``planes(2) = (2,)``, ``planes(3) = (3,)``, ``planes(8) = (4, 2)``, ``planes(64) = (16, 4)``.
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
    flat, radices = codes.reshape(-1), planes(count)
    packed = torch.empty(packed_size(count, flat.numel()), dtype=torch.uint8, device=codes.device)
    parts = _planes_of(packed, count, flat.numel())
    for start in range(0, flat.numel(), _CHUNK):
        rest = flat[start : start + _CHUNK]
        for radix, part in zip(radices[:-1], parts[:-1], strict=True):
            _write(rest % radix if radix == 3 else rest & (radix - 1), radix, part, start)
            rest = rest // radix if radix == 3 else rest >> (radix.bit_length() - 1)
        _write(rest, radices[-1], parts[-1], start)
    return packed


def unpack(packed: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack`: uint8 ``[packed_size] -> codes [*shape]``.

    Raises:
        ValueError: the bytes are not as many as the shape needs, or hold a code >= count (a corrupt file).
    """
    numel = math.prod(shape)
    if packed.numel() != packed_size(count, numel):
        raise ValueError(
            f"{packed.numel()} bytes where {count} levels of shape {list(shape)} take {packed_size(count, numel)}"
        )
    codes = torch.zeros(numel, dtype=torch.uint8, device=packed.device)  # no plane's product of radices exceeds 256
    parts = _planes_of(packed, count, numel)
    for start in range(0, numel, _CHUNK):
        out = codes[start : start + _CHUNK]
        place = 1
        for radix, part in zip(planes(count), parts, strict=True):
            per_byte = DIGITS[radix]
            values = part[start // per_byte : math.ceil((start + out.numel()) / per_byte)]
            if int(values.max()) >= radix**per_byte:
                raise ValueError(f"a byte that is not {per_byte} digits of {radix}")
            out.add_(_read(values, radix)[: out.numel()], alpha=place)
            place *= radix
        if int(out.max()) >= count:
            raise ValueError(f"a code that is not one of {count} levels")
    return codes.reshape(shape)


_CHUNK = 40 * 2**13
"""Codes that are worked on at a time: whole bytes in every plane."""


def _planes_of(packed: Tensor, count: int, numel: int) -> tuple[Tensor, ...]:
    """The bytes of each plane."""
    return torch.split(packed, [math.ceil(numel / DIGITS[radix]) for radix in planes(count)])


def _write(digits: Tensor, radix: int, part: Tensor, start: int) -> None:
    """Put the digits of codes from number ``start`` on into their plane."""
    per_byte = DIGITS[radix]
    digits = torch.nn.functional.pad(digits, (0, -digits.numel() % per_byte)).reshape(-1, per_byte)
    value = digits[:, -1].clone()
    for i in range(per_byte - 2, -1, -1):
        value.mul_(radix).add_(digits[:, i])
    part[start // per_byte :][: value.numel()] = value


def _read(values: Tensor, radix: int) -> Tensor:
    """The digits of bytes, one after another."""
    if radix == 3:
        return _trits().to(values.device).index_select(0, values.int()).reshape(-1)
    width = radix.bit_length() - 1
    return torch.stack([(values >> i * width) & (radix - 1) for i in range(DIGITS[radix])], 1).reshape(-1)


@cache
def _trits() -> Tensor:
    """uint8 ``[256, 5]``: the base-3 digits of each byte, least significant first."""
    return (torch.arange(256)[:, None] // 3 ** torch.arange(DIGITS[3]) % 3).to(torch.uint8)
