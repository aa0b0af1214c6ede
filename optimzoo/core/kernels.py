"""`engine="compiled"` with wide numbers on a CPU: a rule's `kernel` checks and steps lists of weights by one call."""

import torch
from torch import Tensor

from optimzoo.core.member import Member, Task
from optimzoo.core.routing import as_matrix, matrix_shape
from optimzoo.core.storage import State
from optimzoo.functional import host_kernel


def wanted(member: Member, g: Tensor, state: State, count: int) -> bool:
    """Whether the rule's kernel takes this step: not where ranks share it, a refresh is due or numbers are others."""
    p, rule, h, layout = member.p, member.route.rule, member.route.h, member.route.layout
    if h.engine != "compiled" or rule.kernel is None or layout == "transposed":
        return False
    if not rule.fits_kernel(matrix_shape(p, layout), h) or (rule.refresh is not None and rule.due(count, h)):
        return False
    return all(map(host_kernel.reads, (p, g, *state.values()))) and host_kernel.works()


def step(batch: list[Task]) -> list[str]:
    """One step of each of them, which have a rule and its options in common; returns the names of those left alone."""
    one = batch[0]
    counters = [task.state["step"] for task in batch if "step" in task.state]
    steps = [counter.item() + 1 for counter in counters] or [one.count + 1.0] * len(batch)
    layout = one.member.route.layout
    weights, gradients = zip(*((as_matrix(t.member.p, layout), as_matrix(t.g, layout)) for t in batch), strict=True)
    slots = {name: [task.state[name] for task in batch] for name in one.state}
    stepped = one.rule.kernel(weights, gradients, one.h, float(one.lr), slots=slots, steps=steps)
    if moved := [counter for counter, done in zip(counters, stepped, strict=False) if done]:
        torch._foreach_add_(moved, 1)
    return [task.member.name for task, done in zip(batch, stepped, strict=True) if not done]
