"""Plans by name, for the classes of the registry and for other people's optimizers, and the table of what fits."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer

from optimzoo import registry
from optimzoo.core import ZooOptimizer, param_groups, release_gradients
from optimzoo.memory.ledger import human
from optimzoo.memory.plan import Plan
from optimzoo.memory.plan import plan as plan_made
from optimzoo.memory.rehearsal import Make, Unplannable, optimizers_of

LARGEST_BATCH = 1 << 16
Model = nn.Module | Callable[[], nn.Module]


def plan(
    model: Model, make: Make | type[Optimizer] | str | None, batch: Any = None, *, release: bool = False, **how: Any
) -> Plan:
    """`memory.plan.plan`, where `make` may also be an optimizer class or a registered name.

    `release`: with `release_gradients`, and what that refuses is refused. A schedule whose periods differ (FRUGAL's
    blocks) is planned at the largest period of its first cycle.
    """
    if release and how.get("world_size", 1) > 1:
        raise ValueError("plan: release_gradients works in one process; leave world_size or release out")
    if isinstance(make, str):
        make = registry.optimizer(make)
    if isinstance(make, Optimizer):
        raise TypeError(
            "plan makes the optimizer itself, of the model on fake tensors: give a class, a name, or a function such "
            f"as lambda model: {type(make).__name__}(model.parameters(), ...)"
        )
    if isinstance(make, type):
        kind: Any = make
        zoo = issubclass(kind, ZooOptimizer)
        make = kind if zoo else (lambda model: kind(model.parameters()))
    if release:
        how["release"] = partial(_release, how.get("accumulate", 1))
    return plan_made(model, make and _heaviest(make), batch, **how)


def _release(accumulate: int, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        release_gradients(model, optimizer, accumulate=accumulate)


def _heaviest(make: Make) -> Make:
    def made(model: nn.Module) -> Any:
        optimizers = optimizers_of(make(model))
        for optimizer in optimizers:
            if isinstance(optimizer, ZooOptimizer):
                optimizer.to_largest_period()
        return optimizers

    return made


def _plain(kind: Any, **options: Any) -> Make:
    return lambda model: kind([p for p in model.parameters() if p.requires_grad], **options)


def _muon(model: nn.Module) -> list[Optimizer]:
    groups = param_groups(model)
    matrices = [p for group in groups if group["name"] == "matrices" for _, p in group["params"]]
    rest = [p for group in groups if group["name"] != "matrices" for _, p in group["params"]]
    return [torch.optim.Muon(matrices), torch.optim.AdamW(rest, fused=True)]


@cache
def methods() -> dict[str, Make]:
    """Name -> make: the registry, and as baselines torch's optimizers and the 8-bit ones that are installed."""
    found: dict[str, Make] = dict(registry.optimizers())
    found["torch.adamw"] = _plain(torch.optim.AdamW, fused=True)
    found["torch.adamw (foreach)"] = _plain(torch.optim.AdamW, foreach=True)
    found["torch.muon"] = _muon
    found["torch.adafactor"] = _plain(torch.optim.Adafactor)
    for package in ("torchao", "bitsandbytes"):
        try:
            kind = importlib.import_module(f"{package}.optim").AdamW8bit
        except (ImportError, AttributeError):
            continue  # a baseline appears where it is installed
        found[f"{package}.adamw8bit"] = _tabled(kind)
    return found


def _tabled(kind: Any) -> Make:
    """An 8-bit optimizer: the table of its codes is computed from values, at construction or in the first step."""

    def make(model: nn.Module) -> Optimizer:
        with unset_fake_temporarily(), torch.compiler.set_stance("force_eager"):
            toy = nn.Parameter(torch.ones(64, 64))
            toy.grad = torch.ones_like(toy)
            try:
                kind([toy]).step()
            except Exception as error:  # whatever an installation lacks
                name = kind.__module__.split(".")[0]
                raise Unplannable(f"{name}'s {kind.__name__} does not run on this machine: {error}") from error
            return kind([p for p in model.parameters() if p.requires_grad])

    return make


