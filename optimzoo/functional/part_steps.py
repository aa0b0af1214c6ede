"""Whole steps, on a CPU, of rules that treat a part of each matrix in their own way, a piece at a time.

They do what `take`, two directions and `put_` do, without the direction of a whole matrix.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optimzoo.functional import host_kernel
from optimzoo.functional.directions import stateless_direction
from optimzoo.functional.projection import LOW_RANK, noise_share, noise_unit
from optimzoo.functional.slices import has_values, pieces

PIECE = 1 << 20  # elements handled at a time on a CPU: with a quarter of them, threads wait a tenth longer

PartDirection = Callable[[Tensor, Tensor, Tensor], Tensor]  # of gradients and two averages of one shape, which change
RestDirection = Callable[[Tensor, Tensor], Tensor]  # of gradients, in room for as many elements
Change = Callable[[Tensor, Tensor], None]  # moves weights by their direction, which is used up


def rest_direction(kind: str, scale: float, maximize: bool) -> RestDirection:
    """`stateless_direction` of gradients, or of what is left of them, in room that is given."""

    def rest(g: Tensor, room: Tensor) -> Tensor:
        u = stateless_direction(g, kind, scale, out=room[: g.numel()].view(g.shape))
        return u.neg_() if maximize else u

    return rest


def step_lines_(w: Tensor, g: Tensor, rest: RestDirection, change: Change) -> None:
    """`rest` on all of w (m, n), contiguous."""
    room, w, g = _room(w, w.numel()), w.view(-1), g.view(-1)
    for part in pieces(w, PIECE):
        change(w[part], rest(g[part], room))


def step_columns_(
    w: Tensor,
    g: Tensor,
    columns: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    part: PartDirection,
    rest: RestDirection,
    change: Change,
) -> None:
    """`part` on the columns (k,) of w (m, n), whose averages are (m, k); `rest` on the others."""
    rows, places = rows_in_piece(w), columns.long()
    room = _room(w, rows * w.shape[1])
    for start in range(0, w.shape[0], rows):
        block = slice(start, start + rows)
        index = places.expand(w[block].shape[0], -1)  # gather is what runs on all threads
        taken = torch.gather(g[block], 1, index, out=room[: index.numel()].view(index.shape))
        low = part(taken, exp_avg[block], exp_avg_sq[block])
        change(w[block], rest(g[block], room).scatter_(1, index, low))


def step_rows_(
    w: Tensor,
    g: Tensor,
    chosen: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    part: PartDirection,
    rest: RestDirection,
    change: Change,
) -> None:
    """`part` on the rows (k,), sorted, of w (m, n), whose averages are (k, n); `rest` on the others.

    Without values, which rows are in a piece cannot be asked, so there it is one piece.
    """
    rows, places = (rows_in_piece(w), chosen.tolist()) if has_values(w) else (w.shape[0], [])
    room = _room(w, rows * w.shape[1])
    for start in range(0, w.shape[0], rows):
        block = slice(start, start + rows)
        mine = slice(bisect_left(places, start), bisect_left(places, start + rows)) if places else slice(None)
        index, averages = chosen[mine].long(), (exp_avg[mine], exp_avg_sq[mine])
        taken = torch.index_select(g, 0, index, out=room[: averages[0].numel()].view(averages[0].shape))
        low = part(taken, *averages)
        change(w[block], rest(g[block], room).index_copy_(0, index.sub_(start), low))


def step_low_rank_(
    w: Tensor,
    g: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    part: PartDirection,
    rest: RestDirection,
    change: Change,
    signed: bool,
) -> None:
    """`part` on g in a basis (s, r) of the shorter side of w (m, n), `rest` on what that leaves, or its signs alone."""
    right = w.shape[0] >= w.shape[1]
    low = g @ basis if right else basis.mT @ g
    unit = noise_unit(g, basis.shape[1]) if signed else None
    direction = part(low, exp_avg, exp_avg_sq)
    rows = rows_in_piece(w)
    room = _room(w, rows * w.shape[1])
    for start in range(0, w.shape[0], rows):
        block = slice(start, start + rows)
        left = room[: g[block].numel()].view(g[block].shape)
        torch.addmm(g[block], *((low[block], basis.mT) if right else (basis[block], low)), alpha=-1, out=left)
        if unit is not None:
            left.div_(unit, rounding_mode="trunc")
        u = rest(left, room)
        u.addmm_(*((direction[block], basis.mT) if right else (basis[block], direction)))
        change(w[block], u)


def compiled_step_(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    h: Any,
    lr: float,
    kind: str,
    averages: host_kernel.Averages,
    free: tuple[str, float],
) -> list[bool]:
    """`host_kernel.step_` with parts of any kind: in a basis, `averages.chosen`, AdamW steps one matrix at a time."""
    if kind not in LOW_RANK or averages.chosen is None:
        return host_kernel.step_(ws, gs, h, lr, kind, averages, free)
    every = enumerate(zip(ws, gs, averages.chosen, strict=True))
    return [_compiled_low_rank_(w, g, h, lr, basis, averages.of(i), free) for i, (w, g, basis) in every]


def _compiled_low_rank_(
    w: Tensor, g: Tensor, h: Any, lr: float, basis: Tensor, averages: host_kernel.Averages, free: tuple[str, float]
) -> bool:
    """`step_low_rank_` in fewer passes over memory; returns whether w was stepped."""
    most = host_kernel.largest(g, h)
    if most is None:
        return False
    right, rows = w.shape[0] >= w.shape[1], rows_in_piece(w)
    low = host_kernel.readable(g @ basis if right else basis.mT @ g)
    u, room = (host_kernel.readable(t) for t in (torch.zeros_like(low), _room(w, rows * w.shape[1])))
    # What is at 0 ends at its own direction.
    host_kernel.step_([u], [low], h._replace(weight_decay=0.0, check_finite=False), -1.0, "all", averages)
    noise = max(most * noise_share(g, basis.shape[1]), torch.finfo(g.dtype).tiny)
    for start in range(0, w.shape[0], rows):
        block = slice(start, start + rows)
        inside = room[: g[block].numel()].view(g[block].shape)
        if free[0] != "none":
            torch.mm(*((low[block], basis.mT) if right else (basis[block], low)), out=inside)
        host_kernel.step_outside_(w[block], g[block], inside, h, lr, free, noise)
        w[block].addmm_(*((u[block], basis.mT) if right else (basis[block], u)), alpha=-lr)
    return True


def rows_in_piece(w: Tensor) -> int:
    """Rows of w (m, n) that are handled at a time."""
    return min(w.shape[0], max(1, PIECE // w.shape[1]))


def _room(w: Tensor, most: int) -> Tensor:
    return torch.empty(min(most, max(PIECE, w.shape[-1])), dtype=w.dtype, device=w.device)
