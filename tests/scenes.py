"""Random models, options and gradients: what a user could hand over, as plain data that a failing test can print."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from optimzoo.core import ZooOptimizer
from optimzoo.core.hyper import Hyper
from optimzoo.modules import Replacement, convert, kinds
from tests.cases import ALL, bare

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SHAPES = {
    **{"scalar": (), "empty": (0,), "vector": (5,), "row": (1, 6), "column": (6, 1), "no columns": (3, 0)},
    **{"no rows": (0, 3), "square": (8, 8), "wide": (4, 24), "tall": (24, 4), "large": (16, 40), "thin": (40, 2)},
    **{"experts": (2, 8, 8), "one expert": (1, 8, 8), "expert rows": (3, 1, 8), "five axes": (2, 2, 2, 2, 2)},
}
LINEARS = {
    **{"linear": (8, 12), "linear tall": (24, 8)},
    **{"linear row": (1, 9), "linear column": (9, 1), "linear one": (1, 1)},
}
MODULES = {
    **{name: lambda shape=shape: nn.Linear(shape[1], shape[0]) for name, shape in LINEARS.items()},
    **{"no bias": lambda: nn.Linear(8, 8, bias=False), "embedding": lambda: nn.Embedding(9, 8)},
    **{"norm": lambda: nn.LayerNorm(8), "tied": lambda: Tied(), "conv": lambda: nn.Conv2d(4, 8, 3)},
    "depthwise": lambda: nn.Conv1d(8, 8, 3, groups=8),
    "conv transposed": lambda: nn.ConvTranspose2d(4, 8, 3),
    "channels last": lambda: with_weight(nn.Conv2d(4, 8, 3), lambda w: w.contiguous(memory_format=torch.channels_last)),
    "turned": lambda: with_weight(nn.Linear(12, 10), lambda w: w.T.contiguous().T),
    "holes": lambda: with_weight(nn.Linear(8, 9), lambda w: torch.cat([w, w])[::2]),
}
FINITE = ("normal", "normal", "none", "zero", "one", "huge", "subnormal", "constant")
BAD = ("nan", "inf", "overflow")
TINY = torch.finfo(torch.float32).tiny


class Bare(nn.Module):
    """One parameter of a shape that no layer has."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight


