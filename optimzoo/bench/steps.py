"""The optimizer's step alone: gradients stand ready, every candidate has parameters of its own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from optimzoo.bench import candidates, timing
from optimzoo.memory import Workspace, ledger
from optimzoo.memory.workspace import measure
from optimzoo.training.errors import UserError
from optimzoo.training.recipe import Recipe
from optimzoo.training.report import duration
from optimzoo.training.surroundings import now


def measure_steps(
    recipe: Recipe,
    names: Sequence[str],
    against: Sequence[str],
    *,
    layers: int | None = None,
    embeddings: bool = False,
    rounds: int = 50,
    warmup: int = 3,
    device: torch.device,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times in seconds, bytes, and ratios of 20th percentiles to every yardstick, as plain data.

    A candidate that cannot be built here whatever its options (its package is missing, say) has an "error" in place of
    figures; names and options that are wrong are refused before anything is measured. `progress` gets a line for each
    candidate that has stepped, and "" after each round.
    """
    labels = list(dict.fromkeys((*against, *names)))
    for label in labels:
        candidates.parsed(label)  # before a model is made
    model = candidates.subject(recipe, layers, embeddings, device)
    timing.let_memory_stay()
    rows: dict[str, dict[str, Any]] = {label: {} for label in labels}
    built: dict[str, list[Optimizer]] = {}
    for label in labels:
        try:
            built[label] = candidates.optimizers_on(model, label)
        except UserError as error:
            if candidates.can_be_built(model, label):
                raise
            rows[label] = {"error": str(error)}
    if not built:
        raise UserError("; ".join(row["error"] for row in rows.values()))
    for label, optimizers in built.items():
        rows[label] = {"first": sum(_step(optimizers, device))}
        progress(f"{label}: first step {duration(rows[label]['first'])}")
    for optimizers in built.values():
        for _ in range(warmup):
            _step(optimizers, device)
    actions = {label: partial(_step, optimizers, device) for label, optimizers in built.items()}
    found = timing.interleaved(actions, rounds, progress)
    for label, optimizers in built.items():
        times = timing.summary(found[label][0])
        rows[label] |= {"p20": times.p20, "p50": times.p50, "spread": times.spread, **_held(optimizers, device)}
    yardsticks = [label for label in dict.fromkeys(against) if label in built]
    for label in built:
        rows[label]["ratios"] = {yard: rows[label]["p20"] / rows[yard]["p20"] for yard in yardsticks}
    spreads = {label: rows[label]["spread"] for label in built}
    tensors = [p for p in model.parameters() if p.requires_grad]
    return {
        "layers": layers,
        "weights": sum(p.numel() for p in tensors),
        "largest": max(p.numel() * p.element_size() for p in tensors),
        "rounds": rounds,
        "invalid": timing.verdict(spreads, rounds),
        "rows": rows,
    }


def _step(optimizers: list[Optimizer], device: torch.device) -> list[float]:
    start = now(device)
    for optimizer in optimizers:
        optimizer.step()
    return [now(device) - start]


def _held(optimizers: list[Optimizer], device: torch.device) -> dict[str, int]:
    """Bytes of state, and the peak of a step's temporaries (inside of compiled graphs they are not seen on a CPU)."""
    with measure(device) if device.type == "cuda" else Workspace() as space:
        _step(optimizers, device)
    return {"state": sum(ledger(optimizer).total for optimizer in optimizers), "workspace": space.peak}
