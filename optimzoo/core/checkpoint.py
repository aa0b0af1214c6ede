"""State in and out with its own dtypes.

torch casts loaded state to the parameter's dtype, which turns float32 averages of bfloat16 weights into bfloat16. Here
the live optimizer decides the dtypes, and a checkpoint that does not fit is refused before anything is written.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimzoo.core.groups import GROUP_KEYS
from optimzoo.core.hyper import shown
from optimzoo.core.member import Member, specs
from optimzoo.core.routing import LAYOUTS
from optimzoo.core.shards import local
from optimzoo.core.slots import COARSE_KINDS
from optimzoo.core.storage import ERROR, SCALE, is_scale, transfer
from optimzoo.functional.names import clean_name
from optimzoo.functional.quantize import blocks
from optimzoo.functional.random import fold

if TYPE_CHECKING:
    from optimzoo.core.optimizer import ZooOptimizer

# Decided by the running optimizer, not by the file.
_LIVE_KEYS = frozenset({"params", "param_names", "state_dtype", "rounding", "engine"})
_KINDS: dict[str, Any] = {"step": int, "name": (str, int), "layout": str, "fallback": bool, "by_type": bool}


def load(optimizer: "ZooOptimizer", state_dict: dict[str, Any]) -> None:
    """Groups first, then slots as the loaded groups want them, then their values; on any error nothing has changed."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("this is no optimizer state: a dictionary with 'state' and 'param_groups' was expected")
    saved, groups = state_dict["state"], state_dict["param_groups"]
    if not _sound(saved, groups):
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
        held = optimizer.state.get(p, {})
        optimizer.state[p] = {k: t for k, t in held.items() if k not in slots or t.shape == slots[k].shape}
    optimizer.relink()
    for member in members:
        saved_slots, live = values[member.p], optimizer.state[member.p]
        for key in (k for k in live if not is_scale(k, live) and k in saved_slots):
            transfer(saved_slots, live, key, fold(0, member.name, key))
        if ERROR in live and ERROR not in saved_slots:
            local(live[ERROR]).zero_()


def adopt_groups(optimizer: "ZooOptimizer", groups: list[dict[str, Any]]) -> None:
    """Take over options and counts of saved groups, and make room for the slots that these want."""
    for group, loaded in zip(optimizer.param_groups, groups, strict=True):
        group |= _accepted(optimizer, loaded, [])
    optimizer.relink()


def _sound(saved: Any, groups: Any) -> bool:
    """Whether the outlines are those that torch writes: numbers of parameters, names, tensors or numbers by name."""
    if not isinstance(saved, dict) or not isinstance(groups, list | tuple):
        return False
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list | tuple):
            return False
        names = group.get("param_names", [])
        if not isinstance(names, list | tuple):
            return False
        if not all(isinstance(i, int | str) for i in group["params"]) or not all(isinstance(n, str) for n in names):
            return False
    return all(
        isinstance(slots, dict) and all(isinstance(key, str) and _plain(value) for key, value in slots.items())
        for slots in saved.values()
    )


def _plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout is torch.strided and not value.is_complex()
    return isinstance(value, int | float) and abs(value) < 2**63


def _accepted(optimizer: "ZooOptimizer", loaded: dict[str, Any], states: list[dict]) -> dict[str, Any]:
    """What of a loaded group counts: known options, checked, and bookkeeping. torch's own flags are left out."""
    options = {k: v for k, v in loaded.items() if k in optimizer.options and k not in _LIVE_KEYS}
    # A rate that is a tensor would otherwise be shared with the optimizer that was saved.
    options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    kept = {k: v for k, v in loaded.items() if k in GROUP_KEYS and k not in _LIVE_KEYS}
    # torch counts per parameter; the largest of these counters is the group's.
    counters = [torch.as_tensor(state["step"]) for state in states if "step" in state]
    if any(t.numel() != 1 or not torch.isfinite(t).all() for t in counters):
        raise ValueError("this optimizer state is damaged: 'step' of a parameter is no number of steps")
    kept.setdefault("step", max(map(int, counters), default=0))
    for key, value in kept.items():
        if not isinstance(value, _KINDS.get(key, (int, float, Tensor))) or (key == "layout" and value not in LAYOUTS):
            raise ValueError(f"this optimizer state is damaged: {key!r} of a group is {shown(value)}")
    if not 0 <= kept["step"] < 2**63:
        raise ValueError(f"this optimizer state is damaged: a group's step is {shown(kept['step'])}")
    return optimizer.checked(options) | kept


