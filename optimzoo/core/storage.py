"""How slots are kept: their dtype, opened to the precision of the computation before the maths and closed after."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optimzoo.core.slots import COARSE_KINDS, Slot
from optimzoo.functional.rounding import stochastic_round_

STATE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(weight: torch.dtype) -> torch.dtype:
    """The precision in which a rule sees gradients and slots: at least float32, the weight's own when wider."""
    return torch.promote_types(weight, torch.float32)


def slot_dtype(slot: Slot, weight: torch.dtype, state_dtype: str | None) -> torch.dtype:
    """The dtype in which a slot is kept."""
    if slot.dtype is not None:
        return slot.dtype
    chosen = STATE_DTYPES[state_dtype] if slot.kind in COARSE_KINDS else None
    return chosen or compute_dtype(weight)


def new_slot(slot: Slot, like: Tensor, state_dtype: str | None, seed: int) -> Tensor:
    """A tensor of its own on the parameter's device, filled as the slot says."""
    tensor = torch.empty(slot.shape, dtype=slot_dtype(slot, like.dtype, state_dtype), device=like.device)
    fill_slot(slot, tensor, seed)
    return tensor


def fill_slot(slot: Slot, tensor: Tensor, seed: int) -> None:
    """Put a slot back to how it starts."""
    if callable(slot.fill):
        slot.fill(tensor, seed)
    else:
        tensor.fill_(slot.fill)


def open_slot(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The slot itself, or a working copy when it is kept more coarsely than `dtype`."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


def close_slot(tensor: Tensor, opened: Tensor, seed: int | Tensor) -> None:
    """Write a working copy back, rounded without bias; nothing to do when the slot itself was used."""
    if opened is not tensor:
        stochastic_round_(tensor, opened, seed)


def on_host(tensor: Tensor) -> bool:
    """Whether the step goes the CPU's way, where reading a tensor costs nothing.

    A fake tensor goes the way of the device that its mode stands for, so that what is planned is what will be run.
    """
    if isinstance(tensor, FakeTensor) and getattr(tensor.fake_mode, "stands_for", "cpu") != "cpu":
        return False
    return tensor.device.type == "cpu"


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to read."""
    return not (isinstance(tensor, FakeTensor) or tensor.device.type == "meta")
