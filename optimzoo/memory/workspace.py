"""Workspace: the most bytes that a block of code holds at once in storages that it made itself."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from optimzoo.memory.reach import storage_parts


class _Known:
    """A storage met inside the block: its bytes when first met (0 when born there) and those counted beyond."""

    __slots__ = ("base", "counted", "ref")

    def __init__(self, ref: weakref.ref[torch.UntypedStorage], base: int) -> None:
        self.ref, self.base, self.counted = ref, base, 0


class Workspace(TorchDispatchMode):
    """Context manager with `.live` and `.peak`: bytes of storages born inside the block, on real, meta or fake tensors.

    It sees what passes the dispatcher: neither scratch memory inside a kernel nor temporaries inside a compiled graph.
    After the block `.live` is what it left behind. For CUDA devices see `measure`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, _Known] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run as compiled; under a mode that does not say so they fail or run eagerly."""
        return True

    def __enter__(self) -> Self:
        self.live = self.peak = 0
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._known.clear()  # with the weak references: storages that outlive the block owe it nothing

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, births are not counted: for a closure's forward and backward. Deaths still are."""
        super().__exit__(None, None, None)  # off the stack, not merely idle: what is paused runs at its own speed
        try:
            yield
        finally:
            super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # the subclass goes first, and its operations on plain tensors come back here
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # the constant in a torch.tensor(...) was made just now
            for t in _strided(args, kwargs):
                self._note(t, born=False)
        out = func(*args, **kwargs)
        for t in _strided(out):
            self._note(t, born=True)
        return out

    def _note(self, t: Tensor, *, born: bool) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is None:
            ref = weakref.ref(storage, lambda _: self._died(key))
            known = self._known[key] = _Known(ref, 0 if born else size)
        counted = max(0, size - known.base)
        if counted != known.counted:
            self.live += counted - known.counted
            self.peak = max(self.peak, self.live)
            known.counted = counted

    def _died(self, key: int) -> None:
        # Before the address is used again: the callback runs while the storage is being freed.
        known = self._known.pop(key, None)
        self.live -= known.counted if known else 0


def _strided(*values: Any) -> Iterator[Tensor]:
    """The strided tensors in an operation's arguments or results: at most lists and dictionaries of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield from storage_parts(value)
        elif isinstance(value, list | tuple):
            yield from _strided(*value)
        elif isinstance(value, dict):
            yield from _strided(*value.values())


class DeviceWorkspace:
    """`Workspace` as the CUDA allocator sees it: kernels' scratch, compiled graphs and rounding up included.

    It resets the device's peak counter, so `torch.cuda.max_memory_allocated` of the surrounding program starts anew.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self._base = device, 0, 0

    def __enter__(self) -> Self:
        self.peak = 0
        self._resume(torch.cuda.memory_allocated(self.device))
        return self

    def __exit__(self, *exc: object) -> None:
        self._look()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is counted; what is allocated there and stays is not workspace afterwards either."""
        self._look()
        before = torch.cuda.memory_allocated(self.device)
        try:
            yield
        finally:
            self._resume(self._base + torch.cuda.memory_allocated(self.device) - before)

    def _look(self) -> None:
        self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - self._base)

    def _resume(self, base: int) -> None:
        self._base = base
        torch.cuda.reset_peak_memory_stats(self.device)


def measure(device: torch.device) -> Workspace | DeviceWorkspace:
    """A context manager with `.peak` and `.paused()`; on CUDA one that resets the user's peak counter."""
    return DeviceWorkspace(device) if device.type == "cuda" else Workspace()
