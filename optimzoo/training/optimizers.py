"""A recipe's optimizer section becomes torch optimizers: a class of the zoo, or torch's own as a baseline."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from optimzoo import registry
from optimzoo.core.hyper import nearest
from optimzoo.core.routing import param_groups
from optimzoo.training.errors import UserError

Options = dict[str, Any]


def check_name(name: str) -> str:
    """`name` when a recipe may use it; ValueError with the nearest known one otherwise."""
    known = [*registry.optimizers(), *BASELINES]
    if name not in known:
        raise ValueError(f"no optimizer is called {name!r}{nearest(name, known)}")
    return name


def build_optimizers(
    model: nn.Module,
    name: str,
    lr: float,
    fallback_lr: float | None,
    options: Mapping[str, Any],
    steps: int | None = None,
) -> list[Optimizer]:
    """The optimizers that together update every trainable parameter once.

    `fallback_lr` is the AdamW learning rate of embeddings, head and vectors, so that methods can be compared with the
    same one; None leaves the method's own rule (`fallback_lr_scale`, 1 for the baselines). An optimizer that must know
    the length of the run is told `steps`, unless its options say something else.
    """
    try:
        if name in BASELINES:
            return BASELINES[name](model, lr, fallback_lr, dict(options))
        kind = registry.optimizers()[name]
        if steps and "total_steps" in kind.options:
            options = {"total_steps": steps, **options}
        if fallback_lr is None:
            return [kind(model, lr=lr, **options)]
        if "fallback_lr_scale" in kind.options:
            return [kind(model, lr=lr, fallback_lr_scale=fallback_lr / lr, **options)]
        return [kind(_groups(model, lr, fallback_lr), lr=lr, **options)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer {name}: {error}") from error


def _groups(model: nn.Module, lr: float, fallback_lr: float | None) -> list[dict[str, Any]]:
    """Plain torch groups: matrices at `lr`, the rest at `fallback_lr`, vectors without decay."""
    groups = []
    for group in param_groups(model):
        rate = fallback_lr if group.get("fallback") and fallback_lr is not None else lr
        decay = {"weight_decay": 0.0} if group.get("weight_decay") == 0 else {}
        groups.append({"params": group["params"], "lr": rate, **decay})
    return groups


def _checked(kind: type[Optimizer], options: Options) -> Options:
    known = {n: p.default for n, p in inspect.signature(kind).parameters.items() if n not in ("params", "lr")}
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


def _made(kind: Callable[..., Optimizer], params: Sequence[Any], options: Options) -> Optimizer:
    """An optimizer whose options torch takes: some are read in a step only, so a toy makes one first."""
    with unset_fake_temporarily():  # a plan's parameters have no values, and some optimizers read theirs
        toy = nn.Parameter(torch.ones(2, 2))
        toy.grad = torch.ones_like(toy)
        try:
            kind([toy], **options).step()
        except Exception as error:  # nothing but the options can be wrong here
            raise ValueError(error) from error
    return kind(params, **options)


def _plain(kind: type[Optimizer], **defaults: Any) -> Callable[..., list[Optimizer]]:
    def build(model: nn.Module, lr: float, fallback_lr: float | None, options: Options) -> list[Optimizer]:
        return [_made(kind, _groups(model, lr, fallback_lr), {"lr": lr} | defaults | _checked(kind, options))]

    return build


def _muon(model: nn.Module, lr: float, fallback_lr: float | None, options: Options) -> list[Optimizer]:
    """Muon for the hidden matrices, with steps of AdamW's size, and AdamW for embeddings, head and vectors."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError("optimizer torch.muon: this torch has no Muon; it came with torch 2.9")
    adam = {name: options.pop(f"fallback_{name}") for name in ("betas", "eps") if f"fallback_{name}" in options}
    if "weight_decay" in options:
        adam["weight_decay"] = options["weight_decay"]
    muon: Options = {"adjust_lr_fn": "match_rms_adamw"} | _checked(torch.optim.Muon, options)
    matrices = [group["params"] for group in param_groups(model) if group["name"] == "matrices"]
    rest = [group for group in _groups(model, lr, fallback_lr) if group["params"] not in matrices]
    return [
        _made(torch.optim.Muon, [p for names in matrices for p in names], {"lr": lr} | muon),
        _made(AdamW, rest, {"lr": lr, "fused": True} | _checked(AdamW, adam)),
    ]


# torch's own optimizers under the names that a recipe may use.
BASELINES: dict[str, Callable[..., list[Optimizer]]] = {
    "torch.adamw": _plain(AdamW, fused=True),
    "torch.sgd": _plain(SGD),
    "torch.adafactor": _plain(Adafactor),
    "torch.muon": _muon,
}
