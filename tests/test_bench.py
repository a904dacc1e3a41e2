"""Files side by side: sizes are the file system's, ratios are to the first, what cannot run is said."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.torch import load_file, save_file

from pcq import cli, report
from pcq.cli import frame
from pcq.commands import Spread, bench, benching, export_onnx, export_pt2, inspect, quantize
from pcq.commands.benched import Benched, open_files
from pcq.commands.fresh import Fresh, measure
from pcq.demo import HERE
from pcq.errors import CheckFailed, PcqError
from pcq.plots import bench_figure
from pcq.progress import silent
from pcq.report.benching import _ratio, _sizes, _spread
from tests.test_onnx_input import convolutions, images, normal, save, words
from tests.test_scores import onnx_linear
from tests.test_several_inputs import Apart, _samples
from tests.test_tokens import Masked

DIGITS = HERE / "digits-resnet8.safetensors"
ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"


def test_float_artifact_and_onnx_side_by_side(tmp_path: Path) -> None:
    artifact = quantize(DIGITS, "ternary", out=tmp_path / "a.safetensors", arch=ARCH).path
    exported = export_onnx(artifact, tmp_path / "a.onnx", input_shape=(1, 8, 8)).path
    seen: list[tuple[str, int, int]] = []
    result = bench(
        [DIGITS, artifact, exported], arch=ARCH, batches=(1, 3), threads=(1,), rounds=4, processes=1,
        plot=tmp_path / "bench.png", progress=lambda *call: seen.append(call),
    )  # fmt: skip
    assert [row.runtime for row in result.rows] == ["torch", "torch", "ONNX Runtime"]
    assert [row.nbytes for row in result.rows] == [p.stat().st_size for p in (DIGITS, artifact, exported)]
    for row in result.rows:
        assert [(latency.batch, latency.threads) for latency in row.latencies] == [(1, 1), (3, 1)]
        assert row.load.median > 0
        assert row.peak.median >= 0
        for latency in row.latencies:
            assert 0 < latency.seconds.low <= latency.seconds.median <= latency.seconds.high
    assert [latency.ratio for latency in result.rows[0].latencies] == [1.0, 1.0]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    works = {word: [call for call in seen if call[0].startswith(word)] for word in ("open", "load", "batch", "done")}
    assert [call for calls in works.values() for call in calls] == seen
    assert [(done, total) for _, done, total in works["open"] + works["load"]] == [(0, 3), (1, 3), (2, 3)] * 2
    one, three = "batch 1, 1 thread", "batch 3, 1 thread"
    assert works["batch"] == [(one, done, 24) for done in range(6)] + [(three, done, 24) for done in range(6, 24, 3)]
    assert works["done"] == [("done", 24, 24)]


def test_memory_is_what_the_file_takes(tmp_path: Path) -> None:
    """16 million floats in a MatMul: 64 MB, and prepacked once more; a small model takes next to nothing."""
    paths = [
        save(tmp_path / f"{n}.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(n, n)},
             [images("n", n)], ["y"])
        for n in (16, 4096)
    ]  # fmt: skip
    small, large = (
        measure(p, "ONNX Runtime", {}, {"x": np.zeros((1, n), np.float32)})
        for p, n in zip(paths, (16, 4096), strict=True)
    )
    assert small.peak < 20e6
    assert 64e6 <= large.peak < 400e6
    with pytest.raises(PcqError, match="it does not run on x 1x17: .*INVALID_ARGUMENT.*Is --input right"):
        measure(paths[0], "ONNX Runtime", {}, {"x": np.zeros((1, 17), np.float32)})
    paths[0].write_bytes(paths[0].read_bytes()[:-100])
    with pytest.raises(CheckFailed, match="could not load and run it: .*INVALID_PROTOBUF"):
        measure(paths[0], "ONNX Runtime", {}, {"x": np.zeros((1, 16), np.float32)})


def test_models_of_several_inputs_and_fixed_batches(tmp_path: Path) -> None:
    path = words(tmp_path / "w.onnx")
    fixed = convolutions(tmp_path / "c.onnx")
    model = onnx.load(fixed)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, fixed)
    result = bench([convolutions(tmp_path / "d.onnx"), fixed], batches=(1, 2), threads=(1,), rounds=1, processes=1)
    assert [[latency.batch for latency in row.latencies] for row in result.rows] == [[1, 2], [2]]
    assert bench([path], batches=(2,), threads=(1,), rounds=1, processes=1).rows[0].latencies[0].batch == 2


def test_the_size_is_that_of_the_files_that_are_read(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.zeros(1000)}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w0": names[0], "w1": names[1]}}))
    (tmp_path / "optimizer.bin").write_bytes(bytes(50000))
    for path in (index, tmp_path):
        wanted = sum(part.stat().st_size for part in (index, *(tmp_path / name for name in names)))
        assert benching._size(Benched(path, "torch", {"arch": None}, ())) == wanted


def test_there_is_no_ratio_where_the_first_file_does_not_run(tmp_path: Path) -> None:
    onnx_linear(tmp_path / "two.onnx", 2)
    onnx_linear(tmp_path / "any.onnx", "n")
    result = bench([tmp_path / "two.onnx", tmp_path / "any.onnx"], batches=(2, 3), threads=(1,), rounds=2, processes=1)
    ratios = [[latency.ratio is None for latency in row.latencies] for row in result.rows]
    assert ratios == [[False], [False, True]]
    assert report.to_json(result)["rows"][1]["latencies"][1]["ratio"] is None
    frame.console().print(report.render(result))


def test_programs_say_what_they_take(tmp_path: Path) -> None:
    """Of several inputs, and of one number of samples, they run as ONNX files do."""
    example, batch = (torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6)), {0: torch.export.Dim.AUTO}
    path = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(Masked().eval(), example, dynamic_shapes=(batch, batch)), path)
    artifact = quantize(path, "w4", out=tmp_path / "two.safetensors").path
    fixed = tmp_path / "fixed.pt2"
    torch.export.save(torch.export.export(Masked().eval(), example), fixed)

    def batches(*paths: Path, **given: Any) -> list[list[int]]:
        result = bench(paths, batches=(1, 2), threads=(1,), rounds=1, processes=1, **given)
        return [[latency.batch for latency in row.latencies] for row in result.rows]

    assert batches(artifact, fixed, input_shape=(6,)) == [[1, 2], [2]]
    told = (
        "--input: no input takes samples of 7. Allowed: two.pt2: ids 6, mask 6. Give one input's shape, or leave it out"
    )
    with pytest.raises(PcqError, match=told):
        batches(path, input_shape=(7,))
    every = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    torch.export.save(
        torch.export.export(Masked().eval(), example, dynamic_shapes=(every, every)), tmp_path / "any.pt2"
    )
    for shape, taken in ((None, (3, 6)), ((7,), (3, 7))):
        (file,), found = open_files([tmp_path / "any.pt2"], [{}], shape, silent)
        assert {name: array.shape for name, array in (file.feed(3, found) or {}).items()} == dict.fromkeys(
            ("ids", "mask"), taken
        )
    with pytest.raises(PcqError, match=r"fixed.pt2: it takes 2 samples at once, no other number. Give --batch 2"):
        bench([path, fixed], batches=(1, 8), rounds=1)


def test_programs_that_take_their_inputs_by_name(tmp_path: Path) -> None:
    """In whatever order; exported to ONNX they compute the same, and are measured beside it."""
    given = {"mask": torch.ones(2, 6), "ids": torch.zeros(2, 6, dtype=torch.int64)}
    dims = {0: torch.export.Dim.AUTO}
    sizes = dict.fromkeys(("ids", "mask"), dims)
    torch.export.save(torch.export.export(Masked().eval(), (), given, dynamic_shapes=sizes), tmp_path / "named.pt2")
    artifact = quantize(tmp_path / "named.pt2", "w4", out=tmp_path / "named.safetensors").path
    with pytest.raises(PcqError, match="--input: the exported program says the shapes of its inputs"):
        export_onnx(artifact, tmp_path / "named.onnx", input_shape=(6,))
    packed = export_onnx(artifact, tmp_path / "named.onnx")
    assert packed.report.error < 1e-5
    paths = [tmp_path / "named.pt2", artifact, packed.path]
    for path in paths:
        (file,), _ = open_files([path], [{}], None, silent)
        feed = file.feed(3, None) or {}
        assert {name: (array.shape, array.dtype.name) for name, array in feed.items()} == {
            "ids": ((3, 6), "int64"), "mask": ((3, 6), "float32"),
        }  # fmt: skip
    result = bench(paths, batches=(1, 2), threads=(1,), rounds=1, processes=1)
    assert [[latency.batch for latency in row.latencies] for row in result.rows] == [[1, 2]] * 3


def test_networks_of_several_inputs_that_nobody_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(Masked().state_dict(), tmp_path / "two.pt")
    arch = "tests.test_tokens:Masked"
    told = r"the network takes 2 inputs, and the file does not say what they are: ids, mask. Allowed: .*\(.pt2\)"
    with pytest.raises(PcqError, match=told):
        bench([tmp_path / "two.pt"], arch=arch, input_shape=(6,))
    artifact = quantize(tmp_path / "two.pt", "w4", arch=arch, out=tmp_path / "two.safetensors").path
    with pytest.raises(PcqError, match=told):
        export_onnx(artifact, tmp_path / "two.onnx", input_shape=(6,))
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {}, [images("n", "t", name="a"), images("n", "t", name="b")], ["y"])
    with pytest.raises(PcqError, match="of its input 'a' is not known.*--input 128, if it is that of each input"):
        bench([path], rounds=1)
    row = bench([path], input_shape=(5,), batches=(2,), threads=(1,), rounds=1, processes=1).rows[0]
    assert row.latencies[0].batch == 2


def test_a_file_beside_it_says_what_a_networks_inputs_are(tmp_path: Path) -> None:
    torch.save(Apart().state_dict(), tmp_path / "apart.pt")
    arch = "tests.test_several_inputs:Apart"
    np.savez(tmp_path / "tokens.npz", **{name: array.numpy() for name, array in _samples().items()})
    artifact = quantize(tmp_path / "apart.pt", "w8", arch=arch, out=tmp_path / "apart.safetensors").path
    packed = export_onnx(artifact, example=f"npz:{tmp_path / 'tokens.npz'}").path  # of any length
    assert ("sizes are open; exported with", "input_ids 6, attention_mask 6") in inspect(packed).facts
    for length in (None, (9,)):
        files, shape = open_files([artifact, packed], [{"arch": arch}, {}], length, silent)
        feed = files[1].feed(2, shape) or {}
        assert [array.shape for array in feed.values()] == [(2, 9 if length else 6)] * 2
        assert feed["attention_mask"].all()
    files, shape = open_files([artifact, packed], [{"arch": arch}, {}], (6,), silent)
    mine, its = (file.feed(3, shape) or {} for file in files)
    assert list(mine) == ["input_ids", "attention_mask"]
    assert all(mine[name].shape == its[name].shape and mine[name].dtype == its[name].dtype for name in mine)
    few = {"arch": arch, "batches": (2,), "threads": (1,), "rounds": 1, "processes": 1}
    result = bench([artifact, packed], **few)
    rows = result.rows
    assert _sizes(result) == "input_ids 6, attention_mask 6"
    longer = replace(rows[1], inputs={"ids": (9,)})
    assert _sizes(replace(result, rows=(rows[0], longer))) == (
        "input_ids 6, attention_mask 6 (apart.safetensors); 9 (apart.onnx)"
    )
    assert [row.latencies[0].batch for row in rows] == [2, 2]
    model = onnx.load(packed)
    for told in ('{"input_ids": [6], "attention_mask": 3}', '{"input_ids": [2, 6]}', "[6", '{"input_ids": [-6]}'):
        next(entry for entry in model.metadata_props if entry.key == "pcq.usual").value = told
        onnx.save(model, tmp_path / "told.onnx")
        with pytest.raises(PcqError, match="--input 128, if it is that of each input, or data: --example SPEC"):
            bench([artifact, tmp_path / "told.onnx"], **few)


def test_real_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of networks of several inputs, with an argument between them that is not given, they are the only way."""
    torch.save(Apart().state_dict(), tmp_path / "apart.pt")
    arch, found = "tests.test_several_inputs:Apart", _samples()
    np.savez(tmp_path / "tokens.npz", **{name: array.numpy() for name, array in found.items()})
    spec = f"npz:{tmp_path / 'tokens.npz'}"
    artifact = quantize(tmp_path / "apart.pt", "w8", arch=arch, out=tmp_path / "apart.safetensors").path
    packed = export_onnx(artifact, example=spec).path
    program = export_pt2(artifact, tmp_path / "apart.pt2", example=spec).path
    paths = [tmp_path / "apart.pt", artifact, packed, program]
    files, shape = open_files(paths, [{"arch": arch}] * 2 + [{}] * 2, None, silent, spec, 3)
    for file in files:
        feed = file.feed(4, shape) or {}
        assert list(feed) == ["input_ids", "attention_mask"]
        for name, array in feed.items():
            taken = found[name].numpy()[[0, 16, 32, 0]]
            np.testing.assert_array_equal(array, taken)
            assert array.dtype == taken.dtype
    command = ["bench", *map(str, paths), "--arch", arch, "--example", spec, "--batch", "1", "--batch", "3"]
    assert cli.run([*command, "--threads", "1", "--rounds", "1", "--processes", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [[latency["batch"] for latency in row["latencies"]] for row in rows] == [[1, 3]] * 4


def test_samples_that_a_file_does_not_take(tmp_path: Path) -> None:
    def told(path: Path, what: str, **arrays: object) -> None:
        np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(PcqError, match=what):
            bench(path, arch=arch, example=f"npz:{tmp_path / 'x.npz'}", rounds=1)

    arch = None
    nets, nodes = convolutions(tmp_path / "net.onnx"), [helper.make_node("Add", ["a", "b"], ["y"])]
    two = save(tmp_path / "two.onnx", nodes, {}, [images("n", "t", name="a"), images("n", "t", name="b")], ["y"])
    x, ids = np.zeros((2, 3, 8, 8), np.float32), np.zeros((2, 4), np.int64)
    told(
        nets,
        r"net.onnx: it does not take samples of 3x9x8. Allowed: x 3x8x8. Give data of such",
        x=x[:, :, [0, *range(8)]],
    )
    told(nets, "net.onnx: the model takes floats as x, and the data has whole numbers", x=x.astype(np.int64))
    told(two, r"two.onnx: it has 2 inputs \(.*Give data with an array for each", x=ids)
    told(two, "two.onnx: its inputs are a, b, the data has a, c", a=ids, c=ids)
    torch.save(Masked().state_dict(), tmp_path / "two.pt")
    arch = "tests.test_tokens:Masked"
    told(tmp_path / "two.pt", r"two.pt: the network takes 2 inputs \(ids, mask\), and the data has one", x=ids)
    with pytest.raises(PcqError, match="--input: the example says the shapes of the inputs. Leave it out"):
        bench(nets, input_shape=(3, 8, 8), example="npz:x.npz")


def test_a_checkpoint_of_several_state_dicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the refusal recommends can be done, in the process that measures and in those it starts."""
    state = load_file(DIGITS)
    torch.save({"model": state, "ema": state}, tmp_path / "both.pt")
    command = [
        "bench",
        str(tmp_path / "both.pt"),
        str(DIGITS),
        "--arch",
        ARCH,
        "--input",
        "1x8x8",
        "--batch",
        "1",
        "--threads",
        "1",
    ]
    command += ["--rounds", "1", "--processes", "1"]
    assert cli.run(command) == 2
    assert "Choose one, such as --key model." in capsys.readouterr().err
    assert cli.run([*command, "--key", "model", "--json"]) == 0
    assert all(row["latencies"] for row in json.loads(capsys.readouterr().out)["rows"])


def test_mistakes(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, [images("n", 3, "h", "w")], ["y"])
    with pytest.raises(PcqError, match=r"the shape of its input 'x' is not known.*--input"):
        bench([path], rounds=1)
    with pytest.raises(PcqError, match="there is no such file"):
        bench([tmp_path / "none.onnx"])
    with pytest.raises(PcqError, match=r"--batch: \[0\] cannot be"):
        bench([path], batches=[0])
    with pytest.raises(PcqError, match=r"--batch: \[1.5\] cannot be. Allowed: whole numbers, 1 or more"):
        bench([path], batches=[1.5])  # type: ignore[list-item]
    with pytest.raises(PcqError, match=r"--processes: \[0\] cannot be"):
        bench([path], processes=0)
    for one in (path, str(path)):
        with pytest.raises(PcqError, match=r"the shape of its input 'x' is not known"):
            bench(one, rounds=1)
    with pytest.raises(PcqError, match="nothing to measure"):
        bench([])


@pytest.mark.parametrize("command", ["bench", "inspect", "quantize"])
def test_files_that_are_no_onnx(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Or not all of it: the same sentence from whatever command opens them."""
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "text.onnx").write_text("text")
    (tmp_path / "lfs.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    (tmp_path / "page.onnx").write_text("<!DOCTYPE html><html></html>")
    convolutions(tmp_path / "part.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    for name, says in (
        ("folder", "cannot be read (Is a directory)."),
        ("text", "is not an ONNX file."),
        ("lfs", "it is a git-lfs pointer, not the file itself. Run `git lfs pull` where it came from."),
        ("page", "it is a web page, not the file itself. The download answered with a page: fetch it again,"),
        ("part", f"its external data is missing: {tmp_path}/m.data. Put it beside the model."),
    ):
        path = tmp_path / f"{name}.onnx"
        assert cli.run([command, str(path), *(["-r", "w8"] if command == "quantize" else [])]) == 2
        assert f"{path}: {says}" in " ".join(capsys.readouterr().err.split())


def test_shapes_that_a_file_does_not_take(tmp_path: Path) -> None:
    """Said from what the file declares, before anything runs; what only a run shows, with the shapes that it had."""
    small, large = convolutions(tmp_path / "small.onnx"), tmp_path / "large.onnx"
    model = onnx.load(small)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 16
    onnx.save(model, large)
    for wrong in ((1, 8, 8), (3, 8), (3, 9, 9)):
        said = "x".join(map(str, wrong))
        told = rf"small.onnx: it does not take samples of {said}. Allowed: x 3x8x8. Give such a shape as --input"
        with pytest.raises(PcqError, match=told):
            bench([small], input_shape=wrong)
    with pytest.raises(
        PcqError, match=r"large.onnx: it does not take samples of 3x8x8, as another file does.*x 3x16x16"
    ):
        bench([small, large])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    inner = save(tmp_path / "inner.onnx", nodes, {"w": normal(5, 2)}, [images("n", "h", "w")], ["y"])
    assert bench([inner], input_shape=(4, 5), batches=(1,), threads=(1,), rounds=1, processes=1).rows[0].latencies
    with pytest.raises(PcqError, match=r"samples of 4. Allowed: x \?x\? \(\? is any size\)"):
        bench([inner], input_shape=(4,))
    with pytest.raises(PcqError, match=r"inner.onnx: it does not run on x 1x4x6: .*Is --input right\?"):
        bench([inner], input_shape=(4, 6))
    without = onnx.load(inner)
    without.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(without, inner)
    assert bench([inner], input_shape=(4, 5), batches=(1,), threads=(1,), rounds=1, processes=1).rows[0].latencies


def test_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)


def test_quartiles_are_told_in_the_unit_of_the_median() -> None:
    assert _spread(Spread(0.0131, 0.0117, 0.0143)) == "13.1 ms (11.7-14.3)"
    assert _spread(Spread(1.184, 0.98, 1.19)) == "1.18 s (0.98-1.19)"
    assert _spread(Spread(0.98, 0.0968, 1.234)) == "980 ms (96.8-1234)"
    assert _spread(Spread(0.9997, 0.9, 1.1)) == "1000 ms (900-1100)"
    assert [_ratio(n, 1000) for n in (1234, 10, 3.8)] == ["1.23x", "0.01x", "0.004x"]


def test_the_picture_has_a_bar_for_every_number() -> None:
    assert bench_figure([("a", 1e6, 0.1, 1e7, {"batch 1": 0.01}), ("b", 5e5, 0.2, 1e7, {})]).startswith(b"\x89PNG")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = convolutions(tmp_path / "m.onnx")
    arguments = ["bench", str(path), str(path), "--batch", "1", "--threads", "1", "--rounds", "3", "--processes", "1"]
    assert cli.run([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["bytes"] for row in answer["rows"]] == [path.stat().st_size] * 2
    assert set(answer["rows"][0]["latencies"][0]) == {"batch", "threads", "seconds", "ratio"}
    assert cli.run([*arguments, "--plot", str(tmp_path / "p.png")]) == 0
    shown = capsys.readouterr().out
    assert "batch 1, 1 thread" in shown
    assert "3 rounds and 1 process, files in turn; " in shown
    assert "1.00x" in shown
    assert "Samples: 3x8x8." in shown
    assert answer["rows"][0]["inputs"] == {"x": [3, 8, 8]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "p.png"]


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_measured_is_printed_whatever_becomes_of_the_plot(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(benching, "bench_figure", full)
    path = convolutions(tmp_path / "m.onnx")
    arguments = ["bench", str(path), "--batch", "1", "--threads", "1", "--rounds", "1", "--processes", "1"]
    assert cli.run([*arguments, "--plot", str(tmp_path / "p.png"), *["--json"] * as_json]) == 2
    out, err = capsys.readouterr()
    assert "p.png: no room left to write it" in err
    assert (json.loads(out)["rows"][0]["bytes"] == path.stat().st_size) if as_json else "batch 1, 1 thread" in out
    assert list(tmp_path.iterdir()) == [path]


def test_the_time_left_is_told_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the loading, 90 seconds a process, then of the runs, 6 seconds a sample, whatever loading took."""
    now = 0.0
    turn = benching._turn

    def loaded(*_: object) -> Fresh:
        nonlocal now
        now += 90
        return Fresh(1.0, 1.0, 1)

    def slow(runners: Any, feeds: Any, said: str) -> list[float | None]:
        nonlocal now
        now += 6 * len(feeds[0]["x"])
        return turn(runners, feeds, said)

    monkeypatch.setattr(frame, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(benching, "measure", loaded)
    monkeypatch.setattr(benching, "_turn", slow)
    path = str(convolutions(tmp_path / "m.onnx"))
    command = ["bench", path, path, "--batch", "1", "--batch", "8", "--threads", "1", "--rounds", "1"]
    assert cli.run(command) == 0
    loads = [(f"load m.onnx, process {1 + i // 2}", i, 6, 90 * (6 - i)) for i in range(1, 6)]
    ones = [("batch 1, 1 thread", i, 27, 6 * (27 - i)) for i in (1, 2)]
    eights = [("batch 8, 1 thread", i, 27, 6 * (27 - i)) for i in (3, 11, 19)]
    lines = [f"{said} ({done} of {total}, about {frame.duration(left)} left)"
             for said, done, total, left in loads + ones + eights]  # fmt: skip
    lines.insert(len(loads), "batch 1, 1 thread (0 of 27)")
    assert capsys.readouterr().err.splitlines() == [*lines, "done (27 of 27)"]


def test_inputs_are_the_same_for_every_file(tmp_path: Path) -> None:
    path = convolutions(tmp_path / "m.onnx")
    files, shape = open_files([path, path], [{}, {}], None, silent)
    a, b = (file.feed(4, shape) for file in files)
    assert a is not None
    assert b is not None
    np.testing.assert_array_equal(a["x"], b["x"])
    assert a["x"].shape == (4, 3, 8, 8)
