"""The bytes of training before any are allocated: the real model and the real optimizer on fake tensors."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from optimzoo.memory.activations import _call
from optimzoo.memory.ledger import Ledger, human, ledger
from optimzoo.memory.reach import plain_tensors
from optimzoo.memory.timeline import Moment, Timeline, share

Make = Callable[[nn.Module], Optimizer | Sequence[Optimizer]]
Loss = Callable[[nn.Module, Any], Tensor]

NOT_COVERED = (
    "not covered: scratch memory inside kernels and compiled graphs, the allocator's rounding and fragmentation, "
    "the device's context"
)
SHARDED = (
    "sharded arithmetically: parameters, gradients and state are divided by the number of ranks; not covered are the "
    "gathered parameters of the units in flight, communication buffers, and what is replicated; the step's workspace "
    "is that of whole parameters"
)


class Unplannable(RuntimeError):
    """A model or an optimizer that cannot run on fake tensors; the message names it and the reason."""


@dataclass(frozen=True)
class Plan:
    """Bytes of one training step; `peak` is the most that is alive at once, not the sum of the parts.

    `activations`: what a forward pass leaves behind for backward. `gradients`: the most complete gradients at once.
    `workspace`: the most that an optimizer's step holds for a moment. `moment` tells where the peak is, `peaks` what
    each phase reaches, `at_peak` what is alive there.
    """

    parameters: int
    buffers: int
    inputs: int
    gradients: int
    state: int
    workspace: int
    activations: int
    peak: int
    moment: str
    peaks: dict[str, int]
    at_peak: dict[str, int]
    state_by_kind: dict[str, int]
    optimizer: str
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """The parts and the peak as aligned text."""
        kinds = [(f"  {kind}", size) for kind, size in sorted(self.state_by_kind.items(), key=lambda item: -item[1])]
        rows = [("parameters", self.parameters), ("buffers", self.buffers), ("inputs", self.inputs)]
        rows += [("gradients", self.gradients), ("state", self.state), *kinds]
        rows += [("workspace", self.workspace), ("activations", self.activations), ("peak", self.peak)]
        alive = dict(self.at_peak)
        cells = [("", "bytes", "at the peak")]
        cells += [(name, human(size), human(alive.pop(name)) if name in alive else "") for name, size in rows]
        cells[-1:-1] = [(name, "", human(size)) for name, size in alive.items()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in cells]
        phases = ", ".join(f"{phase} {human(size)}" for phase, size in self.peaks.items())
        return "\n".join([*lines, f"the peak is in: {self.moment}", f"peaks: {phases}", *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return self.table()


class _PlanMode(FakeTensorMode):
    """Fake tensors that know for which device they stand: without one, its tensors cannot be faked under its name."""

    def __init__(self, stands_for: str) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.stands_for = stands_for


def plan(
    model: nn.Module | Callable[[], nn.Module],
    make: Make | None,
    batch: Any = None,
    *,
    loss: Loss | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    release: bool = False,
    world_size: int = 1,
    convert: Callable[[nn.Module], Any] | None = None,
    device: str | None = None,
) -> Plan:
    """Run a training step on fake tensors and tell its bytes; nothing of the model is touched or allocated.

    `model`: a module, on any device, or a function that builds one, called where tensors are fake: give it the dtype
    there, as fake parameters cannot be converted later. `make`: fake model -> optimizer or optimizers, None for forward
    and backward alone. `batch`: what the model is called with; without one only the optimizer's step is planned.
    `loss`: (model, batch) -> scalar, by default the output's `loss` or the mean of its first tensor.

    `release`: every gradient is used and freed as soon as it is there. `world_size`: shards of FSDP, by arithmetic.
    `convert`: applied to the fake model first. `device`: "cpu" or "cuda", the kind of machine that is planned for, by
    default the model's. All periodic work of an optimizer is planned as falling into this one step.
    """
    if release and accumulate > 1:
        raise ValueError("plan: release=True uses every gradient at once, so it cannot accumulate; drop one of the two")
    for name, value in (("accumulate", accumulate), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"plan: {name}={value} must be at least 1")
    kind = device or (next((p.device.type for p in model.parameters()), "cpu") if _is_module(model) else "cpu")
    mode = _PlanMode("cpu" if kind == "meta" else kind)
    with torch.enable_grad(), mode, Timeline(world_size) as timeline:
        fake = _fake_model(model, mode)
        if convert is not None:
            convert(fake)
        if checkpointing:
            _checkpoint(fake)
        inputs = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, batch)
        timeline.live = 0  # up to here one storage may have been met as several
        rehearsal = _Rehearsal(fake, inputs, loss or _loss, timeline)
        rehearsal.make(make)
        if batch is None:
            rehearsal.only_step(release)
        else:
            rehearsal.step(accumulate, autocast, release)
        return rehearsal.plan(world_size, make)


class _Rehearsal:
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
            self.optimizers = [made] if isinstance(made, Optimizer) else list(made)
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

    def only_step(self, release: bool) -> None:
        self.timeline.begin("step")
        for part in [[p] for p in self.trained] if release else [self.trained]:
            with self._counting():
                self._gradients(part)
                self._update(self.optimizers)
                self._clear()

    def step(self, accumulate: int, autocast: torch.dtype | None, release: bool) -> None:
        for p in self.trained:
            p.register_post_accumulate_grad_hook(self._release if release else self.timeline.arrived)
        for _ in range(min(accumulate, 2)):  # from the second micro-batch on they are all alike
            self.timeline.begin("forward")
            before = self.timeline.live
            with _named(type(self.model).__name__), _unpacked():
                with _autocast(self.model, autocast):
                    loss = self.loss(self.model, self.batch)
                self.activations = max(self.activations, self.timeline.live - before)
                self.timeline.begin("backward")
                loss.backward()
        if not release and self.optimizers:
            self.timeline.begin("step")
            self._update(self.optimizers)

    def _release(self, p: Tensor) -> None:
        """As a hook: use the gradient of this parameter alone, and free it."""
        with self._counting():
            self.timeline.arrived(p)
            self._update(self.optimizers)
            self._clear([p])

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Steps inside are not counted by the groups: the one to plan is a step at which all periodic work is due."""
        groups = [(group, dict(group)) for optimizer in self.optimizers for group in optimizer.param_groups]
        yield
        for group, before in groups:
            group.update(before)

    def _gradients(self, params: Sequence[Tensor] | None = None) -> None:
        for p in self.trained if params is None else params:
            p.grad = torch.empty_like(p)
            self.timeline.arrived(p)

    def _clear(self, params: Sequence[Tensor] | None = None) -> None:
        for p in self.trained if params is None else params:
            self.timeline.dropped(p)
            p.grad = None

    def _update(self, optimizers: Sequence[Optimizer]) -> None:
        with self.timeline.stepping():
            for optimizer in optimizers:
                with _named(f"{type(optimizer).__module__.split('.')[0]}'s {type(optimizer).__name__}"):
                    optimizer.step()

    def plan(self, ranks: int, make: Make | None) -> Plan:
        peaks = self.timeline.peaks
        top = max(peaks.values(), key=lambda moment: moment.nbytes)
        parts = {"parameters": share(self.parameters, ranks), "buffers": self.buffers, "inputs": self.inputs}
        parts["state"] = share(self.state.total, ranks)
        alive = parts | {"gradients": top.gradients}
        alive["everything else"] = top.nbytes - sum(alive.values())
        return Plan(
            **parts,
            gradients=self.timeline.most_gradients,
            workspace=self.timeline.step_workspace,
            activations=self.activations,
            peak=top.nbytes,
            moment=str(top),
            peaks={phase: moment.nbytes for phase, moment in peaks.items()},
            at_peak=alive,
            state_by_kind={kind: share(size, ranks) for kind, size in self.state.by("kind").items()},
            optimizer=" + ".join(type(o).__name__ for o in self.optimizers),
            notes=(NOT_COVERED, *((SHARDED,) if ranks > 1 else ())),
        )


