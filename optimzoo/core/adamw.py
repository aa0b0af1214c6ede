"""AdamW: the rule for everything that is not a matrix, and an optimizer of its own.

Loshchilov and Hutter 2019, arXiv:1711.05101.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- (1 - lr * weight_decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from typing import Any

import torch
from torch import Tensor

from optimzoo.core.hyper import SMALLEST, hyper
from optimzoo.core.optimizer import ZooOptimizer
from optimzoo.core.slots import Slot
from optimzoo.functional.moments import adam_direction


class AdamW(ZooOptimizer):
    """Adam with decoupled weight decay; remembers two averages of each parameter's shape and a counter.

    The arithmetic is `torch.optim.AdamW`'s, and so are the names of the state. Where weight, gradient and state share
    one dtype the fused kernel of PyTorch does the step, without any workspace.
    """

    lr: float = hyper(1e-3, ge=0, doc="step size")
    weight_decay: float = hyper(1e-2, ge=0, doc="decoupled decay, multiplied by lr")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, doc="decay of the two averages")
    eps: float = hyper(1e-8, ge=SMALLEST, doc="added to the root of the second average")

    paper = "Loshchilov and Hutter 2019, arXiv:1711.05101"
    elementwise = True

    @staticmethod
    def slots(shape: tuple[int, ...], h: Any) -> dict[str, Slot]:
        return {
            "exp_avg": Slot(shape, "first moment"),
            "exp_avg_sq": Slot(shape, "second moment"),
            "step": Slot((), "counter", torch.float32),
        }

    @staticmethod
    def direction(g: Tensor, w: Tensor, h: Any, *, exp_avg: Tensor, exp_avg_sq: Tensor, step: float | Tensor) -> Tensor:
        return adam_direction(g, exp_avg, exp_avg_sq, step, h.betas, h.eps)

    @staticmethod
    def update(
        ws: list[Tensor],
        gs: list[Tensor],
        h: Any,
        lr: float | Tensor,
        found_inf: Tensor | None,
        *,
        slots: dict[str, list[Tensor]],
    ) -> None:
        torch._fused_adamw_(
            ws,
            gs,
            slots["exp_avg"],
            slots["exp_avg_sq"],
            [],
            slots["step"],
            lr=lr,
            beta1=h.betas[0],
            beta2=h.betas[1],
            weight_decay=h.weight_decay,
            eps=h.eps,
            amsgrad=False,
            maximize=h.maximize,
            found_inf=found_inf,
        )
