"""How the parameters of a group are stepped. The way is chosen for each of them:

* a rule's `host_update` where `engine="compiled"` asks for it, on lists of float32 weights on a CPU;
* a rule's own in-place `update` on lists of tensors, or on wide copies of some of them, where dtypes allow it;
* on a device several of one rule and shape as one tensor, where they are small enough;
* element-wise rules slice by slice, so that workspace does not depend on the largest tensor;
* rules in stages several matrices of one shape at a time, as many as the rule's workspace has room for;
* everything else one matrix at a time;
* of the last three, with `engine="compiled"`, those that `graphs.wanted` names as a graph.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from optimzoo.core import graphs, host_lists, lists, shards, stacks
from optimzoo.core.gradients import admit, admit_together
from optimzoo.core.member import Member, Task
from optimzoo.core.routing import matrix_shape
from optimzoo.core.steps import step_compiled, step_one, step_stacked
from optimzoo.core.storage import SCALE, State, compute_dtype, is_scale
from optimzoo.functional.quantize import BLOCK
from optimzoo.functional.slices import on_host

Extras = Callable[[Tensor], dict[str, Tensor]]


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
    unknown: list[tuple[str, Tensor]] = []
    in_lists: dict[tuple, list[Task]] = defaultdict(list)
    waiting: dict[tuple, list[Task]] = defaultdict(list)
    members = list(members)
    compiled = {m.p: m for m in members if host_lists.wanted(m, states[m.p], count)}  # before anything moves
    members = [m for m in members if m.p not in compiled]
    skipped = host_lists.step(compiled.values(), states, lr, count)
    together, largest = admit_together(members), _largest(members)
    for member in members:
        p, g, route = member.p, member.p.grad, member.route
        ok = together[p] if p in together else g is not None and admit(g, route.rule, route.h.check_finite)
        if ok is None:
            continue
        if ok is False:
            skipped.append(member.name)
            continue
        if isinstance(ok, Tensor):
            unknown.append((member.name, ok))
        g = torch.zeros_like(p) if g is None else g.resolve_neg()  # other ranks have some rows of it
        known = None if ok is True else ok
        task = Task(member, g, states[p], lr * route.lr_scale, count, known, extras(p), lost.get(member.name))
        spread = shared = shards.is_sharded(p)
        if spread and route.rule.elementwise and _by_rows(task.state, p):
            task, shared = _on_rows(task), False
        key = (route.rule, route.h, route.lr_scale, route.layout, p.dtype, g.dtype, p.device)
        if _in_place(task):
            if shared:
                lists.step_gathered(task)
            else:
                kinds = type(task.member.p), type(task.g)  # some of which a kernel could not read
                in_lists[*key, *kinds].append(task)
        elif route.rule.prepare is not None and shared:
            step_stacked([task], 0)
        elif route.rule.prepare is None and spread:
            step_one(task)
        elif route.rule.prepare is None and not stacks.possible(task):
            _step_alone(task)
        else:
            alike = (*key, matrix_shape(p, route.layout))
            waiting[alike].append(task)
            if on_host(p) and len(waiting[alike]) == torch.get_num_threads():
                step_stacked(waiting.pop(alike), largest)  # while the gradients are in caches
    for batch in in_lists.values():
        lists.step_list(batch)
    for batch in waiting.values():
        _step_alike(batch, largest)
    return skipped, unknown


def _step_alone(task: Task) -> None:
    if graphs.wanted(task):
        step_compiled(task)
    else:
        step_one(task)


def _step_alike(batch: list[Task], largest: int) -> None:
    """Step parameters of one rule and shape, as many at a time as there is room for."""
    number = stacks.size(batch[0].member, batch[0].state) if stacks.possible(batch[0]) else 0
    while min(number, len(batch)) > 1:
        stacks.step(batch[:number])
        batch = batch[number:]
    if batch and batch[0].rule.prepare is not None:
        step_stacked(batch, largest)
        return
    for task in batch:
        _step_alone(task)


def _largest(members: list[Member]) -> int:
    """Bytes of the largest of these as rules see it."""
    return max((m.p.numel() * compute_dtype(m.p.dtype).itemsize for m in members), default=0)


def _by_rows(state: State, p: Tensor) -> bool:
    """Whether this rank's rows of every slot are about its rows of the parameter."""
    return all(
        shards.in_blocks(t, state[name.removesuffix(SCALE)], BLOCK) if is_scale(name, state) else shards.alike(t, p)
        for name, t in state.items()
        if name != "step"
    )


def _on_rows(task: Task) -> Task:
    """The step of this rank's rows alone."""
    p, rows = task.member.p, {name: shards.local(t) for name, t in task.state.items()}
    mine = replace(task.member, p=shards.local(p))
    return replace(task, member=mine, g=shards.local(task.g), state=rows, first=shards.offset(p))


def _in_place(task: Task) -> bool:
    """Whether the rule's list form can take this parameter: one memory layout, and one wide dtype but for the weight.

    A kernel would round averages in bfloat16 to nearest, where they stand still.
    """
    p, g = task.member.p, task.g
    if not lists.possible(task.member, task.count):
        return False
    dtype = compute_dtype(p.dtype)
    if not g.dtype == p.dtype == dtype and not lists.widens(task):
        return False
    if not (p.is_contiguous() and g.is_contiguous()):
        return False
    # Indices are int32.
    slots = [t for name, t in task.state.items() if name != "step"]
    return all(t.dtype in (dtype, torch.int32) and t.is_contiguous() for t in slots)
