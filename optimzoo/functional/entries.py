"""Adam for single entries, each with an age of its own, and entries that come and go."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optimzoo.functional.sparse import Support, outer_largest, without

OLDEST = torch.iinfo(torch.int16).max  # by then no bias is left to correct


def mass(beta: float, t: Tensor) -> Tensor:
    """(...) -> (...): 1 - beta^t, the weight of t numbers in an average; to the last digit also near 1."""
    return torch.expm1(t * (math.log(beta) if beta > 0 else -math.inf)).neg_()


def adam_entries(
    g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, age: Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    """(k,) -> (k,): Adam's direction of entries with ages (k,) int16; changes both averages and the ages in place.

    t <- t + 1        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) * sqrt(1 - b2^t) / (sqrt(v) + eps)
    """
    age.clamp_(max=OLDEST - 1).add_(1)
    exp_avg.lerp_(g, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    t = age.to(g.dtype)
    u = exp_avg_sq.sqrt().add_(eps).reciprocal_().mul_(exp_avg)
    return u.mul_(mass(betas[1], t).sqrt_()).div_(mass(betas[0], t))


class Exchanges(NamedTuple):
    """When entries are exchanged, and how many: in every `every` updates, after the first `accumulate` of them."""

    every: int
    accumulate: int
    total: int
    rate: float
    policy: str

    def check(self) -> None:
        """Refuse what cannot be followed."""
        if self.total < 1:
            raise TypeError("SFT needs total_steps=..., the updates of the whole run: entries move ever less")
        if self.accumulate >= self.every:
            raise ValueError(f"SFT: accumulate={self.accumulate} must be less than reselect_every={self.every}")

    def collects(self, update: int) -> bool:
        """Whether update number `update`, from 0, is one of these, and the exchange falls inside the run."""
        start = update - update % self.every
        return self.rate > 0 and update < start + self.accumulate <= self.total

    def due(self, done: int) -> bool:
        """Whether an exchange follows `done` updates."""
        return self.rate > 0 and done % self.every == self.accumulate and done <= self.total

    def share(self, done: int) -> float:
        """The share of the entries that goes then: all of the first, random ones, and ever fewer later."""
        if done == self.accumulate:
            return 1.0
        progress = done / self.total
        return self.rate * (1 - progress if self.policy == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def grown_by_sums(candidates: Tensor, grad_sum: Tensor, count: Tensor, indices: Tensor, drop: Tensor) -> Tensor:
    """candidates, grad_sum (c,), indices (k,), drop (d,) -> (d,): the largest |sums| but for entries that stay.

    The dropped positions themselves where nothing was summed, so that they stay.
    """
    score = without(grad_sum.abs(), candidates, indices, drop)
    return torch.where(count > 0, candidates[score.topk(drop.numel()).indices], indices[drop])


def grown_by_cover(row: Tensor, col: Tensor, active: Support, drop: Tensor) -> Tensor:
    """row (m,), col (n,), drop (d,) -> (d,): the largest row_i col_j outside the entries, those dropped left out too.

    The dropped positions themselves where no gradient was ever seen, so that they stay.
    """
    return torch.where(row.any(), outer_largest(row, col, drop.numel(), active), active.indices[drop])
