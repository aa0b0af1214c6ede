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

    `transposed`: the second factor is the first one's transpose. Little more memory than the step that it is for.
    """
    half = inner // 2
    left = _numbers(m, inner, dtype)
    left[:, half : 2 * half] = left[:, :half]
    square = m == inner == n and not transposed
    if transposed:
        left[1::2, half : 2 * half].neg_()  # what every other line has in common with its neighbours cancels
    elif square:
        torch.neg(left[:half], out=left[half : 2 * half])
    lefts = left.expand(batch, -1, -1).contiguous()
    del left
    if transposed or square:
        rights = lefts.mT if transposed else lefts
    else:
        right = _numbers(inner, n, dtype)
        torch.neg(right[:half], out=right[half : 2 * half])
        rights = right.expand(batch, -1, -1).contiguous()
        del right
    found = torch.bmm(lefts, rights)
    return torch.equal(found[-1], torch.mm(lefts[-1], rights[-1], out=found[0]))


def _numbers(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(m * n, dtype=torch.float32, device="cpu").sin_().view(m, n).to(dtype)