def _is_module(model: Any) -> bool:
    return isinstance(model, nn.Module)


def _fake_model(model: nn.Module | Callable[[], nn.Module], mode: FakeTensorMode) -> nn.Module:
    """The model that the function builds, or a copy of the module, with fake tensors; in training mode."""
    if not isinstance(model, nn.Module):
        return model().train()
    memo: dict[int, Any] = {}
    for t in {id(t): t for t in (*model.parameters(), *model.buffers(), *plain_tensors(model))}.values():
        plain = t.detach()
        if plain.device.type == "meta":  # models that read a value in their forward cannot do it there
            fake = torch.empty_strided(plain.shape, plain.stride(), dtype=plain.dtype)
        else:
            fake = plain if isinstance(plain, FakeTensor) else mode.from_tensor(plain)
        memo[id(t)] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
    return copy.deepcopy(model, memo).train()


def _checkpoint(model: nn.Module) -> None:
    """Keep the inputs of blocks only, as transformers' models do when asked."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": False})
            return
    raise ValueError(f"plan: {type(model).__name__} has no gradient_checkpointing_enable(); checkpoint in its forward")


def _loss(model: nn.Module, batch: Any) -> Tensor:
    output = _call(model, batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    first = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)
    return first.float().mean()


def _autocast(model: nn.Module, dtype: torch.dtype | None) -> Any:
    p = next(model.parameters(), None)
    return nullcontext() if dtype is None or p is None else torch.autocast(p.device.type, dtype)


@contextmanager
def _unpacked() -> Iterator[None]:
    """Let transformers take position ids without values for those of one sequence a row.

    It reads them to find packed sequences and, where it cannot, builds a dense mask that training does without.
    """
    masks = sys.modules.get("transformers.masking_utils")
    with mock.patch.object(masks, "find_packed_sequence_indices", lambda position_ids: None) if (
        masks is not None and hasattr(masks, "find_packed_sequence_indices")
    ) else nullcontext():
        yield


@contextmanager
def _named(who: str) -> Iterator[None]:
    """What fails on fake tensors is told by name."""
    try:
        yield
    except Exception as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "_local_scalar_dense" in detail:
            detail = "it reads the value of a tensor, as .item() does, and a plan has no values"
        raise Unplannable(f"{who} cannot be planned: {detail}") from error
