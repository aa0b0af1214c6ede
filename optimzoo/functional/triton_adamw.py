"""The device's part of `adamw_kernel`, in Triton: what is imported only where it runs."""

# mypy: disallow-untyped-defs=False
# Triton would read the annotations.

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["count", "top"])
def step_some(
    table,
    found_inf,
    lr,
    count,
    top,
    beta1,
    one_minus_beta1,
    log_beta1,
    beta2,
    one_minus_beta2,
    log_beta2,
    eps,
    weight_decay,
    checked: tl.constexpr,
    lr_is_tensor: tl.constexpr,
    maximize: tl.constexpr,
    columns: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
    w_type: tl.constexpr,
    g_type: tl.constexpr,
):
    """A chunk of one tensor: of which the table says, (count, columns), as `adamw_kernel` writes it."""
    program = tl.program_id(0).to(tl.int64)
    which = find(table, program, count, top, columns)
    row = table + which * columns
    step = True
    if checked:
        step = tl.load(found_inf + which) == 0
    if step:
        t = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float32))).to(tl.float64)
        rate = read_rate(lr, lr_is_tensor)
        size, root = corrections(rate, t, log_beta1, log_beta2)
        w_address, g_address = tl.load(row + 2), tl.load(row + 3)
        m_address, v_address = tl.load(row + 4), tl.load(row + 5)
        w_base, g_base = w_address.to(tl.pointer_type(w_type)), g_address.to(tl.pointer_type(g_type))
        m_base, v_base = m_address.to(tl.pointer_type(tl.float32)), v_address.to(tl.pointer_type(tl.float32))
        # Pointers of their own: what is promised of one holds wherever it is used.
        w_vectors = tl.multiple_of(w_address.to(tl.pointer_type(w_type)), 16)
        g_vectors = tl.multiple_of(g_address.to(tl.pointer_type(g_type)), 16)
        m_vectors = tl.multiple_of(m_address.to(tl.pointer_type(tl.float32)), 16)
        v_vectors = tl.multiple_of(v_address.to(tl.pointer_type(tl.float32)), 16)
        aligned = tl.load(row + 1) != 0
        start = tl.multiple_of((program - tl.load(row)) * chunk, chunk)
        left = tl.load(row + 7) - start
        numbers = (size, root, rate * weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps)
        for offset in range(0, chunk, tile):
            at = start + offset + tl.arange(0, tile)
            if aligned & (offset + tile <= left):  # without a mask several elements are one access
                _tile(w_vectors + at, g_vectors + at, m_vectors + at, v_vectors + at, None, numbers, maximize)
            elif offset < left:
                _tile(w_base + at, g_base + at, m_base + at, v_base + at, at < start + left, numbers, maximize)


@triton.jit
def find(table, program, count, top, columns: tl.constexpr):
    """The number of the last tensor whose first program is not behind this one."""
    which = program * 0
    while top > 0:
        probe = which + top
        first = tl.load(table + probe * columns, mask=probe < count, other=1 << 62)
        which = tl.where(first <= program, probe, which)
        top = top >> 1
    return which


@triton.jit
def read_rate(lr, lr_is_tensor: tl.constexpr):
    """The learning rate, which may be in memory."""
    rate = lr
    if lr_is_tensor:
        rate = tl.load(lr).to(tl.float32)
    return rate


@triton.jit
def corrections(rate, t, log_beta1, log_beta2):
    """What the first average is multiplied by in step t, float64, and the second's root."""
    # 1 - 0.999^t needs the digits of float64; of the logarithm float32's do.
    one = 1 - tl.exp2(t * log_beta1)
    two = 1 - tl.exp2(t * log_beta2)
    return (rate / one).to(tl.float32), (1 / tl.sqrt(two)).to(tl.float32)


@triton.jit
def adamw(g, m, v, size, root, beta1, one_minus_beta1, beta2, one_minus_beta2, eps):
    """Both averages after a gradient, and the step that they make, with its rate."""
    m = _lerp(m, g, beta1, one_minus_beta1)
    v = _lerp(v, g * g, beta2, one_minus_beta2)
    return m, v, size * m / (tl.sqrt_rn(v) * root + eps)


@triton.jit
def _tile(w_at, g_at, m_at, v_at, inside, numbers, maximize: tl.constexpr):
    size, root, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = numbers
    g, w = tl.load(g_at, mask=inside).to(tl.float32), tl.load(w_at, mask=inside).to(tl.float32)
    m, v = tl.load(m_at, mask=inside), tl.load(v_at, mask=inside)
    if maximize:
        g = -g
    m, v, u = adamw(g, m, v, size, root, beta1, one_minus_beta1, beta2, one_minus_beta2, eps)
    w -= decay * w + u
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)
    tl.store(w_at, w.to(w_at.dtype.element_ty), mask=inside)


@triton.jit
def _lerp(old, new, beta, one_minus_beta):
    # The one keeps a constant as it is, however near 1 beta is; the other is exactly `new` where beta is 0.
    return tl.where(beta > 0.5, old + one_minus_beta * (new - old), new - beta * (new - old))
