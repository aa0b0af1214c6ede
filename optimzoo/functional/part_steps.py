"""Whole steps of rules that treat a part of each matrix in their own way, in place and with room for one piece of it.

They do what `take`, a direction and `put_` do, without the direction of a whole matrix: weights of the part are copied
out, stepped, and copied back over what the rest of the matrix has become.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from optimzoo.functional.slices import piece_size, pieces

PIECE = 1 << 18  # elements handled at a time on a CPU: with half of them, threads wait longer than they work

PartStep = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # weights, gradients and two averages, of one shape
RestStep = Callable[[Tensor, Tensor, Tensor], None]  # weights and gradients of one shape, room for as many elements


def room_for(w: Tensor) -> Tensor:
    """One piece of scratch for a matrix (m, n), at least a row, at most all of it."""
    return torch.empty(min(w.numel(), max(piece_size(w, PIECE), w.shape[-1])), dtype=w.dtype, device=w.device)


def _rows(w: Tensor) -> int:
    """Rows in a piece."""
    return max(1, piece_size(w, PIECE) // w.shape[1])


def step_lines_(w: Tensor, g: Tensor, rest: RestStep) -> None:
    """`rest` on all of w (m, n), piece by piece."""
    room, w, g = room_for(w), w.view(-1), g.view(-1)
    for part in pieces(w, PIECE):
        rest(w[part], g[part], room)


def step_columns_(
    w: Tensor, g: Tensor, columns: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, part: PartStep, rest: RestStep
) -> None:
    """`part` on the columns (k,) of w (m, n), whose averages are (m, k); `rest` on the others."""
    room, rows, places = room_for(w), _rows(w), columns.long()
    for start in range(0, w.shape[0], rows):
        block = slice(start, start + rows)
        index = places.expand(w[block].shape[0], -1)  # gather is what runs on all threads
        low = w[block].gather(1, index)
        taken = torch.gather(g[block], 1, index, out=room[: index.numel()].view(index.shape))
        part(low, taken, exp_avg[block], exp_avg_sq[block])
        rest(w[block], g[block], room)
        w[block].scatter_(1, index, low)


def step_rows_(
    w: Tensor, g: Tensor, chosen: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, part: PartStep, rest: RestStep
) -> None:
    """`part` on the rows (k,) of w (m, n), whose averages are (k, n); `rest` on the others."""
    room, rows = room_for(w), _rows(w)
    low = w.index_select(0, chosen)
    for start in range(0, low.shape[0], rows):
        block = slice(start, start + rows)
        taken = torch.index_select(g, 0, chosen[block], out=room[: low[block].numel()].view(low[block].shape))
        part(low[block], taken, exp_avg[block], exp_avg_sq[block])
    for start in range(0, w.shape[0], rows):
        rest(w[start : start + rows], g[start : start + rows], room)
    w.index_copy_(0, chosen.long(), low)
