"""Chosen entries of a matrix: their gradients, and the largest entries of a gradient or of an outer product.

Entries are flat row-major positions, sorted ascending. Everything walks the matrix in blocks of rows, so that no
temporary is ever as large as the matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimzoo.functional.random import generator
from optimzoo.functional.slices import has_values

BLOCK = 1 << 20  # elements of one block of rows: 4 MiB of float32
TOKENS = 64  # rows of half-precision activations that are widened at a time on a CPU


class Support(NamedTuple):
    """k sorted flat positions, and where each block of rows begins among them (blocks + 1 numbers on the host)."""

    indices: Tensor
    edges: list[int]


def block_rows(n: int) -> int:
    """Rows of one block of a matrix with n columns."""
    return max(1, BLOCK // max(n, 1))


def index_dtype(m: int, n: int) -> torch.dtype:
    """The narrowest integer that holds every flat position of an m x n matrix and one more as a sentinel."""
    return torch.int32 if m * n < torch.iinfo(torch.int32).max else torch.int64


def support(indices: Tensor, m: int, n: int) -> Support:
    """(k,) sorted positions -> Support; one read on the host, so once per re-selection and never in a step.

    Fake tensors have nothing to read: their edges are spaced evenly.
    """
    rows, k = block_rows(n), indices.numel()
    blocks = -(-m // rows)
    if not has_values(indices):
        return Support(indices, [k * block // max(blocks, 1) for block in range(blocks + 1)])
    starts = torch.arange(blocks + 1, device=indices.device).mul_(rows * n).clamp_(max=m * n)
    return Support(indices, torch.searchsorted(indices, starts.to(indices.dtype)).tolist())


def entry_gradients(grad: Tensor, x: Tensor, supports: Sequence[Support]) -> list[Tensor]:
    """grad (N, m), x (N, n) -> for each support the entries (k,) of gradᵀ x, at least float32, by blocks of rows."""
    found = [_empty_entries(grad, chosen.indices) for chosen in supports]
    for block, start, product in _row_products(grad, x):
        for chosen, out in zip(supports, found, strict=True):
            _gather(product, start, chosen, block, out)
    return found


def entry_gradients_and_candidates(
    grad: Tensor, x: Tensor, chosen: Support, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (N, m), x (N, n) -> entries (k,) of gradᵀ x, positions and values (count,) of its largest entries, sorted.

    Largest by magnitude, found in the same pass: a running choice is merged with each block.
    """
    m, n = grad.shape[1], x.shape[1]
    out = _empty_entries(grad, chosen.indices)
    best, value = chosen.indices.new_empty(0), out.new_empty(0)
    for block, start, product in _row_products(grad, x):
        _gather(product, start, chosen, block, out)
        best, value = _keep_largest(best, value, product, start, min(count, m * n), Tensor.abs)
    best, order = best.sort()
    return out, best, value[order]


def outer_largest(row: Tensor, col: Tensor, count: int, active: Support) -> Tensor:
    """row (m,), col (n,), both >= 0 -> (count,): positions of the largest row_i * col_j outside `active`, sorted.

    Never holds the outer product. `count` must not exceed the number of positions outside `active`.
    """
    n = col.numel()
    rows = block_rows(n)
    row, col = row.sqrt(), col.sqrt()  # the same order, and products of squared squares stay inside float32
    best, value = active.indices.new_empty(0), row.new_empty(0)
    for block, first in enumerate(range(0, row.numel(), rows)):
        score = torch.outer(row[first : first + rows], col).view(-1)
        inside = active.indices[active.edges[block] : active.edges[block + 1]].long() - first * n
        score.index_fill_(0, inside, -1.0)  # products are not negative: an active entry loses against every other
        best, value = _keep_largest(best, value, score, first * n, count, _itself)
    return best.sort().values


def exchange(indices: Tensor, drop: Tensor, grow: Tensor) -> tuple[Tensor, Tensor]:
    """indices (k,) sorted, drop (d,) places among them, grow (d,) positions -> new indices (k,) sorted, source (k,).

    `source` is the old place of each entry, -1 for a new one. A position that is both dropped and grown stays. `grow`
    holds no position twice and none that is kept anyway.
    """
    k, never = indices.numel(), torch.iinfo(indices.dtype).max
    grow = grow.sort().values
    dropped = torch.zeros(k, dtype=torch.bool, device=indices.device).index_fill_(0, drop, True)
    stays = ~dropped | _member(indices, grow)
    key = torch.cat([indices.masked_fill(~stays, never), grow.masked_fill(_member(grow, indices), never)])
    order = key.argsort()[:k]  # exactly k positions are not `never`, and those come first
    return key[order], torch.where(order < k, order, -1)


