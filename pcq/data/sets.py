"""The small public sets: scikit-learn's digits, Fashion-MNIST, CIFAR-10.

``val`` is held out of the training images: the last 5,000 (digits: 200) of a permutation by torch's generator seeded
with 0; ``train`` is the rest, in that permutation's order. The networks that come with pcq were trained on ``train``.
"""

import gzip
import io
import pickle
import zlib
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from pcq.data.dataset import Data, normalised
from pcq.data.folder import find_images, open_image
from pcq.errors import CheckFailed, PcqError

Images = tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]
HELD_OUT = {"digits": 200, "fashion-mnist": 5000, "cifar10": 5000}
MEAN_STD = {
    "digits": ([0.3053], [0.3760]),
    "fashion-mnist": ([0.2860], [0.3530]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}
CLASSES = {
    "digits": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def open_set(name: str, root: str, split: str) -> Data:
    """``name`` is a key of ``HELD_OUT``; ``root`` where its files are, or empty.

    Raises:
        PcqError: the files are not there; the message says how to get them.
        CheckFailed: a file is damaged.
    """
    match name:
        case "digits":
            images, labels = _digits(test=split == "test")
        case "fashion-mnist":
            images, labels = _fashion_mnist(root, test=split == "test")
        case _:
            images, labels = _cifar10(Path(root).expanduser(), split)
    tensor = torch.from_numpy(np.array(images, order="C"))
    mean, std = MEAN_STD[name]
    y = torch.from_numpy(labels.astype(np.int64))
    if split != "test" and name != "cifar10":
        chosen = part(name, len(tensor), split)
        tensor, y = tensor[chosen], y[chosen]
    return Data(name, split, len(tensor), tuple(tensor.shape[1:]), normalised(tensor, mean, std), y, CLASSES[name])


def part(name: str, total: int, split: str) -> torch.Tensor:
    """Numbers of the ``total`` training images that are ``train`` or ``val``."""
    held_out = HELD_OUT[name]
    if total <= held_out:
        raise PcqError(f"{total} training images are too few", where=name, allowed=f"more than the {held_out} held out")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[-held_out:] if split == "val" else order[:-held_out]


def _digits(test: bool) -> Images:
    images, labels = _every_digit()
    order = np.random.RandomState(0).permutation(len(images))
    chosen = order[1397:] if test else order[:1397]
    return images[chosen], labels[chosen]


@cache
def _every_digit() -> Images:
    """All 1,797, read once: scikit-learn parses text."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        todo = "Run `pip install scikit-learn`"
        raise PcqError(
            "the digits come with scikit-learn, which is not installed", where="digits", todo=todo
        ) from error
    bunch = load_digits()
    return (bunch.images * (255 / 16)).round().astype(np.uint8)[:, None], bunch.target


def _fashion_mnist(root: str, test: bool) -> Images:
    given = [Path(root).expanduser()] if root else [DEBIAN, Path("data"), Path("~/data").expanduser()]
    folders = [folder for base in given for folder in (base, base / "FashionMNIST" / "raw")]
    stem = "t10k" if test else "train"
    for folder in folders:
        for ending in (".gz", ""):
            paths = [folder / f"{stem}-{kind}-ubyte{ending}" for kind in ("images-idx3", "labels-idx1")]
            if all(path.is_file() for path in paths):
                return _idx(paths[0], 16).reshape(-1, 1, 28, 28), _idx(paths[1], 8)
    raise PcqError(
        "Fashion-MNIST is not there",
        where=f"fashion-mnist{':' + root if root else ''}",
        allowed=f"a folder with {stem}-images-idx3-ubyte.gz and {stem}-labels-idx1-ubyte.gz",
        todo="On Debian run `apt install dataset-fashion-mnist`; elsewhere "
        "`torchvision.datasets.FashionMNIST('DIR', download=True)` and then name it: fashion-mnist:DIR",
    )


def _idx(path: Path, offset: int) -> npt.NDArray[np.uint8]:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        found = np.frombuffer(data, np.uint8, offset=offset)
        sizes = np.frombuffer(data, ">i4", count=offset // 4)[1:]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CheckFailed(f"the file is damaged: {error}", where=str(path)) from error
    if len(found) != np.prod(sizes):
        raise CheckFailed(f"it holds {len(found)} values where its header says {np.prod(sizes)}", where=str(path))
    return found


def _cifar10(root: Path, split: str) -> Images:
    for folder in (root, root / "cifar-10-batches-py"):
        if (folder / "test_batch").is_file():
            names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
            batches = [_python_batch(folder / name) for name in names]
            images, labels = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
            chosen = np.arange(len(images)) if split == "test" else part("cifar10", len(images), split).numpy()
            return images[chosen], labels[chosen]
    folder = root / ("test" if split == "test" else "train")
    if not folder.is_dir():
        raise PcqError(
            "CIFAR-10 is not there",
            where=f"cifar10:{root}",
            allowed="a folder with train/<class>/ and test/<class>/ images, or with cifar-10-batches-py",
            todo="`torchvision.datasets.CIFAR10('DIR', download=True)` makes it; then name it: cifar10:DIR",
        )
    found = find_images(folder)
    if found.classes != CLASSES["cifar10"]:
        raise PcqError(f"its classes are {', '.join(found.classes)}", where=str(folder), allowed="CIFAR-10's ten")
    count = len(found.files)
    numbers = list(range(count)) if split == "test" else part("cifar10", count, split).tolist()
    pictures = [np.asarray(open_image(found.files[i], "RGB")) for i in numbers]
    odd = [i for i, picture in zip(numbers, pictures, strict=True) if picture.shape != (32, 32, 3)]
    if odd:
        raise PcqError("the image is not 32x32", where=str(found.files[odd[0]]))
    return np.stack(pictures).transpose(0, 3, 1, 2), np.array([found.labels[i] for i in numbers])


class _ArraysOnly(pickle.Unpickler):
    """CIFAR-10's batches are pickles; nothing but NumPy arrays is made from them."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


def _python_batch(path: Path) -> Images:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        return batch["data"].reshape(-1, 3, 32, 32), np.array(batch["labels"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckFailed(f"this is not a batch of CIFAR-10: {error}", where=str(path)) from error
