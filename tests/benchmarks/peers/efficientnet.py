"""EfficientNet-Lite0 of plain modules, which every tool understands, and photos for it. The network needs torch alone.

    python -m tests.benchmarks.peers.efficientnet DEBIAN OUT

The heads of ``tests/benchmarks/efficientnet_lite0.py`` and ``calibrate_photos.py`` say how to get the weights and
DEBIAN. Writes OUT/efficientnet.safetensors, OUT/efficientnet.npz (``x_train`` the split ``calib``, ``x_val``,
``x_test``: crops, objects, subjects, and in ``x_test`` views of the labelled photos; without labels, so that a network
is scored by agreement with the float one) and OUT/parts.json, how many images of ``x_test`` are which, and how many in
a row are of one photo. The original's convolutions pad by themselves, one pixel more at the far sides where they
stride; here a ``ZeroPad2d`` stands before them.
"""

from torch import Tensor, nn

STAGES = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)
"""Expansion, channels, kernel, stride and repeats of each stage (arXiv 1905.11946, Table 1, without scaling)."""

EPS = 1e-3
CROPS, VIEWS, LABELLED = 18, 4, 16  # of each photo, of each object and subject, of each labelled photo


def padding(kernel: int, stride: int) -> nn.Module:
    """TensorFlow's «same» for inputs of even size."""
    few, many = (kernel - stride) // 2, kernel - stride - (kernel - stride) // 2
    return nn.ZeroPad2d((few, many, few, many))


class Block(nn.Module):
    def __init__(self, expansion: int, n: int, m: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = expansion * n
        self.expands, self.adds = expansion > 1, stride == 1 and n == m
        if self.expands:
            self.expand_conv = nn.Conv2d(n, inner, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(inner, EPS)
            self.relu0 = nn.ReLU6()
        self.pad = padding(kernel, stride)
        self.depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self.bn1 = nn.BatchNorm2d(inner, EPS)
        self.relu1 = nn.ReLU6()
        self.project_conv = nn.Conv2d(inner, m, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(m, EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu0(self.bn0(self.expand_conv(x))) if self.expands else x
        y = self.relu1(self.bn1(self.depthwise_conv(self.pad(y))))
        y = self.bn2(self.project_conv(y))
        return x + y if self.adds else y


class EfficientNet(nn.Module):
    """Images ``[b, 3, h, w]``, ``(pixel - 127) / 128``, to scores of ImageNet's classes ``[b, 1000]``."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = padding(3, 2)
        self.conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self.bn0 = nn.BatchNorm2d(32, EPS)
        self.relu0 = nn.ReLU6()
        blocks: list[Block] = []
        width = 32
        for expansion, channels, kernel, stride, repeats in STAGES:
            for i in range(repeats):
                blocks.append(Block(expansion, width, channels, kernel, stride if i == 0 else 1))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = nn.Conv2d(width, 1280, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(1280, EPS)
        self.relu1 = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu0(self.bn0(self.conv_stem(self.pad(x))))
        x = self.relu1(self.bn1(self.conv_head(self.blocks(x))))
        out: Tensor = self.fc(self.flatten(self.pool(x)))
        return out


def efficientnet() -> EfficientNet:
    return EfficientNet()


def main() -> None:
    import json
    import re
    import sys
    from pathlib import Path

    import numpy as np
    import torch
    from safetensors.torch import save_file

    from tests.benchmarks import calibrate_photos, efficientnet_lite0

    debian, out = map(Path, sys.argv[1:])
    skimage = efficientnet_lite0.installed("skimage").parent
    theirs = torch.load(efficientnet_lite0.checkpoint(), weights_only=True)
    original = efficientnet_lite0.network().eval()
    original.load_state_dict(theirs)
    network = efficientnet().eval()
    network.load_state_dict({re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in theirs.items()})
    photos, labels = efficientnet_lite0.photos()
    with torch.no_grad():
        aim, found = original(photos), network(photos)
    error = float((found - aim).abs().max() / aim.abs().max())
    assert error < 1e-5, error
    print(
        f"outputs differ by {error:.1e} of the largest; {int((found.argmax(1) == labels).sum())} of 20 photos are right"
    )
    splits = {}
    for name, split in (("train", "calib"), ("val", "valid"), ("test", "test")):
        parts = {
            "crops": calibrate_photos.crops(split, CROPS, skimage, debian),
            "objects": calibrate_photos.objects(split, VIEWS, debian),
            "subjects": calibrate_photos.subjects(split, VIEWS, debian),
        }
        if split == "test":
            parts["views"] = calibrate_photos.views(efficientnet_lite0.files(), LABELLED)
        x = torch.cat(list(parts.values()))
        splits[f"x_{name}"] = x.half().numpy()
        assert torch.equal(torch.from_numpy(splits[f"x_{name}"]).float(), x)  # whole pixels: nothing is lost
        print(name, {part: len(each) for part, each in parts.items()}, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    each = {"crops": CROPS, "objects": VIEWS, "subjects": VIEWS, "views": LABELLED}
    told = {part: (len(x), each[part]) for part, x in parts.items()}
    (out / "parts.json").write_text(json.dumps(told) + "\n")
    np.savez(out / "efficientnet.npz", **splits)
    save_file(network.state_dict(), out / "efficientnet.safetensors")


if __name__ == "__main__":
    main()
