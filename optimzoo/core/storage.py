"""How slots are kept: their dtype, opened to the precision of the computation before the maths and closed after."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optimzoo.core import shards
from optimzoo.core.slots import COARSE_KINDS, Slot
from optimzoo.functional.quantize import blocks, dequantize, quantize_
from optimzoo.functional.rounding import stochastic_round_
from optimzoo.functional.slices import on_host

STATE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
SCALE = "_scale"  # the codes of `exp_avg` are `exp_avg`, their scales are `exp_avg_scale`
ERROR = "rounding_error"  # what the last rounding of a weight left out
SMALL = 4096  # elements below which int8 saves nothing worth its error

State = dict[str, Tensor]


def compute_dtype(weight: torch.dtype) -> torch.dtype:
    """The precision in which a rule sees gradients and slots: at least float32, the weight's own when wider."""
    return weight if weight == torch.float64 else torch.float32


def slot_dtype(slot: Slot, weight: torch.dtype, state_dtype: str | None) -> torch.dtype:
    """The dtype in which a slot is kept."""
    if slot.dtype is not None:
        return slot.dtype
    chosen = STATE_DTYPES[state_dtype] if slot.kind in COARSE_KINDS else None
    if chosen is torch.int8:
        in_blocks = math.prod(slot.shape) >= SMALL and slot.fill == 0 and not slot.moves
        unsigned = slot.kind == "second moment"
        chosen = (torch.uint8 if unsigned else torch.int8) if in_blocks else None
    return chosen or compute_dtype(weight)


def stored(slots: dict[str, Slot], weight: torch.dtype, state_dtype: str | None) -> dict[str, Slot]:
    """The tensors that are kept for a rule's slots, with their dtypes: codes are followed by their scales."""
    kept: dict[str, Slot] = {}
    for name, slot in slots.items():
        kept[name] = replace(slot, dtype=slot_dtype(slot, weight, state_dtype))
        if slot.dtype is None and not kept[name].dtype.is_floating_point:  # type: ignore[union-attr]  # just given
            kept[name + SCALE] = Slot((blocks(math.prod(slot.shape)),), "scale", torch.float32)
    return kept


def is_scale(name: str, state: Mapping[str, Any]) -> bool:
    """Whether this tensor only says what another one's codes mean."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) in state


def slot_names(state: State) -> list[str]:
    """The rule's own slots: neither the counter nor what the engine keeps beside them."""
    return [name for name in state if name not in ("step", ERROR) and not is_scale(name, state)]


def new_slot(slot: Slot, like: Tensor, state_dtype: str | None, seed: int) -> Tensor:
    """A tensor of its own on the parameter's device, filled as the slot says; of a sharded one, this rank's rows."""
    tensor = shards.empty(slot.shape, slot_dtype(slot, like.dtype, state_dtype), like)
    fill_slot(slot, tensor, seed)
    return tensor


def fill_slot(slot: Slot, tensor: Tensor, seed: int) -> None:
    """Put a slot back to how it starts."""
    if not callable(slot.fill):
        shards.local(tensor).fill_(slot.fill)
    else:
        full = shards.blank(tensor)
        slot.fill(full, seed)
        shards.keep(full, tensor)


def is_coarse(state: State, name: str, dtype: torch.dtype) -> bool:
    """Whether a slot is kept in fewer bits than the rule computes in."""
    narrow = state[name].is_floating_point() and state[name].dtype.itemsize < dtype.itemsize
    return narrow or name + SCALE in state


def open_slot(state: State, name: str, dtype: torch.dtype) -> Tensor:
    """The slot itself, or a working copy when it is kept more coarsely than `dtype`."""
    if name + SCALE in state:
        return dequantize(state[name], state[name + SCALE], dtype)
    return state[name].to(dtype) if is_coarse(state, name, dtype) else state[name]


def close_slot(state: State, name: str, opened: Tensor, seed: int | Tensor, first: int = 0) -> None:
    """Write a working copy back, rounded without bias.

    `first` is the position in the slot of the first element of `state[name]`, which may be a piece of it.
    """
    if name + SCALE in state:
        quantize_(state[name], state[name + SCALE], opened, seed, first)
    else:
        stochastic_round_(state[name], opened, seed, first)


def transfer(source: State, target: State, name: str, seed: int) -> None:
    """Copy one slot between states that may keep it in different ways; to the bit when they keep it alike.

    A collective where their rows are spread over ranks in different ways.
    """
    keys = [key for key in (name, name + SCALE) if key in target]
    same = all(key in source and source[key].dtype == target[key].dtype for key in keys)
    if same and all(shards.alike(source[key], target[key]) for key in keys):
        for key in keys:
            shards.local(target[key]).copy_(shards.local(source[key]))
        return
    full = {key: shards.blank(target[key]) for key in keys}
    _convert({key: shards.whole(source[key]) for key in (name, name + SCALE) if key in source}, full, name, seed)
    for key in keys:
        shards.keep(full[key], target[key])


def _convert(source: State, target: State, name: str, seed: int) -> None:
    codes, scale = target[name], target.get(name + SCALE)
    if scale is not None and name + SCALE in source and source[name].dtype == codes.dtype:
        codes.copy_(source[name])
        scale.copy_(source[name + SCALE])
        return
    values = open_slot(source, name, torch.float32) if name + SCALE in source else source[name]
    if scale is None:
        codes.copy_(values)
    else:
        quantize_(codes, scale, values.to(codes.device), seed)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype for products that need not be exact: bfloat16, but not on a CPU that has no instructions for it.

    There one product of two 512 x 512 matrices takes a hundred times as long as in float32.
    """
    if tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.float32 if on_host(tensor) and not _CPU_HAS_BFLOAT16 else torch.bfloat16


_CPU_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
