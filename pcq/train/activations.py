"""Training for int8 activations: the network computes with the codes that ``pcq export --mode int8`` will compute with.

Every tensor that the exported file holds in 8 bits goes through the proximal map of its levels in training too, hard
from the first step: the nearest of 256 evenly spaced levels. Its gradient is the straight-through estimator, 1 within
the range and 0 outside (arXiv 1712.05877). Ranges are observed: moving averages of the least and greatest number of
each batch, kept fixed from ``anneal_end`` on, so that the last part of the training settles with what the file will
have. Or they are learned (:mod:`pcq.train.learned`), once they have been observed for a while.

Nothing is traced. :class:`Simulation` watches the calls of torch's functions while ``forward`` runs, whatever Python
does between them, and follows the rules of ``pcq.export.int8.place``: inputs of convolutions and of matrices with
two-dimensional inputs, outputs of convolutions behind their BatchNorm and Relu or Clip, sums and concatenations of
such tensors. As a tensor is rounded only when something reads it, the BatchNorm and the Relu can still come. Whether
they are the only readers, as fusing them takes, is counted in passes beforehand. Matrices with other inputs round
these anew in each call. A layer that other code than ``conv`` and ``linear`` multiplies by (nn.MultiheadAttention) is
left in float.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from pcq.activations import FULL, HALF, Names, Range
from pcq.grids import Grid
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows
from pcq.train.biases import Constant, Steps
from pcq.train.learned import Learned
from pcq.train.ranks import ALONE, Ranks

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
CLIPS = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clip_"}
SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
CONCATS = {"cat", "concat", "concatenate"}
SAME = {
    "max_pool1d", "max_pool2d", "max_pool3d", "_max_pool1d", "_max_pool2d", "_max_pool3d", "reshape", "view", "flatten",
    "transpose", "permute", "squeeze", "unsqueeze", "contiguous",
}  # fmt: skip
"""Functions whose result has the codes of their input."""
LOOKS = {"size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "__len__", "ndimension", "nelement"}
"""Methods that read no numbers."""

MOMENTUM = 0.01
"""Share of a batch in the moving averages."""


@dataclass(frozen=True)
class Weight8:
    """A weight whose layers run in int8: its name, whether its integers are large, and how many are one of its scale
    (``pcq.export.integers``)."""

    name: str
    large: bool
    unit: int


@dataclass
class _Codes:
    """A tensor that has codes, under a name.

    Attributes:
        name: as ``pcq.activations`` gives it.
        stage: what may still be fused: after ``conv`` a BatchNorm and a clip, after ``norm`` a clip, after ``end``
            nothing; ``only``: it has codes for static layers, and is as it was for others.
        rounded: the tensor on its levels, as soon as something has read it.
        level: the tensor is on them as it is.
        constant: what the layer before adds, where it is rounded and a BatchNorm may still change it.
    """

    name: str
    stage: Literal["conv", "norm", "end", "only"]
    rounded: Tensor | None = None
    level: bool = False
    constant: Constant | None = None


class Simulation:
    """The activations of one module in 8 bits.

    Args:
        module: the network; its ``forward`` is wrapped until :meth:`detach`.
        weights: parameters whose layers run in int8.
        ranges: known ones, by name; where there are none they are observed.
        ranks: the processes that train together, whose parts of a batch are observed as one.
        levels: of weights that are on them, by name; biases of their layers are rounded as in the file, where no
            gradient is taken.

    Attributes:
        seen: names of the tensors that were rounded.
        learned: the ranges that are being trained.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[Tensor, Weight8],
        ranges: Mapping[str, Range] | None = None,
        ranks: Ranks = ALONE,
        levels: Mapping[str, Grid] | None = None,
    ):
        self.weights = WeakIdKeyDictionary(dict(weights))
        self.levels = dict(levels or {})
        self.ranges: dict[str, Range] = dict(ranges or {})
        self.ranks, self.observing = ranks, False
        self.seen: set[str] = set()
        self.learned: Learned | None = None
        self.halved: set[str] = {name for name, span in self.ranges.items() if span.top == HALF}
        self.readers: Counter[tuple[str, str]] = Counter()
        self._module, self._forward = module, module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            watching = _Watching(self)
            with watching:
                result = self._forward(*args, **kwargs)
            return watching.settled(result)

        module.forward = forward

    def detach(self) -> None:
        """Give the module its own ``forward`` back."""
        del self._module.forward

    @torch.no_grad()
    def look(self, *inputs: Tensor) -> None:
        """Run once, to count who reads what and which tensors enter layers of large weights; observes no ranges."""
        training = self._module.training
        self._module.eval()
        for _ in range(2):  # where fusing turns out to be wrong, other tensors have codes
            self._module(*inputs)
        self._module.train(training)

    @contextmanager
    def watching(self, on: bool) -> Iterator[None]:
        """Observe ranges within it."""
        before, self.observing = self.observing, on
        try:
            yield
        finally:
            self.observing = before

    @contextmanager
    def on_levels(self, levels: Mapping[str, Grid]) -> Iterator[None]:
        """Within it weights are on these levels, and biases rounded accordingly."""
        before, self.levels = self.levels, dict(levels)
        try:
            yield
        finally:
            self.levels = before

    def rounded(self, x: Tensor, name: str) -> Tensor:
        """``x`` on the levels of the tensor ``name``."""
        self.seen.add(name)
        learned = self.learned if self.learned is not None and name in self.learned else None
        if learned is not None and torch.is_grad_enabled():
            return learned.rounded(x, name, self.ranges[name])
        if self.observing and learned is None:
            self._observe(x, name)
        span = self.ranges.get(name)
        if span is None:  # nothing was observed there
            span = Range(*self.ends(x), self._top(name))
        return onto(x, span)

    def _top(self, name: str) -> int:
        return HALF if name in self.halved else FULL

    def _observe(self, x: Tensor, name: str) -> None:
        low, high = self.ends(x)
        known = self.ranges.get(name)
        if known is not None:
            low, high = (old + MOMENTUM * (new - old) for old, new in ((known.low, low), (known.high, high)))
        self.ranges[name] = Range(low, high, self._top(name))

    def ends(self, x: Tensor) -> tuple[float, float]:
        """The least and the greatest number, or 0; in training, of all processes' samples."""
        low, high = _ends(x.detach())
        if self.ranks.world == 1 or not torch.is_grad_enabled():
            return low, high
        low, high = self.ranks.furthest(torch.tensor([-low, high], dtype=torch.float64)).tolist()
        return 0.0 - low, high

    def learn(self) -> None:
        """Train the ranges from now on, from where they are; those that cannot be trained are still observed."""
        if self.learned is None:
            self.learned = Learned(self.ranges)

    def update(self, share: float) -> None:
        """Once the gradient is there: move the ranges that are trained, at ``share`` of their learning rate."""
        if self.learned is not None:
            self.ranges |= self.learned.update(share, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on."""
        return {
            "ranges": {name: (span.low, span.high, span.top) for name, span in self.ranges.items()},
            "learned": None if self.learned is None else self.learned.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ranges = {name: Range(*span) for name, span in state["ranges"].items()}
        self.learned = None if state["learned"] is None else Learned.going_on(state["learned"])


def onto(x: Tensor, span: Range) -> Tensor:
    """The nearest of the range's levels, elementwise; the gradient is 1 between the outer levels, and 0 beyond them."""
    made = torch.fake_quantize_per_tensor_affine(x.float(), float(span.scale), int(span.zero_point), 0, 255)
    return made.to(x.dtype)


def _ends(x: Tensor) -> tuple[float, float]:
    if x.numel() == 0:
        return 0.0, 0.0
    low, high = torch.aminmax(x)
    return min(0.0, float(low)), max(0.0, float(high))


class _Watching(TorchFunctionMode):
    """One forward pass."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self.simulation, self.names = simulation, Names()
        self.codes = WeakIdKeyDictionary()
        self.counted: Counter[tuple[str, str]] = Counter()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for key, count in self.counted.items():
            self.simulation.readers[key] = max(self.simulation.readers[key], count)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = getattr(func, "__name__", "")
        if kind in LOOKS or kind in ("__set__", "__delete__"):
            return func(*args, **kwargs)
        if kind == "__get__" and not isinstance(seen := func(*args, **kwargs), Tensor):
            return seen
        x = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        mine = self.codes.get(x) if isinstance(x, Tensor) else None
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        layer = self.simulation.weights.get(weight) if isinstance(weight, Tensor) else None
        if layer is not None and isinstance(x, Tensor) and kind in CONVOLUTIONS | {"linear"}:
            return self._layer(func, kind, x, layer, args, kwargs)
        if kind == "batch_norm" and mine is not None and mine.stage == "conv" and self._alone(mine):
            made = func(*args, **kwargs)
            made = made if mine.constant is None else mine.constant.normed(made, *args, **kwargs)
            return self._put(made, _Codes(mine.name, "norm"))
        if kind in CLIPS and mine is not None and mine.stage in ("conv", "norm") and self._alone(mine):
            return self._put(func(*args, **kwargs), _Codes(mine.name, "end"))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = [self.codes.get(leaf) for leaf in tensors]
        if kind in SUMS | CONCATS and len(found) > 1 and all(one is not None and one.stage != "only" for one in found):
            name = self.names.combined("sum" if kind in SUMS else "concat", [one.name for one in found if one])
            return self._put(self._call(func, args, kwargs), _Codes(name, "norm"))
        made = self._call(func, args, kwargs)
        if made is x and mine is not None:  # written in place
            del self.codes[x]
        if kind in SAME and mine is not None and mine.stage != "only" and isinstance(made, Tensor):
            return self._put(made, _Codes(mine.name, "end", level=True))
        return made

    def _layer(self, func: Any, kind: str, x: Tensor, layer: Weight8, args: Any, kwargs: Any) -> Any:
        """A layer that runs in int8."""
        constant = None
        if kind == "linear" and x.ndim != 2:
            x = onto(self._read(x), Range(*self.simulation.ends(x)))
        else:
            codes = self.codes.get(x)
            if codes is None:
                codes = _Codes(self.names.of(layer.name, "input"), "only")
                self._put(x, codes)
            if layer.large and not _depthwise(kind, args[1] if len(args) > 1 else kwargs["weight"], x):
                self.simulation.halved.add(codes.name)
            x = self._read(x, static=True)
            span = self.simulation.ranges.get(codes.name)
            grid = self.simulation.levels.get(layer.name)
            if grid is not None and span is not None and not torch.is_grad_enabled():
                weight, bias = (
                    args[i] if len(args) > i else kwargs.get(key) for i, key in ((1, "weight"), (2, "bias"))
                )
                constant = Constant.of(Steps.of(grid, layer.unit), span.scale, bias, len(weight))
        args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})
        made = func(*args, **kwargs)
        made = made if constant is None else constant.onto(made)
        if kind == "linear":
            return made
        return self._put(made, _Codes(self.names.of(layer.name, "output"), "conv", constant=constant))

    def _alone(self, codes: _Codes) -> bool:
        """Whether this function is the only reader, as far as earlier passes tell."""
        key = (codes.name, codes.stage)
        self.counted[key] += 1
        return self.simulation.readers[key] <= 1

    def _put(self, made: Any, codes: _Codes) -> Any:
        self.codes[made] = codes
        return made

    def _read(self, x: Tensor, static: bool = False) -> Tensor:
        """What a function sees of ``x``: its codes, if it has some (those for static layers only, if it is one)."""
        codes: _Codes | None = self.codes.get(x)
        if codes is None or codes.level or (codes.stage == "only" and not static):
            return x
        if codes.stage in ("conv", "norm"):
            self.counted[codes.name, codes.stage] += 1
        if codes.rounded is None:
            codes.rounded = self.simulation.rounded(x, codes.name)
        return codes.rounded

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call it on the codes of what it reads."""
        read = pytree.tree_map(lambda leaf: self._read(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return func(*read[0], **read[1])

    def settled(self, result: Any) -> Any:
        """The module's result, on its levels."""
        return pytree.tree_map(lambda leaf: self._read(leaf) if isinstance(leaf, Tensor) else leaf, result)


def simulate(
    module: nn.Module, quantized: Mapping[str, QuantizedTensor], ranges: Mapping[str, Range], *inputs: Tensor
) -> None:
    """From now on ``module``, which holds the ``quantized`` weights, computes with activations of these ranges.

    Args:
        inputs: a few samples, a tensor for each input, to see how the network uses what it computes.
    """
    forms = {name: (weight.grid, weight.rows) for name, weight in quantized.items()}
    levels = {name: weight.grid for name, weight in quantized.items()}
    Simulation(
        module, weights8(dict(module.named_parameters(remove_duplicate=False)), forms), ranges, levels=levels
    ).look(*inputs)


def _depthwise(kind: str, weight: Tensor, x: Tensor) -> bool:
    """A layer that has a kernel of its own, as in ``pcq.export.int8``."""
    return kind != "linear" and weight.shape[1] == 1 and x.shape[1] == len(weight) and weight.ndim <= 4


def weights8(parameters: Mapping[str, Tensor], forms: Mapping[str, tuple[Grid, Rows]]) -> dict[Tensor, Weight8]:
    """Which parameters' layers ``pcq export --mode int8`` can run in int8, from the form of their levels."""
    from pcq.export.integers import integers_of, large

    found = {}
    for name, (grid, rows) in forms.items():
        if not isinstance(form := integers_of(grid, rows), str):
            found[parameters[name]] = Weight8(name, large(grid), form.unit)
    return found
