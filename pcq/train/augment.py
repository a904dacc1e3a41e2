"""Random changes of training images: one pure function of a batch and a generator each.

The generator is the CPU's; the images may be on any device, and what is done to them is the same there.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pcq.errors import PcqError
from pcq.spec import parse

Kind = Literal["none", "crop", "crop-flip", "resized-crop"]
Augment = Callable[[Tensor, torch.Generator], Tensor]

USUAL: dict[str, Kind] = {
    "digits": "crop",
    "fashion-mnist": "crop-flip",
    "cifar10": "crop-flip",
    "folder": "resized-crop",
}
"""What ``auto`` is for each kind of data; others have none."""

AREA = (0.25, 1.0)
ASPECT = (3 / 4, 4 / 3)


def settle(wanted: str, data: str) -> Kind:
    """The kind of augmentation that ``wanted`` means for a data spec."""
    kinds: dict[str, Kind] = {"none": "none", "crop": "crop", "crop-flip": "crop-flip", "resized-crop": "resized-crop"}
    return USUAL.get(parse(data).kind, "none") if wanted == "auto" else kinds[wanted]


def make(kind: Kind, shape: tuple[int, ...]) -> Augment | None:
    """The function for samples of ``shape`` [c, h, w], as the network takes them.

    Raises:
        PcqError: the samples are not images.
    """
    if kind == "none":
        return None
    if len(shape) != 3:
        raise PcqError(f"samples of shape {list(shape)} are not images", where=f"augment: {kind}", allowed="none")
    if kind == "resized-crop":
        return lambda x, generator: flip(resized_crop(x, shape[1:], generator), generator)
    pad = max(1, min(shape[1:]) // 8)
    if kind == "crop":
        return lambda x, generator: crop(x, pad, generator)
    return lambda x, generator: flip(crop(x, pad, generator), generator)


def crop(x: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Each image of ``[b, c, h, w]`` moved by up to ``pad`` pixels each way; zeros come in."""
    b, _, h, w = x.shape
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    down, right = (torch.randint(2 * pad + 1, (b, 1, 1), generator=generator) for _ in range(2))
    rows, columns = down + torch.arange(h)[None, :, None], right + torch.arange(w)[None, None, :]
    index = [i.to(x.device, non_blocking=True) for i in (torch.arange(b)[:, None, None], rows, columns)]
    return padded[index[0], index[1], index[2]].permute(0, 3, 1, 2)


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every second image mirrored left to right, by chance."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored.to(x.device, non_blocking=True), x.flip(-1), x)


def resized_crop(x: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random rectangle of each image, of a quarter to all of its area, resized to ``size`` (bilinear)."""
    b = len(x)
    area, shape, across, down = torch.rand(4, b, generator=generator, dtype=torch.float64)
    share = AREA[0] + (AREA[1] - AREA[0]) * area
    ratio = torch.exp(math.log(ASPECT[0]) + (math.log(ASPECT[1]) - math.log(ASPECT[0])) * shape)
    wide, high = ((share * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
    zero = torch.zeros_like(wide)
    moves = torch.stack(
        [
            torch.stack([wide, zero, (1 - wide) * (2 * across - 1)], 1),
            torch.stack([zero, high, (1 - high) * (2 * down - 1)], 1),
        ],
        1,
    )
    grid = F.affine_grid(moves.float().to(x.device, non_blocking=True), [b, x.shape[1], *size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
