"""Real photos for measuring EfficientNet-Lite0: crops cut into three splits that share no photo.

Sources, all read by path: the sample photos of scikit-image and scikit-learn, matplotlib's portrait, and the photos of
Debian's picture packages (``apt-get download mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
ukui-wallpapers`` and ``dpkg -x`` into one folder). Split by photo in the order of a hash of the file name: ``calib``
for calibration samples, ``valid`` for choosing settings, ``test`` for the numbers that are reported.
"""

import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SPLITS = ("calib", "valid", "test")
SAMPLES = (
    *("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    *("coins.png", "grass.png", "brick.png", "gravel.png", "hubble_deep_field.jpg", "retina.jpg"),
)
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
        for path in debian.rglob("*")
        if path.suffix in (".jpg", ".png")
        and path.stat().st_size > 60_000
        and not any(a in str(path) for a in ABSTRACT)
    ]
    return sorted(files, key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())


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
        for _ in range(each):
            side = int(min(image.size) * random.uniform(0.35, 1.0))
            x, y = (random.randint(0, length - side + 1) for length in image.size)
            crop = image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side), reducing_gap=2.0)
            pixels = np.asarray(crop, np.float32)
            out.append(pixels[:, ::-1] if random.rand() < 0.5 else pixels)
    return (torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous() - 127) / 128


def samples(split: str, debian: str, each: int = 0) -> Tensor:
    """A data spec: ``tests/benchmarks/calibrate_photos.py:samples?debian=FOLDER``; ``train`` is ``calib``.

    27 crops of each photo for calibration (about 500), 18 for the others (about 320); scikit-image is found installed.
    """
    import importlib.util

    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise FileNotFoundError("scikit-image is not installed")
    own = {"train": "calib", "val": "valid", "test": "test"}[split]
    return crops(own, each or (27 if own == "calib" else 18), Path(found.origin).parents[1], Path(debian))


def labelled(effnet: Path, size: int = 224) -> tuple[Tensor, Tensor]:
    """foolbox's 20 ImageNet photos ``[20, 3, size, size]`` and their labels."""
    files = sorted((effnet / "foolbox/data").glob("imagenet_*.jpg"))
    arrays = [np.asarray(Image.open(f).convert("RGB").resize((size, size)), np.float32) for f in files]
    labels = torch.tensor([int(f.stem.split("_")[2]) for f in files])
    return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous() - 127) / 128, labels
