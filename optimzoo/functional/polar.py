"""The orthogonal polar factor of a matrix: U Vᵀ of x = U S Vᵀ, by polynomial iterations that need only products."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from optimzoo.functional.norms import norm
from optimzoo.functional.slices import on_host

Coefficients = tuple[float, float, float]

QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
"""Steep at zero, and therefore only roughly 1 afterwards: singular values end in about [0.7, 1.2]."""
CUBIC_CONTACT: Coefficients = (15 / 8, -10 / 8, 3 / 8)
"""The quintic whose first two derivatives vanish at 1: finishes what `QUINTIC` has brought near 1."""

ALIGNED = 8
"""Products on a device want rows of a multiple of these elements: 5461 take five times as long as 5504."""

GRAM_FORM = 1.75
"""Longer side over shorter above which `quintic_` works on the Gram matrix, which takes fewer products there."""
BLOCKED, ROWS = 640 * 1024, 256
"""Elements of x from which a CPU makes x x^T by so many rows at a time: 0.8 of the time at 512 x 1376, 0.7 at 1024 x
2752."""
LAST = 2
"""Steps on the Gram matrix in narrow dtypes: the first ones have lifted small singular values out of its rounding."""


def newton_schulz(x: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Return roughly U Vᵀ of x, with singular values near 1 instead of at 1.

    (..., m, n) -> (..., m, n), in `dtype`: by default bfloat16, or float64 for float64 input.

        x <- x / (||x||_F + 1e-7);  `steps` times:  x <- a x + b (x xᵀ) x + c (x xᵀ)² x

    Jordan et al., "Muon", 2024. Workspace, the result included: that of `quintic_` and one (m, n) in `dtype`; `x` is
    not written.
    """
    dtype = dtype or (torch.float64 if x.dtype == torch.float64 else torch.bfloat16)
    return quintic_(_normalised(x, dtype, 1e-7), steps).view(x.shape)


def quintic_(x: Tensor, steps: int = 5) -> Tensor:
    """The iteration of `newton_schulz` alone: (m, n) or (batch, m, n), of norm at most 1 and used up -> the same.

    Far from square steps run on the Gram matrix of the shorter side s, and x takes part in the first and the last
    product of those only. That squares singular values, which float32 bears (5 steps lift rounding to 2e-3 at most). In
    bfloat16 the last two steps do so: after three plain ones the error of a Gaussian matrix grows from 0.011 to 0.016,
    that of decaying spectra by a twentieth. Workspace beside x, the result included: (m, n) and (s, s), or on the Gram
    matrix three (s, s), of narrow numbers two.

    On a device rows of narrow numbers are filled up with zeros, which stay zeros, where their length is an awkward one.
    """
    narrow = x.dtype.itemsize < 4
    if narrow and not on_host(x) and (beyond := x.shape[-1] % ALIGNED):
        return quintic_(torch.nn.functional.pad(x, (0, ALIGNED - beyond)), steps)[..., : x.shape[-1]]
    s, longer = sorted(x.shape[-2:])
    on_gram = 0 if longer <= GRAM_FORM * s else min(steps, LAST) if narrow else steps
    x, room = _iterate_(x, [QUINTIC] * (steps - on_gram))
    return _on_gram_(x, room, on_gram) if on_gram else x


def _on_gram_(x: Tensor, room: Tensor, steps: int) -> Tensor:
    """The last `steps` of `quintic_`, which multiply x by the product of their polynomials."""
    tall, (multiply, _) = x.shape[-2] > x.shape[-1], _products(x)
    gram, product = _corner(room), None
    _square(x.mT if tall else x, gram)
    for step in range(1, steps + 1):
        product = _step_on_gram_(gram, product, last=step == steps)
    assert product is not None
    if steps > 1:
        product = product.clone()  # out of the room that the result takes
    # Rounding has made it unsymmetric: transposed, it does to a tall matrix what it does to one that lies on its side.
    return multiply(*((x, product.mT) if tall else (product, x)), out=room)


