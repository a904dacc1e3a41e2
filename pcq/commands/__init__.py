"""What the command line does, as plain Python: each command is one call with a typed, frozen result."""

from pcq.commands.exporting import ExportResult, export_onnx
from pcq.commands.inspecting import (
    FileView,
    ProxPlot,
    RecipeView,
    Shipped,
    TensorView,
    check,
    inspect,
    plot_prox,
    recipes,
)
from pcq.commands.networks import Network, load_network, open_network
from pcq.commands.quantizing import LedgerRow, Planned, QuantizeResult, plan, quantize, run
from pcq.commands.scoring import EvalResult, evaluate

__all__ = [
    "EvalResult",
    "ExportResult",
    "FileView",
    "LedgerRow",
    "Network",
    "Planned",
    "ProxPlot",
    "QuantizeResult",
    "RecipeView",
    "Shipped",
    "TensorView",
    "check",
    "evaluate",
    "export_onnx",
    "inspect",
    "load_network",
    "open_network",
    "plan",
    "plot_prox",
    "quantize",
    "recipes",
    "run",
]
