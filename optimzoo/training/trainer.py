"""The training loop, top to bottom. Whoever wants another loop copies this file."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map

from optimzoo.core import release_gradients
from optimzoo.core.shards import whole
from optimzoo.memory.activations import saved
from optimzoo.memory.workspace import measure
from optimzoo.modules import NormCache
from optimzoo.modules.delta_file import save_delta
from optimzoo.modules.sparse_delta import SparseDeltaLinear
from optimzoo.training import progress, report
from optimzoo.training.data import words
from optimzoo.training.distributed import Ranks, together
from optimzoo.training.errors import UserError
from optimzoo.training.folder import Folder, versions, write_json
from optimzoo.training.model import build_model, check_room, norm_cache
from optimzoo.training.optimizers import build_optimizers
from optimzoo.training.places import place
from optimzoo.training.recipe import Recipe
from optimzoo.training.results import code, finite, state_bytes, summarise
from optimzoo.training.schedule import scheduler
from optimzoo.training.surroundings import autocast, now, surroundings, wandb
from optimzoo.training.tasks import Data, Task, task_of


def train(recipe: Recipe, folder: str | Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run a recipe into `folder` and return its result; with `resume`, go on where the last checkpoint was written.

    Every update depends on (seed, step) and on what the checkpoint holds, so that a run which was killed at any moment
    and resumed ends with the weights, bit for bit, of one that was not. What a recipe's `pretrain` asks for runs first,
    in a folder of its own beside this one, unless it is there.
    """
    with together(recipe) as ranks:
        home = ranks.folder(Path(folder))
        if resume and (result := home.finished(recipe)):
            if ranks.first and not all(picture.exists() for picture in home.pictures):  # killed while it drew them
                draw(home, result)
            return result
        home.open(recipe, resume)
        start = None if home.checkpoint.exists() else prepare(recipe, home.path.parent, quiet)
        with surroundings(recipe) as device:
            result = _run(recipe, home, ranks, device, quiet, start)
        if ranks.first:
            draw(home, result)
        return result


def prepare(recipe: Recipe, out: Path, quiet: bool = False) -> dict[str, Tensor] | None:
    """The weights with which a run below `out` starts, None for the model's own: see `pretrain` in a recipe."""
    before = recipe.preparation()
    if before is None:
        return None
    home = Folder(place(out, "pretrain", before))
    if train(before, home.path, resume=True, quiet=quiet)["diverged"]:
        raise UserError(f"pretrain: the run in {home.path} diverged; lower pretrain.optimizer.lr")
    state = home.load(before, torch.device("cpu"))
    if state is None:
        raise UserError(f"pretrain: {home.checkpoint} is gone; delete that folder to run it again")
    weights: dict[str, Tensor] = state["model"]
    return weights


def _run(
    recipe: Recipe, home: Folder, ranks: Ranks, device: torch.device, quiet: bool, start: dict[str, Tensor] | None
) -> dict[str, Any]:
    data, spec, steps = recipe.data, recipe.optimizer, recipe.schedule.steps
    code()  # before anybody changes the sources that this process has loaded
    task = task_of(recipe)
    corpus = task.data(recipe)
    model = build_model(recipe, device, start)
    check_room(model, data.sequence, corpus.vocab)
    module = ranks.spread(model)
    optimizers = build_optimizers(model, spec.name, spec.lr, spec.fallback_lr, spec.options, steps)
    schedulers = [scheduler(optimizer, recipe.schedule) for optimizer in optimizers]
    norms = norm_cache(recipe, model, corpus.facts.get("train_examples", 0))
    first = restore(recipe, home, ranks, device, model, optimizers, schedulers, norms)
    if ranks.first:
        write_json(home.path / "versions.json", versions())

    with (
        home.log(first) as log,
        wandb(recipe, home.path if ranks.first else None) as wandb_log,
        progress.bar(home.path.name, steps, quiet or not ranks.first) as show,
        ExitStack() as released,
    ):
        for optimizer in optimizers if recipe.release else ():
            released.enter_context(release_gradients(model, optimizer))  # `backward` does what `update` does below
        for step in range(first, steps):
            if log.diverged:
                break
            began = now(device)
            torch.manual_seed(int(words(recipe.seed, step, *ranks.salt, count=1)[0]))  # for models with dropout
            loss = torch.zeros((), device=device)
            for micro in range(data.accumulate):
                batch = to(device, ranks.rows(corpus.batch(recipe.seed, step, micro, data.batch, data.sequence)))
                with norms.batch(task.ids(batch)) if norms else nullcontext():
                    with autocast(recipe, device):
                        part = task.loss(module, batch) / data.accumulate
                    part.backward()
                loss += part.detach()
            norm, loss = None if recipe.release else whole(clip(model, recipe.clip)), ranks.mean(loss)
            lr = float(optimizers[0].param_groups[0]["lr"])  # some keep it as a tensor

            # Counting allocations slows a step down: those steps are left out of the times.
            measured = not recipe.release and (step < 3 or (step + 1) % recipe.memory.every == 0)
            ready = now(device)
            workspace = update(optimizers, device if measured else None)
            ended = now(device)
            for optimizer, schedule in zip(optimizers, schedulers, strict=True):
                optimizer.zero_grad(set_to_none=True)  # the gradients' memory is free until the next backward
                schedule.step()

            row = {"step": step + 1, "loss": finite(loss.item()), "lr": lr}
            row |= {"gradient_norm": None if norm is None else finite(norm.item())}
            row |= {"memory/state_bytes": state_bytes(optimizers), "memory/workspace_bytes": workspace}
            row |= {"step_s": None if measured else ended - began}
            row |= {"optimizer_s": None if measured or recipe.release else ended - ready}
            row |= {"tokens_per_s": data.batch * data.sequence * data.accumulate / (ended - began)}
            last = step + 1 == steps or row["loss"] is None
            if last or (step + 1) % recipe.eval.every == 0:
                row |= evaluate(recipe, task, model, corpus, ranks, device)
            log.add(row)
            wandb_log(row)
            show(step + 1, row)
            if recipe.checkpoint.every and (last or (step + 1) % recipe.checkpoint.every == 0):
                log.sync()
                save(recipe, home, ranks, step + 1, model, optimizers, schedulers, norms)

        batch = to(device, ranks.rows(corpus.batch(recipe.seed, 0, 0, data.batch, data.sequence)))
        with autocast(recipe, device):
            activations = saved(model, batch, task.loss).total
        result = summarise(recipe, corpus, model, optimizers, log.rows, activations)
    if ranks.first:
        if any(isinstance(layer, SparseDeltaLinear) for layer in model.modules()):
            save_delta(model, home.delta)
        write_json(home.result, result)
    return result


