"""Leading subspaces of a matrix: found once, then followed by power iteration."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from optimzoo.functional.norms import add_product_, norm
from optimzoo.functional.random import generator
from optimzoo.functional.slices import on_host

EXACT_SHARE = 4
"""Up to a smaller side of so many times the rank all eigenvectors cost less than the leading ones alone."""

GRAM_SIDE = 1024
"""Up to this smaller side a Gram matrix is made once; above, and without its memory, each product is two with g."""

TURNED_SHARE = 4
"""Up to a rank of one in so many columns a matrix is turned; above a third what is r wide would take the workspace."""

POWERS, FILTERS = 2, 4
"""Passes that find the subspace: of what 64 vectors can hold of a Gaussian matrix, the hardest, 0.9998 at 1376 x 512
and 0.998 at 2048 x 2048."""


def orthonormal(x: Tensor) -> Tensor:
    """(n, r) -> (n, r): an orthonormal basis of the columns' span; x may be rank-deficient."""
    return torch.linalg.qr(x).Q


class Rotation(NamedTuple):
    """Q = I - v t v^T, (n, n) and orthogonal: v (n, r), t (r, r). Its first r columns are a basis.

    What a basis leaves of a matrix (m, n) has rank n - r at most, and so many columns after this, which makes products
    of it cheaper. Reflections in compact form: Schreiber and Van Loan, "A storage-efficient WY representation for
    products of Householder transformations", 1989.
    """

    v: Tensor
    t: Tensor

    @classmethod
    def onto(cls, x: Tensor) -> "Rotation":
        """(n, r) -> the one whose basis is that of the columns' span; x may be rank-deficient."""
        packed, tau = torch.geqrf(x)
        v = packed.tril_(-1)
        v.diagonal().fill_(1)
        inverse = (v.mT @ v).triu_()  # of t (Puglisi, 1992)
        inverse.diagonal().copy_(tau.reciprocal_())  # infinity for a reflection that does nothing
        one = torch.eye(len(inverse), dtype=inverse.dtype, device=inverse.device)
        return cls(v, torch.linalg.solve_triangular(inverse, one, upper=True))

    def basis(self) -> Tensor:
        """(n, r)."""
        first = (self.v @ (self.t @ self.v[: len(self.t)].mT)).neg_()
        first.diagonal().add_(1)
        return first

    def turn_(self, x: Tensor) -> Tensor:
        """x Q (m, n), in place: its columns in the basis, then those outside."""
        return x.addmm_(x @ self.v @ self.t, self.v.mT, alpha=-1)

    def back_(self, x: Tensor, thin: Tensor) -> Tensor:
        """x Q^T (m, n), in place; `thin` is x v, (m, r)."""
        return x.addmm_(thin @ self.t.mT, self.v.mT, alpha=-1)


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


def _fast_orthonormal(x: Tensor, basis: Tensor) -> Tensor:
    """One of the two, by what is fast where x is."""
    return orthonormal(x) if on_host(x) else near_orthonormal(x, basis)


def random_basis_(basis: Tensor, seed: int) -> None:
    """Fill (n, r) with orthonormal columns that depend on the seed alone, drawn on the host for all devices alike."""
    basis.copy_(orthonormal(torch.randn(basis.shape, generator=generator(seed), dtype=torch.float64)))


def leading_basis(g: Tensor, rank: int, seed: int) -> Tensor:
    """(m, n) -> (n, rank): orthonormal, the leading right singular vectors of g in descending order.

    Eigenvectors of the Gram matrix of the shorter side, turned to the other where n is longer.
    """
    tall = g if g.shape[0] >= g.shape[1] else g.mT
    side = tall.shape[1]
    if side <= EXACT_SHARE * rank:
        vectors = leading_vectors(tall.mT @ tall, rank)
    else:
        columns = min(side, rank + max(rank // 2, 32))
        start = torch.randn(side, columns, generator=generator(seed)).div_(side**0.5).to(g)
        vectors = _filtered(_by_gram(tall), start, rank)
    return vectors if tall is g else orthonormal(tall @ vectors)


def _by_gram(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What multiplies by x^T x."""
    if x.shape[1] > GRAM_SIDE:
        return lambda other: x.mT @ (x @ other)
    return partial(torch.matmul, x.mT @ x)


def _filtered(product: Callable[[Tensor], Tensor], x: Tensor, rank: int) -> Tensor:
    """(n, k) -> (n, rank): the leading eigenvectors, those first, of a positive H that `product` multiplies by.

    Power iteration on more columns than are asked for (Halko, Martinsson and Tropp 2011, arXiv:0909.4061), then by the
    Chebyshev polynomial 2 y^2 - 1 of y = 2 H / edge - 1: at most 1 up to `edge`, what H does to the least of the
    columns, and above it grows as fast as a polynomial of its degree can (Saad, "Chebyshev acceleration techniques",
    1984). Higher degrees grow so fast that rounding of the largest eigenvectors hides the smallest. On a device columns
    that a filter has made dependent, which none was seen to do, would leave the basis of the pass before.
    """
    for _ in range(POWERS):
        image = product(x)
        energy = (x * image).sum(0)
        x = _fast_orthonormal(image, x)
    info = torch.finfo(x.dtype)
    top = energy.max().clamp_min(info.tiny)
    half = (energy.min() / top).clamp_min(info.eps) / 2
    for _ in range(FILTERS):
        y = product(x).div_(top).sub_(x * half)  # that y x, times edge / (2 top), so that nothing overflows
        x = _fast_orthonormal(product(y).div_(top).sub_(y * half).sub_(x * (half * half / 2)), x)
    return x @ leading_vectors(x.mT @ product(x), rank)


def leading_vectors(gram: Tensor, rank: int) -> Tensor:
    """(n, n), symmetric -> (n, rank): eigenvectors of the largest eigenvalues, those first; a view of all of them."""
    # A CPU is a tenth faster with the upper triangle.
    return torch.linalg.eigh(gram, UPLO="U").eigenvectors[:, -rank:].flip(1)


def follow(g: Tensor, basis: Tensor, gram: Tensor, decay: float) -> tuple[Tensor, Rotation | None]:
    """One power iteration on H = decay * U S U^T + (1 - decay) g^T g, of which only U and S are kept.

    g (..., m, n), basis U (..., n, r) and gram S (..., r, r), both changed in place; returns g U for the new U,
    (..., m, r), and of one matrix on a CPU, where it is thin and leaves fewer columns than rows, the rotation onto it.

        U <- QR(H U)        S <- U^T H U, symmetrised
    """
    across = gram @ basis.mT  # H U on its side: rows are fast to write
    add_product_(across, (g @ basis).mT, g, alpha=1 - decay, beta=decay)
    (m, n), r = g.shape[-2:], basis.shape[-1]
    one = g.ndim == 2 and on_host(g) and not torch.compiler.is_compiling()  # reflections are in no graph
    rotation = Rotation.onto(across.mT) if one and n - r < m and TURNED_SHARE * r <= n else None
    turned = _fast_orthonormal(across.mT, basis) if rotation is None else rotation.basis()
    del across
    turn = basis.mT @ turned
    basis.copy_(turned)
    del turned
    image = g @ basis
    projected = add_product_(turn.mT @ gram @ turn, image.mT, image, alpha=(1 - decay) / 2, beta=decay / 2)
    torch.add(projected, projected.mT, out=gram)
    return image, rotation
