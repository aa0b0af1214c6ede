"""A distributed checkpoint's optimizer state, groups first."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from optimzoo.core.checkpoint import adopt_groups
from optimzoo.core.optimizer import ZooOptimizer


def load_dcp(model: nn.Module, opt: ZooOptimizer, checkpoint_id: str | Path, *, key: str = "optimizer") -> None:
    """Load what `dcp.save({key: get_optimizer_state_dict(model, opt), ...}, checkpoint_id=...)` has written.

    On any number of ranks, flattened or not. `dcp.load` fills the tensors that an optimizer has now; which those are
    depends on options and on the step where a method keeps state for a part that moves (FRUGAL's blocks, SFT's phases).
    So the groups are read first, and the tensors when there is a place for each. Load the model before. Every rank
    must call this.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    reader = dcp.FileSystemReader(checkpoint_id)
    known = reader.read_metadata().state_dict_metadata
    groups: Any = get_optimizer_state_dict(model, opt)["param_groups"]
    flat = any(f"{key}.param_groups.{name}.lr" in known for group in groups for name in group["params"])
    starts = [f"{key}.param_groups.{group['params'][0] if flat else i}." for i, group in enumerate(groups)]
    places = {entry: _place(known[entry]) for entry in known if entry.startswith(tuple(starts))}
    if not all(start + "lr" in places for start in starts):
        raise ValueError(f"{checkpoint_id} holds no state under {key!r} for the groups of this {type(opt).__name__}")

    def load(found: dict[str, Any]) -> dict[str, Any]:
        dcp.load(found, storage_reader=reader, no_dist=not (dist.is_available() and dist.is_initialized()))
        return found

    values = load(places)
    adopt_groups(
        opt, [{k.removeprefix(start): v for k, v in values.items() if k.startswith(start)} for start in starts]
    )
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = load({key: get_optimizer_state_dict(model, opt, options=options)})
    set_optimizer_state_dict(model, opt, state[key], options=options)


def _place(entry: Any) -> Any:
    """What `dcp.load` is to fill: a tensor for a tensor, anything for anything else."""
    return torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else None
