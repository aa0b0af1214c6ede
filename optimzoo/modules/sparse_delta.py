"""W + a sparse delta: values at chosen entries of a frozen weight (SFT, "Scaling Sparse Fine-Tuning").

Ansell, Vulic, Sterz, Korhonen, Ponti 2024, arXiv:2401.16405.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from optimzoo.core.hyper import Hyper, hyper
from optimzoo.functional.random import fold
from optimzoo.functional.slices import has_values
from optimzoo.functional.sparse import (
    Support,
    entry_gradients,
    entry_gradients_and_candidates,
    exchange,
    index_dtype,
    random_entries,
    support,
)
from optimzoo.modules.delta_product import SparseDeltaProduct, delta_in_place, is_quantized, is_readable
from optimzoo.modules.replacement import Replacement, product_dtype

_BUDGETS = ("density", "entries", "lora_rank")
_BUCKETS = 16


class SparseDeltaLinear(Replacement):
    """y = x (W + D)ᵀ + b with W (m, n) frozen and D zero but for `values` (k,) at `indices` (k,), flat and sorted.

    Wraps the layer it is made from and keeps it as `base`. W itself takes the delta for the length of a product and
    gets its k entries back from a copy, so no second (m, n) tensor exists; the effective weight is W + D, rounded once
    to W's dtype. The gradient of `values` is computed in blocks of rows and never as a dense (m, n) gradient.

    The budget of all layers converted together is one of `density` (of their entries), `entries` (a number), or
    `lora_rank` (as many as LoRA of this rank would train); each layer gets its share by size.
    """

    options: ClassVar[Mapping[str, Hyper]] = {
        "density": hyper(None, gt=0, le=1, doc="trained share of the entries of the converted layers"),
        "entries": hyper(None, ge=1, doc="trained entries of all converted layers together"),
        "lora_rank": hyper(None, ge=1, doc="as many trained entries as LoRA of this rank has in these layers"),
        "seed": hyper(0, ge=0, doc="which entries are trained first, together with the layer's name"),
    }
    driver: ClassVar[str] = "SFT"

    def __init__(self, base: nn.Linear, indices: Tensor) -> None:
        super().__init__()
        weight = base.weight
        if getattr(weight, "quant_state", None) is None and not weight.is_contiguous():
            raise ValueError("the weight is not contiguous; assign weight.data.contiguous() to it before convert")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(indices.numel(), dtype=wide, device=weight.device))
        dtype = index_dtype(self.out_features, self.in_features)
        self.register_buffer("indices", indices.to(weight.device, dtype))
        self.register_buffer("reselections", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.indices: Tensor
        self.reselections: Tensor
        self._support: tuple[Tensor, int, Support] | None = None
        self._watch: Watch | None = None

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why the layer cannot take this module's place: quantized weights can, if their numbers can be read."""
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "quant_state"):
            return None  # the 4-bit layer of bitsandbytes
        reason = super().refuses(module)
        if reason is None and not is_readable(weight):
            return f"its weight is a {type(weight).__name__}, whose numbers cannot be read; quantize it in another way"
        return reason

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        budget = cls.prepare({"": linear}, **options)[""]
        total = linear.out_features * linear.in_features
        if not has_values(linear.weight):  # nothing to draw: planned, not run
            return cls(linear, torch.empty(budget["entries"], dtype=torch.int64, device=linear.weight.device))
        return cls(linear, random_entries(budget["entries"], total, budget["seed"]))

    @classmethod
    def prepare(cls, linears: Mapping[str, nn.Linear], **options: Any) -> dict[str, dict[str, Any]]:
        values = cls.resolve(**options)
        given = [name for name in _BUDGETS if values[name] is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise TypeError(f"{cls.__name__} takes exactly one of {', '.join(_BUDGETS)}; {said} was given")
        sizes = {name: linear.out_features * linear.in_features for name, linear in linears.items()}
        shares = _shares(sizes, _budget(given[0], values[given[0]], linears, sum(sizes.values())))
        seeds = {name: fold(values["seed"], name) if name else values["seed"] for name in linears}
        return {name: {"entries": shares[name], "seed": seeds[name]} for name in linears}

    def to_linear(self) -> nn.Linear:
        weight, bias = self.base.weight, self.base.bias
        if is_quantized(weight):
            raise ValueError("a delta cannot be merged into a quantized weight without loss; keep it with save_delta")
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        merged = weight.detach().clone()
        with delta_in_place(merged, merged, self.values, self.indices, restore=False):
            linear.register_parameter("weight", nn.Parameter(merged, requires_grad=weight.requires_grad))
        linear.register_parameter("bias", bias)
        return linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, entries={self.values.numel()}"

    @torch.compiler.disable  # the weight changes and changes back inside: a graph must not see either
    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.base.weight
        bias: Tensor | None = self.base.bias
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("the base weight of a SparseDeltaLinear is frozen: call base.requires_grad_(False)")
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(product_dtype(x))
        elif x.dtype != weight.dtype and not is_quantized(weight):
            raise TypeError(f"the input is {x.dtype} and the weight {weight.dtype}; cast one of them or use autocast")
        bias = bias if bias is None else bias.to(x.dtype)
        y: Tensor = SparseDeltaProduct.apply(x, self.values, weight, self.indices, bias, self)
        return y

    # What its optimizer calls.

    def reselect(self, step: int, **how: Tensor) -> dict[Tensor, Tensor | None]:
        """Take entries out and others in, after `step` updates; `values` follow, new ones start at 0.

        `drop` (d,) are places among `indices`, `grow` (d,) flat positions; a position in both stays as it is. Returns
        where the optimizer state of each entry comes from: its old place, -1 for a new one.
        """
        indices, source = exchange(self.indices, how["drop"], how["grow"])
        with torch.no_grad():
            self.values.copy_(torch.where(source < 0, 0, self.values[source.clamp(min=0)]))
            self.indices.copy_(indices)
            self.reselections.add_(1)
        self._support = None
        return {self.values: source}

    def watch(self, candidates: Tensor | None) -> None:
        """Gather sums for `candidates` (c,) in every backward from now on, None to stop.

        A backward that finds the gradient of `values` set to None since the one before starts the sums anew.
        They are chosen in the first backward and written into the tensor; a first element of -1 says that they are not.
        """
        chosen = candidates is not None and has_values(candidates) and bool(candidates[0] >= 0)
        self._watch = None if candidates is None else Watch(candidates, self._read(candidates) if chosen else None)

    @property
    def watched(self) -> "Watch | None":
        """What was gathered since the last `clear_sums`."""
        return self._watch

    def clear_sums(self, keep: bool) -> None:
        """Start the sums anew; without `keep` the candidates too, if they were chosen by these sums."""
        watch = self._watch
        if watch is not None and watch.sums is not None:
            if watch.fresh and not keep:
                watch.candidates.fill_(-1)
                watch.chosen = None
            watch.sums = watch.raw = None
            watch.fresh = watch.chosen is None

    @staticmethod
    def summary(gradient: Tensor) -> Tensor:
        """(k,) -> (at most 16,): sums over stretches, enough to tell by which factor two parallel gradients differ."""
        buckets = min(_BUCKETS, gradient.numel())
        return gradient[: gradient.numel() // buckets * buckets].view(buckets, -1).sum(1, dtype=torch.float64)

    def entries(self) -> Support:
        """The trained entries, and where each block of rows begins among them."""
        known = self._support
        if known is None or known[0] is not self.indices or known[1] != self.indices._version:
            known = self._support = (self.indices, self.indices._version, self._read(self.indices))
        return known[2]

    def _read(self, indices: Tensor) -> Support:
        return support(indices, self.out_features, self.in_features)

    def value_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad (N, m), x (N, n) -> (k,): the gradient of `values`; feeds the candidates in the same pass."""
        watch, own = self._watch, self.entries()
        if watch is None:
            return entry_gradients(grad, x, [own])[0]
        if watch.candidates.device != x.device:  # the model moved in between
            self.watch(watch.candidates.to(x.device))
            return self.value_gradient(grad, x)
        backward = torch._C._current_graph_task_id()
        if backward != watch.backward and self.values.grad is None:  # thrown away by the model's own zero_grad
            self.clear_sums(keep=False)
        watch.backward = backward
        if watch.chosen is None:
            found, best, sums = entry_gradients_and_candidates(grad, x, own, watch.candidates.numel())
            watch.candidates.copy_(best)
            watch.chosen, watch.fresh = self._read(watch.candidates), True
        else:
            found, sums = entry_gradients(grad, x, [own, watch.chosen])
        watch.add(sums, self.summary(found))
        return found


class Watch:
    """What a layer gathers between two optimizer steps: the candidates' gradient, summed over backward passes.

    The sums never went through `p.grad`, so a loss scale or clipping is still missing; `raw`, the summary of what the
    layer added to `p.grad` itself, lets the optimizer find that factor.
    """

    def __init__(self, candidates: Tensor, chosen: Support | None) -> None:
        self.candidates = candidates
        self.chosen = chosen
        self.fresh = chosen is None  # chosen since the last step, so thrown away with its sums
        self.sums: Tensor | None = None
        self.raw: Tensor | None = None
        self.backward = -1  # the pass that added to them last

    def add(self, sums: Tensor, raw: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums.add_(sums)
        self.raw = raw if self.raw is None else self.raw.add_(raw)


def _budget(kind: str, value: float, linears: Mapping[str, nn.Linear], total: int) -> int:
    """The number of trained entries of all layers together."""
    if kind == "density":
        return max(1, int(value * total + 1e-6))
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"SparseDeltaLinear: {kind}={value!r} must be a whole number")
    wanted = value if kind == "entries" else value * sum(x.out_features + x.in_features for x in linears.values())
    if wanted > total:
        raise ValueError(f"SparseDeltaLinear: {kind}={value} asks for {wanted:,} entries of {total:,}; ask for fewer")
    return wanted


def _shares(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Split the budget by size: exact in sum, no share empty or larger than its layer."""
    layers, total = len(sizes), sum(sizes.values())
    if budget < layers:
        raise ValueError(
            f"SparseDeltaLinear: {budget} entries are too few for {layers} layers; ask for one each at least"
        )
    parts = {name: divmod((budget - layers) * (size - 1), max(total - layers, 1)) for name, size in sizes.items()}
    shares = {name: 1 + whole for name, (whole, _) in parts.items()}
    for name in sorted(parts, key=lambda name: -parts[name][1])[: budget - sum(shares.values())]:
        shares[name] += 1
    return shares
