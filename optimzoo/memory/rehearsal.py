"""One training step, run to see what is alive in it."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from optimzoo.memory.activations import call
from optimzoo.memory.fakes import unpacked
from optimzoo.memory.ledger import Ledger, ledger
from optimzoo.memory.timeline import Timeline, share

Make = Callable[[nn.Module], Optimizer | Sequence[Optimizer]]
Loss = Callable[[nn.Module, Any], Tensor]
Release = Callable[[nn.Module, Sequence[Optimizer]], Any]  # from here on, backward steps and frees each gradient


class Unplannable(RuntimeError):
    """A model or an optimizer that cannot run on fake tensors; the message names it and the reason."""


class Rehearsal:
    """One model, its optimizers and the timeline of their step."""

    def __init__(self, model: nn.Module, batch: Any, loss: Loss, timeline: Timeline) -> None:
        self.model, self.batch, self.loss, self.timeline = model, batch, loss, timeline
        self.trained = [p for p in model.parameters() if p.requires_grad]
        own = ledger(model).by("kind")
        self.parameters = own.pop("parameter", 0)
        self.buffers = sum(own.values())
        self.inputs = sum(t.untyped_storage().nbytes() for t in tree_leaves(batch) if isinstance(t, Tensor))
        self.optimizers: list[Optimizer] = []
        self.activations = 0
        self.state = Ledger(())

    def make(self, make: Make | None) -> None:
        """Make the optimizers and their state; what is born here is held from now on."""
        if make is not None:
            made = make(self.model)
            self.optimizers = list(optimizers_of(made))
            with self._counting():
                self._gradients()
                self._update([o for o in self.optimizers if not hasattr(o, "memory")])  # others have their state
                self._clear()
        books = [o.memory() if hasattr(o, "memory") else ledger(o) for o in self.optimizers]
        self.state = Ledger(tuple(entry for book in books for entry in book.entries))
        ranks = self.timeline.world_size
        self.timeline.held = share(self.parameters, ranks) + share(self.state.total, ranks) + self.buffers + self.inputs
        self.timeline.live -= self.state.total  # a remainder is what optimizers hold without its being state
        self.timeline.step_workspace = self.timeline.most_gradients = 0

    def only_step(self, release: Release | None) -> None:
        self.timeline.begin("step")
        with self._watched(release):
            if release is None:
                self._gradients()
            else:
                for p in self.trained:
                    p.sum().backward()
        self._update(self.optimizers)
        if release is None:
            self._ordinary()

    def step(self, accumulate: int, autocast: torch.dtype | None, release: Release | None) -> None:
        with self._watched(release):
            for _ in range(min(accumulate, 2)):  # from the second micro-batch on they are all alike
                self.timeline.begin("forward")
                before = self.timeline.live
                with _named(type(self.model).__name__), unpacked():
                    with _autocast(self.model, autocast):
                        loss = self.loss(self.model, self.batch)
                    self.activations = max(self.activations, self.timeline.live - before)
                    self.timeline.begin("backward")
                    loss.backward()
        if self.optimizers:
            self.timeline.begin("step")
            self._update(self.optimizers)
            if release is None:
                self._ordinary()

    @contextmanager
    def _watched(self, release: Release | None) -> Iterator[None]:
        """Note when gradients are complete and, with `release`, what happens from then until they are freed."""
        inside = ExitStack()

        def complete(p: Tensor) -> None:
            self.timeline.arrived(p)
            if release is not None:
                inside.enter_context(self.timeline.stepping())

        def freed(p: Tensor) -> None:
            inside.close()
            self.timeline.dropped(p)

        hooks = [p.register_post_accumulate_grad_hook(complete) for p in self.trained]
        if release is not None:
            release(self.model, self.optimizers)
            hooks += [p.register_post_accumulate_grad_hook(freed) for p in self.trained]
        try:
            yield
        finally:
            for hook in hooks:  # they would keep the model for ever
                hook.remove()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Steps inside are not counted by the groups: the one to plan is a step at which all periodic work is due."""
        groups = [(group, dict(group)) for optimizer in self.optimizers for group in optimizer.param_groups]
        yield
        for group, before in groups:
            group.update(before)

    def _gradients(self) -> None:
        for p in self.trained:
            p.grad = torch.empty_like(p)
            self.timeline.arrived(p)

    def _clear(self) -> None:
        for p in self.trained:
            self.timeline.dropped(p)
            p.grad = None

    def _ordinary(self) -> None:
        """After the step at which all periodic work is due, one at which none is: on a device small ones go together.

        Large parameters are left out: they would step as before, in as much time.
        """
        zoo = [optimizer for optimizer in self.optimizers if hasattr(optimizer, "small")]
        small = {p for optimizer in zoo for p in optimizer.small()}
        kept = {p: p.grad for p in self.trained if p not in small}
        for p in kept:
            p.grad = None
        if small:
            self._update(zoo)
        for p, grad in kept.items():
            p.grad = grad

    def _update(self, optimizers: Sequence[Optimizer]) -> None:
        gc.collect()  # what the forward pass left in cycles could be freed inside of the step, or not
        # Dynamo reads values; what compiled code would fuse is planned as it runs without, which is no less.
        with self.timeline.stepping(), torch.compiler.set_stance("force_eager"):
            for optimizer in optimizers:
                with _named(f"{type(optimizer).__module__.split('.')[0]}'s {type(optimizer).__name__}"):
                    optimizer.step()


def optimizers_of(made: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    """What a function that makes optimizers gave; TypeError for anything else."""
    every = [made] if isinstance(made, Optimizer) else made
    if not isinstance(every, Sequence) or not all(isinstance(one, Optimizer) for one in every):
        raise TypeError(f"plan: make must return an optimizer or a list of them, not {type(made).__name__}")
    return every


@contextmanager
def garbage_of_its_own() -> Iterator[None]:
    """What is collected inside was made inside: to look through all that a process holds takes a third of a second."""
    if gc.get_freeze_count():  # somebody else's, which could not be given back
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The output's `loss`, or the mean of its first tensor."""
    output = call(model, batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    first = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad), None)
    if first is None:
        raise ValueError("nothing in its output requires a gradient; give plan a loss=")
    return first.float().mean()


def _autocast(model: nn.Module, dtype: torch.dtype | None) -> Any:
    p = next(model.parameters(), None)
    return nullcontext() if dtype is None or p is None else torch.autocast(p.device.type, dtype)


@contextmanager
def _named(who: str) -> Iterator[None]:
    """What fails on fake tensors is told by name."""
    try:
        yield
    except Unplannable:
        raise
    except Exception as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "_local_scalar_dense" in detail:
            detail = "it reads the value of a tensor, as .item() does, and a plan has no values"
        raise Unplannable(f"{who} cannot be planned: {detail}") from error
