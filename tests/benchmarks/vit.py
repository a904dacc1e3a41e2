"""A small vision transformer for Fashion-MNIST, the same as timm's but for its size: patches of 7, 16 tokens.

As an architecture: ``tests/benchmarks/vit.py:vit``. ``train_float.py fashion-mnist --net vit`` trains it.
"""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to what came in: ``[b, t, d] -> [b, t, d]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Images ``[b, c, 28, 28]`` to logits ``[b, num_classes]``: mean over the tokens of ``depth`` blocks."""

    def __init__(self, num_classes: int, in_channels: int, width: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(in_channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def vit(num_classes: int = 10, in_channels: int = 1) -> ViT:
    """Width 64, depth 4: 0.21 M parameters."""
    return ViT(num_classes, in_channels, 64, 4, 4, 7)
