"""The last line of every optimizer: w <- (1 - lr * weight_decay) w - lr u."""

from collections.abc import Iterable

import torch
from torch import Tensor

from optimzoo.core.storage import compute_dtype, has_values

CHUNK = 1 << 18  # elements handled at a time where a temporary is needed: 1 MiB of float32


def flat(tensor: Tensor) -> Tensor | None:
    """The tensor's elements as one line of memory, in memory order, or None when they are not contiguous."""
    return tensor.view(-1) if tensor.is_contiguous() else None


def pieces(tensor: Tensor) -> Iterable[int]:
    """Where the tensor's pieces of `CHUNK` elements begin.

    Without values the first two stand for all: the others cost the same, and plans of large models would take minutes.
    """
    starts = range(0, tensor.numel(), CHUNK)
    return starts if has_values(tensor) else starts[:2]


def apply_update(w: Tensor, u: Tensor, lr: float | Tensor, weight_decay: float, ok: Tensor | None, after: bool) -> None:
    """Decay and step in place; `u` is used up.

    `ok` is a 0-dim boolean on the device, or None when the host knows that the gradient was finite. `after` decays the
    stepped weight instead: w <- (1 - lr * weight_decay) (w - lr u).
    """
    if ok is not None:
        u.masked_fill_(~ok, 0)
    keep = _kept(lr, weight_decay, ok)
    if w.dtype == compute_dtype(w.dtype):
        _step_and_decay(w, u, lr, keep, after)
        return
    line, update = flat(w), flat(u)
    if line is None or update is None:
        exact = w.to(u.dtype)
        _step_and_decay(exact, u, lr, keep, after)
        w.copy_(exact)
        return
    for start in pieces(line):
        piece = line[start : start + CHUNK]
        exact = piece.to(u.dtype)
        _step_and_decay(exact, update[start : start + CHUNK], lr, keep, after)
        piece.copy_(exact)


def _kept(lr: float | Tensor, weight_decay: float, ok: Tensor | None) -> float | Tensor | None:
    """The factor 1 - lr * weight_decay, None when nothing decays; 1 where the step is skipped."""
    if weight_decay == 0:
        return None
    keep = 1 - lr * weight_decay
    return keep if ok is None else torch.where(ok, keep, 1.0)


def _step_and_decay(w: Tensor, u: Tensor, lr: float | Tensor, keep: float | Tensor | None, after: bool) -> None:
    if keep is not None and not after:
        w.mul_(keep)
    if isinstance(lr, Tensor):
        w.sub_(u.mul_(lr))
    else:
        w.add_(u, alpha=-lr)
    if keep is not None and after:
        w.mul_(keep)