def without(score: Tensor, positions: Tensor, indices: Tensor, drop: Tensor) -> Tensor:
    """score (c,) of positions (c,) -> (c,): -1 where a position is among `indices` (k,), sorted, and not dropped."""
    kept = torch.ones(indices.numel(), dtype=torch.bool, device=indices.device).index_fill_(0, drop, False)
    place = torch.searchsorted(indices, positions).clamp_(max=indices.numel() - 1)
    return score.masked_fill((indices[place] == positions) & kept[place], -1.0)


def _member(of: Tensor, among: Tensor) -> Tensor:
    """(a,), (b,) sorted -> (a,) bool: which of the first occur in the second."""
    if not among.numel():
        return torch.zeros_like(of, dtype=torch.bool)
    return among[torch.searchsorted(among, of).clamp_(max=among.numel() - 1)] == of


def random_entries(count: int, total: int, seed: int) -> Tensor:
    """(count,) int64: sorted distinct numbers below `total`, every set equally likely; holds O(count) at a time."""
    if count > total // 2:  # draw what is left out instead: few collisions, and the mask is no larger than the answer
        mask = torch.ones(total, dtype=torch.bool)
        mask[random_entries(total - count, total, seed)] = False
        return mask.nonzero().view(-1)
    source = generator(seed)
    chosen = torch.empty(0, dtype=torch.int64)
    while chosen.numel() < count:
        missing = count - chosen.numel()
        drawn = torch.randint(total, (missing + missing // 8 + 8,), generator=source)
        chosen = torch.cat([chosen, drawn]).unique()
    left_out = torch.randperm(chosen.numel(), generator=source)[: chosen.numel() - count]
    keep = torch.ones(chosen.numel(), dtype=torch.bool)
    keep[left_out] = False
    return chosen[keep]


def _row_products(grad: Tensor, x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(block, first flat position, rows of gradᵀ x as a line); the line's memory is used again for the next block."""
    n = x.shape[1]
    rows = block_rows(n)
    wide = torch.promote_types(x.dtype, torch.float32)
    buffer = torch.empty(min(rows, grad.shape[1]), n, dtype=wide, device=x.device)
    for block, first in enumerate(range(0, grad.shape[1], rows)):
        part = grad[:, first : first + rows].T
        product = buffer[: part.shape[0]]
        if x.dtype == wide:
            torch.mm(part, x, out=product)
        else:
            _widened_product(part, x, product)
        yield block, first * n, product.view(-1)


def _widened_product(part: Tensor, x: Tensor, out: Tensor) -> None:
    """part (b, N) times x (N, n) in half precision, kept in float32: bf16 entries would lose the small ones."""
    if x.is_cuda:
        torch.mm(part, x, out_dtype=torch.float32, out=out)
        return
    out.zero_()
    for start in range(0, x.shape[0], TOKENS):
        out.addmm_(part[:, start : start + TOKENS].to(out.dtype), x[start : start + TOKENS].to(out.dtype))


def _empty_entries(grad: Tensor, indices: Tensor) -> Tensor:
    return torch.empty(indices.shape, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)


def _gather(product: Tensor, start: int, chosen: Support, block: int, out: Tensor) -> None:
    """Copy the chosen entries of one block of rows."""
    begin, end = chosen.edges[block], chosen.edges[block + 1]
    if begin < end:
        torch.index_select(product, 0, chosen.indices[begin:end].long() - start, out=out[begin:end])


def _itself(score: Tensor) -> Tensor:
    return score


def _keep_largest(
    best: Tensor, value: Tensor, block: Tensor, start: int, count: int, key: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Merge the running choice (positions and values) with a block of values at positions start, start + 1, ..."""
    kept = best.numel()
    both = torch.cat([value, block])
    place = key(both).topk(min(count, both.numel()), sorted=False).indices
    fresh = (place + (start - kept)).to(best.dtype)
    if kept:
        fresh = torch.where(place < kept, best[place.clamp(max=kept - 1)], fresh)
    return fresh, both[place]
