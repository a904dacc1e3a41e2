"""Fine-tuning: batches, loop, resuming, settings, the command."""

import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pcq
from pcq import cli
from pcq.atomic import held
from pcq.commands.calibrating import Calibration
from pcq.data import Data, Inputs, from_arrays, open_data
from pcq.data.dataset import Pixels, normalised
from pcq.demo import HERE
from pcq.demo.nets import BasicBlock
from pcq.errors import CheckFailed, PcqError
from pcq.methods import METHODS
from pcq.models import build
from pcq.proxconnect import ProxConnect, Telemetry
from pcq.recipe import Recipe, load_recipe, parse_recipe
from pcq.report import render
from pcq.report import to_json as report_of
from pcq.settings import Finetune, MethodName, changed, method_of, schedule_of
from pcq.train import augment, batchnorm, graphs, looks, report, run, saving
from pcq.train.batches import Batches, generator, own_randomness
from pcq.train.job import Epoch, Trained, settled
from pcq.train.splits import open_splits
from pcq.train.step import TEMPERATURE, logits, loss_of, make_optimizer, rate, update
from pcq.train.stopping import Interrupted

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
DIGITS = HERE / "digits-resnet8.safetensors"
SHORT = 12
"""Steps of a run of which only the mechanics are looked at."""


class Small(nn.Module):
    """A residual network so small that a step is soon done; its layers' names are those of the demo's networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = (nn.Sequential(BasicBlock(4, wide, stride)) for wide, stride in ((4, 1), (6, 2)))
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def small(folder: Path) -> Path:
    """Its checkpoint in ``folder``, untrained."""
    path = folder / "small.safetensors"
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(Small().state_dict(), path)
    return path


def tune(out: Path, recipe: str = "ternary", **options: Any) -> pcq.commands.FinetuneResult:
    """A run of which only the mechanics are looked at."""
    options = {"steps": SHORT, **options}
    return pcq.finetune(small(out.parent), recipe, "digits", out=out, arch=f"{__name__}:Small", **options)


def tune_digits(out: Path, **options: Any) -> pcq.commands.FinetuneResult:
    """A run of the trained network."""
    return pcq.finetune(DIGITS, "ternary", "digits", out=out, arch=ARCH, **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> pcq.commands.FinetuneResult:
    """A short run from beginning to end."""
    return tune(tmp_path_factory.mktemp("straight") / "x.safetensors")


class Tied(nn.Module):
    """A head that has its weight from an embedding, and comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.zhead, self.emb, self.mid = nn.Linear(8, 12, bias=False), nn.Embedding(12, 8), nn.Linear(8, 8)
        self.emb.weight = self.zhead.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.zhead(F.relu(self.mid(self.emb(x).mean(1))))
        return logits


@pytest.mark.parametrize("kept", ["emb.weight", "zhead.weight", None])
@pytest.mark.parametrize("calibrated", [False, True])
def test_tied_weights_by_any_of_their_names(kept: str | None, calibrated: bool, tmp_path: Path) -> None:
    """safetensors keeps one of them, which need not be the network's first; ``torch.save`` keeps both."""
    torch.manual_seed(0)
    state = Tied().state_dict()
    if kept is None:
        torch.save(state, tmp_path / "t.pt")
    else:
        save_file({name: t for name, t in state.items() if name in (kept, "mid.weight", "mid.bias")}, tmp_path / "t.pt")
        (tmp_path / "t.pt").rename(tmp_path / "t.safetensors")
    model = next(tmp_path.glob("t.*"))
    x = np.random.default_rng(0).integers(0, 12, (60, 5))
    np.savez(tmp_path / "x.npz", x=x, y=x[:, 0])
    data = f"npz:{tmp_path / 'x.npz'}"
    asked = Calibration(data, refine=0) if calibrated else None
    for frozen in ([], ["emb.weight"]):
        got = pcq.finetune(
            model, "ternary-all", data, arch=f"{__name__}:Tied", steps=2, calibration=asked, force=True,
            out=tmp_path / "out.safetensors", overrides=[f"finetune.freeze={frozen}", "finetune.batch=16"],
        )  # fmt: skip
        assert pcq.evaluate(got.path, data).scores.n == 60
        stored = {name for name in load_file(got.path) if name.endswith(".codes")}
        assert stored == {f"{kept or 'zhead.weight'}.codes", "mid.weight.codes"}
    if calibrated:
        made = pcq.quantize(model, "ternary-all", arch=f"{__name__}:Tied", calibration=asked, out=tmp_path / "q")
        assert f"{kept or 'zhead.weight'}.codes" in load_file(made.path)


# -- the command -------------------------------------------------------------------------------------------------------


def test_it_wins_back_what_one_shot_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    line = f"finetune {DIGITS} -r ternary -d digits --arch {ARCH} --epochs 4 -o {path} --json"
    assert cli.run(line.split()) == 0
    got = json.loads(capsys.readouterr().out)
    scores = {row["weights"]: row["test"]["top1"] for row in got["rows"]}
    assert scores["float"] == 99.5  # pcq/demo/digits-resnet8.json
    assert scores["one-shot"] < 50
    assert scores["fine-tuned"] > 95
    assert got["bytes_after"] == path.stat().st_size
    assert got["recipe"]["finetune"]["method"] == "proxconnect"
    assert pcq.evaluate(path, "digits").scores.top1 == scores["fine-tuned"]
    lines = [json.loads(text) for text in (tmp_path / "x.metrics.jsonl").read_text().splitlines()]
    assert [each["kind"] for each in lines].count("epoch") == 4 == len(got["epochs"])
    assert lines[-1]["kind"] == "batchnorm"
    assert not (tmp_path / "x.resume").exists()
    exported = pcq.export_onnx(path, input_shape=(1, 8, 8))
    assert pcq.evaluate(exported.path, "digits").scores.top1 == scores["fine-tuned"]


def test_scoring_takes_no_more_samples_at_once_than_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], Small.forward

    def counted(self: Small, x: Tensor) -> Tensor:
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Small, "forward", counted)
    tune(tmp_path / "x.safetensors", steps=2, overrides=("finetune.batch=16",))
    assert len(seen) > 20
    assert max(seen) == 16


def test_the_table_is_printed(straight: pcq.commands.FinetuneResult) -> None:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(render(straight))
    text = captured.get()
    for said in ("float", "one-shot", "fine-tuned", "BatchNorm estimated anew", "as predicted to the byte"):
        assert said in text
    assert json.dumps(report_of(straight))


def test_the_file_is_what_the_result_says(straight: pcq.commands.FinetuneResult) -> None:
    stored = pcq.read_artifact(straight.path)
    assert Recipe.from_json(stored.recipe).finetune == straight.settings
    assert set(stored.quantized) == {entry.parameter.name for entry in straight.planned.plan.quantized}
    for weight in stored.quantized.values():
        levels = weight.grid.levels()
        rows = weight.rows.split(weight.dequantize())
        assert bool((rows[:, :, None] == levels[:, None, :]).any(2).all())
    assert straight.rows[2].val.n == 200
    assert straight.rows[2].test is not None
    assert straight.rows[2].test.n == 400


def test_the_input_is_left_alone_and_so_are_the_callers_random_numbers(tmp_path: Path) -> None:
    start = small(tmp_path)
    before = start.read_bytes()
    torch.manual_seed(1)
    random.seed(1)
    wanted = torch.rand(3), random.random()
    torch.manual_seed(1)
    random.seed(1)
    tune(tmp_path / "x.safetensors", steps=2)
    assert torch.equal(torch.rand(3), wanted[0])
    assert random.random() == wanted[1]
    assert start.read_bytes() == before


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_the_same_recipe_by_one_word(method: str, tmp_path: Path) -> None:
    result = tune(tmp_path / "x.safetensors", method=method, steps=6)
    assert result.settings.method == method
    assert result.telemetry.on_levels == 1 or method == "posttraining"
    assert (result.unquantized is not None) == (method == "posttraining")
    stored = pcq.read_artifact(result.path)
    assert all(weight.grid.count in (3, 256) for weight in stored.quantized.values())


