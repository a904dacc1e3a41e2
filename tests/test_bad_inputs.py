"""What can be wrong with a checkpoint: the exact sentence for each, its exit code, and nothing left behind.

``tests/mistakes.py`` does the same for whole command lines; here every form of input is gone through.
"""

import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pcq.checkpoint import make_header, quantize_source, write_artifact
from pcq.errors import CheckFailed, PcqError
from pcq.plan import Kept, Parameter, Plan, Quantized
from pcq.quantizers import Ternary
from pcq.rows import Rows
from pcq.sources import open_source

STATE_DICT = "Save the network's weights as a state dict: torch.save(model.state_dict(), 'weights.pt')."
AGAIN = "Fetch or write it again."
RECONSTRUCT = f"{np.ones(1).__reduce__()[0].__module__}._reconstruct"
ORIGINAL = "Give the state dict of the original model: torch.save(model.state_dict(), 'weights.pt')."


@dataclass(frozen=True)
class Bad:
    """``prepare`` writes into a folder; quantizing ``name`` in it says ``says`` behind the path."""

    what: str
    name: str
    prepare: Callable[[Path], object]
    says: str
    kind: type[PcqError] = PcqError


def weights(**change: Any) -> dict[str, Any]:
    return {"w": torch.ones(4, 3), "b": torch.zeros(4), **change}


