"""How the step of one parameter is executed: gradient in, slots open, rule, slots closed, weight changed.

Three ways, chosen per parameter:

* a rule's own in-place `update` on lists of tensors, where dtypes allow it: no workspace;
* element-wise rules slice by slice, so that workspace does not depend on the largest tensor;
* everything else one matrix at a time.

Where ranks share a parameter by rows, element-wise rules see this rank's rows. For all others the gradient and the
slots are gathered, every rank computes the same, and each keeps its rows of what comes out.
"""

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optimzoo.core import shards
from optimzoo.core.apply import CHUNK, apply_update
from optimzoo.core.gradients import admit, admit_together
from optimzoo.core.routing import Route, as_matrix, from_matrix, matrix_shape
from optimzoo.core.slots import Slot
from optimzoo.core.storage import (
    ERROR,
    SCALE,
    State,
    close_slot,
    compute_dtype,
    is_scale,
    open_slot,
    slot_names,
    stored,
)
from optimzoo.functional.quantize import BLOCK, block_part
from optimzoo.functional.random import fold
from optimzoo.functional.slices import has_values, on_host, piece_size, pieces

Extras = Callable[[Tensor], dict[str, Tensor]]


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


@functools.cache
def keywords(rule_function: Callable) -> frozenset[str]:
    """The slots (and `step`, `seed`) that a rule's function asks for: its keyword-only arguments.

    One with a default is a slot that only some options keep.
    """
    parameters = inspect.signature(rule_function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def run(
    members: Iterable[Member],
    states: dict[Tensor, State],
    lr: float | Tensor,
    count: int,
    extras: Extras,
    lost: dict[str, Tensor],
) -> tuple[list[str], list[tuple[str, Tensor]]]:
    """Step every member that has a gradient.

    Returns the names skipped that the host knows of, and (name, ok) where only the device knows.
    `count` is the number of steps that the group has completed; `lost` counts updates that rounding swallowed.
    """
    skipped: list[str] = []
    unknown: list[tuple[str, Tensor]] = []
    lists: dict[tuple, list[tuple[Member, Tensor, State]]] = defaultdict(list)
    members = list(members)
    together = admit_together(members)
    for member in members:
        p, g = member.p, member.p.grad
        ok = (
            together[p] if p in together else g is not None and admit(g, member.route.rule, member.route.h.check_finite)
        )
        if ok is None:
            continue
        if ok is False:
            skipped.append(member.name)
            continue
        if isinstance(ok, Tensor):
            unknown.append((member.name, ok))
        state, first = states[p], 0
        g = torch.zeros_like(p) if g is None else g  # other ranks have some rows of it
        rate = lr * member.route.lr_scale
        if member.route.rule.elementwise and _by_rows(state, p):
            first, member, g = shards.offset(p), replace(member, p=shards.local(p)), shards.local(g)
            state = {name: shards.local(t) for name, t in state.items()}
        if not _in_place(member, g, state, count):
            known = None if ok is True else ok
            _step_one(member, g, state, rate, count, known, extras(p), lost.get(member.name), first)
        elif shards.is_sharded(member.p):
            _step_gathered(member, g, state, rate, count, ok)
        elif ok is True:
            route, p = member.route, member.p
            key = (route.rule, route.h, route.lr_scale, route.layout, p.dtype, p.device)
            lists[key].append((member, g, state))
        else:
            _step_list([(member, g, state)], rate, count, ok)
    for batch in lists.values():
        _step_list(batch, lr * batch[0][0].route.lr_scale, count, True)
    return skipped, unknown


def _by_rows(state: State, p: Tensor) -> bool:
    """Whether this rank's rows of every slot are about its rows of the parameter."""
    return all(
        shards.in_blocks(t, state[name.removesuffix(SCALE)], BLOCK) if is_scale(name, state) else shards.alike(t, p)
        for name, t in state.items()
        if name != "step"
    )


def _in_place(member: Member, g: Tensor, state: State, count: int) -> bool:
    """Whether the rule's list form can take this parameter: one wide dtype throughout, one memory layout.

    A kernel would round averages in bfloat16 to nearest, where they stand still.
    """
    p, rule, h = member.p, member.route.rule, member.route.h
    if rule.update is None or not rule.in_place(h, on_host(p)) or member.route.layout == "transposed":
        return False
    if rule.refresh is not None and rule.due(count, h):
        return False
    if g.dtype != p.dtype or p.dtype != compute_dtype(p.dtype):
        return False
    if not (p.is_contiguous() and g.is_contiguous()):
        return False
    return all(t.dtype in (p.dtype, torch.int32) for name, t in state.items() if name != "step")  # indices are int32


def _step_list(batch: list[tuple[Member, Tensor, State]], lr: float | Tensor, count: int, ok: bool | Tensor) -> None:
    rule, h, layout = batch[0][0].route.rule, batch[0][0].route.h, batch[0][0].route.layout
    slots: dict[str, list[Tensor]] = {name: [state[name] for _, _, state in batch] for name in batch[0][2]}
    for counter in slots.get("step", ()):
        counter.add_(1 if ok is True else ok)
    found_inf = (~ok).to(torch.float32) if isinstance(ok, Tensor) else None
    asked = {"step": float(count + 1)} if "step" in keywords(rule.update) else {}
    weights, gradients = zip(*((as_matrix(m.p, layout), as_matrix(g, layout)) for m, g, _ in batch), strict=True)
    rule.update(list(weights), list(gradients), h, lr, found_inf, slots=slots, **asked)


def _step_gathered(member: Member, g: Tensor, state: State, lr: float | Tensor, count: int, ok: bool | Tensor) -> None:
    """The list form where ranks share a parameter: of the weights each has its own rows, and zeros for the others."""
    p = member.p
    full = {name: shards.whole(t) for name, t in state.items()}
    w = torch.zeros(p.shape, dtype=p.dtype, device=shards.local(p).device)
    mine = shards.part(w, p)
    mine.copy_(shards.local(p))
    _step_list([(replace(member, p=w), shards.whole(g), full)], lr, count, ok)
    shards.local(p).copy_(mine)
    for name, t in full.items():
        shards.keep(t, state[name])


def _step_one(
    member: Member,
    g: Tensor,
    state: State,
    lr: float | Tensor,
    count: int,
    ok: Tensor | None,
    extras: State,
    lost: Tensor | None,
    first: int,
) -> None:
    p, rule, h = member.p, member.route.rule, member.route.h
    if "step" in state:
        state["step"].add_(1 if ok is None else ok)
    seed = fold(getattr(h, "seed", 0), member.name, count)
    chance = fold(seed, "weight") if h.rounding == "stochastic" else None
    change = functools.partial(
        apply_update, lr=lr, weight_decay=h.weight_decay, ok=ok, after=rule.decay_after, seed=chance, lost=lost
    )
    if rule.elementwise and _one_line(p, g, state):
        for where in pieces(p, CHUNK):
            w, piece = (t.view(-1)[where] for t in (p, g))
            part = _part(state, where)
            before = _copies(part, ok)
            u = _direction(member, piece, w, part, count, seed, ok, extras, first + where.start)
            change(w, u, error=part.get(ERROR), first=first + where.start)
            _restore(part, before, ok)
    else:
        layout = member.route.layout
        full = {name: shards.local(t) if name == ERROR else shards.whole(t) for name, t in state.items()}
        before = _copies(full, ok)
        w, matrix = as_matrix(_weight(p), layout), as_matrix(shards.whole(g), layout)
        u = from_matrix(_direction(member, matrix, w, full, count, seed, ok, extras, first), p, layout)
        change(shards.local(p), shards.part(u, p), error=full.get(ERROR), first=first + shards.offset(p))
        _restore(full, before, ok)
        for name, t in full.items():
            if name != ERROR:
                shards.keep(t, state[name])


def _copies(state: State, ok: Tensor | None) -> State:
    """The slots as they are before the step, where only the device will know whether it counts."""
    return {} if ok is None else {name: t.clone() for name, t in state.items() if name != "step"}


def _restore(state: State, before: State, ok: Tensor | None) -> None:
    """Put the slots back where the gradient was not to be used; written in place, without a third copy."""
    if ok is not None:
        for name, old in before.items():
            torch.where(ok, state[name], old, out=state[name])


def _weight(p: Tensor) -> Tensor:
    """The weight as rules see it: its shape and dtype, and where gathering it would cost, no values."""
    return torch.empty(p.shape, dtype=p.dtype, device="meta") if shards.is_sharded(p) else p


def _direction(
    member: Member,
    g: Tensor,
    w: Tensor,
    state: State,
    count: int,
    seed: int,
    ok: Tensor | None,
    extras: State,
    first: int,
) -> Tensor:
    """One call of the rule on one matrix, or on one piece of an element-wise parameter."""
    rule, h, dtype = member.route.rule, member.route.h, compute_dtype(w.dtype)
    g = g.to(dtype)
    if h.maximize:
        g = -g
    slots = {name: open_slot(state, name, dtype) for name in slot_names(state)}
    given: dict[str, Any] = slots | extras | {"seed": seed}
    if rule.refresh is not None and rule.due(count, h):
        # A decomposition of NaN raises; what it makes of zeros is put back by whoever knows `ok`.
        known = g if ok is None else torch.where(ok, g, 0)
        try:
            rule.refresh(known, w, h, **{name: given[name] for name in keywords(rule.refresh) if name in given})
        except torch.linalg.LinAlgError as error:
            raise RuntimeError(
                f"the gradient of {member.name!r} cannot be decomposed: it holds NaN or infinity, which only "
                "check_finite=True leaves out"
            ) from error
    given["step"] = _step_number(state, count)
    u = rule.direction(g, w, h, **{name: given[name] for name in keywords(rule.direction) if name in given})
    for index, (name, opened) in enumerate(slots.items()):
        close_slot(state, name, opened, fold(seed, index), first)
    return u


def _step_number(state: State, count: int) -> float | Tensor:
    """The number of this step, from 1: the parameter's own where its rule counts, else the group's.

    A number on the host, elsewhere a 0-dim float64: a power of 0.999 needs its digits.
    """
    if "step" not in state:
        return float(count + 1)
    counter = state["step"]
    if not on_host(counter):
        return counter.to(torch.float64)
    return counter.item() if has_values(counter) else float(count + 1)


def _one_line(p: Tensor, g: Tensor, state: State) -> bool:
    """Whether weight, gradient and slots are lines of memory of one length, and long enough to be worth slicing."""
    slots = [t for name, t in state.items() if name != "step" and not is_scale(name, state)]
    lines = all(t.is_contiguous() and t.numel() == p.numel() for t in (p, g, *slots))
    return lines and p.numel() > piece_size(p, CHUNK)


def _part(state: State, where: slice) -> State:
    """The slots of some elements, which are whole blocks."""
    part: State = {}
    for name, t in state.items():
        if name == "step":
            part[name] = t
        elif is_scale(name, state):
            part[name] = t[block_part(where)]
        else:
            part[name] = t.view(-1)[where]
    return part