def test_posttraining_is_float_training_rounded_once(tmp_path: Path) -> None:
    result = tune_digits(tmp_path / "x.safetensors", method="posttraining", steps=6)
    assert result.unquantized is not None
    assert result.unquantized > 95


def test_same_run_twice_and_another_seed(straight: pcq.commands.FinetuneResult, tmp_path: Path) -> None:
    again = tune(tmp_path / "a.safetensors")
    assert again.path.read_bytes() == straight.path.read_bytes()
    other = tune(tmp_path / "b.safetensors", seed=1)
    assert other.path.read_bytes() != straight.path.read_bytes()


def test_levels_fixed_or_refitted(tmp_path: Path) -> None:
    fixed = tune(tmp_path / "a.safetensors", overrides=["finetune.refit=0"])
    moved = tune(tmp_path / "b.safetensors", overrides=["finetune.refit=1"])
    oneshot = pcq.quantize(small(tmp_path), "ternary", arch=f"{__name__}:Small", out=tmp_path / "c.safetensors")
    name = "layer2.0.conv1.weight"
    first, last, start = (pcq.read_artifact(r.path).quantized[name].grid.scale for r in (fixed, moved, oneshot))
    assert first is not None
    assert last is not None
    assert start is not None
    assert torch.equal(first, start)
    assert not torch.equal(last, start)


def test_frozen_weights_are_rounded_once(tmp_path: Path) -> None:
    tuned = tune(tmp_path / "a.safetensors", overrides=['finetune.freeze=["layer2.*", "bn1.*"]'])
    oneshot = pcq.quantize(small(tmp_path), "ternary", arch=f"{__name__}:Small", out=tmp_path / "b.safetensors")
    a, b = (pcq.read_artifact(r.path).state_dict() for r in (tuned, oneshot))
    assert all(torch.equal(a[name], b[name]) for name in a if name.startswith("layer2.") and "running" not in name
               and "num_batches" not in name)  # fmt: skip
    assert torch.equal(a["bn1.weight"], b["bn1.weight"])
    assert not torch.equal(a["layer1.0.conv1.weight"], b["layer1.0.conv1.weight"])
    assert not torch.equal(a["layer1.0.bn1.weight"], b["layer1.0.bn1.weight"])


def test_from_scratch_starts_from_random_weights(tmp_path: Path) -> None:
    result = tune_digits(tmp_path / "x.safetensors", scratch=True, steps=2)
    assert result.epochs[-1].score < 50
    assert result.rows[0].val.top1 == 99.5


def test_distillation_with_and_without_labels(tmp_path: Path) -> None:
    result = tune(tmp_path / "x.safetensors", distill=0.5, steps=4)
    assert result.settings.distill == 0.5
    own = tmp_path / "own.py"
    own.write_text(
        "from pcq.data import open_data\n\n\ndef unlabelled(split):\n"
        "    data = open_data('digits', split)\n    return data.take(range(data.n))\n"
    )
    result = pcq.finetune(DIGITS, "ternary", f"{own}:unlabelled", out=tmp_path / "y.safetensors", arch=ARCH, steps=30)
    assert result.settings.distill == 1
    assert [row.weights for row in result.rows] == ["one-shot", "fine-tuned"]
    before, after = (row.test for row in result.rows)
    assert before is not None
    assert after is not None
    assert before.top1 is after.top1 is None
    assert before.agreement is not None
    assert after.agreement is not None
    assert before.agreement < 50 < 90 < after.agreement


def test_layers_that_an_own_network_does_not_train_are_rounded_once(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from pcq.demo.nets import resnet8\n\n\ndef net():\n    made = resnet8(num_classes=10, in_channels=1)\n"
        "    made.conv1.weight.requires_grad_(False)\n    return made\n"
    )
    asked = {"steps": 3, "overrides": ["finetune.refit=0"]}
    result = pcq.finetune(DIGITS, "ternary-all", "digits", arch=f"{own}:net", out=tmp_path / "a.safetensors", **asked)
    once = pcq.quantize(DIGITS, "ternary-all", out=tmp_path / "b.safetensors")
    tuned, rounded = (load_file(path) for path in (result.path, once.path))
    kept = [name for name in rounded if name.startswith("conv1.weight")]
    assert kept
    assert all(torch.equal(tuned[name], rounded[name]) for name in kept)


def test_a_run_on_data_that_augments_itself_goes_on_in_the_same_bytes(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import random\nimport numpy as np\nimport torch\nfrom pcq.data import open_data\n\n\nclass Set:\n"
        "    def __init__(self):\n        data = open_data('digits', 'train')\n"
        "        self.x, self.y = data.take(range(300)), data.labels\n\n    def __len__(self):\n        return 300\n\n"
        "    def __getitem__(self, i):\n        noise = torch.randn(1, 8, 8) + np.random.rand() + random.random()\n"
        "        return self.x[i] + 0.1 * noise, int(self.y[i])\n"
    )
    asked = {"arch": ARCH, "steps": 6, "overrides": ["finetune.batch=32"]}

    def dying(stage: str, done: int, total: int) -> None:
        if done == 4:
            raise ZeroDivisionError

    whole = pcq.finetune(DIGITS, "ternary", f"{own}:Set", out=tmp_path / "a.safetensors", **asked)
    out = tmp_path / "b.safetensors"
    with pytest.raises(ZeroDivisionError):
        pcq.finetune(DIGITS, "ternary", f"{own}:Set", out=out, save_every=3, progress=dying, **asked)
    random.seed()
    np.random.seed()
    torch.seed()
    result = pcq.finetune(DIGITS, "ternary", f"{own}:Set", out=out, resume=True, **asked)
    assert result.resumed_at == 3
    assert result.path.read_bytes() == whole.path.read_bytes()


def test_fixed_levels_of_another_size_than_the_weights_are_told(tmp_path: Path) -> None:
    for recipe, sets, told in (
        ("paper-ternary", [], True),
        ("paper-ternary", ["rules.0.levels.scale=mse"], False),
        ("paper-binary", [], False),
        ("ternary-all", [], False),
    ):
        sets = [*sets, "finetune.refit=0"]
        result = tune(tmp_path / "x.safetensors", recipe, steps=2, overrides=sets, force=True)
        assert result.rows[-1].val.top1 is not None
        assert result.rows[-1].val.top1 < 50
        assert any("finetune.refit: 0" in note for note in result.warnings) == ("paper" not in recipe or bool(sets[1:]))
        assert any("next to nothing was kept of" in note for note in result.warnings) == told


def test_own_network_and_own_data(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), "
        "nn.Linear(16, 3))\n\n\ndef data():\n    x = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))\n"
        "    return x, x[:, :3].argmax(1)\n"
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    result = pcq.finetune(
        tmp_path / "net.pt", "w4", f"{own}:data", arch=f"{own}:net", steps=200, overrides=["finetune.lr=0.03"]
    )
    assert result.path.name == "net.w4.ft.safetensors"
    assert result.batchnorm is None
    assert result.rows[0].test is None
    assert any("held out" in note for note in result.warnings)
    assert result.rows[2].val.n == 60
    assert result.rows[2].val.top1 is not None
    assert result.rows[2].val.top1 > 85


