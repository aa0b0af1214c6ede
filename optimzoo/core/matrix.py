"""MatrixOptimizer: a rule for matrices, and AdamW for everything else, in one optimizer."""

import warnings
from typing import Any

from torch import Tensor

from optimzoo.core.adamw import AdamW
from optimzoo.core.hyper import SMALLEST, hyper
from optimzoo.core.optimizer import ZooOptimizer
from optimzoo.core.routing import Route, matrix_shape, why_not_matrix


class MatrixOptimizer(ZooOptimizer):
    """Base of optimizers for matrices; AdamW takes everything that is none."""

    fallback_lr_scale: float = hyper(1.0, ge=0, doc="AdamW's lr for everything that is no matrix, as a multiple of lr")
    fallback_betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, doc="AdamW's betas for the same")
    fallback_eps: float = hyper(1e-8, ge=SMALLEST, doc="AdamW's eps for the same")

    @classmethod
    def unfit(cls, shape: tuple[int, ...]) -> str | None:
        """Why a matrix of this shape is better left to AdamW; None when it is not."""
        return None

    def route(self, p: Tensor, name: str, group: dict[str, Any], h: Any) -> Route:
        layout = group.get("layout", "as is")
        reason = why_not_matrix(p, name, group) or self.unfit(matrix_shape(p, layout))
        if reason is None:
            return self.route_matrix(p, name, group, h, layout)
        fallback = AdamW.hypers(group, betas=h.fallback_betas, eps=h.fallback_eps)
        return Route(AdamW, fallback, h.fallback_lr_scale, reason)

    def route_matrix(self, p: Tensor, name: str, group: dict[str, Any], h: Any, layout: str) -> Route:
        """Where a matrix goes: to this class's own rule."""
        return Route(type(self), h, reason="a matrix", layout=layout)

    def inspect_groups(self, groups: list[dict[str, Any]]) -> None:
        if any("fallback" in group for group in groups):
            return  # whoever flags one group has thought about all of them
        bare = [p for group in groups if "param_names" not in group for p in group["params"]]
        found = [p for p in bare if isinstance(p, Tensor) and p.ndim == 2 and min(p.shape) > 1]
        if found:
            held = sum(p.numel() * p.element_size() for p in found) / 2**20
            warnings.warn(
                f"{type(self).__name__} treats all {len(found)} two-dimensional tensors ({held:.1f} MiB) as matrices, "
                "because bare tensors do not say which are embeddings or heads: pass the model, or groups with "
                "fallback=True/False",
                UserWarning,
                stacklevel=3,
            )
