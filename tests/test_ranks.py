"""Several processes that train one network: as one process would, whatever happens to them."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pcq
from pcq.commands import FinetuneResult
from pcq.data import from_arrays
from pcq.errors import PcqError
from pcq.scores import evaluate, module_predictor
from pcq.train import ranks

FORK = multiprocessing.get_context("fork")
SHORT = 12
"""Steps of a run."""

BATCH = 65
"""Odd, so that two processes have unequal parts."""

NEAR = 5e-6
"""Between two processes and one after SHORT steps, of weights around 1. All that differs is the order of sums: that
made 5e-7, and permuting the samples within each batch of one process made 1e-7, where BatchNorm over a part of the
batch made 0.2 and unequal parts of a batch that count alike 0.08 (2026-11-25)."""

NET = """
from torch import nn


def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 7, 3, stride=2), nn.BatchNorm2d(7), nn.ReLU(),
        nn.Flatten(), nn.Linear(28, 10),
    )
"""

RECIPE = """
pcq: 1
rules:
  - match: last
    levels: {kind: uniform, bits: 4}
    per: tensor
  - match: "*"
    levels: ternary
finetune: {batch: 65, optimizer: sgd, refit: 3, precision: float32}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small network, trained a little, and a recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "own.py").write_text(NET)
    (folder / "r.yaml").write_text(RECIPE)
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(NET, scope)
    torch.save(scope["net"]().state_dict(), folder / "net.pt")
    return folder


def tune(place: Path, name: str, **options: Any) -> FinetuneResult:
    """A run in ``place`` that writes ``name.safetensors``."""
    arch, out = f"{place / 'own.py'}:net", place / f"{name}.safetensors"
    return pcq.finetune(place / "net.pt", place / "r.yaml", "digits", arch=arch, out=out, **{"steps": SHORT, **options})


class Killed(Exception):
    """Stands for a run that ends without any warning."""