class Looked(nn.Module):
    """Embeddings whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bags = nn.Embedding(30, 4, sparse=True), nn.EmbeddingBag(30, 4, sparse=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.words(x).mean(1), self.bags(x)], 1))  # type: ignore[no-any-return]


def data_of_words() -> tuple[Tensor, Tensor]:
    x = torch.randint(30, (60, 5), generator=torch.Generator().manual_seed(0))
    return x, x[:, 0] % 2


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_embeddings_of_sparse_gradients_are_trained(optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(Looked().state_dict(), tmp_path / "x.safetensors")
    how = [f"finetune.optimizer={optimizer}", "finetune.clip=1", "finetune.batch=16"]
    arch, data = f"{__file__}:Looked", f"{__file__}:data_of_words"
    result = pcq.finetune(tmp_path / "x.safetensors", "ternary-all", data, arch=arch, steps=4, overrides=how)
    assert result.telemetry.on_levels == 1


def test_labels_need_an_output_for_each_class(tmp_path: Path) -> None:
    one = nn.Sequential(nn.Linear(6, 1))
    save_file(one.state_dict(), tmp_path / "x.safetensors")
    own = tmp_path / "own.py"
    own.write_text(
        "import numpy as np\nfrom torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Linear(6, 1))\n\n\n"
        "def data():\n    return np.ones((60, 6), 'f'), np.zeros(60, int)\n"
    )
    model, data, arch = tmp_path / "x.safetensors", f"{own}:data", f"{own}:net"
    with pytest.raises(PcqError, match=r"the data has labels and the network one output.*Leave the labels out"):
        pcq.finetune(model, "ternary-all", data, arch=arch, steps=1)


def test_theory_has_no_start() -> None:
    with pytest.raises(PcqError, match=r"anneal_start is 0.2, which has to be 0 where anneal is theory"):
        changed(Finetune(anneal="theory"), anneal_start=0.2)


def test_a_number_of_minutes_is_made_a_number_of_steps(tmp_path: Path) -> None:
    result = tune(tmp_path / "x.safetensors", steps=None, minutes=0.03)
    assert 1 <= result.steps < 1000


def test_an_interruption_of_the_last_scores_says_that_the_artifact_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pcq.commands.finetuning, "table", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    path = tmp_path / "x.safetensors"
    line = f"finetune {small(tmp_path)} -r ternary -d digits --arch {__name__}:Small --steps 1 -o {path}"
    assert cli.run(line.split()) == 128 + signal.SIGTERM
    said = f"pcq: interrupted; {path} was written, its scores were not finished: `pcq eval {path} --data 'digits'`\n"
    assert capsys.readouterr().err.endswith(said)
    assert path.is_file()
    assert not path.with_suffix(".resume").exists()


def test_minutes_count_all_that_a_step_and_a_look_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after, scored = ProxConnect._after, looks.scored
    step, look = 0.04, 0.2

    def slow(seconds: float, function: Any) -> Any:
        return lambda *args, **options: (time.sleep(seconds), function(*args, **options))[1]

    monkeypatch.setattr(ProxConnect, "_after", slow(step, after))
    monkeypatch.setattr(looks, "scored", slow(look, scored))
    result = tune(tmp_path / "x.safetensors", steps=None, minutes=0.05)
    assert result.steps * (step + look / 9) < 0.05 * 60


def test_the_imagenet_recipe_on_a_generated_folder(tmp_path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 10), ("val", 2)):
        for name, red in (("a", 0), ("b", 200)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (44, 40), (red, 10 * i, 0)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    net = build("torchvision:resnet18?num_classes=2")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    result = pcq.finetune(
        tmp_path / "net.pth",
        "imagenet-ternary",
        f"folder:{tmp_path}?size=32",
        arch="torchvision:resnet18?num_classes=2",
        steps=2,
        overrides=["finetune.batch=8"],
    )
    assert result.planned.arch == "torchvision:resnet18?num_classes=2"
    assert result.settings.augment == "resized-crop"
    assert result.settings.optimizer == "sgd"
    assert [row.weights for row in result.rows] == ["float", "one-shot", "fine-tuned"]
    assert result.rows[2].val.n == 2
    assert result.rows[2].test is not None
    assert result.rows[2].test.n == 4
    assert result.bytes_before > 12 * result.bytes_after


# -- going on ----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a run that ends without any warning."""


def dying(at: int) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("epoch") and done == at:
            raise Killed

    return progress


@pytest.mark.parametrize(("every", "at"), [(1, 5), (4, 11), (5, 12)])
def test_resumed_is_uninterrupted(every: int, at: int, straight: pcq.commands.FinetuneResult, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(Killed):
        tune(path, save_every=every, progress=dying(at))
    assert not path.exists()
    result = tune(path, save_every=every, resume=True)
    assert result.resumed_at == (at - 1) // every * every
    assert path.read_bytes() == straight.path.read_bytes()
    mine, theirs = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in (result.metrics, straight.metrics)
    )
    for line in (*mine, *theirs):
        line.pop("seconds", None)
    assert mine == theirs


@pytest.mark.parametrize("method", ["reverse", "proxquant", "bnn++", "posttraining"])
def test_resumed_is_uninterrupted_by_other_methods(method: str, tmp_path: Path) -> None:
    common: dict[str, Any] = {"method": method, "steps": 8, "overrides": ["finetune.optimizer=sgd"]}
    wanted = tune(tmp_path / "a.safetensors", **common)
    with pytest.raises(Killed):
        tune(tmp_path / "b.safetensors", save_every=3, progress=dying(5), **common)
    got = tune(tmp_path / "b.safetensors", resume=True, **common)
    assert got.path.read_bytes() == wanted.path.read_bytes()


def _child(path: str) -> None:
    torch.set_num_threads(1)
    tune(Path(path), save_every=2, resume=Path(path).with_suffix(".resume").exists())


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9, whatever the run is doing: it goes on, and the file is that of a run that was left alone."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")  # CUDA is not forked
    chance = random.Random(7)
    wanted, path = tmp_path / "wanted.safetensors", tmp_path / "x.safetensors"
    start = time.perf_counter()
    child = context.Process(target=_child, args=(str(wanted),))
    child.start()
    child.join()
    assert child.exitcode == 0
    whole = time.perf_counter() - start
    for name in (".x.0123abcd.partial.resume", ".x.89ab4567.partial.safetensors"):  # as a kill while saving leaves them
        (tmp_path / name).write_bytes(b"half")
    killed = 0
    while not path.exists():
        child = context.Process(target=_child, args=(str(path),))
        child.start()
        child.join(chance.uniform(0.3, 0.9) * whole if killed < 3 else 60)
        if child.is_alive():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            killed += 1
    assert killed >= 1
    assert path.read_bytes() == wanted.read_bytes()
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".resume" or ".partial" in file.name] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, straight: pcq.commands.FinetuneResult, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    handler = signal.getsignal(number)

    def progress(stage: str, done: int, total: int) -> None:
        if done == 7:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=rf"{number.name} after 7 of 12 steps.*x\.resume.*--resume"):
        tune(path, progress=progress)
    assert signal.getsignal(number) is handler
    assert not path.exists()
    with pytest.raises(PcqError, match=r"a run was interrupted here.*--resume"):
        tune(path)
    result = tune(path, resume=True)
    assert result.resumed_at == 7
    assert path.read_bytes() == straight.path.read_bytes()


def test_the_command_line_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pcq.cli.frame import answers

    def command() -> None:
        raise Interrupted("stopped; go on with --resume.")

    with pytest.raises(typer.Exit) as stopped:
        answers(command)()
    assert stopped.value.exit_code == 130
    assert "go on with --resume" in capsys.readouterr().err


def test_changed_data_is_refused(tmp_path: Path) -> None:
    """Not only at the ends of a split."""
    x = np.random.default_rng(0).normal(size=(300, 1, 8, 8)).astype(np.float32)
    options: dict[str, Any] = {"arch": f"{__name__}:Small", "out": tmp_path / "x.safetensors", "steps": SHORT}
    options |= {"save_every": 2, "distill": 1.0}
    np.savez(tmp_path / "d.npz", x=x)
    with pytest.raises(Killed):
        pcq.finetune(small(tmp_path), "ternary", f"npz:{tmp_path}/d.npz", progress=dying(3), **options)
    x[100:120] = 0
    np.savez(tmp_path / "d.npz", x=x)
    with pytest.raises(PcqError, match="other data"):
        pcq.finetune(small(tmp_path), "ternary", f"npz:{tmp_path}/d.npz", resume=True, **options)


