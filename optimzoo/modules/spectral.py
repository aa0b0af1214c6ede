"""A linear layer kept as its singular value decomposition, of which a few vectors at a time are trained.

"Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", 2024, arXiv:2405.15481.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from optimzoo.core.hyper import Hyper, hyper
from optimzoo.functional.random import generator
from optimzoo.functional.slices import has_values
from optimzoo.modules.replacement import Replacement, product_dtype
from optimzoo.modules.spectral_product import SpectralProduct, dense_weight

SAMPLINGS = ("mix", "sigma", "uniform", "sequential", "topr")
LENGTH_ROUNDING = 16  # times eps: what the length of a vector that was brought to length one may be off


class SpectralLinear(Replacement):
    """y = x (U diag(s) V)^T + b with all k = min(m, n) singular values and r pairs of singular vectors trainable.

    Shapes: U_a (m, r), V_a (r, n), s (k,), bias (m,) are parameters; U_f (m, k-r), V_f (k-r, n) are buffers. The first
    r slots of `s` belong to the active vectors, the rest to the frozen ones. `perm` (k,) says which singular value,
    counted from the largest, each slot held at the last decomposition.

        Z = x V^T     A = dy U     ds = sum_t A * Z     dx = (A * s) V
        dU_a = dy^T Z_a     dV_a = A_a^T x              (enhanced; the true gradient is s times that)

    Weights take k(m+n)+k elements, for a square layer twice those of a plain one; what is saved are gradients and
    optimizer state, which exist for r(m+n)+k. Against dense Adam in float32 that is about half in total; a model in
    bfloat16 with 8-bit Adam is smaller than this. Factors stay float32 (bfloat16 ones would be 2e-3 off), products are
    taken in the input's or autocast's dtype.

    A backward pass needs Z for `ds` whichever way y was computed. So y through a materialised W costs less only where Z
    is not kept, that is without gradients or with `recompute`, and for more than max(m, n) tokens: "auto" follows that.
    """

    options: ClassVar[Mapping[str, Hyper]] = {
        "rank": hyper(64, ge=1, doc="vectors trained at a time; at most min(m, n)"),
        "enhanced": hyper(True, one_of=(True, False), doc="gradients of the vectors without the factor s"),
        "evaluation": hyper("auto", one_of=("auto", "factored", "materialised"), doc="how y is computed"),
        "recompute": hyper(False, one_of=(True, False), doc="form Z again in backward instead of keeping it"),
    }
    driver: ClassVar[str] = "SST"

    U_f: Tensor
    V_f: Tensor
    perm: Tensor
    reselections: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, **options: Any) -> None:
        super().__init__()
        chosen = self.resolve(**options)
        self.out_features, self.in_features = weight.shape
        if not weight.numel():
            raise ValueError(f"SpectralLinear: a weight of {tuple(weight.shape)} has no singular values")
        self.rank = min(chosen["rank"], *weight.shape)
        self.enhanced: bool = chosen["enhanced"]
        self.evaluation: str = chosen["evaluation"]
        self.recompute: bool = chosen["recompute"]
        self.weight_dtype = weight.dtype
        trains = weight.requires_grad
        r, dtype = self.rank, torch.promote_types(weight.dtype, torch.float32)
        u, s, v = (t.to(dtype) for t in _svd(weight.detach()))
        self.U_a = nn.Parameter(u[:, :r].clone(memory_format=torch.contiguous_format), trains)
        self.V_a = nn.Parameter(v[:r].clone(memory_format=torch.contiguous_format), trains)
        self.s = nn.Parameter(s, trains)
        self.bias = bias
        self.register_buffer("U_f", u[:, r:].clone(memory_format=torch.contiguous_format))
        self.register_buffer("V_f", v[r:].clone(memory_format=torch.contiguous_format))
        self.register_buffer("perm", torch.arange(s.numel(), dtype=torch.int32, device=weight.device))
        self.register_buffer("reselections", torch.zeros((), dtype=torch.int64, device=weight.device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        return cls(linear.weight, linear.bias, **options)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dense().to(self.weight_dtype), self.s.requires_grad)
        linear.register_parameter("bias", self.bias)
        return linear

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """(m, n): the weight U diag(s) V."""
        u_a, v_a, s, u_f, v_f = (t.to(dtype) for t in (self.U_a, self.V_a, self.s, self.U_f, self.V_f))
        return dense_weight(u_a, v_a, s, u_f, v_f, dtype)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.to(product_dtype(x)).reshape(-1, self.in_features)
        keep = torch.is_grad_enabled() and not self.recompute and self.evaluation != "materialised"
        cheaper = not keep and tokens.shape[0] > max(self.in_features, self.out_features)
        materialise = self.evaluation == "materialised" or (self.evaluation == "auto" and cheaper)
        y = SpectralProduct.apply(
            tokens, self.U_a, self.V_a, self.s, self.bias, self.U_f, self.V_f, materialise, keep, self.enhanced
        )
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def round(self) -> int:
        """Draws after which every vector had its turn once on average: ceil(k / r)."""
        return -(-self.s.numel() // self.rank)

    @torch.no_grad()
    def renormalise(self) -> None:
        """Bring the factors back to what they stand for after a step: s >= 0, active vectors of length one."""
        self.s.clamp_(min=0)
        for vectors, dim in ((self.U_a, 0), (self.V_a, 1)):
            length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
            # What no step has moved is of length one but for rounding, and stays what it is to the bit.
            moved = (length - 1).abs() > LENGTH_ROUNDING * torch.finfo(length.dtype).eps
            vectors.div_(torch.where(moved, length.clamp_min(1e-12), 1))

    @torch.no_grad()
    def reselect(self, step: int, *, seed: int = 0, sampling: str = "mix") -> dict[Tensor, Tensor | None]:
        """The `step`-th draw of active vectors, counted from 0, after a new decomposition where a round begins.

        What the active vectors' state was about is gone, so it is all new; that of `s` follows its value through a swap
        and is new after a decomposition. W stays what it was.
        """
        self.reselections.add_(1)
        begins = step > 0 and step % self.round == 0
        if begins:
            self.resvd()
        source = None
        if has_values(self.s):  # which vectors: a question about values
            chosen = self.choose(step, seed, sampling)
            inside = torch.zeros(self.s.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
            source = self.swap((~inside[: self.rank]).nonzero()[:, 0], inside[self.rank :].nonzero()[:, 0] + self.rank)
        return {self.U_a: None, self.V_a: None, self.s: None if begins else source}

    def choose(self, step: int, seed: int, sampling: str) -> Tensor:
        """(r,) slots to be active, drawn without replacement with probabilities that `sampling` names.

        mix: (1/k + s_i / sum s) / 2, the paper's experiments; sigma: s_i / sum s, its main text; uniform: 1/k;
        sequential: in turn, by size at the last decomposition; topr: the largest.
        """
        k, r = self.s.numel(), self.rank
        s = self.s.detach().to("cpu", torch.float64)
        if sampling == "sequential":
            turn = (torch.arange(r) + step % self.round * r) % k
            return torch.isin(self.perm.cpu(), turn).nonzero()[:, 0]
        if sampling == "topr":
            return s.sort(descending=True, stable=True).indices[:r]
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling={sampling!r} is not one of {', '.join(map(repr, SAMPLINGS))}")
        share = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny)
        even = torch.full_like(s, 1 / k)
        p = {"mix": (share + even) / 2, "sigma": share, "uniform": even}[sampling]
        # The first r arrivals of independent exponential clocks with rates p: the same law as drawing one by one, and
        # unlike torch.multinomial it has an answer where fewer than r singular values are left above zero.
        clock = torch.empty_like(s).exponential_(generator=generator(seed))
        return (p / clock).sort(descending=True, stable=True).indices[:r]

    @torch.no_grad()
    def swap(self, outgoing: Tensor, incoming: Tensor) -> Tensor:
        """Exchange active slots `outgoing` with as many frozen slots `incoming`, in place; W stays what it was.

        Returns (k,): what slot i holds now was held by slot `source[i]`.
        """
        source = torch.arange(self.s.numel())
        source[outgoing], source[incoming] = incoming, outgoing
        source, out = source.to(self.s.device), outgoing.to(self.s.device)
        into = incoming.to(self.s.device) - self.rank
        for active, frozen in ((self.U_a.mT, self.U_f.mT), (self.V_a, self.V_f)):
            held = active[out]
            active[out] = frozen[into]
            frozen[into] = held
        self.s.copy_(self.s[source])
        self.perm.copy_(self.perm[source])
        return source

    @torch.no_grad()
    def resvd(self) -> None:
        """Decompose W anew, in place: the vectors are orthogonal again, slot i holds the i-th singular value."""
        u, s, v = _svd(self.dense())
        for whole, active, frozen in ((u.mT, self.U_a.mT, self.U_f.mT), (v, self.V_a, self.V_f)):
            active.copy_(whole[: self.rank])
            frozen.copy_(whole[self.rank :])
        self.s.copy_(s)
        self.perm.copy_(torch.arange(s.numel(), device=s.device))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, bias={self.bias is not None}"


def _svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, n) -> (m, k), (k,), (k, n); in float64, as in float32 one costs 1e-6 of W and a run has many."""
    return torch.linalg.svd(w.double(), full_matrices=False)
