"""Rounding to coarser grids without losing small changes on average."""

import torch
from torch import Tensor

from optimzoo.functional.random import hash16
from optimzoo.functional.slices import pieces

_CHUNK = 1 << 16  # elements rounded at a time: the random bits need 8 bytes each


def stochastic_round_(target: Tensor, source: Tensor, seed: int | Tensor, first: int = 0) -> Tensor:
    """target (...) bfloat16 <- source (...) float32, each element rounded up or down with the unbiased probability.

    The draw is a function of (seed, position), where the first element has position `first`: pieces of a tensor are
    rounded like the whole. An average with decay 0.999 changes by less than half a unit of bfloat16
    a step: rounded to nearest it would never move.
    """
    if target.dtype != torch.bfloat16 or not target.is_contiguous():
        return target.copy_(source)
    flat, exact = target.view(-1), source.reshape(-1)
    for part in pieces(flat, _CHUNK):
        piece = exact[part].to(torch.float32, copy=True)
        bits = piece.view(torch.int32)
        noise = hash16(piece.numel(), seed, piece.device, first + part.start).to(torch.int32)
        rounded = (bits + noise).bitwise_and_(-0x10000).view(torch.float32)
        flat[part].copy_(torch.where(piece.isfinite(), rounded, piece))
    return target
