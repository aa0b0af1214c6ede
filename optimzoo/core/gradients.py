"""Which gradients may be used: what no rule could take is refused by name, what is not finite is left alone."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimzoo.core import shards
from optimzoo.core.storage import compute_dtype
from optimzoo.functional.names import TAKEN_OUT
from optimzoo.functional.slices import has_values, on_host

if TYPE_CHECKING:
    from optimzoo.core.member import Member, Task


def check_gradient(p: Tensor, name: str) -> None:
    """Refuse, by name, a parameter without memory and a gradient that no rule could use."""
    if p.is_meta:  # which after to_empty() is no parameter of the model any more, so that it has no gradient either
        raise RuntimeError(
            f"parameter {name!r} is on the meta device: give the model memory, then make the optimizer, then step()"
        )
    g = p.grad
    if g is None:
        if hasattr(p, TAKEN_OUT):
            raise RuntimeError(
                f"parameter {name!r} is in the model no more: convert or merge has replaced its layer; make the "
                "optimizer after that"
            )
        return
    if g.layout is not torch.strided:
        raise RuntimeError(f"the gradient of {name!r} is sparse; use dense gradients (nn.Embedding(sparse=False))")
    if not shards.alike(g, p):
        raise RuntimeError(f"the gradient of {name!r} is not sharded like the parameter; let backward make it")
    if g.is_complex():
        raise RuntimeError(f"the gradient of {name!r} is complex; optimize torch.view_as_real of it instead")


def admit(g: Tensor, rule: Any, check: bool) -> bool:
    """Whether this gradient, on the host, may be used; elsewhere asking would synchronise, and `judge` does.

    The sum of squares is the one pass that costs least; it also refuses finite gradients whose squares overflow, which
    would leave an infinity in every second moment.
    """
    if not (check or rule.skips_zero) or not has_values(g):
        return True
    size = _size(g).item()
    finite = not check or math.isfinite(size)
    return finite and not (rule.skips_zero and size == 0 and not bool(g.any()))


def _size(g: Tensor) -> Tensor:
    if on_host(g) and g.is_contiguous() and g.dtype in (torch.float32, torch.float64):
        return torch.dot(g.view(-1), g.view(-1))
    # Squared again: the norm of a single number is no root of anything, and knows nothing of overflow.
    return torch.linalg.vector_norm(g, dtype=compute_dtype(g.dtype)).square_()


def admit_shared(members: Iterable["Member"]) -> dict[Tensor, bool | Tensor | None]:
    """What `admit` says of the gradients of sharded parameters, None where no rank has one; a collective.

    A rank without one has rows of zeros. That is asked on the host only: elsewhere it would synchronise, and FSDP gives
    a gradient to all ranks or to none.
    """
    shared = {m.p: m for m in members if shards.is_sharded(m.p) and (on_host(m.p) or _asks(m))}
    sums = shards.sum_over_ranks({p: _facts(member) for p, member in shared.items()})
    return {p: _verdict(member, sums[p]) for p, member in shared.items()}


def judge(batches: Iterable[list["Task"]]) -> list[tuple[list[str], Tensor]]:
    """Ask about gradients on a device, by few kernels for all of them; every task is told where its verdict is.

    The tasks of a batch have one rule, with its options, and gradients of one kind. Returns (names, verdicts).
    """
    alike: dict[tuple, list[Task]] = defaultdict(list)
    empty: list[list[Task]] = []  # which have no largest number
    for batch in batches:
        member, g = batch[0].member, batch[0].g
        if _asks(member):
            kind = alike[g.device, g.dtype, member.route.rule.skips_zero, member.route.h.check_finite]
            waiting = [task for task in batch if task.verdicts is None]  # ranks have judged together what they share
            kind += [task for task in waiting if task.g.numel()]
            empty += [[task] for task in waiting if not task.g.numel()]
    groups = filter(None, (*alike.values(), *empty))
    return [([task.member.name for task in tasks], _judged(tasks)) for tasks in groups]


def _judged(tasks: list["Task"]) -> Tensor:
    g, rule, check = tasks[0].g, tasks[0].rule, tasks[0].h.check_finite
    gradients = [task.g for task in tasks]
    if len(tasks) == 1:
        found = _size(g)[None]
        ok = found < math.inf if check else torch.ones_like(found, dtype=torch.bool)  # not where it is NaN either
        ok = ok & g.any() if rule.skips_zero else ok
    else:
        if check:  # squared: finite gradients whose squares overflow are refused too
            ok = torch.stack(torch._foreach_norm(gradients, dtype=compute_dtype(g.dtype))).square_() < math.inf
        else:
            ok = torch.ones(len(tasks), dtype=torch.bool, device=g.device)
        if rule.skips_zero:
            ok &= torch.stack(torch._foreach_norm(gradients, math.inf)) != 0
    for place, task in enumerate(tasks):
        task.verdicts, task.place = ok, place
    return ok


def _asks(member: "Member") -> bool:
    return member.route.h.check_finite or member.route.rule.skips_zero


def _facts(member: "Member") -> Tensor:
    """(3,) float64 of this rank's rows, to be added up: is there a gradient, its size, is anything in it not zero."""
    p = member.p
    if p.grad is None:
        return torch.zeros(3, dtype=torch.float64, device=p.device)
    g = shards.local(p.grad)
    one = torch.ones((), device=g.device)
    found = (one, _size(g), g.any() if member.route.rule.skips_zero else one) if _asks(member) else (one, one, one)
    return torch.stack([t.to(torch.float64) for t in found])


def _verdict(member: "Member", facts: Tensor) -> bool | Tensor | None:
    p, rule, check = member.p, member.route.rule, member.route.h.check_finite
    present, size, filled = facts
    finite = size <= torch.finfo(compute_dtype(p.dtype)).max
    if on_host(p):
        usable = (not check or bool(finite)) and (not rule.skips_zero or bool(filled))
        return usable if present else None
    if p.grad is None:
        return None
    ok = finite if check else torch.ones_like(finite)
    return ok & (filled > 0) if rule.skips_zero else ok
