"""FRUGAL: a rule with state in a small part of every matrix, a rule without state in the rest.

Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL", ICML 2025, arXiv:2411.07837.

    every update_gap steps:  P <- a new part;  averages <- 0;  t, the steps since then, starts again at 1
    low = P(g)
    u   = P^-1(full(low, t)) + state_free_lr_scale * free(g - P^-1(low))
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimzoo.core import AdamW, Lists, MatrixOptimizer, Route, Slot, Tensors, hyper
from optimzoo.core.apply import apply_update
from optimzoo.core.hyper import SMALLEST
from optimzoo.core.member import Member
from optimzoo.functional import host_kernel, part_kernel, part_steps
from optimzoo.functional.directions import stateful_direction, stateless_direction
from optimzoo.functional.projection import LOW_RANK, draw_, in_period, part_shapes, put_, rest_of, take, whose_turn
from optimzoo.functional.slices import on_host

PARTS = ("columns", "rows", "randk", "svd", "random", "block")
WAITS, TURN = "not its turn in this period", "its turn in this period"


class FRUGAL(MatrixOptimizer):
    """State for a part of each matrix: for k = max(1, floor(density n + 1e-6)) columns and AdamW, 8 m k + 4 k bytes.

    The part: columns, rows, entries ("randk"), a low-rank basis of the shorter side ("svd" of the period's first
    gradient, or "random"), or whole matrices in turn ("block"). With state_free="none", "svd" is GaLore, its averages
    cleared every period, and "block" is BAdam on single matrices. density=1 is AdamW and density=0 the rule without
    state, to the bit. Signs are full steps from the first one on, so warm up.
    """

    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, doc="decay of the averages; sgdm uses the first")
    eps: float = hyper(1e-8, ge=SMALLEST, doc="added to the root of AdamW's second average")
    density: float = hyper(0.25, ge=0, le=1, doc="the part of each matrix, or of all matrices' bytes, that has state")
    update_gap: int = hyper(200, ge=1, doc="steps between choices of the part")
    projection: str = hyper("columns", one_of=PARTS, doc="what the part consists of")
    state_full: str = hyper("adamw", one_of=("adamw", "lion", "sgdm"), doc="the rule in the part")
    state_free: str = hyper("sign", one_of=("sign", "sgd", "none"), doc="the rule in the rest")
    state_free_lr_scale: float = hyper(1.0, ge=0, doc="the rest's lr as a multiple of lr; 0.1 suits fine-tuning")
    seed: int = hyper(0, ge=0, doc="of all choices, with the parameter's name and the period")

    paper = "Zmushko et al. 2024, arXiv:2411.07837"
    workspace = 2.0

    @staticmethod
    def slots(shape: tuple[int, ...], h: Any) -> dict[str, Slot]:
        part, low = part_shapes(shape, h.projection, h.density)
        kind, dtype = ("basis", None) if len(part) == 2 else ("index", torch.int32)
        chosen = Slot(part, kind, dtype, fill=partial(draw_, kind=h.projection, shape=shape))
        averages = {"exp_avg": Slot(low, "first moment"), "exp_avg_sq": Slot(low, "second moment")}
        return {"part": chosen} | (averages if h.state_full == "adamw" else {"exp_avg": averages["exp_avg"]})

    @staticmethod
    def due(count: int, h: Any) -> bool:
        return count % h.update_gap == 0

    @staticmethod
    def refresh(
        g: Tensor, w: Tensor, h: Any, *, part: Tensor, exp_avg: Tensor, seed: int, exp_avg_sq: Tensor | None = None
    ) -> None:
        draw_(part, seed, kind=h.projection, shape=tuple(g.shape), g=g)
        exp_avg.zero_()
        if exp_avg_sq is not None:
            exp_avg_sq.zero_()

    @staticmethod
    def direction(
        g: Tensor,
        w: Tensor,
        h: Any,
        *,
        part: Tensor,
        exp_avg: Tensor,
        step: float | Tensor,
        exp_avg_sq: Tensor | None = None,
    ) -> Tensor:
        low = take(g, part, h.projection)
        rest = rest_of(g, part, low, h.projection, signed=h.state_free == "sign")
        low = stateful_direction(low, h.state_full, exp_avg, exp_avg_sq, in_period(step, h.update_gap), h.betas, h.eps)
        u = stateless_direction(rest, h.state_free, h.state_free_lr_scale, out=None if rest is g else rest)
        return put_(u, part, low, h.projection)

    @staticmethod
    def fits_host_update(shape: tuple[int, ...], h: Any) -> bool:
        return min(shape) >= host_kernel.NARROW

    @staticmethod
    def host_update(ws: Tensors, gs: Tensors, h: Any, lr: float, *, slots: Lists, steps: list[float]) -> list[bool]:
        since = [in_period(step, h.update_gap) for step in steps]
        averages = host_kernel.Averages(slots["exp_avg"], slots["exp_avg_sq"], since, slots["part"])
        free = h.state_free, h.state_free_lr_scale
        return part_steps.compiled_step_(ws, gs, h, lr, h.projection, averages, free)

    @staticmethod
    def in_place(h: Any, w: Tensor, g: Tensor) -> bool:
        kinds = ("columns", "rows", *LOW_RANK) if on_host(w) else ("columns", "rows")
        return h.state_full == "adamw" and h.projection in kinds and (on_host(w) or part_kernel.takes_parts(w, g))

    own_kernel = staticmethod(part_kernel.takes_parts)

    @staticmethod
    def update(
        ws: Tensors, gs: Tensors, h: Any, lr: float | Tensor, found_inf: Tensor | None, *, slots: Lists, step: float
    ) -> None:
        tau = in_period(step, h.update_gap)
        if not on_host(ws[0]):
            return part_kernel.step_(ws, gs, h, lr, found_inf, h.projection, part_kernel.Averages(**slots, step=tau))
        in_basis = partial(part_steps.step_low_rank_, signed=h.state_free == "sign")
        move = {"columns": part_steps.step_columns_, "rows": part_steps.step_rows_}.get(h.projection, in_basis)
        up = h._replace(weight_decay=0.0)

        def part(g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
            u, counter = torch.zeros_like(g), torch.full((), tau, dtype=torch.float32, device=g.device)
            averages = {"exp_avg": [exp_avg], "exp_avg_sq": [exp_avg_sq], "step": [counter]}
            AdamW.update([u], [g], up, -1.0, None, slots=averages)  # what is at 0 ends at its own direction
            return u

        rest = part_steps.rest_direction(h.state_free, h.state_free_lr_scale, h.maximize)
        change = partial(apply_update, lr=lr, weight_decay=h.weight_decay, ok=None, after=False)
        lists = ws, gs, slots["part"], slots["exp_avg"], slots["exp_avg_sq"]
        for w, g, chosen, exp_avg, exp_avg_sq in zip(*lists, strict=True):
            move(w, g, chosen, exp_avg, exp_avg_sq, part, rest, change)

    def route_matrix(self, p: Tensor, name: str, group: dict[str, Any], h: Any, layout: str) -> Route:
        if 0 < h.density < 1 and h.projection != "block":
            return super().route_matrix(p, name, group, h, layout)
        if h.density == 1:
            return self._stateful(h, group, "density is 1")
        return Route(Stateless, h, reason=WAITS if h.density else "density is 0", periodic=h.density > 0)

    def _stateful(self, h: Any, group: dict[str, Any], reason: str) -> Route:
        if h.state_full == "adamw":
            return Route(AdamW, AdamW.hypers(group), reason=reason)
        return Route(Averaging, h, reason=reason)

    def period(self, group: dict[str, Any]) -> int:
        return group["step"] // group["update_gap"] if group["projection"] == "block" and group["density"] < 1 else 0

    def to_largest_period(self) -> None:
        def held(index: int, group: dict[str, Any], step: int) -> int:
            group["step"] = step
            return sum(m.p.numel() for m in self.members(index) if m.route.reason == TURN)

        for index, group in enumerate(self.param_groups):
            if group["projection"] == "block" and 0 < group["density"] < 1:
                steps = [turn * group["update_gap"] for turn in range(math.ceil(1 / group["density"]))]
                group["step"] = max((held(index, group, step), -step) for step in steps)[1] * -1

    def members(self, index: int) -> list[Member]:
        members, group = super().members(index), self.param_groups[index]
        h, waiting = self.hypers(group), {m.name: m.p.numel() for m in members if m.route.reason == WAITS}
        chosen = whose_turn(waiting, h.density, self.period(group), h.seed) if waiting else set()
        active = replace(self._stateful(h, group, TURN), periodic=True)
        return [replace(m, route=active) if m.name in chosen else m for m in members]


class Averaging(MatrixOptimizer):
    """Lion or momentum on a whole matrix."""

    elementwise = True
    slots = staticmethod(lambda shape, h: {"exp_avg": Slot(shape, "first moment")})

    @staticmethod
    def direction(g: Tensor, w: Tensor, h: Any, *, exp_avg: Tensor) -> Tensor:
        return stateful_direction(g, h.state_full, exp_avg, None, 0, h.betas, h.eps)


class Stateless(MatrixOptimizer):
    """The sign, the gradient or nothing on a whole matrix."""

    elementwise = True
    slots = staticmethod(lambda shape, h: {})

    @staticmethod
    def direction(g: Tensor, w: Tensor, h: Any) -> Tensor:
        return stateless_direction(g, h.state_free, h.state_free_lr_scale)

    @staticmethod
    def host_update(ws: Tensors, gs: Tensors, h: Any, lr: float, *, slots: Lists, steps: list[float]) -> list[bool]:
        return host_kernel.step_(ws, gs, h, lr, "none", free=(h.state_free, h.state_free_lr_scale))

    in_place = staticmethod(lambda h, w, g: on_host(w) or part_kernel.takes_all(w, g))
    own_kernel = staticmethod(part_kernel.takes_all)

    @staticmethod
    def update(ws: Tensors, gs: Tensors, h: Any, lr: float | Tensor, found_inf: Tensor | None, *, slots: Lists) -> None:
        if not on_host(ws[0]):
            return part_kernel.step_(ws, gs, h, lr, found_inf)
        rest = part_steps.rest_direction(h.state_free, h.state_free_lr_scale, h.maximize)
        change = partial(apply_update, lr=lr, weight_decay=h.weight_decay, ok=None, after=False)
        for w, g in zip(ws, gs, strict=True):
            part_steps.step_lines_(w, g, rest, change)
