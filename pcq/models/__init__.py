"""Architectures: found from a state dict's names and shapes, built from their specs, and weights loaded into them."""

from pcq.models.building import as_transformers_loads, build, complete, example_shape, with_input_channels
from pcq.models.loading import check_shapes, load_state, mismatch, prefix_of, versioned
from pcq.models.recognition import Ambiguous, Recognised, recognise

__all__ = [
    "Ambiguous",
    "Recognised",
    "as_transformers_loads",
    "build",
    "check_shapes",
    "complete",
    "example_shape",
    "load_state",
    "mismatch",
    "prefix_of",
    "recognise",
    "versioned",
    "with_input_channels",
]
