"""TorchScript archives: their parameters and buffers, read without running the program inside.

``torch.jit.load`` runs code of the archive (``__setstate__``). Here ``data.pkl`` is read by an unpickler that knows
tensors and lists and turns every class of the program into an empty record; which attributes are parameters and buffers
stands in the program's text as ``__parameters__`` and ``__buffers__``.
"""

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pcq.errors import CheckFailed, PcqError
from pcq.sources.archive import read_strided
from pcq.sources.source import Entry

CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:  .*\n|\n)*)", re.M)
DECLARED = re.compile(r"^  __(?:parameters|buffers)__ = \[(.*)\]", re.M)
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
}


@dataclass(frozen=True)
class Storage:
    """Where a tensor's bytes lie: a record of the archive."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class View:
    """A tensor that is not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Record:
    """An object of a class of the program: its state, and nothing that runs."""

    name = ""
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Reader(pickle.Unpickler):
    """Unpickles ``data.pkl`` into records, views and plain data."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (Record,), {"name": f"{module}.{name}"})
        if module == "torch" and name.endswith("Storage"):
            return STORAGES[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, stride, *_: View(storage, offset, tuple(shape), tuple(stride))
        if module == "torch.jit._pickle":
            return lambda value, *_: value
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        _, dtype, key, *_ = pid
        return Storage(str(key), dtype)


def torchscript_entries(path: Path) -> dict[str, Entry]:
    """Parameters and buffers of a TorchScript archive, under the names the module's state dict has.

    Raises:
        PcqError: the weights are constants without names (a frozen module), or inside packed objects.
        CheckFailed: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            root = next(name for name in names if name.endswith("/data.pkl")).removesuffix("data.pkl")
            top = Reader(io.BytesIO(archive.read(root + "data.pkl"))).load()
            declared = dict(declarations(archive, root + "code/"))
    except Exception as error:  # a damaged pickle raises anything at all
        what = f"the TorchScript archive is damaged, or of a kind pcq does not know ({error})"
        raise CheckFailed(what, where=str(path), todo="Save model.state_dict() instead") from error
    found: dict[str, Entry] = {}
    packed: list[str] = []
    for name, value in walk(top, declared, ""):
        if isinstance(value, View):
            member = f"{root}data/{value.storage.key}"
            identity = value if math.prod(value.shape) else None
            storage = value.storage
            read = partial(read_strided, path, member, storage.dtype, value.shape, value.stride, value.offset)
            dtype = str(value.storage.dtype).removeprefix("torch.")
            found[name] = Entry(value.shape, dtype, read, identity)
        else:
            packed.append(name)
    todo = "Give the state dict of the original model: torch.save(model.state_dict(), 'weights.pt')"
    if packed:
        what = f"a TorchScript archive whose '{packed[0]}' is packed (quantized already?)"
        raise PcqError(what, where=str(path), todo=todo)
    if not found:
        what = "a frozen TorchScript archive: its weights are constants without names"
        raise PcqError(what, where=str(path), todo=todo)
    return found


def declarations(archive: zipfile.ZipFile, code: str) -> Iterator[tuple[str, set[str]]]:
    """Class of the program -> names of its parameters and buffers."""
    for member in archive.namelist():
        if member.startswith(code) and member.endswith(".py"):
            module = member.removeprefix(code).removesuffix(".py").replace("/", ".")
            for name, body in CLASS.findall(archive.read(member).decode()):
                listed = "".join(DECLARED.findall(body))
                yield f"{module}.{name}", set(re.findall(r'"([^"]+)"', listed))


def walk(record: Any, declared: Mapping[str, set[str]], prefix: str) -> Iterator[tuple[str, View | None]]:
    """Name -> tensor, module by module; None for a module whose state is not a dict of attributes."""
    if not isinstance(record.state, Mapping):
        yield prefix.removesuffix("."), None
        return
    names = declared.get(record.name, set())
    for key, value in record.state.items():
        if isinstance(value, View) and key in names:
            yield prefix + key, value
        elif isinstance(value, Record):
            yield from walk(value, declared, f"{prefix}{key}.")
