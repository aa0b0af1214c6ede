"""A parameter as the engine sees it, and what is kept for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optimzoo.core.routing import Route, matrix_shape
from optimzoo.core.slots import Slot
from optimzoo.core.storage import ERROR, compute_dtype, stored


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter, its name and where it goes."""

    p: Tensor
    name: str
    route: Route


def specs(member: Member) -> dict[str, Slot]:
    """Everything that is kept for a parameter: its rule's slots as they are stored, and the error of its rounding."""
    p, h = member.p, member.route.h
    slots = stored(member.route.rule.slots(matrix_shape(p, member.route.layout), h), p.dtype, h.state_dtype)
    if h.rounding == "error" and p.dtype != compute_dtype(p.dtype):
        slots[ERROR] = Slot(tuple(p.shape), "residual", p.dtype)
    if h.rounding == "stochastic" and p.dtype == torch.float16:
        raise TypeError(f"rounding='stochastic' is for bfloat16 and {member.name!r} is float16; use rounding='error'")
    return slots