def _step_on_gram_(gram: Tensor, product: Tensor | None, last: bool) -> Tensor:
    """p = a + b k + c k² times `product`, where k is the Gram matrix, which becomes p k p, or room after the last."""
    (a, b, c), (multiply, add) = QUINTIC, _products(gram)
    poly = add(gram, gram, gram, beta=b, alpha=c)
    if last and product is not None:
        return add(product, poly, product, beta=a, out=gram)
    poly.diagonal(dim1=-2, dim2=-1).add_(a)
    if not last:
        multiply(multiply(poly, gram), poly, out=gram)
    return poly if product is None else multiply(poly, product)


def polar_exact(x: Tensor) -> Tensor:
    """Return U Vᵀ of x over the singular values above about 1e-5 of the largest one; zeros give zeros.

    (..., m, n) -> (..., m, n), in float32, or float64 for float64 input.

    Eight `QUINTIC` steps lift small singular values, four `CUBIC_CONTACT` steps bring all of them to 1. The counts are
    fixed: two more quintic steps lift the rounding noise of a rank-deficient matrix as well. Coupled inverse-root
    iterations, which work on x xᵀ, lose half the digits and diverge on such matrices.

    No global setting is touched. Where a user allows TF32 on CUDA the products' inputs are rounded to 10 bits; x itself
    stays float32, and with that rounding simulated the cosine with U Vᵀ stays above 0.9999 on the same matrices.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return exact_(_normalised(x, dtype, torch.finfo(dtype).tiny)).view(x.shape)


def exact_(x: Tensor) -> Tensor:
    """The iteration of `polar_exact` alone: (m, n) or (batch, m, n), of norm at most 1 and used up -> the same."""
    return _iterate_(x, [QUINTIC] * 8 + [CUBIC_CONTACT] * 4)[0]


def _normalised(x: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """(..., m, n) -> (m, n) or (batch, m, n): a copy of Frobenius norm 1, contiguous."""
    x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    x.div_(norm(x).add_(eps))
    return x.flatten(0, -3) if x.ndim > 3 else x


def _iterate_(x: Tensor, steps: list[Coefficients]) -> tuple[Tensor, Tensor]:
    """Every step x <- (a + b k + c k²) x with k = x xᵀ; a tall x takes k = xᵀ x from the right, the smaller of the two.

    Between x and one other tensor of its size, in which k stands until it is needed no more, with one of k's for the
    polynomial. Of a square matrix x <- a x + k (b x + c k x) takes no more products, and rounds less. Returns x and the
    other one.
    """
    x = x.contiguous()
    m, n = x.shape[-2:]
    room, spare = torch.empty_like(x), x.new_empty(*x.shape[:-2], min(m, n), min(m, n))
    add = _products(x)[1]
    here, there = _corner(x), _corner(room)  # before the loop, where it would take a tenth as long as a product
    for a, b, c in steps:
        if m == n:
            _square(x, spare)
            add(x, spare, x, beta=b, alpha=c, out=room)
            add(x, spare, room, beta=a, out=x)
        else:
            _square(x.mT if m > n else x, there)
            add(there, there, there, beta=b, alpha=c, out=spare)
            add(x, *((x, spare) if m > n else (spare, x)), beta=a, out=room)
            x, room, here, there = room, x, there, here
    return x, room


def _square(x: Tensor, out: Tensor) -> None:
    """out (s, s) <- x x^T of x (s, l), or of a batch; on a CPU nothing of a large one twice, but for its diagonal."""
    small = x.shape[-2] * x.shape[-1] < BLOCKED
    if small or not on_host(x) or torch.compiler.is_compiling():  # a graph writes to no part of a tensor
        _products(x)[0](x, x.mT, out=out)
        return
    for one, found in ((x, out),) if x.ndim == 2 else zip(x, out, strict=True):
        for start in range(0, len(found), ROWS):
            rows, others = slice(start, start + ROWS), slice(start + ROWS, None)
            torch.mm(one[rows], one[start:].mT, out=found[rows, start:])
            found[others, rows].copy_(found[rows, others].mT)


def _corner(room: Tensor) -> Tensor:
    """Room for the smaller Gram matrix in that of a tensor."""
    s = min(room.shape[-2:])
    shape = (*room.shape[:-2], s, s)
    return room.view(-1)[: math.prod(shape)].view(shape)


def _products(x: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Of matrices, or of batches of them: a b, and beta x + alpha a b."""
    return (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
