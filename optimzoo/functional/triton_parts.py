"""The device's part of `part_kernel`, in Triton: what is imported only where it runs."""

# mypy: disallow-untyped-defs=False
# Triton would read the annotations.

import triton
import triton.language as tl

from optimzoo.functional.triton_adamw import adamw, find, read_rate


@triton.jit(do_not_specialize=["count", "top"])
def step_lines(
    table,
    found_inf,
    lr,
    count,
    top,
    scale,
    weight_decay,
    checked: tl.constexpr,
    lr_is_tensor: tl.constexpr,
    maximize: tl.constexpr,
    free: tl.constexpr,
    columns: tl.constexpr,
    line: tl.constexpr,
    w_type: tl.constexpr,
    g_type: tl.constexpr,
):
    """A line of one tensor, all of which the plain rule steps: of which the table says, (count, columns)."""
    program = tl.program_id(0).to(tl.int64)
    which = find(table, program, count, top, columns)
    row = table + which * columns
    step = True
    if checked:
        step = tl.load(found_inf + which) == 0
    if step:
        rate = read_rate(lr, lr_is_tensor)
        start = tl.multiple_of((program - tl.load(row)) * line, line)
        at, elements = start + tl.arange(0, line), tl.load(row + 4)
        w_address, g_address = tl.load(row + 2), tl.load(row + 3)
        if (tl.load(row + 1) != 0) & (start + line <= elements):  # without a mask several elements are one access
            w_vectors = tl.multiple_of(w_address.to(tl.pointer_type(w_type)), 16)
            g_vectors = tl.multiple_of(g_address.to(tl.pointer_type(g_type)), 16)
            _line(w_vectors + at, g_vectors + at, None, rate, scale, weight_decay, maximize, free)
        else:
            w_base, g_base = w_address.to(tl.pointer_type(w_type)), g_address.to(tl.pointer_type(g_type))
            _line(w_base + at, g_base + at, at < elements, rate, scale, weight_decay, maximize, free)


@triton.jit(do_not_specialize=["count", "top", "deepest"])
def step_matrices(
    table,
    found_inf,
    lr,
    grown,
    root,
    count,
    top,
    deepest,
    scale,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    checked: tl.constexpr,
    lr_is_tensor: tl.constexpr,
    maximize: tl.constexpr,
    free: tl.constexpr,
    by_rows: tl.constexpr,
    columns: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    some_rows: tl.constexpr,
    w_type: tl.constexpr,
    g_type: tl.constexpr,
):
    """A tile of one matrix (m, n), of which some rows or columns are AdamW's."""
    program = tl.program_id(0).to(tl.int64)
    which = find(table, program, count, top, columns)
    row = table + which * columns
    usable = True
    if checked:
        usable = tl.load(found_inf + which) == 0
    if usable:
        rate = read_rate(lr, lr_is_tensor)
        numbers = (rate * grown, root, rate, scale, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps)
        m, n, k = tl.load(row + 7), tl.load(row + 8), tl.load(row + 9)
        across = (n + tile_columns - 1) // tile_columns
        tile = program - tl.load(row)
        top_row = tile // across * tile_rows
        j = tile % across * tile_columns + tl.arange(0, tile_columns)
        chosen = tl.load(row + 6).to(tl.pointer_type(tl.int32))
        w_address, g_address = tl.load(row + 2), tl.load(row + 3)
        m_address, v_address = tl.load(row + 4), tl.load(row + 5)
        bounds = (top_row, m, k, deepest)
        how: tl.constexpr = (maximize, free, by_rows, tile_rows, some_rows)
        if tl.load(row + 1) != 0:
            w_at = tl.multiple_of(w_address.to(tl.pointer_type(w_type)), 16)
            g_at = tl.multiple_of(g_address.to(tl.pointer_type(g_type)), 16)
            m_at = tl.multiple_of(m_address.to(tl.pointer_type(tl.float32)), 16)
            v_at = tl.multiple_of(v_address.to(tl.pointer_type(tl.float32)), 16)
            even = n // 16 * 16  # which the compiler knows to be a multiple, and no promise about n itself
            _tile(w_at, g_at, m_at, v_at, chosen, j, even, bounds, numbers, how)
        else:
            w_at, g_at = w_address.to(tl.pointer_type(w_type)), g_address.to(tl.pointer_type(g_type))
            m_at, v_at = m_address.to(tl.pointer_type(tl.float32)), v_address.to(tl.pointer_type(tl.float32))
            _tile(w_at, g_at, m_at, v_at, chosen, j, n, bounds, numbers, how)


