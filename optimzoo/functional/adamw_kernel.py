"""AdamW's step of any number of tensors on a device by one kernel, in which each of them has a flag of its own.

PyTorch's wants averages as narrow as the weights, beside what `device_kernels` says of it.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from optimzoo.functional import device_kernels
from optimzoo.functional.device_kernels import VECTOR, addresses, aligned, arguments, table
from optimzoo.functional.slices import has_values

CHUNK = 8192  # elements of one program
TILE = 1024  # of them at a time
COLUMNS = 8  # of the table: two, five addresses, elements
POWER_OF_NOTHING = -2000.0  # a logarithm low enough for its powers to be those of 0


def takes(w: Tensor, g: Tensor) -> bool:
    """Whether the kernel may step this weight by a gradient like this; where it fails its trial that is said once."""
    return device_kernels.takes(w, g, trial, "AdamW steps each parameter by a call of its own")


def step_(
    ws: list[Tensor],
    gs: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    found_inf: Tensor | None,
    *,
    lr: float | Tensor,
    h: Any,
) -> None:
    """Step weights and averages; `steps` are the numbers of this step, from 1, 0-dim float32.

    `h` are the options `betas`, `eps`, `weight_decay` and `maximize`. Weights and gradients of one dtype each, averages
    in float32, all contiguous; where `found_inf` (tensors,) is not 0 nothing changes. Temporaries: a table of 64 bytes
    for each tensor.
    """
    if not has_values(ws[0]):  # nor addresses
        torch.empty(len(ws), COLUMNS, dtype=torch.int64, device=ws[0].device)
        return
    from optimzoo.functional.triton_adamw import step_some

    about, programs = _table(ws, gs, exp_avgs, exp_avg_sqs, steps)
    shared = arguments(about, ws, gs, lr, found_inf, h)
    logarithms = {"log_beta1": _logarithm(h.betas[0]), "log_beta2": _logarithm(h.betas[1])}
    with torch.cuda.device_of(about):
        step_some[(programs,)](
            about, eps=float(h.eps), chunk=CHUNK, tile=TILE, **numbers(h.betas), **logarithms, **shared
        )
    increment_version([*ws, *exp_avgs, *exp_avg_sqs])  # for autograd, which cannot see what is written


def numbers(betas: tuple[float, float]) -> dict[str, float]:
    """What a kernel is told of the decay of both averages: 1 - beta has more digits than a device's float32 leaves."""
    beta1, beta2 = betas
    return {
        **{"beta1": float(beta1), "one_minus_beta1": 1.0 - beta1},
        **{"beta2": float(beta2), "one_minus_beta2": 1.0 - beta2},
    }


def _logarithm(beta: float) -> float:
    return math.log2(beta) if beta else POWER_OF_NOTHING


def _table(ws: list[Tensor], *others: list[Tensor]) -> tuple[Tensor, int]:
    found, elements = addresses(ws, *others), np.array([w.numel() for w in ws], dtype=np.int64)
    return table(-(-elements // CHUNK), aligned(found[:-1]), (*found, elements), ws[0])


def trial(device: torch.device, dtype: torch.dtype) -> str:
    """Three weights of 1, of which the second is flagged and the third misaligned.

    The first and the third decay by a quarter and go down by a half, and their averages of 1 become those of a gradient
    of 2.
    """
    size = TILE + VECTOR
    ones = torch.ones(3 * size + 1, device=device, dtype=torch.float32)
    found_inf = torch.tensor([0, 1, 0], device=device, dtype=torch.float32)
    lines = ones.to(dtype, copy=True), ones.mul(2).to(dtype), ones.clone(), ones.clone()
    ws, gs, *averages = ([t[:size], t[size : 2 * size], t[2 * size + 1 :]] for t in lines)
    lists: Any = ws, gs, *averages, [*ones[:3].clone()], found_inf
    step_(*lists, lr=0.5, h=Options())
    for found, wanted in zip((ws, *averages), (0.25, 2, 4), strict=True):
        ends = [float(end) for t in found for end in t.float().aminmax()]
        right = (wanted, wanted, 1, 1, wanted, wanted)
        if not all(abs(end - to) <= 0.01 for end, to in zip(ends, right, strict=True)):  # nor where one is NaN
            return f"what was 1 ends at {ends} with {dtype}, and not at {wanted}, 1, {wanted}"
    return ""


class Options(NamedTuple):
    """A trial's."""

    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 1e-8
    weight_decay: float = 0.5
    maximize: bool = False
