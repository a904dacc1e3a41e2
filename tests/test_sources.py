"""Opening checkpoints: every form gives the same tensors, says what it did, and runs nothing."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from pcq.errors import CheckFailed, PcqError
from pcq.sources import open_source, pt2, revive
from pcq.sources.safetensors import read_header, read_slot
from pcq.torchvision_compat import import_torchvision

State = dict[str, Tensor]


class Net(nn.Module):
    """A convolution, a norm, two tied linear layers, a buffer that is not saved and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("shift", torch.arange(4.0), persistent=False)
        self.factor = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.b(self.a(x)) * self.factor + self.shift


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def exported(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(2, 1, 5, 5),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


def state() -> State:
    return {"conv.weight": torch.randn(4, 1, 3, 3), "conv.bias": torch.randn(4), "steps": torch.tensor(3)}


def same(source_path: Path, expected: State, **options: object) -> None:
    source = open_source(source_path, **options)  # type: ignore[arg-type]
    assert source.names == list(expected)
    for name, tensor in expected.items():
        found = source.tensor(name)
        assert source.shape(name) == tuple(tensor.shape) == tuple(found.shape)
        assert f"torch.{source.dtype(name)}" == str(tensor.dtype) == str(found.dtype)
        assert found.is_contiguous()
        assert found.device.type == "cpu"
        assert torch.equal(found, tensor), name


def save_npz(tensors: State, path: Path) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})


FORMS: dict[str, Callable[[State, Path], None]] = {
    "a.pt": torch.save,
    "a.pth": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "a.bin": torch.save,
    "a.ckpt": torch.save,
    "a.safetensors": lambda tensors, path: save_file(tensors, path),
    "a.npz": save_npz,
    "no-suffix": torch.save,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    tensors = state()
    FORMS[name](tensors, tmp_path / name)
    expected = tensors if name != "a.safetensors" else {key: tensors[key] for key in open_source(tmp_path / name).names}
    same(tmp_path / name, expected)
    assert open_source(tmp_path / name).nbytes == 36 * 4 + 4 * 4 + 8


NEW_DTYPES = [torch.float8_e4m3fn, torch.uint16]  # which torch itself cannot read from its legacy format
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool, torch.complex64, *NEW_DTYPES]  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    specs=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        min_size=1,
        max_size=6,
    ),
    form=st.sampled_from(["a.pt", "a.pth", "a.safetensors"]),
)
def test_any_names_dtypes_and_shapes(
    specs: dict[str, tuple[torch.dtype, list[int]]], form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    specs = {name: spec for name, spec in specs.items() if name != "__metadata__"} or {"w": (torch.float32, [2])}
    tensors = {}
    for name, (dtype, shape) in specs.items():
        kind = torch.float16 if form == "a.pth" and dtype in NEW_DTYPES else dtype
        raw = torch.randint(0, 2, (int(np.prod(shape)) * kind.itemsize,), dtype=torch.uint8)
        tensors[name] = raw.view(kind).reshape(shape)
    path = tmp_path_factory.mktemp("any") / form
    FORMS[form](tensors, path)
    source = open_source(path)
    assert len(source.names) == len(tensors)
    for name in source.names:
        (full,) = [key for key in tensors if key == name or (key not in source.names and key.endswith(f".{name}"))]
        assert bits(source.tensor(name)).equal(bits(tensors[full]))


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_values_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    monkeypatch.setattr("pcq.sources.safetensors.torch.empty", lambda *_, **__: pytest.fail("a tensor was read"))
    source = open_source(tmp_path / "a.safetensors")
    assert source.shape("conv.weight") == (4, 1, 3, 3)
    assert source.nbytes == 36 * 4 + 4 * 4 + 8


# Wrappers and prefixes


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
         "Opened 'state_dict'; beside it: epoch, optimizer."),
        (lambda s: {"model": s}, "Opened 'model'."),
        (lambda s: {"model_state_dict": s, "loss": torch.tensor(0.5)}, "Opened 'model_state_dict'; beside it: loss."),
        (lambda s: {"ema": s, "optimizer": {"m": torch.ones(3)}}, "Opened 'ema'; beside it: optimizer."),
        (lambda s: {"net": {"state_dict": s}, "args": 1}, "Opened 'net.state_dict'; beside it: args."),
        (lambda s: {"whatever": s, "epoch": 1}, "Opened 'whatever'; beside it: epoch."),
        (lambda s: {"state_dict": s, "callbacks": {"ema": {"w": torch.ones(2)}}, "pytorch-lightning_version": "2"},
         "Opened 'state_dict'; beside it: callbacks, pytorch-lightning_version."),
        (lambda s: {"arch": "resnet18", "state_dict": s}, "The checkpoint says arch: resnet18."),
        (lambda s: {**s, "epoch": 3, "note": "x"}, "Ignored what is not a tensor: epoch, note."),
    ],
)  # fmt: skip
def test_wrappers_are_opened_and_named(wrap: Callable[[State], object], note: str, tmp_path: Path) -> None:
    tensors = state()
    torch.save(wrap(tensors), tmp_path / "a.pt")
    same(tmp_path / "a.pt", tensors)
    assert note in open_source(tmp_path / "a.pt").notes


