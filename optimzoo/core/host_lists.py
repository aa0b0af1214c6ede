"""`engine="compiled"` in float32 on a CPU: a rule's `host_update` checks and steps lists of weights by one call."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from optimzoo.core.lists import possible
from optimzoo.core.member import Member, Task
from optimzoo.core.routing import as_matrix, matrix_shape
from optimzoo.core.storage import State
from optimzoo.functional import host_kernel

PRODUCTS = (torch.bfloat16,)  # dtypes that `host_conclude` takes them in


def wanted(member: Member, states: dict[Tensor, State], count: int) -> bool:
    """Whether a rule's `host_update` takes this step: not where ranks share it, or numbers are no float32."""
    p, g, rule, h, layout = member.p, member.p.grad, member.route.rule, member.route.h, member.route.layout
    if h.engine != "compiled" or rule.host_update is None or g is None or not possible(member, g, count):
        return False
    if not rule.fits_host_update(matrix_shape(p, layout), h) or g.shape != p.shape:
        return False
    slots = all(host_kernel.reads(t, (torch.float32, torch.int32)) for t in states[p].values())
    return slots and host_kernel.reads(p) and host_kernel.reads(g) and host_kernel.works()


def step(members: Iterable[Member], states: dict[Tensor, State], lr: float | Tensor, count: int) -> list[str]:
    """One step of each of them; returns the names of those whose gradient could not be used."""
    alike: dict[tuple, list[Member]] = defaultdict(list)
    for member in members:
        route = member.route
        alike[route.rule, route.h, route.lr_scale, route.layout].append(member)
    return [name for batch in alike.values() for name in _step(batch, [states[m.p] for m in batch], lr, count)]


def conclude(task: Task, x: Tensor, kept: list[Tensor]) -> bool:
    """Change a weight by a rule's `host_conclude`, where that can: x in bfloat16, and all else in float32."""
    p, rule, h, layout = task.member.p, task.rule, task.h, task.member.route.layout
    if h.engine != "compiled" or rule.host_conclude is None or rule.decay_after or not host_kernel.reads(p):
        return False
    w, narrow = as_matrix(p, layout), any(host_kernel.reads(t, PRODUCTS) for t in (x, x.mT))
    if not narrow or not all(host_kernel.reads(t) for t in (w, *kept)) or not host_kernel.works():
        return False
    rule.host_conclude(w, x, h, float(task.lr), *kept)
    return True


def _step(batch: list[Member], slots: list[State], lr: float | Tensor, count: int) -> list[str]:
    route = batch[0].route
    counters = [state["step"] for state in slots if "step" in state]
    steps = [counter.item() + 1 for counter in counters] or [count + 1.0] * len(batch)
    weights = [as_matrix(m.p, route.layout) for m in batch]
    gradients = [as_matrix(m.p.grad, route.layout) for m in batch if m.p.grad is not None]
    lists = {name: [state[name] for state in slots] for name in slots[0]}
    rate = float(lr * route.lr_scale)
    stepped = route.rule.host_update(weights, gradients, route.h, rate, slots=lists, steps=steps)
    if moved := [counter for counter, done in zip(counters, stepped, strict=False) if done]:
        torch._foreach_add_(moved, 1)
    return [m.name for m, done in zip(batch, stepped, strict=True) if not done]
