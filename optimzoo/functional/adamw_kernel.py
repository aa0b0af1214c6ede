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
POWER_OF_NOTHING = -2000.0  # a logarithm low enough for its powers to be those of 0
OPTIONS = {"enable_fp_fusion": False}  # else an element's digits would depend on where it lies

_told: set[torch.device] = set()


def works(w: Tensor) -> bool:
    """Whether w is on a CUDA device where the kernel works: tried before the first step, and said once where not.

    Where there are no values it is taken to: plans are made on other machines.
    """
    if device_type(w) != "cuda":
        return False
    reason = _fault(w.device) if has_values(w) else ""
    if reason and w.device not in _told:
        _told.add(w.device)
        warnings.warn(
            f"AdamW steps each parameter by a call of its own on {w.device}, as Triton does not work there: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not reason


def fits(w: Tensor, g: Tensor) -> bool:
    """Whether it is written for a weight and a gradient like these: plain ones, and at most float32."""
    return all(type(t) in PLAIN and t.dtype in DTYPES for t in (w, g))


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
            *(math.log2(beta) if beta else POWER_OF_NOTHING for beta in betas),
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
            **OPTIONS,
        )
    increment_version([*ws, *exp_avgs, *exp_avg_sqs])  # for autograd, which cannot see what is written


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
def _fault(device: torch.device) -> str:
    """Why the kernel is not to be used there, "" where it may: kinds of devices differ, and tests see none of them.

    It is tried on three weights of 1, of which the second is flagged and the third misaligned: the first and the third
    decay by a quarter and go down by a half, and their averages of 1 become those of a gradient of 2.
    """
    size, mode = TILE + VECTOR, torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if mode:
            torch.cuda.set_sync_debug_mode(0)  # of what is read below
        ones = torch.ones(3 * size + 1, device=device, dtype=torch.float32)
        found_inf = torch.tensor([0, 1, 0], device=device, dtype=torch.float32)
        for dtype in DTYPES:
            lines = ones.to(dtype, copy=True), ones.mul(2).to(dtype), ones.clone(), ones.clone()
            ws, gs, *averages = ([t[:size], t[size : 2 * size], t[2 * size + 1 :]] for t in lines)
            lists: Any = ws, gs, *averages, [*ones[:3].clone()], found_inf
            step_(*lists, lr=0.5, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.5, maximize=False)
            for found, wanted in zip((ws, *averages), (0.25, 2, 4), strict=True):
                ends = [float(end) for t in found for end in t.float().aminmax()]
                right = (wanted, wanted, 1, 1, wanted, wanted)
                if any(abs(end - to) > 0.01 for end, to in zip(ends, right, strict=True)):
                    return f"what was 1 ends at {ends} with {dtype}, and not at {wanted}, 1, {wanted}"
        return ""
    except Exception as error:  # no Triton, no compiler for its launcher, a device that it does not know
        if "out of memory" in str(error):  # which says nothing of the kernel
            raise
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
