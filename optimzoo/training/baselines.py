"""Optimizers that are not ours under the names that a recipe may use: torch's own, and those of other packages."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from optimzoo.core.hyper import nearest
from optimzoo.core.routing import param_groups
from optimzoo.training.errors import UserError

Options = dict[str, Any]
Build = Callable[[nn.Module, float, float | None, Options], list[Optimizer]]


@dataclass(frozen=True)
class Baseline:
    """How a baseline is built, and the modules of other packages (by the package's name) without which it is not."""

    build: Build
    modules: tuple[str, ...] = ()
    package: str = ""

    @property
    def missing(self) -> str | None:
        """The package to install, None when nothing is missing."""
        return None if all(find_spec(name) for name in self.modules) else self.package


def groups(model: nn.Module, lr: float, fallback_lr: float | None) -> list[Options]:
    """Plain torch groups: matrices at `lr`, the rest at `fallback_lr`, vectors without decay."""
    made = []
    for group in param_groups(model):
        rate = fallback_lr if group.get("fallback") and fallback_lr is not None else lr
        decay = {"weight_decay": 0.0} if group.get("weight_decay") == 0 else {}
        made.append({"params": group["params"], "lr": rate, **decay})
    return made


def _checked(kind: type[Optimizer], options: Options, more: Options | None = None) -> Options:
    """Options that `kind` takes, or that a group of it takes (`more`, with their defaults); others are refused."""
    named = [p for p in inspect.signature(kind).parameters.values() if p.kind != p.VAR_KEYWORD]
    known = {p.name: p.default for p in named if p.name not in ("params", "lr")} | (more or {})
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"no option is called {name!r}{nearest(name, known)}")
        if not _like(value, known[name]):
            default = list(known[name]) if isinstance(known[name], tuple) else known[name]
            raise TypeError(f"{name}={value!r} must be like its default {default}")
    return options