@pytest.mark.parametrize("calibration", [None, "digits"])
def test_a_budget_chooses_the_levels_first(calibration: str | None, tmp_path: Path) -> None:
    recipe = tmp_path / "b.yaml"
    recipe.write_text("pcq: 1\nbudget: 2.5bits\n" + RULES.removeprefix("pcq: 1\n"))
    made = pcq.finetune(
        small(tmp_path), recipe, "digits", arch=f"{__name__}:Small", steps=SHORT, calibration=calibration,
        samples=calibration and 32,
    )  # fmt: skip
    assert made.allocation is not None
    assert made.path == tmp_path / "small.b-2.5bits.ft.safetensors"
    assert 2.4 < made.bits <= 2.5
    assert made.planned.recipe.to_json() == pcq.read_artifact(made.path).recipe
    assert report_of(made)["allocation"]["budget"] == "2.5bits"


def test_a_budget_that_is_too_small_names_only_what_there_is(tmp_path: Path) -> None:
    """It had sent users to `--dry-run`, which `finetune` does not have."""
    recipe = tmp_path / "b.yaml"
    rules = '[{match: fc.weight, keep: small}, {match: "*", levels: ternary}]'
    recipe.write_text(f"pcq: 1\nbudget: 1kB\nrules: {rules}\n")
    with pytest.raises(PcqError, match="counts too: `pcq quantize --dry-run` lists it"):
        tune(tmp_path / "x.safetensors", str(recipe))


def test_a_run_of_a_budget_goes_on(tmp_path: Path) -> None:
    budget = [f"budget={small(tmp_path).stat().st_size}B"]
    with pytest.raises(Killed):
        tune(tmp_path / "x.safetensors", overrides=budget, save_every=2, progress=dying(3))
    again = tune(tmp_path / "x.safetensors", overrides=budget, resume=True)
    assert again.resumed_at == 2
    assert again.path.read_bytes() == tune(tmp_path / "y.safetensors", overrides=budget).path.read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"recipe": "binary"}, "another recipe"),
        ({"overrides": ["finetune.lr=0.5"]}, "finetune.lr None, now 0.5"),
        ({"seed": 3}, "finetune.seed 0, now 3"),
        ({"scratch": True}, "another model"),
    ],
)
def test_another_run_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(Killed):
        tune(path, save_every=2, progress=dying(3))
    with pytest.raises(PcqError, match=says):
        tune(path, resume=True, **change)
    assert tune(path, force=True, **change).resumed_at is None


