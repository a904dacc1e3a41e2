"""ProxConnect in Lightning: three lines of it are pcq's, and a plugin.

    pip install lightning
    python examples/lightning_module.py

Trains the digits network that comes with pcq on ternary weights and prints its test accuracy.

Lightning hands forward and backward pass to the optimizer's step as a closure (with manual optimization an empty one).
When a step runs ProxConnect has put the latents in place, and the gradient would be taken at them: it refuses closures.
``StepAfterwards`` runs the closure first, where the weights are, then what Lightning does after it (its hooks, gradient
clipping), then a step without a closure. For ``precision="bf16-mixed"`` derive it from ``MixedPrecision`` instead.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pcq
from pcq.data import open_data
from pcq.demo import HERE
from pcq.methods import METHODS
from pcq.proxconnect import ProxConnect, targets
from pcq.schedules import Linear
from pcq.scores import evaluate, module_predictor
from pcq.torchvision_compat import declare_operators

declare_operators()  # the next import loads torchvision, which needs this beside a CPU torch

import lightning as L  # noqa: E402
from lightning.pytorch.plugins.precision import Precision  # noqa: E402

CHECKPOINT = HERE / "digits-resnet8.safetensors"
ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
EPOCHS = 5


class StepAfterwards(Precision):
    """Forward and backward pass first, then the optimizer's step without a closure."""

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        result = closure()
        self._after_closure(model, optimizer)
        optimizer.step(**kwargs)
        return result


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = pcq.open_network(CHECKPOINT, ARCH).module

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)

        plan = pcq.commands.plan(CHECKPOINT, "ternary", arch=ARCH).plan
        weights = targets(plan, dict(self.net.named_parameters()))
        self.prox = ProxConnect(optimizer, weights, METHODS["proxconnect"], Linear(end=0.75), steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_end(self) -> None:
        self.prox.finish()  # checks that every weight is on its levels; before Lightning takes them off the device

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["prox"] = self.prox.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["prox"]

    def on_train_start(self) -> None:
        if hasattr(self, "saved"):
            self.prox.load_state_dict(self.saved)


def main() -> float:
    """Top-1 in percent."""
    L.seed_everything(0, verbose=False)
    data = open_data("digits", "train")
    assert data.labels is not None
    samples = TensorDataset(data.take(range(data.n)), data.labels)
    model = Digits().train()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        plugins=StepAfterwards(),
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the number of workers of a data set in memory
        trainer.fit(model, DataLoader(samples, batch_size=128, shuffle=True))
    top1 = evaluate(module_predictor(model.net), open_data("digits", "test")).top1
    assert top1 is not None
    return top1


if __name__ == "__main__":
    print(f"test top-1 {main():.2f} %")  # noqa: T201
