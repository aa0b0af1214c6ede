"""FSDP2 and DDP: what several ranks compute together is what one process computes alone, to the bit."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from optimzoo.core import shards, storage
from tests.cases import ALL, PLAIN, Tiny, build, give_gradients, short_options, train
from tests.ranks import run_together
from tests.test_memory import reachable

WORLDS = (1, 2, 4)


class Odd(Tiny):
    """Row counts that no number of ranks divides, fewer rows than ranks, a convolution."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(16, dtype)
        self.thin = nn.Linear(16, 2, dtype=dtype)
        self.conv = nn.Conv2d(4, 9, 2, dtype=dtype)
        self.long = nn.Linear(16, 43, dtype=dtype)


def odd(dtype: torch.dtype = torch.float32) -> Odd:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odd(dtype)


def sharded(model: nn.Module, **how) -> nn.Module:
    for name in ("square", "wide"):
        fully_shard(model.get_submodule(name), **how)
    return fully_shard(model, **how)


def rows_of(full: Tensor, like: DTensor) -> DTensor:
    """The same tensor spread as torch spreads it, with nothing of optimzoo's."""
    rank, chunks = dist.get_rank(), full.chunk(dist.get_world_size())
    mine = chunks[rank] if rank < len(chunks) else full[:0]
    return DTensor.from_local(
        mine.clone(), like.device_mesh, like.placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.detach()


def hand_over(alone: nn.Module, together: nn.Module, seed: int) -> None:
    """The same full gradients for both."""
    give_gradients(alone.parameters(), seed)
    for p, q in zip(alone.parameters(), together.parameters(), strict=True):
        q.grad = rows_of(p.grad, q) if isinstance(q, DTensor) else p.grad.clone()


def assert_same(alone, opt, together, twin) -> None:
    """To the bit, but for vectors: kernels round the elements that do not fill a vector register in another way."""
    for (name, p), q in zip(alone.named_parameters(), together.parameters(), strict=True):
        held, other = opt.state[p], twin.state[q]
        assert held.keys() == other.keys()
        for key, t in {"weight": p.detach(), **held}.items():
            found = whole(q if key == "weight" else other[key])
            if p.ndim == 1:
                torch.testing.assert_close(
                    found, t, rtol=1e-6, atol=1e-7, msg=lambda m, k=key, n=name: f"{k} of {n}: {m}"
                )
            else:
                assert torch.equal(found, t), f"{key} of {name} differs by {(found.float() - t.float()).abs().max()}"


OPTIONS: dict[str, list[dict]] = {
    "adamw": [{"weight_decay": 0.1}, {"maximize": True}],
    "frugal": [
        *({"projection": projection} for projection in ("columns", "rows", "randk", "svd", "random", "block")),
        {"state_full": "lion"},
        {"projection": "block", "state_full": "sgdm"},
        {"density": 0.0},
        {"density": 1.0, "state_full": "lion"},
    ],
    "cosmos": [{"rank": 4}, {"nesterov": False}],
    "sm3": [{}, {"momentum": 0.9}],
    "swan": [{}, {"backend": "exact"}],
}
NARROW = [
    {"state_dtype": "bfloat16", "rounding": "stochastic"},
    {"state_dtype": "int8", "rounding": "error"},
    {"state_dtype": "int8", "rounding": "stochastic"},
]


def same_as_one_process(folder: Path, *, name: str, options: dict, dtype: torch.dtype = torch.float32) -> None:
    shards.SMALL = storage.SMALL = 32
    cls = PLAIN[name]
    options = short_options(cls) | {"lr": 1e-2} | options
    alone, together = odd(dtype), sharded(odd(dtype))
    opt, twin = cls(alone, **options), cls(together, **options)
    planned = twin.memory().total
    for step in range(5):
        hand_over(alone, together, step)
        kept = [q.grad.to_local().clone() for q in together.parameters()]
        opt.step()
        twin.step()
        assert all(torch.equal(q.grad.to_local(), g) for q, g in zip(together.parameters(), kept, strict=True))
        assert twin.memory().total == twin._state_bytes == sum(reachable(twin).values())
        if options.get("projection") != "block":
            assert twin.memory().total == planned
    assert_same(alone, opt, together, twin)
    assert twin.memory().slack == 0
    if dist.get_world_size() == 4 and planned > 1000:
        assert twin.memory().total < 0.6 * opt.memory().total, "state is not spread"


def same_under_ddp(folder: Path, *, name: str) -> None:
    """Every rank has the same batch, so that the mean of the gradients is each of them."""
    alone, together = (Tiny_() for _ in range(2))
    opt, twin = build(ALL[name], alone, lr=1e-2), build(ALL[name], together, lr=1e-2)
    train(alone, opt, 0, 8)
    train(nn.parallel.DistributedDataParallel(together), twin, 0, 8)
    for (key, p), q in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert torch.equal(p, q), key


def Tiny_() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny()


CASES = {
    f"{name}-{'-'.join(f'{v}' for v in options.values()) or 'defaults'}": partial(
        same_as_one_process, name=name, options=options
    )
    for name in PLAIN
    for options in OPTIONS.get(name, [{}])
}
CASES |= {
    f"{name}-narrow-{'-'.join(f'{v}' for v in options.values())}": partial(
        same_as_one_process, name=name, options=options, dtype=torch.bfloat16
    )
    for name in PLAIN
    for options in NARROW
}
CASES |= {f"{name}-ddp": partial(same_under_ddp, name=name) for name in ALL}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """World size -> case -> what went wrong."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}

    def run(world: int) -> dict[str, str]:
        if world not in results:
            results[world] = run_together(world, CASES, folder)
        return results[world]

    return run


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_together(found, world, case):
    wrong = found(world)[case]
    assert not wrong, wrong
