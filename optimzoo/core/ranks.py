"""What several processes that train one model must agree on; a single process agrees with itself."""

import torch.distributed as dist
from torch import Tensor


def alone() -> bool:
    """Whether there is no other process to agree with."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def mean_over_ranks(t: Tensor) -> Tensor:
    """The average of the tensor over all processes, in place; each of them must call this."""
    if not alone():
        dist.all_reduce(t)
        t.div_(dist.get_world_size())
    return t


def from_first_rank(t: Tensor) -> Tensor:
    """The first process's tensor, in place; each of them must call this."""
    if not alone():
        dist.broadcast(t, 0)
    return t
