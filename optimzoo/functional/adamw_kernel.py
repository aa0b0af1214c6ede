"""AdamW's step of any number of tensors on a device by one kernel, in which each of them has a flag of its own.

PyTorch's takes one flag for all, so gradients that are checked one by one cost it a launch for each, and it wants
averages as narrow as the weights. Written in Triton, which PyTorch brings along where there are devices for it.
"""

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from optimzoo.functional.slices import device_type, has_values

CHUNK = 8192  # elements of one program
TILE = 1024  # of them at a time
VECTOR = 16  # bytes that a device reads at once where addresses are multiples of them
COLUMNS = 8  # of the table: five addresses, elements, the number of the first program, whether addresses are multiples
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, Parameter, FakeTensor)  # what others keep is not at their address

_told: set[tuple[torch.device, torch.dtype]] = set()


def fits(w: Tensor, g: Tensor) -> bool:
    """Whether the kernel is written for a weight and a gradient like these: plain ones on CUDA, at most float32."""
    if device_type(w) != "cuda" or w.dtype not in DTYPES or g.dtype not in DTYPES:
        return False
    return type(w) in PLAIN and type(g) in PLAIN and not g.is_neg()


def works(w: Tensor) -> bool:
    """Whether it works where w is, tried before the first step there; if not, that is said once, in a warning.

    Where there are no values it is taken to: plans are made on other machines.
    """
    if not has_values(w):
        return True
    reason, where = _fault(w.device, w.dtype), (w.device, w.dtype)
    if reason and where not in _told:
        _told.add(where)
        warnings.warn(
            f"AdamW steps each parameter by a call of its own on {w.device}, as Triton does not work there: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not reason


def step_(
    ws: list[Tensor],
    gs: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    found_inf: Tensor | None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Step weights and averages; `steps` are the numbers of this step, from 1, 0-dim float32.

    Weights and gradients of one dtype each, averages in float32, all contiguous; where `found_inf` (tensors,) is not 0
    nothing changes. Temporaries: a table of 64 bytes for each tensor.
    """
    table, programs = _table(ws, gs, exp_avgs, exp_avg_sqs, steps)
    if not has_values(table):
        return
    from optimzoo.functional.triton_adamw import TYPES, step_some

    with torch.cuda.device_of(table):
        step_some[(programs,)](
            table,
            table if found_inf is None else found_inf,
            lr.to(table.device) if isinstance(lr, Tensor) else float(lr),
            len(ws),
            1 << (len(ws) - 1).bit_length() >> 1,  # where a search among them begins
            *(number for beta in betas for number in (float(beta), 1.0 - beta)),
            *(number for beta in betas for number in _log2(beta)),
            float(eps),
            float(weight_decay),
            checked=found_inf is not None,
            lr_is_tensor=isinstance(lr, Tensor),
            maximize=maximize,
            columns=COLUMNS,
            chunk=CHUNK,
            tile=TILE,
            w_type=TYPES[ws[0].dtype],
            g_type=TYPES[gs[0].dtype],
            enable_fp_fusion=False,  # an element's digits would depend on where it lies
        )
    increment_version([*ws, *exp_avgs, *exp_avg_sqs])  # for autograd, which cannot see what is written


def _log2(beta: float) -> tuple[float, float]:
    """A logarithm as the sum of two float32; for 0, whose powers are 0, one that is low enough."""
    exact = math.log2(beta) if beta else -2000.0
    near = torch.tensor(exact, dtype=torch.float32, device="cpu").item()
    return near, exact - near


def _table(ws: list[Tensor], *others: list[Tensor]) -> tuple[Tensor, int]:
    """(tensors, COLUMNS) on their device, and the programs that all of them need."""
    device = ws[0].device
    if not has_values(ws[0]):  # nor addresses
        return torch.empty(len(ws), COLUMNS, dtype=torch.int64, device=device), 0
    rows, programs = [], 0
    for tensors in zip(ws, *others, strict=True):
        addresses = [t.data_ptr() for t in tensors]
        aligned = not any(address % VECTOR for address in addresses[:-1])
        rows.append([*addresses, tensors[0].numel(), programs, int(aligned)])
        programs += -(-tensors[0].numel() // CHUNK)
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if device.type != "cpu":
        table = table.pin_memory().to(device, non_blocking=True)  # the host would wait for any other copy
    return table, programs


@functools.cache
def _fault(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel is not to be used there: it is tried on ones, of which the first half go to 0.25 and others stay.

    An element decays by a quarter and goes down by a half. Kinds of devices differ, and tests see one.
    """
    shape = (2, TILE + VECTOR)  # with and without a mask
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    w, g = torch.ones(shape, **options).to(dtype), torch.ones(shape, **options).to(dtype)
    exp_avg, exp_avg_sq = torch.ones(shape, **options), torch.ones(shape, **options)
    lists: list[Any] = [list(t.unbind()) for t in (w, g, exp_avg, exp_avg_sq, torch.ones(2, **options))]
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if mode:
            torch.cuda.set_sync_debug_mode(0)  # of what is read below
        lists.append(torch.arange(2, **options))
        step_(*lists, lr=0.5, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.5, maximize=False)
        ends = [float(end) for t in w for end in t.float().aminmax()]
        right = all(abs(end - wanted) < 0.01 for end, wanted in zip(ends, (0.25, 0.25, 1, 1), strict=True))
        return "" if right else f"a step from 1 to 0.25, and none, ended in {ends}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no compiler for its launcher, a device that it does not know
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
