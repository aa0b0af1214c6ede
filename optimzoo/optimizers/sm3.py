"""SM3: second moments as minima of maxima over the slices of a tensor.

Anil, Gupta, Koren, Singer, "Memory-Efficient Adaptive Optimization", 2019, arXiv:1901.11150; the variant SM3-II.

    nu_ij <- min(row_i, col_j) + g_ij^2
    row_i <- max_j nu_ij          col_j <- max_i nu_ij
    u_ij   = g_ij / sqrt(nu_ij)                                    averaged with momentum
"""

import math
from typing import Any

from torch import Tensor

from optimzoo.core import Lists, Slot, Tensors, ZooOptimizer, hyper
from optimzoo.core.hyper import SMALLEST
from optimzoo.functional import cover_kernel, host_kernel
from optimzoo.functional.cover import sm3_shapes, sm3_step_, sm3_update
from optimzoo.functional.slices import on_host


class SM3(ZooOptimizer):
    """4 (m + n) bytes of state for a matrix, one number per slice for a tensor of any rank; vectors are AdaGrad's.

    Embeddings and heads are matrices here like all others: an AdamW in their place would cost what SM3 saves. Nothing
    decays in the accumulators, so the step shrinks like AdaGrad's and the authors use warm-up but no decay of lr.
    Accumulators are never coarser than float32, whatever `state_dtype` says: in bfloat16 they would stop growing. On a
    CPU the root of an `eps` up to the default is added to the root: gradients below 1e-11 take a step that is shorter.
    """

    lr: float = hyper(1e-2, ge=0, doc="step size; the first step moves every entry by it")
    momentum: float = hyper(0.0, ge=0, lt=1, doc="average the update; costs one tensor of the weight's shape")
    eps: float = hyper(1e-30, ge=SMALLEST, doc="added under the root; anything larger is a floor on the divisor")

    paper = "Anil et al. 2019, arXiv:1901.11150"
    workspace = 2.0

    @staticmethod
    def slots(shape: tuple[int, ...], h: Any) -> dict[str, Slot]:
        slices = Slot((sum(map(math.prod, sm3_shapes(shape))),), "accumulator")
        return {"slices": slices} | ({"momentum": Slot(shape, "first moment")} if h.momentum else {})

    @staticmethod
    def direction(g: Tensor, w: Tensor, h: Any, *, slices: Tensor, momentum: Tensor | None = None) -> Tensor:
        nu = sm3_update(g, _accumulators(slices, g.shape[slices.ndim - 1 :]))
        u = nu.add_(h.eps).rsqrt_().mul_(g)
        return u if momentum is None else u.copy_(momentum.lerp_(u, 1 - h.momentum))

    @staticmethod
    def fits_host_update(shape: tuple[int, ...], h: Any) -> bool:
        return len(shape) == 2 and min(shape) >= host_kernel.NARROW

    @staticmethod
    def host_update(ws: Tensors, gs: Tensors, h: Any, lr: float, *, slots: Lists, steps: list[float]) -> list[bool]:
        every = zip(ws, gs, slots["slices"], strict=True)
        return [host_kernel.sm3_step_(w, g, h, lr, _accumulators(slices, g.shape)) for w, g, slices in every]

    @staticmethod
    def in_place(h: Any, w: Tensor, g: Tensor) -> bool:
        if on_host(w):
            return not h.momentum and h.eps <= 1e-30  # the kernel's eps stands outside of the root
        return not h.momentum and cover_kernel.takes(w, g)

    own_kernel = staticmethod(cover_kernel.takes)

    @staticmethod
    def update(ws: Tensors, gs: Tensors, h: Any, lr: float | Tensor, found_inf: Tensor | None, *, slots: Lists) -> None:
        if not on_host(ws[0]):
            cover_kernel.step_(ws, gs, h, lr, found_inf, slots["slices"])
            return
        for w, g, slices in zip(ws, gs, slots["slices"], strict=True):
            sm3_step_(w, g, _accumulators(slices, g.shape), float(lr), h.weight_decay, h.eps, h.maximize)


def _accumulators(slices: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """The views of the one slot that cover a tensor of that shape: of a matrix, its rows and its columns."""
    shapes = sm3_shapes(shape)
    parts = slices.split([math.prod(size) for size in shapes], -1)
    return [part.view(slices.shape[:-1] + size) for part, size in zip(parts, shapes, strict=True)]
