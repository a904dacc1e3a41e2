"""Tensors of which each process holds some rows of the first axis (FSDP2): all of them, and the part that is here.

A plain tensor is its own whole and its own part, so that callers need not ask.
"""

import sys
from typing import Any

from torch import Tensor


def sharded(tensor: Tensor) -> bool:
    """Whether it is one of torch's DTensors; without importing them."""
    kinds = sys.modules.get("torch.distributed.tensor")
    return kinds is not None and isinstance(tensor, kinds.DTensor)


def by_rows(tensor: Tensor) -> bool:
    """Whether a DTensor is cut along its first axis among all processes of one mesh axis: what FSDP2 makes."""
    found: Any = tensor
    return len(found.placements) == 1 and bool(found.placements[0].is_shard(0))


def local(tensor: Tensor) -> Tensor:
    """The part held here, in the same memory."""
    found: Any = tensor.detach()
    part: Tensor = found.to_local() if sharded(tensor) else found
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process, without gradient; every process has to call this."""
    found: Any = tensor.detach()
    full: Tensor = found.full_tensor() if sharded(tensor) else found
    return full


def joined(part: Tensor, like: Tensor) -> Tensor:
    """All of the tensor of which this process holds ``part`` as it does of ``like``; every process has to call this."""
    return whole(_with_parts(part, like)) if sharded(like) else part


def saved(tensor: Tensor, wanted: bool = True) -> Tensor:
    """All of a sharded tensor in main memory, or where it is not wanted none; every process has to call this."""
    if not sharded(tensor):
        return tensor
    full = whole(tensor)
    return full.cpu() if wanted else full.new_empty(0)


def own(full: Tensor, like: Tensor) -> Tensor:
    """The rows of ``full`` that this process holds of ``like``, a view; as torch.chunk cuts them."""
    if not sharded(like):
        return full
    found: Any = like
    count = local(like).shape[0]
    each = -(-like.shape[0] // found.device_mesh.size())
    start = min(found.device_mesh.get_local_rank() * each, like.shape[0])
    assert count == max(0, min(each, like.shape[0] - start)), (count, start, like.shape)
    return full[start : start + count]


def spread(full: Tensor, like: Tensor) -> Tensor:
    """``full`` cut among the processes as ``like`` is."""
    return _with_parts(own(full, like).clone(), like) if sharded(like) else full


def _with_parts(part: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    found: Any = like
    made: Tensor = DTensor.from_local(
        part, found.device_mesh, found.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made
