"""A recipe's optimizer section becomes torch optimizers: a class of the zoo, or a baseline."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from optimzoo import registry
from optimzoo.training.baselines import BASELINES, groups
from optimzoo.training.errors import UserError


def check_name(name: str, more: Iterable[str] = ()) -> str:
    """`name` as the registries have it, or `more`; ValueError with the nearest known one otherwise."""
    return registry.named(name, [*registry.optimizers(), *BASELINES, *more])


def missing(name: str) -> str | None:
    """What to install before the optimizer `name` can be used, in words; None when nothing is missing."""
    package = BASELINES[name].missing if name in BASELINES else None
    return package and f"{name} needs {package}: pip install 'optimzoo[baselines]'"


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
    if lacking := missing(name):
        raise UserError(lacking)
    try:
        if name in BASELINES:
            return BASELINES[name].build(model, lr, fallback_lr, dict(options))
        kind = registry.optimizers()[name]
        if steps and "total_steps" in kind.options:
            options = {"total_steps": steps, **options}
        if fallback_lr is None:
            return [kind(model, lr=lr, **options)]
        if "fallback_lr_scale" in kind.options:
            return [kind(model, lr=lr, fallback_lr_scale=fallback_lr / lr, **options)]
        return [kind(groups(model, lr, fallback_lr), lr=lr, **options)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer {name}: {error}") from error
