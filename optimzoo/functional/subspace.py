"""Leading subspaces of a matrix: found once, then followed by power iteration."""

import torch
from torch import Tensor

from optimzoo.functional.norms import norm
from optimzoo.functional.random import generator

EXACT_SIDE = 1024
"""Up to this smaller side a decomposition costs no more than a few steps; above, a sketch finds the subspace."""

SHIFT = 1e-6
"""What is added to H in float32, as a share of its size: ten times the rounding in products with it."""

NOTHING = 1e-36
"""A shift where H is zero, as it is of gradients whose squares are zero in float32."""

PASSES = 8
"""Passes of a sketch of three times the rank: 0.999 of the energy even of a Gaussian matrix."""


def orthonormal(x: Tensor) -> Tensor:
    """(n, r) -> (n, r): an orthonormal basis of the columns' span; x may be rank-deficient."""
    return torch.linalg.qr(x).Q


def random_basis_(basis: Tensor, seed: int) -> None:
    """Fill (n, r) with orthonormal columns that depend on the seed alone, drawn on the host for all devices alike."""
    basis.copy_(orthonormal(torch.randn(basis.shape, generator=generator(seed), dtype=torch.float64)))


def leading_basis(g: Tensor, rank: int, seed: int) -> Tensor:
    """(m, n) -> (n, rank): orthonormal, the leading right singular vectors of g in descending order.

    From the eigenvectors of the smaller Gram matrix up to `EXACT_SIDE`. Above, block power iteration from a seeded
    Gaussian (Halko, Martinsson and Tropp 2011, arXiv:0909.4061), which needs products with g only.
    """
    m, n = g.shape
    if min(m, n) <= EXACT_SIDE:
        if n <= m:
            return _leading_vectors(g.mT @ g, rank)
        return orthonormal(g.mT @ _leading_vectors(g @ g.mT, rank))
    sketch = torch.randn(n, min(3 * rank, m, n), generator=generator(seed)).to(g)
    for _ in range(PASSES):
        sketch = orthonormal(g.mT @ (g @ sketch))
    image = g @ sketch
    return sketch @ _leading_vectors(image.mT @ image, rank)


def _leading_vectors(gram: Tensor, rank: int) -> Tensor:
    # A CPU is a tenth faster with the upper triangle.
    return torch.linalg.eigh(gram, UPLO="U").eigenvectors[:, -rank:].flip(1)


def follow(g: Tensor, basis: Tensor, gram: Tensor, decay: float) -> Tensor:
    """One power iteration on H = decay * U S U^T + (1 - decay) g^T g, of which only U and S are kept.

    g (m, n), basis U (n, r) and gram S (r, r), both changed in place; returns g U for the new U, (m, r).

        U <- QR(H U)        S <- U^T H U, symmetrised

    In float32 the first line is of H + shift I, which has H's eigenvectors and no null space: there U stays as it is,
    and columns are independent, so that their Gram matrix can be decomposed.
    """
    seen, narrow = g @ basis, g.dtype != torch.float64
    kept = gram * decay
    if narrow:
        size = kept.diagonal().sum() + norm(seen).square_().mul_(1 - decay)  # the trace of U^T H U
        kept.diagonal().add_(size.mul_(SHIFT).clamp_min_(NOTHING).view(1))
    across = (kept @ basis.mT).addmm_(seen.mT, g, alpha=1 - decay)  # (H U)^T, whose rows are fast to write
    turned = _orthonormal_by_gram(across.mT) if narrow else orthonormal(across.mT)
    turn = basis.mT @ turned
    basis.copy_(turned)
    image = g @ basis
    projected = (turn.mT @ gram @ turn).mul_(decay).addmm_(image.mT, image, alpha=1 - decay)
    gram.copy_(projected).add_(projected.mT).mul_(0.5)
    return image


def _orthonormal_by_gram(x: Tensor) -> Tensor:
    """(n, r), of independent columns -> (n, r): Q of x = Q R, by Cholesky's decomposition of x^T x in float64.

    Half the time of reflections on a CPU, and products but for (r, r). Columns are scaled to length 1 before: those of
    H U are nearly orthogonal, so what is decomposed is near I.
    """
    y = x.double()
    gram = y.mT @ y
    lengths = gram.diagonal().rsqrt()
    factor, _ = torch.linalg.cholesky_ex(gram.mul_(lengths).mul_(lengths[:, None]))
    return (y @ torch.linalg.solve_triangular(factor, lengths.diag(), upper=False).mT).to(x.dtype)