def test_nothing_to_resume_and_a_damaged_state(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(PcqError, match="no interrupted run"):
        tune(path, resume=True)
    path.with_suffix(".resume").write_bytes(b"PK\x03\x04 not a state")
    with pytest.raises(CheckFailed, match="cannot be read"):
        tune(path, resume=True)


def test_two_runs_do_not_write_the_same_files(tmp_path: Path) -> None:
    """They had mixed their measurements, and the first to end had removed what the other could go on from."""
    out, metrics = tmp_path / "x.safetensors", tmp_path / "x.metrics.jsonl"
    with held(metrics):
        for options in ({}, {"force": True}, {"resume": True}):
            with pytest.raises(PcqError, match=r"x\.metrics\.jsonl: another run is writing it"):
                tune(out, **options)
        assert metrics.exists()
    assert not metrics.exists()  # nothing was written
    tune(out, steps=1)
    assert metrics.stat().st_size
    tune(out, steps=1)


def test_metrics_are_cut_where_the_state_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = saving.Metrics(path)
    first.write({"a": 1})
    kept = first.flushed()
    first.write({"a": 2})
    first.close()
    second = saving.Metrics(path, kept)
    second.write({"a": 3})
    second.close()
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_told_by_the_file_that_it_is_full_for() -> None:
    measured = saving.Metrics(Path("/dev/full"))
    with pytest.raises(PcqError, match="/dev/full: no room left to write it"):
        measured.write({"a": 1})
    measured.close()


def test_a_quota_is_no_room_either(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for one: torch's own error does not say that it was that, and the disk has room."""
    path, state = tmp_path / "x.resume", {"a": torch.zeros(50_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(PcqError, match="x.resume: no room left to write it. Free some space"):
            saving.save(path, state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
    saving.save(path, state, {})
    assert torch.equal(saving.load(path, {})["a"], state["a"])


def test_a_full_disk_leaves_the_last_save(
    straight: pcq.commands.FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, save, states = tmp_path / "x.safetensors", saving.save, list[object]()

    def filling(*given: Any) -> None:
        states.append(given)
        if len(states) > 1:
            raise PcqError("no room left to write it", where="x", todo="Free some space, or choose another disk")
        save(*given)

    monkeypatch.setattr(saving, "save", filling)
    with pytest.raises(PcqError, match="another disk; then the same command with --resume goes on from the last save"):
        tune(path, save_every=4)
    monkeypatch.undo()
    again = tune(path, resume=True)
    assert again.resumed_at == 4
    assert again.path.read_bytes() == straight.path.read_bytes()


def vectors(features: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_what_to_do_where_a_batch_of_one_has_no_statistics(tmp_path: Path) -> None:
    torch.save(vectors().state_dict(), tmp_path / "m.pt")
    np.savez(
        tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32), y=np.arange(20) % 3
    )
    asked: dict[str, Any] = {"data": f"npz:{tmp_path / 'd.npz'}", "arch": f"{__name__}:vectors", "steps": 2}
    with pytest.raises(PcqError, match=r"give a larger one \(finetune.batch\), or finetune.mode: eval"):
        pcq.finetune(tmp_path / "m.pt", "ternary-all", overrides=["finetune.batch=1"], **asked)
    alone = ["finetune.batch=1", "finetune.mode=eval"]
    assert pcq.finetune(tmp_path / "m.pt", "ternary-all", overrides=alone, **asked).path.is_file()


def test_a_run_that_cannot_begin_leaves_the_last_ones_measurements(tmp_path: Path) -> None:
    out, metrics = tmp_path / "x.safetensors", tmp_path / "x.metrics.jsonl"
    np.savez(tmp_path / "d.npz", x=np.zeros((20, 3, 9, 9), np.float32), y=np.zeros(20, np.int64))
    for before in (None, "the last run's\n"):
        if before is not None:
            metrics.write_text(before)
        with pytest.raises(PcqError, match="the network does not take them"):
            pcq.finetune(small(tmp_path), "ternary", f"npz:{tmp_path / 'd.npz'}", out=out, arch=f"{__name__}:Small")
        assert (metrics.read_text() if metrics.exists() else None) == before
    with pytest.raises(PcqError, match=r"--save-every: 0 steps cannot be\. Allowed: 1 or more"):
        tune(out, save_every=0)


class Named(Small):
    """Gives its logits by name, behind something else; the last layer reads that."""

    def forward(self, x: Tensor) -> Any:
        seen: list[Tensor] = []
        with self.fc.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
            out = super().forward(x)
        return {"hidden": seen[0], "logits": out}


@pytest.mark.parametrize("more", [{}, {"overrides": ["finetune.distill=0.5"]}])
def test_logits_in_a_dictionary_are_what_is_trained_and_scored(more: dict[str, Any], tmp_path: Path) -> None:
    """Its first entry had been."""
    named = pcq.finetune(
        small(tmp_path), "ternary", "digits", out=tmp_path / "x.safetensors", arch=f"{__name__}:Named", steps=2, **more
    )
    plain = tune(tmp_path / "y.safetensors", steps=2, **more)
    assert [row.test for row in named.rows] == [row.test for row in plain.rows]
    assert load_file(named.path).keys() == load_file(plain.path).keys()
    for name, tensor in load_file(plain.path).items():
        assert torch.equal(tensor, load_file(named.path)[name]), name


class Silent(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 1:
            raise AssertionError
        return super().forward(x)


def test_a_network_that_refuses_its_samples_without_a_word_is_an_error_with_words(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((20, 3, 8, 8), np.float32), y=np.zeros(20, np.int64))
    with pytest.raises(PcqError, match="samples of 3x8x8: the network does not take them: AssertionError"):
        pcq.finetune(
            small(tmp_path), "ternary", f"npz:{tmp_path / 'd.npz'}", out=tmp_path / "x", arch=f"{__name__}:Silent"
        )


def test_few_samples_and_one_step_are_called_that(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(20) % 10)
    arch, out = f"{__name__}:Small", tmp_path / "x.safetensors"
    result = pcq.finetune(small(tmp_path), "ternary", f"npz:{tmp_path / 'd.npz'}", out=out, arch=arch, steps=1)
    assert result.settings.batch == 18
    console = Console(width=160)
    with console.capture() as captured:
        console.print(render(result))
    assert "1 step of 18" in captured.get()
    np.savez(tmp_path / "few.npz", x=x[:12], y=np.arange(12) % 10)
    assert open_splits(f"npz:{tmp_path / 'few.npz'}").notes[0].startswith("1 of the training samples is held out")


def test_a_loss_that_explodes_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"not a number any more.*finetune\.lr"):
        tune(tmp_path / "x.safetensors", steps=30, overrides=["finetune.lr=1e30", "finetune.optimizer=sgd"])


def test_outputs_that_are_no_numbers_are_laid_to_the_training(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"training has diverged.*finetune\.lr"):
        tune(tmp_path / "x.safetensors", steps=1, overrides=["finetune.lr=1e38", "finetune.optimizer=sgd"])


# -- settings ----------------------------------------------------------------------------------------------------------

RULES = 'pcq: 1\nrules:\n  - match: "*"\n    levels: ternary\n'


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("  methd: parq", "r.yaml:6: there is no `methd` in `finetune`.*method"),
        ("  method: park", "r.yaml:6: `method` has to be one of .*Did you mean 'parq'"),
        ("  lr: fast", "r.yaml:6: `lr` has to be a number"),
        ("  lr: 0", "r.yaml:6: lr is 0"),
        ("  mode: evil", "r.yaml:6: `mode` has to be one of train, eval, not 'evil'. Did you mean 'eval'"),
        ("  graphs: true\n  mode: eval", "r.yaml:6: graphs is True, which has to be false in mode eval"),
        ("  refit: 2.5", "r.yaml:6: `refit` has to be a whole number"),
        ("  activations: 4", "r.yaml:6: `activations` has to be 8, not 4"),
        ("  anneal_end: 1", "r.yaml:6: anneal_end is 1"),
        ("  relative: yes", "r.yaml:6: `relative` has to be true or false"),
        ("  steps: 5\n  epochs: 2", "r.yaml:6: steps and epochs both say how long"),
        ("  - a", "`finetune` has to be a mapping"),
    ],
)
def test_mistakes_in_the_recipe_have_their_line(said: str, says: str) -> None:
    with pytest.raises(PcqError, match=says):
        parse_recipe(f"{RULES}finetune:\n{said}\n", "r.yaml")


@pytest.mark.parametrize("key", ["epochs", "minutes", "lr", "weight_decay", "clip"])
def test_numbers_that_are_not_finite_are_refused(key: str) -> None:
    for number in (float("inf"), float("nan")):
        with pytest.raises(PcqError, match=rf"{key} is {number}, which has to be .*finite"):
            changed(Finetune(), **{key: number})


def test_all_mistakes_at_once() -> None:
    with pytest.raises(PcqError) as caught:
        parse_recipe(f"{RULES}finetune:\n  lr: -1\n  batch: 0\n  seed: -2\n", "r.yaml")
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == ["r.yaml:6", "r.yaml:7", "r.yaml:8"]


def test_a_recipe_survives_its_json() -> None:
    text = f'{RULES}finetune:\n  method: parq\n  freeze: ["fc.*"]\n  minutes: 1.5\n'
    recipe = parse_recipe(text, "r.yaml", ["finetune.lr=0.01"])
    assert recipe.finetune == Finetune(method="parq", freeze=("fc.*",), minutes=1.5, lr=0.01)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert "finetune" not in load_recipe("ternary").to_json()


def test_the_word_for_each_method() -> None:
    assert set(get_args(MethodName)) == set(METHODS)
    for name in get_args(MethodName):
        settings_ = Finetune(method=name)
        assert schedule_of(settings_).strength(1.0, 1.0) == 1
        # Where the pulls of all steps add up, each has to be small at first.
        assert (0 < schedule_of(settings_).strength(0.1, 1.0) < 0.01) == (METHODS[name].updates == "weight")
        absolute = method_of(replace(settings_, relative=False))
        assert getattr(absolute.prox, "relative", False) is False


def test_another_duration_replaces_the_recipes() -> None:
    assert changed(Finetune(steps=5), epochs=2.0) == Finetune(epochs=2.0)
    with pytest.raises(PcqError, match="Did you mean 'parq'"):
        changed(Finetune(), method="parc")
    with pytest.raises(PcqError, match="both say how long"):
        changed(Finetune(), epochs=2.0, minutes=1.0)


def test_ranges_of_the_recipe_are_learned_with_activations_of_an_option() -> None:
    recipe = parse_recipe(RULES, "r.yaml", ["finetune.ranges=learned"])
    assert recipe.finetune is not None
    assert changed(recipe.finetune, activations=8) == Finetune(activations=8, ranges="learned")
    with pytest.raises(PcqError, match="observed where activations are float.*--activations 8"):
        changed(recipe.finetune, epochs=2.0)


@given(st.sampled_from(["onecycle", "cosine", "step", "constant"]), st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_learning_rates_stay_between_zero_and_the_highest(kind: Any, progress: float) -> None:
    how = Finetune(rate=kind, lr=0.5)
    assert 0 <= rate(how, progress) <= 0.5
    assert max(rate(how, t / 1000) for t in range(1000)) == pytest.approx(0.5, rel=1e-2 if kind == "cosine" else 1e-9)
    assert rate(how, 0.999) < (0.51 if kind == "constant" else 0.01)


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("onecycle", {0.0: 0.04, 0.15: 0.52, 0.3: 1.0, 0.65: 0.5, 1.0: 0.0}),  # of PyTorch's, but it ends at 0
        ("cosine", {0.0: 0.02, 0.5: 0.5, 2 / 3: 0.25, 1.0: 0.0}),
        ("step", {0.0: 1.0, 0.499: 1.0, 0.5: 0.1, 0.749: 0.1, 0.75: 0.01, 1.0: 0.01}),
        ("constant", {0.0: 1.0, 1.0: 1.0}),
    ],
)
def test_learning_rates_golden(kind: Any, shares: dict[float, float]) -> None:
    found = {progress: rate(Finetune(rate=kind, lr=0.5), progress) for progress in shares}
    assert found == pytest.approx({progress: 0.5 * share for progress, share in shares.items()}, abs=1e-9)


# -- loss, batches, augmentation, BatchNorm ----------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_and_divergence() -> None:
    out, teacher = torch.randn(2, 5, 7, generator=generator(0))
    labels = torch.tensor([0, 1, 2, 3, 6])
    ce = F.cross_entropy(out, labels)
    p, q = (teacher / TEMPERATURE).softmax(1), (out / TEMPERATURE).softmax(1)
    kl = TEMPERATURE**2 * (p * (p / q).log()).sum(1).mean()
    assert torch.equal(loss_of(Finetune(), out, labels, None), ce)
    torch.testing.assert_close(loss_of(Finetune(distill=1.0), out, labels, teacher), kl)
    torch.testing.assert_close(loss_of(Finetune(distill=0.3), out, labels, teacher), 0.7 * ce + 0.3 * kl)
    torch.testing.assert_close(loss_of(Finetune(distill=0.3), out, None, teacher), kl)
    assert loss_of(Finetune(distill=1.0), out, labels, out).abs() < 1e-6
    one, aim = out[:, :1], teacher[:, :1]  # of one class, which has no divergence
    torch.testing.assert_close(loss_of(Finetune(distill=0.3), one, 0 * labels, aim), 0.3 * (one - aim).square().mean())


def test_the_loss_smooths_labels_and_only_what_is_masked_is_alike() -> None:
    out, labels = torch.randn(5, 7, generator=generator(0)), torch.tensor([0, 1, 2, 3, 6])
    want = F.cross_entropy(out, labels, label_smoothing=0.1)
    assert torch.equal(loss_of(Finetune(smoothing=0.1), out, labels, None), want)
    assert TEMPERATURE == 2
    low = torch.tensor([[[-2000.0, -torch.inf]]])
    assert loss_of(Finetune(), low, None, torch.tensor([[[-4000.0, -torch.inf]]])) == 2000**2 / 2


@pytest.mark.parametrize(("clip", "gradient"), [(5.0, (3.0, 4.0)), (0.0, (30.0, 40.0)), (100.0, (30.0, 40.0))])
def test_a_step_is_nesterovs_at_the_rate_given_with_the_gradient_clipped(clip: float, gradient: Any) -> None:
    how, net = Finetune(optimizer="sgd", clip=clip, weight_decay=0.0), nn.Linear(2, 1, bias=False)
    nn.init.zeros_(net.weight)
    optimizer, twin, velocity = make_optimizer(how, net.parameters()), torch.zeros(2), torch.zeros(2)
    for learning_rate in (0.1, 0.02):
        update(how, optimizer, net, (net.weight * torch.tensor([30.0, 40.0])).sum(), learning_rate)
        velocity = 0.9 * velocity + torch.tensor(gradient)
        twin = twin - learning_rate * (torch.tensor(gradient) + 0.9 * velocity)
        torch.testing.assert_close(net.weight[0].detach(), twin)


def test_logits_are_found() -> None:
    x = torch.zeros(2, 3)
    assert (
        logits(x)
        is logits((x, 1))
        is logits({"a": x})
        is logits({"a": 1, "logits": x})
        is logits(type("Out", (), {"logits": x})())
        is x
    )
    with pytest.raises(PcqError, match=r"its output is of shape \[2\]"):
        logits(torch.zeros(2))


def test_what_has_one_axis_does_not_decay() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    groups = make_optimizer(Finetune(weight_decay=0.5), net.parameters()).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.5), (3, 0.0)]


def test_every_epoch_has_an_order_of_its_own() -> None:
    batches = Batches(from_arrays("x", "train", torch.zeros(40, 1), torch.arange(40)), 40, 0)
    orders = [*(batches.numbers(step) for step in range(3)), replace(batches, seed=1).numbers(0)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


@given(n=st.integers(5, 40), size=st.integers(1, 5), seed=st.integers(0, 3), world=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_batches_are_functions_of_their_number(n: int, size: int, seed: int, world: int) -> None:
    assume(world <= size)
    x = torch.arange(n * 16, dtype=torch.float32).reshape(n, 1, 4, 4)
    data = from_arrays("x", "train", x, torch.arange(n))
    change = augment.make("crop-flip", (1, 4, 4))
    whole = Batches(data, size, seed, change)
    for epoch in (0, 2):
        seen = torch.cat([whole.numbers(epoch * whole.an_epoch + place) for place in range(whole.an_epoch)])
        assert len(seen.unique()) == len(seen) == whole.an_epoch * size
    steps = list(whole.run(1, 6))
    for step, ((inputs,), labels) in zip(range(1, 6), steps, strict=True):
        (again,), _ = whole.make(step)
        assert torch.equal(again, inputs)
        parts = [replace(whole, rank=rank, world=world).make(step) for rank in range(world)]
        for rank, ((part,), theirs) in enumerate(parts):
            assert torch.equal(part, inputs[rank::world])
            assert labels is not None
            assert theirs is not None
            assert torch.equal(theirs, labels[rank::world])
    ahead = list(replace(whole, threads=2).run(1, 6))
    assert all(torch.equal(a, b) for ((a,), _), ((b,), _) in zip(steps, ahead, strict=True))


class Looks(TorchDispatchMode):
    """Counts what would make the host wait for a device: reading a number of a tensor, or counting its elements."""

    WAIT = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.partition(".")[0] in self.WAIT
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["proxconnect", "binaryrelax"])
def test_no_step_between_measurements_and_refits_waits_for_the_device(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    ahead, back = run._loss, run.update

    def watched(work: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with Looks() as found:
                done = work(*args, **kwargs)
            seen.append(found.count)
            return done

        return counted

    monkeypatch.setattr(run, "_loss", watched(ahead))
    monkeypatch.setattr(run, "update", watched(back))
    # AdamW on a CPU counts its steps in tensors of the CPU; those are no device's.
    sets = ["finetune.refit=4", "finetune.optimizer=sgd"]
    tune(tmp_path / "x.safetensors", method=method, steps=8, overrides=sets)
    assert len(seen) == 16
    # Loss and update by turns. For each weight it is asked at a refit (steps 4 and 8) and in the step after it whether
    # some of its rows are zero; the highest label is known before.
    assert all(count == 0 for i, count in enumerate(seen) if i not in (1, 7, 9, 15)), seen
    assert 0 < seen[7] <= 2 * 10


def test_images_are_the_same_samples_however_they_are_kept() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 2, 4, 8)
    mean, std = (0.3, 0.4), (0.35, 0.2)
    data = Data("x", "train", 4, (2, 4, 8), normalised(images, mean, std), torch.tensor([0, 1, 2, 1]))
    m, s = (torch.tensor(v)[None, :, None, None] for v in (mean, std))
    assert torch.equal(data.take([3, 1]), (images[[3, 1]].float() / 255 - m) / s)
    assert data.highest == 2
    assert data.on(torch.device("cpu")) is data
    moved = data.on(torch.device("meta"))
    assert isinstance(moved.take, Pixels)
    assert moved.take.images.is_meta
    assert moved.labels is data.labels
    other = replace(data, take=lambda chosen: torch.zeros(len(chosen), 2, 4, 8))
    assert other.on(torch.device("meta")) is other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("change", [augment.crop, augment.flip], ids=["crop", "flip"])
def test_a_gpu_has_the_cpus_samples_bit_by_bit(change: Any) -> None:
    images = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    here = Data("x", "train", 300, (3, 32, 32), normalised(images, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)), None)
    with torch.cuda.device(0):
        there = here.on(torch.device("cuda"))
        alter = change if change is augment.flip else lambda x, g: augment.crop(x, 4, g)
        for step in range(3):
            (a,), (b,) = (Batches(data, 64, 0, alter).make(step)[0] for data in (here, there))
            assert b.is_cuda
            assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("threads", [0, 2])
def test_global_generators_follow_the_step(threads: int) -> None:
    """Dropout after a resume draws what it would have drawn."""
    batches = Batches(from_arrays("x", "train", torch.zeros(40, 1), torch.arange(40)), 4, 0, threads=threads)

    def drawn(start: int, **changes: int) -> list[tuple[float, float, float]]:
        with own_randomness():
            steps = replace(batches, **changes).run(start, 5)
            return [(random.random(), float(np.random.rand()), float(torch.rand(()))) for _ in steps]

    whole = drawn(1)
    assert drawn(3) == whole[2:]
    every = [*whole, *drawn(1, seed=1), *drawn(1, rank=1, world=2)]
    assert all(len(set(numbers)) == len(every) for numbers in zip(*every, strict=True))


@given(seed=st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_a_crop_is_a_shift(seed: int) -> None:
    x = torch.randn(3, 2, 6, 5, generator=generator(seed))
    got = augment.crop(x, 2, generator(seed, 1))
    padded = F.pad(x, (2, 2, 2, 2))
    for i in range(3):
        shifts = [padded[i, :, dy : dy + 6, dx : dx + 5] for dy in range(5) for dx in range(5)]
        assert any(torch.equal(got[i], shift) for shift in shifts)


def test_augmentation_takes_every_choice() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4).expand(200, 1, 4, 4)
    flipped = augment.flip(x, generator(0))
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert 60 < int(mirrored.sum()) < 140
    assert bool((mirrored | (flipped == x).flatten(1).all(1)).all())
    assert len(augment.crop(x, 1, generator(0)).flatten(1).unique(dim=0)) == 9
    got = augment.resized_crop(torch.linspace(0, 1, 8).expand(200, 1, 8, 8), (4, 4), generator(0))
    widths = (got[:, 0, 0, -1] - got[:, 0, 0, 0]) / (3 / 4 * 8 / 7)  # 1: the whole width
    assert got.shape == (200, 1, 4, 4)
    assert bool((got.diff(dim=3) >= -1e-6).all())  # never mirrored, never rotated
    assert 0.4 < float(widths.min()) < 0.6
    assert 0.9 < float(widths.max()) < 1.01


def test_the_usual_augmentation() -> None:
    assert [augment.settle("auto", d) for d in ("digits", "cifar10:x", "folder:x", "npz:x", "own.py:f")] == [
        "crop", "crop-flip", "resized-crop", "none", "none",
    ]  # fmt: skip
    with pytest.raises(PcqError, match="not images"):
        augment.make("crop", (5,))
    for side, choices in ((8, 3), (16, 5), (32, 9)):  # a pixel each way for every eight
        change, rows = augment.make("crop", (1, side, side)), torch.arange(1.0, side + 1)
        assert change is not None
        columns = change(rows.expand(400, 1, side, side), generator(0))[:, 0, side // 2, side // 2]
        assert len(columns.unique()) == choices


def test_without_batchnorm_estimates_scores_are_with_the_statistics_of_training(tmp_path: Path) -> None:
    result = tune_digits(tmp_path / "x.safetensors", steps=4, overrides=["finetune.batchnorm=0"])
    assert result.batchnorm is None
    assert result.epochs[-1].score == result.rows[2].val.top1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_in_mode_eval_it_trains_as_it_will_compute(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "x.safetensors", []
    forward = Small.forward

    def watched(self: Small, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(self.bn1.training)
        return forward(self, x)

    monkeypatch.setattr(Small, "forward", watched)
    result = tune(path, steps=4, overrides=[f"finetune.mode={mode}", "finetune.batchnorm=2"])
    assert seen == [mode == "train"] * 4
    tuned, was = pcq.read_artifact(path).floats, load_file(small(tmp_path))
    same = [torch.equal(tuned[name], was[name]) for name in was if "running" in name]
    assert len(same) > 4
    assert all(same) if mode == "eval" else not any(same)
    assert (result.batchnorm is None) == (mode == "eval")
    assert not torch.equal(tuned["bn1.weight"], was["bn1.weight"])  # what BatchNorm multiplies by is trained


def test_batchnorm_is_estimated_on_samples_as_they_are_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Inputs]] = []
    monkeypatch.setattr(batchnorm, "reestimate", lambda module, samples: seen.append(list(samples)))
    tune(tmp_path / "x.safetensors", overrides=["finetune.batchnorm=2", "finetune.augment=crop", "finetune.batch=64"])
    data = open_splits("digits").train
    batches = Batches(data, 64, 0, augment.make("crop", data.shape))
    assert [len(some) for some in seen] == [2, 2]  # a look on the way, and the end
    for some in seen:
        assert all(torch.equal(x, batches.make(step)[0][0]) for step, (x,) in enumerate(some))


def test_batchnorm_is_the_mean_over_the_batches() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU(), nn.BatchNorm2d(3))
    net(torch.randn(8, 1, 6, 6))
    before = batchnorm.statistics(net)
    samples = [torch.randn(8, 1, 6, 6) for _ in range(4)]
    with batchnorm.borrowed(net, [(x,) for x in samples]):
        mean = torch.stack([net[0](x).mean((0, 2, 3)) for x in samples]).mean(0)
        var = torch.stack([net[0](x).transpose(0, 1).flatten(1).var(1) for x in samples]).mean(0)
        torch.testing.assert_close(net[1].running_mean, mean)
        torch.testing.assert_close(net[1].running_var, var)
        assert not any(module.training for module in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(batchnorm.statistics(net), before, strict=True))
    assert net[1].momentum == 0.1


def test_splits_are_disjoint(tmp_path: Path) -> None:
    digits = open_splits("digits")
    assert (digits.train.n, digits.val.n, digits.test and digits.test.n) == (1197, 200, 400)
    import numpy as np

    x = np.arange(50 * 3, dtype=np.float32).reshape(50, 3)
    np.savez(tmp_path / "one.npz", x=x, y=np.zeros(50, dtype=np.int64))
    one = open_splits(f"npz:{tmp_path / 'one.npz'}")
    assert (one.train.n, one.val.n, one.test) == (45, 5, None)
    rows = torch.cat([part.take(range(part.n)) for part in (one.train, one.val)])
    assert torch.equal(rows.sort(0).values, torch.from_numpy(x))
    two = {
        "x_train": x,
        "y_train": np.zeros(50, dtype=np.int64),
        "x_val": x[:7] + 1,
        "y_val": np.zeros(7, dtype=np.int64),
    }
    np.savez(tmp_path / "two.npz", **two)
    assert open_splits(f"npz:{tmp_path / 'two.npz'}").val.n == 7


def test_folders_hold_out_of_train_and_crop_from_larger_images(tmp_path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 12), ("val", 3)):
        for name in "ab":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (50, 40), (10 * i, 0, 0 if name == "a" else 200)).save(folder / f"{i}.png")
    splits = open_splits(f"folder:{tmp_path}?size=28", resized_crop=True)
    assert splits.train.shape == (3, 32, 32)
    assert splits.plain.shape == splits.val.shape == (3, 28, 28)
    assert (splits.train.n, splits.plain.n, splits.val.n) == (22, 22, 2)
    assert splits.test is not None
    assert splits.test.n == 6
    assert torch.equal(splits.train.labels, splits.plain.labels)
    # torchvision's ResNet on it: the ImageNet recipe's way
    change = augment.make("resized-crop", splits.plain.shape)
    assert change is not None
    (x,), y = Batches(splits.train, 4, 0, change, threads=2).make(0)
    assert x.shape == (4, 3, 28, 28)
    assert y is not None


