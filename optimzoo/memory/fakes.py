"""Models and batches as fake tensors: shapes and dtypes without values."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from optimzoo.memory.reach import plain_tensors


class StandIn(FakeTensorMode):
    """Fake tensors that know for which device they stand: without one, its tensors cannot be faked under its name."""

    def __init__(self, stands_for: str) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.stands_for = stands_for


def device_of(model: nn.Module | Callable[[], nn.Module]) -> str:
    """The type of the device that the model is on; the CPU's for one that is nowhere yet."""
    kinds = (p.device.type for p in model.parameters()) if isinstance(model, nn.Module) else iter(())
    return next((kind for kind in kinds if kind != "meta"), "cpu")


def fake_model(model: nn.Module | Callable[[], nn.Module], mode: FakeTensorMode) -> nn.Module:
    """The model that the function builds, or a copy of the module, with fake tensors; in training mode."""
    if not isinstance(model, nn.Module):
        try:
            return model().train()
        except RuntimeError as error:
            if "swap" not in str(error):
                raise
            text = "plan: a fake model cannot be converted or moved (.to, .bfloat16): build it in its dtype at once"
            raise ValueError(text) from error
    memo: dict[int, Any] = {}
    for t in {id(t): t for t in (*model.parameters(), *model.buffers(), *plain_tensors(model))}.values():
        fake = fake_tensor(t.detach(), mode)
        memo[id(t)] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
    return copy.deepcopy(model, memo).train()


def fake_tensor(t: Tensor, mode: FakeTensorMode) -> Tensor:
    """The tensor's shape, layout and dtype without its values."""
    if t.device.type == "meta":  # a device of its own, which nothing else is on
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    return t if isinstance(t, FakeTensor) else mode.from_tensor(t)


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep the inputs of blocks only, as transformers' models do when asked."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": False})
            return
    raise ValueError(f"plan: {type(model).__name__} has no gradient_checkpointing_enable(); checkpoint in its forward")


@contextmanager
def unpacked() -> Iterator[None]:
    """Let transformers take position ids without values for those of one sequence a row.

    It reads them to find packed sequences and, where it cannot, builds a dense mask that training does without.
    """
    masks, name = sys.modules.get("transformers.masking_utils"), "find_packed_sequence_indices"
    with mock.patch.object(masks, name, return_value=None) if hasattr(masks, name) else nullcontext():
        yield
