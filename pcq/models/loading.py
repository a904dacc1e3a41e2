"""Whether a state dict fits a module, what to say where it does not, and loading it where it does."""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcq import weight_norm
from pcq.errors import PcqError
from pcq.models.recognition import Ambiguous, Shapes, recognise
from pcq.words import first_of

COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Mismatch:
    """What keeps a state dict of shapes ``theirs`` from being loaded into a module of shapes ``ours``; falsy: nothing.

    Attributes:
        missing: names of the network that the state dict has not.
        unexpected: names of the state dict that the network has not.
        differ: names of both, of different shape.
    """

    ours: Shapes
    theirs: Shapes
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    differ: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.differ)

    @property
    def parts(self) -> list[str]:
        """Prefixes under which the state dict has all of the network's tensors, and no others."""
        first = next((name for name in self.ours if not name.endswith(COUNTER)), "")
        found = []
        for prefix in (name.removesuffix(first) for name in self.theirs if first and name.endswith(f".{first}")):
            under = {n.removeprefix(prefix): tuple(shape) for n, shape in self.theirs.items() if n.startswith(prefix)}
            missing = self.ours.keys() - under.keys()
            if under.items() <= self.ours.items() and all(name.endswith(COUNTER) for name in missing):
                found.append(prefix)
        return found

    def error(self, arch: str = "") -> PcqError:
        """The first of each, and the likely cause."""
        shapes = [f"{n} {_size(self.theirs[n])} where the network has {_size(self.ours[n])}" for n in self.differ]
        parts = [
            f"{len(names)} tensors {what} ({first_of(listed)})"
            for what, names, listed in (
                ("are missing", self.missing, self.missing),
                ("are not in the network", self.unexpected, self.unexpected),
                ("have another shape", self.differ, shapes),
            )
            if names
        ]
        text = "; ".join(parts).replace("1 tensors are", "1 tensor is").replace("1 tensors have", "1 tensor has")
        return PcqError(f"the weights do not fit the network: {text}", where=arch, todo=self.cause(arch))

    def cause(self, arch: str) -> str:
        """The likely cause and what to do, or an empty string."""
        if not self.missing and not self.unexpected:
            for axis, key, what in ((0, "num_classes", "outputs"), (1, "in_chans", "input channels")):
                sizes = {(self.ours[n][axis:][:1], self.theirs[n][axis:][:1]) for n in self.differ}
                rest = all(_without(self.ours[n], axis) == _without(self.theirs[n], axis) for n in self.differ)
                if rest and len(sizes) == 1 and len(self.differ) <= 6:
                    (ours,), (theirs,) = sizes.pop()
                    known = arch.startswith(("torchvision:", "timm:"))
                    how = f"add {key}={theirs} to --arch" if known else f"let --arch say so, such as ?{key}={theirs}"
                    return f"The checkpoint is for {theirs} {what} and the network for {ours}: {how}"
        if parts := self.parts:
            those = " and those under ".join(f"'{prefix}'" for prefix in parts)
            one = "one of them, such as " * (len(parts) > 1)
            return f"The tensors under {those} are the network's: open the checkpoint with {one}--key {parts[0][:-1]}"
        try:
            found = recognise(self.theirs)
        except Ambiguous as error:
            return f"The weights look like one of {', '.join(error.candidates)}"
        if found is not None:
            return f"The weights look like {found.sentence}: --arch '{found.arch}'"
        shared = len(self.theirs.keys() & self.ours.keys())
        if shared < len(self.theirs) / 2:
            return f"Only {shared} of the checkpoint's {len(self.theirs)} names are the network's: another architecture"
        return "A variant of the architecture: another depth, width or version of the code"


def _size(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :] if axis < len(shape) else ()


def mismatch(module: nn.Module, shapes: Shapes) -> Mismatch:
    """Compare; counters of BatchNorm and all but one of tied names may be absent.

    Buffers that the network makes for itself and does not save (older versions of it did) may be there.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    ties = _ties(module)
    given = {ties[name] for name in shapes if name in ties}
    unsaved = {name for name, _ in module.named_buffers()} - ours.keys()
    missing = [n for n in ours if n not in shapes and not n.endswith(COUNTER) and ties.get(n) not in given]
    return Mismatch(
        ours,
        shapes,
        tuple(missing),
        tuple(name for name in shapes if name not in ours and name not in unsaved),
        tuple(name for name in ours if name in shapes and ours[name] != tuple(shapes[name])),
    )


def prefix_of(module: nn.Module, names: Collection[str]) -> str:
    """What the network puts before every one of ``names``, such as ``model.``, which was taken for a wrapper's.

    Empty where it has one of them itself, or not all of them behind one prefix.
    """
    ours = {name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())}
    if not names or not ours.isdisjoint(names):
        return ""
    first = next(iter(names))
    found = (name.removesuffix(first) for name in ours if name.endswith(f".{first}"))
    return next((prefix for prefix in sorted(found) if all(prefix + name in ours for name in names)), "")


def _ties(module: nn.Module) -> dict[str, int]:
    """Name of a parameter -> identity of the tensor."""
    return {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}


def check_shapes(module: nn.Module, shapes: Shapes, arch: str = "") -> None:
    """Raise what :func:`load_state` would raise, without values, for whole names; ``module`` may be on the meta device.

    Raises:
        PcqError: as :func:`load_state`.
    """
    if check := mismatch(module, shapes):
        try:
            bare = copy.deepcopy(module).to("meta")
        except (RuntimeError, TypeError):  # it holds what cannot be copied
            raise check.error(arch) from None
        _load_otherwise(bare, {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}, check, arch)


def load_state(module: nn.Module, state: Mapping[str, Tensor], arch: str = "") -> None:
    """Load all of ``state`` into all of ``module``; counters of BatchNorm and all but one of tied names may be absent,
    and so may the prefix that all names of ``module`` have.

    Raises:
        PcqError: names are missing or left over, or shapes differ. The message lists the first of each and the
            likely cause. What the module then holds is undefined.
    """
    if check := mismatch(module, {name: tuple(tensor.shape) for name, tensor in state.items()}):
        if prefix := prefix_of(module, state):
            load_state(module, {prefix + name: tensor for name, tensor in state.items()}, arch)
            return
        _load_otherwise(module, state, check, arch)
        return
    ties = _ties(module)
    given = {ties[name]: tensor for name, tensor in state.items() if name in ties}
    own = module.state_dict()
    filled = {name: state.get(name, given.get(ties.get(name, 0), own[name])) for name in own}
    module.load_state_dict(versioned(module, filled), strict=True)


def versioned(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the versions of the parts of ``module``, as its own state dict has: some do not load without."""
    made = module.state_dict()
    made.clear()  # the versions stay
    made.update(state)
    return made


def _load_otherwise(module: nn.Module, state: Mapping[str, Tensor], check: Mismatch, arch: str) -> None:
    """Some modules rename what they load, such as weight_norm: let them try before the state dict is refused.

    One that still has the parts of a weight_norm (artifacts of older versions) fits a module without it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about meta tensors, which stand for the shapes
            module.load_state_dict(dict(state), strict=True)
    except (RuntimeError, ValueError):  # torchvision's MNASNet raises the latter
        whole = weight_norm.whole(state)
        if whole.keys() == state.keys():
            raise check.error(arch) from None
        load_state(module, whole, arch)
