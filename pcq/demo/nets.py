"""Small networks of the demo and the benchmarks: a LeNet, and the residual networks of He et al. for CIFAR.

The latter (arXiv 1512.03385, section 4.2) have depth ``6n + 2``: one 3x3 stem convolution, three stages of ``n`` basic
blocks with 16, 32 and 64 channels, global average pooling and one linear layer. Shortcuts that change the shape are
parameter-free (option A: every second pixel, new channels zero), so ResNet-20 has 0.27 M parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and an option-A shortcut.

    ``[b, c_in, h, w] -> [b, c_out, h / stride, w / stride]``.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.grow = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.grow:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grow // 2, self.grow - self.grow // 2))
        return F.relu(out + x)


class ResNet(nn.Module):
    """CIFAR-form ResNet: images ``[b, in_channels, h, w]`` (h, w >= 4) to logits ``[b, num_classes]``."""

    def __init__(self, depth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, 32, 44, 56, ...), not {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = []
        c_in = 16
        for stage, c_out in enumerate((16, 32, 64)):
            layers = []
            for i in range(blocks):
                layers.append(BasicBlock(c_in, c_out, 2 if stage and not i else 1))
                c_in = c_out
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.mean(x, (2, 3)))
        return logits


def resnet8(num_classes: int = 10, in_channels: int = 1) -> ResNet:
    """Depth 8, 0.08 M parameters; what ``pcq demo`` uses on 8x8 digits."""
    return ResNet(8, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Depth 20, 0.27 M parameters."""
    return ResNet(20, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Depth 56, 0.85 M parameters."""
    return ResNet(56, num_classes, in_channels)


class LeNet(nn.Module):
    """LeNet-5's shapes (LeCun et al. 1998) with ReLU, maximum pooling and BatchNorm: ``[b, c, 28, 28]`` to logits."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 16, 5, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(256, 120, bias=False)
        self.bn3 = nn.BatchNorm1d(120)
        self.fc2 = nn.Linear(120, 84, bias=False)
        self.bn4 = nn.BatchNorm1d(84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.fc1(x.flatten(1))))
        x = F.relu(self.bn4(self.fc2(x)))
        logits: Tensor = self.fc3(x)
        return logits


def lenet(num_classes: int = 10, in_channels: int = 1) -> LeNet:
    """0.04 M parameters; for 28x28 images."""
    return LeNet(num_classes, in_channels)
