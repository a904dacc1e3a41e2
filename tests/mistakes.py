"""The mistakes people make, each as a command line to run in a folder of its own: used by test_mistakes.py.

``python -m tests.mistakes`` prints docs/mistakes.md: what pcq answers to each of them.
"""

import io
import os
import pickle
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from pcq import cli
from pcq.demo import HERE

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
DIGITS = HERE / "digits-resnet8.safetensors"


class Hostile:
    """A pickle that would create a file if anybody executed it."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


@dataclass(frozen=True)
class Mistake:
    """``prepare`` sets the folder up; ``command``, run in it, must end with ``code`` and leave nothing new there.

    What ``happens`` meanwhile happens to a process of its own: no file of it may grow beyond 10,000 bytes, or it gets
    a signal as soon as its draft is there.
    """

    what: str
    command: str
    prepare: Callable[[], None]
    says: str
    code: int = 2
    happens: Literal["", "the disk is full", "Ctrl-C", "kill"] = ""


def net() -> dict[str, torch.Tensor]:
    """A small state dict with two convolutions, BatchNorm and a linear layer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 5))
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def saved(change: Callable[[dict[str, torch.Tensor]], object] = lambda state: None) -> Callable[[], None]:
    """Writes model.pt after ``change``, which may return another object to save."""

    def prepare() -> None:
        state = net()
        changed = change(state)
        torch.save(state if changed is None else changed, "model.pt")

    return prepare


def big() -> None:
    """Writes model.pt with weights that take some time: 64 tensors of a quarter million each."""
    torch.manual_seed(0)
    torch.save({f"{i}.weight": torch.randn(512, 512) for i in range(64)}, "model.pt")


def written(name: str, content: bytes | str) -> Callable[[], None]:
    """Writes one file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(name).write_bytes(data) and None


def recipe(text: str) -> Callable[[], None]:
    """Writes model.pt and my.yaml."""

    def prepare() -> None:
        torch.save(net(), "model.pt")
        Path("my.yaml").write_text(text)

    return prepare


def cut(name: str, make: Callable[[], None], share: float) -> Callable[[], None]:
    """Truncates the file that ``make`` wrote."""

    def prepare() -> None:
        make()
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[: int(len(data) * share)])

    return prepare


def artifact(change: Callable[[bytearray], object] = lambda data: None) -> Callable[[], None]:
    """Writes net.safetensors, an artifact of the digits network, and changes its bytes."""

    def prepare() -> None:
        quietly(["quantize", str(DIGITS), "-r", "ternary", "--arch", ARCH, "-o", "net.safetensors"])
        data = bytearray(Path("net.safetensors").read_bytes())
        changed = change(data)
        Path("net.safetensors").write_bytes(changed if isinstance(changed, bytes | bytearray) else data)

    return prepare


def header_edit(old: bytes, new: bytes) -> Callable[[bytearray], bytearray]:
    """Replaces bytes in a safetensors header, keeping its length field right."""

    def change(data: bytearray) -> bytearray:
        (length,) = struct.unpack("<Q", data[:8])
        header = bytes(data[8 : 8 + length])
        assert old in header, old
        edited = header.replace(old, new, 1)
        return bytearray(struct.pack("<Q", len(edited)) + edited + data[8 + length :])

    return change


def spoil(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Puts one value into one tensor."""

    def change(state: dict[str, torch.Tensor]) -> None:
        state[name].view(-1)[3] = value

    return change


def shards() -> None:
    """A sharded checkpoint whose second shard is missing."""
    state = net()
    names = list(state)
    save_file({name: state[name] for name in names[:2]}, "model-00001-of-00002.safetensors")
    places = ", ".join(f'"{name}": "model-0000{1 if name in names[:2] else 2}-of-00002.safetensors"' for name in names)
    Path("model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {' + places + "}}")


def both(*steps: Callable[[], None]) -> Callable[[], None]:
    """One preparation after the other."""

    def prepare() -> None:
        for step in steps:
            step()

    return prepare


def small_onnx() -> None:
    """``net.onnx``: a 1x1 convolution of images of 3x8x8."""
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")
    images, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size, 8, 8])
                   for name, size in (("x", 3), ("y", 4)))  # fmt: skip
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", [images], [out], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "net.onnx")


def nothing() -> None:
    """An empty folder."""


RULE = "pcq: 1\nrules:\n"
ALL = '  - match: "*"\n    levels: ternary\n'
Q = "quantize model.pt -r ternary"
MY = "quantize model.pt -r my.yaml"

