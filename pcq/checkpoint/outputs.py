"""Which files may be written over."""

import os
from collections.abc import Sequence
from pathlib import Path

from pcq.checkpoint.reading import is_artifact
from pcq.errors import PcqError

FORMATS = {
    ".safetensors": "a safetensors file",
    ".onnx": "an ONNX file",
    ".pt2": "an exported program",
    ".png": "a PNG",
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), "a checkpoint of torch.save"),
}
"""What a file of such a name is to everybody who meets it."""


def refuse_overwrite(path: str | Path, suffix: str, *, inputs: Sequence[Path] = (), force: bool = False) -> None:
    """Let pass an output that is new, was written by pcq, or may be replaced by ``force``; never an input.

    ``suffix`` is what its kind of file ends in. A name that says another kind is refused, one that says none is not.

    Raises:
        PcqError: ``path`` is one of ``inputs``, a file of the user's, or named like another kind of file.
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
    if said != suffix and said in FORMATS:
        what = f"what is written here is {FORMATS[suffix]}, and the name is that of {FORMATS[said]}"
        raise PcqError(what, where=str(path), todo=f"Let it end in {suffix}")
    if os.path.isfile(path) and not force and not is_artifact(path) and not is_our_onnx(path):
        todo = "Give another name, or replace it with --force"
        raise PcqError("there is a file already, and pcq did not write it", where=str(path), todo=todo)


def is_our_onnx(path: Path) -> bool:
    """Whether an ONNX file carries our metadata, which stands at its end."""
    if path.suffix != ".onnx":
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        return b"pcq." in file.read()
