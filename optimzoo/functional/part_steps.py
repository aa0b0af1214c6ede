"""Whole steps of rules that work on a part of each matrix, in place and with room for one piece of it.

They do what `take`, a direction and `put_` do, without the direction of a whole matrix: weights of the part are copied
out, stepped by PyTorch's fused kernel, and copied back over what the rest of the matrix has become.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 20  # elements handled at a time: 4 MiB of float32, below which threads wait longer than they work


@dataclass(frozen=True, slots=True)
class Rate:
    """The numbers of one step: learning rate, decay and AdamW's options; `step` is counted from 1."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    step: float


def room_for(w: Tensor) -> Tensor:
    """One piece of scratch for a matrix (m, n): `PIECE` elements, at least a row, at most all of it."""
    return torch.empty(min(w.numel(), max(PIECE, w.shape[-1] if w.ndim else 1)), dtype=w.dtype, device=w.device)


def adamw_step_(w: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rate: Rate) -> None:
    """AdamW on contiguous tensors of one shape, by PyTorch's fused kernel."""
    step = torch.full((), rate.step, dtype=torch.float32, device=w.device)
    how: dict[str, Any] = {"beta1": rate.betas[0], "beta2": rate.betas[1], "eps": rate.eps}
    how |= {"lr": rate.lr, "weight_decay": rate.weight_decay, "amsgrad": False, "maximize": False}
    torch._fused_adamw_([w], [g], [exp_avg], [exp_avg_sq], [], [step], **how)


def stateless_step_(w: Tensor, g: Tensor, kind: str, scale: float, rate: Rate, room: Tensor) -> None:
    """`stateless_direction` and decay on tensors of one shape; `room` holds at least as many elements."""
    if rate.weight_decay:
        w.mul_(1 - rate.lr * rate.weight_decay)
    if kind == "sgd":
        w.add_(g, alpha=-rate.lr * scale)
    elif kind == "sign":
        w.add_(torch.sign(g, out=room[: g.numel()].view(g.shape)), alpha=-rate.lr * scale)


def column_step_(
    w: Tensor, g: Tensor, part: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, kind: str, scale: float, rate: Rate
) -> None:
    """AdamW on columns `part` (k,) of w (m, n), the rule without state on the others; averages (m, k), in place."""
    room, rows = room_for(w), max(1, PIECE // w.shape[1])
    for start in range(0, w.shape[0], rows):
        block = slice(start, start + rows)
        index = part.long().expand(w[block].shape[0], -1)  # gather is what runs on all threads
        taken = room[: index.numel()].view(index.shape)
        low = w[block].gather(1, index)
        adamw_step_(low, torch.gather(g[block], 1, index, out=taken), exp_avg[block], exp_avg_sq[block], rate)
        stateless_step_(w[block], g[block], kind, scale, rate, room)
        w[block].scatter_(1, index, low)


def row_step_(
    w: Tensor, g: Tensor, part: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, kind: str, scale: float, rate: Rate
) -> None:
    """AdamW on rows `part` (k,) of w (m, n), the rule without state on the others; averages (k, n), in place."""
    room, rows = room_for(w), max(1, PIECE // w.shape[1])
    low = w.index_select(0, part)
    for start in range(0, low.shape[0], rows):
        block = slice(start, start + rows)
        taken = torch.index_select(g, 0, part[block], out=room[: low[block].numel()].view(low[block].shape))
        adamw_step_(low[block], taken, exp_avg[block], exp_avg_sq[block], rate)
    for start in range(0, w.shape[0], rows):
        stateless_step_(w[start : start + rows], g[start : start + rows], kind, scale, rate, room)
    w.index_copy_(0, part.long(), low)
