"""SST: all singular values of a layer are trained, and a few of its singular vectors at a time.

"Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", 2024, arXiv:2405.15481.

    s   <- max(s - lr Adam(ds), 0)                                  all k = min(m, n) values
    U_a <- U_a - lr ramp Adam(dU_a), columns brought to length 1    r active pairs; V_a alike, by rows
    every resample_every steps:  draw r pairs anew, p_i = (1/k + s_i / sum s) / 2; their state starts afresh
    after ceil(k / r) draws:     U, s, V <- svd(U diag(s) V)
    ramp = min(1, steps since the draw / warmup)
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optimzoo.core import AdamW, Route, Slot, hyper
from optimzoo.core.layers import COUNTER, LayerOptimizer, count_of, scheduled_layers
from optimzoo.core.member import Member
from optimzoo.core.ranks import from_first_rank
from optimzoo.functional.random import fold


class SingularValues(AdamW):
    """AdamW for the singular values of one layer, and the layer's count of draws."""

    @staticmethod
    def slots(shape: tuple[int, ...], h: Any) -> dict[str, Slot]:
        slots = AdamW.slots(shape, h) | {"reselections": COUNTER}
        return {name: replace(slot, moves=slot.shape == shape) for name, slot in slots.items()}  # with their values


class Role(NamedTuple):
    """What a parameter is in its spectral layer, and the layer's place among all of them."""

    part: str
    layer: str
    place: int


def roles_of(layers: dict[str, Any]) -> dict[Tensor, Role]:
    """The parameters of spectral layers."""
    found: dict[Tensor, Role] = {}
    for place, (name, layer) in enumerate(layers.items()):
        found |= {p: Role("vectors", name, place) for p in (layer.U_a, layer.V_a)}
        found[layer.s] = Role("values", name, place)
    return found


