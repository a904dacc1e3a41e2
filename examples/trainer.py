"""ProxConnect in Hugging Face's Trainer: three lines of it are pcq's.

    pip install transformers accelerate
    python examples/trainer.py

Trains the digits network that comes with pcq on ternary weights and prints its test accuracy. The Trainer's own
optimizer is made late, so one is made here and handed over; ProxConnect is attached once the Trainer has put the model
on its device. Clipping, accumulation, schedulers and bf16 work as always; what Trainer saves does not hold the latents:
to go on from a checkpoint, save ``prox.state_dict()`` beside it.
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcq
from pcq.data import Data, open_data
from pcq.demo import HERE
from pcq.methods import METHODS
from pcq.proxconnect import ProxConnect, targets
from pcq.schedules import Linear
from pcq.scores import evaluate, module_predictor
from pcq.torchvision_compat import declare_operators

declare_operators()  # the next import loads torchvision, which needs this beside a CPU torch

from transformers import Trainer, TrainingArguments, set_seed  # noqa: E402

CHECKPOINT = HERE / "digits-resnet8.safetensors"
ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
EPOCHS = 5


class WithLoss(nn.Module):
    """What Trainer expects of a model: keyword arguments, and the loss among the outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def samples(data: Data) -> list[dict[str, Any]]:
    assert data.labels is not None
    images = data.take(range(data.n))
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, data.labels, strict=True)]


def main() -> float:
    """Top-1 in percent."""
    set_seed(0)
    model = WithLoss(pcq.open_network(CHECKPOINT, ARCH).module)
    data = samples(open_data("digits", "train"))
    steps = EPOCHS * -(-len(data) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=128,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))

        weights = targets(pcq.commands.plan(CHECKPOINT, "ternary", arch=ARCH).plan, dict(model.net.named_parameters()))
        prox = ProxConnect(optimizer, weights, METHODS["proxconnect"], Linear(end=0.75), steps=steps)
        trainer.train()
        prox.finish()  # checks that every weight is on its levels; the codes by name
    top1 = evaluate(module_predictor(model.net), open_data("digits", "test")).top1
    assert top1 is not None
    return top1


if __name__ == "__main__":
    print(f"test top-1 {main():.2f} %")  # noqa: T201
