"""Whether products of several matrices at once give the bits that they give one by one."""

import functools

import torch


def batch_is_as_alone(batch: int, shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> bool:
    """Whether on this CPU products of matrices of a shape, lying on their longer side, have the same bits in a batch.

    The products are x x^T, k k and k x, where k is square. Long sums of one matrix may be split among threads where
    those of several are not. Which are is the library's business and cannot be asked, so it is tried, once for each
    product and number of threads.
    """
    s, longer = sorted(shape)
    squared = _tried(batch, s, longer, s, dtype, threads, transposed=True)
    return squared and all(_tried(batch, s, s, n, dtype, threads, transposed=False) for n in {s, longer})


@functools.cache
def _tried(batch: int, m: int, inner: int, n: int, dtype: torch.dtype, threads: int, transposed: bool) -> bool:
    """(m, inner) @ (inner, n), with sums whose terms cancel: each result is what its own order of adding rounded off.

    `transposed`: the second factor is laid out in memory as (n, inner).
    """
    half = inner // 2
    left = torch.arange(max(m, n) * inner, dtype=torch.float32, device="cpu").sin_().view(-1, inner).to(dtype)
    left[:, half : 2 * half] = left[:, :half]
    right = left[:n].clone()
    right[:, half : 2 * half].neg_()
    right = right if transposed else right.mT.contiguous()
    lefts, rights = (t.expand(batch, -1, -1).contiguous() for t in (left[:m], right))
    if transposed:
        rights = rights.mT
    return torch.equal(torch.bmm(lefts, rights)[-1], torch.mm(lefts[-1], rights[-1]))
