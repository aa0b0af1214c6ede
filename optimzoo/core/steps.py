"""The ways to take a step: gradient in, slots open, rule, slots closed, weight changed.

Where ranks share a parameter by rows, element-wise rules see this rank's rows. For all others the gradient and the
slots are gathered, every rank computes the same, and each keeps its rows of what comes out.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optimzoo.core import shards
from optimzoo.core.apply import CHUNK, apply_update
from optimzoo.core.member import Member
from optimzoo.core.routing import as_matrix, from_matrix
from optimzoo.core.storage import ERROR, State, close_slot, compute_dtype, is_scale, open_slot, slot_names
from optimzoo.functional.quantize import block_part
from optimzoo.functional.random import fold
from optimzoo.functional.slices import has_values, on_host, piece_size, pieces

STACK = 1 << 26  # bytes of a stack above which one matrix is enough to keep the hardware busy


@dataclass(frozen=True, slots=True)
class Task:
    """One parameter's step: what is stepped, with what, and what is told of it."""

    member: Member
    g: Tensor
    state: State
    lr: float | Tensor
    count: int  # steps that the group has completed
    ok: Tensor | None  # whether the gradient may be used, where only the device knows
    extras: State  # what the optimizer gives the rule beside its slots
    lost: Tensor | None  # counts updates that rounding swallows
    first: int = 0  # the position in the whole parameter of its first element here

    @property
    def seed(self) -> int:
        """Of everything random in this step of this parameter."""
        return fold(getattr(self.member.route.h, "seed", 0), self.member.name, self.count)


