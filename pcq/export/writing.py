"""An ONNX file, with its external data if it needs any, appears whole and proved or not at all."""

import glob
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from pcq.atomic import room, unwritable
from pcq.errors import PcqError

EXTERNAL_ABOVE = 2_000_000_000
"""Bytes of initializers beyond which they go into a file of their own: protobuf ends at 2 GiB."""


@contextmanager
def draft(out: Path) -> Iterator[Path]:
    """A path of the same name in a new hidden folder beside ``out``; whatever happens, the folder goes.

    Raises:
        PcqError: nothing can be written there.
    """
    target = Path(os.path.realpath(out))
    if target.is_dir():
        raise PcqError("cannot be written: it is a folder", where=str(out), todo="Name a file")
    folder = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.partial")
    try:
        try:  # the folder is made inside, so that no signal can come between its making and its removal
            folder.mkdir(mode=0o700)
            with room(folder):
                yield folder / target.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise unwritable(error, out) from error


def save(model: ir.Model, path: Path, external_above: int = EXTERNAL_ABOVE) -> Path | None:
    """Write a draft; returns its external data, if the initializers take more than ``external_above`` bytes.

    External data is named after its content: so the renaming of the model alone puts a new pair in the place of an old
    one.
    """
    sizes = (
        0 if value.const_value is None else value.const_value.nbytes for value in model.graph.initializers.values()
    )
    if sum(sizes) <= external_above:
        ir.external_data.load_to_model(model)  # else it would be looked for beside the new file
        ir.save(model, path)
        return None
    first = path.with_name("data")
    ir.save(model, path, external_data=first.name)
    data = first.rename(path.with_name(f"{path.name}.{_digest(first)}.data"))
    proto = onnx.load_model(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data.name
    onnx.save_model(proto, path)
    return data


def own_data(path: Path) -> set[Path]:
    """Files beside a model that :func:`save` wrote as its data: named after it and after their own content."""
    named = {file: re.fullmatch(rf"{re.escape(path.name)}\.([0-9a-f]{{8}})\.data", file.name)
             for file in path.parent.glob(f"{glob.escape(path.name)}.*.data")}  # fmt: skip
    return {file for file, match in named.items() if match and file.is_file() and _digest(file) == match[1]}


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:8]


def commit(path: Path, data: Path | None, out: Path) -> Path | None:
    """Give a draft its name, its data first; then drop that of the file it replaces. Returns where the data is."""
    target = Path(os.path.realpath(out))
    placed = None if data is None else target.parent / data.name
    for file in (path, *([data] if data is not None else [])):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    if data is not None and placed is not None:
        os.replace(data, placed)
    os.replace(path, target)
    for old in own_data(target) - {placed}:
        old.unlink(missing_ok=True)
    return placed
