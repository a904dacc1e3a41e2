"""What the command line does, as plain Python: each command is one call with a typed, frozen result."""

from pcq.commands.analyzing import AnalyzedWeight, AnalyzeResult, analyze
from pcq.commands.benching import BenchResult, BenchRow, Latency, Spread, bench
from pcq.commands.budgeting import Allocation, allocate, everything
from pcq.commands.calibrating import Calibrated, Calibration, calibrated
from pcq.commands.doors import DoorResult, export_compressed, export_state_dict
from pcq.commands.exporting import ExportResult, Int8, export_onnx
from pcq.commands.finetuning import FinetuneResult, finetune
from pcq.commands.inspecting import (
    ProxPlot,
    RecipeView,
    Shipped,
    check,
    inspect,
    plot_prox,
    recipes,
)
from pcq.commands.networks import Network, load_network, open_network
from pcq.commands.onnx_calibrating import OnnxCalibrated
from pcq.commands.onnx_quantizing import OnnxQuantizeResult, plan_onnx, quantize_onnx, run_onnx
from pcq.commands.programs import export_pt2
from pcq.commands.quantizing import LedgerRow, Planned, QuantizeResult, plan, quantize, run
from pcq.commands.scoring import EvalResult, evaluate
from pcq.commands.tabling import FinetuneRow
from pcq.commands.views import FileView, TensorView

__all__ = [
    "Allocation",
    "AnalyzeResult",
    "AnalyzedWeight",
    "BenchResult",
    "BenchRow",
    "Calibrated",
    "Calibration",
    "DoorResult",
    "EvalResult",
    "ExportResult",
    "FileView",
    "FinetuneResult",
    "FinetuneRow",
    "Int8",
    "Latency",
    "LedgerRow",
    "Network",
    "OnnxCalibrated",
    "OnnxQuantizeResult",
    "Planned",
    "ProxPlot",
    "QuantizeResult",
    "RecipeView",
    "Shipped",
    "Spread",
    "TensorView",
    "allocate",
    "analyze",
    "bench",
    "calibrated",
    "check",
    "evaluate",
    "everything",
    "export_compressed",
    "export_onnx",
    "export_pt2",
    "export_state_dict",
    "finetune",
    "inspect",
    "load_network",
    "open_network",
    "plan",
    "plan_onnx",
    "plot_prox",
    "quantize",
    "quantize_onnx",
    "recipes",
    "run",
    "run_onnx",
]
