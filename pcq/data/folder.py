"""Folders of images: one subfolder a class, sorted by name, as torchvision's ImageFolder has it; or flat, no labels."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pcq.data.dataset import Data
from pcq.data.inputs import per_channel
from pcq.errors import NoSplit, PcqError

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SPLITS = {"test": ("test", "val"), "val": ("val",), "train": ("train",)}
LARGEST = 4096
"""Longest side of a sample; images may be twice that before their middle is cut out."""
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Found:
    """Image files in order; ``labels`` index ``classes``, both empty where the folder is flat."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to ``resize`` (0: none), the middle ``size`` x ``size``, then ``(pixel / 255 - mean) / std``."""

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Image.Resampling

    def __call__(self, path: Path) -> Tensor:
        """``[c, size, size]`` float32; grey where mean has one value.

        Raises:
            PcqError: the image cannot be read, or is smaller than ``size`` and not resized.
        """
        image = open_image(path, "L" if len(self.mean) == 1 else "RGB")
        width, height = image.size
        if self.resize and min(width, height) != self.resize:
            short = min(width, height)
            width, height = (int(self.resize * side / short) for side in (width, height))
            image = image.resize((width, height), self.interpolation)
        if min(width, height) < self.size:
            todo = "Leave resize out, or give a size that fits"
            raise PcqError(f"the image is {width}x{height}, smaller than {self.size}", where=str(path), todo=todo)
        left, top = round((width - self.size) / 2.0), round((height - self.size) / 2.0)
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        x = torch.from_numpy(pixels.reshape(self.size, self.size, -1).copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (x - mean) / std


def open_image(path: Path, mode: str) -> Image.Image:
    """Decoded and converted; 16-bit values become 8-bit ones, so that white stays white.

    Raises:
        PcqError: the file is no image, or damaged, or of numbers that have no greatest one.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                wide = np.asarray(image).astype(np.uint32)
                return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert(mode)
            if image.mode in ("I", "F"):
                held = "32-bit integers" if image.mode == "I" else "floating-point numbers"
                raise PcqError(f"the image's values are {held}", where=str(path), allowed="images of 8 or 16 bits")
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PcqError(f"the image cannot be decoded: {error}", where=str(path), todo="Repair or remove it") from error


def find_images(folder: Path, classes: Sequence[str] = ()) -> Found:
    """The images of ``folder``: of its subfolders if any holds one, else its own.

    Args:
        folder: where to look.
        classes: names of the subfolders in the order of the labels; default: those that are there, sorted.

    Raises:
        PcqError: there is no image, or a subfolder is not among ``classes``.
    """
    present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    inside = {name: _walk(folder / name) for name in present}
    if not any(inside.values()):
        flat = tuple(sorted(path for path in folder.iterdir() if _is_image(path.name)))
        if not flat:
            raise PcqError("there is no image in it", where=str(folder), allowed=", ".join(ENDINGS))
        return Found(flat, (), ())
    if empty := [name for name in present if not inside[name]]:
        todo = "Remove the empty folders: they would count as classes"
        raise PcqError(f"no image is in {', '.join(empty[:5])}", where=str(folder), todo=todo)
    if strange := [name for name in present if classes and name not in classes]:
        raise PcqError(f"{', '.join(strange[:5])} are not among the classes given", where=str(folder))
    names = tuple(classes or present)
    number = {name: i for i, name in enumerate(names)}
    pairs = [(path, number[name]) for name in sorted(present, key=number.__getitem__) for path in inside[name]]
    return Found(tuple(path for path, _ in pairs), tuple(label for _, label in pairs), names)


def _walk(folder: Path) -> list[Path]:
    walked = sorted(os.walk(folder, followlinks=True))
    return [Path(root, name) for root, _, names in walked for name in sorted(names) if _is_image(name)]


def _is_image(name: str) -> bool:
    """By its name; ``._`` is how macOS calls what it knows of a file."""
    return name.lower().endswith(ENDINGS) and not name.startswith("._")


def open_folder(
    root: str,
    split: str,
    *,
    size: int = 224,
    resize: int | None = None,
    mean: tuple[float, ...] | float = IMAGENET[0],
    std: tuple[float, ...] | float = IMAGENET[1],
    interpolation: str = "bilinear",
    classes: str = "",
) -> Data:
    """``root/<split>`` (``test`` may be called ``val``) where there is one, ``root`` itself otherwise.

    Args:
        root: the folder.
        split: ``test``, ``val`` or ``train``.
        size: side of the square that the network sees.
        resize: the shorter side's length before the middle is cut out; default size * 256 / 224; 0: not resized.
        mean: of each channel, in 0..1; one value: images become grey.
        std: likewise.
        interpolation: ``bilinear`` or ``bicubic``.
        classes: a text file with the names of all class folders, one a line, in the order of the network's outputs;
            needed where the folder holds only some of the classes.

    Raises:
        PcqError: no folder, no images, or an option out of range.
        NoSplit: it has subfolders of other splits only.
    """
    base = Path(root).expanduser()
    if not root or not base.is_dir():
        raise PcqError("there is no such folder", where=f"folder:{root}")
    folder = next((base / name for name in SPLITS[split] if (base / name).is_dir()), base)
    others = [name for name in ("train", "val", "test") if folder == base and (base / name).is_dir()]
    if others:
        raise NoSplit(f"it has {' and '.join(f'{o}/' for o in others)} but no {split}/", where=str(base))
    means = per_channel(mean, "mean", f"folder:{root}")
    stds = per_channel(std, "std", f"folder:{root}", positive=True)
    sized = type(size) is int and 0 < size <= LARGEST  # the options are what the user typed, of any type
    shorter = (round(size * 256 / 224) if sized else 0) if resize is None else resize
    fits = sized and type(shorter) is int and (shorter == 0 or size <= shorter <= 2 * LARGEST)
    checks = (
        (len(means) == len(stds) and len(means) in (1, 3), "mean and std", "one value each, or three"),
        (sized, "size", f"a whole number from 1 to {LARGEST}"),
        (fits, "resize", f"0, or {size} to {2 * LARGEST}"),
        (interpolation in tuple(INTERPOLATIONS), "interpolation", " or ".join(INTERPOLATIONS)),
    )
    for holds, option, allowed in checks:
        if not holds:
            raise PcqError("the option is out of range", where=f"folder:{root}, {option}", allowed=allowed)
    found = find_images(folder, _names(Path(str(classes)).expanduser()) if classes != "" else ())
    prepare = Preprocessing(size, shorter, means, stds, INTERPOLATIONS[interpolation])
    cut = f"shorter side to {shorter} ({interpolation}), middle {size}x{size}" if shorter else f"middle {size}x{size}"
    notes = [f"Preprocessing: {cut}, mean {_listed(means)}, std {_listed(stds)}."]
    if folder == base and split != "test":
        notes.append(f"The folder has no {split}/: this is all of it.")
    numbers = all(name.isdigit() for name in found.classes)
    if found.classes and numbers and not classes and sorted(found.classes, key=int) != list(found.classes):
        notes.append(
            "Its classes are numbers in alphabetical order (10 before 2), as torchvision's ImageFolder has it."
        )

    def take(chosen: Sequence[int]) -> Tensor:
        return torch.stack([prepare(found.files[i]) for i in chosen])

    labels = torch.tensor(found.labels, dtype=torch.int64) if found.classes else None
    shape = (len(means), size, size)
    return Data(f"folder {folder}", split, len(found.files), shape, take, labels, found.classes, tuple(notes))


def _names(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise PcqError(f"the list of classes cannot be read: {error}", where=str(path)) from error
    if not names:
        raise PcqError("it names no class", where=str(path), allowed="the names of all class folders, one a line")
    if again := [name for name, times in Counter(names).items() if times > 1]:
        said = f"it names {', '.join(again[:5])} more than once"
        raise PcqError(said, where=str(path), allowed="each class once")
    return names


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
