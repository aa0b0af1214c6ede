"""A parameter as the engine sees it, what is kept for it, and one step of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optimzoo.core.routing import Route, matrix_shape
from optimzoo.core.slots import Slot
from optimzoo.core.storage import ERROR, State, compute_dtype, stored
from optimzoo.functional.random import fold


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter, its name and where it goes; `memo` is the engine's, of how it was stepped the last time."""

    p: Tensor
    name: str
    route: Route
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


def specs(member: Member) -> dict[str, Slot]:
    """Everything that is kept for a parameter: its rule's slots as they are stored, and the error of its rounding."""
    p, h = member.p, member.route.h
    slots = stored(member.route.rule.slots(matrix_shape(p, member.route.layout), h), p.dtype, h.state_dtype)
    if h.rounding == "error" and p.dtype != compute_dtype(p.dtype):
        slots[ERROR] = Slot(tuple(p.shape), "residual", p.dtype)
    if h.rounding == "stochastic" and p.dtype == torch.float16:
        raise TypeError(f"rounding='stochastic' is for bfloat16 and {member.name!r} is float16; use rounding='error'")
    return slots


@dataclass(slots=True)
class Task:
    """One parameter's step: what is stepped, with what, and what is told of it."""

    member: Member
    g: Tensor
    state: State
    lr: float | Tensor
    count: int  # steps that the group has completed
    extras: State  # what the optimizer gives the rule beside its slots
    lost: Tensor | None  # counts updates that rounding swallows
    verdicts: Tensor | None = None  # (n,) whether gradients may be used, where only the device knows,
    place: int = 0  # and which of them is about this one
    first: int = 0  # the position in the whole parameter of its first element here

    @property
    def ok(self) -> Tensor | None:
        """Whether the gradient may be used: 0-dim, None where the host knows that it may."""
        return None if self.verdicts is None else self.verdicts[self.place]

    @property
    def rule(self) -> Any:
        return self.member.route.rule

    @property
    def h(self) -> Any:
        return self.member.route.h

    @property
    def seed(self) -> int:
        """Of everything random in this step of this parameter."""
        return fold(getattr(self.h, "seed", 0), self.member.name, self.count)

    def rounding_seed(self, what: int | str) -> int:
        """Of the rounding of "weight", or of the slot with that number."""
        return fold(self.seed, what)
