"""The artifact: what goes in comes out, in the predicted number of bytes, readable without pcq, whole or not at all."""

import itertools
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pcq import qtensor
from pcq.atomic import atomic, scratch
from pcq.checkpoint import (
    ArtifactHeader,
    Coded,
    Plain,
    is_artifact,
    make_header,
    predicted_size,
    quantize_sliced,
    quantize_source,
    read_artifact,
    refuse_non_finite,
    refuse_overwrite,
    write_artifact,
)
from pcq.checkpoint.outputs import beside
from pcq.checkpoint.stream import non_finite
from pcq.errors import CheckFailed, PcqError
from pcq.plan import Kept, Parameter, Plan, Quantized
from pcq.qtensor import QuantizedTensor
from pcq.quantizers import (
    AdditivePowersOfTwo,
    Binary,
    Fixed,
    KMeans,
    LeastSquaresBinary,
    Quantizer,
    Ternary,
    Uniform,
)
from pcq.rows import Rows
from pcq.sources import Source, open_source

ROOT = Path(__file__).parent.parent
QUANTIZERS: list[Quantizer] = [
    Binary(),
    Ternary(),
    LeastSquaresBinary(2),
    Uniform(3),
    Uniform(4, symmetric=False),
    Uniform(8, scale="absmax"),
    KMeans(5),
    AdditivePowersOfTwo(4),
    Fixed((-1.0, -0.3, 0.3, 1.0)),
    Fixed("nf4", scale="absmax"),
]
ROWS = [
    Rows((6, 4, 3, 3)),
    Rows((6, 4, 3, 3), axis=None),
    Rows((5, 7), group=3),
    Rows((4, 6, 2), axis=1),
    Rows((4, 3, 2), axis=1, blocks=2, group=2),
    Rows((1, 9)),
]


