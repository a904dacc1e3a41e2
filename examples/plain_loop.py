"""ProxConnect in a training loop of your own: three lines of it are pcq's.

    python examples/plain_loop.py

Trains the digits network that comes with pcq on ternary weights and prints its test accuracy.
"""

import torch
import torch.nn.functional as F

import pcq
from pcq.data import open_data
from pcq.demo import HERE
from pcq.methods import METHODS
from pcq.proxconnect import ProxConnect, targets
from pcq.schedules import Linear
from pcq.scores import evaluate, module_predictor

CHECKPOINT = HERE / "digits-resnet8.safetensors"
ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
EPOCHS = 5


def main() -> float:
    """Top-1 in percent."""
    torch.manual_seed(0)
    model = pcq.open_network(CHECKPOINT, ARCH).module.train()
    data = open_data("digits", "train")
    steps = EPOCHS * -(-data.n // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)

    plan = pcq.commands.plan(CHECKPOINT, "ternary", arch=ARCH).plan
    weights = targets(plan, dict(model.named_parameters()))
    prox = ProxConnect(optimizer, weights, METHODS["proxconnect"], Linear(end=0.75), steps=steps)

    for _ in range(EPOCHS):
        for x, y in data.batches(128, order=torch.randperm(data.n)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()

    prox.finish()  # checks that every weight is on its levels; the codes by name
    top1 = evaluate(module_predictor(model), open_data("digits", "test")).top1
    assert top1 is not None
    return top1


if __name__ == "__main__":
    print(f"test top-1 {main():.2f} %")  # noqa: T201