def test_data_errors_are_said(tmp_path: Path) -> None:
    with pytest.raises(PcqError, match="no such folder"):
        open_splits(f"folder:{tmp_path / 'nothing'}")
    assert open_data("digits", "val").n == 200


OWN = """
import numpy as np
import torch

def raises(split="train"):
    if split == "test":
        raise RuntimeError("disk on fire")
    return np.zeros((30, 2), np.float32), np.arange(30) % 2

def none(split="train"):
    return None if split == "test" else raises()

def random():
    return torch.randn(30, 2), torch.arange(30)
"""


def test_a_split_that_cannot_be_read_is_not_an_absent_one(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(PcqError, match=r"disk on fire for the split test\. See line 7 .* there is not, return None"):
        open_splits(f"{tmp_path / 'own.py'}:raises")
    assert open_splits(f"{tmp_path / 'own.py'}:none").test is None
    x, y = np.zeros((30, 2), np.float32), np.arange(30) % 2
    path = tmp_path / "some.npz"
    spoiled = x.copy()
    spoiled[3, 1] = np.nan
    for split in ("test", "val"):
        for key, value, said in (("x", spoiled, "hold NaN"), ("y", y[:-1], "labels have shape")):
            arrays = {"x_train": x, "y_train": y, f"x_{split}": x + 1, f"y_{split}": y}
            np.savez(path, **{**arrays, f"{key}_{split}": value})
            with pytest.raises(PcqError, match=said):
                open_splits(f"npz:{path}")
    np.savez(path, x_train=x, y_train=y)
    assert open_splits(f"npz:{path}").test is None
    with pytest.raises(PcqError, match="arrays of train but none of test"):
        open_data(f"npz:{path}", "test")


def test_a_function_without_splits_is_one_set(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    splits = open_splits(f"{tmp_path / 'own.py'}:random")
    assert (splits.train.n, splits.val.n, splits.test) == (27, 3, None)
    assert not set(splits.train.labels.tolist()) & set(splits.val.labels.tolist())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("split", "changed", "said"),
    [
        ("test", {"y": np.full(20, 10)}, "test: a label is 10. Allowed: 0 to 9, the outputs"),
        ("val", {"y": np.full(20, 10)}, "val: a label is 10. Allowed: 0 to 9, the outputs"),
        ("test", {"x": np.zeros((20, 1, 4, 4), np.float32)}, "its samples are 1x4x4, those of train 1x8x8"),
        ("test", {"y": None}, "test: it has no labels, and train has some"),
        ("val", {"y": None}, "val: it has no labels, and train has some"),
    ],
)
def test_splits_are_checked_before_training(split: str, changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {}
    for number, name in enumerate(("train", "val", "test")):
        arrays |= {f"x_{name}": np.full((20, 1, 8, 8), number, np.float32), f"y_{name}": np.arange(20) % 10}
    arrays |= {f"{key}_{split}": value for key, value in changed.items()}
    np.savez(tmp_path / "some.npz", **{key: value for key, value in arrays.items() if value is not None})
    seen: list[str] = []
    with pytest.raises(PcqError, match=re.escape(said)):
        pcq.finetune(
            small(tmp_path), "ternary", f"npz:{tmp_path / 'some.npz'}", arch=f"{__name__}:Small", steps=1,
            out=tmp_path / "x.safetensors", progress=lambda stage, *_: seen.append(stage),
        )  # fmt: skip
    assert not seen


def test_crops_of_larger_images_are_for_folders(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", x=np.zeros((20, 1, 8, 8), np.float32), y=np.zeros(20, np.int64))
    with pytest.raises(PcqError, match=r"resized-crop: it is for folders of images"):
        open_splits(f"npz:{tmp_path / 'some.npz'}", resized_crop=True)


# -- warnings ----------------------------------------------------------------------------------------------------------


def trained(**changes: Any) -> Trained:
    calm = (Telemetry(70, 0.95, 0.9, 1e-6, 0.1), Telemetry(100, 1.0, 1.0, 1e-6, 0.1))
    epochs = (Epoch(50, 1.0, 0.3, 90.0), Epoch(100, 2.0, 0.2, 91.0))
    return replace(Trained({}, epochs, None, calm, 100, 75, None, None), **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"telemetry": (Telemetry(70, 0.5, 0.2, 0.0, 0.1), Telemetry(100, 1.0, 1.0, 0.0, 0.1))}, "Only 20 %"),
        ({"hard_from": 98}, "Only 2 steps came after the anneal"),
        ({"hard_from": 99}, "Only 1 step came after the anneal"),
        ({"hard_from": 100}, "No step came after the anneal"),
        ({"telemetry": (Telemetry(70, 0.95, 0.9, 0.0, 0.1), Telemetry(100, 1.0, 1.0, 0.01, 0.1))}, "1.000 %"),
        ({"epochs": (Epoch(80, 1.0, 0.3, 90.0), Epoch(100, 2.0, 0.2, 80.0))}, "got worse"),
        ({"epochs": (Epoch(80, 1.0, 0.3, 90.0), Epoch(100, 2.0, 0.2, 88.9))}, "got worse"),
        ({"epochs": (Epoch(80, 1.0, 0.3, 90.0), Epoch(100, 2.0, 0.2, 89.1))}, None),
    ],
)
def test_warnings_in_words(changes: dict[str, Any], says: str | None) -> None:
    found = report.warnings(trained(**changes), Finetune())
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