@dataclass(frozen=True)
class Row:
    """What one method needs at the given batch size, and the largest batch that fits; or why it has no plan."""

    name: str
    peak: int | None = None
    state: int = 0
    workspace: int = 0
    batch: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Fit:
    """Methods by their peak, the smallest first, those without a plan last."""

    memory: int
    batch: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def any_fits(self) -> bool:
        """Whether something trains in the memory, or nothing could be planned."""
        planned = [row for row in self.rows if row.peak is not None]
        return not planned or any(row.batch for row in planned)

    def table(self) -> str:
        """The methods, what they need, and what is to spare, as aligned text."""
        cells = [("optimizer", "state", "workspace", f"peak (batch {self.batch})", "to spare", "largest batch")]
        for row in self.rows:
            if row.peak is not None:
                spare = human(self.memory - row.peak) if row.peak <= self.memory else "-"
                largest = str(row.batch) if row.batch < LARGEST_BATCH else f">= {LARGEST_BATCH}"
                cells.append((row.name, human(row.state), human(row.workspace), human(row.peak), spare, largest))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join((line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))))
            for line in cells
        ]
        refused = [f"{row.name}: {row.refused}" for row in self.rows if row.refused]
        return "\n".join([*lines, *refused, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return self.table()


def fit(
    model: Model,
    batch_of: Callable[[int], Any],
    memory: int,
    *,
    batch: int = 1,
    optimizers: Mapping[str, Make] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    **how: Any,
) -> Fit:
    """Which optimizers train the model within `memory` bytes, and with which batch at most.

    `batch_of`: batch size -> batch (called where tensors are fake only if it is called by the model). `optimizers`:
    name -> make, by default `methods()`. `progress` gets a line at first and for each that is planned. `how`: the
    options of `plan`, for all of them. Methods that work on converted layers appear where `convert` makes such layers.
    """
    makes = methods() if optimizers is None else optimizers
    makes = {n: make for n, make in makes.items() if "convert" in how or not getattr(make, "needs_model", False)}
    progress(f"{len(makes)} optimizers to plan")
    forward: dict[int, int] = {}

    def peak_of(make: Make, alone: Plan | None, size: int) -> int:
        # Forward and backward do not depend on the optimizer but for the state that is alive, unless it steps in them.
        if alone is None:
            return plan(model, make, batch_of(size), **how).peak
        if size not in forward:
            forward[size] = plan(model, None, batch_of(size), **how).peak
        return max(forward[size] + alone.state, alone.peak)

    if not how.get("release"):
        forward[batch] = plan(model, None, batch_of(batch), **how).peak  # a model without a plan is told here
    rows: list[Row] = []
    notes: tuple[str, ...] = ()
    for place, (name, make) in enumerate(makes.items(), 1):
        try:
            alone = plan(model, make, None, **how)
            known = None if how.get("release") else alone
            peak = cache(partial(peak_of, make, known))
            most = largest(peak, memory, rows[-1].batch if rows else batch)  # methods differ little in it
            rows.append(Row(name, peak(batch), alone.state, alone.workspace, most))
            notes = alone.notes
        except (Unplannable, ValueError, TypeError) as error:
            if getattr(make, "needs_model", False):
                continue  # the conversion made no layers for it
            rows.append(Row(name, refused=str(error)))
        needs = "no plan" if rows[-1].peak is None else human(rows[-1].peak)
        progress(f"{place}/{len(makes)} {name}: {needs}")
    rows.sort(key=lambda row: (row.peak is None, row.peak or 0, row.name))
    return Fit(memory, batch, tuple(rows), notes)


def largest(peak: Callable[[int], int], memory: int, guess: int = 2) -> int:
    """The largest batch size whose peak fits, 0 when none does; `peak` must not fall with the size."""
    low, high = 1, LARGEST_BATCH
    at_low = peak(low)
    if at_low > memory:
        return 0
    while low < high:
        guess = min(max(guess, low + 1), high)
        at_guess = peak(guess)
        # Peaks are maxima of lines in the batch size, so nearly one line: its crossing is the next guess.
        slope = max(at_guess - at_low, 1) / (guess - low)
        if at_guess <= memory:
            low, at_low = guess, at_guess
            guess = low + int((memory - at_low) / slope)
        else:
            high = guess - 1
            guess = low + int((memory - at_low) / slope)
    return low
