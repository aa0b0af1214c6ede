"""Steps of any number of float32 tensors on a CPU by one call of a kernel in C: `engine="compiled"`.

What PyTorch does to FRUGAL's matrices in three or four passes over memory takes one here, after the check; what a basis
leaves of them takes two beside the products, and so does the end of SWAN. The kernel is compiled when it
is first asked for, once a process, in half a second, which needs a C compiler with OpenMP. It is called by address, so
it takes plain, contiguous tensors only.
"""

import ctypes
import functools
import math
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

LINE = 8192  # elements of which there is one sum: the kernel's
NARROW = 64  # rows, or numbers in one, below which a loop over rows may take longer than PyTorch
SOURCE = Path(__file__).with_name("host_kernel.c")
COMPILERS = ("cc", "gcc", "clang")  # without $CC
PATIENCE = 60  # seconds for one of them
# No fused products: with them an element's digits would depend on where in a row it lies.
FLAGS = (
    "-std=c99",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
SETS = {  # of instructions, by what PyTorch found this CPU to have
    "AVX2": ("-mavx2",),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"),
}
PARTS = {"none": 0, "all": 1, "rows": 2, "columns": 3}
FREE = {"sign": 0, "sgd": 1, "none": 2}

_lock = threading.Lock()
_warned = False


class _Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("keep", "up", "beta1", "beta2", "eps", "new1", "new2", "rate", "rms")),
        *((name, ctypes.c_int32) for name in ("part", "free", "check")),
    )


class Averages(NamedTuple):
    """What AdamW has for a part of each tensor, and the number of this step, from 1."""

    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    steps: Sequence[float]
    chosen: Sequence[Tensor] | None = None

    def of(self, i: int) -> "Averages":
        """Those of one tensor, as of all its elements."""
        return Averages([self.exp_avg[i]], [self.exp_avg_sq[i]], [self.steps[i]])


