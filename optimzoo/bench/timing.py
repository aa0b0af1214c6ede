"""Times on a machine that is never quite idle: interleaved rounds, low percentiles, and a verdict on the whole."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

UNSTEADY = 1.3  # p50 / p20 above which a run says more about the machine than about the code
FEWEST = 50  # rounds below which a percentile is an anecdote
BLOCK = 31 << 20  # bytes: of blocks above 32 MiB, its largest M_MMAP_THRESHOLD, glibc learns nothing


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing over all rounds."""

    p20: float
    p50: float

    @property
    def spread(self) -> float:
        """p50 / p20: 1 on a machine that does nothing else."""
        return self.p50 / self.p20


def let_memory_stay() -> None:
    """Have the C library keep what steps free, as it does where a backward pass of a thousand tokens goes before them.

    glibc returns to the system what is more than twice the largest block that it has seen freed. Before backward passes
    that would be most of a step's temporaries, after every matrix, and a step a tenth slower.
    """
    torch.empty(BLOCK, dtype=torch.uint8)


def summary(seconds: list[float]) -> Timing:
    """The percentiles that are reported."""
    p20, p50 = np.percentile(seconds, (20, 50))
    return Timing(float(p20), float(p50))


def interleaved(
    actions: Mapping[str, Callable[[], list[float]]], rounds: int, progress: Callable[[str], None] = lambda line: None
) -> dict[str, list[list[float]]]:
    """Run every action once a round; label -> for each of the times that the action returns, its rounds.

    Each round has an order of its own: what ran just before leaves its mark on caches and clocks. `progress` is called
    after each.
    """
    found: dict[str, list[list[float]]] = {label: [] for label in actions}
    draw = random.Random(0)
    for _ in range(rounds):
        for label in draw.sample(list(actions), len(actions)):
            found[label].append(actions[label]())
        progress("")
    return {label: [list(part) for part in zip(*times, strict=True)] for label, times in found.items()}


def verdict(spreads: Mapping[str, float], rounds: int) -> str | None:
    """Why the figures do not count, None when they do."""
    loud = [f"{label} ({spread:.2f})" for label, spread in spreads.items() if spread > UNSTEADY]
    if loud:
        return f"p50/p20 is above {UNSTEADY} for {', '.join(loud)}: something else was running"
    return f"{rounds} rounds are fewer than {FEWEST}" if rounds < FEWEST else None
