"""Steps on a device in which AdamW takes some rows or columns of each matrix, or none, and a plain rule the rest.

One kernel for any number of matrices, as `device_kernels` says, where `take`, two directions and `put_` are thirty.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from optimzoo.functional import device_kernels
from optimzoo.functional.adamw_kernel import numbers
from optimzoo.functional.device_kernels import MULTIPLE, addresses, aligned, arguments, search_from, table, tiles
from optimzoo.functional.slices import has_values

ROWS, COLUMNS = 64, 256  # of a matrix, for one program; tiles were tried on an H200
SOME = 8  # rows at a time
LINE = 1024  # elements of a tensor without averages, for one program
WIDTH = 10  # of the table: two, five addresses, the matrix' rows and columns, how many are chosen
OTHERWISE = "FRUGAL steps by many kernels of PyTorch"


class Averages(NamedTuple):
    """AdamW's averages, (k, n) or (m, k), of the rows or columns `part` (k,), int32, ascending, of each matrix."""

    part: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    step: float  # of this step, from 1


def takes_parts(w: Tensor, g: Tensor) -> bool:
    """Whether a kernel may step rows or columns of this weight; where it fails its trial that is said once."""
    return device_kernels.takes(w, g, trial_of_parts, OTHERWISE)


def takes_all(w: Tensor, g: Tensor) -> bool:
    """Whether one may step all of this weight by the plain rule."""
    return device_kernels.takes(w, g, trial, OTHERWISE)


def step_(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    h: Any,
    lr: float | Tensor,
    found_inf: Tensor | None,
    kind: str = "",
    averages: Averages | None = None,
) -> None:
    """AdamW on those "rows" or "columns" (`kind`) of every w (m, n) with averages, FRUGAL's plain rule on the rest.

    Without averages that is all of each w, of any shape. `h` are the options `state_free`, `state_free_lr_scale`,
    `weight_decay` and `maximize`, with averages also `betas` and `eps`. Weights and gradients of one dtype each,
    averages in float32, all contiguous; where `found_inf` (tensors,) is not 0 nothing changes. Temporaries: a table of
    80 bytes for each tensor.
    """
    if not has_values(ws[0]):  # nor addresses
        torch.empty(len(ws), WIDTH, dtype=torch.int64, device=ws[0].device)
        return
    from optimzoo.functional.triton_parts import step_lines, step_matrices

    about, programs, most = _table(ws, gs, averages)
    shared = arguments(about, ws, gs, lr, found_inf, h)
    free = {"free": h.state_free, "scale": float(h.state_free_lr_scale)}
    with torch.cuda.device_of(about):
        if averages is None:
            step_lines[(programs,)](about, line=LINE, **free, **shared)
        else:
            one, two = (1 - beta**averages.step for beta in h.betas)
            tile = {"tile_rows": ROWS, "tile_columns": COLUMNS, "some_rows": SOME, "by_rows": kind == "rows"}
            arithmetic = {"grown": 1 / one, "root": 1 / math.sqrt(two), "eps": float(h.eps), **numbers(h.betas)}
            step_matrices[(programs,)](about, deepest=search_from(most + 1), **arithmetic, **tile, **free, **shared)
    written = [] if averages is None else [*averages.exp_avg, *averages.exp_avg_sq]
    increment_version([*ws, *written])  # for autograd, which cannot see what is written


def _table(ws: Sequence[Tensor], gs: Sequence[Tensor], averages: Averages | None) -> tuple[Tensor, int, int]:
    """The table, all programs, and the largest number of chosen rows or columns."""
    if averages is None:
        found, elements = addresses(ws, gs), np.array([w.numel() for w in ws], dtype=np.int64)
        rest = np.zeros((WIDTH - 5, len(ws)), dtype=np.int64)
        return *table(-(-elements // LINE), aligned(found), (*found, elements, *rest), ws[0]), 0
    found = addresses(ws, gs, averages.exp_avg, averages.exp_avg_sq, averages.part)
    rows, columns, programs = tiles(ws, ROWS, COLUMNS)
    chosen = np.array([part.numel() for part in averages.part], dtype=np.int64)
    vectors = aligned(found[:-1]) & (columns % MULTIPLE == 0)
    return *table(programs, vectors, (*found, rows, columns, chosen), ws[0]), int(chosen.max())


def trial_of_parts(device: torch.device, dtype: torch.dtype) -> str:
    """`trial` of rows and of columns."""
    return trial(device, dtype, "rows") or trial(device, dtype, "columns")


def trial(device: torch.device, dtype: torch.dtype, kind: str = "") -> str:
    """Matrices of 1 of which a part of three, the first and the last among them, steps by AdamW and the rest by signs.

    The first matrix' rows are vectors, the second is flagged, the third's rows begin anywhere. With a gradient of -3,
    a rate of 1/2 and a decay of 1/2: AdamW's part goes to 1.25, and the rest at a scale of 4 to 0.75 + 2.
    """
    shapes, axis = [(ROWS + 1, COLUMNS + MULTIPLE), (7, COLUMNS), (ROWS + 3, COLUMNS - 1)], int(kind == "columns")
    found_inf = torch.tensor([0, 1, 0], device=device, dtype=torch.float32)
    ws = [torch.ones(shape, device=device, dtype=dtype) for shape in shapes]
    parts = [torch.tensor([0, 5, shape[axis] - 1], device=device, dtype=torch.int32) for shape in shapes]
    first, second = ([w.float().index_select(axis, part) for w, part in zip(ws, parts, strict=True)] for _ in range(2))
    averages = Averages(parts, first, second, 1.0) if kind else None
    step_(ws, [w * -3 for w in ws], Options(), 0.5, found_inf, kind, averages)
    for i, w in enumerate(ws):
        steps = bool(kind) and i != 1
        wanted = torch.full_like(w, 1.0 if i == 1 else 2.75)
        if steps:
            wanted.index_fill_(axis, parts[i].long(), 1.25)
        pairs = (w, wanted), (first[i], -3 if steps else 1), (second[i], 9 if steps else 1)
        if not all((found - to).abs().max() <= 0.01 for found, to in pairs):  # nor where one is NaN
            return f"{kind or 'lines'} of matrix {i} with {dtype} end where they should not"
    return ""


class Options(NamedTuple):
    """A trial's."""

    state_free: str = "sign"
    state_free_lr_scale: float = 4.0
    weight_decay: float = 0.5
    maximize: bool = False
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 1e-8
