"""Second moments as minima of maxima: one accumulator for each slice of a tensor along each of its axes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sm3_cover(row: Tensor, col: Tensor) -> Tensor:
    """(m, 1), (1, n) -> (m, n): the smaller of the two accumulators that cover an entry, as a fresh tensor."""
    return torch.minimum(row, col)


def sm3_shapes(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The accumulators' shapes: one an axis, shaped to broadcast; a vector or a scalar keeps one of its own shape."""
    if len(shape) < 2:
        return [tuple(shape)]
    return [tuple(size if axis == kept else 1 for axis, size in enumerate(shape)) for kept in range(len(shape))]


def sm3_update(g: Tensor, accumulators: Sequence[Tensor]) -> Tensor:
    """(d_0, ..., d_k), accumulators as `sm3_shapes` -> (d_0, ..., d_k): SM3-II; changes the accumulators in place.

        nu_i  <- min over the slices r that hold i of mu_r + g_i^2        mu_r <- max over i in r of nu_i

    The result bounds the sum of all squared gradients of an entry from above, and no accumulator ever falls. A vector
    is its own cover, which is diagonal AdaGrad. Anil, Gupta, Koren, Singer 2019, arXiv:1901.11150.
    """
    if len(accumulators) == 1:
        return accumulators[0].addcmul_(g, g).clone()
    nu = sm3_cover(accumulators[0], accumulators[1])
    for accumulator in accumulators[2:]:
        nu = torch.minimum(nu, accumulator)
    nu = nu.expand(g.shape).addcmul(g, g) if nu.shape != g.shape else nu.addcmul_(g, g)
    for kept, accumulator in enumerate(accumulators):
        others = [axis for axis in range(g.ndim) if axis != kept]
        if g.numel():  # a maximum over nothing is an error, and there is nothing to remember
            accumulator.copy_(nu.amax(others, keepdim=True))
    return nu


def sm3_sparse_update(g: Tensor, indices: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """g, indices (k,), row (m,), col (n,) -> (k,): SM3-II of entries at flat positions; changes `row`, `col` in place.

        nu_j <- min(row[r_j], col[c_j]) + g_j^2        row[r_j], col[c_j] <- max(themselves, nu_j)

    Rows and columns without an entry keep what they hold.
    """
    place = indices.long()
    r, c = place // col.numel(), place % col.numel()
    nu = torch.minimum(row[r], col[c]).addcmul_(g, g)
    row.scatter_reduce_(0, r, nu, "amax")
    col.scatter_reduce_(0, c, nu, "amax")
    return nu
