"""Real photos for measuring EfficientNet-Lite0: crops, cut-out objects, subjects, in three splits that share no photo.

Sources, all read by path: the sample photos of scikit-image and scikit-learn, matplotlib's portrait, and the photos of
Debian's picture packages (``apt-get download mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
ukui-wallpapers tuxpaint-stamps-default gcompris-qt-data`` and ``dpkg -x`` into one folder). tuxpaint's are animals,
food and things, cut out of their background, gcompris's of one subject each (animals, fish, tools, mills, monuments);
all else are mostly landscapes. Split by photo in the order of a hash of the file's name, or of the picture where it has
none: ``calib`` for calibration samples, ``valid`` for choosing settings, ``test`` for the numbers that are reported.
"""

import hashlib
import io
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Pixels = npt.NDArray[np.float32]

SPLITS = ("calib", "valid", "test")
SAMPLES = (
    *("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    *("coins.png", "grass.png", "brick.png", "gravel.png", "hubble_deep_field.jpg", "retina.jpg"),
)
OBJECTS = (
    *("animals", "clothes", "food", "hobbies", "household", "medical", "military", "people", "plants", "sports"),
    *("town", "vehicles"),
)
SUBJECTS = (
    *("categorization", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals"),
    "explore_world_music",
)
WEBP = re.compile(rb"RIFF(.{4})WEBP", re.DOTALL)
ABSTRACT = ("mate/desktop", "mate/abstract", "ukui", "desert.png", "rollpaper.png", "city.png")


def photos(skimage: Path, debian: Path) -> list[Path]:
    """Every photo file, ordered by the hash of its name."""
    import matplotlib
    import sklearn.datasets

    files = [skimage / "skimage/data" / name for name in SAMPLES]
    files += [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
    files += [Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"]
    files += [
        path
        for path in (debian / "usr/share/backgrounds").rglob("*")
        if path.suffix in (".jpg", ".png")
        and path.stat().st_size > 60_000
        and not any(a in str(path) for a in ABSTRACT)
    ]
    return mixed(files)


def mixed(files: Iterable[Path]) -> list[Path]:
    """In the order of the hash of their names."""
    return sorted(files, key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())


def mirrored(image: Image.Image, random: np.random.RandomState) -> Pixels:
    """Half the time; float32 ``[h, w, 3]``."""
    pixels = np.asarray(image, np.float32)
    return pixels[:, ::-1] if random.rand() < 0.5 else pixels


def part_of(image: Image.Image, least: float, size: int, random: np.random.RandomState) -> Pixels:
    """A square anywhere, of ``least`` to 1 of the shorter side, mirrored half the time: float32 ``[size, size, 3]``."""
    side = int(min(image.size) * random.uniform(least, 1.0))
    x, y = (random.randint(0, length - side + 1) for length in image.size)
    part = image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side), reducing_gap=2.0)
    return mirrored(part, random)


def scaled(images: Sequence[Pixels]) -> Tensor:
    """As the network takes them: ``[n, 3, h, w]``, ``(x - 127) / 128``."""
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() - 127) / 128


def objects(split: str, each: int, debian: Path, size: int = 224) -> Tensor:
    """``each`` views of every object of ``split`` on white: float32 ``[n, 3, size, size]``, ``(x - 127) / 128``.

    A view is a square of 1.0 to 1.5 times the object's longer side with the object anywhere in it, mirrored half the
    time. Pictures of less than 128 pixels and cartoons are left out.
    """
    root = debian / "usr/share/tuxpaint/stamps"
    files = (path for kind in OBJECTS for path in (root / kind).rglob("*.png") if "cartoon" not in str(path))
    out = []
    for path in mixed(path for path in files if max(Image.open(path).size) >= 128)[SPLITS.index(split) :: len(SPLITS)]:
        image = Image.open(path).convert("RGBA")
        random = np.random.RandomState(zlib.crc32(path.name.encode()))
        for _ in range(each):
            side = int(max(image.size) * random.uniform(1.0, 1.5))
            view = Image.new("RGBA", (side, side), "white")
            x, y = (random.randint(0, side - length + 1) for length in image.size)
            view.alpha_composite(image, (x, y))
            square = view.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            out.append(mirrored(square, random))
    return scaled(out)


def subjects(split: str, each: int, debian: Path, size: int = 224) -> Tensor:
    """``each`` views of every photo of a subject of ``split``: float32 ``[n, 3, size, size]``, ``(x - 127) / 128``.

    A view is a square of 70 to 100 percent of the shorter side, anywhere, mirrored half the time. The photos are those
    without transparency in the resource files of some activities, where they lie as they are.
    """
    found = {}
    for name in SUBJECTS:
        held = (debian / f"usr/share/gcompris-qt/rcc/{name}.rcc").read_bytes()
        for start in WEBP.finditer(held):
            picture = held[start.start() : start.start() + 8 + int.from_bytes(start[1], "little")]
            found[hashlib.sha256(picture).hexdigest()] = picture
    out = []
    opened = ((key, Image.open(io.BytesIO(found[key]))) for key in sorted(found))
    photos = [(key, image) for key, image in opened if image.mode == "RGB" and min(image.size) >= 128]
    for key, image in photos[SPLITS.index(split) :: len(SPLITS)]:
        random = np.random.RandomState(zlib.crc32(key.encode()))
        out += [part_of(image, 0.7, size, random) for _ in range(each)]
    return scaled(out)


def views(files: Sequence[Path], each: int, size: int = 224) -> Tensor:
    """``each`` views, as those of subjects, of every file: float32 ``[n, 3, size, size]``, ``(x - 127) / 128``."""
    out = []
    for path in files:
        random = np.random.RandomState(zlib.crc32(path.name.encode()))
        out += [part_of(Image.open(path).convert("RGB"), 0.7, size, random) for _ in range(each)]
    return scaled(out)


def crops(split: str, each: int, skimage: Path, debian: Path, size: int = 224) -> Tensor:
    """``each`` random crops of every photo of ``split``: float32 ``[n, 3, size, size]``, ``(x - 127) / 128``.

    A crop covers a square of 35 to 100 percent of the shorter side, is resized bicubically and mirrored half the time;
    its place depends only on the photo's name and its number.
    """
    chosen = photos(skimage, debian)[SPLITS.index(split) :: len(SPLITS)]
    out = []
    for path in chosen:
        opened = Image.open(path)
        opened.draft("RGB", (1600, 1600))
        image = opened.convert("RGB")
        random = np.random.RandomState(zlib.crc32(path.name.encode()))
        out += [part_of(image, 0.35, size, random) for _ in range(each)]
    return scaled(out)


def samples(split: str, debian: str, crop: int = 18, view: int = 4, subject: int = 0, valid: int = 0) -> Tensor:
    """A data spec: ``tests/benchmarks/calibrate_photos.py:samples?debian=FOLDER``; ``train`` is ``calib``.

    ``crop`` crops of each photo (about 330), ``view`` views of each object (about 340) and ``subject`` of each photo of
    a subject; with ``valid=1`` those of split ``valid`` are samples for training as well, for settings that were chosen
    before. scikit-image is found installed.
    """
    import importlib.util

    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise FileNotFoundError("scikit-image is not installed")
    own = {"train": ("calib", "valid")[: 1 + bool(valid)], "val": ("valid",), "test": ("test",)}[split]
    parts = []
    for each in own:
        parts += [crops(each, crop, Path(found.origin).parents[1], Path(debian)), objects(each, view, Path(debian))]
        parts += [subjects(each, subject, Path(debian))] * (subject > 0)
    return torch.cat(parts)
