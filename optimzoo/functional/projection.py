"""Parts of a matrix: some columns, rows or entries ("randk"), or a low-rank basis; and whose turn it is among tensors.

An index part is (k,) int32, sorted; a basis is (s, r) for the shorter side s = min(m, n), from the right if m >= n,
else from the left. Choices are functions of a seed alone: the same on every rank and after a resume.
"""

import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from optimzoo.functional.norms import add_product_, largest
from optimzoo.functional.random import fold, hash32
from optimzoo.functional.subspace import leading_vectors, random_basis_

LOW_RANK = ("svd", "random")
_STRATUM = 1 << 14  # positions sorted at a time: keys and their order take 24 bytes each


def share(n: int, density: float) -> int:
    """How many of n are `density` of them, at least one; 0.29 of 100 is 29, which a plain floor makes 28."""
    return max(1, math.floor(density * n + 1e-6))


def choose_(index: Tensor, seed: int, *, n: int) -> Tensor:
    """Fill (k,) int32 with k different numbers below n, sorted, each equally likely.

    Beyond 2^14 numbers every stretch of 2^14 gives its exact share, so that the workspace stays small.
    """
    if n >= 2**31:
        raise ValueError(f"cannot choose among {n} positions with 4-byte indices; use projection='columns'")
    k = index.numel()
    for start in range(0, n, _STRATUM):
        end = min(start + _STRATUM, n)
        first, last = k * start // n, k * end // n
        keys = hash32(end - start, fold(seed, start), index.device)
        picked = torch.argsort(keys, stable=True)[: last - first].sort().values
        index[first:last].copy_(picked.add_(start))
    return index


def in_period(step: Any, gap: int) -> Any:
    """The number, from 1, of a step in its period of `gap` steps; a part is chosen in the first of each."""
    return (step - 1) % gap + 1


def part_shapes(shape: tuple[int, ...], kind: str, density: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the part itself and of what `take` takes of an (m, n) matrix."""
    m, n = shape
    if kind in LOW_RANK:
        r = share(min(m, n), density)
        return (min(m, n), r), (m, r) if m >= n else (r, n)
    k = share(_positions(shape, kind), density)
    return (k,), {"columns": (m, k), "rows": (k, n), "randk": (k,)}[kind]


def draw_(part: Tensor, seed: int, *, kind: str, shape: tuple[int, ...], g: Tensor | None = None) -> None:
    """Fill a part of an (m, n) matrix: at random, but "svd" from g (m, n) where there is one."""
    if kind == "svd" and g is not None:
        part.copy_(svd_basis(g, part.shape[1]))
    elif kind in LOW_RANK:
        random_basis_(part, seed)
    else:
        choose_(part, seed, n=_positions(shape, kind))


def _positions(shape: tuple[int, ...], kind: str) -> int:
    return {"columns": shape[1], "rows": shape[0], "randk": shape[0] * shape[1]}[kind]


def take(g: Tensor, part: Tensor, kind: str) -> Tensor:
    """(..., m, n) -> (..., m, k) "columns", (..., k, n) "rows", (..., k) "randk"; a new tensor.

    In a basis (..., m, r) or (..., r, n).
    """
    if kind in LOW_RANK:
        return g @ part if g.shape[-2] >= g.shape[-1] else part.mT @ g
    g, dim, index = _places(g, part, kind)
    return torch.gather(g, dim, index)


def _places(x: Tensor, part: Tensor, kind: str) -> tuple[Tensor, int, Tensor]:
    """x as it is indexed, the axis, and the index: of gather and scatter, which run on all threads of a CPU."""
    index, (m, n) = part.long(), x.shape[-2:]
    if kind == "randk":
        return x.flatten(-2), -1, index
    if kind == "columns":
        return x, -1, index[..., None, :].expand(*index.shape[:-1], m, -1)
    return x, -2, index[..., None].expand(*index.shape, n)


def put_(u: Tensor, part: Tensor, low: Tensor, kind: str) -> Tensor:
    """The way back, into u (..., m, n), contiguous: chosen positions are overwritten, a basis' share is added."""
    if kind in LOW_RANK:
        return add_lifted_(u, part, low)
    line, dim, index = _places(u, part, kind)
    line.scatter_(dim, index, low)
    return u


def svd_basis(g: Tensor, rank: int) -> Tensor:
    """(m, n) -> (min(m, n), r): leading right singular vectors if m >= n, else left, in float64; a view of all.

    From the Gram matrix of the shorter side, which in float64 knows them better than a float32's decomposition does, in
    a half to an eighth of the time. Workspace beside the result: two (s, s) of float64, s = min(m, n).
    """
    tall = g if g.shape[0] >= g.shape[1] else g.mT
    s = tall.shape[1]
    gram = torch.zeros(s, s, dtype=torch.float64, device=g.device)
    for rows in tall.split(max(1, s // 2)):
        exact = rows.to(torch.float64)
        gram.addmm_(exact.mT, exact)
        del exact  # before the next one is made
    return leading_vectors(gram, rank)


def add_lifted_(u: Tensor, basis: Tensor, low: Tensor, alpha: float = 1.0) -> Tensor:
    """u (..., m, n) += alpha * (low basis^T, or basis low from the left), in place."""
    left, right = (low, basis.mT) if u.shape[-2] >= u.shape[-1] else (basis, low)
    return add_product_(u, left, right, alpha)


def rest_of(g: Tensor, part: Tensor, low: Tensor, kind: str, signed: bool) -> Tensor:
    """(..., m, n) -> (..., m, n): what the part leaves of g; g itself for chosen positions, which `put_` overwrites.

    `signed` says that only the signs will be used. Then the rest comes in units of the rounding noise, truncated, so
    that noise is exactly 0: where a gradient lies inside the basis, the signs of rounding errors would move every
    weight by a full step. The largest error was seen to grow like sqrt(r), to 18 units of eps * max|g| at r = 192; the
    dead zone is 4 sqrt(r) of them.
    """
    if kind not in LOW_RANK:
        return g
    rest = add_lifted_(g.clone(), part, low, alpha=-1)
    return rest.div_(noise_unit(g, part.shape[-1]), rounding_mode="trunc") if signed else rest


def noise_unit(g: Tensor, rank: int) -> Tensor:
    """(..., 1, 1): the rounding noise in what a basis of that rank leaves of g (..., m, n)."""
    return largest(g).mul_(noise_share(g, rank)).clamp_min_(torch.finfo(g.dtype).tiny)


def noise_share(g: Tensor, rank: int) -> float:
    """The same as a multiple of the largest size of a number."""
    return 4 * rank**0.5 * torch.finfo(g.dtype).eps


def whose_turn(sizes: Mapping[str, int], density: float, period: int, seed: int) -> set[str]:
    """The names active in this period: a walk round a seeded permutation, so many bytes of tensors at a time.

    Lay the tensors end to end in a ring; a period covers `density` of its length and owns the tensors that start there.
    So each tensor has one turn in 1 / density periods, and the largest period holds at most density * total + the
    largest tensor. The order is drawn anew whenever a period ends where the ring began.
    """
    part = Fraction(density).limit_denominator(1_000_000)
    total, (lap, turn) = sum(sizes.values()), divmod(period, part.denominator)
    active: set[str] = set()
    start, begin = 0, turn * part * total
    for name in sorted(sizes, key=functools.partial(fold, seed, lap)):
        if (start - begin) % total < part * total:
            active.add(name)
        start += sizes[name]
    return active