MISTAKES = (
    # --- the model
    Mistake("no such file", Q, nothing, r"model\.pt"),
    Mistake("a misspelt file", "quantize modle.pt -r ternary", saved(), r"Did you mean '?model\.pt"),
    Mistake("an empty file", Q, written("model.pt", b""), "empty"),
    Mistake("a truncated checkpoint", Q, cut("model.pt", saved(), 0.6), r"model\.pt.*(truncated|damaged|cut)", 3),
    Mistake("a text file named .pt", Q, written("model.pt", "hello\n"), r"model\.pt"),
    Mistake(
        "a web page instead of a checkpoint", Q, written("model.pt", "<!DOCTYPE html><html></html>"), "(?i)html|web"
    ),
    Mistake(
        "a git-lfs pointer",
        Q,
        written("model.pt", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "(?i)lfs",
    ),
    Mistake(
        "a hostile pickle",
        Q,
        saved(lambda state: {"state_dict": state, "extra": Hostile()}),
        r"posix\.system. Nothing was run",
    ),
    Mistake("a pickled module", Q, saved(lambda state: nn.Linear(4, 4)), r"Linear.*--allow-global"),
    Mistake(
        "a module of an unknown package",
        "quantize model.pt -r ternary --allow-global no_such.Net",
        saved(lambda state: nn.Linear(4, 4)),
        r"no_such",
    ),
    Mistake("no tensors inside", Q, saved(lambda state: {"epoch": 3, "name": "x"}), "(?i)no tensors|state dict"),
    Mistake("an old-style NumPy pickle", Q, written("model.pt", pickle.dumps({"w": np.ones(3)})), r"model\.pt"),
    Mistake("NaN in a weight", Q, saved(spoil("0.weight", float("nan"))), r"0\.weight.*(?i:nan)"),
    Mistake("infinity in a weight", Q, saved(spoil("3.weight", float("inf"))), r"3\.weight.*(?i:inf)"),
    Mistake("a missing shard", "quantize model.safetensors.index.json -r w8", shards, "model-00002-of-00002", 2),
    Mistake(
        "a damaged safetensors header",
        "quantize m.safetensors -r w8",
        written("m.safetensors", b"\xff" * 64),
        "m.safetensors",
        3,
    ),
    Mistake(
        "a cut safetensors file",
        "quantize m.safetensors -r w8",
        cut("m.safetensors", lambda: save_file(net(), "m.safetensors"), 0.7),
        r"m\.safetensors",
        3,
    ),
    Mistake(
        "a damaged ONNX model", "quantize model.onnx -r w8", written("model.onnx", b"\x08\x07"), "not an ONNX model"
    ),
    Mistake(
        "an ONNX option for a checkpoint", Q + " --detect", saved(), "about ONNX models, and a checkpoint was given"
    ),
    Mistake("no recipe", "quantize m.pt", saved(), "a recipe is needed"),
    Mistake("an artifact quantized again", "quantize net.safetensors -r w8", artifact(), "(?i)artifact|already"),
    Mistake("a folder without a checkpoint", "quantize . -r w8", nothing, "folder without a checkpoint"),
    # --- the architecture
    Mistake("an unknown architecture", Q + " --arch torchvision:resnet81", saved(), r"Did you mean 'resnet"),
    Mistake("an architecture of another kind", Q + " --arch resnet18", saved(), r"torchvision:"),
    Mistake(
        "the wrong architecture",
        f"quantize {DIGITS} -r w8 -o x.safetensors --arch torchvision:resnet18",
        nothing,
        "(?i)missing|does not fit|differ",
    ),
    Mistake(
        "a function that is not there",
        Q + " --arch net.py:build",
        both(saved(), written("net.py", "x = 1\n")),
        r"no '?build",
    ),
    Mistake(
        "a function that fails",
        Q + " --arch net.py:build",
        both(saved(), written("net.py", "def build():\n    raise ValueError('no weights today')\n")),
        "no weights today",
    ),
    Mistake(
        "a function that returns no network",
        Q + " --arch net.py:build",
        both(saved(), written("net.py", "def build():\n    return 3\n")),
        r"int",
    ),
    # --- the recipe
    Mistake("an unknown recipe", "quantize model.pt -r ternray", saved(), r"Did you mean 'ternary"),
    Mistake(
        "an unknown key",
        MY,
        recipe(RULE + '  - match: "*"\n    level: ternary\n'),
        r"my\.yaml:4: .*Did you mean 'levels'",
    ),
    Mistake(
        "unknown levels",
        MY,
        recipe(RULE + '  - match: "*"\n    levels: ternery\n'),
        r"my\.yaml:4: .*Did you mean 'ternary'",
    ),
    Mistake(
        "too many bits", MY, recipe(RULE + '  - match: "*"\n    levels: {kind: uniform, bits: 9}\n'), r"my\.yaml:4: .*9"
    ),
    Mistake(
        "a quoted number",
        MY,
        recipe(RULE + '  - match: "*"\n    levels: {kind: uniform, bits: "4"}\n'),
        r"my\.yaml:4: ",
    ),
    Mistake(
        "yes instead of true",
        MY,
        recipe(RULE + '  - match: "*"\n    levels: ternary\n    optional: yes\n'),
        r"my\.yaml:5: .*true",
    ),
    Mistake(
        "a leading zero", MY, recipe(RULE + '  - match: "*"\n    levels: {kind: uniform, bits: 04}\n'), r"my\.yaml:4: "
    ),
    Mistake("a key twice", MY, recipe(RULE + ALL + "    levels: binary\n"), r"my\.yaml:5: .*levels"),
    Mistake("a tab", MY, recipe("pcq: 1\nrules:\n\t- match: '*'\n"), r"my\.yaml:3"),
    Mistake("an empty recipe", MY, recipe(""), r"my\.yaml: there is nothing in it"),
    Mistake(
        "a rule that matches nothing", MY, recipe(RULE + "  - match: layer9.*\n    levels: binary\n" + ALL), r"layer9"
    ),
    Mistake(
        "a rule that never gets its turn",
        MY,
        recipe(RULE + ALL + "  - match: last\n    levels: binary\n"),
        r"(?i)rule 1|line 3|earlier",
    ),
    Mistake(
        "a recipe for more than two layers",
        "quantize two.pt -r ternary",
        lambda: torch.save({"0.weight": torch.randn(8, 8), "1.weight": torch.randn(4, 8)}, "two.pt"),
        r"Take the recipe `ternary-all`",
    ),
    Mistake(
        "several mistakes at once",
        MY,
        recipe("pcq: 1\nrule: []\nrules:\n  - match: '*'\n    levels: tenary\n"),
        r"(?s)my\.yaml:2: .*my\.yaml:5: ",
    ),
    Mistake("a bad override", Q + " --set rules.0.levels.bitz=4", saved(), r"bitz"),
    Mistake("an override without a value", Q + " --set rules.0.levels", saved(), r"="),
    # --- the output
    Mistake("an output folder that is not there", Q + " -o no/where.safetensors", saved(), "no"),
    Mistake(
        "a foreign file in the way",
        Q + " -o mine.txt",
        both(saved(), written("mine.txt", "dear diary")),
        r"mine\.txt.*--force",
    ),
    Mistake(
        "the input as the output", "quantize model.pt -r ternary -o model.pt --force", saved(), r"model\.pt.*input"
    ),
    Mistake("an output that is a folder", Q + " -o .", saved(), r"\. is a folder|folder"),
    Mistake("a place where nobody may write", Q + " -o /proc/x.safetensors", saved(), "its folder takes no files"),
    Mistake("a full disk", Q, big, "no room left", happens="the disk is full"),
    Mistake(
        "Ctrl-C while it writes",
        "quantize model.pt -r w8",
        big,
        "interrupted; no output file was changed",
        130,
        happens="Ctrl-C",
    ),
    Mistake(
        "a kill while it writes",
        "quantize model.pt -r w8",
        big,
        "interrupted; no output file was changed",
        143,
        happens="kill",
    ),
    # --- artifacts and ONNX
    Mistake("a float checkpoint to export", "export model.pt", saved(), "pcq quantize"),
    Mistake(
        "no architecture recorded",
        "export net.safetensors",
        both(saved(), lambda: quietly(["quantize", "model.pt", "-r", "binary", "-o", "net.safetensors"])),
        "--arch",
    ),
    Mistake("an unknown input shape", "export net.safetensors", artifact(), "--input 3x224x224"),
    Mistake("a shape that is none", "export net.safetensors --input 1x8xx8", artifact(), "1x8xx8"),
    Mistake("a shape too large", "export net.safetensors --input 99999999999x8", artifact(), "too large"),
    Mistake("ONNX without its suffix", "export net.safetensors -o v2 --input 1x8x8", artifact(), r"end in \.onnx"),
    Mistake("an input that does not fit", "export net.safetensors --input 3x8x8", artifact(), "(?i)input|channels"),
    Mistake("a runtime too old", "export net.safetensors --input 1x8x8 --target-ort 1.4", artifact(), r"1\.4"),
    Mistake(
        "a layout that the runtime cannot run",
        "export net.safetensors --input 1x8x8 --mode native --target-ort 1.20",
        artifact(),
        "Give --target-ort 1.23",
    ),
    Mistake("a file named twice", "export net.safetensors a.onnx -o b.onnx", artifact(), "one of them"),
    Mistake("a mode and an aim", "export net.safetensors --mode native --optimize ram", artifact(), "one of them"),
    Mistake(
        "an artifact cut short",
        "export net.safetensors --input 1x8x8",
        artifact(lambda data: data[:-100]),
        "net.safetensors",
        3,
    ),
    Mistake(
        "an artifact from the future",
        "export net.safetensors --input 1x8x8",
        artifact(header_edit(b'format\\": 1', b'format\\": 7')),
        r"7",
    ),
    Mistake("several forms of export at once", "export net.safetensors --pt2 --state-dict", nothing, "several forms"),
    Mistake(
        "a float checkpoint to export as a state dict",
        f"export {DIGITS} x.safetensors --state-dict",
        nothing,
        "not an artifact",
    ),
    Mistake("a file to measure that is not there", "bench net.onnx", nothing, "no such file"),
    Mistake("no rounds to measure", "bench net.onnx --rounds 0", nothing, "1 or more"),
    Mistake("an input that an ONNX file does not take", "bench net.onnx --input 1x8x8", small_onnx, "Allowed: x 3x8x8"),
    Mistake("a damaged ONNX file", "inspect net.onnx", written("net.onnx", b"\xff\xfe" * 40), r"net\.onnx"),
    # --- the data
    Mistake("unknown data", "eval net.safetensors --data digitz", artifact(), r"Did you mean 'digits'"),
    Mistake("data that is not there", "eval net.safetensors --data folder:photos", artifact(), r"photos"),
    Mistake(
        "data of another shape",
        "eval net.safetensors --data npz:x.npz",
        both(artifact(), lambda: np.savez("x.npz", x=np.zeros((4, 3, 8, 8), np.float32), y=np.zeros(4, np.int64))),
        r"(?i)shape|channels",
    ),
    # --- the command line
    Mistake("weights to share with nobody", "finetune model.pt -r ternary -d digits --shard", saved(), "torchrun"),
    Mistake("nothing to inspect", "inspect", nothing, "--prox"),
    Mistake("an unknown proximal map", "inspect --prox parc", nothing, "Did you mean 'parq'"),
    Mistake("levels that are none", "inspect --prox parq --levels 1", nothing, "two or more"),
    Mistake("levels too far away", "inspect --prox parq --levels -1e308,1e308", nothing, "up to 1e"),
)


def quietly(arguments: list[str]) -> tuple[int, str, str]:
    """Run pcq in this process: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.run(arguments)
    return code, out.getvalue(), err.getvalue()


def apart(mistake: Mistake) -> tuple[int, str]:
    """Run pcq in a process that something happens to: exit code, standard error."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells start background work with Ctrl-C ignored
        if mistake.happens == "the disk is full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    before = set(os.listdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "pcq", *mistake.command.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # Python 3.11 installs half a .pyc where a file cannot grow
    )
    if mistake.happens in ("Ctrl-C", "kill"):
        while process.poll() is None and not set(os.listdir()) - before:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT if mistake.happens == "Ctrl-C" else signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def answer(mistake: Mistake, folder: Path) -> tuple[int, str, set[str]]:
    """Prepare and run in ``folder``: exit code, message, and what is there that was not there before."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        mistake.prepare()
        before = set(os.listdir())
        if mistake.happens:
            code, err = apart(mistake)
        else:
            code, _, err = quietly(mistake.command.split())
        lines = [line for line in err.strip().splitlines() if line]
        start = next((i for i, line in enumerate(lines) if line.startswith("pcq: ")), 0)
        text = "\n".join(lines[start:]).replace(str(folder) + "/", "").replace(str(folder), ".")
        return code, text, set(os.listdir()) - before - {"__pycache__"}
    finally:
        os.chdir(here)


def document() -> str:
    """docs/mistakes.md."""
    lines = [
        "# Mistakes, and what pcq answers",
        "",
        "Made by `python -m tests.mistakes`; `tests/test_mistakes.py` runs every row. None leaves a file behind.",
        "",
        "| mistake | command | exit | answer |",
        "|---|---|---|---|",
    ]
    for mistake in MISTAKES:
        with tempfile.TemporaryDirectory() as folder:
            code, text, _ = answer(mistake, Path(folder).resolve())
        lines.append(row(mistake, code, text))
    return "\n".join(lines) + "\n"


def row(mistake: Mistake, code: int, text: str) -> str:
    """One row of docs/mistakes.md."""
    command = mistake.command.replace(str(DIGITS), DIGITS.name)
    shown = re.sub(r"\s*\n\s*", "<br>", text.replace(str(HERE) + "/", "")).replace("|", "\\|")
    shown = re.sub(r"\d{1,3}(,\d{3})+", "N", shown)  # sizes: version numbers make a header longer or shorter
    command += f" ({mistake.happens})" if mistake.happens else ""
    return f"| {mistake.what} | `pcq {command}` | {code} | {shown} |"


if __name__ == "__main__":
    sys.stdout.write(document())
