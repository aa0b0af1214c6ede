"""What our kernels for devices share: they step any number of tensors by one call, told by a table of their addresses.

They are written in Triton, which PyTorch brings along where there are devices for it. PyTorch's own take one flag for
all tensors of a call, so gradients that are checked one by one cost a launch for each; and launches, with what the host
does for them, are what a step on a device costs.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from optimzoo.functional.slices import device_type, has_values, on_host

VECTOR = 16  # bytes that a device reads at once where addresses are multiples of them
MULTIPLE = 16  # of elements in a row, for all rows of a matrix to begin where vectors may
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, Parameter, FakeTensor)  # what others keep is not at their address
OPTIONS = {"enable_fp_fusion": False}  # else an element's digits would depend on where it lies

# A kernel on tensors of its own, weights of that dtype: what is wrong with what it does, "" for nothing.
Trial = Callable[[torch.device, torch.dtype], str]

_told: set[tuple[str, torch.device]] = set()


def takes(w: Tensor, g: Tensor, trial: Trial, otherwise: str) -> bool:
    """Whether a kernel may step a weight by such a gradient: plain ones of at most float32, on CUDA, not in a graph.

    In a graph's replay the host's table of addresses would be whatever stands in its place by then. Where the kernel
    fails its `trial`, before the first step, a warning says what happens `otherwise`. Where there are no values it is
    taken to pass: plans are made on other machines.
    """
    if on_host(w) or device_type(w) != "cuda" or capturing():
        return False
    tried = w.dtype if fits(w, g) else torch.float32  # in which wide copies of the others step
    reason = _fault(trial, w.device, tried) if has_values(w) else ""
    if reason and (otherwise, w.device) not in _told:
        _told.add((otherwise, w.device))
        warnings.warn(
            f"{otherwise} on {w.device}, as Triton does not work there: {reason}", RuntimeWarning, stacklevel=2
        )
    return not reason and fits(w, g)


def fits(w: Tensor, g: Tensor) -> bool:
    """Whether they are plain tensors and at most float32."""
    return all(type(t) in PLAIN and t.dtype in DTYPES for t in (w, g))


def capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def addresses(*lists: Sequence[Tensor]) -> np.ndarray:
    """(lists, tensors) int64."""
    return np.array([[t.data_ptr() for t in tensors] for tensors in lists], dtype=np.int64)


def table(programs: np.ndarray, vectors: np.ndarray, columns: Sequence[np.ndarray], like: Tensor) -> tuple[Tensor, int]:
    """(tensors, 2 + columns) int64 on the device of `like`, and the programs that all of them need.

    A row holds the number of a tensor's first program, whether its lines may be read as vectors, and the columns.
    """
    ends = np.cumsum(programs)
    found = torch.from_numpy(np.stack((ends - programs, vectors, *columns), axis=1).astype(np.int64, copy=False))
    if like.device.type != "cpu":
        found = found.pin_memory().to(like.device, non_blocking=True)  # the host would wait for any other copy
    return found, int(ends[-1])


def aligned(found: np.ndarray) -> np.ndarray:
    """(lists, tensors) addresses -> (tensors,) whether all of them are multiples of a vector."""
    return (found % VECTOR == 0).all(0)


def tiles(ws: Sequence[Tensor], rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tensors,) each: the rows of matrices, their columns, and how many tiles of that size cover each of them."""
    m, n = np.array([w.shape for w in ws], dtype=np.int64).T
    return m, n, -(-m // rows) * -(-n // columns)


def search_from(count: int) -> int:
    """The power of two with which a search among so many begins."""
    return 1 << (count - 1).bit_length() >> 1


def arguments(
    about: Tensor, ws: Sequence[Tensor], gs: Sequence[Tensor], lr: float | Tensor, found_inf: Tensor | None, h: Any
) -> dict[str, Any]:
    """What all kernels are told beside their tables `about`: flags, the rate, and `h`'s decay and direction."""
    from optimzoo.functional.triton_adamw import TYPES

    return {
        "found_inf": about if found_inf is None else found_inf,
        "lr": lr.to(about.device) if isinstance(lr, Tensor) else float(lr),
        "count": len(ws),
        "top": search_from(len(ws)),
        "weight_decay": float(h.weight_decay),
        "checked": found_inf is not None,
        "lr_is_tensor": isinstance(lr, Tensor),
        "maximize": h.maximize,
        "columns": about.shape[1],
        "w_type": TYPES[ws[0].dtype],
        "g_type": TYPES[gs[0].dtype],
        **OPTIONS,
    }


@functools.cache
def _fault(trial: Trial, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel is not to be used there, "" where it may: kinds of devices differ, and tests see none of them."""
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if mode:
            torch.cuda.set_sync_debug_mode(0)  # of what the trial reads
        return trial(device, dtype)
    except Exception as error:  # no Triton, no compiler for its launcher, a device that it does not know
        if "out of memory" in str(error):  # which says nothing of the kernel
            raise
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
