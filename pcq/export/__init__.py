"""ONNX files whose weights stay packed, and the proof that they are right."""

from pcq.export.onnx_file import OnnxReport, OnnxTensor, write_onnx
from pcq.export.reading import PackedFile, is_packed, open_packed, read_packed
from pcq.export.verify import Agreement

__all__ = [
    "Agreement",
    "OnnxReport",
    "OnnxTensor",
    "PackedFile",
    "is_packed",
    "open_packed",
    "read_packed",
    "write_onnx",
]
