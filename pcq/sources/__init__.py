"""What a user hands in -> tensors, one at a time, and the architecture if the file itself tells it.

Checkpoints of ``torch.save`` (zip and legacy), safetensors, both of them sharded, ``.pt2``, TorchScript, ``.npz``, and
folders that hold one of them. Opening executes nothing that is in a file.
"""

from pcq.sources.opening import ARTIFACT_KEY, open_source
from pcq.sources.pt2 import revive
from pcq.sources.source import Source, part, with_prefix
from pcq.sources.tensors import as_loaded
from pcq.sources.wrappers import NoSuchState

__all__ = ["ARTIFACT_KEY", "NoSuchState", "Source", "as_loaded", "open_source", "part", "revive", "with_prefix"]
