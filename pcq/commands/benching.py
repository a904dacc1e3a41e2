"""``bench``: files side by side, in size, time to load, memory and latency, with the first one as the measure."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pcq import checkpoint, sources
from pcq.commands.benched import Benched, open_files
from pcq.commands.drawing import drawn
from pcq.commands.fresh import Array, Fresh, measure
from pcq.commands.networks import keys, open_network
from pcq.errors import PcqError, first_line
from pcq.plots import bench_figure, require_matplotlib
from pcq.progress import Progress, silent
from pcq.words import counted

if TYPE_CHECKING:
    import onnxruntime

WARM = 2
"""Rounds that are run and not counted."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of several measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(numbers: Sequence[float]) -> "Spread":
        """Quartiles as NumPy interpolates them."""
        low, median, high = np.quantile(np.asarray(numbers, np.float64), (0.25, 0.5, 0.75))
        return Spread(float(median), float(low), float(high))


@dataclass(frozen=True)
class Latency:
    """Seconds of a run at that batch and thread count.

    ``ratio``: median of the rounds' ratios to the first file; None where that one does not run at this batch.
    """

    batch: int
    threads: int
    seconds: Spread
    ratio: float | None

    @property
    def place(self) -> str:
        """Where it was measured, in words."""
        return f"batch {self.batch}, {counted(self.threads, 'thread')}"


@dataclass(frozen=True)
class BenchRow:
    """One file.

    Attributes:
        path: the file.
        runtime: ``ONNX Runtime`` or ``torch``.
        nbytes: on disk, with external data or shards.
        load: seconds until it is ready, in processes of their own.
        first: seconds of the first run, likewise.
        peak: bytes of memory that loading and the first run take at most, beyond the runtime's own, likewise.
        inputs: one sample's sizes, by input.
        latencies: one for each batch and number of threads; without those that the file cannot run.
    """

    path: Path
    runtime: str
    nbytes: int
    load: Spread
    first: Spread
    peak: Spread
    inputs: dict[str, tuple[int, ...]]
    latencies: tuple[Latency, ...]


@dataclass(frozen=True)
class BenchResult:
    """Files side by side; ratios are to the first.

    Attributes:
        rows: one for each file.
        rounds: how many times each latency was measured, files in turn.
        processes: how many processes load and memory come from, files in turn.
        machine: processor, cores, versions.
        plot: the picture, if one was asked for.
        seconds: in all.
    """

    rows: tuple[BenchRow, ...]
    rounds: int
    processes: int
    machine: str
    plot: Path | None
    seconds: float


def bench(
    paths: str | Path | Sequence[str | Path],
    *,
    arch: str | None = None,
    input_shape: Sequence[int] | None = None,
    example: str | None = None,
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1, 0),
    rounds: int = 20,
    processes: int = 3,
    plot: str | Path | None = None,
    force: bool = False,
    key: str | None = None,
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
    progress: Progress = silent,
) -> BenchResult:
    """Measure float checkpoints, artifacts and ONNX files side by side; checkpoints and artifacts run in torch.

    Load time and memory are those of fresh processes; latencies come from one process in which the files take turns,
    so that what else the machine does meets all of them alike.

    Args:
        paths: the file, or files; the first is what the others are compared with.
        arch: the architecture, for checkpoints whose architecture is neither recorded nor recognised.
        input_shape: one sample's shape without the batch, where the files do not say it; of several inputs for those
            that it fits.
        example: a data spec instead, whose samples the files run on; of networks of several inputs an array for each by
            its name.
        batches: samples at once.
        threads: of each run; 0: all cores.
        rounds: of each latency.
        processes: for load time and memory.
        plot: a PNG to draw.
        force: replace a file at ``plot`` that pcq did not draw.
        key: which state dict to open, where a checkpoint holds several.
        allow_globals, unsafe_pickle: as for :func:`pcq.quantize`.
        progress: called before each file is opened, each process and each round.

    Raises:
        PcqError: a file cannot be run, or its input's shape is not known.
    """
    from pcq.data.inputs import sample_shape

    begun, input_shape = time.perf_counter(), sample_shape(input_shape)
    if input_shape is not None and example is not None:
        raise PcqError("the example says the shapes of the inputs", where="--input", todo="Leave it out")
    if not paths:
        raise PcqError("there is nothing to measure", todo="Name one file or more")
    for option, numbers, least in (("--batch", batches, 1), ("--threads", threads, 0), ("--rounds", [rounds], 1),
                                   ("--processes", [processes], 1)):  # fmt: skip
        if not numbers or not all(isinstance(number, int) and number >= least for number in numbers):
            raise PcqError(f"{list(numbers)} cannot be", where=option, allowed=f"whole numbers, {least} or more")
    named = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if plot is not None:
        require_matplotlib()
        checkpoint.refuse_overwrite(Path(plot), ".png", inputs=named, force=force)
    cores = os.cpu_count() or 1
    counts = list(dict.fromkeys(min(count, cores) or cores for count in threads))
    opening = {"arch": arch, "allow_globals": tuple(allow_globals), "unsafe_pickle": unsafe_pickle}
    chosen = keys(named, key, allow_globals, unsafe_pickle)
    openings = [{**opening, "key": mine} for mine in chosen]
    files, shape = open_files(named, openings, input_shape, progress, example, max(batches))
    for file in files:
        file.refuse(batches)
    fresh: list[list[Fresh]] = [[] for _ in files]
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in files]
    for turn in range(processes):
        for place, (file, found) in enumerate(zip(files, fresh, strict=True)):
            done = turn * len(files) + place
            progress(f"load {file.path.name}, process {turn + 1}", done, len(files) * processes)
            single = file.feed(min(file.lengths, default=1), shape)
            assert single is not None, file
            shapes[place] = {name: array.shape[1:] for name, array in single.items()}
            found.append(measure(file.path, file.runtime, file.opening, single))
    latencies = _latencies(files, shape, batches, counts, rounds, progress)
    rows = tuple(
        BenchRow(
            file.path,
            file.runtime,
            _size(file),
            Spread.of([each.load for each in found]),
            Spread.of([each.first for each in found]),
            Spread.of([each.peak for each in found]),
            taken,
            tuple(mine),
        )
        for file, found, taken, mine in zip(files, fresh, shapes, latencies, strict=True)
    )
    result = BenchResult(rows, rounds, processes, _machine(cores), None, time.perf_counter() - begun)
    return result if plot is None else drawn(result, Path(plot), _picture)