def saved(loaded: object, **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(loaded, path, **options)


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def cut(prepare: Callable[[Path], object], keep: int) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        prepare(path)
        path.write_bytes(path.read_bytes()[:keep])

    return apply


def flipped(prepare: Callable[[Path], object], pattern: bytes) -> Callable[[Path], None]:
    """Changes one bit of the first ``pattern`` in the file."""

    def apply(path: Path) -> None:
        prepare(path)
        content = bytearray(path.read_bytes())
        content[content.index(pattern)] ^= 1
        path.write_bytes(content)

    return apply


def zipped(**records: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)

    return apply


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")


def scripted(frozen: bool) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        module = torch.jit.script(nn.Linear(3, 2).eval())
        (torch.jit.freeze(module) if frozen else module).save(path)

    return apply


def folder(*names: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.mkdir()
        for name in names:
            torch.save(weights(), path / name)

    return apply


def indexed(weight_map: object) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_text(json.dumps({"weight_map": weight_map}))
        save_file({"w": torch.ones(2)}, path.parent / "here.safetensors")

    return apply


def array_of_objects(path: Path) -> None:
    np.savez(path, w=np.array([{"a": 1}], dtype=object))


def artifact(path: Path) -> None:
    plan = Plan((Kept(Parameter("b", (2,), "float32", "bias"), "because"),))
    write_artifact(path, make_header(plan), [("b", torch.ones(2))])


def unreadable_type(path: Path) -> None:
    head = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"\0\0")


def spoilt(value: float) -> dict[str, Tensor]:
    state = weights()
    state["w"][1, 2] = value
    return state


BAD = [
    Bad("nothing there", "model.pt", lambda path: None, "there is no such file."),
    Bad("a typing error", "model.pt", lambda path: saved(weights())(path.with_name("models.pt")),
        "there is no such file. Did you mean 'models.pt'?"),
    Bad("no folder either", "no/model.pt", lambda path: None,
        "there is no such file. There is no folder {0}/no either."),
    Bad("an empty file", "model.pt", written(b""), f"the file is empty. {AGAIN}"),
    Bad("text", "model.pt", written(b"hello\n"), f"it is not a checkpoint pcq knows. {STATE_DICT}"),
    Bad("a page", "model.pt", written(b"\n <!DOCTYPE html>\n<html>"),
        "it is a web page, not the file itself. The download answered with a page: fetch it again, perhaps logged in."),
    Bad("a git-lfs pointer", "model.safetensors", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "it is a git-lfs pointer, not the file itself. Run `git lfs pull` where it came from."),
    Bad("a cut zip", "model.pt", cut(saved(weights()), 700),
        f"the file is damaged: it begins as a zip archive, but its end is missing (700 bytes). {AGAIN}", CheckFailed),
    Bad("a cut legacy file", "model.pt", cut(saved(weights(), _use_new_zipfile_serialization=False), -8),
        "the file is damaged: unexpected EOF, expected 8 more bytes. The file might be corrupted. "
        + AGAIN, CheckFailed),
    Bad("a cut safetensors file", "model.safetensors", cut(lambda path: save_file(weights(), path), 150),
        f"the file is damaged: it has 150 bytes where its header promises 184. {AGAIN}", CheckFailed),
    Bad("a header without its end", "model.safetensors", cut(lambda path: save_file(weights(), path), 50),
        f"the file is damaged: it ends at byte 50, inside its header of 112 bytes. {AGAIN}", CheckFailed),
    Bad("a flipped bit in a weight", "model.pt", flipped(saved(weights(w=torch.full((4, 3), 3.0))), b"\x40\x40"),
        f"the file is damaged: its record model/data/0 does not fit its checksum. {AGAIN}", CheckFailed),
    Bad("a tensor of an unknown type", "model.safetensors", unreadable_type,
        "'w' is of type F4, which pcq cannot read. Allowed: F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, "
        "BOOL, C64, F8_E4M3, F8_E5M2, F8_E4M3FNUZ, F8_E5M2FNUZ."),
    Bad("a pickle of something else", "model.pkl", written(pickle.dumps({"w": [1.0]})),
        f"it is a Python pickle that torch.save did not write. {STATE_DICT}"),
    Bad("one tensor", "model.pt", saved(torch.ones(3)),
        "it holds a single tensor without a name, not a state dict. Save model.state_dict() instead."),
    Bad("a list", "model.pt", saved([torch.ones(3)]),
        "it holds a list, not a state dict. Save model.state_dict() instead."),
    Bad("an empty dict", "model.pt", saved({}), "it holds nothing. Give a checkpoint with the network's weights."),
    Bad("no weights", "model.pt", saved({"epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}),
        "it holds no tensors, only epoch, optimizer. Give a checkpoint with the network's weights."),
    Bad("NumPy arrays for weights", "model.pt", saved({"w": np.ones((4, 3))}),
        "it holds NumPy arrays, not only tensors. If they are the weights, save them as tensors, "
        "torch.from_numpy(array) for each, or as an .npz: numpy.savez('weights.npz', **arrays). If they stand beside "
        f"the weights and you trust the file, add `--allow-global {RECONSTRUCT} --allow-global numpy.ndarray`"),
    Bad("an empty safetensors file", "model.safetensors", lambda path: save_file({}, path),
        "it holds no tensors. Give a checkpoint with the network's weights."),
    Bad("two networks", "model.pt", saved({"generator": weights(), "discriminator": weights()}),
        "several state dicts, and pcq does not guess: 'generator' (2 tensors), 'discriminator' (2 tensors). Choose "
        "one, such as --key generator."),
    Bad("a pickled module", "model.pt", saved(nn.Linear(3, 2)),
        "it holds Python objects, not only tensors: torch.nn.modules.linear.Linear. If you trust the file, add "
        "`--allow-global torch.nn.modules.linear.Linear` (these classes are then loaded, nothing else), or "
        "--unsafe-pickle (anything in the file can run). Safer: save model.state_dict() instead."),
    Bad("values are missing", "model.pt", saved(weights(w=torch.empty(4, 3, device="meta"))),
        "the tensor 'w' has a shape but no values (device meta). Load the values before saving."),
    Bad("a sparse tensor", "model.pt", saved(weights(w=torch.ones(4, 3).to_sparse())),
        "the tensor 'w' is sparse (torch.sparse_coo). Call .to_dense() on it and save again."),
    Bad("a quantized tensor", "model.pt", saved({"w": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}),
        "the tensor 'w' is quantized already. Give the float network, or call .dequantize() on it."),
    Bad("a dynamically quantized layer", "model.pt",
        saved({"0.scale": torch.ones(()), "0._packed_params._packed_params": (
            torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), None)}),
        "its '0._packed_params._packed_params' is quantized already. Give the float network."),
    Bad("a type without a place", "model.pt", saved(weights(w=torch.ones(2, dtype=torch.complex128))),
        "the tensor 'w' is of type torch.complex128, which safetensors cannot hold. Convert it and save again."),
    Bad("several at once", "model.pt", saved({"a": torch.ones(2, device="meta"), "c": torch.ones(2).to_sparse()}),
        "the tensor 'a' has a shape but no values (device meta). Load the values before saving.\n"
        "{0}/model.pt: the tensor 'c' is sparse (torch.sparse_coo). Call .to_dense() on it and save again."),
    Bad("a frozen TorchScript archive", "model.pt", scripted(frozen=True),
        f"a frozen TorchScript archive: its weights are constants without names. {ORIGINAL}"),
    Bad("a cut TorchScript archive", "model.pt", cut(scripted(frozen=False), 900),
        f"the file is damaged: it begins as a zip archive, but its end is missing (900 bytes). {AGAIN}", CheckFailed),
    Bad("ONNX", "model.onnx", written(b"\x08\x07"),
        "it is an ONNX file, and this takes PyTorch checkpoints. `pcq quantize`, or pcq.commands.quantize_onnx, packs "
        "ONNX models; for anything else save the network's weights as a state dict: "
        "torch.save(model.state_dict(), 'weights.pt')."),
    Bad("an artifact", "model.safetensors", artifact,
        "it is an artifact of pcq: its weights are quantized already. Give the float checkpoint it was made from; an "
        "artifact can be inspected, evaluated and exported."),
    Bad("HDF5", "model.h5", written(b"\x89HDF\r\n\x1a\n" + bytes(20)), f"it is an HDF5 file (Keras?). {STATE_DICT}"),
    Bad("Keras", "model.keras", zipped(config_dot_json="{}", model_dot_weights_dot_h5=""),
        f"it is a Keras model. {STATE_DICT}"),
    Bad("TensorFlow's graph", "model.pb", written(b"\x0a\x03abc"), f"it is a TensorFlow file. {STATE_DICT}"),
    Bad("TensorFlow Lite", "model.tflite", written(b"\x1c\0\0\0TFL3"), f"it is a TensorFlow Lite model. {STATE_DICT}"),
    Bad("GGUF", "model.gguf", written(b"GGUF\x03\0\0\0"), f"it is a GGUF file, quantized already. {STATE_DICT}"),
    Bad("a gzip", "model.pt.gz", written(b"\x1f\x8b\x08\0"), "it is compressed with gzip. Unpack it first."),
    Bad("a tar", "model.tar", tarred, "it is a tar archive. Unpack it first."),
    Bad("some zip", "model.zip", zipped(readme="hello"),
        f"it is a zip archive without a PyTorch checkpoint. {STATE_DICT}"),
    Bad("one array", "model.npy", lambda path: np.save(path, np.ones(3)),
        f"it is a single NumPy array without a name. {STATE_DICT}"),
    Bad("an array of objects", "model.npz", array_of_objects,
        "the array 'w' is of type object, which is no tensor's."),
    Bad("an empty folder", "model", folder(),
        "it is a folder without a checkpoint. Allowed: model.safetensors.index.json, model.safetensors, "
        "pytorch_model.bin.index.json, pytorch_model.bin, or a single checkpoint."),
    Bad("a folder with two", "model", folder("a.pt", "b.pt"),
        "it is a folder with several checkpoints: a.pt, b.pt. Name the file."),
    Bad("a SavedModel", "model", folder("saved_model.pb"), f"it is a TensorFlow SavedModel. {STATE_DICT}"),
    Bad("a missing shard", "model.safetensors.index.json", indexed({"w": "here.safetensors", "v": "gone.safetensors"}),
        "the shard 'gone.safetensors' is missing. Put it into {0}."),
    Bad("shards of another checkpoint", "model.safetensors.index.json", indexed({"v": "here.safetensors"}),
        "'v' is not in here.safetensors, where the index has it. The index and its shards are not of one checkpoint: "
        "fetch all of them again."),
    Bad("some JSON", "model.json", written(b'{"a": 1}'),
        'it is JSON without a "weight_map" of tensors to files. Give the checkpoint itself, or its folder.'),
    Bad("one shard", "model-00001-of-00003.safetensors", lambda path: save_file(weights(), path),
        "it is one of 3 shards of a checkpoint. Give the index, model.safetensors.index.json, or the folder."),
    Bad("a compiled package", "model.pt2", zipped(m__archive_format="pt2", m__data__aotinductor__x="so"),
        "a .pt2 package without weights to read (compiled?). Give the state dict, or a file of torch.export.save."),
]  # fmt: skip


def quantize(path: Path, out: Path) -> None:
    """Every matrix ternary, as the command does it."""
    source = open_source(path)
    entries: list[Quantized | Kept] = []
    for name in source.names:
        parameter = Parameter(name, source.shape(name), source.dtype(name), "linear", tied_to=source.tied.get(name))
        if (
            len(parameter.shape) == 2
            and 0 not in parameter.shape
            and source.dtype(name).startswith(("float", "bfloat"))
        ):
            entries.append(Quantized(parameter, Rows(parameter.shape), Ternary(), 0))
        else:
            entries.append(Kept(parameter, "not a matrix"))
    plan = Plan(tuple(entries))
    write_artifact(out, make_header(plan), ((done.name, done.value) for done in quantize_source(source, plan)))


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.what)
def test_bad_input(bad: Bad, tmp_path: Path) -> None:
    path = tmp_path / bad.name
    bad.prepare(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PcqError) as error:
        quantize(path, tmp_path / "out.safetensors")
    assert str(error.value) == f"{path}: " + bad.says.replace("{0}", str(tmp_path))
    assert error.value.exit_code == (3 if bad.kind is CheckFailed else 2)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_none(value: float, tmp_path: Path) -> None:
    torch.save(spoilt(value), tmp_path / "model.pt")
    with pytest.raises(PcqError) as error:
        quantize(tmp_path / "model.pt", tmp_path / "out.safetensors")
    assert str(error.value) == (
        "w: 1 of its 12 values are NaN or infinite. Repair the checkpoint, or keep this weight in float by a rule of "
        "the recipe."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0, 4), torch.empty(3, 0), torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.float64),
        torch.ones(4, 3).half(), torch.ones(4, 3).bfloat16(), torch.ones(4, 3, dtype=torch.int64),
        torch.ones(4, 3, dtype=torch.bool), torch.tensor(3.0), torch.ones(6, 4).t(), torch.ones(5)[::2],
        torch.ones(4, 3, dtype=torch.complex64), torch.full((4, 3), 1e38), torch.full((4, 3), 1e-40),
        nn.Parameter(torch.ones(4, 3)),
    ],
    ids=lambda t: f"{t.dtype} {list(t.shape)} {float(t.real.float().sum()):.3g}",
)  # fmt: skip
def test_odd_but_good(tensor: Tensor, tmp_path: Path) -> None:
    """Empty, zero, of any number type, huge, tiny, strided: stored, and read back in shape and dtype."""
    from pcq.checkpoint import read_artifact

    path = tmp_path / "model.pt"
    torch.save({"w": tensor, "tied": tensor}, path)
    quantize(path, tmp_path / "out.safetensors")
    state = read_artifact(tmp_path / "out.safetensors").state_dict()
    assert state["w"].shape == tensor.shape
    assert state["w"].dtype == tensor.dtype
    assert torch.isfinite(state["w"]).all()
    assert torch.allclose(state["w"], tensor.detach(), rtol=1e-6), "constant weights are on their levels"


def test_there_are_enough() -> None:
    assert len(BAD) >= 40
    assert len({bad.what for bad in BAD}) == len(BAD)
