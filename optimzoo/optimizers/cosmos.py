"""COSMOS: SOAP in the leading eigenspace of the gradient, Muon in the rest.

Liu, Zhang, Li and others, "COSMOS: A Hybrid Adaptive Optimizer for Memory-Efficient Training of LLMs", 2025,
arXiv:2502.17410, with the momentum of the authors' later code.

    M <- b1 M + G                                                  all gradients so far, (m, n)
    U, S follow the top-r eigenspace of the average of G^T G       (n, r), (r, r)
    V <- b2 V + (1 - b2) (G U)^2                                   (m, r)
    D  = (G + b1 M) / (sum of its weights)                         M / (sum of its weights) without nesterov
    A  = [D U / (sqrt(V / (1 - b2^t)) + eps)] U^T
    B  = polar factor of D - D U U^T, scaled to RMS 1
    u  = (A + gamma B), scaled to RMS lr_ratio
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optimzoo.core import MatrixOptimizer, Slot, hyper
from optimzoo.core.hyper import SMALLEST
from optimzoo.core.storage import product_dtype
from optimzoo.functional.moments import factor
from optimzoo.functional.norms import add_product_, norm, scale_to_rms_, to_rms
from optimzoo.functional.polar import quintic_
from optimzoo.functional.subspace import Rotation, follow, leading_basis, random_basis_

DEAD_ZONE = 8  # outside of the basis, less than this many sqrt(r) eps of D is rounding, which Muon would blow up
NULL_ENERGY = 1e-10  # float32's noise squared: a column of U with less of the largest energy holds only rounding
NORM_EPS = 1e-7  # Muon's, beside the norm of what is orthogonalised


class COSMOS(MatrixOptimizer):
    """Muon's state plus thin factors: 4 (mn + r (m + n) + r^2) bytes for a matrix in float32.

    The RMS of a matrix step is lr * lr_ratio, to 1e-4, whatever the gradient's size, so a parameter whose gradient is
    exactly zero is left alone altogether (momentum would go on moving it at full speed). `rank` is cut to the matrix's
    smaller side. Weight decay is multiplied by lr, not by lr * lr_ratio.
    """

    lr: float = hyper(2e-3, ge=0, doc="step size; a matrix moves by lr * lr_ratio (RMS), the rest like AdamW at lr")
    weight_decay: float = hyper(0.1, ge=0, doc="decoupled decay, multiplied by lr")
    betas: tuple[float, float] = hyper((0.95, 0.95), ge=0, lt=1, doc="decay of the momentum and of U, S, V")
    eps: float = hyper(1e-8, ge=SMALLEST, doc="added to the root of V and to the norms")
    rank: int = hyper(64, ge=1, doc="columns of the basis U")
    gamma: float = hyper(0.2, ge=0, doc="weight of the Muon part beside the SOAP part")
    lr_ratio: float = hyper(0.2, ge=0, doc="RMS of a matrix step as a multiple of lr")
    nesterov: bool = hyper(True, doc="look ahead by the current gradient")

    paper = "Liu et al. 2025, arXiv:2502.17410"
    workspace = 4.0
    skips_zero = True

    @staticmethod
    def slots(shape: tuple[int, ...], h: Any) -> dict[str, Slot]:
        m, n = shape
        r = min(h.rank, m, n)
        return {
            "momentum": Slot((m, n), "first moment"),
            "basis": Slot((n, r), "basis", fill=random_basis_),
            "gram": Slot((r, r), "gram"),
            "exp_avg_sq": Slot((m, r), "second moment"),
            "step": Slot((), "counter", torch.float32),
        }

    @staticmethod
    def due(count: int, h: Any) -> bool:
        return count == 0

    @staticmethod
    def refresh(g: Tensor, w: Tensor, h: Any, *, basis: Tensor, seed: int) -> None:
        basis.copy_(leading_basis(g, basis.shape[1], seed))

    @staticmethod
    def prepare(
        g: Tensor,
        w: Tensor,
        h: Any,
        *,
        momentum: Tensor,
        basis: Tensor,
        gram: Tensor,
        exp_avg_sq: Tensor,
        step: float | Tensor,
    ) -> tuple[Tensor, ...]:
        weight = (1 - h.betas[0] ** step) / (1 - h.betas[0])
        if h.nesterov:
            weight = 1 + h.betas[0] * weight
        low, rotation = follow(g, basis, gram, h.betas[1])
        exp_avg_sq.mul_(h.betas[1]).addcmul_(low, low, value=1 - h.betas[1])
        torch.add(g, momentum, alpha=h.betas[0], out=momentum)
        x = _rest(g, momentum, basis, low, rotation, weight, h)
        weight, unbiased = factor(weight, g), factor(weight / (1 - h.betas[1] ** step) ** 0.5, g)
        spread = exp_avg_sq.sqrt().mul_(unbiased).add_(weight * h.eps)
        adam = low.div_(spread)
        energy = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        adam.mul_(energy > NULL_ENERGY * energy.amax(-1, keepdim=True))
        return x, adam, *(rotation or (basis,))

    @staticmethod
    def products(h: Any) -> Callable[[Tensor], Tensor]:
        return quintic_

    @staticmethod
    def conclude(u: Tensor, h: Any, adam: Tensor, *kept: Tensor) -> Tensor:
        if len(kept) == 2:  # a rotation in place of the basis
            return _rotated(u, h, adam, Rotation(*kept))
        (basis,) = kept
        u = u.to(adam.dtype, memory_format=torch.contiguous_format)
        add_product_(scale_to_rms_(u, h.gamma, h.eps), adam, basis.mT)
        return scale_to_rms_(u, h.lr_ratio, h.eps)


def _rest(
    g: Tensor,
    momentum: Tensor,
    basis: Tensor,
    low: Tensor,
    rotation: Rotation | None,
    weight: float | Tensor,
    h: Any,
) -> Tensor:
    """The momentum outside of the basis at norm 1, in the products' dtype; in `low` its image d U, times `weight`."""
    d = torch.add(g, momentum, alpha=h.betas[0]) if h.nesterov else momentum.clone()
    if rotation is None:
        torch.matmul(d, basis, out=low)
        add_product_(d, low, basis.mT, alpha=-1)
    else:
        r = low.shape[-1]
        low.copy_(rotation.turn_(d)[:, :r])
        d = d[:, r:]
    size, noise = norm(d), DEAD_ZONE * math.sqrt(basis.shape[1]) * torch.finfo(d.dtype).eps
    alive = size > noise * torch.hypot(size, norm(low))  # of all that was there, by Pythagoras
    d = d.mul_(torch.where(alive, 1 / (size + NORM_EPS * weight), 0).to(d.dtype))
    return d.to(product_dtype(g)).contiguous()  # without the columns in the basis


def _rotated(u: Tensor, h: Any, adam: Tensor, rotation: Rotation) -> Tensor:
    """`conclude` of a polar factor that has only the columns outside of the basis: they, and the ones in it, turned."""
    (m, r), n = adam.shape, len(rotation.v)
    both = adam.new_empty(m, n)
    inside, outside = both[:, :r], both[:, r:].copy_(u)
    size = norm(outside)
    muon = to_rms(size, m * n, h.gamma, h.eps)
    whole = to_rms(torch.hypot(norm(adam), size * muon), m * n, h.lr_ratio, h.eps)  # by Pythagoras
    scale = (muon * whole).clamp_max_(torch.finfo(muon.dtype).max)  # zeros stay zeros
    outside.mul_(scale)
    torch.mul(adam, whole, out=inside)
    # Of u, which is rounded already, in its own dtype.
    thin = (u @ rotation.v[r:].to(u.dtype)).to(adam.dtype).mul_(scale).addmm_(inside, rotation.v[:r])
    return rotation.back_(both, thin)
