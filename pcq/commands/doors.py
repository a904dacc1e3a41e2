"""Other ways out of an artifact: a float state dict, a folder for compressed-tensors."""

import errno
import json
import os
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pcq import checkpoint
from pcq.atomic import room, unwritable
from pcq.checkpoint import compressed
from pcq.commands.networks import load_network
from pcq.errors import CheckFailed, PcqError
from pcq.progress import Progress, silent

WRITTEN = b'{\n "quantization_config": {\n  "quant_method": "compressed-tensors"'
"""How ``config.json`` begins in a folder of :func:`export_compressed`, and in no model's own."""
Door = Literal["state-dict", "pt2", "compressed-tensors"]


@dataclass(frozen=True)
class DoorResult:
    """What was written.

    Attributes:
        path: the file, or the folder.
        artifact: what it was made from.
        door: which of the forms.
        tensors: how many there are, of those ``packed`` with fewer bits.
        kept: quantized weights that are floats there, and why.
        nbytes: on disk.
        proof: what was checked, in words.
    """

    path: Path
    artifact: Path
    door: Door
    tensors: int
    packed: int
    kept: tuple[tuple[str, str], ...]
    nbytes: int
    proof: str


def export_state_dict(artifact: str | Path, out: str | Path | None = None, *, force: bool = False) -> DoorResult:
    """Write the dequantized network as a plain ``.safetensors`` state dict, for any trainer or library.

    Every name is there, tied ones too, each tensor in the dtype it had before.

    Args:
        artifact: a file that ``quantize`` or ``finetune`` wrote.
        out: the file; default: the artifact's name with ``.float.safetensors``.
        force: replace a file at ``out`` that pcq did not write.

    Raises:
        PcqError: the artifact is not usable, or nothing can be written there.
        CheckFailed: what was written reads differently.
    """
    source, stored = opened(artifact)
    path = Path(out) if out is not None else checkpoint.beside(source, ".float.safetensors")
    checkpoint.refuse_overwrite(path, ".safetensors", inputs=[source], force=force)
    state = {name: tensor.contiguous().clone() for name, tensor in stored.state_dict().items()}
    with checkpoint.atomic(path) as draft:
        save_file(state, draft, metadata={"format": "pt"})
        with safe_open(draft, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dictionary)
                if not torch.equal(file.get_tensor(name), state[name]):
                    raise CheckFailed("was written and reads differently", where=name)
    proof = "every tensor was read back and is the dequantized one, bit by bit"
    rounded = [name for name, weight in stored.quantized.items() if not torch.equal(weight.dequantize(), state[name])]
    if rounded:
        kinds = " and ".join(sorted({stored.dtypes[name] for name in rounded}))
        proof += f", where it is in the checkpoint's {kinds} rounded to it ({len(rounded)} quantized weights)"
    return DoorResult(path, source, "state-dict", len(state), 0, (), path.stat().st_size, proof)


