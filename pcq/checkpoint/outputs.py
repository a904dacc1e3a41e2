"""Which files may be written over."""

import os
from collections.abc import Sequence
from pathlib import Path

from pcq.atomic import refuse_unwritable
from pcq.checkpoint.reading import is_artifact
from pcq.errors import PcqError
from pcq.marks import onnx_marked, png_marked

FORMATS = {
    ".safetensors": "a safetensors file",
    ".onnx": "an ONNX file",
    ".pt2": "an exported program",
    ".png": "a PNG",
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), "a checkpoint of torch.save"),
}
"""What a file of such a name is to everybody who meets it."""


BY_NAME = (".onnx", ".png")
"""Kinds of files that are known by their names only."""


def beside(path: Path, suffix: str) -> Path:
    """``net.w4.safetensors -> net.w4.onnx``, and ``net.w4 -> net.w4.onnx``: what is no kind of file stays."""
    return path.with_suffix(suffix) if path.suffix.lower() in FORMATS else path.with_name(path.name + suffix)


def refuse_overwrite(path: str | Path, suffix: str, *, inputs: Sequence[Path] = (), force: bool = False) -> None:
    """Let pass an output that is new, was written by pcq, or may be replaced by ``force``; never an input.

    ``suffix`` is what its kind of file ends in. A name that says another kind is refused; one that says none too, where
    the kind is told by the name alone.

    Raises:
        PcqError: ``path`` is one of ``inputs``, a file of the user's, named like another kind of file, or in a place
            that takes no files.
    """
    path = Path(path)
    real = os.path.realpath(path)
    for given in inputs:
        inside = given.is_dir() and os.path.realpath(path.parent) == os.path.realpath(given)
        if real == os.path.realpath(given):
            raise PcqError("the output is the input", where=str(path), todo="Give another name")
        if inside and path.suffix == ".safetensors" and os.path.exists(path) and not is_artifact(path):
            raise PcqError("the output is a file of the input folder", where=str(path), todo="Give another name")
    said = path.suffix.lower()
    if said != suffix and (said in FORMATS or suffix in BY_NAME):
        named = f"the name is that of {FORMATS[said]}" if said in FORMATS else "the name does not say so"
        what = f"what is written here is {FORMATS[suffix]}, and {named}"
        raise PcqError(what, where=str(path), todo=f"Let it end in {suffix}")
    if os.path.isfile(path) and not force and not is_ours(path):
        todo = "Give another name, or replace it with --force"
        raise PcqError("there is a file already, and pcq did not write it", where=str(path), todo=todo)
    refuse_unwritable(path)


def is_ours(path: Path) -> bool:
    """Whether pcq wrote a file: an artifact, packed ONNX, a plot."""
    match path.suffix.lower():
        case ".onnx":
            return onnx_marked(path)
        case ".png":
            return png_marked(path)
    return is_artifact(path)
