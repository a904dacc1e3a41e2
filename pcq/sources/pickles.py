"""What ``torch.save`` wrote: read without executing anything in it, and its state dict found."""

import argparse
import importlib
import os
import pathlib
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcq import weight_norm
from pcq.errors import PcqError
from pcq.sources.archive import check_sums, damaged
from pcq.sources.safetensors import pick, read_index
from pcq.sources.source import Entry
from pcq.sources.tensors import tensor_entries
from pcq.sources.wrappers import ARRAYS, find_state, listed
from pcq.torchvision_compat import declare_operators

RUNS_CODE = re.compile(
    r"(posix|nt|os|sys|subprocess|shutil|socket|importlib|runpy|pty|webbrowser|ctypes|code|pdb|operator)\."
    r"|builtins\.(eval|exec|compile|open|getattr|setattr|breakpoint|__import__)$"
)
"""Names that no checkpoint has a use for."""
PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    pathlib.PurePosixPath,
    pathlib.PosixPath,
    np.dtype,
    np.bool_,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
    np.float64(0).__reduce__()[0],
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
]
"""What training scripts store beside the weights and torch does not allow by itself; building it runs no code."""
ARRAY = re.compile(r"numpy\.(_?core\.multiarray\._reconstruct|ndarray)")
"""What builds a NumPy array."""
BLOCKED = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class Asked:
    """What the user allows and wants: see :func:`pcq.sources.open_source`."""

    allow_globals: tuple[str, ...] = ()
    unsafe_pickle: bool = False
    key: str | None = None


@dataclass(frozen=True)
class Opened:
    """What a pickle held: the tensors, the whole module if it was one, what was found on the way."""

    entries: dict[str, Entry]
    notes: list[str]
    module: nn.Module | None = None


def open_pickle(path: Path, asked: Asked) -> Opened:
    """Open a ``torch.save`` file, zip or legacy.

    Raises:
        PcqError: it holds Python objects that are not allowed, no tensors, or several state dicts.
        CheckFailed: it is damaged.
    """
    checked = cache(partial(check_sums, path)) if zipfile.is_zipfile(path) else None
    loaded = load(path, asked)
    notes = []
    if asked.unsafe_pickle:
        notes.append("Opened with --unsafe-pickle: code in the file could run.")
    where, found, beside = find_state(loaded, path, asked.key)
    module = next((x for x in (loaded, found) if isinstance(x, nn.Module)), None)
    if module is not None and (count := weight_norm.remove(module)):
        notes.append(weight_norm.note(count))
    state = found.state_dict() if isinstance(found, nn.Module) else found
    for name, value in state.items():
        if isinstance(value, tuple) and any(isinstance(each, Tensor) and each.is_quantized for each in value):
            raise PcqError(f"its '{name}' is quantized already", where=str(path), todo="Give the float network")
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if where:
        notes.append(f"Opened '{where}'" + (f"; beside it: {listed(beside)}." if beside else "."))
    if isinstance(loaded, Mapping) and isinstance(loaded.get("arch"), str) and where:
        notes.append(f"The checkpoint says arch: {loaded['arch']}.")
    if ignored := [str(name) for name in state if name not in tensors]:
        notes.append(f"Ignored what is not a tensor: {listed(ignored)}.")
    entries = tensor_entries(tensors, path, notes, checked)
    return Opened(entries, notes, module.eval() if module is not None else None)


def load(path: Path, asked: Asked) -> Any:
    """``torch.load`` on the CPU, mapped where the format allows, with nothing but tensors and plain data allowed."""
    mapped = zipfile.is_zipfile(path)
    if asked.allow_globals or asked.unsafe_pickle:
        declare_operators()  # the classes may be torchvision's
    allowed = PLAIN_DATA + [resolve(name) for name in asked.allow_globals]
    if asked.allow_globals:
        allowed += layer_classes()
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=not asked.unsafe_pickle, mmap=mapped)
    except Exception as error:  # damaged pickles raise anything at all
        blocked = blocked_globals(path, error, allowed) if not asked.unsafe_pickle else []
        if blocked:
            raise refusal(path, blocked) from error
        if asked.unsafe_pickle and isinstance(error, (ImportError, AttributeError)):
            todo = "Run pcq where that code can be imported, or save model.state_dict() instead"
            raise PcqError(f"it needs code that is not here ({error})", where=str(path), todo=todo) from error
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error) or type(error).__name__
        raise damaged(path, reason.strip().splitlines()[0][:200]) from error


def layer_classes() -> list[Any]:
    """torch's own layers: they come along with an allowed class, so that nobody has to list Conv2d."""
    modules = [value for value in vars(torch.nn.modules).values() if isinstance(value, ModuleType)]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [value for value in classes if issubclass(value, nn.Module) and value.__module__.startswith("torch.nn.")]


def resolve(name: str) -> Any:
    """``package.Class`` -> the object, importing its module; the current folder counts as importable."""
    todo = "Write it as the refusal names it, and run pcq where it can be imported"
    module, _, attribute = name.rpartition(".")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing the user's module can raise anything
        raise PcqError(f"'{name}' cannot be imported ({error})", where="--allow-global", todo=todo) from error
    finally:
        sys.path.remove(os.getcwd())


def blocked_globals(path: Path, error: Exception, allowed: Sequence[Any]) -> list[str]:
    """The names the file wants that are not allowed; all of them for the zip format, the first for the legacy one."""
    names = BLOCKED.findall(str(error))
    if not names:
        return []
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or names
    except Exception:  # the legacy format
        return names


def refusal(path: Path, blocked: Sequence[str]) -> PcqError:
    """The sentence for a pickle that wants more than tensors."""
    hostile = [name for name in blocked if RUNS_CODE.match(name)]
    if hostile:
        what = f"loading it would run code of its own choosing: it calls {', '.join(hostile)}"
        return PcqError(what, where=str(path), todo="Nothing was run. Do not open this file with anything else either")
    own = [name for name in blocked if not name.startswith("torch.nn.modules.")] or list(blocked)
    if all(ARRAY.fullmatch(name) for name in blocked):
        flags = " ".join(f"--allow-global {name}" for name in blocked)
        todo = (
            f"If they are the weights, {ARRAYS}. If they stand beside the weights and you trust the file, add `{flags}`"
        )
        return PcqError("it holds NumPy arrays, not only tensors", where=str(path), todo=todo)
    flags = " ".join(f"--allow-global {name}" for name in own)
    todo = (
        f"If you trust the file, add `{flags}` (these classes are then loaded, nothing else), or --unsafe-pickle "
        "(anything in the file can run). Safer: save model.state_dict() instead"
    )
    return PcqError(f"it holds Python objects, not only tensors: {', '.join(own)}", where=str(path), todo=todo)


def sharded_entries(index: Path, asked: Asked) -> dict[str, Entry]:
    """The tensors of ``pytorch_model.bin.index.json``; one shard at a time stays mapped.

    Raises:
        PcqError, CheckFailed: as :func:`open_pickle`, for any shard; or a shard is missing.
    """
    places = read_index(index)

    @lru_cache(maxsize=1)
    def mapped(shard: Path) -> dict[str, Entry]:
        return open_pickle(shard, asked).entries

    def read(shard: Path, name: str) -> Tensor:
        return mapped(shard)[name].read()

    shards = {
        shard: {name: replace(entry, read=partial(read, shard, name)) for name, entry in mapped(shard).items()}
        for shard in dict.fromkeys(places.values())
    }
    return pick(index, places, shards)
