"""Whole training steps at equal batch, and where their time goes: forward, backward, optimizer."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optimzoo.bench import timing
from optimzoo.bench.candidates import built, parsed
from optimzoo.training.model import build_model, convert, loss_of
from optimzoo.training.recipe import Recipe
from optimzoo.training.report import duration
from optimzoo.training.sections import Conversion
from optimzoo.training.surroundings import now

PARTS = ("forward", "backward", "optimizer")
# The layers that a method needs, where the recipe does not convert any; and the methods that are layers only.
# Sampling saves memory only where nobody else keeps the same input, which in a Llama is the way down.
LAYERS: dict[str, tuple[str, str, dict[str, float]]] = {
    "sst": ("spectral", "*", {"rank": 64}),
    "sft": ("sparse_delta", "*", {"density": 0.01}),
    "wta-crs": ("sampled", "*.down_proj", {"ratio": 0.3}),
}
NEEDS = {"sft": {"total_steps": 1_000_000}}
DEFAULTS = ("torch.adamw", "wta-crs", "sst", "sft")


def measure_training(
    recipe: Recipe,
    names: Sequence[str],
    *,
    layers: int | None = None,
    rounds: int = 50,
    warmup: int = 3,
    device: torch.device,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Seconds of a step and of its parts, as plain data; ratios are to the first name.

    "wta-crs" is torch's AdamW on sampled layers. Batch and sequence are the recipe's; tokens are random. `progress` is
    that of `measure_steps`.
    """
    if layers is not None:
        recipe = recipe.replace({"model.layers": layers})
    tokens = torch.randint(0, 64, (recipe.data.batch, recipe.data.sequence + 1), generator=torch.Generator())
    tokens = tokens.to(device)
    actions = {label: _action(*_built(recipe, label, device), tokens, device) for label in dict.fromkeys(names)}
    first = {}
    for label, action in actions.items():
        first[label] = sum(action())
        progress(f"{label}: first step {duration(first[label])}")
    for action in actions.values():
        for _ in range(warmup):
            action()
    found = timing.interleaved(actions, rounds, progress)
    rows: dict[str, dict[str, Any]] = {}
    for label, times in found.items():
        whole = timing.summary([sum(parts) for parts in zip(*times, strict=True)])
        means = {name: timing.summary(part).p20 for name, part in zip(PARTS, times, strict=True)}
        rows[label] = {"first": first[label], "p20": whole.p20, "p50": whole.p50, "spread": whole.spread, **means}
    base = rows[next(iter(rows))]["p20"]
    for row in rows.values():
        row["ratio"] = row["p20"] / base
    spreads = {label: row["spread"] for label, row in rows.items()}
    shape = {"batch": recipe.data.batch, "sequence": recipe.data.sequence, "layers": layers}
    return {**shape, "rounds": rounds, "invalid": timing.verdict(spreads, rounds), "rows": rows}


def _built(recipe: Recipe, label: str, device: torch.device) -> tuple[nn.Module, list[Optimizer]]:
    method, _, rest = label.partition(":")
    name, options = parsed(f"torch.adamw:{rest}" if method.lower() == "wta-crs" else label)
    kind, match, told = LAYERS.get(method.lower(), ("", "", {}))
    told = {key: options.pop(key, value) for key, value in told.items()}
    model = build_model(recipe, device)
    if kind and not recipe.modules:
        convert(model, Conversion.model_validate({"kind": kind, "match": match, **told}))
    return model.train(), built(model, name, options | NEEDS.get(name, {}))


def _action(
    model: nn.Module, optimizers: list[Optimizer], tokens: Tensor, device: torch.device
) -> Callable[[], list[float]]:
    def action() -> list[float]:
        marks = [now(device)]
        loss = loss_of(model, tokens)
        marks.append(now(device))
        loss.backward()
        marks.append(now(device))
        for optimizer in optimizers:
            optimizer.step()
        marks.append(now(device))
        for optimizer in optimizers:
            optimizer.zero_grad()
        return [after - before for before, after in pairwise(marks)]

    return action
