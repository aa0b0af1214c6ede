"""Directions chosen by name: with one or two averages, or with none."""

import torch
from torch import Tensor

from optimzoo.functional.moments import adam_direction


def stateful_direction(
    g: Tensor,
    kind: str,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    step: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """(...) -> (...): "lion" or "sgdm", or AdamW where there is an `exp_avg_sq`; changes the averages in place."""
    if exp_avg_sq is not None:
        return adam_direction(g, exp_avg, exp_avg_sq, step, betas, eps)
    if kind == "lion":
        return lion_direction(g, exp_avg, betas)
    return exp_avg.mul_(betas[0]).add_(g).clone()


def lion_direction(g: Tensor, exp_avg: Tensor, betas: tuple[float, float]) -> Tensor:
    """(...) -> (...): the sign of one average while another is kept; changes `exp_avg` in place.

        u = sign(b1 m + (1 - b1) g)        m <- b2 m + (1 - b2) g

    Chen et al. 2023, arXiv:2302.06675.
    """
    u = torch.lerp(exp_avg, g, 1 - betas[0]).sign_()
    exp_avg.lerp_(g, 1 - betas[1])
    return u


def stateless_direction(g: Tensor, kind: str, scale: float, out: Tensor | None = None) -> Tensor:
    """(...) -> (...): scale * sign(g), scale * g for "sgd", zeros for "none"; contiguous, or `out`, which may be g."""
    out = g.new_empty(g.shape) if out is None else out
    if kind == "none":
        return out.zero_()
    if kind == "sgd":
        return torch.mul(g, scale, out=out)
    torch.sign(g, out=out)
    return out if scale == 1 else out.mul_(scale)
