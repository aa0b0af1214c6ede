"""SM3's step of any number of matrices on a device by one kernel, in one sweep, as `device_kernels` says."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from optimzoo.functional import device_kernels
from optimzoo.functional.device_kernels import MULTIPLE, addresses, aligned, arguments, table, tiles
from optimzoo.functional.slices import has_values

ROWS, COLUMNS = 64, 512  # of a matrix, for one program; tiles were tried on an H200
SOME = 2  # rows at a time
WIDTH = 8  # of the table: two, four addresses, the matrix' rows and columns


def takes(w: Tensor, g: Tensor) -> bool:
    """Whether the kernel may step this weight by a gradient like this; where it fails its trial that is said once."""
    return w.ndim == 2 and device_kernels.takes(w, g, trial, "SM3 steps by many kernels of PyTorch")


def step_(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    h: Any,
    lr: float | Tensor,
    found_inf: Tensor | None,
    slices: list[Tensor],
) -> None:
    """`cover.sm3_update` on matrices (m, n), whose accumulators are `slices` (m + n,), decay and w -= lr g / sqrt(nu).

    `h` are the options `eps`, which is added to nu, `weight_decay` and `maximize`. Weights and gradients of one dtype
    each, slices in float32, all contiguous; where `found_inf` (tensors,) is not 0 nothing changes. Temporaries: the
    size of all slices, and a table of 64 bytes for each matrix.
    """
    sizes = [t.numel() for t in slices]
    new = torch.zeros(sum(sizes), dtype=torch.float32, device=ws[0].device).split(sizes)  # nothing squared is below
    if not has_values(ws[0]):  # nor addresses
        torch.empty(len(ws), WIDTH, dtype=torch.int64, device=ws[0].device)
        return
    from optimzoo.functional.triton_cover import step_some

    about, programs = _table(ws, gs, slices, new)
    shared, tile = arguments(about, ws, gs, lr, found_inf, h), {"tile_rows": ROWS, "tile_columns": COLUMNS}
    with torch.cuda.device_of(about):
        step_some[(programs,)](about, eps=float(h.eps), some_rows=SOME, **tile, **shared)
    torch._foreach_copy_(slices, new)
    increment_version(ws)  # for autograd, which cannot see what is written


def _table(*lists: Sequence[Tensor]) -> tuple[Tensor, int]:
    found, (rows, columns, programs) = addresses(*lists), tiles(lists[0], ROWS, COLUMNS)
    return table(programs, aligned(found[:2]) & (columns % MULTIPLE == 0), (*found, rows, columns), lists[0][0])


def trial(device: torch.device, dtype: torch.dtype) -> str:
    """Matrices of 1 with a gradient of 3 and accumulators of 16, of which the second is flagged.

    At a rate of 5 and a decay of 1/10 they go to 1/2 - 3, and the accumulators to 25.
    """
    shapes = [(ROWS + 1, COLUMNS + MULTIPLE), (3, COLUMNS), (ROWS + 3, COLUMNS - 1)]
    found_inf = torch.tensor([0, 1, 0], device=device, dtype=torch.float32)
    ws = [torch.ones(shape, device=device, dtype=dtype) for shape in shapes]
    slices = [torch.full((sum(shape),), 16.0, device=device, dtype=torch.float32) for shape in shapes]
    step_(ws, [w * 3 for w in ws], Options(), 5.0, found_inf, slices)
    for found, wanted, before in ((ws, -2.5, 1), (slices, 25, 16)):
        ends = [float(end) for t in found for end in t.float().aminmax()]
        right = (wanted, wanted, before, before, wanted, wanted)
        if not all(abs(end - to) <= 0.02 for end, to in zip(ends, right, strict=True)):  # nor where one is NaN
            return f"what was {before} ends at {ends} with {dtype}, and not at {wanted}, {before}, {wanted}"
    return ""


class Options(NamedTuple):
    """A trial's."""

    eps: float = 1e-30
    weight_decay: float = 0.1
    maximize: bool = False
