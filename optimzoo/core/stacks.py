"""Parameters of one rule and shape as one tensor: on a device launching a kernel often costs more than running it.

What `steps` does to each of them is done to all at once, with copies of gradients, slots and weights, which memory as
fast as a device's makes cheap. How many that are is bounded by bytes, so that workspace does not grow with the model.
"""

import math

import torch
from torch import Tensor

from optimzoo.core import shards
from optimzoo.core.apply import apply_update
from optimzoo.core.member import Member, Task
from optimzoo.core.routing import as_matrix, from_matrix, matrix_shape
from optimzoo.core.stages import first_stage, keywords
from optimzoo.core.storage import State, compute_dtype, is_coarse, slot_names
from optimzoo.functional.polar import ALIGNED
from optimzoo.functional.slices import on_host

DEVICE_ROOM = 1 << 29  # bytes of temporaries where several parameters step at once: with half, launches cost more
FEWEST = 4  # temporaries of a parameter's size: its gradient, its direction, its weight, and one more
THIN = 4  # temporaries of the size of what a rule in stages keeps beside the largest slot, a basis say


def possible(task: Task) -> bool:
    """Whether this step may be one of several: not where it draws random numbers or decomposes, or ranks share it."""
    p, rule, h = task.member.p, task.rule, task.h
    if on_host(p) or shards.is_sharded(p) or p.numel() == 0 or task.lost is not None:
        return False
    if rule.refresh is not None and rule.due(task.count, h):
        return False
    dtype, names = compute_dtype(p.dtype), keywords(first_stage(rule))
    if (p.dtype != dtype and h.rounding != "nearest") or not names.isdisjoint({"seed", *task.extras}):
        return False
    return not any(is_coarse(task.state, name, dtype) for name in slot_names(task.state))


def size(member: Member, state: State) -> int:
    """How many parameters like this one fit into a stack."""
    p, rule = member.p, member.route.rule
    *others, row = matrix_shape(p, member.route.layout) or (1,)
    filled_up = -(-row // ALIGNED) * ALIGNED if rule.prepare is not None else row
    whole = math.prod(others) * filled_up * compute_dtype(p.dtype).itemsize
    slots = [t.nbytes for name, t in state.items() if name in keywords(first_stage(rule))]
    thin = THIN * (sum(slots) - max(slots)) if slots and rule.prepare is not None else 0
    return int(DEVICE_ROOM // (max(FEWEST, rule.workspace) * whole + sum(slots) + thin))


def step(tasks: list[Task]) -> None:
    """One step of each of them."""
    one = tasks[0]
    rule, h, layout = one.rule, one.h, one.member.route.layout
    weights = [as_matrix(task.member.p, layout) for task in tasks]
    dtype = compute_dtype(one.member.p.dtype)
    ok = usable(tasks)
    count(tasks, ok)
    g = _stacked([as_matrix(task.g, layout) for task in tasks], dtype)
    if h.maximize:
        g.neg_()
    first = first_stage(rule)
    slots = {n: _stacked([task.state[n] for task in tasks]) for n in keywords(first) if n in one.state and n != "step"}
    number = {"step": _numbers(tasks, g.ndim)} if "step" in keywords(first) else {}
    filled = {name: _version(opened) for name, opened in slots.items()}
    u = first(g, weights[0].expand(g.shape), h, **slots, **number)
    del g
    for name in list(slots):
        opened = slots.pop(name)
        if filled[name] is None or _version(opened) != filled[name]:  # a rule leaves the places of its part alone, say
            _write(opened, [task.state[name] for task in tasks], ok)
        del opened
    if rule.prepare is not None:
        x, *kept = u
        u = rule.conclude(rule.products(h)(x), h, *kept)
    exact = _stacked(weights, dtype)
    apply_update(exact, u, one.lr, h.weight_decay, None if ok is None else _along(ok, u.ndim), rule.decay_after)
    back = [from_matrix(w, task.member.p, layout) for w, task in zip(exact.unbind(), tasks, strict=True)]
    torch._foreach_copy_([task.member.p for task in tasks], back)  # as a matrix it may be a copy


def usable(tasks: list[Task]) -> Tensor | None:
    """(tasks,) whether each gradient may be used; None where the host knows that all may."""
    verdicts, first = tasks[0].verdicts, tasks[0].place
    if verdicts is None:
        return None
    if all(task.verdicts is verdicts and task.place == first + i for i, task in enumerate(tasks)):
        return verdicts[first : first + len(tasks)]
    apart = [ok for ok in (task.ok for task in tasks) if ok is not None]
    assert len(apart) == len(tasks), "each of a batch has a verdict, or none has"
    return torch.stack(apart)


def count(tasks: list[Task], ok: Tensor | None) -> None:
    """Add one to the counters, where there are any, of those whose gradient may be used."""
    counters = [task.state["step"] for task in tasks if "step" in task.state]
    if counters:
        torch._foreach_add_(counters, 1 if ok is None else ok.to(counters[0].dtype).unbind())


def _numbers(tasks: list[Task], ndim: int) -> float | Tensor:
    """The number of this step, from 1: (tasks, 1, ...) float64 where parameters count, else the group's."""
    counters = [task.state["step"] for task in tasks if "step" in task.state]
    return _along(torch.stack(counters).to(torch.float64), ndim) if counters else float(tasks[0].count + 1)


def _stacked(tensors: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """(...) each -> (tensors, ...), by one kernel where they are contiguous."""
    out = torch.empty((len(tensors), *tensors[0].shape), dtype=dtype or tensors[0].dtype, device=tensors[0].device)
    torch._foreach_copy_(out.unbind(), tensors)
    return out


def _version(t: Tensor) -> int | None:
    """A number that every operation of PyTorch which writes into t raises; None where none is kept."""
    return None if t.is_inference() else t._version


def _write(opened: Tensor, slots: list[Tensor], ok: Tensor | None) -> None:
    """(slots, ...) back into the slots, but for those whose gradient was not used."""
    if ok is not None:
        before = _stacked(slots)
        opened = torch.where(_along(ok, opened.ndim), opened, before, out=before)
    torch._foreach_copy_(slots, opened.unbind())


def _along(x: Tensor, ndim: int) -> Tensor:
    """(n,) -> (n, 1, ...), with `ndim` axes."""
    return x.view(-1, *[1] * (ndim - 1))
