"""The product of a SparseDeltaLinear: W + D exists for the length of a product, inside W's own memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class ValueGradient(Protocol):
    """The layer as its product sees it: what turns grad (N, m) and x (N, n) into the gradient (k,) of its values."""

    def value_gradient(self, grad: Tensor, x: Tensor) -> Tensor: ...


class SparseDeltaProduct(torch.autograd.Function):
    """x (..., n) -> (..., m), with W + D built for the length of each product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        indices: Tensor,
        bias: Tensor | None,
        layer: "ValueGradient",
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, weight, indices)
        with _product_weight(weight, values, indices, x.dtype) as w:
            return F.linear(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, weight, indices = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            with _product_weight(weight, values, indices, grad.dtype) as w:
                grad_x = grad @ w
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            with torch.autocast(grad.device.type, enabled=False):
                grad_values = ctx.layer.value_gradient(rows, x.reshape(-1, x.shape[-1])).to(values.dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = rows.sum(0)
        return grad_x, grad_values, None, None, grad_bias, None


@contextmanager
def _product_weight(weight: Tensor, values: Tensor, indices: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """W + D for one product: in W itself, or in the copy that autocast or a quantized W makes anyway."""
    with torch.autocast(values.device.type, enabled=False), torch.no_grad():
        exact = _dequantized(weight)
        dense = exact.to(dtype)
        with delta_in_place(exact, dense, values, indices, restore=dense is exact and not is_quantized(weight)):
            yield dense


@contextmanager
def delta_in_place(exact: Tensor, dense: Tensor, values: Tensor, indices: Tensor, restore: bool) -> Iterator[None]:
    """Write W + D's entries into `dense`, W itself or a copy, each rounded once; put the old ones back afterwards.

    `dense` must not share its version counter with a tensor that autograd has saved: pass `.data`.
    """
    line, place = dense.view(-1), indices.long()
    old = exact.view(-1)[place]
    try:
        line[place] = (old.to(values.dtype) + values.detach()).to(dense.dtype)
        yield
    finally:
        if restore:
            line[place] = old


def is_quantized(weight: Tensor) -> bool:
    return getattr(weight, "quant_state", None) is not None or is_traceable_wrapper_subclass(weight)


def is_readable(weight: Tensor) -> bool:
    """Whether the numbers of a weight can be had: some of torchao's int4 formats only multiply, shards are parts."""
    return not is_traceable_wrapper_subclass(weight) or type(weight).dequantize is not Tensor.dequantize


def _dequantized(weight: Tensor) -> Tensor:
    """A fresh plain tensor of a weight kept by bitsandbytes or torchao; a plain weight's data as it is."""
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit  # installed, or the weight could not be of this kind

        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    if is_traceable_wrapper_subclass(weight):
        return weight.dequantize()
    return weight.data
