"""What kind of thing a path is, by its content; then the reader for it, or one sentence why not."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pcq.errors import PcqError
from pcq.sources import pickles, pt2, safetensors
from pcq.sources.archive import members
from pcq.sources.arrays import npz_entries
from pcq.sources.pickles import Asked
from pcq.sources.source import Source, part, put_together, strip_prefixes, unreadable
from pcq.sources.torchscript import torchscript_entries
from pcq.sources.wrappers import NoSuchState

ARTIFACT_KEY = "pcq"
"""The metadata key that marks a safetensors file as an artifact."""
INDEX = ".index.json"
IN_FOLDERS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""What a folder's weights are called, best first."""
WEIGHT_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt2"}
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""What ``torch.save`` wrote first before it wrote zip files."""
FOREIGN = [
    (0, b"\x89HDF", "an HDF5 file (Keras?)"),
    (0, b"\x93NUMPY", "a single NumPy array without a name"),
    (0, b"GGUF", "a GGUF file, quantized already"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x1f\x8b", "compressed with gzip"),
    (0, b"BZh", "compressed with bzip2"),
    (0, b"\xfd7zXZ", "compressed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (257, b"ustar", "a tar archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
]
"""Offset, bytes there, and what that is."""
SAVE_STATE = "Save the network's weights as a state dict: torch.save(model.state_dict(), 'weights.pt')"


def open_source(
    path: str | Path, *, allow_globals: Sequence[str] = (), unsafe_pickle: bool = False, key: str | None = None
) -> Source:
    """Open what a user handed in. No tensor is read, and nothing in the file is executed.

    Args:
        path: a checkpoint file, an index of shards, or a folder that holds one of them.
        allow_globals: ``package.Class`` names that a pickle may load.
        unsafe_pickle: load a pickle that can execute code. Only for files you trust.
        key: which state dict to open where a checkpoint holds several, such as ``model_ema``; or, where it holds one,
            the part of it whose names begin so, such as ``ema_model``.

    Raises:
        PcqError: it is not a checkpoint that can be quantized; the message says what it is and what to do.
        CheckFailed: it is one, but damaged.
    """
    path, asked = Path(path), Asked(tuple(allow_globals), unsafe_pickle, key)
    try:
        try:
            source = open_any(path, asked)
        except NoSuchState as error:
            source = part_of(path, asked, error)
    except OSError as error:
        raise unreadable(path, error) from error
    entries, notes = source.entries, list(source.notes)
    if not source.make_module:
        stripped, said = strip_prefixes(entries)
        entries, told = put_together(stripped, source.by_name)
        notes += said + told
    if not entries:
        raise PcqError("it holds no tensors", where=str(path), todo="Give a checkpoint with the network's weights")
    files = source.files or (source.path,)
    return replace(source, path=path, entries=entries, notes=tuple(notes), files=files)


def open_any(path: Path, asked: Asked) -> Source:
    return open_folder(path, asked) if path.is_dir() else open_file(path, asked)


def part_of(path: Path, asked: Asked, error: NoSuchState) -> Source:
    """Where a checkpoint has one state dict, the part of it that ``asked.key`` names.

    Raises:
        NoSuchState: it has several, or no names begin so.
    """
    if not error.several:
        source = open_any(path, replace(asked, key=None))
        found = part(source, f"{asked.key}.")
        if found.entries and source.make_module is None:
            return found
    raise error


def open_folder(folder: Path, asked: Asked) -> Source:
    """The one checkpoint in a folder (Hugging Face's layout, or any folder with a single weight file)."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    if "saved_model.pb" in names:
        raise PcqError("it is a TensorFlow SavedModel", where=str(folder), todo=SAVE_STATE)
    standard = [name for name in IN_FOLDERS if name in names]
    others = [name for name in names if name.endswith(INDEX)] or [
        name for name in names if Path(name).suffix in WEIGHT_SUFFIXES
    ]
    chosen = standard[:1] or others
    if not chosen:
        allowed = ", ".join(IN_FOLDERS) + ", or a single checkpoint"
        raise PcqError("it is a folder without a checkpoint", where=str(folder), allowed=allowed)
    if len(chosen) > 1:
        what = f"it is a folder with several checkpoints: {', '.join(chosen)}"
        raise PcqError(what, where=str(folder), todo="Name the file")
    source = open_file(folder / chosen[0], asked)
    notes = [f"Opened {chosen[0]}" + (f"; beside it: {', '.join(standard[1:])}." if standard[1:] else ".")]
    return replace(source, notes=(*notes, *source.notes), arch=source.arch or timm_arch(folder / "config.json"))


def timm_arch(config: Path) -> str | None:
    """The architecture that timm writes into its folders' ``config.json``."""
    with contextlib.suppress(OSError, ValueError):
        loaded: Any = json.loads(config.read_bytes())
        if isinstance(loaded, dict) and "pretrained_cfg" in loaded and isinstance(loaded.get("architecture"), str):
            classes = loaded.get("num_classes")
            return f"timm:{loaded['architecture']}" + (f"?num_classes={classes}" if isinstance(classes, int) else "")
    return None


def open_file(path: Path, asked: Asked) -> Source:
    """One file, by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise PcqError("the file is empty", where=str(path), todo="Fetch or write it again")
    shard = safetensors.SHARD.fullmatch(path.name)
    if shard and int(shard[2]) > 1:
        todo = f"Give the index, {shard[1]}{shard[3]}{INDEX}, or the folder"
        raise PcqError(f"it is one of {int(shard[2])} shards of a checkpoint", where=str(path), todo=todo)
    refuse_foreign(path, head)
    names = members(path) if head.startswith(b"PK") else []
    inner = {name.partition("/")[2] for name in names}
    if head.startswith(LEGACY) or ("data.pkl" in inner and "constants.pkl" not in inner):
        return from_pickle(path, asked)
    if asked.key is not None:
        raise NoSuchState(asked.key, path)
    if path.name.endswith(".json"):
        return from_index(path, asked)
    if names:
        return from_zip(path, names, inner)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return from_safetensors(path)
    kind = "a Python pickle that torch.save did not write" if head[:1] == b"\x80" else "not a checkpoint pcq knows"
    raise PcqError(f"it is {kind}", where=str(path), todo=SAVE_STATE)


def from_pickle(path: Path, asked: Asked) -> Source:
    """A file of ``torch.save``."""
    opened = pickles.open_pickle(path, asked)
    module = opened.module
    return Source(path, opened.entries, tuple(opened.notes), make_module=None if module is None else lambda: module)


def from_safetensors(path: Path) -> Source:
    """A safetensors file that is not one of ours."""
    entries, metadata = safetensors.entries(path)
    if ARTIFACT_KEY in metadata:
        todo = "Give the float checkpoint it was made from; an artifact can be inspected, evaluated and exported"
        raise PcqError("it is an artifact of pcq: its weights are quantized already", where=str(path), todo=todo)
    return Source(path, entries, by_name=True)


def from_index(path: Path, asked: Asked) -> Source:
    """The index of a sharded checkpoint, of either kind."""
    places = set(safetensors.read_index(path).values())
    by_name = all(shard.suffix == ".safetensors" for shard in places)
    entries = safetensors.sharded_entries(path) if by_name else pickles.sharded_entries(path, asked)
    notes = (f"Opened {len(entries)} tensors in {len(places)} shards.",)
    return Source(path, entries, notes, files=(path, *sorted(places)), by_name=by_name)


def from_zip(path: Path, names: Sequence[str], inner: set[str]) -> Source:
    """A zip that is no ``torch.save`` file: ``.pt2``, TorchScript, NumPy arrays, Keras, or something else."""
    if "archive_format" in inner or any(name.endswith("serialized_state_dict.pt") for name in names):
        entries, program, notes = pt2.pt2_entries(path)
        source = Source(path, entries, tuple(notes), program=program)
        if program is None:
            return source
        if source.precision != "float32":
            source = source.noted(
                f"The program computes in {source.precision}; ONNX, calibration, analysis and training need float32: "
                "export it again from model.float(). One-shot levels, --pt2 and --state-dict do without."
            )
        return replace(source, make_module=lambda: pt2.runnable(pt2.revive(program, source.state_dict())))
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        found = torchscript_entries(path)
        return Source(path, found, ("Read the parameters and buffers of a TorchScript archive without running it.",))
    if all(name.endswith(".npy") for name in names):
        return Source(path, npz_entries(path))
    kind = "a Keras model" if "model.weights.h5" in names else "a zip archive without a PyTorch checkpoint"
    raise PcqError(f"it is {kind}", where=str(path), todo=SAVE_STATE)


def unfetched(path: Path, head: bytes) -> PcqError | None:
    """What to say where something else was downloaded in the file's place."""
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        todo = "Run `git lfs pull` where it came from"
        return PcqError("it is a git-lfs pointer, not the file itself", where=str(path), todo=todo)
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        todo = "The download answered with a page: fetch it again, perhaps logged in"
        return PcqError("it is a web page, not the file itself", where=str(path), todo=todo)
    return None


def refuse_foreign(path: Path, head: bytes) -> None:
    """One sentence for each kind of file that is no checkpoint, or not one for pcq.

    Raises:
        PcqError: it is one of them.
    """
    if path.suffix == ".onnx":
        todo = (
            "`pcq quantize`, or pcq.commands.quantize_onnx, packs ONNX models; for anything else save the network's "
            "weights as a state dict: torch.save(model.state_dict(), 'weights.pt')"
        )
        raise PcqError("it is an ONNX file, and this takes PyTorch checkpoints", where=str(path), todo=todo)
    if (error := unfetched(path, head)) is not None:
        raise error
    for offset, magic, kind in FOREIGN:
        if head[offset:].startswith(magic):
            todo = "Unpack it first" if "compressed" in kind or "archive" in kind else SAVE_STATE
            raise PcqError(f"it is {kind}", where=str(path), todo=todo)
    if path.suffix in (".pb", ".h5", ".tflite", ".index") or ".data-0000" in path.name:
        raise PcqError("it is a TensorFlow file", where=str(path), todo=SAVE_STATE)
