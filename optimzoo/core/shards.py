"""Parameters whose rows are spread over ranks (FSDP2): the one file of core that knows DTensor.

Everywhere else a tensor is whole, or it is this rank's rows of one; a plain tensor is both, so nobody asks which it is.
What is called a collective must be called by all ranks in the same order.
"""

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SMALL = 4096  # elements below which a slot that is not shaped like its parameter is kept whole on every rank


def is_sharded(t: Any) -> "TypeGuard[DTensor]":
    """Whether the tensor is a DTensor, asked without importing what nobody uses, and many times in a step."""
    if type(t) is Parameter or type(t) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def refuse_placement(p: Tensor, name: str, owner: str) -> None:
    """A parameter that is sharded in another way than by rows, over at most one axis of its mesh, is refused."""
    if not is_sharded(p):
        return
    from torch.distributed.tensor import Replicate, Shard

    by_rows = [placement == Shard(0) and type(placement) is Shard for placement in p.placements]
    rest = [placement for placement, rows in zip(p.placements, by_rows, strict=True) if not rows]
    if sum(by_rows) > 1 or not all(isinstance(placement, Replicate) for placement in rest):
        raise TypeError(
            f"{owner}: parameter {name!r} has the placements {p.placements}; shards by rows are supported, that is "
            "Shard(0) on one axis of the mesh and Replicate() on others, as fully_shard makes them by default"
        )


def local(t: Tensor) -> Tensor:
    """This rank's rows."""
    return t._local_tensor if is_sharded(t) else t


def whole(t: Tensor) -> Tensor:
    """All rows, gathered where they are spread: a collective."""
    return t.full_tensor() if is_sharded(t) else t


def _axis(p: "DTensor") -> int | None:
    """The axis of the mesh over which the rows are spread."""
    return next((axis for axis, placement in enumerate(p.placements) if placement.is_shard()), None)


def _rows(n: int, p: "DTensor") -> tuple[int, int]:
    """(first, number) of this rank's rows out of n, spread as p's are: ceil(n / ranks) each until they are used up."""
    axis = _axis(p)
    if axis is None:
        return 0, n
    each = -(-n // p.device_mesh.size(axis))
    first = min(p.device_mesh.get_local_rank(axis) * each, n)
    return first, min(each, n - first)


def part(full: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a whole tensor that has `like`'s number of rows; a view."""
    return full.narrow(0, *_rows(full.shape[0], like)) if is_sharded(like) else full


def blank(t: Tensor) -> Tensor:
    """A whole tensor that is to be filled and then kept in `t`: `t` itself, unless that has some rows only."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device) if is_sharded(t) else t


def keep(full: Tensor, t: Tensor) -> None:
    """Write this rank's rows of a whole tensor into `t`; nothing to do where `t` is that tensor."""
    if full is not t:
        local(t).copy_(part(full, t))


def offset(t: Tensor) -> int:
    """The position in the whole tensor of this rank's first element."""
    return _rows(t.shape[0], t)[0] * math.prod(t.shape[1:]) if is_sharded(t) else 0


def _spread(shape: tuple[int, ...], p: Tensor) -> bool:
    """Whether a slot of this shape is spread over the ranks that share p."""
    return is_sharded(p) and (tuple(shape) == tuple(p.shape) or (len(shape) > 0 and math.prod(shape) >= SMALL))


def empty(shape: tuple[int, ...], dtype: torch.dtype | None, p: Tensor) -> Tensor:
    """A slot for p: its rows spread like p's if it is shaped like p or large, else whole on every rank."""
    if not _spread(shape, p):
        return torch.empty(shape, dtype=dtype, device=p.device)
    assert is_sharded(p)
    from torch.distributed.tensor import DTensor

    rows = torch.empty((_rows(shape[0], p)[1], *shape[1:]), dtype=dtype, device=local(p).device)
    strides = torch.empty(shape, device="meta").stride()  # uneven shards do not tell what they are shards of
    return DTensor.from_local(
        rows, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def placed(t: Tensor, p: Tensor) -> bool:
    """Whether a slot of p lies where `empty` would put it."""
    if not is_sharded(t) or not is_sharded(p):
        return is_sharded(t) == _spread(t.shape, p)
    return _spread(t.shape, p) and (t.device_mesh, t.placements) == (p.device_mesh, p.placements)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same rows on this rank, as on all others."""
    if not is_sharded(a):
        return not is_sharded(b)
    return is_sharded(b) and (a.device_mesh, a.placements) == (b.device_mesh, b.placements)


def in_blocks(scale: Tensor, codes: Tensor, block: int) -> bool:
    """Whether each rank's codes are exactly the blocks that its scales are about."""
    if not (is_sharded(scale) and is_sharded(codes)) or _axis(codes) is None:
        return is_sharded(scale) == is_sharded(codes)
    ranks = codes.device_mesh.size(_axis(codes))
    elements = -(-codes.shape[0] // ranks) * math.prod(codes.shape[1:])
    return elements == -(-scale.shape[0] // ranks) * block


def sum_over_ranks(rows: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Parameter -> numbers that the ranks which share it add up, all parameters of a mesh at once: a collective."""
    sums: dict[Tensor, Tensor] = {}
    meshes: dict[Any, list[Tensor]] = {}
    for p in rows:
        if is_sharded(p):
            meshes.setdefault((p.device_mesh, rows[p].device), []).append(p)
    for (mesh, _), params in meshes.items():
        table = torch.stack([rows[p] for p in params])
        for axis in range(mesh.ndim):
            dist.all_reduce(table, group=mesh.get_group(axis))
        sums |= dict(zip(params, table.unbind(), strict=True))
    return sums
