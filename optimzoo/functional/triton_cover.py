"""The device's part of `cover_kernel`, in Triton: what is imported only where it runs."""

# mypy: disallow-untyped-defs=False
# Triton would read the annotations.

import triton
import triton.language as tl

from optimzoo.functional.triton_adamw import find, read_rate


@triton.jit(do_not_specialize=["count", "top"])
def step_some(
    table,
    found_inf,
    lr,
    count,
    top,
    eps,
    weight_decay,
    checked: tl.constexpr,
    lr_is_tensor: tl.constexpr,
    maximize: tl.constexpr,
    columns: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    some_rows: tl.constexpr,
    w_type: tl.constexpr,
    g_type: tl.constexpr,
):
    """A tile of one matrix (m, n): of which the table says, (count, columns), as `cover_kernel` writes it."""
    program = tl.program_id(0).to(tl.int64)
    which = find(table, program, count, top, columns)
    row = table + which * columns
    m, n = tl.load(row + 6), tl.load(row + 7)
    across = (n + tile_columns - 1) // tile_columns
    tile = program - tl.load(row)
    top_row = tile // across * tile_rows
    j = tile % across * tile_columns + tl.arange(0, tile_columns)
    old, new = tl.load(row + 4).to(tl.pointer_type(tl.float32)), tl.load(row + 5).to(tl.pointer_type(tl.float32))
    usable = True
    if checked:
        usable = tl.load(found_inf + which) == 0
    if usable:
        rate = read_rate(lr, lr_is_tensor)
        numbers = (rate, eps, weight_decay)
        w_address, g_address = tl.load(row + 2), tl.load(row + 3)
        if tl.load(row + 1) != 0:  # a row is whole vectors
            w_at = tl.multiple_of(w_address.to(tl.pointer_type(w_type)), 16)
            g_at = tl.multiple_of(g_address.to(tl.pointer_type(g_type)), 16)
            even = n // 16 * 16  # which the compiler knows to be a multiple, and no promise about n itself
            _tile(w_at, g_at, old, new, top_row, j, m, even, numbers, maximize, tile_rows, tile_columns, some_rows)
        else:
            w_at, g_at = w_address.to(tl.pointer_type(w_type)), g_address.to(tl.pointer_type(g_type))
            _tile(w_at, g_at, old, new, top_row, j, m, n, numbers, maximize, tile_rows, tile_columns, some_rows)
    else:
        i = top_row + tl.arange(0, tile_rows)
        tl.atomic_max(new + i, tl.load(old + i, mask=i < m, other=0.0), mask=i < m, sem="relaxed")
        tl.atomic_max(new + m + j, tl.load(old + m + j, mask=j < n, other=0.0), mask=j < n, sem="relaxed")


@triton.jit
def _tile(
    w_at,
    g_at,
    old,
    new,
    top_row,
    j,
    m,
    n,
    numbers,
    maximize: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    some_rows: tl.constexpr,
):
    """Step weights, and raise the new accumulators to the second moments of these rows and columns."""
    rate, eps, weight_decay = numbers
    right = tl.load(old + m + j, mask=j < n, other=0.0)
    highest = tl.zeros((some_rows, tile_columns), tl.float32)
    for offset in range(0, tile_rows, some_rows):
        i = top_row + offset + tl.arange(0, some_rows)
        inside = (i < m)[:, None] & (j < n)[None, :]
        at = i[:, None] * n + j[None, :]
        g = tl.load(g_at + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_at + at, mask=inside, other=0.0).to(tl.float32)
        down = tl.load(old + i, mask=i < m, other=0.0)
        if maximize:
            g = -g
        nu = tl.minimum(down[:, None], right[None, :]) + g * g  # outside of the matrix 0
        w -= rate * weight_decay * w + rate * g / tl.sqrt_rn(nu + eps)
        tl.store(w_at + at, w.to(w_at.dtype.element_ty), mask=inside)
        highest = tl.maximum(highest, nu)
        tl.atomic_max(new + i, tl.max(nu, axis=1), mask=i < m, sem="relaxed")
    tl.atomic_max(new + m + j, tl.max(highest, axis=0), mask=j < n, sem="relaxed")
