"""SFT: Adam on a sparse delta whose entries move to where gradients are large.

Ansell, Vulic, Sterz, Korhonen, Ponti, "Scaling Sparse Fine-Tuning to Large Language Models", 2024, arXiv:2401.16405.

Each entry j of a delta has an age t_j, the number of gradients in its averages:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        t <- t + 1
    u  = m / (1 - b1^t) * sqrt(1 - b2^t) / (sqrt(v) + eps)        d <- (1 - lr weight_decay) (d - lr u)

In every reselect_every updates, after the first `accumulate`, the share p of entries with the smallest |d| goes;

    gradient:  the k largest |gradient| of the first backward are candidates, their gradients are summed over the
               `accumulate` updates, the largest |sum| comes in, with averages and age as if Adam had seen these updates
    sm3:       entries take SM3's step from row and column accumulators; the largest row_i col_j comes in
    p:         1 the first time; then rate (1 - c / total_steps), or rate (1 + cos(pi c / total_steps)) / 2
"""

from typing import Any

import torch
from torch import Tensor, nn

from optimzoo.core import AdamW, Route, Slot, ZooOptimizer, hyper
from optimzoo.core.collecting import fold, follow
from optimzoo.core.hyper import SMALLEST
from optimzoo.core.layers import COUNTER, LayerOptimizer, scheduled_layers
from optimzoo.core.member import Member
from optimzoo.core.ranks import from_first_rank
from optimzoo.functional.cover import sm3_sparse_update
from optimzoo.functional.entries import Exchanges, adam_entries, grown_by_cover, grown_by_sums

SM3_EPS = 1e-30  # under the root; Adam's 1e-6 there would turn the small gradients of large models into plain SGD


class Entries(ZooOptimizer):
    """Adam for single entries, each with its own age: 10 bytes an entry."""

    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, doc="decay of the two averages")
    eps: float = hyper(1e-6, ge=SMALLEST, doc="added to the root of the second average before its bias is corrected")

    decay_after = True

    @staticmethod
    def slots(shape: tuple[int, ...], h: Any) -> dict[str, Slot]:
        first, second = (Slot(shape, f"{which} moment", moves=True) for which in ("first", "second"))  # at an exchange
        return {"exp_avg": first, "exp_avg_sq": second, "age": Slot(shape, "age", torch.int16), "reselections": COUNTER}

    @staticmethod
    def direction(g: Tensor, w: Tensor, h: Any, *, exp_avg: Tensor, exp_avg_sq: Tensor, age: Tensor) -> Tensor:
        return adam_entries(g, exp_avg, exp_avg_sq, age, h.betas, h.eps)


class Collecting(Entries):
    """The same while gradients are collected: 12 bytes an entry more here, and 4 in the layer until `step`."""

    rows: int = hyper(0, doc="rows of the layer's weight")
    cols: int = hyper(0, doc="columns of the layer's weight")

    @staticmethod
    def slots(shape: tuple[int, ...], h: Any) -> dict[str, Slot]:
        index = torch.int32 if h.rows * h.cols < torch.iinfo(torch.int32).max else torch.int64
        return Entries.slots(shape, h) | {
            "candidates": Slot(shape, "candidates", index, fill=-1),
            "grad_sum": Slot(shape, "accumulator"),
            "grad_sq_sum": Slot(shape, "accumulator"),
            "grad_micro": Slot((), "counter"),  # updates in the sums, whatever number of micro-batches each had
        }


class Covered(Entries):
    """SM3 for single entries: one number for each row and each column of the weight."""

    rows: int = hyper(0, doc="rows of the layer's weight")
    cols: int = hyper(0, doc="columns of the layer's weight")

    @staticmethod
    def slots(shape: tuple[int, ...], h: Any) -> dict[str, Slot]:
        sides = {"row": Slot((h.rows,), "accumulator"), "col": Slot((h.cols,), "accumulator")}
        return sides | {"reselections": COUNTER}

    @staticmethod
    def direction(g: Tensor, w: Tensor, h: Any, *, row: Tensor, col: Tensor, indices: Tensor) -> Tensor:  # type: ignore[override]
        return sm3_sparse_update(g, indices, row, col).add_(SM3_EPS).rsqrt_().mul_(g)