@functools.cache
def keywords(rule_function: Callable) -> frozenset[str]:
    """The slots (and `step`, `seed`) that a rule's function asks for: its keyword-only arguments.

    One with a default is a slot that only some options keep.
    """
    parameters = inspect.signature(rule_function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def asked(rule_function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given that the function asks for."""
    return {name: given[name] for name in keywords(rule_function) if name in given}


def first_stage(rule: Any) -> Callable:
    """The function of a rule that sees the gradient and the slots."""
    return rule.direction if rule.prepare is None else rule.prepare


def direct(rule: Any, g: Tensor, w: Tensor, h: Any, slots: Mapping[str, Any]) -> Tensor:
    """A rule's direction on one matrix, in one go whether or not it is written in stages."""
    if rule.prepare is None:
        return rule.direction(g, w, h, **slots)
    x, *kept = rule.prepare(g, w, h, **slots)
    return rule.conclude(rule.products(h)(x), h, *kept)


# In place, on lists.


def step_list(batch: list[Task]) -> None:
    """A rule's `update` on parameters of one kind; several only where the host knows that all of them step."""
    one = batch[0]
    rule, h, layout, ok = one.member.route.rule, one.member.route.h, one.member.route.layout, one.ok
    slots: dict[str, list[Tensor]] = {name: [task.state[name] for task in batch] for name in one.state}
    for counter in slots.get("step", ()):
        counter.add_(1 if ok is None else ok)
    found_inf = None if ok is None else (~ok).to(torch.float32)
    number = {"step": float(one.count + 1)} if "step" in keywords(rule.update) else {}
    weights = [as_matrix(task.member.p, layout) for task in batch]
    gradients = [as_matrix(task.g, layout) for task in batch]
    rule.update(weights, gradients, h, one.lr, found_inf, slots=slots, **number)


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


# By a rule's direction.


def step_one(task: Task) -> None:
    """`direction` on a matrix, or on one piece after the other where the rule is element-wise."""
    p, rule, state = task.member.p, task.member.route.rule, task.state
    _count(task)
    if rule.elementwise and _one_line(p, task.g, state):
        for where in pieces(p, CHUNK):
            w, piece = (t.view(-1)[where] for t in (p, task.g))
            part, first = _part(state, where), task.first + where.start
            u = _run(task, rule.direction, piece, w, part, first)
            _change(task, w, u, part.get(ERROR), first)
    else:
        _change_matrix(task, _run_whole(task, rule.direction))


def step_stacked(tasks: list[Task], room: int) -> None:
    """A rule in stages, on matrices of one shape: as many at a time as `room` bytes have place for.

    The product of two matrices in bfloat16 leaves most of the hardware idle unless they are large; several at once do
    not. Wide dtypes fill it with one, and would come out of a batch with other last digits.
    """
    while tasks:
        tasks = tasks[_step_some(tasks, room) :]


def _step_some(tasks: list[Task], room: int) -> int:
    """Step the first few of them; returns how many."""
    rule, h = tasks[0].member.route.rule, tasks[0].member.route.h
    x, *kept = _prepared(tasks[0])
    narrow = x.dtype.itemsize < 4
    number = min(len(tasks), _stack_size(x, kept, room)) if narrow else 1
    # A tall one lies on its side: products of its columns are slow, and come out in other ways alone and in a batch.
    turned = narrow and x.shape[0] > x.shape[1]
    stack, thin = x.new_empty((number, *sorted(x.shape))) if narrow else x[None], [kept]
    for index, task in enumerate(tasks[:number]):
        if index > 0:
            x, *kept = _prepared(task)
            thin.append(kept)
        if narrow:
            stack[index].copy_(x.mT if turned else x)
        del x  # before the next one is made
    held = [stack if number > 1 else stack[0]]
    del stack  # what is used up must have no other name
    done = rule.products(h)(held.pop())
    for task, one, kept in zip(tasks[:number], done if number > 1 else [done], thin, strict=True):
        _change_matrix(task, rule.conclude(one.mT if turned else one, h, *kept))
    return number


def _stack_size(x: Tensor, kept: list[Tensor], room: int) -> int:
    """Matrices in a stack: while their products are made, three of each are alive; a CPU's threads take one each."""
    each = 3 * x.nbytes + sum(t.nbytes for t in kept)
    most = max(1, min(room, STACK) // max(1, each))
    return min(most, torch.get_num_threads()) if on_host(x) else most


def _prepared(task: Task) -> tuple:
    _count(task)
    return _run_whole(task, task.member.route.rule.prepare)


def _run_whole(task: Task, function: Callable) -> Any:
    """A rule's function on a whole matrix, gathered where ranks share it."""
    layout = task.member.route.layout
    full = {name: shards.whole(t) for name, t in task.state.items() if name != ERROR}
    w, g = as_matrix(_weight(task.member.p), layout), as_matrix(shards.whole(task.g), layout)
    result = _run(task, function, g, w, full, task.first)
    for name, t in full.items():
        shards.keep(t, task.state[name])
    return result


def _run(task: Task, function: Callable, g: Tensor, w: Tensor, state: State, first: int) -> Any:
    """A rule's function on a matrix, or on a piece of an element-wise parameter; its slots are open meanwhile."""
    rule, h, dtype, ok, seed = task.member.route.rule, task.member.route.h, compute_dtype(w.dtype), task.ok, task.seed
    # Only the device may know whether the step counts: then the slots are kept as they were.
    before = {} if ok is None else {name: state[name].clone() for name in state if name not in ("step", ERROR)}
    g = g.to(dtype)
    if h.maximize:
        g = -g
    slots = {name: open_slot(state, name, dtype) for name in slot_names(state)}
    given: dict[str, Any] = slots | task.extras | {"seed": seed}
    if rule.refresh is not None and rule.due(task.count, h):
        # A decomposition of NaN raises; what it makes of zeros is put back below.
        known = g if ok is None else torch.where(ok, g, 0)
        try:
            rule.refresh(known, w, h, **asked(rule.refresh, given))
        except torch.linalg.LinAlgError as error:
            raise RuntimeError(
                f"the gradient of {task.member.name!r} cannot be decomposed: it holds NaN or infinity, which only "
                "check_finite=True leaves out"
            ) from error
    given["step"] = _step_number(state, task.count)
    result = function(g, w, h, **asked(function, given))
    for index, (name, opened) in enumerate(slots.items()):
        close_slot(state, name, opened, fold(seed, index), first)
    if ok is not None:
        for name, old in before.items():
            torch.where(ok, state[name], old, out=state[name])  # written in place, without a third copy
    return result


def _count(task: Task) -> None:
    if "step" in task.state:
        task.state["step"].add_(1 if task.ok is None else task.ok)


def _change_matrix(task: Task, u: Tensor) -> None:
    p, error = task.member.p, task.state.get(ERROR)
    u = shards.part(from_matrix(u, p, task.member.route.layout), p)
    _change(task, shards.local(p), u, None if error is None else shards.local(error), task.first + shards.offset(p))


def _change(task: Task, w: Tensor, u: Tensor, error: Tensor | None, first: int) -> None:
    """Move weights, all of a parameter's or some, by their direction."""
    h, after = task.member.route.h, task.member.route.rule.decay_after
    seed = fold(task.seed, "weight") if h.rounding == "stochastic" else None
    apply_update(w, u, task.lr, h.weight_decay, task.ok, after, error=error, seed=seed, first=first, lost=task.lost)


def _weight(p: Tensor) -> Tensor:
    """The weight as rules see it: its shape and dtype, and where gathering it would cost, no values."""
    return torch.empty(p.shape, dtype=p.dtype, device="meta") if shards.is_sharded(p) else p


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
