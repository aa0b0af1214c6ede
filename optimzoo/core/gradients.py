"""Which gradients may be used: what no rule could take is refused by name, what is not finite is left alone."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimzoo.core import shards
from optimzoo.core.storage import compute_dtype
from optimzoo.functional.slices import has_values, on_host

if TYPE_CHECKING:
    from optimzoo.core.member import Member


def check_gradient(p: Tensor, name: str) -> None:
    """Refuse, by name, a gradient that no rule could use."""
    g = p.grad
    if g is None:
        return
    if p.is_meta:
        raise RuntimeError(f"parameter {name!r} is on the meta device: give the model memory before step()")
    if g.layout is not torch.strided:
        raise RuntimeError(f"the gradient of {name!r} is sparse; use dense gradients (nn.Embedding(sparse=False))")
    if shards.is_sharded(g) != shards.is_sharded(p) or not shards.alike(g, p):
        raise RuntimeError(f"the gradient of {name!r} is not sharded like the parameter; let backward make it")
    if g.is_complex():
        raise RuntimeError(f"the gradient of {name!r} is complex; optimize torch.view_as_real of it instead")


def admit(g: Tensor, rule: Any, check: bool) -> bool | Tensor:
    """Whether this gradient may be used: a bool on the host, a 0-dim boolean tensor where asking would synchronise.

    The sum of squares is the one pass that costs least; it also refuses finite gradients whose squares overflow, which
    would leave an infinity in every second moment.
    """
    if not (check or rule.skips_zero) or (on_host(g) and not has_values(g)):
        return True
    size = _size(g)
    if on_host(g):
        value = size.item()
        finite = not check or math.isfinite(value)
        return finite and not (rule.skips_zero and value == 0 and not bool(g.any()))
    ok = torch.isfinite(size) if check else torch.ones_like(size, dtype=torch.bool)
    return ok & g.any() if rule.skips_zero else ok


def _size(g: Tensor) -> Tensor:
    if on_host(g) and g.is_contiguous() and g.dtype in (torch.float32, torch.float64):
        return torch.dot(g.view(-1), g.view(-1))
    # Squared again: the norm of a single number is no root of anything, and knows nothing of overflow.
    return torch.linalg.vector_norm(g, dtype=compute_dtype(g.dtype)).square_()


def admit_together(members: Iterable["Member"]) -> dict[Tensor, bool | Tensor | None]:
    """What `admit` says of gradients that are asked for together: of sharded parameters, and of those on a device.

    None where no rank has a gradient; a collective where there are sharded parameters.

    A rank without one has rows of zeros. That is asked on the host only: elsewhere it would synchronise, and FSDP gives
    a gradient to all ranks or to none.
    """
    members = list(members)
    shared = {m.p: m for m in members if shards.is_sharded(m.p) and (on_host(m.p) or _asks(m))}
    sums = shards.sum_over_ranks({p: _facts(member) for p, member in shared.items()})
    return _on_devices(members) | {p: _verdict(member, sums[p]) for p, member in shared.items()}


def _on_devices(members: list["Member"]) -> dict[Tensor, bool | Tensor | None]:
    """The answers for whole gradients that are not on the host, by few kernels for all of them."""
    alike: dict[tuple, dict[Tensor, Tensor]] = defaultdict(dict)
    for m in members:
        if on_host(m.p) or shards.is_sharded(m.p):
            continue
        p, g, rule, check = m.p, m.p.grad, m.route.rule, m.route.h.check_finite
        if g is not None and g.numel() and _asks(m):
            alike[g.device, g.dtype, compute_dtype(g.dtype), rule.skips_zero, check][p] = g
    found: dict[Tensor, bool | Tensor | None] = {}
    for (device, _, dtype, skips_zero, check), gradients in alike.items():
        if len(gradients) == 1:  # `admit` does with fewer
            continue
        every = list(gradients.values())
        ok = torch.ones(len(every), dtype=torch.bool, device=device)
        if check:  # squared: finite gradients whose squares overflow are refused too
            ok &= torch.stack(torch._foreach_norm(every, dtype=dtype)).square_().isfinite()
        if skips_zero:
            ok &= torch.stack(torch._foreach_norm(every, math.inf)) != 0
        found |= zip(gradients, ok.unbind(), strict=True)
    return found


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