class SFT(Entries, LayerOptimizer):
    """Adam or SM3 on the values of `SparseDeltaLinear` layers, AdamW on whatever else is trainable.

    Everything happens in `step()`; `total_steps` is needed for the share of entries that still moves, and nothing moves
    beyond it. Freeze the model before `convert` to train the deltas alone. Weight decay pulls the delta to 0, so the
    model to where it started, and is not applied to anything else. Under several processes all choose alike; the first
    update of a phase then counts for candidates with the first process's gradient.
    """

    lr: float = hyper(1e-4, ge=0, doc="step size; regrow='sm3' wants about 10 to 50 times as much")
    regrow: str = hyper("gradient", one_of=("gradient", "sm3"), doc="what tells where new entries grow")
    reselect_every: int = hyper(20, ge=1, doc="updates from one exchange of entries to the next")
    accumulate: int = hyper(5, ge=1, doc="updates at the start of each such period that are summed; fewer than it has")
    rate: float = hyper(0.2, ge=0, le=1, doc="share exchanged, falling to 0; the first time it is 1; 0 for never")
    policy: str = hyper("linear", one_of=("linear", "cosine"), doc="how the share falls")
    total_steps: int = hyper(0, ge=1, doc="updates of the whole run; must be given")

    paper = "Ansell et al. 2024, arXiv:2401.16405"
    works_on = "SparseDeltaLinear"

    def __init__(self, params: Any, lr: float | Tensor | None = None, *, model: Any = None, **options: Any) -> None:
        super().__init__(params, lr, model=model, **options)
        if not any(layer.values in self.state for layer in self.layers.values()):
            raise ValueError("SFT got no values of a SparseDeltaLinear to train; check requires_grad and the groups")
        self._watch()

    @classmethod
    def default_groups(cls, model: nn.Module) -> list[dict[str, Any]]:
        """The deltas, then what `param_groups` says of the rest, undecayed."""
        values = {layer.values for layer in scheduled_layers(model, cls).values()}
        groups = super().default_groups(model)
        deltas = [pair for group in groups for pair in group["params"] if pair[1] in values]
        rest = [{**g, "params": [x for x in g["params"] if x[1] not in values], "weight_decay": 0.0} for g in groups]
        return [{"params": deltas, "name": "deltas"}, *(group for group in rest if group["params"])]

    def inspect_groups(self, groups: list[dict[str, Any]]) -> None:
        """Bare matrices are nothing to warn of: AdamW takes them all."""

    def members(self, index: int) -> list[Member]:
        self._layer_of = {layer.values: layer for layer in self.layers.values()}
        return super().members(index)

    def check_group(self, group: dict[str, Any]) -> None:
        _schedule(group).check()

    def route(self, p: Tensor, name: str, group: dict[str, Any], h: Any) -> Route:
        layer = self._layer_of.get(p)
        if layer is None:
            adamw = AdamW.hypers(group, betas=h.fallback_betas, eps=h.fallback_eps)
            return Route(AdamW, adamw, h.fallback_lr_scale, "it is no sparse delta")
        if p.dtype.itemsize < 4:
            raise TypeError(f"SFT: {name!r} is {p.dtype}, too coarse for small steps: cast the model before convert")
        if h.regrow == "gradient" and not _schedule(group).collects(group["step"]):
            return Route(Entries, Entries.hypers(group), reason="a sparse delta")
        rule = Covered if h.regrow == "sm3" else Collecting
        return Route(rule, rule.hypers(group, rows=layer.out_features, cols=layer.in_features), reason="a sparse delta")

    def extras(self, p: Tensor) -> dict[str, Tensor]:
        layer = self._layer_of.get(p)
        return {} if layer is None else {"indices": layer.indices}

    def finish(self) -> None:
        turned = False
        for group in self.param_groups:
            schedule, done, sums = _schedule(group), group["step"], group["regrow"] == "gradient"
            for p in group["params"]:
                layer = self._layer_of.get(p)
                if layer is None or not p.requires_grad:
                    continue
                if sums and schedule.collects(done - 1):
                    fold(self.state[p], layer, p, group["maximize"])
                if schedule.due(done):
                    self._exchange(p, layer, group)
            turned |= sums and schedule.collects(done) != schedule.collects(done - 1)
        if turned:
            self.relink()
            self._watch()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and what the layers gathered from those that no step has used."""
        super().zero_grad(set_to_none)
        for layer in self.layers.values():
            layer.clear_sums(keep=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._watch()

    def _watch(self) -> None:
        """Have the layers gather for the candidates of the phase that runs, if one does."""
        for layer in self.layers.values():
            layer.watch(self.state.get(layer.values, {}).get("candidates"))

    def _exchange(self, p: Tensor, layer: Any, group: dict[str, Any]) -> None:
        """Entries out and in; the state of each follows it."""
        state, k, covered = self.state[p], p.numel(), group["regrow"] == "sm3"
        count = int(k * _schedule(group).share(group["step"]))
        if covered:  # the cover takes no entry back that was just dropped
            count = min(count, layer.out_features * layer.in_features - k)
        if count < 1:
            return
        drop = p.abs().topk(count, largest=False).indices
        if covered:
            grow = grown_by_cover(state["row"], state["col"], layer.entries(), drop)
        else:
            grow = grown_by_sums(state["candidates"], state["grad_sum"], state["grad_micro"], layer.indices, drop)
        drop, grow = from_first_rank(drop), from_first_rank(grow)  # ties may fall differently on other devices
        source = layer.reselect(group["step"], drop=drop, grow=grow)[p]
        self.note_count(layer)
        if not covered:
            follow(state, layer.indices, source, group["betas"])


def _schedule(group: dict[str, Any]) -> Exchanges:
    return Exchanges(*(group[name] for name in ("reselect_every", "accumulate", "total_steps", "rate", "policy")))
