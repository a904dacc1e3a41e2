"""ProxConnect and its kin as two step hooks on any ``torch.optim.Optimizer``.

The algorithms are in :mod:`pcq.methods`. Before the optimizer's step each parameter is given the value that the method
updates; after it, that value is saved and the parameter is given the one that the gradient is taken at. Momentum,
Adam's moments and weight decay so belong to what is updated. Nothing is kept in ``optimizer.state`` (it would be cast
to the parameter's dtype, and breaks Adam's lazy start), and nothing of the model is traced.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pcq import qtensor, shards
from pcq.errors import CheckFailed, PcqError, raise_all
from pcq.gpu import prox as prox_gpu
from pcq.grids import Grid
from pcq.methods import METHODS, Method, SignSwish
from pcq.prox import Hard, Prox, proximal
from pcq.proxconnect.checks import ATTACHED, check, refuse_averages
from pcq.proxconnect.state import FORMAT, grid_from, grid_state, refuse_partial
from pcq.proxconnect.weights import Target, Tracked
from pcq.qtensor import QuantizedTensor
from pcq.refit import Refitted, refit_together, refit_weight
from pcq.schedules import Linear, Schedule, Theory


@dataclass(frozen=True)
class Telemetry:
    """Where training stands.

    Attributes:
        step: optimizer steps done.
        strength: of the prox now.
        on_levels: share of the weights that lie on their levels (within rounding).
        flips: share of the weights whose nearest level is another than when last asked, for each step since.
        distance: root mean square of (latent - nearest level) over that of the latent.
    """

    step: int
    strength: float
    on_levels: float
    flips: float
    distance: float


class ProxConnect:
    """Attach a method of the family to ``optimizer``; train as always; :meth:`finish`.

    Three lines in any loop::

        prox = ProxConnect(optimizer, targets(plan, dict(model.named_parameters())), METHODS["parq"], steps=10_000)
        ...  # the loop: zero_grad, backward, clip, optimizer.step() or scaler.step(optimizer), scheduler.step()
        quantized = prox.finish()

    Between steps the model holds the value that the gradient is taken at; its state dict does not hold the latents of
    ProxConnect, :meth:`state_dict` does. Attach when the model is on its device and has the weights to start from.
    What else writes to a weight between steps (a state dict loaded into the model, clamping) is lost with the next step
    where there are latents. Parameters that are given other memory later (``p.data = …``) are followed, on the same
    device and in float32.

    Where the optimizer's step raises, the model holds the latents for the moment. The next call of a method gives it
    its weights again; the next step does too, and raises, as its gradient was taken at the latents.

    Copy or pickle it together with the model and the optimizer, ``copy.deepcopy((model, optimizer, prox))``: the copies
    train on as these would.

    Parameters that FSDP2 has sharded are gathered, one at a time, to fit their levels and to map them: so every row and
    every level is that of one process, whatever is cut. All processes then have to call every method.

    Args:
        optimizer: any whose ``step`` needs no closure, which LBFGS's does; it has to be called without one.
        weights: what to quantize; each is one of the optimizer's parameters, others of which are left alone.
        method: one of METHODS, or a Method of your own.
        schedule: the strength over the training. ProxQuant and reverse ProxConnect map what they have mapped at every
            step before, so that pulls add up: they need strengths that stay small for long, such as
            ``Geometric(0, 0.75, 0.001, 1)``.
        steps: optimizer steps that the training will have.
        refit: steps between refits of the levels to the moving weights; None: the levels stay as first fitted.

    Raises:
        PcqError: the optimizer or a weight has one attached already; the optimizer needs a closure, has no hooks,
            averages in place of weights, or no learning rate where the schedule grows by it; or a weight is not
            float32, not finite, not the optimizer's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, Target],
        method: Method = METHODS["proxconnect"],
        schedule: Schedule = Linear(),  # noqa: B008
        *,
        steps: int,
        refit: int | None = 20,
    ) -> None:
        check(optimizer, weights, method, steps, refit)
        if isinstance(schedule, Theory) and any(group.get("lr") is None for group in optimizer.param_groups):
            what = "the optimizer has no learning rate, by whose sum the schedule Theory grows"
            raise PcqError(what, todo="Give it one, or choose another schedule")
        self.optimizer, self.method, self.schedule, self.steps, self.refit = optimizer, method, schedule, steps, refit
        self.step = 0
        self.hardened = False
        self._skips = False
        self._asked = 0
        self._exchanged = False
        self._rounded = False
        self._batch: tuple[list[Grid], prox_gpu.Batch | None, list[Tracked]] | None = None
        self.weights = {name: Tracked(target, method, refit is not None) for name, target in weights.items()}
        self._groups = self._grouped()
        for weight in self.weights.values():
            self._map_hidden(weight)
        self._hooks: tuple[RemovableHandle, ...] = ()
        self._attach()

    def _attach(self) -> None:
        self._hooks = (
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        )
        ATTACHED.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy brings its optimizer's copy, which torch makes without hooks, and is attached to that if this is."""
        self._refuse_rounded("a copy")
        return {**vars(self), "_hooks": bool(self._hooks), "_batch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._hooks:
            self._attach()
        else:
            self._hooks = ()

    # -- the two hooks ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise PcqError(
                "the optimizer's step was called with a closure, which would be evaluated at the wrong weights",
                todo="Compute the loss and call backward() first, then step() without a closure.",
            )
        self._refuse_rounded("an optimizer step")
        # A fused optimizer is called by GradScaler even for a step that it is to leave out.
        found_inf = getattr(optimizer, "found_inf", None)
        self._skips = found_inf is not None and float(found_inf) > 0
        if self._skips:
            return
        if self._exchanged:
            self._settle()
            raise PcqError(
                "the optimizer's last step failed and left the latents in the model, and this gradient was taken there",
                todo="The model has its weights again: take the gradient once more, then step",
            )
        for name, weight in self.weights.items():
            if weight.moved() and weight.follow(name):
                self._batch = None
            if self.method.backward is not None and weight.parameter.grad is not None:
                latent = weight.rows.split(weight.whole(weight.latent))
                factor = self.method.backward.slope(latent, weight.grid.levels())
                shards.local(weight.parameter.grad).mul_(weight.own(weight.rows.merge(factor)))
        self._exchange(to_model=True)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._skips:
            return
        self.step += 1
        if self._groups[0] is not optimizer.param_groups:  # loaded anew
            self._groups = self._grouped()
        refits = self.refit is not None and self.step % self.refit == 0 and not self.method.posttraining
        if self.method.updates == "latent":
            self._exchange(to_model=False)
        self._exchanged = False
        for weight, group in self._groups[1]:
            rate = group.get("lr")
            weight.mu += 0.0 if rate is None else float(rate)
        if refits:
            self._refit_all()
        self._map_all()

    def _grouped(self) -> tuple[list[dict[str, Any]], list[tuple[Tracked, dict[str, Any]]]]:
        """The optimizer's groups, and that of each weight."""
        groups = self.optimizer.param_groups
        of = {id(parameter): group for group in groups for parameter in group["params"]}
        weights = [weight for weight in self.weights.values() if id(weight.parameter) in of]
        return groups, [(weight, of[id(weight.parameter)]) for weight in weights]

    def _refuse_rounded(self, what: str) -> None:
        """Of what would be lost, or would take the rounded weights for those in training."""
        if self._rounded:
            raise PcqError(f"{what} within quantized(), whose end gives the weights back", todo="Do it outside of it")

    @torch.no_grad()
    def _settle(self) -> None:
        """Outside of a step: the model holds the weights, in the memory that is known here."""
        if self._exchanged:
            if self.method.updates == "latent":
                self._exchange(to_model=False)
            self._exchanged = False
            self._map_all()
        for name, weight in self.weights.items():
            if weight.moved() and weight.follow(name):
                self._batch = None

    def _refit_all(self) -> None:
        """Refit every weight's levels to its latent; on a GPU, all at once that can be."""
        alone = [weight for weight in self.weights.values() if weight.refits]
        if alone and not alone[0].swaps:
            alone = self._refit_together(alone)
        for weight in alone:
            latent = weight.whole(weight.latent)
            weight.grid = refit_weight(weight.quantizer, latent, weight.grid, weight.rows)

    def _refit_together(self, weights: list[Tracked]) -> list[Tracked]:
        """Refit those that two launches refit; the others are left, and given."""
        together, rest = list[tuple[Tracked, Refitted]](), []
        for weight in weights:
            rows = weight.view(weight.latent)
            asked = None if rows is None else Refitted(weight.quantizer, rows, weight.grid)
            here = weight.parameter.device == weights[0].parameter.device and weight.rows.tail == weight.rows.width
            if asked is not None and here and asked.at_once:
                together.append((weight, asked))
            else:
                rest.append(weight)
        if together:
            for (weight, _), grid in zip(together, refit_together([asked for _, asked in together]), strict=True):
                weight.grid = grid
        return rest

    def _exchange(self, to_model: bool) -> None:
        """The parameters get the hidden values for the optimizer to update, or their own again after that."""
        copied: list[tuple[Tensor, Tensor]] = []
        for weight in self.weights.values():
            if weight.hidden is None:
                continue
            if self.method.updates == "latent" and weight.swaps:
                weight.parameter.data = weight.hidden if to_model else weight.shown
            else:
                copied.append((weight.shown, weight.hidden) if to_model else (weight.hidden, weight.shown))
            self._exchanged = to_model
        if copied:
            torch._foreach_copy_([into for into, _ in copied], [source for _, source in copied])

    # -- the map ------------------------------------------------------------------------------------------------------

    def strength(self, mu: float = 1.0) -> float:
        """Of the prox now; ``mu`` as in :mod:`pcq.schedules`."""
        return 1.0 if self.hardened else self.schedule.strength(min(1.0, self.step / self.steps), mu)

    def _map_hidden(self, weight: Tracked) -> None:
        """Make the weight anew from the latent, whichever of the two is hidden."""
        if weight.hidden is not None:
            self._map(weight, weight.latent, weight.mapped)

    @torch.no_grad()
    def _map_all(self) -> None:
        """Make every weight anew from its latent; on a GPU, all at once."""
        if self.method.posttraining:
            return
        weights = list(self.weights.values())
        if not weights[0].swaps:
            weights = self._map_together(weights)
        for weight in weights:
            self._map(weight, weight.latent, weight.mapped)

    def _map_together(self, weights: list[Tracked]) -> list[Tracked]:
        """Map those that one launch can map; the others are left, and given."""
        strengths = {self.strength(mu) for mu in {weight.mu for weight in weights}}
        if len(strengths) > 1 or (isinstance(self.method.prox, SignSwish) and min(strengths) < 1):
            return weights
        shifts = self._prox().shifts(strengths.pop())
        if shifts.identity and shifts.outside == 1:
            return weights
        grids = [weight.grid for weight in weights]
        if self._batch is None or any(a is not b for a, b in zip(self._batch[0], grids, strict=True)):
            together, rest = [], []
            for weight in weights:
                rows, into = map(weight.view, (weight.latent, weight.mapped))
                here = weight.parameter.device == weights[0].parameter.device
                if here and rows is not None and into is not None and prox_gpu.fits(rows, into):
                    together.append((rows, weight.grid, into))
                else:
                    rest.append(weight)
            self._batch = grids, prox_gpu.Batch(together) if together else None, rest
        _, batch, rest = self._batch  # kept until levels change
        if batch is not None:
            batch(*shifts.numbers)
        return rest

    def _prox(self) -> Prox:
        return Hard() if isinstance(self.method.prox, SignSwish) else self.method.prox

    @torch.no_grad()
    def _map(self, weight: Tracked, source: Tensor, out: Tensor) -> None:
        strength = self.strength(weight.mu)
        rows = weight.rows.split(weight.whole(source))
        if isinstance(self.method.prox, SignSwish) and strength < 1:
            out.copy_(weight.own(weight.rows.merge(self.method.prox.value(rows, weight.grid.levels()))))
            return
        into = weight.view(out)
        mapped = proximal(rows, weight.grid, self._prox().shifts(strength), out=into)
        if into is None:
            out.copy_(weight.own(weight.rows.merge(mapped)))

    # -- looking, ending, saving --------------------------------------------------------------------------------------

    @contextmanager
    def quantized(self) -> Iterator[dict[str, Grid]]:
        """Within it the model has its weights on the nearest levels (which it gives), to be scored as what it is going
        to be. A step of the optimizer is refused there.

        Raises:
            PcqError: a schedule-free optimizer is in its eval mode.
        """
        refuse_averages(self.optimizer)
        self._settle()
        kept = [(weight.shown.clone(), weight.grid) for weight in self.weights.values()]
        for weight in self.weights.values():
            if self.method.posttraining:
                weight.grid = qtensor.fit(weight.quantizer, weight.whole(weight.shown), weight.rows)
            weight.shown.copy_(weight.own(weight.nearest(weight.whole(weight.latent))))
        before, self._rounded = self._rounded, True
        try:
            yield {name: weight.grid for name, weight in self.weights.items()}
        finally:
            self._rounded = before
            for weight, (shown, grid) in zip(self.weights.values(), kept, strict=True):
                weight.shown.copy_(shown)
                weight.grid = grid

    @torch.no_grad()
    def telemetry(self) -> Telemetry:
        """Where training stands; about ten copies of the weights, so ask now and then."""
        self._refuse_rounded("telemetry()")
        self._settle()
        weights = self.weights.values()
        total = sum(math.prod(weight.rows.shape) for weight in weights)
        strength = sum(self.strength(weight.mu) * math.prod(weight.rows.shape) for weight in weights)
        counts = [weight.counts() for weight in weights]
        on, flips, rest, norm = (sum(column) for column in zip(*torch.stack(counts).tolist(), strict=True))
        since, self._asked = max(1, self.step - self._asked), self.step
        return Telemetry(
            self.step, strength / total, on / total, flips / total / since, (rest / norm) ** 0.5 if norm else 0.0
        )

    def harden(self) -> None:
        """Take the nearest level from now on, whatever the schedule says: for training that ends early."""
        self._refuse_rounded("harden()")
        self._settle()
        self.hardened = True
        self._map_all()

    def finish(self) -> dict[str, QuantizedTensor]:
        """Check that every weight lies on its levels, bit by bit; detach; the quantized tensors by name.

        Post-training quantization is done here: its levels are fitted and its weights rounded.

        Raises:
            CheckFailed: training ended before its hard phase, or weights are off their levels.
        """
        self._refuse_rounded("finish()")
        refuse_averages(self.optimizer)
        self._settle()
        if self.strength() < 1 and not self.method.posttraining:
            raise CheckFailed(
                f"training stopped at step {self.step} of {self.steps}, before its hard phase",
                todo="Train on, or call harden() to round the weights as they are",
            )
        done, problems = {}, []
        for name, weight in self.weights.items():
            if self.method.posttraining:
                shown = weight.whole(weight.shown)
                weight.grid = qtensor.fit(weight.quantizer, shown, weight.rows)
                weight.shown.copy_(weight.own(weight.nearest(shown)))
            elif weight.hidden is not None and self.method.updates == "weight":
                weight.shown.copy_(weight.hidden)
            shown = weight.whole(weight.shown)
            done[name] = qtensor.encode(shown, weight.grid, weight.rows)
            off = int((done[name].dequantize() != shards.whole(weight.parameter.data)).sum())
            if not bool(torch.isfinite(shown).all()):
                todo = "Training has diverged: lower the learning rate, or skip steps whose gradients are not finite"
                problems.append(CheckFailed("has infinite or NaN weights", where=name, todo=todo))
            elif off:
                problems.append(
                    CheckFailed(
                        f"{off} of {shown.numel()} weights are not on their levels",
                        where=name,
                        todo="Something other than the optimizer changed them after its last step.",
                    )
                )
        raise_all(list[PcqError](problems))
        self.detach()
        return done

    def detach(self) -> None:
        """Take the hooks off; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()
        ATTACHED.discard(self)

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from, in tensors and plain values. As with an optimizer's, tensors are not copies.

        Of sharded parameters the latents are whole, so that one process can go on from it, or several.
        """
        self._refuse_rounded("state_dict()")
        refuse_averages(self.optimizer)
        self._settle()
        return {
            "format": FORMAT,
            "run": self._run(),
            "step": self.step,
            "hardened": self.hardened,
            "asked": self._asked,
            "weights": {
                name: {
                    "latent": weight.saved(weight.latent),
                    "mu": weight.mu,
                    "grid": grid_state(weight.grid),
                    "codes": weight.codes,
                    "quantizer": str(weight.quantizer),
                    "rows": str(weight.rows),
                }
                for name, weight in self.weights.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, bit by bit, from where :meth:`state_dict` was taken; the parameters are set too.

        Raises:
            PcqError: it is no such state, or not all of one; or of another version, other settings or other weights.
                Nothing is changed then.
        """
        self._refuse_rounded("load_state_dict()")
        refuse_partial(state)
        problems = [
            PcqError(f"the saved run had {key} {state['run'].get(key)}, this one has {mine}", where="ProxConnect state")
            for key, mine in self._run().items()
            if state["run"].get(key) != mine
        ]
        for name in sorted(self.weights.keys() ^ state["weights"].keys()):
            side = "only in the saved state" if name in state["weights"] else "missing in the saved state"
            problems.append(PcqError(f"{side}", where=name))
        for name in sorted(self.weights.keys() & state["weights"].keys()):
            saved, weight = state["weights"][name], self.weights[name]
            got, want = tuple(saved["latent"].shape), weight.rows.shape
            if got != want:
                problems.append(PcqError(f"saved with shape {got}, here it has {want}", where=name))
                continue
            for key, mine in (("quantizer", str(weight.quantizer)), ("rows", str(weight.rows))):
                if saved[key] != mine:
                    problems.append(PcqError(f"saved with {saved[key]}, here it has {mine}", where=name))
        raise_all(problems)
        self._settle()
        self.step, self.hardened, self._asked = state["step"], state["hardened"], state["asked"]
        for name, weight in self.weights.items():
            saved = state["weights"][name]
            weight.mu, weight.grid = saved["mu"], grid_from(saved["grid"], weight.shown.device)
            weight.codes = None if saved["codes"] is None else saved["codes"].to(weight.shown.device)
            weight.latent.copy_(weight.own(saved["latent"]))
            self._map_hidden(weight)

    def _run(self) -> dict[str, str]:
        return {
            "method": str(self.method),
            "schedule": str(self.schedule),
            "steps": str(self.steps),
            "refit": str(self.refit),
        }
