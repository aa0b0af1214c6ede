"""State in and out with its own dtypes.

torch casts loaded state to the parameter's dtype, which turns float32 averages of bfloat16 weights into bfloat16. Here
the live optimizer decides the dtypes, and a checkpoint that does not fit is refused before anything is written.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimzoo.core.groups import GROUP_KEYS
from optimzoo.core.routing import clean_name, matrix_shape

if TYPE_CHECKING:
    from optimzoo.core.engine import Member
    from optimzoo.core.optimizer import ZooOptimizer

_LIVE_KEYS = frozenset({"params", "param_names", "state_dtype"})  # decided by the running optimizer, not by the file


def load(optimizer: "ZooOptimizer", state_dict: dict[str, Any]) -> None:
    """Groups first, then slots as the loaded groups want them, then their values; on any error nothing has changed."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("this is no optimizer state: a dictionary with 'state' and 'param_groups' was expected")
    saved, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(saved, dict) or not all(isinstance(g, dict) and "params" in g for g in groups):
        raise ValueError("this optimizer state is damaged: 'state' or 'param_groups' is not what torch writes")
    ids = _saved_ids(optimizer, groups)
    before = [dict(group) for group in optimizer.param_groups]
    frozen = [p for p, i in ids.items() if saved.get(i) and p not in optimizer.state]
    try:
        for p in frozen:  # trained once and frozen now: its entry makes it a member
            optimizer.state[p] = {}
        for group, loaded in zip(optimizer.param_groups, groups, strict=True):
            group |= _accepted(optimizer, loaded, [saved.get(i, {}) for i in loaded["params"]])
        members = [m for index in range(len(before)) for m in optimizer.members(index)]
        values = {m.p: _fitting(optimizer, m, saved.get(ids[m.p], {})) for m in members}
        optimizer.admit_state(values)
    except Exception:
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.clear()
            group |= old
        for p in frozen:
            optimizer.state.pop(p, None)
        raise
    for p, slots in values.items():  # slots of other shapes than the loaded options want are made anew
        kept = {k: t for k, t in optimizer.state.get(p, {}).items() if k in slots and t.shape == slots[k].shape}
        optimizer.state[p] = kept
    optimizer.relink()
    for p, slots in values.items():
        for key, value in slots.items():
            optimizer.state[p][key].copy_(value)


def _accepted(optimizer: "ZooOptimizer", loaded: dict[str, Any], states: list[dict]) -> dict[str, Any]:
    """What of a loaded group counts: known options, checked, and bookkeeping. torch's own flags are left out."""
    options = {k: v for k, v in loaded.items() if k in optimizer.options and k not in _LIVE_KEYS}
    # A rate that is a tensor would otherwise be shared with the optimizer that was saved.
    options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    kept = {k: v for k, v in loaded.items() if k in GROUP_KEYS and k not in _LIVE_KEYS}
    # torch counts per parameter; the largest of these counters is the group's.
    kept.setdefault("step", max((int(state["step"]) for state in states if "step" in state), default=0))
    if not isinstance(kept["step"], int):
        raise ValueError(f"this optimizer state is damaged: a group's step is {kept['step']!r}, not a number of steps")
    return optimizer.checked(options) | kept


def _saved_ids(optimizer: "ZooOptimizer", loaded: list[dict[str, Any]]) -> dict[Tensor, int]:
    """Parameter -> its number in the file: by name where both sides have names, else by position."""
    live = optimizer.param_groups
    sizes = [len(g["params"]) for g in live], [len(g["params"]) for g in loaded]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint has groups of {sizes[1]} parameters, this {type(optimizer).__name__} of {sizes[0]}: "
            "build it from the same model and groups"
        )
    return {p: i for ours, theirs in zip(live, loaded, strict=True) for p, i in _pairs(ours, theirs)}


def _pairs(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[Tensor, int]]:
    if "param_names" not in ours or "param_names" not in theirs:
        yield from zip(ours["params"], theirs["params"], strict=True)
        return
    numbers = {clean_name(name): i for name, i in zip(theirs["param_names"], theirs["params"], strict=True)}
    for name, p in zip(ours["param_names"], ours["params"], strict=True):
        if clean_name(name) not in numbers:
            some = ", ".join(list(numbers)[:5])
            raise ValueError(f"the checkpoint has no parameter {clean_name(name)!r}; it has {some}, ...")
        yield p, numbers[clean_name(name)]


def _fitting(optimizer: "ZooOptimizer", member: "Member", saved: dict[str, Any]) -> dict[str, Tensor]:
    """The saved tensors of one parameter, if they are exactly its slots."""
    wanted = member.route.rule.slots(matrix_shape(member.p, member.route.layout), member.route.h)
    if wanted.keys() != saved.keys():
        raise ValueError(
            f"the checkpoint keeps {_listed(saved)} for {member.name!r}, {type(optimizer).__name__} keeps "
            f"{_listed(wanted)}: it was saved by another optimizer or with other options"
        )
    values = {key: torch.as_tensor(value) for key, value in saved.items()}
    for key, value in values.items():
        if tuple(value.shape) != wanted[key].shape:
            raise ValueError(
                f"{key!r} of {member.name!r} is {tuple(value.shape)} in the checkpoint and {wanted[key].shape} here: "
                "the model or an option differs"
            )
    return values


def _listed(keys: Any) -> str:
    return ", ".join(sorted(map(str, keys))) or "nothing"
