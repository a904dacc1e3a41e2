"""Several processes that train one network: ``torchrun`` starts them, :func:`joined` joins them.

Each takes its part of every batch. The gradients are averaged and BatchNorm's statistics are those of the whole batch,
so n processes train the network that one would, to float rounding; all of them hold the same latents and levels, the
first one writes the files.
"""

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pcq.data import Data
from pcq.errors import CheckFailed, Elsewhere, PcqError, raise_all
from pcq.progress import Progress, silent
from pcq.scores import Predictor, Scores, evaluate, merged
from pcq.train.splits import subset

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long one process waits for another, which may be reading its data."""

LETTING_GO = 0.1
"""Seconds that gloo's threads, which live on with the group that FSDP2's caches keep, have to let go of tensors: done
while Python shuts down, it aborts the process (https://github.com/pytorch/pytorch/issues/190489)."""

CPU = torch.device("cpu")

_joins = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """Process ``rank`` of ``world``, with its device; a world of one needs no ``torchrun``.

    With more than one, every method is to be called by all of them, in the same order. With ``shard`` each holds a part
    of every parameter, its gradient, its optimizer state and its latent.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    shard: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """The first process's ``value``, in all of them."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def any(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish, whether one of the processes has it."""
        if self.world == 1:
            return wishes
        flags = torch.tensor([int(wish) for wish in wishes])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return tuple(map(bool, flags.tolist()))

    def mean(self, value: Tensor) -> Tensor:
        """Over the processes, of a tensor without gradient."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.world

    def furthest(self, value: Tensor) -> Tensor:
        """The greatest over the processes, elementwise, of a tensor without gradient."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def part(self, mean: Tensor, mine: int, size: int) -> Tensor:
        """The mean loss over ``mine`` of a batch's ``size`` samples, weighted: the processes' mean is the batch's."""
        return mean if self.world == 1 else mean * (mine * self.world / size)

    @torch.no_grad()
    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each gradient the mean over the processes; where none has one (a layer left out), there is none.

        All of them in one piece and after the backward pass, so that the sums are the same ones after a resume.
        """
        if self.world == 1 or self.shard:  # FSDP2 does it in the backward pass
            return
        trained = [p for p in parameters if p.requires_grad]
        some = self.any(*(p.grad is not None for p in trained))
        held = [p for p, wanted in zip(trained, some, strict=True) if wanted]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in held])
        dist.all_reduce(flat)
        flat /= self.world
        for p, mean in zip(held, flat.split([p.numel() for p in held]), strict=True):
            p.grad = mean.view_as(p)

    def spread(self, module: nn.Module) -> None:
        """With ``shard``, leave a part of each parameter in each process (FSDP2).

        The members of the outermost lists of layers are put together one after the other when they run, what is in no
        list for the whole step.

        Raises:
            PcqError: a parameter is a single number, which cannot be cut.
        """
        if not self.shard:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        raise_all(
            [
                PcqError("a single number cannot be sharded", where=name, todo="Leave out --shard")
                for name, parameter in module.named_parameters()
                if parameter.ndim == 0
            ]
        )
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in (*blocks(module), module):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)

    def whole_batches(self) -> AbstractContextManager[object]:
        """Within it BatchNorm in training takes the statistics of all processes' samples."""
        return WholeBatches() if self.world > 1 else nullcontext()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Every tensor becomes the first process's."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def check_same(self, tensors: dict[str, Tensor]) -> None:
        """
        Raises:
            CheckFailed: a tensor differs between the processes.
        """
        if self.world == 1 or self.shard:
            return
        mine = {name: hashlib.sha256(t.detach().cpu().numpy().tobytes()).hexdigest() for name, t in tensors.items()}
        theirs: list[dict[str, str]] = [{}] * self.world
        dist.all_gather_object(theirs, mine)
        apart = [name for name in mine if any(each[name] != mine[name] for each in theirs)]
        if apart:
            what = f"{len(apart)} of {len(mine)} weights differ between the processes"
            raise CheckFailed(what, where=apart[0], todo="Use machines of one kind and one version of torch")

    def evaluate(
        self,
        predict: Predictor,
        data: Data,
        *,
        reference: Predictor | None = None,
        batch: int,
        progress: Progress = silent,
    ) -> Scores:
        """As :func:`pcq.scores.evaluate`, each process on every ``world``-th sample, in equally many batches."""
        if self.world == 1 or data.n < self.world:
            return evaluate(predict, data, reference=reference, batch=batch, progress=progress)
        mine = subset(data, torch.arange(self.rank, data.n, self.world), data.split)
        smallest = data.n // self.world
        batch = next(size for size in itertools.chain(range(batch, 0, -1), itertools.count(batch)) if smallest % size)
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, evaluate(predict, mine, reference=reference, batch=batch, progress=progress))
        return merged(parts)


ALONE = Ranks()


def blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost Sequentials and ModuleLists, but for those that share parameters with others."""
    found = []
    for child in module.children():
        plain = not isinstance(child, (nn.ModuleList, nn.ModuleDict))  # these two have no forward
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and plain:
            found += [child] if next(child.parameters(), None) is not None else []
        else:
            found += blocks(child)
    uses = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    return [block for block in found if all(uses[id(p)] == 1 for p in block.parameters())]


def current(shard: bool = False) -> Ranks:
    """This process, on its device.

    Raises:
        PcqError: there is nothing to shard among.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), device, shard and dist.get_world_size() > 1)
    if shard:
        todo = "Start several: torchrun --nproc-per-node N -m pcq finetune …"
        raise PcqError("one process has nobody to share the weights with", where="--shard", todo=todo)
    return Ranks(device=device)


@contextmanager
def joined() -> Iterator[None]:
    """Within it the processes that ``torchrun`` started talk to one another; without ``torchrun`` nothing happens.

    An error in one of them ends all: it is raised as it is in the first that has one, and as ``Elsewhere`` in the rest.

    Raises:
        PcqError: the environment is not what torchrun makes it, or there are fewer GPUs than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        todo = "Start several processes by torchrun --nproc-per-node N -m pcq …, or one with WORLD_SIZE unset"
        raise PcqError(f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set", where="environment", todo=todo)
    from torch.distributed import nn as _keeper  # noqa: F401 - imported while there is a group, it would keep it for good
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store = next(rendezvous("env://"))[0]
    run = f"pcq{next(_joins)}"  # one program may train several networks, one after the other
    told = PrefixStore(f"{run}/told", store)
    try:
        if torch.cuda.is_available():
            _choose_gpu()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore(f"{run}/group", store),
            rank=int(os.environ["RANK"]),
            world_size=world,
            timeout=PATIENCE,
        )
        yield
    except Exception as error:
        telling = _first_to_tell(told, error)
        with suppress(KeyboardInterrupt):  # torchrun ends all when the first has ended
            _end_group()
            _leave(told, world)
        raise telling from error
    except KeyboardInterrupt as stop:
        if not str(stop) and (other := _told(told)) is not None:
            raise other from None
        raise
    finally:
        _end_group()


def _end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(LETTING_GO)


def _choose_gpu() -> None:
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        todo = f"Start {count} of them, or hide the GPUs to train on the CPU: CUDA_VISIBLE_DEVICES=''"
        raise PcqError(f"process {local} has no GPU of its own: there are {count} for all", where="torchrun", todo=todo)
    torch.cuda.set_device(local)


def _first_to_tell(told: "Store", error: Exception) -> Exception:
    """``error`` if no other process has told one before; what follows from another's end is that one's."""
    lost = _lost(error)
    try:
        if (lost and told.check(["error"])) or told.add("count", 1) > 1:
            what, code = json.loads(told.get("error"))
            return Elsewhere(what, code)
        if lost:
            error = PcqError(
                "another process of this run ended without a word",
                where="torchrun",
                todo="See whether it was killed, by hand or for want of memory; --resume goes on from the last save, "
                "if there was one",
            )
        told.set("error", json.dumps([str(error) or type(error).__name__, getattr(error, "exit_code", 1)]))
    except RuntimeError:  # the process that keeps the store is gone
        return Elsewhere("another process of this run ended", 1) if lost else error
    return error


def _told(told: "Store") -> Elsewhere | None:
    """What another process has told, which is why torchrun interrupts this one."""
    with suppress(RuntimeError):
        if told.check(["error"]):
            return Elsewhere(*json.loads(told.get("error")))
    return None


def _leave(told: "Store", world: int) -> None:
    """The first process may keep the store, so it goes last; those that were killed it does not wait for long."""
    if int(os.environ["RANK"]) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with suppress(RuntimeError):
            told.add("left", 1)
        return
    until = time.monotonic() + 2
    while told.add("left", 0) < world - 1 and time.monotonic() < until:
        time.sleep(0.02)


def _lost(error: BaseException | None) -> bool:
    """Whether it comes from a connection to another process that broke."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__
    return False


class WholeBatches(TorchFunctionMode):
    """BatchNorm over the samples of all processes, whatever layer it is in; torch's SyncBatchNorm runs on GPUs only."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


class _Sum(torch.autograd.Function):
    """Over the processes, and of the gradients too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def _sum(value: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(value))  # type: ignore[no-untyped-call]


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, its mean and variance those of the samples of all processes."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    axes, wide = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    values = x.float()
    count = values.new_tensor([values.numel() / values.shape[1]])
    summed = _sum(torch.cat([values.sum(axes), count]))
    n = summed[-1].detach()
    mean = summed[:-1] / n
    apart = values - mean.view(wide)
    var = _sum(apart.square().sum(axes)) / n
    out = apart * (var + eps).rsqrt().view(wide)
    if weight is not None:
        out = out * weight.view(wide)
    if bias is not None:
        out = out + bias.view(wide)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
        if running_var is not None:
            running_var.lerp_((var * (n / (n - 1))).to(running_var), momentum)
    return out.to(x.dtype)
