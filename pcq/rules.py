"""Rules: which parameters of a state dict are meant, and what happens to them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch

from pcq.quantizers import Quantizer
from pcq.rows import Rows

Kind = Literal[
    "conv", "conv1d", "conv2d", "conv3d",
    "conv_transpose", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "linear", "embedding",
]  # fmt: skip
Position = Literal["first", "last"]
Shape = Literal["depthwise", "pointwise"]


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
        turned: a matrix ``[in, out]``, as transformers' Conv1D has it, where Linear has ``[out, in]``.
        tied_to: the name of the parameter whose storage it shares, if it is not the first of its kind.
        why: why it cannot be quantized, where more is known than these say.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    groups: int = 1
    tied_to: str | None = None
    why: str = ""
    turned: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes it takes as it is."""
        return self.numel * int(getattr(torch, self.dtype).itemsize)

    @property
    def unfit(self) -> str | None:
        """Why it cannot be quantized, or None."""
        if self.why:
            return self.why
        if self.tied_to is not None:
            return f"tied to {self.tied_to}"
        if not self.numel:
            return "empty"
        if not self.dtype.startswith(("float", "bfloat")):
            return "complex numbers" if self.dtype.startswith("complex") else "integer buffer"
        if self.kind not in get_args(Kind):
            return self.kind if self.kind in ("bias", "norm", "buffer") else "not the weight of a layer"
        return f"{len(self.shape)}-dimensional" if len(self.shape) < 2 else None


@dataclass(frozen=True)
class Match:
    """Predicates that must all hold; of the values of one, any may.

    Attributes:
        name: patterns for the parameter's name, with or without its ``.weight``; ``*`` and ``?`` match dots too.
        type: the kind of layer; ``conv`` is every convolution, ``conv_transpose`` every transposed one.
        position: ``first`` or ``last`` of the weights that can be quantized, embeddings aside, in the order of the
            state dict: the order in which the model defines its layers.
        shape: ``depthwise``: convolutions with one input channel for each group, and several groups;
            ``pointwise``: convolutions with a kernel of 1.
        min_size: least number of weights in the tensor.
        max_size: largest number of weights in the tensor.
    """

    name: tuple[str, ...] = ()
    type: tuple[Kind, ...] = ()
    position: tuple[Position, ...] = ()
    shape: tuple[Shape, ...] = ()
    min_size: int | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        if not any(value not in ((), None) for value in vars(self).values()):
            raise ValueError('a match needs at least one predicate; the name "*" matches everything')
        if self.min_size is not None and self.min_size < 0:
            raise ValueError(f"min_size has to be 0 or more, not {self.min_size}")
        if self.max_size is not None and self.max_size < (self.min_size or 0):
            raise ValueError(f"max_size has to be min_size or more, not {self.max_size}")

    def holds(self, parameter: Parameter, positions: Sequence[str] = ()) -> bool:
        """Whether ``parameter``, which stands at ``positions``, is meant."""
        kind, shape = parameter.kind, parameter.shape
        names = (parameter.name, parameter.name.removesuffix(".weight"))
        kinds = (kind, "conv" if kind.startswith("conv") else "", kind.rstrip("123d") if "transpose" in kind else "")
        conv = kind.startswith("conv") and len(shape) > 2
        inputs = shape[0] // parameter.groups if "transpose" in kind and conv else shape[1] if conv else 0
        shapes = {"depthwise": inputs == 1 and parameter.groups > 1, "pointwise": conv and math.prod(shape[2:]) == 1}
        return (
            (not self.name or any(fnmatchcase(name, pattern) for pattern in self.name for name in names))
            and (not self.type or any(kind in self.type for kind in kinds))
            and (not self.position or any(position in self.position for position in positions))
            and (not self.shape or any(shapes[shape] for shape in self.shape))
            and (self.min_size is None or parameter.numel >= self.min_size)
            and (self.max_size is None or parameter.numel <= self.max_size)
        )

    def __str__(self) -> str:
        """As in a recipe."""
        given = {key: value for key, value in vars(self).items() if value not in ((), None)}
        words = {key: _listed(value) if isinstance(value, tuple) else str(value) for key, value in given.items()}
        if len(given) == 1 and (only := words.get("name") or words.get("position")) and not only.startswith("["):
            return only
        return "{" + ", ".join(f"{key}: {value}" for key, value in words.items()) + "}"


def _listed(values: tuple[str, ...]) -> str:
    quoted = [value if value.isidentifier() else f'"{value}"' for value in values]
    return quoted[0] if len(quoted) == 1 else f"[{', '.join(quoted)}]"


@dataclass(frozen=True)
class Rule:
    """What happens to the parameters that any of ``match`` means.

    Attributes:
        match: which parameters; a list means any of these.
        levels: what chooses their levels. A rule has this or ``keep``.
        keep: the reason why they stay float.
        per: ``channel``: each output channel has its own levels; ``tensor``: all weights share them.
        group: cut each channel into groups of this many weights, each with its own levels.
        optional: the rule may match nothing.
    """

    match: tuple[Match, ...]
    levels: Quantizer | None = None
    keep: str | None = None
    per: Literal["tensor", "channel"] = "channel"
    group: int | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if problems := tuple(self.contradictions(vars(self))):
            raise ValueError("; ".join(problems))

    @staticmethod
    def contradictions(given: Mapping[str, object]) -> Iterator[str]:
        """What is wrong between fields, each of which is all right."""
        if given.get("match") == ():
            yield '`match` names nothing; "*" matches everything'
        levels, keep, group = given.get("levels"), given.get("keep"), given.get("group")
        if levels is None and keep is None:
            yield "a rule needs `levels`, or `keep` with the reason to stay float"
        if levels is not None and keep is not None:
            yield "a rule has `levels` or `keep`, not both"
        if keep is not None and not str(keep).strip():
            yield "`keep` needs the reason to stay float"
        if levels is None and (group is not None or given.get("per") == "tensor"):
            yield "`per` and `group` say how levels are shared, and this rule has no `levels`"
        if isinstance(group, int) and group < 1:
            yield f"`group` has to be 1 or more, not {group}"
        if group is not None and given.get("per") == "tensor":
            yield "`group` cuts each channel, so it cannot go with `per: tensor`"

    def holds(self, parameter: Parameter, positions: Sequence[str] = ()) -> bool:
        return any(match.holds(parameter, positions) for match in self.match)

    def rows(self, parameter: Parameter) -> Rows:
        """How its weights share levels."""
        if self.per == "tensor":
            return Rows(parameter.shape, None)
        if parameter.turned or parameter.kind.startswith("conv_transpose"):
            return Rows(parameter.shape, 1, parameter.groups, self.group)
        return Rows(parameter.shape, 0, 1, self.group)

    def __str__(self) -> str:
        matches = ", ".join(str(match) for match in self.match)
        matches = f"[{matches}]" if len(self.match) > 1 else matches
        if self.levels is None:
            return f"{matches}: stays float, {self.keep}"
        shared = f"groups of {self.group}" if self.group else f"per {self.per}"
        return f"{matches}: {self.levels.text}, {shared}" + (" (optional)" if self.optional else "")