def test_levels_that_could_be_fitted_again_and_are_not() -> None:
    poor = trained(epochs=(Epoch(100, 1.0, 2.0, 40.0),))
    assert "finetune.refit: 0" in report.warnings(poor, Finetune(refit=0))[0]
    assert not report.warnings(poor, Finetune(refit=0), fitted=False)
    assert not report.warnings(poor, Finetune())


def test_weights_that_are_rounded_in_the_end_need_not_settle_before() -> None:
    restless = (Telemetry(70, 0.95, 0.9, 0.0, 0.1), Telemetry(100, 1.0, 1.0, 0.01, 0.1))
    assert not report.warnings(trained(telemetry=restless, unquantized=92.0), Finetune(method="posttraining"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(PcqError, match="NVIDIA GPU only") as caught:
        tune(tmp_path / "x.safetensors", overrides=["finetune.graphs=true"])
    assert caught.value.where == "finetune.graphs"
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ValueError, match="false where activations have 8 bits"):
        Finetune(graphs=True, activations=8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_recorded_passes_are_the_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Small().cuda()
    plain = Small().cuda()
    plain.load_state_dict(net.state_dict())
    batches = [torch.randn(16, 1, 8, 8, device="cuda") for _ in range(4)]
    before = batchnorm.statistics(net)
    with graphs.recorded(net, (batches[0],), False):
        assert all(torch.equal(a, b) for a, b in zip(before, batchnorm.statistics(net), strict=True))
        for x in batches[1:]:
            for module in (net, plain):
                module.train()
                module.zero_grad(set_to_none=True)
                module(x).square().mean().backward()
                with torch.no_grad():
                    for p in module.parameters():
                        p -= 0.1 * p.grad
            for a, b in zip(net.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        net.eval()
        assert net(batches[0][:3]).shape == (3, 10)
    assert "forward" not in vars(net)
    result = tune(tmp_path / "x.safetensors", overrides=["finetune.graphs=true"])
    assert result.telemetry.on_levels == 1


def test_precision_is_settled() -> None:
    how = settled(Finetune(), "digits", torch.device("cpu"))
    assert how.precision in ("bf16", "float32")
    assert how.augment == "crop"
    assert settled(Finetune(precision="float32"), "digits", torch.device("cpu")).precision == "float32"
    assert math.isclose(how.learning_rate, 2e-3)


class Counting(nn.Module):
    """As transformers' encoders: a buffer that is not saved, but was in older checkpoints. Loads ``old`` as ``fc``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.register_buffer("position_ids", torch.arange(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state if name.startswith("old.")]:
            state[name.replace("old.", "fc.")] = state.pop(name)
        state.pop("position_ids", None)
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[no-untyped-call]


def counting() -> nn.Module:
    return Counting()


def test_a_buffer_that_the_network_no_longer_saves_is_kept(tmp_path: Path) -> None:
    """The run ended in a KeyError, after all of the training."""
    ids = torch.arange(4) + 7
    save_file({**Counting().state_dict(), "position_ids": ids}, tmp_path / "m.safetensors")
    how: dict[str, Any] = {"arch": f"{__file__}:counting", "steps": 3, "out": tmp_path / "x.safetensors"}
    result = pcq.finetune(tmp_path / "m.safetensors", "ternary-all", "digits", **how)
    assert torch.equal(pcq.read_artifact(result.path).state_dict()["position_ids"], ids)


def test_a_network_with_other_names_is_refused_before_training(tmp_path: Path) -> None:
    state = {name.replace("fc.", "old."): tensor for name, tensor in Counting().state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    how: dict[str, Any] = {"arch": f"{__file__}:counting", "steps": 3, "out": tmp_path / "x.safetensors"}
    with pytest.raises(PcqError, match=r"the network loads 'old\.\w+' under another name"):
        pcq.finetune(tmp_path / "m.safetensors", "ternary-all", "digits", **how)