def with_weight(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    module.weight = nn.Parameter(change(module.weight.detach()))
    return module


@dataclass(frozen=True)
class Scene:
    """One case. `gradients` holds one row for each step; parameter i takes the row's entry i, round and round."""

    cls: str
    pieces: tuple[tuple[str, str], ...]
    given: str
    options: dict[str, Any]
    layer: dict[str, Any]
    frozen: tuple[bool, ...]
    gradients: tuple[tuple[str, ...], ...]
    stop: int
    seed: int

    @property
    def kind(self) -> type[ZooOptimizer]:
        return ALL[self.cls]

    @property
    def poisoned(self) -> bool:
        """Whether a gradient that is not finite is let through on purpose."""
        return self.options.get("check_finite") is False and any(k in BAD for row in self.gradients for k in row)

    def model(self) -> nn.Module:
        """Always the same one."""
        before = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element")
            torch.default_generator.manual_seed(self.seed)
            model = nn.Module()
            try:
                for i, (piece, dtype) in enumerate(self.pieces):
                    torch.set_default_dtype(DTYPES[dtype])  # fake parameters cannot be cast later
                    made = MODULES[piece]() if piece in MODULES else Bare(SHAPES[piece])
                    model.add_module(f"{piece.replace(' ', '_')}_{i}", made)
            finally:
                torch.set_default_dtype(torch.float32)
                torch.set_rng_state(before)
            for p, frozen in zip(model.parameters(), self.frozen * 99, strict=False):
                p.requires_grad_(not frozen)
        if self.kind.needs_model:
            convert(model, _layers_of(self.kind), **self.layer)
        return model

    def optimizer(self, model: nn.Module) -> ZooOptimizer:
        with bare():
            if self.kind.needs_model or self.given == "module":
                return self.kind(model, **self.options)
            named = list(model.named_parameters())
            if self.given == "names":
                return self.kind(named, **self.options)
            if self.given == "bare":
                return self.kind(model.parameters(), **self.options)
            if len(named) < 2:  # torch wants names in all groups or in none, and an empty one has none
                return self.kind(named, **self.options)
            half = len(named) // 2
            first, second = {"params": named[:half], "lr": 1e-3}, {"params": named[half:], "fallback": True}
            return self.kind([first, second], **self.options)

    def give(self, model: nn.Module, opt: ZooOptimizer, step: int) -> dict[str, str]:
        """Set every gradient for this step; name -> what sort of gradient it got, "none" where there is none."""
        opt.zero_grad()
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        _backward(model, generator)
        row = self.gradients[step % len(self.gradients)]
        got = {}
        for i, (name, p) in enumerate(model.named_parameters()):
            got[name] = row[i % len(row)] if p.requires_grad else "none"
            fed = p.grad is not None and got[name] in ("normal", "nan", "inf")
            g = p.grad if fed else gradient(p, got[name], step, generator, self.options.get("state_dtype"))
            p.grad = poison(g, got[name], step)
        return got


def _layers_of(cls: type[ZooOptimizer]) -> type[Replacement]:
    return next(kind for kind in kinds().values() if getattr(kind, "driver", None) == cls.__name__)


def _backward(model: nn.Module, generator: torch.Generator) -> None:
    """Through the converted layers, which gather more than `p.grad` in it."""
    for module in model.modules():
        if isinstance(module, Replacement):
            weight = module.base.weight if hasattr(module, "base") else module.s
            x = torch.randn(7, module.in_features, generator=generator).to(weight.dtype)
            y = module(x)
            if y.requires_grad:
                (y.double() * torch.randn(y.shape, generator=generator)).sum().backward()


def gradient(
    p: Tensor, kind: str, step: int, generator: torch.Generator, state_dtype: str | None = None
) -> Tensor | None:
    """A gradient of the parameter's shape and dtype, and in its layout where that is dense."""
    if kind == "none":
        return None
    limits, n = torch.finfo(p.dtype), max(p.numel(), 1)
    wide = torch.finfo(torch.promote_types(p.dtype, torch.float32) if state_dtype is None else torch.float32)
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    if kind == "zero":
        noise.zero_()
    elif kind == "constant":
        noise.fill_(0.5)
    elif kind == "one" and p.numel():
        noise = torch.zeros(n, dtype=torch.float64).index_fill_(0, torch.tensor(7 * step % n), -1.0).view(p.shape)
    elif kind == "huge":
        noise.sign_().mul_(min(0.9 * limits.max, 0.1 * (wide.max / n) ** 0.5))
    elif kind == "subnormal":
        noise.sign_().mul_(limits.smallest_normal / 2)
    elif kind == "overflow":
        noise.sign_().mul_(0.9 * limits.max)
    return torch.empty_like(p, memory_format=torch.preserve_format).detach().copy_(noise)


def poison(g: Tensor | None, kind: str, step: int) -> Tensor | None:
    if g is not None and g.numel() and kind in ("nan", "inf"):
        g[tuple(step % size for size in g.shape)] = float(kind)
    return g


# What hypothesis draws from.


def edges(option: Hyper) -> list[Any]:
    """Values of an option: its default, its bounds and just inside of them, and something usual between."""
    if option.one_of:
        return list(option.one_of)
    example = option.default[0] if isinstance(option.default, tuple) else option.default
    if isinstance(example, bool):
        return [True, False]
    if example is None:  # density, entries, lora_rank: given on their own
        return []
    if isinstance(example, str):
        return [option.default]
    if isinstance(example, int):
        low = 0 if option.ge is None else int(option.ge)
        return [low, low + 1, 3, 10**9]
    values = [v for v in (option.ge, option.le) if v is not None]
    values += [0.999999999 * option.lt] if option.lt is not None else []
    values += [TINY] if option.gt is not None else []
    top = min(x for x in (option.lt, option.le, 2.0) if x is not None)
    values += [v for v in (1e-3, 0.5, 1.0) if v < top]
    if isinstance(option.default, tuple):
        # A second average that forgets at once beside a first one that does not: steps of g / eps, by definition.
        return [option.default] + [(a, b) for a in values for b in values if b > 0 or a == 0]
    return [option.default, *values]


def options_of(cls: type[ZooOptimizer]) -> dict[str, list[Any]]:
    """Option -> values. Rates stay small: no rule can keep a float16 weight finite against a step of 1e4."""
    found = {name: edges(option) for name, option in cls.options.items()}
    found["lr"] = [0.0, 1e-3, 2e-2, 2e-2]
    found["weight_decay"] = [0.0, 0.1, 1.0]
    return found


LAYER_OPTIONS = {
    "SST": [{"rank": 1}, {"rank": 3}, {"rank": 10**9}, {"rank": 2, "enhanced": False}, {"rank": 2, "recompute": True}],
    "SFT": [{"density": 1.0}, {"density": 0.2}, {"entries": 40}, {"lora_rank": 1}, {"density": 1e-9}],
}


@st.composite
def scenes(draw: Any, classes: tuple[str, ...] = tuple(ALL), gradients: tuple[str, ...] = FINITE + BAD) -> Scene:
    """Cases over classes, shapes, dtypes, options at their bounds, and gradients that change between steps."""
    name = draw(st.sampled_from(classes))
    cls = ALL[name]
    known = [*MODULES] if cls.needs_model else [*SHAPES, *MODULES]
    pieces = draw(st.lists(st.tuples(st.sampled_from(known), st.sampled_from([*DTYPES])), min_size=1, max_size=4))
    if cls.needs_model:
        pieces = [(draw(st.sampled_from([*LINEARS])), draw(st.sampled_from([*DTYPES]))), *pieces]
    table = options_of(cls)
    chosen = draw(st.lists(st.sampled_from(sorted(table)), max_size=4, unique=True))
    options = {option: draw(st.sampled_from(table[option])) for option in chosen}
    if draw(st.booleans()):
        options["state_dtype"] = draw(st.sampled_from(table["state_dtype"]))
    if options.get("rounding") == "stochastic":  # refused by name for these
        pieces = [
            (piece, dtype.replace("float16", "float32") if dtype == "float16" else dtype) for piece, dtype in pieces
        ]
    if "total_steps" in table:
        options = {"reselect_every": 3, "accumulate": 1, "total_steps": draw(st.sampled_from([1, 2, 5, 100]))} | options
    if "resample_every" in table:
        options = {"resample_every": draw(st.sampled_from([1, 2, 3])), "warmup": 1} | options
    if "update_gap" in table:
        options = {"update_gap": draw(st.sampled_from([1, 2, 200]))} | options
    row = st.lists(st.sampled_from(gradients), min_size=1, max_size=3).map(tuple)
    return Scene(
        name,
        tuple(pieces),
        draw(st.sampled_from(["module", "module", "names", "bare", "groups"])),
        options,
        draw(st.sampled_from(LAYER_OPTIONS.get(cls.__name__, [{}]))),
        tuple(draw(st.lists(st.booleans(), min_size=1, max_size=2).map(lambda row: [False, *row]))),
        tuple(draw(st.lists(row, min_size=2, max_size=5))),
        draw(st.integers(0, 4)),
        draw(st.integers(0, 3)),
    )
