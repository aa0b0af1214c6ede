"""The orthogonal polar factor of a matrix: U Vᵀ of x = U S Vᵀ, by polynomial iterations that need only products."""

import math

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
    bfloat16 the last two steps do so: after three plain ones no error was seen to grow by a twentieth, while after two
    some double. Workspace beside x, the result included: (m, n) and (s, s), or on the Gram matrix three (s, s), of
    narrow numbers two.

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
    gram, product = _gram(x, room), None
    for step in range(1, steps + 1):
        product = _step_on_gram_(gram, product, last=step == steps)
    assert product is not None
    if steps > 1:
        product = product.clone()  # out of the room that the result takes
    # Transposed, as a tall matrix is to end in the bits of one that lies on its side.
    return _multiply(*((x, product.mT) if x.shape[-2] > x.shape[-1] else (product, x)), out=room)


def _step_on_gram_(gram: Tensor, product: Tensor | None, last: bool) -> Tensor:
    """`product` times p = a + b k + c k², where k is the Gram matrix, which becomes p k p, or room after the last."""
    spare = gram if last else gram.clone()
    poly = _polynomial(spare, QUINTIC)
    if not last:
        _multiply(_multiply(poly, gram, out=spare), poly, out=gram)
    return poly if product is None else _multiply(product, poly, out=spare)


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

    Between x and one other tensor of its size, in which k stands until it is needed no more: 3 m n for a square matrix.
    Returns both.
    """
    x = x.contiguous()
    room, poly = torch.empty_like(x), None
    for coefficients in steps:
        poly = _polynomial(_gram(x, room), coefficients, poly)
        _multiply(*((x, poly) if x.shape[-2] > x.shape[-1] else (poly, x)), out=room)
        x, room = room, x
    return x, room


def _gram(x: Tensor, room: Tensor) -> Tensor:
    """x xᵀ, or xᵀ x of a tall one, in the room of a tensor of x's size."""
    shape = (*x.shape[:-2], *[min(x.shape[-2:])] * 2)
    pair = (x.mT, x) if x.shape[-2] > x.shape[-1] else (x, x.mT)
    return _multiply(*pair, out=room.view(-1)[: math.prod(shape)].view(shape))


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out) if a.ndim == 2 else torch.bmm(a, b, out=out)


def _polynomial(gram: Tensor, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
    """(..., s, s), used up -> a + b k + c k² = c (k + b / 2c)² + a - b² / 4c, a product that nothing is added to.

    In bfloat16 the sums on the diagonal round no worse than x itself does.
    """
    a, b, c = coefficients
    gram.diagonal(dim1=-2, dim2=-1).add_(b / (2 * c))
    out = torch.empty_like(gram) if out is None else out
    square = torch.addmm if gram.ndim == 2 else torch.baddbmm
    square(out, gram, gram, beta=0, alpha=c, out=out)
    out.diagonal(dim1=-2, dim2=-1).add_(a - b * b / (4 * c))
    return out
