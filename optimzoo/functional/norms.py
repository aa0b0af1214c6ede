"""Sizes of matrices and of their rows."""

import math

import torch
from torch import Tensor

DEGENERATE = 1e-6  # a row's spread below this share of its own size, or of the largest spread, is rounding noise


def norm(x: Tensor) -> Tensor:
    """(..., m, n) -> (..., 1, 1), at least float32: Frobenius norms; by rows, in which all of a CPU's threads join."""
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)


def add_product_(x: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """x (m, n) <- beta x + alpha left (m, k) @ right (k, n); of all three there may be a batch, (batch, m, n)."""
    add = x.addmm_ if x.ndim == 2 else x.baddbmm_
    return add(left, right, alpha=alpha, beta=beta)


def largest(x: Tensor) -> Tensor:
    """(..., m, n) -> (..., 1, 1): largest absolute values.

    Without taking any, and by rows: a tenth of the time of the norm of that name on a CPU.
    """
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).amax(-2, keepdim=True)


def standardise_rows(g: Tensor, center: bool = True, total: float | None = None) -> Tensor:
    """(..., m, n) -> (..., m, n): every row minus its mean (with `center`) and over its root mean square.

        x_ij = (g_ij - mean_i) / sqrt(mean_j (g_ij - mean_i)^2)

    Rows without spread (zero, constant, or smaller than a millionth of the largest) become exactly zero. With `total`,
    each matrix is scaled to that Frobenius norm instead, in the same pass. Ma et al., "SWAN", 2024, arXiv:2412.13148.
    One (m, n) is allocated: the result, of at least float32.
    """
    dtype = torch.promote_types(g.dtype, torch.float32)
    tiny, root = torch.finfo(dtype).tiny, math.sqrt(g.shape[-1])
    x = g.to(dtype, copy=True).div_(largest(g).to(dtype).clamp_min_(tiny))  # squares of 1e-30 would vanish
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if center:
        x.sub_(x.mean(-1, keepdim=True))
    spread = torch.linalg.vector_norm(x, dim=-1, keepdim=True) if center else size
    floor = torch.maximum(size, spread.amax(-2, keepdim=True)).mul_(DEGENERATE)
    alive = spread > floor
    if total is not None:
        root = total / alive.sum(-2, keepdim=True).clamp_min(1).to(dtype).sqrt()
    return x.mul_(torch.where(alive, root / spread.clamp_min(tiny), 0))


def scale_to_rms_(x: Tensor, rms: float = 1.0, eps: float = 0.0) -> Tensor:
    """(..., m, n), changed in place: the root mean square of each matrix becomes `rms`; zeros stay zeros.

    `eps` is added to the norm before.
    """
    if rms == 0:
        return x.zero_()  # what a division by 0 makes of zeros is NaN
    return x.mul_(to_rms(norm(x), x.shape[-2] * x.shape[-1], rms, eps))


def to_rms(size: Tensor, count: int, rms: float, eps: float = 0.0) -> Tensor:
    """What brings `count` numbers of norm `size` to the root mean square `rms`; for zeros some finite number.

    `eps` is added to the norm before; where it is 0, `rms` must not be.
    """
    tiny = torch.finfo(size.dtype).tiny
    return (size + eps).div_(rms * math.sqrt(count)).clamp_min_(tiny).reciprocal_()