def works() -> bool:
    """Whether the kernel could be compiled, which is tried once; where not, the first time warns."""
    global _warned
    with _lock:
        fault = _compiled()[1]
        silent, _warned = _warned or not fault, True
    if not silent:
        warnings.warn(
            f"engine='compiled': float32 weights on a CPU step without it, as the kernel was not compiled: {fault}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not fault


def reads(t: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """Whether it may be called with this one: plain numbers in a row, in the host's memory."""
    if type(t) not in (Tensor, Parameter) or not t.is_cpu or t.is_neg() or t.dtype not in dtypes:
        return False
    end = (t.storage_offset() + t.numel()) * t.element_size()  # some free a storage and keep its tensors
    return t.is_contiguous() and t.untyped_storage().nbytes() >= end


def readable(new: Tensor) -> Tensor:
    """A tensor made for the kernel; raises where a mode makes others."""
    if not reads(new):
        raise RuntimeError(f"engine='compiled': new tensors have no memory here, but are {type(new).__name__}s")
    return new


def step_(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    h: Any,
    lr: float,
    part: str,
    averages: Averages | None = None,
    free: tuple[str, float] = ("none", 0.0),
) -> list[bool]:
    """AdamW on a part of every w, lr * scale times the sign, the gradient ("sgd") or nothing on the rest.

    The part is "none", "all", or of matrices (m, n) the "rows" or "columns" that `averages.chosen` tells, (k,), int32,
    ascending, with averages (k, n) or (m, k). `free` is the rest's direction and its scale; `h` are the options
    `weight_decay`, `maximize` and `check_finite`, with averages also `betas` and `eps`. Returns which w were stepped:
    those with a gradient whose squares are finite in float32, 8192 of them added up, or all without the check. No
    temporaries. Raises IndexError where chosen are not ascending numbers of rows or columns.
    """
    table, corrections, elements = array("q"), array("f"), 0
    for i, (w, g) in enumerate(zip(ws, gs, strict=True)):
        chosen = averages.chosen[i] if averages and averages.chosen else None
        rows, columns = (1, w.numel()) if chosen is None else w.shape
        places = (0, 0) if averages is None else (averages.exp_avg[i].data_ptr(), averages.exp_avg_sq[i].data_ptr())
        index = (0, 0) if chosen is None else (chosen.data_ptr(), chosen.numel())
        table.extend((w.data_ptr(), g.data_ptr(), *places, *index, rows, columns))
        corrections.extend((0, 0) if averages is None else _corrections(lr, h.betas, averages.steps[i]))
        elements += w.numel()
    kind, scale = free
    how = {"part": PARTS[part], "free": FREE[kind], "rate": lr * scale}
    if averages is not None:
        (beta1, beta2), eps = h.betas, h.eps
        how |= {"beta1": beta1, "beta2": beta2, "eps": eps, "new1": 1 - beta1, "new2": 1 - beta2}
    bad, threads = array("i", bytes(4 * len(ws))), torch.get_num_threads()
    arrays, options = [_at(numbers) for numbers in (table, corrections, bad)], _options(h, lr, **how)
    wrong = _compiled()[0].step(*arrays, len(ws), options, elements, threads)
    if wrong >= 0 and averages is not None and averages.chosen:
        index, shape = averages.chosen[wrong], tuple(ws[wrong].shape)
        raise IndexError(f"not the {part} of a matrix of shape {shape}, ascending: {index}")
    increment_version([*ws, *averages.exp_avg, *averages.exp_avg_sq] if averages else ws)  # autograd sees no addresses
    return [not flag for flag in bad]


def sm3_step_(w: Tensor, g: Tensor, h: Any, lr: float, accumulators: Sequence[Tensor]) -> bool:
    """`cover.sm3_step_` on a matrix (m, n), by the options `weight_decay`, `eps`, `maximize` and `check_finite`.

    Returns whether it was stepped, as `step_` does. Temporaries: a row for each thread that has one.
    """
    threads = min(torch.get_num_threads(), w.shape[0])
    room, bad = readable(w.new_zeros(threads, w.shape[1])), array("i", [0])
    addresses = [t.data_ptr() for t in (w, g, *accumulators, room)]
    options = _options(h, lr, rate=lr, eps=math.sqrt(h.eps))
    _compiled()[0].sm3(*addresses, _at(bad), *w.shape, options, threads)
    increment_version([w, *accumulators])
    return not bad[0]


def largest(g: Tensor, h: Any) -> float | None:
    """The largest size of a number in it; None where it cannot be used and `h.check_finite` asks for that."""
    bad = array("i", [0])
    found = _compiled()[0].largest(g.data_ptr(), g.numel(), _at(bad), _options(h, 0.0), torch.get_num_threads())
    return None if bad[0] else found


def step_outside_(
    w: Tensor, g: Tensor, inside: Tensor, h: Any, lr: float, free: tuple[str, float], noise: float
) -> None:
    """`step_` without averages on g - inside, of which as a sign nothing below `noise` counts. No temporaries."""
    kind, scale = free
    options, addresses = _options(h, lr, free=FREE[kind], rate=lr * scale), [t.data_ptr() for t in (w, g, inside)]
    _compiled()[0].outside(*addresses, w.numel(), noise, options, torch.get_num_threads())
    increment_version([w])


def conclude_(w: Tensor, x: Tensor, h: Any, lr: float, rms: float) -> None:
    """w <- (1 - lr * weight_decay) w - lr u for matrices (m, n): u is x in bfloat16, at the root mean square `rms`.

    x may lie on its side in memory. Temporaries: 8 bytes for every 8192 elements.
    """
    if rms == 0:  # of what is no number too, as with PyTorch
        w.mul_(1 - lr * h.weight_decay)
        return
    parts, turned = array("d", bytes(8 * -(-w.numel() // LINE))), not x.is_contiguous()
    addresses, options = (w.data_ptr(), x.data_ptr(), _at(parts)), _options(h, lr, rate=lr, rms=rms)
    _compiled()[0].conclude(*addresses, *w.shape, turned, options, torch.get_num_threads())
    increment_version([w])


def _options(h: Any, lr: float, **others: float) -> Any:
    shared = {"keep": 1 - lr * h.weight_decay, "up": -1 if h.maximize else 1, "check": h.check_finite}
    return ctypes.byref(_Options(**shared, **others))


def _corrections(lr: float, betas: tuple[float, float], step: float) -> tuple[float, float]:
    return lr / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)


def _at(numbers: array) -> int:
    return numbers.buffer_info()[0]


@functools.cache
def _compiled() -> tuple[Any, str]:
    """The kernel as a library, or None and why there is none."""
    try:
        with tempfile.TemporaryDirectory(prefix="optimzoo-") as folder:
            path = Path(folder) / "host_kernel.so"  # once it is loaded, nobody needs the file
            command = [*_compiler(), *FLAGS, *SETS.get(torch.backends.cpu.get_cpu_capability(), ())]
            done = subprocess.run(
                [*command, str(SOURCE), "-o", str(path), "-lm"], capture_output=True, errors="replace", timeout=PATIENCE
            )
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"]
                return None, next((line for line in said if "error" in line), said[-1])
            library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.step.argtypes = [*[pointer] * 3, number, pointer, number, ctypes.c_int]
        library.sm3.argtypes = [*[pointer] * 6, number, number, pointer, ctypes.c_int]
        library.largest.argtypes = [pointer, number, pointer, pointer, ctypes.c_int]
        library.outside.argtypes = [*[pointer] * 3, number, ctypes.c_float, pointer, ctypes.c_int]
        library.conclude.argtypes = [*[pointer] * 3, number, number, ctypes.c_int, pointer, ctypes.c_int]
        library.step.restype, library.sm3.restype, library.conclude.restype = number, None, None
        library.largest.restype, library.outside.restype = ctypes.c_float, None
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        return None, str(error) or type(error).__name__
    return library, ""


def _compiler() -> list[str]:
    """$CC, as make reads it, or the first one there is."""
    if given := shlex.split(os.environ.get("CC", "")):
        return given
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise FileNotFoundError(f"no C compiler: neither $CC nor any of {', '.join(COMPILERS)}")
    return [found]
