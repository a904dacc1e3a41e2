"""The examples do what they say, where the library they are for is installed."""

import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pcq.errors import PcqError
from pcq.torchvision_compat import declare_operators

# The libraries' own warnings: to show one, pytest-xdist would import its library before the operators are declared.
pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _own_seeds() -> Iterator[None]:
    before = dict(os.environ)
    with torch.random.fork_rng():
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("name", "needs"),
    [("plain_loop", ()), ("trainer", ("transformers", "accelerate")), ("lightning_module", ("lightning",))],
)
def test_ternary_digits(name: str, needs: tuple[str, ...]) -> None:
    declare_operators()
    for package in needs:
        pytest.importorskip(package)
    assert runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]() > 95


QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_lightning_without_the_plugin_is_refused() -> None:
    """Its closure would be evaluated at the latents."""
    declare_operators()
    lightning = pytest.importorskip("lightning")
    found = runpy.run_path(str(EXAMPLES / "lightning_module.py"))
    with pytest.raises(PcqError, match="called with a closure"):
        lightning.Trainer(max_steps=1, **QUIET).fit(found["Digits"](), batches())


def batches() -> "torch.utils.data.DataLoader[tuple[torch.Tensor, ...]]":
    samples = torch.utils.data.TensorDataset(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    return torch.utils.data.DataLoader(samples, batch_size=4)


def test_lightning_clips_before_the_step() -> None:
    """What its trainer does between backward pass and step still happens, and happens before."""
    declare_operators()
    lightning = pytest.importorskip("lightning")
    found = runpy.run_path(str(EXAMPLES / "lightning_module.py"))
    norms = []

    class Watched(found["Digits"]):  # type: ignore[name-defined, misc]
        def configure_optimizers(self) -> object:
            made = super().configure_optimizers()
            made["optimizer"].register_step_pre_hook(self.watch)
            return made

        def watch(self, *_: object) -> None:
            norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
            )

        def on_train_end(self) -> None:
            pass

    for limit in (None, 1e-3):
        torch.manual_seed(0)
        plugin = found["StepAfterwards"]()
        lightning.Trainer(max_steps=1, plugins=plugin, gradient_clip_val=limit, **QUIET).fit(Watched(), batches())
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-3, rel=0.01)
