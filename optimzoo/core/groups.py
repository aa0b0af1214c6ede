"""What a user hands over -> parameter groups; what no rule can take is refused here, by name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optimzoo.core.shards import refuse_placement
from optimzoo.functional.names import clean_name

# What a group may hold beside options: torch's and schedulers' bookkeeping, and the routing flags.
GROUP_KEYS = frozenset(
    {"params", "param_names", "name", "fallback", "layout", "by_type", "step"}
    | {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
)


def as_groups(params: Any, owner: str) -> list[dict[str, Any]]:
    """Tensors, (name, tensor) pairs or groups -> new group dictionaries with lists of parameters."""
    _refuse_unordered(params)
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"{owner} takes a module, an iterable of parameters or groups, not {type(params).__name__}")
    items = list(params)
    if not items:
        raise ValueError(f"{owner} got no parameters; an iterator such as model.parameters() can be used only once")
    groups = [named(group) for group in (items if isinstance(items[0], dict) else [{"params": items}])]
    if not any(group["params"] for group in groups):
        raise ValueError(f"{owner} got no parameters; all of its groups are empty")
    return groups


def named(group: Any) -> dict[str, Any]:
    """A copy of the group with `params` as tensors and, where (name, tensor) pairs were given, `param_names`."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError("a parameter group is a dictionary with the key 'params'")
    _refuse_unordered(group["params"])
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if params and all(isinstance(item, tuple) for item in params):
        return {**group, "params": [p for _, p in params], "param_names": [name for name, _ in params]}
    return {**group, "params": params}


def refuse_other_names(group: dict[str, Any], others: list[dict[str, Any]], owner: str) -> None:
    """All groups have names for their parameters, or none has."""
    if not others or ("param_names" in group) == ("param_names" in others[0]):
        return
    if "param_names" in others[0]:
        raise ValueError(
            f"{owner}: the groups so far have names, as those made from a module do: give (name, tensor) pairs, such "
            "as layer.named_parameters()"
        )
    raise ValueError(f"{owner}: the groups so far have no names: give tensors alone, or names for all of them")


def _refuse_unordered(params: Any) -> None:
    if isinstance(params, set | frozenset):
        raise TypeError("parameters in a set have no order by which to find their state again: give a list of them")


def names_of(groups: list[dict[str, Any]], index: int) -> list[str]:
    """Names for messages, seeds and the ledger; the position over all groups where none were given."""
    group = groups[index]
    if "param_names" in group:
        return [clean_name(name) for name in group["param_names"]]
    before = sum(len(other["params"]) for other in groups[:index])
    return [str(before + i) for i in range(len(group["params"]))]


def refuse(p: Tensor, name: str, owner: str) -> None:
    """A parameter that no rule can take is refused at construction."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{owner}: parameter {name!r} is no tensor but {type(p).__name__}")
    if p.is_complex():
        raise TypeError(f"{owner}: parameter {name!r} is complex; optimize torch.view_as_real of it instead")
    if not p.is_floating_point():
        raise TypeError(f"{owner}: parameter {name!r} is {p.dtype}; only floating-point parameters can be optimized")
    if p.dtype.itemsize < 2:
        raise TypeError(f"{owner}: parameter {name!r} is {p.dtype}, too coarse to be trained; keep it in bfloat16")
    if p.layout is not torch.strided:
        raise TypeError(f"{owner}: parameter {name!r} is {p.layout}, which is not supported; use dense parameters")
    if any(step == 0 and size > 1 for step, size in zip(p.stride(), p.shape, strict=True)):
        raise TypeError(f"{owner}: elements of parameter {name!r} share memory (expand); give it memory with .clone()")
    refuse_placement(p, name, owner)


class Routes(list):
    """Rows of (name, shape, rule, reason, bytes of state) that print as a table."""

    def __str__(self) -> str:
        rows = [("parameter", "shape", "rule", "bytes", "because")]
        for name, shape, rule, why, held in self:
            rows.append((name, "x".join(map(str, shape)) or "-", rule, f"{held:,}", why))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4])) for row in rows)
