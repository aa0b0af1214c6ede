"""`SampledLinear`: exact forward, weight gradient from a sample of the tokens (WTA-CRS)."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from optimzoo.core.hyper import Hyper, hyper
from optimzoo.functional import random
from optimzoo.functional.names import clean_name
from optimzoo.functional.sampling import CRITERIA, column_row_sample
from optimzoo.memory.activations import saved
from optimzoo.modules.replacement import Replacement, product_dtype
from optimzoo.modules.sampled_site import SHARED, Sample, Site, any_block, row_norms, shared_site

MIN_ROWS = 10  # fewer rows than this are not worth an estimate


def sample_size(n: int, ratio: float) -> int:
    """Rows kept out of n."""
    return max(int(ratio * n + 1e-6), MIN_ROWS)


class SampledLinear(Replacement, nn.Linear):
    """y = x W^T + b exactly; in training, dW = sum over k sampled tokens of scale * dy x^T, unbiased.

    Input (..., n), output (..., m); k = ratio * tokens, at least 10. Kept for backward instead of x: k n numbers, an
    int32 index and a float32 scale of length k. Input and bias gradients are exact. Weight and bias are the converted
    layer's own parameters. Memory is saved only where nothing else keeps x alive:
    `convert(..., batch=batch)` tells before, and otherwise a warning in the first backward pass.

    Winner-take-all column-row sampling (Liu et al., 2023, arXiv 2305.15265). Without a `NormCache` tokens are drawn in
    proportion to |x|, which is poor where few tokens have all the gradient: give a classifier that reads one token of a
    text a cache. Layers named together in `share` that receive the same tensor keep one sample between them.
    """

    options: ClassVar[Mapping[str, Hyper]] = {
        "ratio": hyper(0.3, gt=0, le=1, doc="part of the tokens that is kept"),
        "criterion": hyper("paper", one_of=CRITERIA, doc="how many tokens are kept for certain"),
        "mix": hyper(0.05, ge=0, le=1, doc="uniform part of the probabilities, a floor against stale norms"),
        "seed": hyper(0, ge=0, doc="of the draws, mixed with the layer's name, the call and the rank"),
        "share": hyper(SHARED, doc="tuples of sibling names whose inputs are sampled once"),
    }
    draws: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, name: str = "", **options: Any) -> None:
        factory = {key: options.pop(key) for key in ("device", "dtype") if key in options}
        super().__init__(in_features, out_features, bias, **factory)
        values = self.resolve(**options)
        self.ratio: float = values["ratio"]
        self.criterion: str = values["criterion"]
        self.mix: float = values["mix"]
        self.name = clean_name(name)
        self.seed = random.fold(values["seed"], self.name)
        self.site = Site([self])
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    @classmethod
    def prepare(cls, linears: Mapping[str, nn.Linear], **options: Any) -> dict[str, dict[str, Any]]:
        values = cls.resolve(**options)
        sites: dict[tuple[str, int], Site] = {}
        return {name: values | {"name": name, "site": shared_site(name, values["share"], sites)} for name in linears}

    @classmethod
    def probe(cls, model: nn.Module, names: Sequence[str], batch: Any) -> None:
        """Warn of layers whose input something else keeps until backward, block by block in one line."""
        random_states = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=random_states):
            found = saved(model, batch).freed_without(names)
        kept: dict[tuple[str, tuple[str, ...]], int] = {}
        for name, freed in found.items():
            if freed.held_by:
                parts = [holder.partition(" (") for holder in freed.held_by]
                who = dict.fromkeys(any_block(module) + bracket + op for module, bracket, op in parts)
                kept[any_block(name), tuple(who)] = kept.get((any_block(name), tuple(who)), 0) + 1
        if kept:
            lines = [f"{n} x {name!r}, kept by {', '.join(who)}" for (name, who), n in kept.items()]
            warnings.warn(
                "sampling saves no memory where another operation keeps the input; exclude these from convert: "
                + "; ".join(lines),
                stacklevel=3,
            )

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str = "", site: Site | None = None, **options: Any) -> Self:
        layer = cls(linear.in_features, linear.out_features, False, name, device="meta", **options)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.draws = torch.zeros((), dtype=torch.int64, device=linear.weight.device)
        if site is not None:
            layer.site = site
            site.members.append(layer)
        return layer

    def to_linear(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def active(self) -> bool:
        return self.training and self.weight.requires_grad and self.ratio < 1

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[:-1].numel()
        if not (self.active() and torch.is_grad_enabled()) or sample_size(tokens, self.ratio) >= tokens:
            return F.linear(x, self.weight, self.bias)
        rows, index, scale = self.site.sample(self, x)
        notify = self.site.observer(self, x)
        return _SampledLinear.apply(x, self.weight, self.bias, rows, index, scale, notify)

    def draw(self, x: Tensor, norms: Tensor | None) -> Sample:
        """Sample the rows of (..., n); `norms` are the expected sizes of the output gradient's rows, if known."""
        flat = x.detach().reshape(-1, self.in_features)
        weights = row_norms(flat)
        weights = weights if norms is None else weights * norms
        k = sample_size(flat.shape[0], self.ratio)
        index, scale = column_row_sample(weights, k, advance(self.draws, self.seed), self.criterion, self.mix)
        return flat.index_select(0, index).to(product_dtype(x)), index, scale

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, ratio={self.ratio}, criterion={self.criterion!r}, mix={self.mix}"


class _SampledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *sample_and_notify: Any) -> Tensor:
        *sample, notify = sample_and_notify
        ctx.save_for_backward(weight, *sample)
        ctx.bias_dtype, ctx.notify = None if bias is None else bias.dtype, notify
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, rows, index, scale = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        flat = dy.reshape(-1, dy.shape[-1])
        if ctx.notify is not None:
            ctx.notify(flat)
        dx = dy.matmul(weight.to(dy.dtype)) if need_x else None
        dw = None
        if need_weight:
            picked = (flat.index_select(0, index) * scale.unsqueeze(-1)).to(rows.dtype)
            dw = picked.t().matmul(rows).to(weight.dtype)
        db = flat.sum(0).to(ctx.bias_dtype) if need_bias else None
        return dx, dw, db, None, None, None, None


def advance(draws: Tensor, seed: int) -> Tensor:
    """Count one more draw, on the counter's device, and give its seed: other calls, names and ranks, other numbers."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    seed = random.fold(seed, torch.distributed.get_rank() if distributed else 0)
    with torch.no_grad():
        draws.add_(1)
        low, high = random.hash32(2, (draws * 2).bitwise_xor_(seed), draws.device).unbind()
        return low.bitwise_or(high.bitwise_and(0x7FFFFFFF) << 32)
