"""Where a tensor lives and whether it has values; long ones a piece at a time, so that temporaries stay small."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DEVICE_PIECE = 1 << 22  # elements: with fewer, launching kernels takes longer than running them
TRANSPOSED = 1 << 18  # elements transposed at a time
ROW_GAP = 32  # elements between rows that are to lie in different sets of a cache


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to read."""
    return not (isinstance(tensor, FakeTensor) or tensor.device.type == "meta")


def on_host(tensor: Tensor) -> bool:
    """Whether the step goes the CPU's way, where reading a tensor costs nothing."""
    return device_type(tensor) == "cpu" if isinstance(tensor, FakeTensor) else tensor.is_cpu


def device_type(tensor: Tensor) -> str:
    """Where it is; a fake tensor's is the device that its mode stands for, so that what is planned is what is run."""
    meant = getattr(tensor.fake_mode, "stands_for", "cpu") if isinstance(tensor, FakeTensor) else "cpu"
    return tensor.device.type if meant == "cpu" else meant


def piece_size(tensor: Tensor, size: int) -> int:
    """Elements handled at a time: `size` on a CPU, whose caches are small, more on a device."""
    return size if on_host(tensor) else max(size, DEVICE_PIECE)


def pieces(tensor: Tensor, size: int) -> list[slice]:
    """The pieces of a line of memory, of `size` elements on a CPU.

    Without values the first two stand for all: the others cost the same, and plans of large models would take minutes.
    """
    # A graph has loops of its own.
    step = max(1, tensor.numel()) if torch.compiler.is_compiling() else piece_size(tensor, size)
    every = range(0, tensor.numel(), step)
    return [slice(start, start + step) for start in (every if has_values(tensor) else every[:2])]


def transpose_into(out: Tensor, x: Tensor) -> None:
    """out (n, m) <- x (m, n), both contiguous, on a CPU.

    Torch does this with one thread. And where rows are a power of two apart, a column lies in few sets of a CPU's
    caches. So some rows at a time are copied a little farther apart, which makes it two to four times as fast.
    """
    m, n = x.shape
    rows = max(1, min(m, TRANSPOSED // max(1, n)))
    room = x.new_empty(rows, n + ROW_GAP)[:, :n]
    every = range(0, m, rows)
    for start in every if has_values(x) else every[:2]:  # as in `pieces`
        block = x[start : start + rows]
        out[:, start : start + rows].copy_(room[: block.shape[0]].copy_(block).mT)
