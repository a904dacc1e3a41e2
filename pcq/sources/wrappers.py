"""Where in a checkpoint the weights are."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from pcq.errors import PcqError, did_you_mean
from pcq.words import kind

WRAPPER = re.compile(
    r"state_dict|model(_state_dict|_state)?|ema(_model|_state_dict)?|model_ema|state_dict_ema"
    r"|net|network|module|weights|params(_ema)?"
)
"""Names under which training scripts keep the weights."""
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|rng|callbacks|loops|hparams|hyper_parameters|criterion|queue", re.I)
"""Names under which they keep other things that can hold tensors."""
ARRAYS = "save them as tensors, torch.from_numpy(array) for each, or as an .npz: numpy.savez('weights.npz', **arrays)"
"""What to do where weights are NumPy arrays."""


class NoSuchState(PcqError):
    """A checkpoint has no state dict of the name that was asked for; ``several``: there are some to choose from."""

    def __init__(self, key: str, path: Path, named: Sequence[str] = (), unnamed: bool = True) -> None:
        self.several = len(named) + unnamed > 1
        if named:
            what, todo = f"there is no state dict '{key}' in it", did_you_mean(key, named)
        else:
            what, todo = "it holds one state dict only", f"Leave out --key {key}"
        super().__init__(what, where=str(path), allowed=listed(list(named)), todo=todo)


def find_state(loaded: Any, path: Path, key: str | None = None) -> tuple[str, Any, list[str]]:
    """Find the state dict (or module) in what was loaded: ``-> dotted key, it, names of what is beside it``.

    Tensors at the top are the state dict, unless a known wrapper name holds one; then the wrapper is opened.

    Raises:
        PcqError: nothing looks like one, or several do.
    """
    if isinstance(loaded, nn.Module):
        if key is not None:
            raise NoSuchState(key, path)
        return "", loaded, []
    if not isinstance(loaded, Mapping):
        found = "a single tensor without a name" if isinstance(loaded, Tensor) else kind(loaded)
        todo = "Save model.state_dict() instead"
        raise PcqError(f"it holds {found}, not a state dict", where=str(path), todo=todo)
    inner = dict(candidates(loaded))
    known = {key: value for key, value in inner.items() if any(map(WRAPPER.fullmatch, key.split(".")))}
    chosen = known or ({} if has_tensors(loaded) else inner)
    if key is not None:
        if key not in inner:
            raise NoSuchState(key, path, list(inner), has_tensors(loaded))
        chosen = {key: inner[key]}
    if len(chosen) > 1:
        choices = ", ".join(f"'{key}' ({_count(value)} tensors)" for key, value in chosen.items())
        todo = f"Choose one, such as --key {next(iter(chosen))}"
        raise PcqError(f"several state dicts, and pcq does not guess: {choices}", where=str(path), todo=todo)
    if chosen:
        where, value = next(iter(chosen.items()))
        top = where.partition(".")[0]
        return where, value, [str(name) for name in loaded if name != top]
    if has_tensors(loaded):
        return "", loaded, []
    if has_arrays(loaded):
        raise PcqError("it holds NumPy arrays, not tensors", where=str(path), todo=f"If they are the weights, {ARRAYS}")
    held = f"no tensors, only {listed([str(key) for key in loaded])}" if loaded else "nothing"
    raise PcqError(f"it holds {held}", where=str(path), todo="Give a checkpoint with the network's weights")


def candidates(loaded: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every mapping of tensors, and every module, inside ``loaded``, under its dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in loaded.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or NOT_WEIGHTS.search(key):
            continue
        if isinstance(value, nn.Module) or (isinstance(value, Mapping) and has_tensors(value)):
            found.append((name, value))
        elif isinstance(value, Mapping):
            found += candidates(value, f"{name}.")
    return found


def has_tensors(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) and isinstance(value, Tensor) for key, value in mapping.items())


def has_arrays(value: Any) -> bool:
    """Whether it is a NumPy array, or a mapping with one somewhere inside."""
    return isinstance(value, np.ndarray) or (isinstance(value, Mapping) and any(map(has_arrays, value.values())))


def _count(value: Any) -> int:
    values = (value.state_dict() if isinstance(value, nn.Module) else value).values()
    return sum(isinstance(item, Tensor) for item in values)


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names in a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
