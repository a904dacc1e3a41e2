"""ONNX in, ONNX out: find the weights of a graph that someone else wrote, put packed ones in their place, prove it."""

from pcq.onnx_input.detect import Exact, detect
from pcq.onnx_input.graph import Opened, open_graph, unlisted
from pcq.onnx_input.inventory import Inventory, take_inventory
from pcq.onnx_input.packing import Rewritten, find_inputs, write_packed
from pcq.onnx_input.trials import Trial

__all__ = [
    "Exact",
    "Inventory",
    "Opened",
    "Rewritten",
    "Trial",
    "detect",
    "find_inputs",
    "open_graph",
    "take_inventory",
    "unlisted",
    "write_packed",
]