def _picture(result: BenchResult) -> bytes:
    """Bars for the files side by side."""
    columns = [
        (
            row.path.name,
            row.nbytes,
            row.load.median,
            row.peak.median,
            {each.place: each.seconds.median for each in row.latencies},
        )
        for row in result.rows
    ]
    return bench_figure(columns)


def _runner(file: Benched, threads: int) -> Callable[[Mapping[str, Array]], object]:
    """The file, ready to run with that many threads."""
    if file.runtime == "ONNX Runtime":
        session = _session(file.path, threads)
        return lambda feed: session.run(None, dict(feed))
    network = open_network(file.path, **file.opening)
    network.module.eval()

    def run(feed: Mapping[str, Array]) -> object:
        with torch.no_grad():
            return network.run_named({name: torch.from_numpy(x) for name, x in feed.items()})

    return run


def _session(path: Path, threads: int) -> "onnxruntime.InferenceSession":
    """A session whose threads sleep as soon as a run ends: the next file's turn is its own."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _latencies(
    files: Sequence[Benched],
    shape: tuple[int, ...] | None,
    batches: Sequence[int],
    counts: Sequence[int],
    rounds: int,
    progress: Progress,
) -> list[list[Latency]]:
    """Those of each file, which take turns, at the batches that it takes; progress is counted in samples."""
    found: list[list[Latency]] = [[] for _ in files]
    done, total = 0, len(counts) * (rounds + WARM) * sum(batches)
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            runners = [_runner(file, count) for file in files]
            for batch in batches:
                feeds = [file.feed(batch, shape) for file in files]
                said = f"batch {batch}, {counted(count, 'thread')}"
                turns = []
                for _ in range(rounds + WARM):
                    progress(said, done, total)
                    turns.append(_turn(runners, feeds, said))
                    done += batch
                times = [[seconds for seconds in column if seconds] for column in zip(*turns[WARM:], strict=True)]
                for mine, seconds in zip(found, times, strict=True):
                    if seconds:
                        each = [a / b for a, b in zip(seconds, times[0], strict=True)] if times[0] else []
                        ratio = statistics.median(each) if each else None
                        mine.append(Latency(batch, count, Spread.of(seconds), ratio))
            del runners
    finally:
        torch.set_num_threads(before)
    progress("done", total, total)
    return found


def _turn(
    runners: Sequence[Callable[[Mapping[str, Array]], object]], feeds: Sequence[Mapping[str, Array] | None], said: str
) -> list[float | None]:
    """Seconds of a run of each; None for those that have no feed."""
    times: list[float | None] = []
    for run, feed in zip(runners, feeds, strict=True):
        start = time.perf_counter()
        try:
            if feed is not None:
                run(feed)
        except Exception as error:  # torch's and onnxruntime's exceptions share no class
            told = first_line(error)
            raise PcqError(f"it does not run ({said}): {told}", where="bench", todo="Is --input right?") from error
        times.append(None if feed is None else time.perf_counter() - start)
    return times


def _size(file: Benched) -> int:
    """Bytes of the files that the network is read from: shards and external data with the others."""
    if file.runtime == "ONNX Runtime":
        from pcq.export.reading import file_bytes

        return file_bytes(file.path)
    if checkpoint.is_artifact(file.path):
        return file.path.stat().st_size
    how = {key: value for key, value in file.opening.items() if key != "arch"}
    return sum(part.stat().st_size for part in sources.open_source(file.path, **how).files)


def _machine(cores: int) -> str:
    import onnxruntime

    name = platform.processor() or platform.machine()
    try:
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = found[0].split(":", 1)[1].strip() if found else name
    except OSError:
        pass
    return f"{name}, {counted(cores, 'core')}; ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}"
