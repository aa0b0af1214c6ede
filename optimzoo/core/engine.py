"""How the parameters of a group are stepped. The way is chosen for each of them:

* a rule's `host_update` where `engine="compiled"` asks for it, on lists of float32 weights on a CPU;
* a rule's own in-place `update` on lists of tensors, or on wide copies of some of them, where dtypes allow it;
* on a device several of one rule and shape as one tensor, where they are small enough;
* element-wise rules slice by slice, so that workspace does not depend on the largest tensor;
* rules in stages several matrices of one shape at a time, as many as the rule's workspace has room for;
* everything else one matrix at a time;
* of the last three, with `engine="compiled"`, those that `graphs.wanted` names as a graph; rules in stages on a CPU end
  by their `host_conclude`, where they have one.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from optimzoo.core import graphs, host_lists, lists, shards, stacks
from optimzoo.core.gradients import admit, admit_shared, judge
from optimzoo.core.member import Member, Task
from optimzoo.core.routing import matrix_shape
from optimzoo.core.steps import step_compiled, step_one, step_stacked
from optimzoo.core.storage import SCALE, State, compute_dtype, is_scale
from optimzoo.functional.device_kernels import capturing
from optimzoo.functional.quantize import BLOCK
from optimzoo.functional.slices import on_host

LIST, ALIKE, ALONE = "list", "alike", "alone"  # ways of a parameter that ranks do not share

Extras = Callable[[Tensor], dict[str, Tensor]]


def run(
    members: Iterable[Member],
    states: dict[Tensor, State],
    lr: float | Tensor,
    count: int,
    extras: Extras,
    lost: dict[str, Tensor],
) -> tuple[list[str], list[tuple[list[str], Tensor]]]:
    """Step every member that has a gradient.

    Returns the names skipped that the host knows of, and (names, verdicts) where only the device knows.
    `count` is the number of steps that the group has completed; `lost` counts updates that rounding swallowed.
    """
    unknown: list[tuple[list[str], Tensor]] = []
    in_lists: dict[tuple, list[Task]] = defaultdict(list)
    waiting: dict[tuple, list[Task]] = defaultdict(list)
    alone: list[Task] = []
    members = list(members)
    compiled = {m.p: m for m in members if host_lists.wanted(m, states, count)}  # before anything moves
    members = [m for m in members if m.p not in compiled] if compiled else members
    skipped = host_lists.step(compiled.values(), states, lr, count)
    shared, largest, captured = admit_shared(members), _largest(members), capturing()
    rate = functools.cache(lambda scale: lr * scale)  # where lr is on a device each product is a kernel
    for member in members:
        p, g, ok = member.p, member.p.grad, _known(member, shared)
        if ok is None:
            continue
        if ok is False:
            skipped.append(member.name)
            continue
        g = torch.zeros_like(p) if g is None else g.resolve_neg()  # other ranks have some rows of it
        task = Task(member, g, states[p], rate(member.route.lr_scale), count, extras(p), lost.get(member.name))
        if isinstance(ok, Tensor):
            task.verdicts = ok.view(1)
            unknown.append(([member.name], task.verdicts))
        if shards.is_sharded(p):
            _step_shared(task, in_lists)
            continue
        host = on_host(p)
        way, kind = _way(task, captured)
        if way == LIST:
            in_lists[kind].append(task)
        elif way == ALIKE:
            waiting[kind].append(task)
            if host and len(waiting[kind]) == torch.get_num_threads():
                step_stacked(waiting.pop(kind), largest)  # while the gradients are in caches
        elif host:
            _step_alone(task)
        else:
            alone.append(task)
    batches = (*in_lists.values(), *waiting.values(), *([task] for task in alone))
    unknown += judge(batch for batch in batches if not on_host(batch[0].member.p))
    for batch in in_lists.values():
        lists.step_list(batch)
    for batch in waiting.values():
        _step_alike(batch, largest)
    for task in alone:
        _step_alone(task)
    return skipped, unknown


def _known(member: Member, shared: dict[Tensor, bool | Tensor | None]) -> bool | Tensor | None:
    """Whether the gradient may be used, None where there is none; True where `judge` is still to be asked."""
    p, g, route = member.p, member.p.grad, member.route
    if shards.is_sharded(p) and p in shared:
        return shared[p]
    if g is None:
        return None
    return admit(g, route.rule, route.h.check_finite) if on_host(p) else True


def _step_shared(task: Task, in_lists: dict[tuple, list[Task]]) -> None:
    """Step a parameter that ranks share, or put this rank's rows of it into a list."""
    by_rows = task.rule.elementwise and _by_rows(task.state, task.member.p)
    task = _on_rows(task) if by_rows else task
    if _in_place(task):
        if by_rows:
            in_lists[_kind(task)].append(task)
        else:
            lists.step_gathered(task)
    elif task.rule.prepare is not None:
        step_stacked([task], 0)
    else:
        step_one(task)


def _way(task: Task, captured: bool) -> tuple[str, tuple]:
    """How a whole parameter is stepped, and what those that go together have in common.

    Finding it takes longer than a small step, so it is kept with the member while all that it depends on is as it was.
    """
    member, g = task.member, task.g
    due = task.rule.refresh is not None and task.rule.due(task.count, task.h)
    kinds = [(name, t.dtype, t.is_contiguous()) for name, t in (("", member.p), ("", g), *task.state.items())]
    now = member.route, due, captured, type(member.p), type(g), task.lost is None, [*task.extras], kinds
    if member.memo.get("now") != now:
        member.memo.update(now=now, way=_found(task))
    return member.memo["way"]


def _found(task: Task) -> tuple[str, tuple]:
    if _in_place(task):
        return LIST, _kind(task)
    if task.rule.prepare is None and not stacks.possible(task):
        return ALONE, ()
    return ALIKE, (*_kind(task), matrix_shape(task.member.p, task.member.route.layout))


def _kind(task: Task) -> tuple:
    p, g, route = task.member.p, task.g, task.member.route
    types = type(p), type(g)  # some of which a kernel could not read
    return route.rule, route.h, route.lr_scale, route.layout, p.dtype, g.dtype, p.device, *types


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
    if not lists.possible(task.member, g, task.count):
        return False
    dtype = compute_dtype(p.dtype)
    if not g.dtype == p.dtype == dtype and not lists.takes_narrow(task):
        return False
    if not (p.is_contiguous() and g.is_contiguous()):
        return False
    # Indices are int32.
    slots = [t for name, t in task.state.items() if name != "step"]
    return all(t.dtype in (dtype, torch.int32) and t.is_contiguous() for t in slots)
