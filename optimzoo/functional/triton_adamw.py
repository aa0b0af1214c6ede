"""The device's part of `adamw_kernel`, in Triton: what is imported only where it runs."""

# mypy: disallow-untyped-defs=False
# Triton would read the annotations.

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def step_some(
    table,
    numbers,
    found_inf,
    count,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    checked: tl.constexpr,
    maximize: tl.constexpr,
    aligned: tl.constexpr,
    levels: tl.constexpr,
    columns: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
    w_type: tl.constexpr,
    g_type: tl.constexpr,
):
    """A chunk of one tensor: of which the table says, (count, columns), as `adamw_kernel` writes it."""
    program = tl.program_id(0).to(tl.int64)
    which = program * 0
    for level in tl.static_range(levels):  # the last tensor whose first program is not behind this one
        probe = which + (1 << (levels - 1 - level))
        first = tl.load(table + probe * columns + columns - 1, mask=probe < count, other=1 << 62)
        which = tl.where(first <= program, probe, which)
    row = table + which * columns
    step = True
    if checked:
        step = tl.load(found_inf + which) == 0
    if step:
        size = tl.load(numbers + which)
        root = tl.load(numbers + count + which)
        keep = tl.load(numbers + 2 * count + which)
        w_base = tl.load(row).to(tl.pointer_type(w_type))
        g_base = tl.load(row + 1).to(tl.pointer_type(g_type))
        m_base = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        v_base = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        if aligned:
            w_base = tl.multiple_of(w_base, 16)
            g_base = tl.multiple_of(g_base, 16)
            m_base = tl.multiple_of(m_base, 16)
            v_base = tl.multiple_of(v_base, 16)
        start = tl.multiple_of((program - tl.load(row + 5)) * chunk, chunk)
        left = tl.load(row + 4) - start
        for offset in range(0, chunk, tile):
            at = start + offset + tl.arange(0, tile)
            w_at, g_at, m_at, v_at = w_base + at, g_base + at, m_base + at, v_base + at
            if offset + tile <= left:  # without a mask, several elements are one access
                _tile(
                    w_at,
                    g_at,
                    m_at,
                    v_at,
                    None,
                    size,
                    root,
                    keep,
                    one_minus_beta1,
                    beta2,
                    one_minus_beta2,
                    eps,
                    maximize,
                )
            elif offset < left:
                inside = at < start + left
                _tile(
                    w_at,
                    g_at,
                    m_at,
                    v_at,
                    inside,
                    size,
                    root,
                    keep,
                    one_minus_beta1,
                    beta2,
                    one_minus_beta2,
                    eps,
                    maximize,
                )


@triton.jit
def _tile(w_at, g_at, m_at, v_at, inside, size, root, keep, one_minus_beta1, beta2, one_minus_beta2, eps, maximize):
    g = tl.load(g_at, mask=inside).to(tl.float32)
    if maximize:
        g = -g
    m, v, w = tl.load(m_at, mask=inside), tl.load(v_at, mask=inside), tl.load(w_at, mask=inside).to(tl.float32)
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    w = w * keep - size * m / (tl.sqrt_rn(v) * root + eps)
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)
    tl.store(w_at, w.to(w_at.dtype.element_ty), mask=inside)
