"""Ranges of activations that are trained: the loss chooses where the codes end, not the furthest number.

Minimised is the training loss over both ends of each range, l <= 0 <= h. A value becomes ``s (c - z)``, with its code
``c = clip(round(x / s) + z, 0, 255)``, ``s = (h - l) / 255`` and ``z = round(-l / s)``. Straight through both roundings
the gradient with respect to s is ``round(x / s) - x / s`` between the outer levels (LSQ, arXiv 1902.08153, eq. 3);
beyond them the value is an end of the range, and its gradient with respect to this end is 1 (LSQ+, arXiv 2004.09576,
where the offset is what l is here), but for what rounding z moves.

What is trained is the logarithm of each end's magnitude, by an Adam of its own, as in TQT (arXiv 1903.08066): a step is
a share of the range whatever the tensor's scale and size, an end never changes its sign, and one that is 0 stays there.
Nothing decays. An end goes no further than the furthest number seen, which would only make the levels coarser (and
leave a Relu6 unfused), and stays above ``LEAST`` of it, so that no range collapses.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pcq.activations import FULL, Range
from pcq.train.ranks import ALONE, Ranks

RATE = 0.01
"""Adam's highest learning rate; the share of it is the network's."""

LEAST = 2.0**-12
"""Of the furthest number seen."""


class Learned:
    """Ranges under way.

    Args:
        ranges: where they start. Empty ones stay as they are, and so do those of 7 bits: their codes go on beyond the
            range, and a shorter one would have more of them where sums saturate.

    Attributes:
        logs: logarithms of the magnitudes of the ends, [n, 2] in float64.
        reach: the furthest numbers seen, of the same shape.
    """

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        taken = {name: span for name, span in ranges.items() if span.top == FULL and span.low < span.high}
        self.places = {name: i for i, name in enumerate(taken)}
        self.reach = torch.tensor([[-span.low, span.high] for span in taken.values()], dtype=torch.float64).view(-1, 2)
        self.logs = nn.Parameter(self.reach.log())
        self.optimizer = torch.optim.Adam([self.logs], lr=RATE)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def rounded(self, x: Tensor, name: str, span: Range) -> Tensor:
        """``x`` on the levels of ``span``, with gradients with respect to ``x`` and to the range."""
        low, high = torch.aminmax(x.detach())
        seen = torch.stack([-low, high]).to(self.reach)
        place = self.places[name]
        self.reach[place] = self.reach[place].maximum(seen)
        return Onto.apply(x, self.logs[place], span)  # type: ignore[no-any-return, no-untyped-call]

    @torch.no_grad()
    def update(self, share: float, ranks: Ranks = ALONE) -> dict[str, Range]:
        """One step down the gradient (all processes' mean), at ``share`` of the learning rate; the ranges then."""
        gradient = torch.zeros_like(self.logs) if self.logs.grad is None else self.logs.grad
        self.logs.grad = ranks.mean(gradient).nan_to_num(0, 0, 0)  # the run is going to say that its loss is none
        self.reach = ranks.furthest(self.reach)
        self.optimizer.param_groups[0]["lr"] = RATE * share
        self.optimizer.step()
        self.logs.grad = None
        self.logs.copy_(self.logs.clamp((self.reach * LEAST).log(), self.reach.log()))
        ends = self.logs.exp().minimum(self.reach).tolist()
        return {name: Range(0.0 - ends[i][0], ends[i][1]) for name, i in self.places.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on."""
        return {"names": list(self.places), "logs": self.logs.detach(), "reach": self.reach,
                "optimizer": self.optimizer.state_dict()}  # fmt: skip

    @classmethod
    def going_on(cls, state: Mapping[str, Any]) -> "Learned":
        """As it was saved."""
        self = cls({})
        self.places = {name: i for i, name in enumerate(state["names"])}
        self.reach, self.logs = state["reach"].clone(), nn.Parameter(state["logs"].clone())
        self.optimizer = torch.optim.Adam([self.logs], lr=RATE)
        self.optimizer.load_state_dict(state["optimizer"])
        return self


class Onto(torch.autograd.Function):
    """``pcq.train.activations.onto`` with a gradient for the logarithms of the range's ends, [2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logs: Tensor, span: Range) -> Tensor:
        made, inside = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(
            x.float(), float(span.scale), int(span.zero_point), 0, 255
        )
        ctx.save_for_backward(x, made, inside, logs)
        ctx.span = span
        return made.to(x.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, made, inside, logs = ctx.saved_tensors
        span: Range = ctx.span
        passed = gradient * inside
        beyond = gradient - passed
        width = span.high - span.low
        moved = float(span.zero_point) + span.low * span.top / width  # by rounding the zero point
        between = (passed * (made - x)).sum() / width - beyond.sum() * (moved / span.top)
        low = ((beyond * (x < 0)).sum() - between) * span.low
        high = ((beyond * (x > 0)).sum() + between) * span.high
        return passed, torch.stack([low, high]).to(logs), None
