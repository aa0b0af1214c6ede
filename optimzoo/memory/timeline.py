"""What is alive at every moment of a training step, and the moment at which it is most."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimzoo.memory.reach import storage_parts
from optimzoo.memory.workspace import Workspace


@dataclass(frozen=True)
class Moment:
    """A peak: its bytes, the phase and the operation in which it is reached, and the gradients that are alive then."""

    nbytes: int = 0
    phase: str = ""
    operation: str = ""
    gradients: int = 0

    def __str__(self) -> str:
        return f"{self.phase}, in {self.operation}" if self.operation else self.phase


class Timeline(Workspace):
    """Live bytes from `held` bytes on, by phase; `.peak` starts anew with every phase.

    A gradient becomes part of the figures when it is complete (`arrived`). With `world_size` above 1 only that share of
    it stays, as after a reduce-scatter, until it is dropped (`dropped`).
    """

    def __init__(self, world_size: int = 1) -> None:
        super().__init__()
        self.held = self.gradients = self.most_gradients = self.step_workspace = 0
        self.world_size = world_size
        self.peaks: dict[str, Moment] = {}
        self._phase, self._highest = "", 0
        self._arrived: dict[Tensor, int] = {}

    def begin(self, phase: str) -> None:
        """From here on operations belong to `phase`."""
        self._phase, self.peak = phase, self.live
        self._look("")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # fake tensors are asked for it all the time
            return func(*args)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.held + self.peak > self._highest and self._phase:
            self._look(str(func).removeprefix("aten.").partition(".")[0])
        return out

    def _look(self, operation: str) -> None:
        known = self.peaks.get(self._phase)
        if known is None or self.held + self.peak > known.nbytes:
            self.peaks[self._phase] = Moment(self.held + self.peak, self._phase, operation, self.gradients)
        self._highest = self.peaks[self._phase].nbytes

    def arrived(self, p: Tensor) -> None:
        """The gradient of `p` is complete, perhaps once more."""
        if p in self._arrived or p.grad is None:
            return
        nbytes = sum(part.untyped_storage().nbytes() for part in storage_parts(p.grad))
        self._arrived[p] = nbytes
        self.gradients += share(nbytes, self.world_size)
        self.live -= nbytes - share(nbytes, self.world_size)
        self.most_gradients = max(self.most_gradients, self.gradients)

    def dropped(self, p: Tensor) -> None:
        """The gradient of `p` goes; to be called before it does."""
        nbytes = self._arrived.pop(p, 0)
        self.gradients -= share(nbytes, self.world_size)
        self.live += nbytes - share(nbytes, self.world_size)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside, an optimizer steps: what it holds beyond that is workspace."""
        before, start, self.peak = self.peak, self.live, self.live
        yield
        # Not simply minus the end: garbage from before the step may be collected in it.
        self.step_workspace = max(self.step_workspace, self.peak - max(start, self.live))
        self.peak = max(before, self.peak)


def share(nbytes: int, world_size: int) -> int:
    """What each of several ranks holds of something sharded, rounded up."""
    return -(-nbytes // world_size)