def test_several_state_dicts_are_not_guessed_at(tmp_path: Path) -> None:
    weights, average = state(), state()
    torch.save({"model": weights, "model_ema": average, "epoch": 1}, tmp_path / "a.pt")
    with pytest.raises(PcqError) as error:
        open_source(tmp_path / "a.pt")
    assert str(error.value) == (
        f"{tmp_path}/a.pt: several state dicts, and pcq does not guess: 'model' (3 tensors), 'model_ema' (3 tensors). "
        "Choose one, such as --key model."
    )
    same(tmp_path / "a.pt", average, key="model_ema")
    with pytest.raises(PcqError, match=r"there is no state dict 'model_em'.*Did you mean 'model_ema'"):
        open_source(tmp_path / "a.pt", key="model_em")
    torch.save(weights, tmp_path / "b.pt")
    save_file(weights, tmp_path / "b.safetensors")
    torch.save(nn.Linear(2, 3), tmp_path / "c.pt")
    for name in ("b.pt", "b.safetensors", "c.pt"):
        with pytest.raises(PcqError, match="it holds one state dict only. Leave out --key ema"):
            open_source(tmp_path / name, key="ema", unsafe_pickle=name == "c.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_prefixes_of_all_names_are_taken_off(prefix: str, tmp_path: Path) -> None:
    tensors = state()
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    assert sorted(source.names) == sorted(tensors)
    assert len(source.notes) == prefix.count(".")
    assert "Took the prefix" in source.notes[0]
    assert torch.equal(source.tensor("conv.weight"), tensors["conv.weight"])


def test_a_prefix_that_one_name_lacks_stays(tmp_path: Path) -> None:
    tensors = {"model.a": torch.ones(1), "model.b": torch.ones(2), "head": torch.ones(3)}
    torch.save(tensors, tmp_path / "a.pt")
    same(tmp_path / "a.pt", tensors)


def test_an_averaged_model_loses_its_counter(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    torch.save(averaged.state_dict(), tmp_path / "a.pt")
    assert open_source(tmp_path / "a.pt").names == ["weight", "bias"]


# Storage


def test_tied_tensors_are_found_by_storage(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    tensors = {
        "a": weight,
        "b": torch.randn(3),
        "c": weight,
        "d": weight.view(24),
        "e": weight.clone(),
        "f": weight.t(),
    }
    for legacy in (False, True):
        torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        source = open_source(tmp_path / "a.pt")
        assert source.tied == {"c": "a"}
        assert source.nbytes == 4 * (24 * 4 + 3)
        assert any("'d' and 'a', 'f' and 'a'" in note for note in source.notes)
        same(tmp_path / "a.pt", tensors)
        loaded = source.state_dict()
        assert loaded["a"] is loaded["c"]


@settings(deadline=None, max_examples=25)
@given(offset=st.integers(0, 5), length=st.integers(0, 5), step=st.integers(1, 3))
def test_views_of_one_storage_are_read_as_they_look(
    offset: int, length: int, step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = torch.arange(30.0)
    tensors = {"whole": base, "part": base[offset : offset + length * step : step], "cut": base[:20].view(4, 5)[:, 1:3]}
    path = tmp_path_factory.mktemp("views") / "a.pt"
    torch.save(tensors, path)
    same(path, tensors)
    assert open_source(path).tied == {}


def test_conjugate_views_are_resolved(tmp_path: Path) -> None:
    value = torch.randn(3, dtype=torch.complex64)
    torch.save({"w": value.conj()}, tmp_path / "a.pt")
    assert torch.equal(
        open_source(tmp_path / "a.pt").tensor("w").view(torch.float32), value.conj_physical().view(torch.float32)
    )


# Shards and folders


def write_shards(folder: Path, kind: str) -> State:
    """Three tensors in two shards with an index; the first two are tied where the kind can hold that."""
    shared = torch.randn(5)
    shards = [{"a.w": torch.randn(3, 2), "a.b": torch.zeros(3, dtype=torch.bfloat16)}, {"b.w": shared}]
    if kind == "bin":
        shards[1]["c.w"] = shared
    names = [f"pytorch_model-{i}-of-00002.bin" if kind == "bin" else f"model-{i}-of-00002.safetensors"
             for i in ("00001", "00002")]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        (torch.save if kind == "bin" else save_file)(shard, folder / name)  # type: ignore[operator]
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return {key: tensor for shard in shards for key, tensor in shard.items()}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_sharded_checkpoints(kind: str, tmp_path: Path) -> None:
    tensors = write_shards(tmp_path, kind)
    index = next(tmp_path.glob("*.index.json"))
    for path in (tmp_path, index):
        same(path, tensors)
        assert f"Opened {len(tensors)} tensors in 2 shards." in open_source(path).notes
    assert open_source(index).tied == ({"c.w": "b.w"} if kind == "bin" else {})
    shard = sorted(tmp_path.glob("*00002-of-00002*"))[0]
    with pytest.raises(PcqError, match=rf"one of 2 shards.*Give the index, .*{index.name}"):
        open_source(shard)
    shard.unlink()
    with pytest.raises(PcqError, match=f"the shard '{shard.name}' is missing"):
        open_source(tmp_path)


def test_tensors_of_one_address_in_two_shards_are_not_tied(tmp_path: Path) -> None:
    places = {}
    for i in range(1, 4):  # shards of equal layout, mapped one after another, often land at one address
        torch.save({f"w{i}": torch.full((64,), float(i))}, tmp_path / f"pytorch_model-0000{i}-of-00003.bin")
        places[f"w{i}"] = f"pytorch_model-0000{i}-of-00003.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    source = open_source(tmp_path)
    assert source.tied == {}
    assert [float(source.tensor(name)[0]) for name in source.names] == [1, 2, 3]


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, "safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, "ghost": places["b.w"]}}))
    with pytest.raises(PcqError, match=r"'ghost' is not in model-00002-of-00002.safetensors"):
        open_source(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(PcqError, match="outside its own folder"):
        open_source(index)


def test_folders(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2)}
    torch.save(tensors, tmp_path / "only.pt")
    same(tmp_path, tensors)
    save_file({"v": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    assert source.names == ["v"]
    assert source.notes == ("Opened model.safetensors; beside it: pytorch_model.bin.",)
    assert source.arch is None
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "num_classes": 7, "pretrained_cfg": {}}')
    assert open_source(tmp_path).arch == "timm:resnet18?num_classes=7"


# Pickled objects


class Sentinel:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_hostile_pickle_never_runs(legacy: bool, wrapped: bool, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    payload = Sentinel(sentinel)
    torch.save({"w": torch.ones(2), "x": payload} if wrapped else payload, tmp_path / "a.pt",
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    for allowed in ((), ("posix.system",), ("os.system",)):
        with pytest.raises(PcqError) as error:
            open_source(tmp_path / "a.pt", allow_globals=allowed)
        assert "loading it would run code of its own choosing: it calls posix.system" in str(error.value)
    assert not sentinel.exists()
    with pytest.raises(PcqError):
        open_source(tmp_path / "a.pt", unsafe_pickle=True).tensor("x")
    assert sentinel.exists(), "the payload is not one that would have run"


@pytest.mark.parametrize("options", ["unsafe_pickle=True", "allow_globals=['torchvision.models.alexnet.AlexNet']"])
def test_a_pickled_module_of_torchvision(options: str, tmp_path: Path) -> None:
    """In a process that has not imported torchvision yet, which beside a CPU torch takes some preparation."""
    kind = import_torchvision().models.AlexNet
    pickled = kind.__new__(kind)  # without its 240 MB
    nn.Module.__init__(pickled)
    pickled.classifier = nn.Linear(3, 2)
    torch.save(pickled, tmp_path / "net.pt")
    code = f"from pcq.sources import open_source; print(open_source({str(tmp_path / 'net.pt')!r}, {options}).names)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['classifier.weight', 'classifier.bias']", done.stderr


@pytest.mark.parametrize("state", [{"w": np.ones((4, 3))}, {"net": {"w": np.ones(3)}, "epoch": 3}])
def test_numpy_arrays_that_are_let_in_are_no_weights(state: dict[str, object], tmp_path: Path) -> None:
    path, allowed = tmp_path / "m.pt", [f"{np.ones(1).__reduce__()[0].__module__}._reconstruct", "numpy.ndarray"]
    torch.save(state, path)
    with pytest.raises(PcqError, match=r"it holds NumPy arrays, not tensors.*torch.from_numpy.*numpy.savez"):
        open_source(path, allow_globals=allowed)
    torch.save({"state_dict": {"w": torch.ones(3)}} | state, path)
    assert open_source(path, allow_globals=allowed).names == ["w"]


def test_a_pickled_module_needs_leave(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(net, path)
    with pytest.raises(PcqError) as error:
        open_source(path)
    name = f"{Net.__module__}.Net"
    assert str(error.value) == (
        f"{path}: it holds Python objects, not only tensors: {name}. If you trust the file, add "
        f"`--allow-global {name}` (these classes are then loaded, nothing else), or --unsafe-pickle (anything in the "
        "file can run). Safer: save model.state_dict() instead."
    )
    x = torch.randn(2, 1, 5, 5)
    for options in ({"allow_globals": (name,)}, {"unsafe_pickle": True}):
        source = open_source(path, **options)  # type: ignore[arg-type]
        assert source.tied == {"b.weight": "a.weight"}
        module = source.module()
        assert module is not None
        assert not module.training
        assert torch.equal(module(x), net(x))
        assert torch.equal(source.tensor("conv.weight"), net.conv.weight)
    assert any("--unsafe-pickle" in note for note in source.notes)
    torch.save({"model": net, "epoch": 1}, path)
    assert open_source(path, allow_globals=[name]).names == list(net.state_dict())
    with pytest.raises(PcqError, match=r"--allow-global: 'no.such.Thing' cannot be imported"):
        open_source(path, allow_globals=["no.such.Thing"])


def test_what_scripts_store_beside_the_weights_needs_no_leave(tmp_path: Path) -> None:
    import argparse

    tensors = state()
    beside = {"args": argparse.Namespace(lr=1.0), "top1": np.float64(76.1), "n": np.int64(3), "where": Path("/tmp/x")}
    torch.save({"state_dict": tensors, **beside}, tmp_path / "a.pt")
    same(tmp_path / "a.pt", tensors)


def test_a_flipped_bit_in_a_weight_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(5000)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["w"].count_nonzero() == 1, "torch finds it now"
    with pytest.raises(CheckFailed, match=r"data/0 does not fit its checksum"):
        open_source(path).tensor("w")


def test_a_file_written_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(50)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    same(tmp_path / "a.pt", {"w": torch.ones(50)})


# TorchScript


def test_torchscript_is_read_without_running_it(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = torch.jit.script(nn.Sequential(net, nn.BatchNorm2d(3).half(), nn.Linear(3, 2).to(torch.bfloat16)))
    script.save(tmp_path / "a.pt")
    expected = script.state_dict()
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load was called"))
    same(tmp_path / "a.pt", expected)
    source = open_source(tmp_path / "a.pt")
    assert source.tied == {"0.b.weight": "0.a.weight"}
    assert source.notes == ("Read the parameters and buffers of a TorchScript archive without running it.",)


def test_torchscript_that_names_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(records)).partition("/")[0]
    records[f"{root}/data.pkl"] = b"\x80\x02cposix\nsystem\n(X\x0a\x00\x00\x00touch /tmptR."
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(CheckFailed, match=r"posix.system"):
        open_source(path)


# torch.export


def test_an_exported_program_is_read_without_loading_it(
    net: Net, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("torch.export.load was called"))
        source = open_source(exported)
        assert sorted(source.names) == sorted(net.state_dict())
        assert set(source.tied) | set(source.tied.values()) == {"a.weight", "b.weight"}
        for name, tensor in net.state_dict().items():
            assert torch.equal(source.tensor(name), tensor)
    module, x = source.module(), torch.randn(3, 1, 5, 5)
    assert module is not None
    assert torch.equal(module(x), net(x))


def test_a_stripped_program_runs_with_other_weights(net: Net, exported: Path) -> None:
    source = open_source(exported)
    assert source.program is not None
    assert len(source.program) < 8000
    assert b"weight_" not in source.program.replace(b"weight_config", b"")
    other = Net().eval()
    state_dict = other.state_dict()
    x = torch.randn(3, 1, 5, 5)
    program = revive(source.program, state_dict)
    assert torch.equal(program.module()(x), other(x))
    args, _ = program.example_inputs
    assert args[0].shape == (2, 1, 5, 5)
    assert not args[0].any(), "the example input's values travel along"
    with pytest.raises(PcqError, match=r"'conv.weight' is missing"):
        revive(source.program, {name: state_dict[name] for name in state_dict if name != "conv.weight"})
    with pytest.raises(PcqError, match=r"'conv.weight' is torch.float64 \[4, 1, 3, 3\]"):
        revive(source.program, {**state_dict, "conv.weight": state_dict["conv.weight"].double()})


HOSTILE = "__import__('os').system('touch ran')"


def set_target(model: dict) -> None:  # type: ignore[type-arg]
    model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"


def set_formula(model: dict) -> None:  # type: ignore[type-arg]
    for found in pt2.dicts(model):
        if "expr_str" in found:
            found["expr_str"] = HOSTILE


def set_name(model: dict) -> None:  # type: ignore[type-arg]
    model["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = f"x={HOSTILE}"


def set_guard(model: dict) -> None:  # type: ignore[type-arg]
    model["guards_code"] = [HOSTILE]


def set_tree(model: dict) -> None:  # type: ignore[type-arg]
    call = model["graph_module"]["module_call_graph"][0]["signature"]
    call["in_spec"] = call["in_spec"].replace("builtins.tuple", "collections.defaultdict")


def set_object(model: dict) -> None:  # type: ignore[type-arg]
    model["graph_module"]["graph"]["custom_obj_values"] = {"x": {"class_fqn": "y"}}


def set_metadata(model: dict) -> None:  # type: ignore[type-arg]
    model["graph_module"]["graph"]["nodes"][0]["metadata"]["source_fn_stack"] = "x,torch.os.system"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_target, "it calls torch.os.system"),
        (set_formula, "is not a formula of integers"),
        (set_name, "is not a name"),
        (set_guard, "it has guards, which are Python code"),
        (set_tree, "its inputs or outputs are of type collections.defaultdict"),
        (set_object, "it holds a custom object"),
        (set_metadata, "a node carries metadata"),
    ],
)
def test_a_program_that_could_run_code_is_screened(
    change: Callable[[dict], None],
    said: str,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[type-arg]
) -> None:
    """In a .pt2 it is left out with a note (guards and metadata are dropped); in an artifact it is refused."""
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("torch.export.load was called"))
    hostile = tmp_path / "hostile.pt2"
    with zipfile.ZipFile(exported) as archive, zipfile.ZipFile(hostile, "w") as out:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("models/model.json"):
                model = json.loads(data)
                change(model)
                data = json.dumps(model).encode()
            out.writestr(name, data)
    source = open_source(hostile)
    if change in (set_guard, set_metadata):
        assert source.program is not None
    else:
        assert source.program is None
        assert source.module() is None
        assert said in source.notes[0]
    program = open_source(exported).program
    assert program is not None
    repacked = tmp_path / "program.zip"
    repacked.write_bytes(program)
    with zipfile.ZipFile(repacked) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    model = json.loads(records[pt2.MODEL])
    change(model)
    records[pt2.MODEL] = json.dumps(model).encode()
    with zipfile.ZipFile(repacked, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(CheckFailed, match=said):
        revive(repacked.read_bytes(), source.state_dict())


def test_pickles_in_a_program_are_screened(exported: Path, tmp_path: Path) -> None:
    hostile, sentinel = tmp_path / "hostile.pt2", tmp_path / "ran"
    torch.save(Sentinel(sentinel), tmp_path / "payload.pt")
    with zipfile.ZipFile(exported) as archive, zipfile.ZipFile(hostile, "w") as out:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("sample_inputs/model.pt"):
                data = (tmp_path / "payload.pt").read_bytes()
            if name.endswith("constants_config.json"):
                config = json.loads(data)
                config["config"]["factor"]["path_name"] = "opaque_obj_0"
                data = json.dumps(config).encode()
            out.writestr(name, data)
    source = open_source(hostile)
    assert source.program is None
    assert "'factor' is a pickled object" in source.notes[0]
    source.state_dict()
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Mul(Integer(12), Symbol('s77', positive=True, integer=True))", True),
        ("FloorDiv(s0 + 3, 2)*s1 - 1 >= 0", True),
        ("s0.__class__", False),
        ("open('x')", False),
        ("[x for x in y]", False),
        ("(lambda: 0)()", False),
        ("Symbol('a b')", False),
        ("Symbol('s0')(1)", False),
        ("s0; s1", False),
        ("f'{s0}'", False),
    ],
)
def test_formulas(text: str, good: bool) -> None:
    assert pt2.is_formula(text) == good


def test_the_state_dict_of_an_older_export_is_read(tmp_path: Path) -> None:
    tensors = state()
    torch.save(tensors, tmp_path / "state.pt")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.2")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.write(tmp_path / "state.pt", "serialized_state_dict.pt")
    same(tmp_path / "old.pt2", tensors)
    assert "an older torch wrote it" in open_source(tmp_path / "old.pt2").notes[0]


# Damage


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damage_is_a_sentence_never_a_traceback(
    data: st.DataObject, net: Net, exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut, flip or replace bytes anywhere: the file opens, or a PcqError says why not."""
    folder = tmp_path_factory.mktemp("damage", numbered=True)
    form = data.draw(st.sampled_from(["a.pt", "a.pth", "a.safetensors", "a.npz", "script.pt", "a.pt2"]))
    path = folder / form
    if form == "script.pt":
        torch.jit.script(nn.Linear(3, 2)).save(path)
    elif form == "a.pt2":
        path.write_bytes(exported.read_bytes())
    else:
        FORMS[form]({"a.w": torch.ones(6, 5), "b": torch.tensor(3)}, path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "replace"]))
    if kind == "cut":
        del content[place:]
    elif kind == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        content[place : place + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=30))
    path.write_bytes(content)
    try:
        source = open_source(path)
        for name in source.names:
            source.tensor(name)
    except PcqError as error:
        said = str(error)
    else:
        return
    assert said.startswith(str(path))
    assert len(said) > len(str(path)) + 10


def test_the_safetensors_header_agrees_with_the_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "a.safetensors"
    save_file(state(), path, metadata={"a": "b"})
    header = read_header(path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == header.metadata == {"a": "b"}
        assert sorted(file.keys()) == sorted(header.slots)
        for name, slot in header.slots.items():
            assert torch.equal(file.get_tensor(name), read_slot(path, slot))


def header_bytes(head: object, data: int = 0) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def one(shape: object, begin: int, end: int) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}


TWICE = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x10", "it ends at byte 1, inside its header of 16 bytes"),
        (header_bytes(one([2], 0, 8), 7), "it has 76 bytes where its header promises 77"),
        (header_bytes(one([2], 0, 8), 9), "it has 78 bytes where its header promises 77"),
        (header_bytes(one([2], 4, 12), 12), "overlap or leave gaps"),
        (header_bytes({**one([2], 0, 8), "b": one([2], 4, 12)["a"]}, 12), "overlap or leave gaps"),
        (header_bytes(one([3], 0, 8), 8), "'a' has 8 bytes where its shape needs 12"),
        (header_bytes(one([-2], 0, 8), 8), "is not a shape"),
        (header_bytes(one([True], 0, 4), 4), "is not a shape"),
        (header_bytes(TWICE), "a name stands twice"),
        (header_bytes([1, 2]), "is not a safetensors header"),
        (header_bytes(b"{" * 50_000), "is not a safetensors header"),
        (b"\xff" * 8 + b"{}", "its header would be"),
    ],
)
def test_broken_safetensors_headers(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckFailed) as error:
        read_header(tmp_path / "a.safetensors")
    assert said in str(error.value)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    with pytest.raises(PcqError, match=r"no tensor 'conv.weigth'. Did you mean 'conv.weight'"):
        source.tensor("conv.weigth")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(PcqError, match="there is no such file"):
        source.tensor("conv.weight")


def test_opening_leaves_the_import_path_alone(tmp_path: Path) -> None:
    before = list(sys.path)
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    open_source(tmp_path / "a.pt", allow_globals=["collections.OrderedDict"])
    assert sys.path == before