def reader() -> Callable[[Path], Iterator[tuple[str, np.ndarray]]]:
    """The code of docs/artifact.md that reads an artifact without pcq."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/artifact.md").read_text(), re.S)
    assert "pcq" not in code.replace('["pcq"]', "")
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["weights"]  # type: ignore[no-any-return]


def plan_for(tensors: dict[str, Tensor], quantizers: dict[str, tuple[Quantizer, Rows]], tied: dict[str, str]) -> Plan:
    entries: list[Quantized | Kept] = []
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        parameter = Parameter(name, tuple(tensor.shape), dtype, "linear", tied_to=tied.get(name))
        if name in quantizers and name not in tied:
            entries.append(Quantized(parameter, quantizers[name][1], quantizers[name][0], 0))
        else:
            entries.append(Kept(parameter, "because"))
    return Plan(tuple(entries))


def write(path: Path, tensors: dict[str, Tensor], quantizers: dict[str, tuple[Quantizer, Rows]],
          tied: dict[str, str] | None = None, **header: Any) -> tuple[ArtifactHeader, dict[str, Any]]:  # fmt: skip
    """Quantize in memory and write; ``-> header, what was written``."""
    plan = plan_for(tensors, quantizers, tied or {})
    made = replace(make_header(plan), **header)
    values: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name not in (tied or {}):
            values[name] = (
                qtensor.quantize(quantizers[name][0], tensor, quantizers[name][1]) if name in quantizers else tensor
            )
    write_artifact(path, made, values.items())
    return made, values


def equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    def tensors(value: QuantizedTensor) -> list[Tensor]:
        found = [value.codes, value.grid.levels()]
        return found + ([value.grid.scale] if value.grid.scale is not None else [])

    same_form = type(a.grid) is type(b.grid) and a.rows == b.rows
    return same_form and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True)
    )


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_round_trip(quantizer: Quantizer, rows: Rows, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "a.safetensors"
    tensors = {"w": torch.randn(rows.shape), "b": torch.randn(3, dtype=torch.bfloat16), "n": torch.tensor(7)}
    header, values = write(path, tensors, {"w": (quantizer, rows)}, arch="timm:x", recipe={"name": "r"})
    assert predicted_size(header) == path.stat().st_size
    found = read_artifact(path)
    assert equal(found.quantized["w"], values["w"])
    assert list(found.floats) == ["b", "n"]
    assert all(torch.equal(found.floats[name], tensors[name]) for name in found.floats)
    assert (found.arch, found.recipe, found.names) == ("timm:x", {"name": "r"}, ("w", "b", "n"))
    assert found.texts["w"].startswith(quantizer.text)
    assert found.nbytes == path.stat().st_size
    state = found.state_dict()
    assert list(state) == list(tensors)
    assert torch.equal(state["w"], values["w"].dequantize())
    ((name, weight),) = reader()(path)
    assert name == "w"
    assert weight.dtype == np.float32
    assert torch.equal(torch.from_numpy(weight), values["w"].dequantize())


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_round_trip_of_any_grid(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any count of levels, any shape, any grouping, any dtype; read by pcq and by the twelve lines."""
    from pcq.grids import Affine, Codebook, Grid

    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    axis = data.draw(st.sampled_from([None, 0, 1]))
    rows = Rows(shape, axis, shape[0] if axis == 1 and data.draw(st.booleans()) else 1,
                data.draw(st.sampled_from([None, 1, 2, 3, 7])))  # fmt: skip
    count = data.draw(st.integers(2, 256))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(0, count, shape, generator=generator).to(torch.uint8)
    scale = torch.rand(rows.g, generator=generator)
    form = data.draw(st.sampled_from(["affine", "zero points", "halves", "codebook", "table", "scaled table"]))
    grid: Grid
    if form == "affine":
        grid = Affine(scale, data.draw(st.sampled_from([0.0, 0.5, 1.0, 7.5])), count)
    elif form == "halves":
        grid = Affine(scale, torch.randint(0, 2 * count - 1, (rows.g,), generator=generator).half() / 2, count)
    elif form == "zero points":
        grid = Affine(scale, torch.randint(0, count, (rows.g,), generator=generator).to(torch.uint8), count)
    else:
        table = torch.randn(1 if "table" in form else rows.g, count, generator=generator).sort(1).values
        grid = Codebook(table, scale if form == "scaled table" else None)
    value = QuantizedTensor(codes, grid, rows)
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16", "float64"]))
    path = tmp_path_factory.mktemp("grid") / "a.safetensors"
    header = ArtifactHeader({"x": Plain((2,), "bool"), "w": Coded(rows, dtype, grid, "any")})
    size = write_artifact(path, header, [("w", value), ("x", torch.tensor([True, False]))])
    assert size == path.stat().st_size == predicted_size(header)
    found = read_artifact(path)
    assert equal(found.quantized["w"], value)
    assert torch.equal(found.state_dict()["w"], value.dequantize().to(getattr(torch, dtype)))
    assert torch.equal(torch.from_numpy(dict(reader()(path))["w"]), value.dequantize())


def test_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"u": torch.ones(3, dtype=torch.uint8), "w": torch.randn(4, 5), "d": torch.ones(2, dtype=torch.float64),
               "h": torch.ones(5, dtype=torch.float16), "e": torch.empty(0, 3)}  # fmt: skip
    header, _ = write(path, tensors, {"w": (KMeans(5), Rows((4, 5)))})
    loaded = load_file(path)
    assert list(header.slots) == ["u", "w.codes", "w.levels", "d", "h", "e"]
    assert set(loaded) == set(header.slots)
    assert all(torch.equal(loaded[name], tensors[name]) for name in "udhe")
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["pcq"])["format"] == 1
        assert file.metadata()["format"] == "pt"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    head = json.loads(data[8 : 8 + length])
    del head["__metadata__"]
    spans = sorted(entry["data_offsets"] for entry in head.values())
    assert spans[0][0] == 0
    assert spans[-1][1] == len(data) - 8 - length
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    for name, slot in header.slots.items():
        assert head[name]["data_offsets"][0] == slot.start
        assert slot.start % getattr(torch, slot.dtype).itemsize == 0, "not aligned"
    resaved = tmp_path / "b.safetensors"
    save_file(loaded, resaved, metadata=safe_open(path, "pt").metadata())
    assert torch.equal(read_artifact(resaved).quantized["w"].codes, read_artifact(path).quantized["w"].codes)


