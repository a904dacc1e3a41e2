"""Networks for the export benchmarks: torchvision's with random weights, and small ones of other kinds, quantized.

BatchNorm statistics and heads that are zero are made random, so that no part of a network computes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcq.inventory import inventory
from pcq.plan import Quantized, make_plan
from pcq.qtensor import QuantizedTensor, quantize
from pcq.recipe import load_recipe
from pcq.torchvision_compat import import_torchvision

TORCHVISION = ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16")


@dataclass(frozen=True)
class Case:
    """A network that holds the dequantized ``weights``, and an example of its inputs."""

    network: nn.Module
    weights: dict[str, QuantizedTensor]
    example: tuple[Tensor, ...]


class Transposed(nn.Module):
    """Transposed convolutions, one of them grouped, as in a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 48, 4, 2, 1, groups=4), nn.BatchNorm2d(48), nn.ReLU(),
            nn.ConvTranspose2d(48, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.body(x)
        return image


class Signals(nn.Module):
    """1-D and 3-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(8, 24, 5, groups=2)
        self.cube = nn.Conv3d(1, 6, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        lines = torch.relu(self.line(x))
        cubes = torch.relu(self.cube(lines.unflatten(2, (4, -1))[:, None]))
        logits: Tensor = self.head(cubes.mean((2, 3, 4)))
        return logits


class Words(nn.Module):
    """A small transformer on token ids whose head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(500, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, activation="gelu")
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 500, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.tokens(ids)))
        return logits


SMALL: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "transposed": (Transposed, (1, 3, 16, 16)),
    "signals": (Signals, (1, 8, 28)),
    "words": (Words, (1, 12)),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The float network in eval mode and an example."""
    torch.manual_seed(0)
    if name in SMALL:
        kind, shape = SMALL[name]
        network = kind()
        example = torch.randint(0, 500, shape) if name == "words" else torch.randn(shape)
    else:
        network, example = getattr(import_torchvision().models, name)(), torch.randn(1, 3, 224, 224)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.randn(module.num_features) * 0.1
            module.running_var = torch.rand(module.num_features) + 0.5
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return network.eval(), (example,)


def prepare(name: str, recipe: str, overrides: Sequence[str] = ()) -> Case:
    """Quantize a network one-shot by a recipe, as ``pcq quantize`` does."""
    network, example = build(name)
    state = network.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    kinds = {key: str(value.dtype).removeprefix("torch.") for key, value in state.items()}
    plan = make_plan(load_recipe(recipe, overrides), inventory(shapes, kinds, network))
    weights = {
        entry.parameter.name: quantize(entry.quantizer, state[entry.parameter.name], entry.rows)
        for entry in plan.entries
        if isinstance(entry, Quantized) and entry.parameter.tied_to is None
    }
    for key, weight in weights.items():
        state[key].copy_(weight.dequantize())
    return Case(network, weights, example)
