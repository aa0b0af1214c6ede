"""The learning rate's factor as a pure function of the step, so that a resumed run needs nothing but its step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from optimzoo.training.sections import Schedule


def factor(schedule: Schedule, step: int) -> float:
    """The factor on the learning rate of update `step` (from 0): linear warm-up, then the decay to `min_ratio`."""
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    done = min(1.0, (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule.name]
    return schedule.min_ratio + (1 - schedule.min_ratio) * left


def scheduler(optimizer: Optimizer, schedule: Schedule) -> LambdaLR:
    """The schedule as torch's own scheduler."""
    # A function, not a partial: LambdaLR would save an object's attributes, and these are no tensors or numbers.
    return LambdaLR(optimizer, lambda step: factor(schedule, step))