def update(optimizers: list[Optimizer], measured_on: torch.device | None = None) -> int | None:
    """Step every optimizer; with a device, the peak in bytes of what that allocated for a moment."""
    if measured_on is None:
        for optimizer in optimizers:
            optimizer.step()
        return None
    before = state_bytes(optimizers)
    with measure(measured_on) as workspace:
        update(optimizers)
    # Optimizers that make their state in their first step keep those bytes: they are state, not workspace.
    return max(0, workspace.peak - max(0, state_bytes(optimizers) - before))


def clip(model: nn.Module, bound: float) -> Tensor:
    """Scale the gradients down to a total norm of at most `bound` (0: leave them) and return the norm they had."""
    if bound:
        return clip_grad_norm_(model.parameters(), bound)
    return get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@torch.no_grad()
def evaluate(
    recipe: Recipe, task: Task, model: nn.Module, corpus: Data, ranks: Ranks, device: torch.device
) -> dict[str, float | None]:
    """`validation_loss`, and what else the task tells: means over the fixed validation batches."""
    model.eval()
    found: dict[str, list[Tensor]] = {}
    shares: list[Tensor] = []
    for batch in corpus.held_out(recipe.data.batch, recipe.data.sequence, recipe.eval.batches):
        part = ranks.rows(batch)
        weights = task.weights(part, batch)
        if not weights.any():  # nothing to count here; but shards are gathered by all or by none
            part, weights = tree_map(lambda rows: rows[:1], batch), weights[:0]
        shares.append(weights)
        with autocast(recipe, device):
            for name, scores in task.scores(model, to(device, part)).items():
                found.setdefault(f"validation_{name}", []).append(scores[: len(weights)])
    model.train()
    weights = to(device, torch.cat(shares))
    return {name: finite(ranks.weighted(torch.cat(scores), weights).item()) for name, scores in found.items()}


def to(device: torch.device, batch: Any) -> Any:
    return tree_map(lambda tensor: tensor.to(device), batch)


def save(
    recipe: Recipe,
    home: Folder,
    ranks: Ranks,
    step: int,
    model: nn.Module,
    optimizers: list[Optimizer],
    schedulers: list[LambdaLR],
    norms: NormCache | None,
) -> None:
    """Write everything that the next update depends on."""
    parts = {"optimizers": [o.state_dict() for o in optimizers], "schedulers": [s.state_dict() for s in schedulers]}
    known = {"norms": norms.state_dict()} if norms else {}
    home.save(recipe, step, ranks.whole({"model": model.state_dict(), **parts, **known}))


def restore(
    recipe: Recipe,
    home: Folder,
    ranks: Ranks,
    device: torch.device,
    model: nn.Module,
    optimizers: list[Optimizer],
    schedulers: list[LambdaLR],
    norms: NormCache | None,
) -> int:
    """Load the checkpoint, if there is one, and return how many updates it has seen."""
    state = home.load(recipe, device)
    if state is None:
        return 0
    try:
        ranks.load_model(model, state["model"])
        for schedule, part in zip(schedulers, state["schedulers"], strict=True):
            own = {key: type(value) for key, value in schedule.state_dict().items()}
            if own != {key: type(value) for key, value in part.items()}:
                raise ValueError("the state of a schedule is no such thing")
            schedule.load_state_dict(part)
        for optimizer, part in zip(optimizers, state["optimizers"], strict=True):
            ranks.load_optimizer(optimizer, part)
        if norms:
            norms.load_state_dict(state["norms"])
        return int(state["step"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())[:300]  # torch lists every key in a line of its own
        raise UserError(f"{home.checkpoint} does not fit the model and optimizer of this version: {words}") from error


def draw(home: Folder, result: dict[str, Any]) -> None:
    """The run's two pictures."""
    loss, memory = home.pictures
    report.draw_loss({result["label"]: [home.path]}, loss)
    report.draw_memory([result], memory)