class SST(AdamW, LayerOptimizer):
    """Adam on `SpectralLinear` layers, AdamW on the rest: gradients and averages for r(m+n)+k elements of a layer.

    Everything happens in `step()`. The first draw is made at construction; from then on the i-th layer draws i steps
    later than the first, so that no step has to decompose them all. A round takes resample_every * ceil(k / r) steps,
    and a run should have five of them at least. Decay of `s` is decay of the weight; vectors have none. The schedule is
    that of the first group. Under several processes all hold one model, and the first one's decompositions are
    everybody's; DistributedDataParallel need not send frozen vectors at every forward: forward_sync_buffers=False, or
    before torch 2.13 broadcast_buffers=False.
    """

    resample_every: int = hyper(200, ge=1, doc="steps for which a draw of vectors is trained")
    warmup: int = hyper(20, ge=0, doc="steps after a draw in which the vectors' lr rises; at most resample_every")
    sampling: str = hyper(
        "mix", one_of=("mix", "sigma", "uniform", "sequential", "topr"), doc="which vectors are drawn"
    )
    stagger: bool = hyper(True, doc="spread draws and decompositions of the layers over steps")
    vector_lr_scale: float = hyper(1.0, ge=0, doc="the vectors' lr as a multiple of lr")
    seed: int = hyper(0, ge=0, doc="of the draws")

    paper = "2024, arXiv:2405.15481"
    works_on = "SpectralLinear"
    _roles: dict[Tensor, Role]

    def __init__(self, params: Any, lr: float | Tensor | None = None, *, model: Any = None, **options: Any) -> None:
        super().__init__(params, lr, model=model, **options)
        for name, layer in self.layers.items():
            if count_of(layer) == 0 and _trains(layer):
                self._draw(name, 0)

    # Groups and routes.

    @classmethod
    def default_groups(cls, model: nn.Module) -> list[dict[str, Any]]:
        """Vectors, values, then what `param_groups` makes of the rest."""
        roles, rest = roles_of(scheduled_layers(model, cls)), []
        parts: dict[str, list[tuple[str, Tensor]]] = {"vectors": [], "values": []}
        for group in super().default_groups(model):
            others = [(name, p) for name, p in group["params"] if p not in roles]
            for name, p in group["params"]:
                if p in roles:
                    parts[roles[p].part].append((name, p))
            rest += [{**group, "params": others}] if others else []
        first = {"params": parts["vectors"], "name": "singular vectors", "weight_decay": 0.0}
        return [first, {"params": parts["values"], "name": "singular values"}, *rest]

    def inspect_groups(self, groups: list[dict[str, Any]]) -> None:
        given = {p for group in groups for p in group["params"]}
        for p, role in roles_of(self.layers).items():
            if p.requires_grad and p not in given:
                raise ValueError(f"SST: no group holds the singular {role.part} of {role.layer!r}; add its parameters")

    def check_group(self, group: dict[str, Any]) -> None:
        if group["warmup"] > group["resample_every"]:
            raise ValueError(
                f"SST: warmup={group['warmup']} is longer than resample_every={group['resample_every']}, so the full "
                "learning rate would never be reached"
            )

    def members(self, index: int) -> list[Member]:
        self._roles = roles_of(self.layers)
        return super().members(index)

    def route(self, p: Tensor, name: str, group: dict[str, Any], h: Any) -> Route:
        role = self._roles.get(p)
        if role is None:
            fallback = AdamW.hypers(group, betas=h.fallback_betas, eps=h.fallback_eps)
            return Route(AdamW, fallback, h.fallback_lr_scale, "it is in no spectral layer")
        if p.dtype.itemsize < 4:
            raise TypeError(
                f"SST: the singular {role.part} of {role.layer!r} are {p.dtype}, too coarse for them: cast the model "
                "before convert, and use torch.autocast for products in bfloat16"
            )
        if role.part == "vectors":
            return Route(AdamW, AdamW.hypers(group, weight_decay=0.0), h.vector_lr_scale, "singular vectors")
        return Route(SingularValues, SingularValues.hypers(group), reason="singular values")

    # The schedule: a function of the completed steps and the layer's place alone, so that it can be resumed anywhere.

    def clock(self, place: int) -> tuple[int, int]:
        """(number of the draw that a layer trains now, steps that it has trained it)."""
        schedule = self.param_groups[0]
        every, count = schedule["resample_every"], schedule["step"]
        late = place % every if schedule["stagger"] else 0
        draw = max(0, (count - late) // every)
        return draw, count - (late + draw * every if draw else 0)

    def paced(self, member: Member) -> Member:
        role = self._roles.get(member.p)
        if role is None:
            return member
        draw, since = self.clock(role.place)
        fresh = role.part == "vectors" or (draw > 0 and draw % self.layers[role.layer].round == 0)
        if since + 1 >= self.param_groups[0]["warmup"] or not fresh:
            return member
        ramp = (since + 1) / self.param_groups[0]["warmup"]
        return replace(member, route=replace(member.route, lr_scale=member.route.lr_scale * ramp))

    def finish(self) -> None:
        """Bring the factors back to length one and s >= 0; draw anew where it is time. Frozen layers stay."""
        for place, (name, layer) in enumerate(self.layers.items()):
            if not _trains(layer):
                continue
            layer.renormalise()
            draw, since = self.clock(place)
            if draw and since == 0:
                self._draw(name, draw)

    def _draw(self, name: str, draw: int) -> None:
        """Let one layer choose its vectors; state that is about other vectors now starts afresh, the rest follows."""
        layer, schedule = self.layers[name], self.param_groups[0]
        try:
            moved = layer.reselect(draw, seed=fold(schedule["seed"], name, draw), sampling=schedule["sampling"])
        except torch.linalg.LinAlgError as error:
            raise RuntimeError(f"SST: {name!r} cannot be decomposed, it holds NaN or infinity") from error
        if moved[layer.s] is None and count_of(layer):  # signs of vectors may differ from device to device
            for tensor in layer.state_dict().values():
                from_first_rank(tensor)
        for p, source in moved.items():
            if p not in self.state:
                continue  # frozen by the user
            if source is None:
                self.forget(p)
            else:
                for key in ("exp_avg", "exp_avg_sq"):
                    self.state[p][key].copy_(self.state[p][key][source])
        self.note_count(layer)


def _trains(layer: Any) -> bool:
    return any(p.requires_grad for p in (layer.U_a, layer.V_a, layer.s))
