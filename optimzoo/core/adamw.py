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
from optimzoo.core.slots import Lists, Slot, Tensors
from optimzoo.functional import adamw_kernel, host_kernel
from optimzoo.functional.moments import adam_direction
from optimzoo.functional.slices import on_host

# Elements that a CPU's kernel takes together. It rounds the fewer ones at the end of a tensor in another way, and where
# that end lies depends on how the rows are spread over ranks; so what is too short for a line is filled up to one.
LINE = 16


class AdamW(ZooOptimizer):
    """Adam with decoupled weight decay; remembers two averages of each parameter's shape and a counter.

    The arithmetic is `torch.optim.AdamW`'s, and so are the names of the state. Where the state is wide and weights are
    not rounded by chance one kernel does the step. On CUDA that is our own, without workspace, but for float64, for
    subclasses and in captured steps; elsewhere PyTorch's, of float32 weights without workspace but for the end of a
    tensor of odd length, of narrower ones on wide copies of some of them.
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
    def host_update(ws: Tensors, gs: Tensors, h: Any, lr: float, *, slots: Lists, steps: list[float]) -> list[bool]:
        averages = host_kernel.Averages(slots["exp_avg"], slots["exp_avg_sq"], steps)
        return host_kernel.step_(ws, gs, h, lr, "all", averages)

    @staticmethod
    def own_kernel(w: Tensor, g: Tensor) -> bool:
        return adamw_kernel.takes(w, g)

    @staticmethod
    def update(ws: Tensors, gs: Tensors, h: Any, lr: float | Tensor, found_inf: Tensor | None, *, slots: Lists) -> None:
        averages = slots["exp_avg"], slots["exp_avg_sq"]
        options: dict[str, Any] = {"eps": h.eps, "weight_decay": h.weight_decay, "maximize": h.maximize}
        if AdamW.own_kernel(ws[0], gs[0]):
            adamw_kernel.step_(ws, gs, *averages, slots["step"], found_inf, lr=lr, h=h)
            return
        if found_inf is not None and len(ws) > 1:  # PyTorch's kernel takes one flag a call
            for i, flag in enumerate(found_inf.unbind()):
                some = {name: [tensors[i]] for name, tensors in slots.items()}
                AdamW.update([ws[i]], [gs[i]], h, lr, flag, slots=some)
            return
        kinds = [ws, gs, *averages]
        ragged = [i for i, w in enumerate(ws) if w.numel() % LINE] if on_host(ws[0]) else []
        ends = [[_end(tensors[i]) for i in ragged] for tensors in kinds]
        if ragged:
            kinds = [[_lines(t) for t in tensors] + more for tensors, more in zip(kinds, ends, strict=True)]
        weights, gradients, first, second = kinds
        torch._fused_adamw_(
            weights,
            gradients,
            first,
            second,
            [],
            [*slots["step"], *(slots["step"][i] for i in ragged)],
            lr=lr,
            beta1=h.betas[0],
            beta2=h.betas[1],
            amsgrad=False,
            found_inf=found_inf,
            **options,
        )
        for tensors, more in ((ws, ends[0]), (slots["exp_avg"], ends[2]), (slots["exp_avg_sq"], ends[3])):
            for i, stepped in zip(ragged, more, strict=True):
                rest = _rest(tensors[i])
                rest.copy_(stepped[: rest.numel()])


def _lines(t: Tensor) -> Tensor:
    """Those elements that fill whole lines."""
    return t.view(-1)[: t.numel() // LINE * LINE]


def _rest(t: Tensor) -> Tensor:
    """The elements behind them."""
    return t.view(-1)[t.numel() // LINE * LINE :]


def _end(t: Tensor) -> Tensor:
    """A copy of these, filled up to a line with zeros."""
    return torch.nn.functional.pad(_rest(t), (0, -t.numel() % LINE))