def _saved_ids(optimizer: "ZooOptimizer", loaded: list[dict[str, Any]]) -> dict[Tensor, int]:
    """Parameter -> its number in the file: by name where both sides have names of their own, else by position."""
    live = optimizer.param_groups
    sizes = [len(g["params"]) for g in live], [len(g["params"]) for g in loaded]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint has groups of {sizes[1]} parameters, this {type(optimizer).__name__} of {sizes[0]}: "
            "build it from the same model and groups"
        )
    return {p: i for ours, theirs in zip(live, loaded, strict=True) for p, i in _pairs(ours, theirs)}


def _pairs(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[Tensor, int]]:
    names, saved = ([clean_name(name) for name in group.get("param_names", [])] for group in (ours, theirs))
    if "param_names" in theirs and len(saved) != len(theirs["params"]):
        raise ValueError("this optimizer state is damaged: a group has not as many names as parameters")
    if any(len(set(side)) < len(ours["params"]) for side in (names, saved)):  # none, or one name twice
        yield from zip(ours["params"], theirs["params"], strict=True)
        return
    numbers = dict(zip(saved, theirs["params"], strict=True))
    for name, p in zip(names, ours["params"], strict=True):
        if name not in numbers:
            raise ValueError(f"the checkpoint has no parameter {name!r}; it has {', '.join(saved[:5])}, ...")
        yield p, numbers[name]


def _fitting(optimizer: "ZooOptimizer", member: Member, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The saved tensors of one parameter, if they are exactly its slots, in whatever dtype or codes."""
    every = specs(member)
    wanted = {key: slot.shape for key, slot in every.items() if key != ERROR and not is_scale(key, every)}
    found = {key for key in saved if key != ERROR and not is_scale(key, saved)}
    if wanted.keys() != found:
        raise ValueError(
            f"the checkpoint keeps {_listed(found)} for {member.name!r}, {type(optimizer).__name__} keeps "
            f"{_listed(wanted)}: it was saved by another optimizer or with other options"
        )
    shapes = wanted | {ERROR: tuple(member.p.shape)}
    shapes |= {key + SCALE: (blocks(math.prod(shape)),) for key, shape in wanted.items()}
    values = {key: value if isinstance(value, Tensor) else torch.as_tensor(value) for key, value in saved.items()}
    for key, value in values.items():
        if tuple(value.shape) != shapes[key]:
            raise ValueError(
                f"{key!r} of {member.name!r} is {tuple(value.shape)} in the checkpoint and {shapes[key]} here: "
                "the model or an option differs"
            )
        dtype = every[key].dtype if key in every else None
        whole = dtype is not None and not dtype.is_floating_point and every[key].kind not in COARSE_KINDS
        if whole and value.is_floating_point():
            raise ValueError(f"{key!r} of {member.name!r} is {value.dtype} in the checkpoint, and whole numbers here")
        if value.dtype in (torch.int8, torch.uint8) and every[key].kind in COARSE_KINDS and key + SCALE not in saved:
            raise ValueError(f"the checkpoint has codes for {key!r} of {member.name!r} without {key + SCALE!r}")
    return values


def _listed(keys: Any) -> str:
    return ", ".join(sorted(map(str, keys))) or "nothing"
