"""Rules x named parameters -> Plan: what happens to every tensor, how, and why; printed before anything runs."""

from dataclasses import dataclass

from pcq.qtensor import Quantizer
from pcq.rows import Rows


@dataclass(frozen=True)
class Parameter:
    """What a plan needs to know about one tensor of a state dict; no tensor in it.

    Attributes:
        name: its key in the state dict.
        shape: its shape.
        dtype: its dtype without ``torch.``, such as ``float32``.
        kind: what it is: ``conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear embedding``
            for weights that can be quantized, ``norm bias buffer other`` for the rest.
        groups: groups of a convolution, 1 otherwise.
        tied_to: the name of the parameter whose storage it shares, if it is not the first of its kind.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    groups: int = 1
    tied_to: str | None = None


@dataclass(frozen=True)
class Quantized:
    """A parameter that gets levels: cut into ``rows``, fitted by ``quantizer``, because rule number ``rule`` matched."""

    parameter: Parameter
    rows: Rows
    quantizer: Quantizer
    rule: int


@dataclass(frozen=True)
class Kept:
    """A parameter that stays as it is, and why."""

    parameter: Parameter
    reason: str


@dataclass(frozen=True)
class Plan:
    """One entry for every tensor of the state dict, in its order."""

    entries: tuple[Quantized | Kept, ...]
