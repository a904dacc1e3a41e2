"""Results as rich tables for people and as plain dicts for machines: ``render(result)`` and ``to_json(result)``.

Adding a result means adding one function to each of the two dispatchers.
"""

from pcq.report import (  # noqa: F401  (they register)
    analyzing,
    benching,
    budgeting,
    doors,
    exporting,
    finetuning,
    inspecting,
    onnx_quantizing,
    quantizing,
    scoring,
)
from pcq.report.forms import render, to_json

__all__ = ["render", "to_json"]
