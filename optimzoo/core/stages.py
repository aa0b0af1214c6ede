"""Calling a rule's functions: what they ask for, their slots open meanwhile."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optimzoo.core.storage import ERROR, State, close_slot, compute_dtype, open_slot, slot_names


@functools.cache
def keywords(rule_function: Callable) -> frozenset[str]:
    """The slots (and `step`, `seed`) that a rule's function asks for: its keyword-only arguments.

    One with a default is a slot that only some options keep.
    """
    parameters = inspect.signature(rule_function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def asked(rule_function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given that the function asks for."""
    return {name: given[name] for name in keywords(rule_function) if name in given}


def first_stage(rule: Any) -> Callable:
    """The function of a rule that sees the gradient and the slots."""
    return rule.direction if rule.prepare is None else rule.prepare


def run_first(
    rule: Any,
    h: Any,
    names: frozenset[str],
    g: Tensor,
    w: Tensor,
    state: State,
    given: dict[str, Any],
    seed_of: Callable[[int], int | Tensor],
    ok: Tensor | None,
    first: int = 0,
    refresh: Callable[[Tensor, Mapping[str, Any]], None] | None = None,
) -> Any:
    """A rule's first stage on a matrix, or on a piece of an element-wise parameter; its slots are open meanwhile.

    The stage asks for `names`, which are slots or in `given`; `seed_of` a slot's number is the seed of its rounding.
    Whatever changes from step to step may be a tensor, so that this can be compiled.
    """
    # Where only the device knows whether the step counts, the slots are kept as they were.
    before = {} if ok is None else {name: state[name].clone() for name in state if name not in ("step", ERROR)}
    g = g.to(compute_dtype(w.dtype))
    if h.maximize:
        g = -g
    slots = {name: open_slot(state, name, g.dtype) for name in slot_names(state)}
    given = slots | given
    if refresh is not None:
        refresh(g, given)
    result = first_stage(rule)(g, w, h, **{name: given[name] for name in names if name in given})
    for number, (name, opened) in enumerate(slots.items()):
        if opened is not state[name]:
            close_slot(state, name, opened, seed_of(number), first)
    if ok is not None:
        for name, old in before.items():
            torch.where(ok, state[name], old, out=state[name])  # written in place, without a third copy
    return result
