"""What surrounds a run: device, threads, random state, clock, and wandb where it is asked for."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from optimzoo.training.errors import UserError, needs
from optimzoo.training.parsing import flat
from optimzoo.training.recipe import Recipe


@contextlib.contextmanager
def surroundings(recipe: Recipe) -> Iterator[torch.device]:
    """The device, threads and random state of a run; the caller's own are put back."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: this machine has no CUDA device for torch; use --set device=cpu")
    cuda = torch.cuda.is_available() and recipe.device != "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads or threads)
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
            yield torch.device("cuda" if cuda else "cpu")
    finally:
        torch.set_num_threads(threads)


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast == "bf16")


def now(device: torch.device) -> float:
    """Seconds, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def wandb(recipe: Recipe, folder: Path | None) -> Iterator[Any]:
    """A function that logs one row to wandb, or without a folder does nothing; never asks anything."""
    if recipe.wandb.mode == "off" or folder is None:
        yield lambda row: None
        return
    run = _wandb_run(recipe, folder)
    try:
        yield lambda row: run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])
    finally:
        run.finish()


def _wandb_run(recipe: Recipe, folder: Path) -> Any:
    library = needs("wandb", "wandb.mode")
    if recipe.wandb.mode == "online" and not library.api.api_key:
        raise UserError("wandb.mode=online needs an account on this machine: run `wandb login`, or use mode: offline")
    return library.init(
        project=recipe.wandb.project,
        name=recipe.wandb.run,
        mode=recipe.wandb.mode,
        dir=str(folder),
        config=flat(recipe.run()),
        settings=library.Settings(silent=True, console="off"),
    )


def log_table(
    recipe: Recipe, folder: Path, headings: Sequence[str], lines: Sequence[list[str]], methods: Sequence[Any]
) -> None:
    """A comparison in wandb, where the recipe asks for it: its table, and loss, bytes and times as charts."""
    if recipe.wandb.mode == "off":
        return
    run = _wandb_run(recipe, folder)
    library = needs("wandb", "wandb.mode")
    plot, table = library.plot, library.Table
    numbers = [[m["label"], m["validation_loss"], m["bytes"]["state"], m["step_s"]] for m in methods]
    data = table(columns=["method", "validation loss", "state bytes", "step seconds"], data=numbers)
    charts = {
        f"comparison/{name}": plot.bar(data, "method", name, title=name)
        for name in ("validation loss", "state bytes", "step seconds")
    }
    charts["comparison/loss against bytes"] = plot.scatter(data, "state bytes", "validation loss")
    run.log({"comparison/methods": table(columns=list(headings), data=list(lines)), **charts})
    run.finish()
