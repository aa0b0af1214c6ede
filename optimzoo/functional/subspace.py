"""Leading subspaces of a matrix: found once, then followed by power iteration."""

import torch
from torch import Tensor

from optimzoo.functional.norms import add_product_, norm
from optimzoo.functional.random import generator
from optimzoo.functional.slices import on_host

EXACT_SIDE = 1024
"""Up to this smaller side a decomposition costs no more than a few steps; above, a sketch finds the subspace."""

PASSES = 8
"""Passes of a sketch of three times the rank: 0.999 of the energy even of a Gaussian matrix."""


def orthonormal(x: Tensor) -> Tensor:
    """(n, r) -> (n, r): an orthonormal basis of the columns' span; x may be rank-deficient."""
    return torch.linalg.qr(x).Q


def near_orthonormal(x: Tensor, basis: Tensor) -> Tensor:
    """(..., n, r) -> (..., n, r): `orthonormal`, where x is H U for a positive H and an orthonormal U, the `basis`.

    By the Cholesky factor of x^T x, twice, in float64: products, which a device does for many matrices at once, while
    it takes reflections one after the other. That needs columns that are independent. Those of (H + d) U are, and with
    d of the size of x's rounding errors that is no other H: where H knows nothing, U stays. So does all of it where a
    factor cannot be had. For float64 there is no wider number, and reflections it is.
    """
    if x.dtype == torch.float64:
        return orthonormal(x)
    turned = x.to(torch.float64)
    d = norm(turned).mul_(4 * torch.finfo(x.dtype).eps).clamp_min_(torch.finfo(x.dtype).tiny)
    turned.addcmul_(basis.to(torch.float64), d)
    failed = torch.zeros((), dtype=torch.int32, device=x.device)
    for _ in range(2):
        lower, info = torch.linalg.cholesky_ex(turned.mT @ turned)
        turned = torch.linalg.solve_triangular(lower.mT, turned, upper=True, left=False)
        failed = failed | info
    good = (failed == 0) & turned.isfinite().all(-1).all(-1)
    return torch.where(good[..., None, None], turned.to(x.dtype), basis)


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
            return leading_vectors(g.mT @ g, rank)
        return orthonormal(g.mT @ leading_vectors(g @ g.mT, rank))
    sketch = torch.randn(n, min(3 * rank, m, n), generator=generator(seed)).to(g)
    for _ in range(PASSES):
        sketch = orthonormal(g.mT @ (g @ sketch))
    image = g @ sketch
    return sketch @ leading_vectors(image.mT @ image, rank)


def leading_vectors(gram: Tensor, rank: int) -> Tensor:
    """(n, n), symmetric -> (n, rank): eigenvectors of the largest eigenvalues, those first; a view of all of them."""
    # A CPU is a tenth faster with the upper triangle.
    return torch.linalg.eigh(gram, UPLO="U").eigenvectors[:, -rank:].flip(1)


def follow(g: Tensor, basis: Tensor, gram: Tensor, decay: float) -> Tensor:
    """One power iteration on H = decay * U S U^T + (1 - decay) g^T g, of which only U and S are kept.

    g (..., m, n), basis U (..., n, r) and gram S (..., r, r), both changed in place; returns g U for the new U,
    (..., m, r).

        U <- QR(H U)        S <- U^T H U, symmetrised
    """
    across = (gram @ basis.mT).mul_(decay)  # H U on its side: rows are fast to write
    add_product_(across, (g @ basis).mT, g, alpha=1 - decay)
    turned = orthonormal(across.mT) if on_host(g) else near_orthonormal(across.mT, basis)
    turn = basis.mT @ turned
    basis.copy_(turned)
    image = g @ basis
    projected = add_product_((turn.mT @ gram @ turn).mul_(decay), image.mT, image, alpha=1 - decay)
    gram.copy_(projected).add_(projected.mT).mul_(0.5)
    return image
