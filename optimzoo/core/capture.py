"""Steps that are captured in a CUDA graph: what the host decides would be decided once, for all replays."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from optimzoo.core.member import Member
from optimzoo.core.stages import first_stage, keywords
from optimzoo.core.storage import State, compute_dtype, is_coarse, slot_names
from optimzoo.functional.slices import on_host


def refuse_capture(owner: str, group: dict[str, Any], members: Iterable[Member], state: dict[Tensor, State]) -> None:
    """Raise RuntimeError, with what to do instead, if a replay of these members' step would not be their next step."""
    where = f"{owner}: this step is being captured in a CUDA graph, and"
    for member in members:
        rule, h, p = member.route.rule, member.route.h, member.p
        if not isinstance(group["lr"], Tensor) or on_host(group["lr"]):
            raise RuntimeError(
                f"{where} lr is a number that all replays would take: give lr=torch.tensor(..., device=...)"
            )
        if rule.refresh is not None and rule.due(group["step"], h):
            raise RuntimeError(f"{where} {member.name!r} is decomposed in it, which a graph cannot: take a step before")
        asked, slots = keywords(first_stage(rule)), state[p]
        if member.route.periodic or "seed" in asked or ("step" in asked and "step" not in slots):
            raise RuntimeError(f"{where} {rule.__name__} counts its steps on the host: step outside of the graph")
        dtype = compute_dtype(p.dtype)
        by_chance = h.rounding == "stochastic" and p.dtype != dtype
        if by_chance or any(is_coarse(slots, name, dtype) for name in slot_names(slots)):
            raise RuntimeError(
                f"{where} all replays would round {member.name!r} by the same chance: leave state_dtype and "
                "rounding='stochastic' out, or step outside of the graph"
            )
