"""`SampledMatmul`: an exact product whose gradients come from sampled rows, for attention that is written out."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from optimzoo.functional import random
from optimzoo.functional.sampling import column_row_sample
from optimzoo.modules.replacement import product_dtype
from optimzoo.modules.sampled import SampledLinear, advance, sample_size
from optimzoo.modules.sampled_site import row_norms


class SampledMatmul(nn.Module):
    """c = a b exactly; in training, da and db are unbiased estimates: (..., m, d), (..., d, n) -> (..., m, n).

    da = dc b^T sums over the n columns of b, db = a^T dc over the m rows of a; `ratio` of each is kept, drawn for each
    leading index in proportion to its length. Unlike `SampledLinear`, the gradients passed on are estimates too.

    Winner-take-all column-row sampling (Liu et al., 2023, arXiv 2305.15265).
    """

    draws: Tensor

    def __init__(self, name: str = "", **options: Any) -> None:
        super().__init__()
        values = SampledLinear.resolve(**options)
        self.ratio, self.criterion, self.mix = values["ratio"], values["criterion"], values["mix"]
        self.seed = random.fold(values["seed"], name)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape[:-2] != b.shape[:-2]:
            raise ValueError(f"SampledMatmul takes equal leading dimensions, not {tuple(a.shape)} and {tuple(b.shape)}")
        few = any(sample_size(size, self.ratio) >= size for size in (a.shape[-2], b.shape[-1]))
        if few or not (self.training and torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
            return a.matmul(b)
        columns = self._draw(b.mT) if a.requires_grad else (None, None, None)
        rows = self._draw(a) if b.requires_grad else (None, None, None)
        return _SampledMatmul.apply(a, b, *columns, *rows)

    def _draw(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows.detach()
        k = sample_size(rows.shape[-2], self.ratio)
        seed = advance(self.draws, self.seed)
        index, scale = column_row_sample(row_norms(rows), k, seed, self.criterion, self.mix)
        return _take(rows, index).to(product_dtype(rows)), index, scale

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, criterion={self.criterion!r}, mix={self.mix}"


class _SampledMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, *samples: Tensor | None) -> Tensor:
        ctx.save_for_backward(*samples)
        ctx.dtypes = a.dtype, b.dtype
        return a.matmul(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
        columns, column_index, column_scale, rows, row_index, row_scale = ctx.saved_tensors
        da = db = None
        if columns is not None:
            da = _scaled(dc.mT, column_index, column_scale).mT.matmul(columns).to(ctx.dtypes[0])
        if rows is not None:
            db = rows.mT.matmul(_scaled(dc, row_index, row_scale)).to(ctx.dtypes[1])
        return da, db, None, None, None, None, None, None


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.take_along_dim(index.to(torch.int64).unsqueeze(-1), dim=-2)


def _scaled(rows: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    return (_take(rows, index) * scale.unsqueeze(-1)).to(rows.dtype)
