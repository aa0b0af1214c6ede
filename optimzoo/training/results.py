"""A finished run in numbers."""

import functools
import hashlib
import math
import statistics
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from optimzoo.core import ZooOptimizer
from optimzoo.memory import ledger
from optimzoo.modules.delta_file import trainable_numbers
from optimzoo.training.folder import versions
from optimzoo.training.recipe import Recipe
from optimzoo.training.tasks import Data


def state_bytes(optimizers: list[Optimizer]) -> int:
    """What several optimizers remember together."""
    return sum(_bytes(optimizer) for optimizer in optimizers)


def _bytes(optimizer: Optimizer) -> int:
    """Bytes after the last step: the zoo's own have written them down, others are walked."""
    if isinstance(optimizer, ZooOptimizer) and optimizer.memory_history:
        return optimizer.memory_history[-1].state_bytes
    return ledger(optimizer).total


def summarise(
    recipe: Recipe,
    corpus: Data,
    model: nn.Module,
    optimizers: list[Optimizer],
    rows: list[dict[str, Any]],
    activations: int,
) -> dict[str, Any]:
    """The result of a run, as plain data."""
    # What a checkpoint of the model holds: frozen factors are buffers, and as much a part of the weights.
    weights = list({id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    numbers = trainable_numbers(model)
    by_kind: dict[str, int] = {}
    for optimizer in optimizers:
        for kind, nbytes in ledger(optimizer).by("kind").items():
            by_kind[kind] = by_kind.get(kind, 0) + nbytes
    held_out = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    spaces = [row["memory/workspace_bytes"] for row in rows if row["memory/workspace_bytes"] is not None]
    tokens = recipe.data.batch * recipe.data.sequence * recipe.data.accumulate
    step_s, optimizer_s = median(rows, "step_s"), median(rows, "optimizer_s")
    return {
        "key": recipe.key,
        "label": recipe.optimizer.name,
        "optimizer": recipe.optimizer.model_dump(),
        "seed": recipe.seed,
        "steps": len(rows),
        "tokens": len(rows) * tokens,
        "parameters": numbers.total,
        "trainable": numbers.trainable,
        "diverged": rows[-1]["validation_loss"] is None,
        "validation_loss": rows[-1]["validation_loss"],
        "best_validation_loss": min(held_out, default=None),
        "validation_accuracy": rows[-1].get("validation_accuracy"),
        "bytes": {
            "weights": sum(p.numel() * p.element_size() for p in weights),
            "largest_parameter": max(p.numel() * p.element_size() for p in weights),
            "state": sum(by_kind.values()),
            "state_by_kind": by_kind,
            "activations": activations,
            "workspace": max(spaces, default=None),
        },
        "step_s": step_s,
        "optimizer_s": optimizer_s,
        "tokens_per_s": tokens / step_s if step_s else None,
        "corpus": corpus.facts,
        "versions": versions(),
        "code": code(),
    }


def median(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.median(values) if values else None


@functools.cache
def code() -> str:
    """A hash of the package's own sources: cached results of other code are recognised by it."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.c")]):
        if path.relative_to(root).parts[0] in ("core", "functional", "modules", "optimizers"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def finite(value: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
