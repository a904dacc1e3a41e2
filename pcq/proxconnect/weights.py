"""What is quantized: parameters with their rows and levels, and each of them under way."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pcq import qtensor, shards
from pcq.errors import PcqError, raise_all
from pcq.grids import Grid
from pcq.methods import Method
from pcq.plan import Plan
from pcq.prox import Hard, proximal
from pcq.refit import following, settles
from pcq.rows import Rows


@dataclass(frozen=True)
class Target:
    """A parameter to quantize, how it is cut into rows, what chooses its levels, and those to start from if known.

    Levels to start from are followed by least squares, where the quantizer does not name another rule. Others are
    chosen by its rule for weights that train (:func:`pcq.refit.following`), but where they are never refitted: then
    they are chosen once, for weights at rest. So they are for methods that keep no latent: the mean magnitude of
    weights that lie on their levels is not that of weights around them, and levels would follow it down to 0, or up.
    There a rule by it (``scale="mean"``) chooses the levels once, and they are never refitted.
    """

    parameter: Tensor
    rows: Rows
    quantizer: qtensor.Quantizer
    grid: Grid | None = None


def targets(plan: Plan, parameters: Mapping[str, Tensor]) -> dict[str, Target]:
    """What ``plan`` quantizes among ``parameters``; a tied one once.

    Args:
        plan: what gets levels.
        parameters: ``dict(model.named_parameters())``; with ``remove_duplicate=False`` also where the checkpoint calls
            a tied weight by another of its names than the model's first.

    Raises:
        PcqError: one line for every planned name that is not among the parameters, has another shape, or is the same
            parameter as one before it.
    """
    problems, found = [], dict[str, Target]()
    names: dict[int, str] = {}
    for entry in plan.quantized:
        name, shape = entry.parameter.name, tuple(entry.parameter.shape)
        if entry.parameter.tied_to is not None:
            continue
        if name not in parameters:
            longer = next((other for other in parameters if other.endswith(f".{name}")), "")
            todo = f"The model calls it {longer}: give the names of the module inside of it" if longer else ""
            problems.append(PcqError("planned, but the model has no parameter of that name", where=name, todo=todo))
        elif tuple(parameters[name].shape) != shape:
            got = tuple(parameters[name].shape)
            problems.append(PcqError(f"planned with shape {shape}, but the model's is {got}", where=name))
        elif (before := names.setdefault(id(parameters[name]), name)) != name:
            problems.append(PcqError(f"is one with {before} in the model, but two in the checkpoint", where=name))
        else:
            found[name] = Target(parameters[name], entry.rows, entry.quantizer)
    raise_all(problems)
    return found


class Tracked:
    """One parameter under way: ``shown`` is what the model sees between steps, ``hidden`` the other value, if any."""

    def __init__(self, target: Target, method: Method, refitted: bool) -> None:
        self.parameter, self.rows = target.parameter, target.rows
        follows = refitted and target.grid is None and method.updates == "latent" and not method.posttraining
        self.quantizer = following(target.quantizer) if follows else target.quantizer
        self.refits = method.updates == "latent" or settles(self.quantizer)
        self.swaps = swaps(target.parameter)
        self.shown = shards.local(target.parameter.data)
        self.hidden = self.shown.clone() if method.gradient_at != method.updates else None
        self.updates_latent = method.updates == "latent"
        self.latent_hidden = self.hidden is not None and self.updates_latent
        self.grid: Grid = target.grid or qtensor.fit(self.quantizer, self.whole(self.shown), self.rows)
        self.mu = 1.0
        self.codes: Tensor | None = None

    @property
    def latent(self) -> Tensor:
        """The continuous value; for ProxQuant, which keeps none, the weight itself."""
        return self.hidden if self.latent_hidden and self.hidden is not None else self.shown

    @property
    def mapped(self) -> Tensor:
        """Where the latent's image goes: the other of the two values, or the latent's own place."""
        return self.shown if self.latent_hidden or self.hidden is None else self.hidden

    def moved(self) -> bool:
        """Whether the parameter has other memory than when it was last looked at."""
        held = self.parameter if self.swaps or not shards.sharded(self.parameter.data) else shards.local(self.parameter)
        return held.data_ptr() != self.shown.data_ptr()

    def whole(self, part: Tensor) -> Tensor:
        """All of a value of which ``part`` is held here: the same tensor, unless the parameter is sharded."""
        return shards.joined(part, self.parameter.data)

    def saved(self, part: Tensor) -> Tensor:
        """As :meth:`whole`, of a sharded parameter in main memory."""
        return self.whole(part).cpu() if shards.sharded(self.parameter.data) else part

    def own(self, whole: Tensor) -> Tensor:
        """What is held here of a value."""
        return shards.own(whole, self.parameter.data)

    def arrange(self, like: Tensor) -> None:
        """Lay both values out in memory as ``like`` is, such as with the channels last."""
        self.shown = torch.empty_like(like).copy_(self.shown)
        self.hidden = None if self.hidden is None else torch.empty_like(like).copy_(self.hidden)

    def view(self, part: Tensor) -> Tensor | None:
        """The rows of what is held here, in place; None: they do not lie in it as they are."""
        if shards.sharded(self.parameter.data):
            return None
        rows = self.rows.split(part)
        return rows if rows.data_ptr() == part.data_ptr() and rows.is_contiguous() else None

    def nearest(self, weight: Tensor) -> Tensor:
        """``weight``, whole, on its levels."""
        return self.rows.merge(proximal(self.rows.split(weight), self.grid, Hard().shifts(1.0)))

    def follow(self, name: str) -> bool:
        """The parameter has been given other memory: take it up, or give it its own, laid out alike, where that is
        swapped anyway; whether it was taken up.

        Raises:
            PcqError: it is on another device, or of another type or shape.
        """
        data, shown = self.parameter.data, self.shown
        part = shards.local(data)
        if (part.device, part.dtype, part.shape) != (shown.device, shown.dtype, shown.shape):
            was, now = (f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in (shown, part))
            raise PcqError(
                f"was {was} when ProxConnect was attached, and is {now} of shape {tuple(part.shape)} now",
                where=name,
                todo="Attach when the model is on its device, in float32",
            )
        if not (self.updates_latent and self.swaps):
            self.shown = part
            return True
        if part.stride() != shown.stride():
            self.arrange(part)
        self.parameter.data = self.shown
        return False

    def counts(self) -> Tensor:
        """float64 ``[4]``: weights on their levels (within rounding), weights whose nearest level is another than when
        last asked, the sum of ``(latent - nearest level)^2``, and of ``latent^2``."""
        latent, value = self.whole(self.latent), self.whole(self.mapped)
        near = self.nearest(value)
        near_rows = self.rows.split(near)
        slack = 4 * torch.finfo(near.dtype).eps * near_rows.abs().amax(1, keepdim=True)
        slack = self.rows.merge(slack.expand_as(near_rows))
        codes = qtensor.encode(latent, self.grid, self.rows).codes
        flipped = codes.new_zeros(()) if self.codes is None else (codes != self.codes).sum()
        self.codes = codes
        within = ((value - near).abs() <= slack).sum()
        apart = (latent - self.nearest(latent)).square().sum()
        return torch.stack([x.double() for x in (within, flipped, apart, latent.square().sum())])


def swaps(parameter: Tensor) -> bool:
    """Whether the two values change places by pointer: on a CPU. Elsewhere they are copied, as CUDA graphs need."""
    return parameter.device.type == "cpu" and not shards.sharded(parameter.data)
