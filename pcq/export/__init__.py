"""ONNX files whose weights stay packed, and the proof that they are right."""

from pcq.export.drop import Drop
from pcq.export.int8_file import Int8Layer, Int8Report, write_int8
from pcq.export.onnx_file import OnnxReport, OnnxTensor, write_onnx
from pcq.export.reading import PackedFile, is_packed, open_packed, read_packed
from pcq.export.verify import Agreement

__all__ = [
    "Agreement",
    "Drop",
    "Int8Layer",
    "Int8Report",
    "OnnxReport",
    "OnnxTensor",
    "PackedFile",
    "is_packed",
    "open_packed",
    "read_packed",
    "write_int8",
    "write_onnx",
]
