"""Gradients that a layer gathers beside `p.grad`, brought to what the optimizer would have seen there."""

from typing import Any

import torch
from torch import Tensor

from optimzoo.core.ranks import alone, from_first_rank, mean_over_ranks
from optimzoo.functional.entries import mass
from optimzoo.functional.slices import has_values, on_host


def fold(state: dict[str, Tensor], layer: Any, p: Tensor, maximize: bool) -> None:
    """Add what the layer gathered in this update to `grad_sum`, `grad_sq_sum` and `grad_micro`.

    The layer's sums bypass `p.grad`, so a loss scale, clipping and the average over ranks are made up for here, and an
    update whose gradient is not finite counts for nothing. Every process must call this, with or without sums.
    """
    watch = layer.watched
    sums, raw, fresh = watch.sums, watch.raw, watch.fresh
    if not alone():
        sums = torch.zeros_like(state["grad_sum"]) if sums is None else sums
        raw = mean_over_ranks(layer.summary(torch.zeros_like(p)) if raw is None else raw)
        sums = from_first_rank(sums) if fresh else mean_over_ranks(sums)
        if fresh:
            layer.watch(from_first_rank(watch.candidates))
            watch = layer.watched
    if sums is None or watch.chosen is None:
        return
    if watch.candidates is not state["candidates"]:  # the model has moved to another device since
        watch.candidates = state["candidates"].copy_(watch.candidates)
    sums = sums.mul_(_factor(p.grad, raw, layer) * (-1 if maximize else 1))
    ok = torch.isfinite(sums.dot(sums))
    state["grad_sum"].add_(torch.where(ok, sums, 0))
    state["grad_sq_sum"].add_(torch.where(ok, sums.square_(), 0))
    state["grad_micro"].add_(ok)
    if fresh and on_host(ok) and has_values(ok) and not bool(ok):  # candidates of a gradient that overflowed are none
        layer.watch(state["candidates"].fill_(-1))
    layer.clear_sums(keep=True)


def _factor(grad: Tensor | None, raw: Tensor, layer: Any) -> float | Tensor:
    """By how much `p.grad` now differs from what the layer added to it."""
    if grad is None:  # freed already, by a step inside backward
        return 1.0
    size = raw.dot(raw)
    return torch.where(size == 0, 1.0, layer.summary(grad).dot(raw) / size)


def follow(state: dict[str, Tensor], indices: Tensor, source: Tensor, betas: tuple[float, float]) -> None:
    """Let averages and ages follow their entries; new ones start as if Adam had averaged the folded gradients.

    An average of a constant c over t updates is c (1 - b^t), so with age t the next bias correction gives c again.
    """
    count, new, old = state["grad_micro"], source < 0, source.clamp(min=0)
    place = torch.searchsorted(state["candidates"], indices).clamp_(max=indices.numel() - 1)
    for key, sums, beta in (("exp_avg", "grad_sum", betas[0]), ("exp_avg_sq", "grad_sq_sum", betas[1])):
        seed = state[sums][place] * (mass(beta, count) / count.clamp(min=1))
        state[key].copy_(torch.where(new, seed, state[key][old].to(seed.dtype)))
    state["age"].copy_(torch.where(new, count.to(torch.int16), state["age"][old]))
