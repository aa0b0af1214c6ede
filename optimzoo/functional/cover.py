"""Second moments as minima of maxima: one accumulator for each slice of a tensor along each of its axes."""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimzoo.functional.part_steps import rows_in_piece
from optimzoo.functional.slices import has_values

TILE = 16  # rows


def sm3_cover(*accumulators: Tensor) -> Tensor:
    """(m, 1), (1, n) -> (m, n), or more axes: the smallest accumulator that covers an entry, as a fresh tensor."""
    return functools.reduce(torch.minimum, accumulators)


def sm3_shapes(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The accumulators' shapes: one an axis, shaped to broadcast; a vector or a scalar keeps one of its own shape."""
    if len(shape) < 2:
        return [tuple(shape)]
    return [tuple(size if axis == kept else 1 for axis, size in enumerate(shape)) for kept in range(len(shape))]


def sm3_update(g: Tensor, accumulators: Sequence[Tensor]) -> Tensor:
    """(d_0, ..., d_k), accumulators as `sm3_shapes` -> (d_0, ..., d_k): SM3-II; changes the accumulators in place.

    All may have the same axes before these, for several tensors at once.

        nu_i  <- min over the slices r that hold i of mu_r + g_i^2        mu_r <- max over i in r of nu_i

    The result bounds the sum of all squared gradients of an entry from above, and no accumulator ever falls. A vector
    is its own cover, which is diagonal AdaGrad. Anil, Gupta, Koren, Singer 2019, arXiv:1901.11150.
    """
    if len(accumulators) == 1:
        return accumulators[0].addcmul_(g, g).clone()
    nu = sm3_cover(*accumulators).addcmul_(g, g)
    _remember(nu, accumulators)
    return nu


def sm3_step_(
    w: Tensor, g: Tensor, accumulators: Sequence[Tensor], lr: float, weight_decay: float, eps: float, maximize: bool
) -> None:
    """`sm3_update`, decay and w -= lr g / (sqrt(nu) + sqrt(eps)), in place; all contiguous, of one dtype, on the host.

    AdaGrad's fused kernel does it in one sweep, on a "sum" that is the cover. Its eps stands outside of the root. Of a
    large matrix the cover is made for some rows at a time.
    """
    step = partial(_adagrad_, lr=lr, weight_decay=weight_decay, eps=math.sqrt(eps), maximize=maximize)
    if len(accumulators) == 1:
        step(w, g, accumulators[0])
    elif len(accumulators) > 2 or not w.numel() or rows_in_piece(w) == w.shape[0]:
        nu = sm3_cover(*accumulators)
        step(w, g, nu)
        _remember(nu, accumulators)
    else:
        row, column = accumulators
        _step_matrix_(w, g, row, column, step)


def _step_matrix_(w: Tensor, g: Tensor, row: Tensor, column: Tensor, step: Callable[..., None]) -> None:
    rows = rows_in_piece(w)
    rows -= rows % TILE if rows > TILE else 0
    every, highest = range(0, w.shape[0], rows), torch.zeros_like(column)  # nothing squared is below
    room = w.new_empty(rows, w.shape[1])
    for start in every if has_values(w) else every[:2]:  # as in `pieces`
        block = slice(start, start + rows)
        nu = torch.minimum(row[block], column, out=room[: row[block].shape[0]])
        step(w[block], g[block], nu)
        row[block].copy_(nu.amax(1, keepdim=True))
        torch.maximum(highest, _down(nu), out=highest)
    column.copy_(highest)


def _adagrad_(w: Tensor, g: Tensor, nu: Tensor, *, lr: float, weight_decay: float, eps: float, maximize: bool) -> None:
    if weight_decay:
        w.mul_(1 - lr * weight_decay)
    one = torch.ones((), dtype=torch.float32, device=w.device)
    how: dict[str, Any] = {"lr": lr, "lr_decay": 0.0, "weight_decay": 0.0, "eps": eps, "maximize": maximize}
    torch._fused_adagrad_([w], [g], [nu], [one], **how)


def _remember(nu: Tensor, accumulators: Sequence[Tensor]) -> None:
    """Put the maxima over each axis' slices into its accumulator."""
    own = len(accumulators)
    for kept, accumulator in enumerate(accumulators):
        others = [axis - own for axis in range(own) if axis != kept]
        if nu.numel():  # a maximum over nothing is an error, and there is nothing to remember
            accumulator.copy_(_down(nu) if nu.ndim == 2 and kept == 1 else nu.amax(others, keepdim=True))


def _down(nu: Tensor) -> Tensor:
    """(m, n) -> (1, n): maxima of columns.

    Down whole columns every row is another page of memory; a few rows at a time stay in the nearest cache.
    """
    few = nu.view(-1, TILE, nu.shape[1]).amax(1) if nu.shape[0] % TILE == 0 else nu
    return few.amax(0, keepdim=True)


def sm3_sparse_update(g: Tensor, indices: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """g, indices (k,), row (m,), col (n,) -> (k,): SM3-II of entries at flat positions; changes `row`, `col` in place.

        nu_j <- min(row[r_j], col[c_j]) + g_j^2        row[r_j], col[c_j] <- max(themselves, nu_j)

    Rows and columns without an entry keep what they hold.
    """
    place = indices.long()
    r, c = place // col.numel(), place % col.numel()
    nu = torch.minimum(row[r], col[c]).addcmul_(g, g)
    row.scatter_reduce_(0, r, nu, "amax")
    col.scatter_reduce_(0, c, nu, "amax")
    return nu
