"""What `optimzoo bench` does: models from words, measurements at every depth, all as plain data."""

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from optimzoo.bench import candidates, report, steps, training
from optimzoo.training import load, planning
from optimzoo.training.errors import UserError
from optimzoo.training.recipe import Recipe


@dataclass(frozen=True)
class Wanted:
    """The command's options; None leaves it to the recipe, or to what is said for models without one."""

    model: str = "60m"
    optimizers: Sequence[str] = ()
    against: Sequence[str] = ()
    layers: str | None = None
    embeddings: bool = False
    training: bool = False
    rounds: int = 50
    warmup: int = 3
    dtype: str | None = None
    batch: int | None = None
    sequence: int | None = None
    threads: int | None = None
    device: str = "auto"


def run(wanted: Wanted, quiet: bool) -> dict[str, Any]:
    """Measure, and say on what machine."""
    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device for torch")
    device = torch.device("cuda" if wanted.device != "cpu" and torch.cuda.is_available() else "cpu")
    _check(wanted)
    recipe, before = _recipe(wanted), torch.get_num_threads()
    depths = _depths(wanted, recipe)
    torch.set_num_threads(wanted.threads or before)
    try:
        with _bar(wanted, len(depths), quiet) as tick:
            found = [_measure(wanted, recipe, layers, device, tick) for layers in depths]
            surroundings = _surroundings(device)
    finally:
        torch.set_num_threads(before)
    return {"model": wanted.model, "dtype": recipe.model.dtype, **surroundings, "measured": found}


def show(result: dict[str, Any], out: Console) -> None:
    """Tables, the machine, and whether the figures count."""
    found = result["measured"]
    out.width = max(out.width, 140)  # a table in a file has all its columns
    for one in found:
        out.print(report.table(one) if "weights" in one else report.training_table(one))
    if len(found) > 1 and "weights" in found[0]:
        out.print(report.growth(found))
    machine = ", ".join(f"{key} {value}" for key, value in result.items() if key != "measured")
    out.print(machine, markup=False, highlight=False, soft_wrap=True)
    for reason in dict.fromkeys(one["invalid"] for one in found if one["invalid"]):
        out.print(f"INVALID: {reason}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _measure(
    wanted: Wanted, recipe: Recipe, layers: int | None, device: torch.device, tick: Callable[[str], None]
) -> dict[str, Any]:
    how: dict[str, Any] = {"rounds": wanted.rounds, "warmup": wanted.warmup, "device": device, "progress": tick}
    names, against = _candidates(wanted)
    if wanted.training:
        return training.measure_training(recipe, names, layers=layers, **how)
    return steps.measure_steps(recipe, names, against, layers=layers, embeddings=wanted.embeddings, **how)


def _check(wanted: Wanted) -> None:
    """Refuse what would have no effect."""
    for name in ("against", "embeddings") if wanted.training else ("batch", "sequence"):
        if getattr(wanted, name):
            mend = "leave --training out" if wanted.training else "add --training"
            kind = "the optimizer's step alone" if wanted.training else "whole training steps"
            raise UserError(f"--{name} is for measurements of {kind}: {mend}")


def _candidates(wanted: Wanted) -> tuple[Sequence[str], Sequence[str]]:
    """What is measured, and the yardsticks beside it."""
    if wanted.training:
        return wanted.optimizers or training.DEFAULTS, ()
    return wanted.optimizers or candidates.DEFAULTS, wanted.against or candidates.AGAINST


def _recipe(wanted: Wanted) -> Recipe:
    dtype = wanted.dtype and planning.DTYPES.get(wanted.dtype, wanted.dtype)
    if Path(wanted.model).suffix in (".yaml", ".yml"):
        asked = {"model.dtype": dtype, "data.batch": wanted.batch, "data.sequence": wanted.sequence}
        return load(wanted.model).replace({key: value for key, value in asked.items() if value is not None})
    size = wanted.model.lower().removeprefix("llama-")
    known = Path(wanted.model).exists()
    shape = dtype or "float32", wanted.batch or 4, wanted.sequence or 128
    return planning.described(wanted.model if known else size, "adamw", {}, *shape)


def _depths(wanted: Wanted, recipe: Recipe) -> list[int | None]:
    """`8,32,128` as numbers; without them two layers, and what is no Llama keeps its own depth."""
    if wanted.layers is None:
        return [2 if recipe.model.name == "llama" else None]
    try:
        depths = [int(word) for word in wanted.layers.replace(",", " ").split()]
    except ValueError:
        depths = []
    if not depths or min(depths) < 1:
        raise UserError(f"--layers {wanted.layers}: write numbers above 0, such as 2 or 8,32,128")
    return [*depths]


def _surroundings(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"torch": torch.__version__, "device": torch.cuda.get_device_name(device)}
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def _bar(wanted: Wanted, depths: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is told of each candidate and, with "", each round: a bar or, where nobody watches one, lines."""
    console, total, done = Console(stderr=True), wanted.rounds * depths, 0
    if quiet:
        yield lambda line: None
    elif console.is_terminal:
        with Progress(console=console) as progress:
            task = progress.add_task("rounds", total=total)
            yield lambda line: progress.advance(task, not line)
    else:

        def tell(line: str) -> None:
            nonlocal done
            done += not line
            if line or 10 * done // total > 10 * (done - 1) // total:
                print(line or f"round {done} of {total}", file=sys.stderr, flush=True)

        at = f", at {depths} depths" if depths > 1 else ""
        tell(
            f"{len({label for part in _candidates(wanted) for label in part})} candidates x {wanted.rounds} rounds{at}"
        )
        yield tell