def export_compressed(
    artifact: str | Path,
    out: str | Path | None = None,
    *,
    arch: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> DoorResult:
    """Write a folder in the format ``pack-quantized`` of compressed-tensors: ``model.safetensors`` and ``config.json``.

    Weights of Linear and Embedding whose levels are integers times a scale are packed (``pcq.checkpoint.compressed``);
    all else is float, and said.

    Args:
        artifact: a file that ``quantize`` or ``finetune`` wrote.
        out: the folder; default: the artifact's name with ``.compressed``.
        arch: the architecture; known, it tells a Linear from other matrices.
        force: replace a folder at ``out`` that pcq did not write; never one with other files.
        progress: called for each weight.

    Raises:
        PcqError: the artifact is not usable, nothing in it fits the format, or nothing can be written there.
        CheckFailed: what was packed unpacks differently.
    """
    source, stored = opened(artifact)
    path = Path(out) if out is not None else checkpoint.beside(source, ".compressed")
    refuse_folder(path, force)
    kinds = _kinds(stored, source, arch)
    packed: dict[str, compressed.Integers] = {}
    kept: list[tuple[str, str]] = []
    tensors = {name: tensor.contiguous().clone() for name, tensor in stored.state_dict().items()}
    count = len(tensors)
    for done, (name, weight) in enumerate(stored.quantized.items()):
        progress(f"packing {name}", done, len(stored.quantized))
        found = compressed.integers(weight)
        if not isinstance(found, str) and not name.endswith(".weight"):
            found = "it is not called `.weight`"
        if not isinstance(found, str) and kinds.get(name, "Linear") not in ("Linear", "Embedding"):
            found = f"it is the weight of a {kinds[name]}"
        if isinstance(found, str):
            kept.append((name, found))
            continue
        if not torch.equal(compressed.unpack(compressed.pack(found), found.bits, found.q.shape[1]), found.q):
            raise CheckFailed("was packed and unpacks differently", where=name)
        for alias in (name, *(other for other, owner in stored.tied.items() if owner == name)):
            packed[alias] = found
            del tensors[alias]
            tensors |= {key: tensor.clone() for key, tensor in compressed.tensors(alias, found).items()}
    if not packed:
        raise PcqError(f"none of its weights fits the format ({kept[0][0]}: {kept[0][1]})", where=str(source),
                       allowed="Linear and Embedding weights of evenly spaced levels around zero")  # fmt: skip
    floats = [name.removesuffix(".weight") for name, _ in kept]
    described = compressed.config(packed, floats)
    _write_folder(path, tensors, json.dumps(described, indent=1) + "\n")
    nbytes = sum(file.stat().st_size for file in path.iterdir())
    proof = "unpacked again, every packed weight is the dequantized one, bit by bit"
    return DoorResult(path, source, "compressed-tensors", count, len(packed), tuple(kept), nbytes, proof)


def refuse_folder(path: Path, force: bool) -> None:
    """Let pass a folder that is new, was written by :func:`export_compressed`, or may be replaced by ``force``.

    Raises:
        PcqError: a file of that name, a folder of somebody else's, or one with other files, which are never deleted;
            or there is no folder to make it in.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise unwritable(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), path)
        return
    if not path.is_dir():
        raise PcqError("cannot be written: it is a file", where=str(path), todo="Name a folder")
    if others := sorted(file.name for file in path.iterdir() if file.name not in ("config.json", "model.safetensors")):
        what = f"there is a folder already, with other files: {', '.join(others[:4])}"
        raise PcqError(what, where=str(path), todo="Give another name")
    config = path / "config.json"
    if not force and not (config.is_file() and config.read_bytes().startswith(WRITTEN)):
        todo = "Give another name, or replace it with --force"
        raise PcqError("there is a folder already, and pcq did not write it", where=str(path), todo=todo)


def _write_folder(path: Path, tensors: dict[str, Tensor], described: str) -> None:
    """The folder appears whole or not at all; a symbolic link is written through."""
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.partial")
    try:
        try:
            draft.mkdir(mode=0o700)
            with room(draft.parent):
                save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
            (draft / "config.json").write_text(described)
            mode = stat.S_IMODE((draft / "config.json").stat().st_mode)
            (draft / "model.safetensors").chmod(mode)  # safetensors lets only its owner read it
            draft.chmod(mode | (mode & 0o444) >> 2)
            if target.exists():
                shutil.rmtree(target)
            os.replace(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise unwritable(error, path) from error


def _kinds(stored: checkpoint.Artifact, source: Path, arch: str | None) -> dict[str, str]:
    """Parameter -> the class of its module; empty where the architecture is not known."""
    if arch is None and stored.arch is None and stored.program is None:
        return {}
    module = load_network(stored, source, arch).module
    return {f"{name}.weight": type(child).__name__ for name, child in module.named_modules()}


def opened(artifact: str | Path) -> tuple[Path, checkpoint.Artifact]:
    """Where it is, and what is in it.

    Raises:
        PcqError: it is no artifact.
    """
    source = Path(artifact)
    if source.is_file() and not checkpoint.is_artifact(source):
        raise PcqError("this is not an artifact of pcq", where=str(source), todo="Make one first with `pcq quantize`")
    return source, checkpoint.read_artifact(source)
