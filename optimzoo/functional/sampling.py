"""Column-row sampling: estimate a sum of rank-1 terms from few of them, without bias and with static shapes."""

import torch
from torch import Tensor

from optimzoo.functional.random import hash32

CRITERIA = ("paper", "variance")


def column_row_sample(
    weights: Tensor, k: int, seed: int | Tensor, criterion: str = "paper", mix: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Choose k of N terms, the c heaviest for certain and the rest by chance: (..., N) >= 0 -> int32, float32 (..., k).

    With p = weights / sum: the c largest carry scale 1; the other k - c are drawn with replacement in proportion to p
    among the rest R and carry P_R / ((k - c) p), so that sum_j scale_j t(index_j) has the mean sum_i t(i) for any
    terms t that vanish where p does. `winners` chooses c. `mix` blends p with the uniform distribution, a floor
    against weights that are out of date. Weights that sum to zero count as equal; k >= N takes every term once.

    Winner-take-all column-row sampling (Liu et al., 2023, arXiv 2305.15265).
    """
    n = weights.shape[-1]
    if k >= n:
        index = torch.arange(n, dtype=torch.int32, device=weights.device).expand(weights.shape)
        return index, torch.ones(weights.shape, dtype=torch.float32, device=weights.device)
    p = probabilities(weights, mix)
    top, order = p.topk(k, dim=-1)
    c = winners(top, criterion).unsqueeze(-1)
    won = torch.arange(k, device=p.device) < c
    rest = p.scatter(-1, order, torch.where(won, 0.0, top))
    total = rest.cumsum(-1)
    # 32 bits and float64: with 24 bits a million tokens would be drawn with several per cent of error each
    u = hash32(top.numel(), seed, p.device).reshape(top.shape).to(torch.float64) * 2.0**-32
    drawn = torch.searchsorted(total, u * total[..., -1:], right=True).clamp_max(n - 1)
    chance = rest.gather(-1, drawn) * (k - c)
    scale = torch.where(chance > 0, total[..., -1:] / chance, 0.0)
    scale = torch.where(won, 1.0, scale.where(p.isfinite().all(-1, keepdim=True), torch.nan))
    return torch.where(won, order, drawn).to(torch.int32), scale.to(torch.float32)


def probabilities(weights: Tensor, mix: float = 0.0) -> Tensor:
    """Normalise weights over the last dimension in float64: (..., N) >= 0 -> (..., N)."""
    w = weights.to(torch.float64)
    total = w.sum(-1, keepdim=True)
    p = torch.where(total == 0, 1.0 / w.shape[-1], w / total)
    return p.mul(1 - mix).add_(mix / w.shape[-1])


def winners(top: Tensor, criterion: str = "paper") -> Tensor:
    """How many of the k largest probabilities to keep for certain: (..., k) descending -> (...), in 0..k-1.

    With P_c the sum of the c largest: `paper` minimises (1 - P_c) / (k - c); `variance` minimises
    (1 - P_c)^2 / (k - c), the leading term of the variance itself.
    """
    k = top.shape[-1]
    left = (1 - (top.cumsum(-1) - top)).clamp_min(0)
    left = left.square() if criterion == "variance" else left
    return (left / torch.arange(k, 0, -1, device=top.device)).argmin(-1)
