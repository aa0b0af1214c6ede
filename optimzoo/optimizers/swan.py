"""SWAN: the current gradient with standardised rows, whitened; no state.

Ma, Gong, Scetbon, Meeds, "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training", ICML 2025,
arXiv:2412.13148.

    X = rows of g minus their mean, over their standard deviation
    D = (X X^T)^(-1/2) X                                             U V^T of X = U S V^T
    u = D, scaled to RMS lr_ratio
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optimzoo.core import MatrixOptimizer, Slot, hyper
from optimzoo.core.storage import compute_dtype, product_dtype
from optimzoo.functional import host_kernel
from optimzoo.functional.norms import scale_to_rms_, standardise_rows
from optimzoo.functional.polar import exact_, quintic_

THIN = 8  # below, whitening is hardly more than a rotation, and centring takes a direction away that counts


class SWAN(MatrixOptimizer):
    """Nothing is kept for matrices; AdamW's state for everything else, thin matrices included.

    The RMS of a matrix step is lr * lr_ratio whatever the gradient's size: nothing converges without a falling lr, and
    small batches are noisy. Rows of the gradient without spread (zero or constant) leave their weights alone. With
    `center`, the row sums of a weight never change.
    """

    lr_ratio: float = hyper(1.0, ge=0, doc="RMS of a matrix step as a multiple of lr")
    center: bool = hyper(True, doc="subtract the row means; without, rows are only scaled")
    backend: str = hyper(
        "fast",
        one_of=("fast", "exact"),
        doc="polar factor by 5 steps in bfloat16 where that is fast, or by 12 in float32",
    )

    paper = "Ma et al. 2024, arXiv:2412.13148"
    workspace = 3.5

    @classmethod
    def unfit(cls, shape: tuple[int, ...]) -> str | None:
        return f"a side is shorter than {THIN}" if min(shape) < THIN else None

    @staticmethod
    def slots(shape: tuple[int, ...], h: Any) -> dict[str, Slot]:
        return {}

    @staticmethod
    def prepare(g: Tensor, w: Tensor, h: Any) -> tuple[Tensor]:
        x = standardise_rows(g, h.center, total=1.0)
        return (x if h.backend == "exact" else x.to(product_dtype(g)),)

    @staticmethod
    def products(h: Any) -> Callable[[Tensor], Tensor]:
        return exact_ if h.backend == "exact" else quintic_

    @staticmethod
    def conclude(u: Tensor, h: Any) -> Tensor:
        u = u.to(compute_dtype(u.dtype), memory_format=torch.contiguous_format)
        return scale_to_rms_(u, h.lr_ratio)

    @staticmethod
    def host_conclude(w: Tensor, u: Tensor, h: Any, lr: float) -> None:
        host_kernel.conclude_(w, u, h, lr, h.lr_ratio)
