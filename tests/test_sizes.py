"""What real networks take, from their shapes alone; that predicted bytes are those on disk is test_checkpoint.py's."""

import pytest
import torch

from pcq import models
from pcq.inventory import inventory
from pcq.plan import Plan, make_plan
from pcq.recipe import load_recipe
from pcq.torchvision_compat import import_torchvision


def plan(name: str, recipe: str) -> Plan:
    import_torchvision()
    with torch.device("meta"):
        module = models.build(f"torchvision:{name}")
    state = module.state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    dtypes = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in state.items()}
    return make_plan(load_recipe(recipe), inventory(shapes, dtypes, module, {}))


@pytest.mark.parametrize(
    ("name", "ternary", "binary"),
    [("resnet18", 1.65, 1.05), ("resnet50", 1.65, 1.05), ("vit_b_16", 1.65, 1.05), ("mobilenet_v2", 1.80, 1.20)],
)
def test_bits_per_weight_with_scales(name: str, ternary: float, binary: float) -> None:
    """1.6 bits a ternary weight (five to a byte), 1 a binary one; the rest is a float32 scale for each channel."""
    for recipe, most in (("ternary-all", ternary), ("binary-all", binary)):
        made = plan(name, recipe)
        weights = sum(torch.Size(entry.parameter.shape).numel() for entry in made.quantized)
        bits = 8 * sum(entry.nbytes for entry in made.quantized) / weights
        assert (1.6 if recipe == "ternary-all" else 1.0) < bits <= most, (recipe, bits)
        convolved = [entry for entry in made.entries if len(entry.parameter.shape) == 4]
        assert {entry.parameter.name for entry in convolved} <= {entry.parameter.name for entry in made.quantized}


def test_a_whole_resnet50_with_8_bit_ends() -> None:
    made = plan("resnet50", "ternary")
    total = sum(entry.nbytes for entry in made.entries)
    assert total < 8.5e6 < 102e6 < sum(entry.parameter.nbytes for entry in made.entries)
    first, *_, last = made.quantized
    assert (first.parameter.name, last.parameter.name) == ("conv1.weight", "fc.weight")
    assert first.text.startswith("uniform 8-bit")
    assert last.text.startswith("uniform 8-bit")
