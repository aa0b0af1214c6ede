"""A rule's `update`, which steps lists of weights in place: narrow ones through wide copies, unless it takes them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from optimzoo.core import shards, stacks
from optimzoo.core.member import Member, Task
from optimzoo.core.routing import as_matrix
from optimzoo.core.slots import Tensors
from optimzoo.core.stages import keywords
from optimzoo.core.storage import State, compute_dtype
from optimzoo.functional.slices import on_host, pieces

PIECE = 1 << 18  # elements of a weight that are copied at a time on a CPU


class Part(NamedTuple):
    """A weight, its gradient and its slots, or some elements of them; and whether to leave it alone, as a float."""

    w: Tensor
    g: Tensor
    slots: State
    found_inf: Tensor | None = None


def step_list(batch: list[Task]) -> None:
    """`update` on parameters of one kind."""
    one, ok = batch[0], stacks.usable(batch)
    own = one.rule.own_kernel(one.member.p, one.g)  # before anything moves, as its first time may raise
    as_they_are = own or one.member.p.dtype == one.g.dtype == compute_dtype(one.g.dtype)
    stacks.count(batch, ok)
    found_inf = None if ok is None else (~ok).to(torch.float32)
    if not as_they_are:
        p, flags = one.member.p, [None] * len(batch) if found_inf is None else found_inf.unbind()
        each = 2 * compute_dtype(p.dtype).itemsize + 1  # bytes of an element's copies, and some for flags
        room = PIECE if on_host(p) else stacks.DEVICE_ROOM // each  # elements
        every = (part for pair in zip(batch, flags, strict=True) for part in _pieces(*pair, room))
        for some in _groups(every, 0 if on_host(p) else room):  # a CPU's caches hold one part
            _step_wide(one, some)
        return
    layout = one.member.route.layout
    weights = [as_matrix(task.member.p, layout) for task in batch]
    gradients = [as_matrix(task.g, layout) for task in batch]
    _update(one, weights, gradients, [task.state for task in batch], found_inf)


def step_gathered(task: Task) -> None:
    """The same where ranks share a parameter: of the weights each has its own rows, and zeros for the others."""
    p = task.member.p
    full = {name: shards.whole(t) for name, t in task.state.items()}
    w = torch.zeros(p.shape, dtype=p.dtype, device=shards.local(p).device)
    mine = shards.part(w, p)
    mine.copy_(shards.local(p))
    step_list([replace(task, member=replace(task.member, p=w), g=shards.whole(task.g), state=full)])
    shards.local(p).copy_(mine)
    for name, t in full.items():
        shards.keep(t, task.state[name])


def possible(member: Member, g: Tensor, count: int) -> bool:
    """Whether the rule steps in place, for these options and in this step; a transposed weight is in no list."""
    rule, h = member.route.rule, member.route.h
    if rule.update is None or member.route.layout == "transposed" or not rule.in_place(h, member.p, g):
        return False
    return rule.refresh is None or not rule.due(count, h)


def takes_narrow(task: Task) -> bool:
    """Whether numbers narrower than the computation may be in a list: themselves, or wide copies in their place."""
    p, rule = task.member.p, task.rule
    if shards.is_sharded(p) or task.h.rounding != "nearest" or task.lost is not None:
        return False
    return (rule.elementwise and p.dtype != compute_dtype(p.dtype)) or rule.own_kernel(p, task.g)


def _step_wide(one: Task, parts: list[Part]) -> None:
    """Wide copies of some weights and gradients, in place of these."""
    dtype = compute_dtype(one.member.p.dtype)
    narrow = [part.w for part in parts]
    wide = [part._replace(w=_like(part.w, dtype), g=_like(part.g, dtype)) for part in parts]
    torch._foreach_copy_([part.w for part in wide], narrow)
    torch._foreach_copy_([part.g for part in wide], [part.g for part in parts])
    flags = [part.found_inf for part in parts if part.found_inf is not None]
    weights, gradients, slots, _ = zip(*wide, strict=True)
    _update(one, [*weights], [*gradients], slots, torch.stack(flags) if flags else None)
    torch._foreach_copy_(narrow, [part.w for part in wide])


def _like(t: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(t.shape, dtype=dtype, device=t.device)


def _groups(parts: Iterable[Part], elements: int) -> Iterator[list[Part]]:
    """In order, with at most so many elements each, or one part."""
    group: list[Part] = []
    held = 0
    for part in parts:
        if group and held + part.w.numel() > elements:
            yield group
            group, held = [], 0
        group.append(part)
        held += part.w.numel()
    if group:
        yield group


def _pieces(task: Task, flag: Tensor | None, size: int) -> Iterator[Part]:
    """A parameter, or pieces of it."""
    p, g = task.member.p, task.g
    if p.numel() <= size:
        yield Part(p, g, task.state, flag)
        return
    for where in pieces(p.view(-1), size):
        slots = {name: t if name == "step" else t.view(-1)[where] for name, t in task.state.items()}
        yield Part(p.view(-1)[where], g.view(-1)[where], slots, flag)


def _update(one: Task, ws: Tensors, gs: Tensors, states: Sequence[State], found_inf: Tensor | None) -> None:
    number = {"step": float(one.count + 1)} if "step" in keywords(one.rule.update) else {}
    slots = {name: [state[name] for state in states] for name in states[0]}
    one.rule.update(ws, gs, one.h, one.lr, found_inf, slots=slots, **number)
