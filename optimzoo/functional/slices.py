"""Long tensors a slice at a time, so that temporaries do not grow with them."""

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to read."""
    return not (isinstance(tensor, FakeTensor) or tensor.device.type == "meta")


def starts(tensor: Tensor, size: int) -> range:
    """Where the slices of `size` elements of the tensor begin.

    Without values the first two stand for all: the others cost the same, and plans of large models would take minutes.
    """
    every = range(0, tensor.numel(), size)
    return every if has_values(tensor) else every[:2]