def _like(value: Any, default: Any) -> bool:
    """Whether `value` is of the default's sort: a truth value, a number, or as many numbers; None says nothing."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(map(_like, value, default))
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and (default is None or isinstance(default, bool))
    return not isinstance(default, int | float) or isinstance(value, int | float)


def _made(kind: Callable[..., Optimizer], params: Sequence[Any], options: Options, group: Options) -> Optimizer:
    """An optimizer whose options its package takes: some are read in a step only, so a toy makes one first."""
    with unset_fake_temporarily():  # a plan's parameters have no values, and some optimizers read theirs
        toy = nn.Parameter(torch.ones(2, 2))
        toy.grad = torch.ones_like(toy)
        try:
            kind([{"params": [toy], **group}], **options).step()
        except Exception as error:  # nothing but the options can be wrong here
            raise ValueError(error) from error
    return kind(params, **options)


def _everything(kind: type[Optimizer], **defaults: Any) -> Build:
    """One optimizer for every parameter."""

    def build(model: nn.Module, lr: float, fallback_lr: float | None, options: Options) -> list[Optimizer]:
        return [_made(kind, groups(model, lr, fallback_lr), {"lr": lr} | defaults | _checked(kind, options), {})]

    return build


def everything_of(module: str, name: str) -> Build:
    """The same with a class of a package that may be missing."""
    return lambda *how: _everything(class_of(module, name)())(*how)


def matrices_only(
    kind: Callable[[], type[Optimizer]], group: Options | None = None, keep: Any = None, **defaults: Any
) -> Build:
    """`kind()` for the hidden matrices, and AdamW for embeddings, heads and vectors, as the zoo does it.

    `group` holds the options that the package reads from its groups, with their defaults, and `keep` makes the objects
    in its state that no checkpoint may hold.
    """
    more = group or {}

    def build(model: nn.Module, lr: float, fallback_lr: float | None, options: Options) -> list[Optimizer]:
        cls = kind()
        adam = {name: options.pop(f"fallback_{name}") for name in ("betas", "eps") if f"fallback_{name}" in options}
        if "weight_decay" in options:
            adam["weight_decay"] = options["weight_decay"]
        given = defaults | _checked(cls, options, more)
        in_group = {name: given.pop(name, default) for name, default in more.items()}
        matrices = [part["params"] for part in param_groups(model) if part["name"] == "matrices"]
        rest = [part for part in groups(model, lr, fallback_lr) if part["params"] not in matrices]
        named = [pair for pairs in matrices for pair in pairs]
        first = _made(cls, [{"params": named, **in_group}], {"lr": lr} | given, in_group)
        if keep is not None:
            _as_plain_state(first, keep)
        return [first, _made(AdamW, rest, {"lr": lr, "fused": True} | _checked(AdamW, adam), {})]

    return build


def _as_plain_state(optimizer: Optimizer, make: Callable[[Any, Options, Options], Any]) -> None:
    """Let checkpoints hold the numbers and tensors of the projectors in the state, not the objects themselves."""

    def plain(projector: Any) -> Options:  # the words in it are options of the group, and torch loads no words
        return {name: value for name, value in vars(projector).items() if not isinstance(value, str)}

    def pack(_: Optimizer, saved: Options) -> None:
        saved["state"] = {
            index: {key: plain(value) if key == "projector" else value for key, value in slots.items()}
            for index, slots in saved["state"].items()
        }

    def unpack(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for slots in (optimizer.state[p] for p in group["params"]):
                if isinstance(slots.get("projector"), dict):
                    projector = make(optimizer, group, slots)
                    vars(projector).update(slots["projector"])
                    slots["projector"] = projector

    optimizer.register_state_dict_post_hook(pack)
    optimizer.register_load_state_dict_post_hook(unpack)


def _muon(model: nn.Module, lr: float, fallback_lr: float | None, options: Options) -> list[Optimizer]:
    """Muon with steps of AdamW's size."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError("optimizer torch.muon: this torch has no Muon; it came with torch 2.9")
    build = matrices_only(lambda: torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    return build(model, lr, fallback_lr, options)


def _adamw8bit(model: nn.Module, lr: float, fallback_lr: float | None, options: Options) -> list[Optimizer]:
    """torchao's eight-bit AdamW. It compiles each shape's step; on the CPU that takes longer than a small run does."""
    from torchao.optim import AdamW8bit

    class Eager(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    return _everything(Eager if on_cpu else AdamW8bit)(model, lr, fallback_lr, options)


def class_of(module: str, name: str) -> Callable[[], type[Optimizer]]:
    """A class of a package that is imported when the class is asked for."""
    return lambda: getattr(importlib.import_module(module), name)


def _galore_projector(_: Optimizer, group: Options, slots: Options) -> Any:
    module = importlib.import_module("galore_torch.galore_projector")
    return module.GaLoreProjector(**{name: group[name] for name in _GALORE})


def _apollo_projector(optimizer: Any, group: Options, slots: Options) -> Any:
    return optimizer._initialize_projector(group, slots)


_GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
_APOLLO = {**_GALORE, "rank": 256, "scale": 1.0, "proj": "random", "scale_type": "channel"}

BASELINES = {
    "torch.adamw": Baseline(_everything(AdamW, fused=True)),
    "torch.sgd": Baseline(_everything(SGD)),
    "torch.adafactor": Baseline(_everything(Adafactor)),
    "torch.muon": Baseline(_muon),
    "torchao.adamw8bit": Baseline(_adamw8bit, ("torchao",), "torchao"),
    "galore": Baseline(
        matrices_only(
            class_of("galore_torch", "GaLoreAdamW"), _GALORE, _galore_projector, no_deprecation_warning=True, eps=1e-8
        ),
        ("galore_torch", "bitsandbytes"),  # galore-torch imports bitsandbytes, also where nothing of it is used
        "galore-torch",
    ),
    "apollo": Baseline(
        matrices_only(class_of("apollo_torch", "APOLLOAdamW"), _APOLLO, _apollo_projector, eps=1e-8),
        ("apollo_torch", "bitsandbytes"),
        "apollo-torch",
    ),
    "soap": Baseline(matrices_only(class_of("pytorch_optimizer", "SOAP")), ("pytorch_optimizer",), "pytorch_optimizer"),
}
