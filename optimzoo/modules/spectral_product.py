"""The product of a spectral layer: x (U diag(s) V)^T + b and its gradients, never a dense (m, n) one."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def dense_weight(u_a: Tensor, v_a: Tensor, s: Tensor, u_f: Tensor, v_f: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, r), (r, n), (k,), (m, k-r), (k-r, n) -> (m, n): U diag(s) V, multiplied out in `dtype`."""
    r = u_a.shape[1]
    return torch.addmm((u_a * s[:r]).to(dtype) @ v_a.to(dtype), (u_f * s[r:]).to(dtype), v_f.to(dtype))


class SpectralProduct(torch.autograd.Function):
    """(N, n) -> (N, m); factors as in `SpectralLinear`.

    With `materialise` y is taken from the weight multiplied out; with `keep` Z = x V^T is saved for backward, which
    otherwise forms it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u_a: Tensor,
        v_a: Tensor,
        s: Tensor,
        bias: Tensor | None,
        u_f: Tensor,
        v_f: Tensor,
        materialise: bool,
        keep: bool,
        enhanced: bool,
    ) -> Tensor:
        r, dtype = u_a.shape[1], x.dtype
        z: tuple[Tensor, ...] = ()
        if materialise:
            y = x @ dense_weight(u_a, v_a, s, u_f, v_f, dtype).mT
        else:
            z = (x @ v_a.mT.to(dtype), x @ v_f.mT.to(dtype))
            y = torch.addmm(z[0] @ (u_a * s[:r]).mT.to(dtype), z[1], (u_f * s[r:]).mT.to(dtype))
        ctx.save_for_backward(x, u_a, v_a, s, u_f, v_f, *(z if keep else ()))
        ctx.enhanced, ctx.bias_dtype = enhanced, None if bias is None else bias.dtype
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u_a, v_a, s, u_f, v_f, *z = ctx.saved_tensors
        need_x, need_u, need_v, need_s, need_bias = ctx.needs_input_grad[:5]
        r, dtype, exact = u_a.shape[1], x.dtype, s.dtype
        dx = du = dv = ds = db = None
        a = [dy @ u_a.to(dtype), dy @ u_f.to(dtype)] if need_x or need_v or need_s else []
        if need_x:
            dx = torch.addmm(a[0] @ (v_a * s[:r, None]).to(dtype), a[1], (v_f * s[r:, None]).to(dtype))
        if not z and (need_u or need_s):
            z = [x @ v_a.mT.to(dtype), x @ v_f.mT.to(dtype)]
        if need_s:
            # Over thousands of tokens a sum in bfloat16 would stop growing.
            ds = torch.cat([(a_.to(exact) * z_).sum(0) for a_, z_ in zip(a, z, strict=True)])
        if need_u:
            du = (dy.mT @ z[0]).to(exact)
            du = du if ctx.enhanced else du.mul_(s[:r])
        if need_v:
            dv = (a[0].mT @ x).to(exact)
            dv = dv if ctx.enhanced else dv.mul_(s[:r, None])
        if need_bias:
            db = dy.sum(0, dtype=exact).to(ctx.bias_dtype)
        return dx, du, dv, ds, db, None, None, None, None, None