def test_names_may_collide_with_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "a.safetensors"
    names = ["w", "w.codes", "w~", "w~.scale", "v.zero_point", "v", "w.codes.codes"]
    tensors = {name: torch.randn(3, 4) for name in names}
    quantized = {name: (Ternary(), Rows((3, 4))) for name in ("w", "w~", "v", "w.codes")}
    header, values = write(path, tensors, quantized)
    assert header.stored_as["v"] == "v"
    assert header.stored_as["w"] == "w~~"
    found = read_artifact(path)
    assert set(found.quantized) == set(quantized)
    assert set(found.floats) == set(names) - set(quantized)
    for name, tensor in found.state_dict().items():
        expected = values[name].dequantize() if name in quantized else tensors[name]
        assert torch.equal(tensor, expected), name
    assert {
        name: torch.equal(torch.from_numpy(w), values[name].dequantize()) for name, w in reader()(path)
    } == dict.fromkeys(quantized, True)


def test_names_the_format_keeps_for_itself_are_refused() -> None:
    for name in ("__metadata__", "__program__"):
        with pytest.raises(PcqError, match=f"{name}: the artifact format keeps this name for itself"):
            make_header(plan_for({name: torch.ones(2)}, {}, {}))


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    path = tmp_path / "a.safetensors"
    tensors = {"a": weight, "b": weight, "c": torch.ones(2), "d": torch.ones(2)}
    write(path, tensors, {"a": (Binary(), Rows((4, 4)))}, tied={"b": "a", "d": "c"})
    assert set(load_file(path)) == {"a.codes", "a.scale", "c"}
    state = read_artifact(path).state_dict()
    assert list(state) == ["a", "c", "b", "d"]
    assert state["b"] is state["a"]
    assert state["d"] is state["c"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(5, 6), "b": torch.ones(5)}
    for name in ("a", "b"):
        write(tmp_path / name, tensors, {"w": (Ternary(), Rows((5, 6)))}, recipe={"name": "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_come_in_any_order(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(5, 6), "b": torch.ones(5), "n": torch.tensor(3)}
    header, values = write(tmp_path / "a", tensors, {"w": (Ternary(), Rows((5, 6)))})
    write_artifact(tmp_path / "b", header, reversed(list(values.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# From a source


def saved(tensors: dict[str, Tensor], path: Path) -> Source:
    torch.save(tensors, path)
    return open_source(path)


def test_from_checkpoint_to_artifact(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    other = torch.randn(3, 2).bfloat16()
    source = saved({"w": weight, "b": torch.ones(6).half(), "t": weight, "v": other}, tmp_path / "in.pt")
    quantizers: dict[str, tuple[Quantizer, Rows]] = {
        "w": (Ternary(), Rows((6, 4))),
        "v": (Uniform(4), Rows((3, 2), None)),
    }
    tensors = source.state_dict()
    plan = plan_for(tensors, quantizers, source.tied)
    header = make_header(plan, arch="a", recipe={}, source=source)
    seen: list[tuple[str, int, int]] = []
    done = list(quantize_source(source, plan, lambda *step: seen.append(step)))
    write_artifact(tmp_path / "out", header, ((d.name, d.value) for d in done))
    assert [d.name for d in done] == ["w", "b", "v"]
    assert [step[1:] for step in seen] == [(0, 36), (24, 36), (30, 36), (36, 36)]
    found = read_artifact(tmp_path / "out")
    assert found.source["file"] == "in.pt"
    assert len(found.source["sha256"]) == 64
    assert found.tied == {"t": "w"}
    for name, (quantizer, rows) in quantizers.items():
        assert equal(found.quantized[name], qtensor.quantize(quantizer, tensors[name], rows))
    assert found.state_dict()["v"].dtype == torch.bfloat16
    row = done[0]
    error = row.value.dequantize().double() - weight.double()  # type: ignore[union-attr]
    assert row.noise == pytest.approx(float(error.square().sum()), rel=1e-6)
    assert row.signal == pytest.approx(float(weight.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@settings(deadline=None, max_examples=15)
@given(
    channels=st.integers(2, 9),
    length=st.integers(1, 12),
    group=st.sampled_from([None, 1, 4, 5]),
    axis=st.sampled_from([0, 0, 0, None, 1]),
    most=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_slices_make_no_difference(
    quantizer: Quantizer, channels: int, length: int, group: int | None, axis: int | None, most: int,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    weight = torch.randn(channels, length, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = weight.clone()
    rows = Rows((channels, length), axis, 1, group)
    sliced, signal, noise = quantize_sliced(quantizer, weight, rows, most)
    whole = qtensor.quantize(quantizer, weight, rows)
    assert equal(sliced, whole)
    assert sliced.nbytes == whole.nbytes
    assert torch.equal(weight, before), "the weight was changed"
    assert signal == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert noise == pytest.approx(
        float((whole.dequantize() - weight.float()).double().square().sum()), rel=1e-5, abs=1e-12
    )


def test_nan_and_infinity_are_named_all_at_once(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 2), "b": torch.ones(3, 2), "c": torch.full((2,), math.nan), "d": torch.ones(2, 2)}
    tensors["b"][0, 0] = math.inf
    tensors["d"][:] = math.nan
    source = saved(tensors, tmp_path / "in.pt")
    quantizers: dict[str, tuple[Quantizer, Rows]] = {
        name: (Binary(), Rows(tuple(tensors[name].shape))) for name in "abd"
    }
    plan = plan_for(tensors, quantizers, {})
    with pytest.raises(PcqError) as error:
        write_artifact(tmp_path / "out", make_header(plan), ((d.name, d.value) for d in quantize_source(source, plan)))
    repair = "Repair the checkpoint, or keep this weight in float by a rule of the recipe."
    assert str(error.value).splitlines() == [
        f"b: 1 of its 6 values are NaN or infinite. {repair}",
        f"d: 4 of its 4 values are NaN or infinite. {repair}",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pt"]
    assert all(not non_finite(torch.ones(5, dtype=kind)) for kind in (torch.int8, torch.float16, torch.float8_e4m3fn))
    assert non_finite(torch.empty(0, 3)) == 0
    refuse_non_finite("a", tensors["a"])
    refuse_non_finite("n", torch.ones(2, dtype=torch.int64))
    with pytest.raises(PcqError):
        refuse_non_finite("b", tensors["b"])
    with pytest.raises(PcqError, match="e: 1 of its 2 values are NaN or infinite in float32"):
        refuse_non_finite("e", torch.tensor([1e300, 1.0], dtype=torch.float64))


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.sampled_from([0.0, -3.5, 448.0, math.nan, math.inf, -math.inf]), max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2]),
)
def test_values_that_are_not_finite_are_counted(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values).to(dtype)
    assert non_finite(tensor) == sum(not math.isfinite(value) for value in values)


def test_an_exported_program_travels_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, 6),)), tmp_path / "in.pt2")
    source = open_source(tmp_path / "in.pt2")
    plan = plan_for(source.state_dict(), {"0.weight": (Uniform(8), Rows((5, 6)))}, {})
    header = make_header(plan, source=source)
    write_artifact(tmp_path / "out", header, ((d.name, d.value) for d in quantize_source(source, plan)))
    assert predicted_size(header) == (tmp_path / "out").stat().st_size
    found = read_artifact(tmp_path / "out")
    assert found.names == tuple(source.names)
    net.load_state_dict(found.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(found.program_module().eval()(x), net(x))
    assert [tuple(tensor.shape) for tensor in found.example_inputs()] == [(2, 6)]
    assert replace(found, program=None).example_inputs() == ()
    with pytest.raises(PcqError, match="holds no exported program"):
        replace(found, program=None).program_module()


# Whole or not at all


def header_of(**shapes: tuple[int, ...]) -> ArtifactHeader:
    return ArtifactHeader({name: Plain(shape, "float32") for name, shape in shapes.items()})


def failing(error: BaseException) -> Iterator[tuple[str, Tensor]]:
    yield "a", torch.ones(3)
    raise error


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), PcqError("x"), MemoryError()], ids=repr
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_leaves_what_was_there(error: BaseException, existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    if existing:
        path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_artifact(path, header_of(a=(3,), b=(4,)), failing(error))
    assert [p.name for p in tmp_path.iterdir()] == (["a.safetensors"] if existing else [])
    if existing:
        assert path.read_bytes() == b"old"


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """A real SIGINT to a real process, in the middle of a tensor."""
    code = f"""
        import sys, time, torch
        from pcq.checkpoint import ArtifactHeader, Plain, write_artifact
        def tensors():
            yield "a", torch.ones(3)
            print("writing", flush=True)
            time.sleep(60)
        write_artifact({str(tmp_path / "a.safetensors")!r},
                       ArtifactHeader({{"a": Plain((3,), "float32"), "b": Plain((4,), "float32")}}), tensors())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells start background work without it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    assert len(list(tmp_path.iterdir())) == 1, "the draft is not there while it is written"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_any_work(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: no file may grow beyond 10,000 bytes."""
    asked: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        asked.append("a")
        yield "a", torch.ones(5000)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(PcqError) as error:
            write_artifact(tmp_path / "a.safetensors", header_of(a=(5000,)), tensors())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    expected = f"{tmp_path}/a.safetensors: no room left to write it. Free some space, or choose another disk."
    assert str(error.value) == expected
    assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        raise OSError(28, "No space left on device")
        yield

    with pytest.raises(PcqError, match="no room left to write it") as error:
        write_artifact(tmp_path / "a.safetensors", header_of(a=(3,)), tensors())
    assert error.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "says"), [(1000, "no room left to write it"), (1 << 30, "unexpected pos 704")])
def test_a_library_that_says_no_more_than_that_it_failed(
    free: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors and torch raise errors of their own where a disk is full."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises((PcqError, RuntimeError), match=says), atomic(tmp_path / "a.pt"):
        raise RuntimeError("unexpected pos 704 vs 598")
    assert list(tmp_path.iterdir()) == []


OURS = CheckFailed("what a library says", where="check")
OURS.__cause__ = RuntimeError("write failed")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed"), OURS])
def test_no_room_for_temporary_files_is_said_so(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(PcqError, match="no room left for temporary files. .* TMPDIR") as told, scratch() as folder:
        raise error
    assert told.value.where == str(folder.parent)
    assert not folder.exists()
    with pytest.raises(PcqError, match="a mistake"), scratch():
        raise PcqError("a mistake")


def test_other_errors_of_the_system_are_not_about_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "a"):
        (tmp_path / "input that is gone").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the refusal is played."""

    def refuse(path: object, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pcq.atomic.os.open", refuse)
    with pytest.raises(PcqError) as error, atomic(tmp_path / "a"):
        pytest.fail("work began")
    assert str(error.value) == f"{tmp_path}/a: cannot be written: permission denied. Choose another place."


NO_FOLDER = "{0}/{1}/a: cannot be written: there is no folder {0}/{1}. Make the folder, or choose another."


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such/a", NO_FOLDER.format("{0}", "no/such")),
        ("file/a", NO_FOLDER.format("{0}", "file")),
        ("folder", "{0}/folder: cannot be written: it is a folder. Name a file."),
        ("x" * 300, "{0}/" + "x" * 300 + ": cannot be written: file name too long. Choose another place."),
    ],
    ids=["no folder", "a file as folder", "a folder", "too long"],
)
def test_places_that_cannot_be_written(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PcqError) as error, atomic(tmp_path / name):
        pytest.fail("work began")
    assert str(error.value) == said.format(tmp_path)
    with pytest.raises(PcqError) as error:
        refuse_overwrite(tmp_path / name, ".safetensors")
    assert str(error.value) == said.format(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_link_to_nowhere_names_the_folder_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "no" / "a")
    with pytest.raises(PcqError, match=f"/a: cannot be written: there is no folder {tmp_path}/no"):
        refuse_overwrite(tmp_path / "a", ".safetensors")


def test_a_device_is_not_a_place_to_write() -> None:
    with pytest.raises(PcqError, match="not a regular file"), atomic("/dev/null"):
        pytest.fail("work began")


def test_a_link_is_written_through_and_modes_are_usual(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    with atomic(tmp_path / "link") as draft:
        assert draft.parent == tmp_path / "real"
        draft.write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "x"
    usual = tmp_path / "usual"
    usual.write_text("x")
    assert (tmp_path / "real" / "file").stat().st_mode == usual.stat().st_mode


def test_what_was_not_planned_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for tensors in ([("a", torch.ones(4))], [("a", torch.ones(3, dtype=torch.float64))], [("b", torch.ones(3))],
                    [("a", torch.ones(3)), ("a", torch.ones(3))]):  # fmt: skip
        with pytest.raises(CheckFailed, match="was planned"):
            write_artifact(path, header_of(a=(3,)), tensors)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="no value"):
        write_artifact(path, header_of(a=(3,)), [])


def test_a_wrong_size_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcq.checkpoint.writing.predicted_size", lambda header: 5000)
    with pytest.raises(CheckFailed, match="it took 276 bytes where 5,000 were predicted"):
        write_artifact(tmp_path / "a", header_of(a=(3,)), [("a", torch.ones(3))])
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_user_are_not_overwritten(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_artifact(ours, header_of(a=(3,)), [("a", torch.ones(3))])
    save_file({"a": torch.ones(3)}, theirs)
    refuse_overwrite(ours, ".safetensors")
    refuse_overwrite(tmp_path / "new", ".safetensors")
    refuse_overwrite(theirs, ".safetensors", force=True)
    with pytest.raises(PcqError, match="there is a file already, and pcq did not write it"):
        refuse_overwrite(theirs, ".safetensors")
    for force in (False, True):
        with pytest.raises(PcqError, match="the output is the input"):
            refuse_overwrite(tmp_path / "." / "theirs.safetensors", ".safetensors", inputs=[theirs], force=force)
        with pytest.raises(PcqError, match="the output is a file of the input folder"):
            refuse_overwrite(theirs, ".safetensors", inputs=[tmp_path], force=force)
    for name, said in (("new.onnx", "an ONNX file"), ("new.PT", "a checkpoint of torch.save")):
        with pytest.raises(
            PcqError, match=f"what is written here is a safetensors file, and the name is that of {said}"
        ):
            refuse_overwrite(tmp_path / name, ".safetensors", force=True)
    for suffix, said in ((".onnx", "an ONNX file"), (".png", "a PNG")):
        with pytest.raises(PcqError, match=f"here is {said}, and the name does not say so. Let it end in {suffix}"):
            refuse_overwrite(tmp_path / "new.v2", suffix, force=True)


def test_outputs_are_named_after_all_of_the_input() -> None:
    for name, then in (("net.w4.safetensors", "net.w4.onnx"), ("net.w4", "net.w4.onnx"), ("net", "net.onnx")):
        assert beside(Path("a.b") / name, ".onnx") == Path("a.b") / then


def test_what_pcq_wrote_is_known_by_its_mark(tmp_path: Path) -> None:
    """Not by a network's or a tensor's name, as torch's exporter writes it into every node's metadata."""
    onnx_file, png = tmp_path / "a.onnx", tmp_path / "a.png"
    node = onnx.helper.make_node("Identity", ["x"], ["y"], "pcq.demo.nets.ResNet/conv1")
    node.metadata_props.add(key="namespace", value="pcq.scheme: pcq.demo.nets.ResNet")
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "pcq.scheme", sides[:1], sides[1:]))
    onnx.save(model, onnx_file)
    png.write_bytes(PNG + chunk(b"tEXtSoftware\0pcq2") + chunk(b"tEXtComment\0pcq"))
    for path in (onnx_file, png):
        with pytest.raises(PcqError, match="pcq did not write it"):
            refuse_overwrite(path, path.suffix)
    model.metadata_props.add(key="pcq.scheme", value="{}")
    onnx.save(model, onnx_file)
    png.write_bytes(PNG + chunk(b"tEXtSoftware\0pcq"))
    for path in (onnx_file, png):
        refuse_overwrite(path, path.suffix)
        path.write_bytes(b"no such file")
        with pytest.raises(PcqError, match="pcq did not write it"):
            refuse_overwrite(path, path.suffix)


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(named: bytes) -> bytes:
    return (len(named) - 4).to_bytes(4, "big") + named + b"crc "


# Damage


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("good") / "a.safetensors"
    tensors = {"w": torch.randn(6, 5), "v": torch.randn(4, 5), "z": torch.randn(4, 5), "b": torch.ones(3)}
    kinds: dict[str, tuple[Quantizer, Rows]] = {"w": (Ternary(), Rows((6, 5))), "v": (KMeans(3), Rows((4, 5))),
                                                "z": (Uniform(4, symmetric=False), Rows((4, 5)))}  # fmt: skip
    write(path, tensors, kinds)
    return path


def change_metadata(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    """Rewrites the file with changed metadata."""

    def apply(source: Path, target: Path) -> None:
        with safe_open(source, "pt") as file:
            metadata = json.loads(file.metadata()["pcq"])
        change(metadata)
        save_file(load_file(source), target, metadata={"pcq": json.dumps(metadata)})

    return apply


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, Path], None]:
    """Rewrites the file with changed tensors."""

    def apply(source: Path, target: Path) -> None:
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(source)
        change(tensors)
        save_file(tensors, target, metadata=metadata)

    return apply


def cut(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:-1])


AGAIN = "Make it again with `pcq quantize`"


def entry(name: str, **change: Any) -> Callable[[Path, Path], None]:
    """Changes one weight's entry in the metadata."""
    return change_metadata(lambda metadata: metadata["tensors"][name].update(change))


def part(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path, Path], None]:
    """Changes one tensor of the file."""
    return change_tensors(lambda tensors: tensors.update({name: change(tensors[name]).clone()}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "the file is damaged: it has"),
        (change_metadata(lambda m: m.pop("format")), "its metadata does not say format and version"),
        (change_metadata(lambda m: m.pop("tensors")), f"the artifact is damaged: KeyError 'tensors'. {AGAIN}"),
        (entry("w", count=9), "'w' is packed in planes [3], not [3, 3]"),
        (entry("w", count=1), "the artifact is damaged: its metadata contradicts itself"),
        (entry("v", count=9), "3 levels where the header says 9"),
        (entry("w", shape=[6, 6]), "'w.codes' is uint8 [6], which does not fit 6 rows"),
        (entry("w", shape=[5, 6]), "'w.scale' is float32 [6], which does not fit 5 rows"),
        (entry("w", axis=7), "the artifact is damaged: its metadata contradicts itself"),
        (entry("w", dtype="float"), "'w' was of type float, which is none"),
        (entry("w", planes=[4]), "'w' is packed in planes [4], not [3]"),
        (change_metadata(lambda m: m["tensors"]["w"].pop("zero_point")), "KeyError 'zero_point'"),
        (change_metadata(lambda m: m["tensors"].update(x=m["tensors"]["w"])), "'x.codes' is missing"),
        (change_metadata(lambda m: m["tied"].update(y="nobody")), "'y' is tied to 'nobody', which is not in it"),
        (change_metadata(lambda m: m["tied"].update(b="w")), "'b' is tied to 'w', which is not in it"),
        (change_tensors(lambda t: t.pop("w.scale")), "'w.scale' is missing"),
        (part("w.scale", lambda t: t[:5]), "'w.scale' is float32 [5], which does not fit 6 rows"),
        (part("w.scale", lambda t: t * math.nan), "'w.scale' is not finite"),
        (part("w.scale", torch.neg), "'w.scale' is negative"),
        (part("v.levels", torch.neg), "'v.levels' does not ascend"),
        (part("v.levels", lambda t: t * math.inf), "'v.levels' is not finite"),
        (part("v.levels", lambda t: t[:2]), "'v.levels' is float32 [2, 3], which does not fit 4 rows"),
        (part("w.codes", lambda t: t.fill_(255)), "'w.codes' holds a byte that is not 5 digits of 3"),
        (part("w.codes", lambda t: t[:-1]), "'w.codes' is uint8 [5], which does not fit 6 rows"),
        (part("z.zero_point", lambda t: t + 0.3), "'z.zero_point' is no multiple of 1/2"),
        (part("z.zero_point", lambda t: t * math.nan), "'z.zero_point' is not finite"),
        (part("z.zero_point", torch.Tensor.float), "the artifact is damaged: 'z.zero_point' is torch.float32 [4]"),
    ],
)
def test_damaged_artifacts(damage: Callable[[Path, Path], None], said: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    damage(good, path)
    with pytest.raises(CheckFailed) as error:
        read_artifact(path)
    assert said in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert error.value.exit_code == 3


def test_what_is_not_an_artifact_of_this_version(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    change_metadata(lambda m: m.update(format=7, versions={"pcq": "9.1"}))(good, path)
    with pytest.raises(PcqError) as error:
        read_artifact(path)
    assert re.fullmatch(
        re.escape(str(path)) + r": written by pcq 9\.1 in format 7, and this pcq [\d.]+ reads format 1\. "
        r"Install pcq 9\.1 or newer\.", str(error.value))  # fmt: skip
    save_file({"w": torch.ones(2)}, path)
    assert is_artifact(good)
    assert not is_artifact(path)
    assert not is_artifact(tmp_path / "nothing")
    assert not is_artifact(tmp_path)
    with pytest.raises(PcqError, match="a plain safetensors file, not an artifact of pcq"):
        read_artifact(path)
    with pytest.raises(PcqError, match=r"there is no such file. Did you mean 'a.safetensors'"):
        read_artifact(tmp_path / "b.safetensors")
    with pytest.raises(PcqError, match="cannot be read: is a directory"):
        read_artifact(tmp_path)


@settings(deadline=None, max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["cut", "flip"]), bits=st.integers(1, 255))
def test_damage_anywhere_is_a_sentence(
    place: float, kind: str, bits: int, good: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(good.read_bytes())
    at = int(place * len(content))
    if kind == "cut":
        del content[at:]
    else:
        content[at] ^= bits
    path = tmp_path_factory.mktemp("damage") / "a.safetensors"
    path.write_bytes(content)
    try:
        read_artifact(path).state_dict()
    except PcqError as error:
        said = str(error)
    else:
        assert kind == "flip"
        return
    assert said.startswith(str(path))
