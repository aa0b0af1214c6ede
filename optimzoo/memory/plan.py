"""The bytes of training before any are allocated: the real model and the real optimizer on fake tensors."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from optimzoo.memory.fakes import StandIn, checkpoint_blocks, device_of, fake_model, fake_tensor
from optimzoo.memory.ledger import human
from optimzoo.memory.rehearsal import Loss, Make, Rehearsal, Release, default_loss, garbage_of_its_own
from optimzoo.memory.timeline import Timeline, share

NOT_COVERED = (
    "not covered: scratch memory inside kernels, what a compiler saves or adds, the allocator's rounding and "
    "fragmentation, the device's context"
)
SHARDED = (
    "sharded arithmetically: parameters, gradients and state are divided by the number of ranks; not covered are the "
    "gathered parameters of the units in flight, communication buffers, and what is replicated; the step's workspace "
    "is that of whole parameters"
)


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


def plan(
    model: nn.Module | Callable[[], nn.Module],
    make: Make | None,
    batch: Any = None,
    *,
    loss: Loss | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    release: Release | None = None,
    world_size: int = 1,
    convert: Callable[[nn.Module], Any] | None = None,
    device: str | None = None,
) -> Plan:
    """Run a training step on fake tensors and tell its bytes; nothing of the model is touched or allocated.

    `model`: a module, on any device, or a function that builds one, called where tensors are fake: give it the dtype
    there, as fake parameters cannot be converted later. `make`: fake model -> optimizer or optimizers, None for forward
    and backward alone. `batch`: what the model is called with; without one only the optimizer's step is planned.
    `loss`: (model, batch) -> scalar, by default the output's `loss` or the mean of its first tensor.

    `release`: (fake model, optimizers) -> anything; called before backward, which from then on uses and frees each
    gradient. `world_size`: shards of FSDP, by arithmetic. `convert`: applied to the fake model first. `device`: "cpu"
    or "cuda", the kind of machine that is planned for, by default the model's. All periodic work of an optimizer is
    planned as falling into this one step.
    """
    for name, value in (("accumulate", accumulate), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"plan: {name}={value} must be at least 1")
    mode = StandIn(torch.device(device).type if device else device_of(model))
    with garbage_of_its_own(), torch.enable_grad(), mode, Timeline(world_size) as timeline:
        fake = fake_model(model, mode)
        if convert is not None:
            convert(fake)
        if checkpointing:
            checkpoint_blocks(fake)
        inputs = tree_map(lambda x: fake_tensor(x, mode) if isinstance(x, Tensor) else x, batch)
        timeline.live = 0  # up to here one storage may have been met as several
        rehearsal = Rehearsal(fake, inputs, loss or default_loss, timeline)
        rehearsal.make(make)
        if batch is None:
            rehearsal.only_step(release)
        else:
            rehearsal.step(accumulate, autocast, release)
        foreign = "" if device_of(fake) == mode.stands_for else ", with the kernels that a CPU would choose"
        return _summary(rehearsal, f"planned for {mode.stands_for}{foreign}")


def _summary(of: Rehearsal, target: str) -> Plan:
    ranks = of.timeline.world_size
    peaks = of.timeline.peaks
    top = max(peaks.values(), key=lambda moment: moment.nbytes)
    parts = {"parameters": share(of.parameters, ranks), "buffers": of.buffers, "inputs": of.inputs}
    parts["state"] = share(of.state.total, ranks)
    alive = parts | {"gradients": top.gradients}
    alive["everything else"] = top.nbytes - sum(alive.values())
    return Plan(
        **parts,
        gradients=of.timeline.most_gradients,
        workspace=of.timeline.step_workspace,
        activations=of.activations,
        peak=top.nbytes,
        moment=str(top),
        peaks={phase: moment.nbytes for phase, moment in peaks.items()},
        at_peak=alive,
        state_by_kind={kind: share(size, ranks) for kind, size in of.state.by("kind").items()},
        optimizer=" + ".join(type(o).__name__ for o in of.optimizers),
        notes=(target, NOT_COVERED, *((SHARDED,) if ranks > 1 else ())),
    )