@triton.jit
def _tile(w_at, g_at, m_at, v_at, chosen, j, n, bounds, numbers, how: tl.constexpr):
    """A few rows at a time: all of a tile's numbers would not fit into registers."""
    top_row, m, k, deepest = bounds
    rate_grown, root, rate, scale, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = numbers
    maximize: tl.constexpr = how[0]
    free: tl.constexpr = how[1]
    by_rows: tl.constexpr = how[2]
    tile_rows: tl.constexpr = how[3]
    some_rows: tl.constexpr = how[4]
    if not by_rows:
        place, is_chosen = _place(chosen, j, k, deepest)
    for offset in range(0, tile_rows, some_rows):
        i = top_row + offset + tl.arange(0, some_rows)
        inside = (i < m)[:, None] & (j < n)[None, :]
        at = i[:, None] * n + j[None, :]
        if by_rows:
            place, is_chosen = _place(chosen, i, k, deepest)
            mine, there = inside & is_chosen[:, None], place[:, None] * n + j[None, :]
        else:
            mine, there = inside & is_chosen[None, :], i[:, None] * k + place[None, :]
        g, w = tl.load(g_at + at, mask=inside).to(tl.float32), tl.load(w_at + at, mask=inside).to(tl.float32)
        first, second = tl.load(m_at + there, mask=mine, other=0.0), tl.load(v_at + there, mask=mine, other=0.0)
        if maximize:
            g = -g
        first, second, u = adamw(
            g, first, second, rate_grown, root, beta1, one_minus_beta1, beta2, one_minus_beta2, eps
        )
        u = tl.where(mine, u, _plain(g, rate, scale, free))
        w -= rate * weight_decay * w + u
        tl.store(m_at + there, first, mask=mine)
        tl.store(v_at + there, second, mask=mine)
        tl.store(w_at + at, w.to(w_at.dtype.element_ty), mask=inside)


@triton.jit
def _place(chosen, at, k, deepest):
    """Where numbers stand among `chosen` (k,), ascending, and whether they do: a place is below k where they do."""
    place = at * 0  # how many of the chosen are below
    while deepest > 0:
        probe = place + deepest
        below = tl.load(chosen + probe - 1, mask=probe <= k, other=2147483647) < at
        place = tl.where(below, probe, place)
        deepest = deepest >> 1
    return place, tl.load(chosen + place, mask=place < k, other=-1) == at


@triton.jit
def _line(w_at, g_at, inside, rate, scale, weight_decay, maximize: tl.constexpr, free: tl.constexpr):
    g, w = tl.load(g_at, mask=inside).to(tl.float32), tl.load(w_at, mask=inside).to(tl.float32)
    if maximize:
        g = -g
    w -= rate * weight_decay * w + _plain(g, rate, scale, free)
    tl.store(w_at, w.to(w_at.dtype.element_ty), mask=inside)


@triton.jit
def _plain(g, rate, scale, free: tl.constexpr):
    """The step of the rule without averages, with its rate."""
    u = tl.zeros_like(g)
    if free == "sign":
        u = rate * scale * ((g > 0).to(tl.float32) - (g < 0).to(tl.float32))
    elif free == "sgd":
        u = rate * scale * g
    return u
