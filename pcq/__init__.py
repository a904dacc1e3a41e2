"""pcq: pretrained networks made tiny without breaking them.

The names below are the Python interface. They and the modules are imported when first used, so ``import pcq`` is quick
and loads no torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_HOME = {
    "analyze": "pcq.commands",
    "bench": "pcq.commands",
    "quantize": "pcq.commands",
    "finetune": "pcq.commands",
    "export_onnx": "pcq.commands",
    "evaluate": "pcq.commands",
    "inspect": "pcq.commands",
    "load_network": "pcq.commands",
    "open_network": "pcq.commands",
    "load_recipe": "pcq.recipe",
    "read_artifact": "pcq.checkpoint",
    "PcqError": "pcq.errors",
    "CheckFailed": "pcq.errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if not name.startswith("_") and find_spec(f"pcq.{name}") is not None:
        return import_module(f"pcq.{name}")
    raise AttributeError(f"module 'pcq' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
