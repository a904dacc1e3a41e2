"""A training step's passes recorded as CUDA graphs: kernels of small networks take no longer than Python to launch."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pcq.data import Inputs
from pcq.errors import PcqError, first_line
from pcq.train import batchnorm

WHERE = "finetune.graphs"

HARMLESS = (
    "The AccumulateGrad node's stream does not match",
    "Attempting to run cuBLAS, but there was no current CUDA",
)
"""What torch warns of once when a recorded pass is replayed."""


@contextmanager
def recorded(module: nn.Module, x: Inputs, bf16: bool) -> Iterator[None]:
    """Within it the forward and backward passes of ``module`` in training mode replay those of ``x``, a batch.

    What a pass does must not depend on the numbers in it, and every batch has the shape of ``x``. Parameters are read
    where they are, so they may change in place. In eval mode nothing is replayed.

    Raises:
        PcqError: there is no GPU, or the passes cannot be recorded.
    """
    if x[0].device.type != "cuda":
        raise PcqError("passes are recorded on an NVIDIA GPU only", where=WHERE, todo="Leave it out.")
    kept = batchnorm.statistics(module)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
            torch.cuda.make_graphed_callables(module.train(), x)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        told = first_line(error)
        raise PcqError(f"the network's passes cannot be recorded: {told}", where=WHERE, todo="Leave it out.") from error
    batchnorm.put(module, kept)
    try:
        with warnings.catch_warnings():
            for beginning in HARMLESS:
                warnings.filterwarnings("ignore", beginning)
            yield
    finally:
        del module.forward