def ending(rank: int, number: signal.Signals | None, at: int) -> Callable[[str, int, int], None]:
    """Something happens to one process after step ``at``."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("epoch") and done == at and os.environ.get("RANK", "0") == str(rank):
            if number is None:
                raise Killed
            os.kill(os.getpid(), number)

    return progress


def _process(rank: int, world: int, port: int, run: Callable[[], Any], answers: Any) -> None:
    torch.set_num_threads(1)
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in there.items()})
    try:
        answer = run()
    except BaseException as error:
        answer = (type(error).__name__, str(error))
    answers.put((rank, answer))


def together(run: Callable[[], Any], world: int = 2) -> list[Any]:
    """What ``run`` returned or raised in each process; None of one that was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = FORK.SimpleQueue()
    processes = [FORK.Process(target=_process, args=(rank, world, port, run, answers)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a process hangs"
    found: list[Any] = [None] * world
    while not answers.empty():
        rank, answer = answers.get()
        found[rank] = answer
    return found


def apart(place: Path, one: str, two: str) -> float:
    """The largest difference between two artifacts; their codes have to be the same."""
    a, b = (pcq.read_artifact(place / f"{name}.safetensors") for name in (one, two))
    assert all(torch.equal(weight.codes, b.quantized[name].codes) for name, weight in a.quantized.items())
    left, right = a.state_dict(), b.state_dict()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


@pytest.fixture(scope="module")
def one(place: Path) -> FinetuneResult:
    """The run of one process."""
    return tune(place, "one")


@pytest.fixture(scope="module")
def two(place: Path) -> list[Any]:
    """The same run of two processes: its table and telemetry in each."""
    return together(lambda: (lambda result: (result.rows, result.telemetry, result.epochs))(tune(place, "two")))


# -- as one ------------------------------------------------------------------------------------------------------------


def test_two_processes_train_what_one_would(place: Path, one: FinetuneResult, two: list[Any]) -> None:
    assert 0 < apart(place, "one", "two") < NEAR
    assert two[0] == two[1]
    rows, telemetry, epochs = two[0]
    assert rows == one.rows
    assert telemetry.on_levels == one.telemetry.on_levels == 1
    assert telemetry.flips == one.telemetry.flips
    assert [(e.step, e.score) for e in epochs] == [(e.step, e.score) for e in one.epochs]
    assert epochs[-1].loss == pytest.approx(one.epochs[-1].loss, rel=1e-5)
    mine, theirs = ((place / f"{name}.metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert [json.loads(line)["kind"] for line in mine] == [json.loads(line)["kind"] for line in theirs]
    assert not (place / "two.resume").exists()


def _scored() -> list[tuple[Any, Any]]:
    here = ranks.current()
    found = []
    for n in (1, 2, 7, 511, 513, 1025):
        x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
        net, other = nn.Linear(5, 7), nn.Linear(5, 7)
        here.share([*net.state_dict().values(), *other.state_dict().values()])
        data = from_arrays("x", "val", x, x[:, 0].abs().long().clamp(max=6))
        counted: list[int] = []
        both = module_predictor(net), module_predictor(other)
        mine = here.evaluate(
            both[0], data, reference=both[1], progress=lambda stage, done, total, seen=counted: seen.append(done)
        )
        found.append((mine == evaluate(both[0], data, reference=both[1]), len(counted)))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_scores_are_exact_on_ragged_parts(world: int) -> None:
    found = together(lambda: _joined(_scored), world)
    assert all(same for each in found for same, _ in each), found
    assert len({tuple(count for _, count in each) for each in found}) == 1, "not as many batches in each process"


def _joined(run: Callable[[], Any]) -> Any:
    with ranks.joined():
        return run()


def _normalised() -> list[float]:
    """Output, gradients and statistics of a layer over parts of 3 and 2 samples against those over all 5."""
    here = ranks.current()
    whole = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    pull = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for mine in (slice(None), slice(here.rank, None, here.world)):
        layer = nn.BatchNorm1d(3, momentum=None)
        layer.weight.data = torch.tensor([1.0, 2.0, -0.5])
        x = whole[mine].clone().requires_grad_()
        with nullcontext() if mine == slice(None) else here.whole_batches():
            out = layer(x)
            (out * pull[mine]).sum().backward()
        results.append((out, x.grad, layer.running_mean, layer.running_var, layer.weight.grad))
    (out, gradient, *rest), (part, part_gradient, *others) = results
    assert gradient is not None
    own = slice(here.rank, None, here.world)
    pairs = [(out[own], part), (gradient[own], part_gradient), *zip(rest[:2], others[:2], strict=True)]
    torch.distributed.all_reduce(others[2])
    return [float((a - b).abs().max()) for a, b in [*pairs, (rest[2], others[2])]]


def test_batchnorm_is_over_the_whole_batch() -> None:
    for found in together(lambda: _joined(_normalised)):
        assert max(found) < 2e-6, found


def _averaged() -> list[Any]:
    here = ranks.current()
    used, unused, once = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    used.grad = torch.tensor([1.0, here.rank])
    if here.first:
        once.grad = torch.ones(2)
    here.average([used, unused, once])
    return [None if p.grad is None else p.grad.tolist() for p in (used, unused, once)]


def test_gradients_of_layers_that_were_left_out() -> None:
    assert together(lambda: _joined(_averaged)) == [[[1.0, 0.5], None, [0.5, 0.5]]] * 2


# -- going on ----------------------------------------------------------------------------------------------------------


def test_saved_by_one_process_goes_on_with_two_and_the_reverse(place: Path, one: FinetuneResult) -> None:
    with pytest.raises(Killed):
        tune(place, "wider", save_every=5, progress=ending(0, None, 8))
    resumed = together(lambda: tune(place, "wider", resume=True).resumed_at)
    assert resumed == [5, 5]
    assert apart(place, "one", "wider") < NEAR
    ends = together(lambda: tune(place, "narrower", progress=ending(1, signal.SIGTERM, 7)))
    assert [kind for kind, _ in ends] == ["Interrupted"] * 2
    assert tune(place, "narrower", resume=True).resumed_at == 7
    assert apart(place, "one", "narrower") < NEAR


def test_killed_and_resumed_is_uninterrupted(place: Path, two: list[Any]) -> None:
    """kill -9 of one of two processes: the other ends with a sentence, and the next two end in the same bytes."""
    first, killed = together(lambda: tune(place, "killed", save_every=4, progress=ending(1, signal.SIGKILL, 10)))
    assert killed is None
    assert first[0] == "PcqError"
    assert "another process of this run ended without a word" in first[1]
    assert "--resume" in first[1]
    assert not (place / "killed.safetensors").exists()
    assert together(lambda: tune(place, "killed", resume=True).resumed_at) == [8, 8]
    assert (place / "killed.safetensors").read_bytes() == (place / "two.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_either_saves_and_all_leave(number: signal.Signals, place: Path, two: list[Any]) -> None:
    name = f"stopped{number.name}"
    ends = together(lambda: tune(place, name, progress=ending(1, number, 7)))
    assert [kind for kind, _ in ends] == ["Interrupted"] * 2
    assert "a signal to another process after 7 of 12 steps" in ends[0][1]
    assert f"{number.name} after 7 of 12 steps" in ends[1][1]
    together(lambda: tune(place, name, resume=True))
    assert (place / f"{name}.safetensors").read_bytes() == (place / "two.safetensors").read_bytes()


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_an_error_in_one_process_ends_all_and_is_told_once(place: Path) -> None:
    def failing(stage: str, done: int, total: int) -> None:
        if done == 3 and os.environ["RANK"] == "1":
            raise PcqError("the disk fell off", where="here")

    ends = together(lambda: tune(place, "failed", progress=failing))
    told = "here: the disk fell off."
    assert ends == [("Elsewhere", f"another process: {told}"), ("PcqError", told)]


def test_an_error_in_all_processes_is_told_once(place: Path) -> None:
    ends = together(lambda: tune(place, "failed", method="park"), 3)
    assert sorted(kind for kind, _ in ends) == ["Elsewhere", "Elsewhere", "PcqError"]
    assert all("there is no method 'park'" in text for _, text in ends)


def test_more_processes_than_samples_and_half_an_environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = together(lambda: tune(place, "failed", overrides=["finetune.batch=1"]))
    assert any("a batch of 1 samples is too few for 2 processes" in text for _, text in ends)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PcqError, match=r"WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"):
        tune(place, "failed")


def torchrun(place: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pcq"]
    told = ["finetune", "net.pt", "-d", "digits", "--arch", "own.py:net", *words]
    env = {**os.environ, "PYTHONPATH": str(Path(pcq.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *told], cwd=place, env=env, capture_output=True, text=True, timeout=300)


def test_torchrun_prints_one_result_and_one_sentence(place: Path, two: list[Any]) -> None:
    done = torchrun(place, "-r", "r.yaml", "-o", "run.safetensors", "--steps", str(SHORT), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_after"] == (place / "run.safetensors").stat().st_size
    assert apart(place, "run", "two") == 0
    wrong = torchrun(place, "-r", "tertiary")
    assert wrong.returncode != 0
    assert wrong.stderr.count("pcq: there is no recipe 'tertiary'") == wrong.stderr.count("tertiary") == 1, wrong.stderr
    assert wrong.stdout == ""
