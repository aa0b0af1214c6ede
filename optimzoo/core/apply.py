"""The last line of every optimizer: w <- (1 - lr * weight_decay) w - lr u.

A weight narrower than the computation is rounded, and a step below half its unit is then lost: a bfloat16 weight of 0.5
does not notice 1e-3. Chance (each element goes up or down so that the mean is right) or a second tensor with what was
rounded off keep such steps.
"""

import torch
from torch import Tensor

from optimzoo.core.storage import compute_dtype
from optimzoo.functional.rounding import stochastic_round_
from optimzoo.functional.slices import pieces

CHUNK = 1 << 18  # elements handled at a time where a temporary is needed: 1 MiB of float32


def flat(tensor: Tensor) -> Tensor | None:
    """The tensor's elements as one line of memory, in memory order, or None when they are not contiguous."""
    return tensor.view(-1) if tensor.is_contiguous() else None


def apply_update(
    w: Tensor,
    u: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    ok: Tensor | None,
    after: bool,
    *,
    error: Tensor | None = None,
    seed: int | Tensor | None = None,
    first: int = 0,
    lost: Tensor | None = None,
) -> None:
    """Decay and step in place; `u` is used up.

    `ok` is a 0-dim boolean on the device, or None when the host knows that the gradient was finite; of several weights
    in one tensor one each, (n, 1, ...). `after` decays the stepped weight instead: w <- (1 - lr * weight_decay) (w - lr
    u). The rest is about narrow weights: `error` is added before and holds afterwards what rounding left out, `seed`
    asks for rounding by chance, for positions from `first` on, and `lost` (2,) is increased by the elements that did
    not change and by those that should have.
    """
    if ok is not None:
        u.masked_fill_(~ok, 0)
    keep = _kept(lr, weight_decay, ok, u.dtype)
    if w.dtype == compute_dtype(w.dtype):
        _step_and_decay(w, u, lr, keep, after)
        return
    line, update = flat(w), flat(u)
    if line is None or update is None:
        _step_narrow(w, u, lr, keep, after, ok, error, seed, first, lost)
        return
    rest = None if error is None else error.view(-1)
    for part in pieces(line, CHUNK):
        piece = None if rest is None else rest[part]
        _step_narrow(line[part], update[part], lr, keep, after, ok, piece, seed, first + part.start, lost)


def _step_narrow(
    w: Tensor,
    u: Tensor,
    lr: float | Tensor,
    keep: float | Tensor | None,
    after: bool,
    ok: Tensor | None,
    error: Tensor | None,
    seed: int | Tensor | None,
    first: int,
    lost: Tensor | None,
) -> None:
    exact = w.to(u.dtype)
    if error is not None:
        exact.add_(error)
    before = None if lost is None else exact.clone()
    _step_and_decay(exact, u, lr, keep, after)
    rounded = exact.to(w.dtype) if seed is None else stochastic_round_(_line_like(w), exact, seed, first)
    if error is not None:
        left = exact - rounded
        if ok is not None:  # half a unit, rounded itself, may be enough to move a weight that was to be left alone
            rounded, left = torch.where(ok, rounded, w), torch.where(ok, left, error)
        error.copy_(left)
    w.copy_(rounded)
    if lost is not None:
        now = w.to(u.dtype) if error is None else w.to(u.dtype).add_(error)
        wanted = (u != 0) | (exact != before)
        lost.add_(torch.stack([(wanted & (now == before)).sum(), wanted.sum()]))


def _line_like(w: Tensor) -> Tensor:
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)


def _kept(lr: float | Tensor, weight_decay: float, ok: Tensor | None, dtype: torch.dtype) -> float | Tensor | None:
    """The factor 1 - lr * weight_decay, None when nothing decays; 1 where the step is skipped."""
    if weight_decay == 0:
        return None
    if ok is None:
        return 1 - lr * weight_decay
    keep = 1 - lr * weight_decay * ok.to(torch.float64)
    return keep.to(dtype) if keep.ndim else keep  # one of them counts as a number


def _step_and_decay(w: Tensor, u: Tensor, lr: float | Tensor, keep: float | Tensor | None, after: bool) -> None:
    if keep is not None and not after:
        w.mul_(keep)
    if isinstance(lr, Tensor):
        w.sub_(u.mul_(lr))
    else:
        w.add_(u, alpha=-lr)
    if keep is not None and after:
        w.mul_(keep)
