"""A run on several processes: who has which rows of a batch, who writes, and checkpoints for any number of them."""

import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from optimzoo.core import ZooOptimizer
from optimzoo.core.ranks import mean_over_ranks
from optimzoo.core.shards import is_sharded, whole
from optimzoo.training.errors import UserError
from optimzoo.training.folder import Folder, Log
from optimzoo.training.recipe import Recipe


@contextlib.contextmanager
def together(recipe: Recipe) -> Iterator["Ranks"]:
    """The processes that torchrun has started, connected; a single one where the recipe does not ask for more."""
    started, connected = "LOCAL_RANK" in os.environ, dist.is_initialized()
    if recipe.distributed is None:
        if started and int(os.environ["WORLD_SIZE"]) > 1:
            raise UserError("torchrun started several processes: say how they share the run with distributed.strategy")
        yield Ranks(0, 1, None)
        return
    if not (started or connected):
        raise UserError(
            "distributed: torchrun starts the processes of such a recipe, as in "
            "`torchrun --nproc-per-node 2 -m optimzoo run RECIPE`; without it, leave the section out"
        )
    cuda = torch.cuda.is_available() and recipe.device != "cpu"
    if cuda and started:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not connected:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), recipe.distributed.strategy)
        if recipe.data.batch % ranks.world:
            raise UserError(
                f"data.batch={recipe.data.batch} is the batch of all ranks together and cannot be split over "
                f"{ranks.world}; make it a multiple"
            )
        yield ranks
        dist.barrier()  # what the first has written is there for all
    finally:
        if not connected:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """This process among all; with a world of 1 everything here leaves things as they are."""

    rank: int
    world: int
    strategy: str | None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def salt(self) -> tuple[int, ...]:
        """What makes this process's dropout another than that of the first."""
        return () if self.first else (self.rank,)

    def folder(self, path: Path) -> Folder:
        return Folder(path) if self.first else Reader(path)

    def spread(self, model: nn.Module) -> nn.Module:
        """What is called in place of the model; under fsdp2 the model itself, with sharded parameters."""
        if self.strategy == "ddp":
            known = inspect.signature(DistributedDataParallel).parameters
            # The second is its name before torch 2.13. All have built the same buffers.
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            unsent: dict[str, Any] = {name: False}
            return DistributedDataParallel(model, **unsent)
        if self.strategy == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for block in _blocks(model):
                fully_shard(block)
            fully_shard(model)
        return model

    def rows(self, batch: Any) -> Any:
        """This process's part of a batch; with fewer rows than processes, none for the last of them."""
        return batch if self.world == 1 else tree_map(lambda t: t.tensor_split(self.world)[self.rank], batch)

    def mean(self, t: Tensor) -> Tensor:
        """The mean over the processes, which have equal parts of every batch that is trained on."""
        return t if self.world == 1 else mean_over_ranks(t.clone())

    def weighted(self, values: Tensor, weights: Tensor) -> Tensor:
        """The mean of the values of all processes, of which each counts as much as its weight."""
        sums = torch.stack([(values * weights).sum(), weights.sum()])
        if self.world > 1:
            dist.all_reduce(sums)
        return sums[0] / sums[1]

    def whole(self, state: Any) -> Any:
        """A state without shards, on the process that writes it."""

        def gathered(t: Any) -> Any:
            if not is_sharded(t):
                return t
            full = whole(t)
            return full if self.first else None

        return tree_map(gathered, state)

    def load_model(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        live = model.state_dict()
        model.load_state_dict({name: _like(t, live.get(name)) for name, t in state.items()})

    def load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if self.strategy == "fsdp2" and not isinstance(optimizer, ZooOptimizer):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            spread = {i: {key: _like(t, params[i]) for key, t in slots.items()} for i, slots in state["state"].items()}
            state = {**state, "state": spread}
        optimizer.load_state_dict(state)


def _like(t: Any, live: Any) -> Any:
    """The tensor, spread as `live` is where it has its shape."""
    if not (is_sharded(live) and isinstance(t, Tensor) and t.shape == live.shape):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(live.device), live.device_mesh, live.placements, src_data_rank=None)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the model's lists of layers, lists inside such members left out."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for blocks in outer for block in blocks]


class Reader(Folder):
    """The folder of a run for those who only read it."""

    def open(self, recipe: Recipe, resume: bool) -> None:
        pass

    def save(self, recipe: Recipe, step: int, parts: dict[str, Any]) -> None:
        pass

    @contextlib.contextmanager
    def log(self, step: int) -> Iterator[Log]:
        with open(os.devnull, "wb", buffering=0) as nowhere:
            yield Unsynced(nowhere, self.rows()[:step])


class Unsynced(Log):
    """Rows that are remembered only."""

    def sync(self) -> None:
        pass
