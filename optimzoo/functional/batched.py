"""Whether products of several matrices at once give the bits that they give one by one."""

import functools

import torch

LONG = 2  # longer side over shorter; below, sums were never seen to be split


def batch_is_as_alone(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether, on this CPU, x x^T of (batch, *shape), laid on their longer sides, has the bits of x x^T of each.

    Long sums of one matrix may be split among threads where those of several are not. Which are is the library's
    business and cannot be asked, so it is tried, once for each shape and number of threads.
    """
    s, longer = sorted(shape)
    return longer < LONG * s or _tried(batch, s, longer, dtype, torch.get_num_threads())


@functools.cache
def _tried(batch: int, s: int, longer: int, dtype: torch.dtype, threads: int) -> bool:
    """With sums whose terms cancel, so that each result is what its own order of adding rounded off."""
    left = torch.zeros(batch, s, longer, dtype=dtype)
    first, second = left[..., : longer // 2], left[..., longer // 2 : longer // 2 * 2]
    for number, terms in enumerate(first):
        start = number * terms.numel()
        terms.copy_(torch.arange(start, start + terms.numel(), dtype=torch.float32).tan_().view(terms.shape))
    right = left.clone()
    second.copy_(first).neg_()
    right[..., longer // 2 : longer // 2 * 2] = first
    together = torch.bmm(left, right.mT)
    return all(torch.equal(torch.mm(a, b.mT), one) for a, b, one in zip(left, right, together, strict=True))
