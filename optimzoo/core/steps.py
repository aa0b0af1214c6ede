"""The ways to take a step: gradient in, slots open, rule, slots closed, weight changed.

Where ranks share a parameter by rows, element-wise rules see this rank's rows. For all others the gradient and the
slots are gathered, every rank computes the same, and each keeps its rows of what comes out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optimzoo.core import graphs, host_lists, shards
from optimzoo.core.apply import CHUNK, apply_update
from optimzoo.core.member import Task
from optimzoo.core.routing import as_matrix, from_matrix
from optimzoo.core.stages import asked, first_stage, keywords, run_first
from optimzoo.core.storage import ERROR, State, is_scale
from optimzoo.functional.batched import batch_is_as_alone
from optimzoo.functional.quantize import block_part
from optimzoo.functional.slices import has_values, on_host, piece_size, pieces, transpose_into

STACK = 1 << 26  # bytes of a stack above which one matrix is enough to keep the hardware busy


def step_one(task: Task) -> None:
    """`direction` on a matrix, or on one piece after the other where the rule is element-wise."""
    p, state = task.member.p, task.state
    _count(task)
    if task.rule.elementwise and _one_line(p, task.g, state):
        for where in pieces(p, CHUNK):
            w, piece = (t.view(-1)[where] for t in (p, task.g))
            part, first = _part(state, where), task.first + where.start
            _change(task, w, _run(task, piece, w, part, first), part.get(ERROR), first)
    else:
        _change_matrix(task, _run_whole(task))


def step_stacked(tasks: list[Task], largest: int) -> None:
    """A rule in stages, on matrices of one shape: as many at a time as the workspace that it states has place for.

    It states a multiple of the `largest` matrix, in bytes; 0 is for one at a time.

    The product of two matrices in bfloat16 leaves most of the hardware idle unless they are large; several at once do
    not. Wide dtypes fill it with one, and would come out of a batch with other last digits.
    """
    room = int(tasks[0].rule.workspace * largest)
    while tasks:
        tasks = tasks[_step_some(tasks, room) :]


def _step_some(tasks: list[Task], room: int) -> int:
    """Step the first few of them; returns how many."""
    x, *kept = _prepared(tasks[0])
    narrow = x.dtype.itemsize < 4
    if tasks[0].ok is not None:  # while the next one is prepared, its slots stand there twice
        room -= sum(t.nbytes for t in tasks[0].state.values())
    number = min(len(tasks), _stack_size(x, kept, room)) if narrow else 1
    known = number > 1 and on_host(x) and has_values(x)
    if known and not batch_is_as_alone(number, x.shape, x.dtype, torch.get_num_threads()):
        number = 1
    # A tall one lies on its side: a CPU's products of columns are slow, and others alone than in a batch.
    turned = narrow and on_host(x) and x.shape[0] > x.shape[1]
    shape = (*reversed(x.shape),) if turned else x.shape
    stack, thin = x.new_empty((number, *shape)) if narrow else x[None], [kept]
    for index, task in enumerate(tasks[:number]):
        if index > 0:
            x, *kept = _prepared(task)
            thin.append(kept)
        if turned:
            transpose_into(stack[index], x)
        elif narrow:
            stack[index].copy_(x)
        del x  # before the next one is made
    done = tasks[0].rule.products(tasks[0].h)(stack if number > 1 else stack[0])
    del stack  # used up
    for task, one, kept in zip(tasks[:number], done if number > 1 else [done], thin, strict=True):
        _conclude(task, one.mT if turned else one, kept)
    return number


def _stack_size(x: Tensor, kept: list[Tensor], room: int) -> int:
    """Matrices in a stack: while products are made of them, three of each are alive; a CPU's threads take one each."""
    each = 3 * x.nbytes + sum(t.nbytes for t in kept)
    most = max(1, min(room, STACK) // max(1, each))
    return min(most, torch.get_num_threads()) if on_host(x) else most


def _prepared(task: Task) -> tuple:
    _count(task)
    return graphs.prepare(task, _given(task)) if graphs.wanted(task) else _run_whole(task)


def _conclude(task: Task, x: Tensor, kept: list[Tensor]) -> None:
    if graphs.wanted(task):
        graphs.conclude(task, x, kept)
    elif not host_lists.conclude(task, x, kept):
        _change_matrix(task, task.rule.conclude(x, task.h, *kept))


def step_compiled(task: Task) -> None:
    """The whole step of a parameter as one graph."""
    _count(task)
    graphs.step(task, _given(task))


def _given(task: Task) -> dict[str, Any]:
    """What a rule's first stage may ask for beside its slots."""
    return task.extras | {"step": _step_number(task.state, task.count), "seed": task.seed}


def _run_whole(task: Task) -> Any:
    """A rule's first stage on a whole matrix, gathered where ranks share it."""
    layout = task.member.route.layout
    full = {name: shards.whole(t) for name, t in task.state.items() if name != ERROR}
    w, g = as_matrix(_weight(task.member.p), layout), as_matrix(shards.whole(task.g), layout)
    result = _run(task, g, w, full, task.first)
    for name, t in full.items():
        shards.keep(t, task.state[name])
    return result


def _run(task: Task, g: Tensor, w: Tensor, state: State, first: int) -> Any:
    """A rule's first stage, after a refresh where that is due."""
    rule, h = task.rule, task.h

    def refresh(g: Tensor, given: Mapping[str, Any]) -> None:
        # A decomposition of NaN raises; what it makes of zeros is put back by whoever knows `ok`.
        known = g if task.ok is None else torch.where(task.ok, g, 0)
        try:
            rule.refresh(known, w, h, **asked(rule.refresh, given))
        except torch.linalg.LinAlgError as error:
            raise RuntimeError(
                f"the gradient of {task.member.name!r} cannot be decomposed: it holds NaN or infinity, which only "
                "check_finite=True leaves out"
            ) from error

    due = refresh if rule.refresh is not None and rule.due(task.count, h) else None
    names = keywords(first_stage(rule))
    return run_first(rule, h, names, g, w, state, _given(task), task.rounding_seed, task.ok, first, due)


def _count(task: Task) -> None:
    if "step" in task.state:
        task.state["step"].add_(1 if task.ok is None else task.ok)


def _change_matrix(task: Task, u: Tensor) -> None:
    p, error = task.member.p, task.state.get(ERROR)
    u = shards.part(from_matrix(u, p, task.member.route.layout), p)
    _change(task, shards.local(p), u, None if error is None else shards.local(error), task.first + shards.offset(p))


def _change(task: Task, w: Tensor, u: Tensor, error: Tensor | None, first: int) -> None:
    """Move weights, all of a parameter's or some, by their direction."""
    h = task.h
    seed = task.rounding_seed("weight") if h.rounding == "stochastic" else None
    after = task.rule.decay_after
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
