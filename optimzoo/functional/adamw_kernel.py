"""AdamW's step of any number of tensors on a device by one kernel, in which each of them has a flag of its own.

PyTorch's takes one flag for all, so gradients that are checked one by one cost it a launch for each, and it wants
averages as narrow as the weights. Written in Triton, which PyTorch brings along where there are devices for it.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from optimzoo.functional.slices import device_type, has_values

CHUNK = 8192  # elements of one program
TILE = 1024  # of them at a time
VECTOR = 16  # bytes that a device reads at once where addresses are multiples of them
COLUMNS = 6  # of the table: four addresses, elements, the number of the first program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(p: Tensor) -> bool:
    """Whether weights like this one can step so: on a CUDA device that Triton works on."""
    return device_type(p) == "cuda" and p.dtype in DTYPES and (not has_values(p) or _works(p.device, p.dtype))


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
    nothing changes. Temporaries: some numbers for each tensor.
    """
    numbers = _numbers(torch.stack(steps), lr, betas, weight_decay)
    table, programs, aligned = _table(ws, gs, exp_avgs, exp_avg_sqs)
    if not has_values(table):
        return
    from optimzoo.functional.triton_adamw import TYPES, step_some

    with torch.cuda.device_of(table):
        step_some[(programs,)](
            table,
            numbers,
            numbers if found_inf is None else found_inf,
            len(ws),
            1 - betas[0],
            betas[1],
            1 - betas[1],
            eps,
            checked=found_inf is not None,
            maximize=maximize,
            aligned=aligned,
            levels=max(1, (len(ws) - 1).bit_length()),
            columns=COLUMNS,
            chunk=CHUNK,
            tile=TILE,
            w_type=TYPES[ws[0].dtype],
            g_type=TYPES[gs[0].dtype],
        )


def _numbers(steps: Tensor, lr: float | Tensor, betas: tuple[float, float], weight_decay: float) -> Tensor:
    """(3, tensors) float32: the size of the step, what the root is multiplied by, what is kept of a weight."""
    t = steps.to(torch.float64)  # a power of 0.999 needs its digits
    keep = torch.ones_like(t) - lr * weight_decay
    return torch.stack([lr / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt(), keep]).to(torch.float32)


def _table(*kinds: list[Tensor]) -> tuple[Tensor, int, bool]:
    """(tensors, COLUMNS) on their device, the programs that all need, and whether all addresses are multiples."""
    one, rows, programs, aligned = kinds[0][0], [], 0, True
    if not has_values(one):  # nor addresses
        return torch.empty(len(kinds[0]), COLUMNS, dtype=torch.int64, device=one.device), 0, True
    for tensors in zip(*kinds, strict=True):
        addresses = [t.data_ptr() for t in tensors]
        aligned = aligned and not any(address % VECTOR for address in addresses)
        rows.append([*addresses, tensors[0].numel(), programs])
        programs += -(-tensors[0].numel() // CHUNK)
    table = torch.tensor(rows, dtype=torch.int64)
    if one.is_cuda:
        table = table.pin_memory().to(one.device, non_blocking=True)  # the host would wait for any other copy
    return table, programs, aligned


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can be made there and is right: tried once, before the first step, as kinds of devices differ.

    On two weights of 1, one of them flagged: the other decays to 0.75 and goes down by 0.5.
    """
    w, g = torch.ones(2, device=device, dtype=dtype), torch.ones(2, device=device, dtype=dtype)
    averages = [list(torch.ones(2, device=device).split(1)) for _ in range(2)]
    steps, found_inf = list(torch.ones(2, device=device).unbind()), torch.arange(2.0, device=device)
    lists: list[Any] = [list(w.split(1)), list(g.split(1)), *averages, steps, found_inf]
    try:
        step_(*lists, lr=0.5, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.5, maximize=False)
        reason = "" if w.tolist() == [0.25, 1] else f"its step of 1 ends at {w.tolist()}, not at [0.25, 1]"
    except Exception as error:  # no Triton, no compiler for its launcher, a device that it does not know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason:
        warnings.warn(
            f"AdamW steps each parameter by a call of its own on {device}, as Triton does not work there: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not reason
