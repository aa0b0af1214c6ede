"""A recipe, or a few words about a model and an optimizer, becomes plans: nothing is allocated and no data is read."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from optimzoo import planning, registry
from optimzoo.core.hyper import nearest
from optimzoo.memory import Plan, Unplannable
from optimzoo.memory.fakes import StandIn
from optimzoo.training.errors import UserError
from optimzoo.training.model import adapted, blueprint, convert
from optimzoo.training.optimizers import build_optimizers
from optimzoo.training.parsing import parse
from optimzoo.training.recipe import Recipe, validate
from optimzoo.training.sections import SIZES
from optimzoo.training.tasks import task_of

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def described(
    model: str, optimizer: str, options: Mapping[str, Any], dtype: str, batch: int, sequence: int, **more: Any
) -> Recipe:
    """The recipe of a size name or of a transformers configuration file, and an optimizer's name and options."""
    if model.lower() in SIZES:
        section: dict[str, Any] = {"name": "llama", "size": model.lower()}
    elif Path(model).exists():
        section = {"name": "transformers", "config": model}
    else:
        raise UserError(f"--model {model}: neither a file nor a size{nearest(model, SIZES)}")
    data = {"name": "python-source", "batch": batch, "sequence": sequence, "accumulate": more.pop("accumulate", 1)}
    chosen = {"lr": 1e-3, **options, "name": optimizer}
    section["dtype"] = DTYPES.get(dtype, dtype)
    values = {"model": section, "data": data, "optimizer": chosen, "schedule": {"steps": 1}, "clip": 0, **more}
    return validate(values, "plan")


def options_from(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """`--density 0.25` and `--density=0.25` as options with YAML's values, and the words that are none."""
    rest, options, waiting = [], {}, list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            rest.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not equals and (not waiting or waiting[0].startswith("--")):
            raise UserError(f"{word}: give it a value, such as {word} 1")
        options[key.replace("-", "_")] = parse(value if equals else waiting.pop(0), word)
    return rest, options


def plans(recipe: Recipe, **how: Any) -> dict[str, Plan | UserError]:
    """Label -> plan of every entry of the recipe, or what keeps the entry from having one."""
    found: dict[str, Plan | UserError] = {}
    for label, entry in recipe.entries().items():
        try:
            found[label] = planning.plan(
                partial(blueprint, entry),
                partial(_optimizers, entry),
                task_of(entry).blank(entry.data, entry.data.batch),
                **_how(entry, how),
            )
        except UserError as error:
            found[label] = error
        except (Unplannable, ValueError) as error:
            found[label] = UserError(str(error))
    return found


def fits(recipe: Recipe, memory: int, **how: Any) -> planning.Fit:
    """The table of what trains the recipe's model, on its data's shape, within `memory` bytes."""
    if recipe.modules:
        how["convert"] = lambda model: [convert(model, conversion) for conversion in recipe.modules]
    try:
        return planning.fit(
            lambda: blueprint(recipe, converted=False),
            partial(task_of(recipe).blank, recipe.data),
            memory,
            batch=recipe.data.batch,
            **_how(recipe, how),
        )
    except (Unplannable, ValueError) as error:
        raise UserError(str(error)) from error


def check(recipe: Recipe) -> None:
    """Refuse what a run refuses when it converts its layers and makes its optimizers, with nothing allocated."""
    with StandIn("cpu"):
        try:
            model = blueprint(recipe, converted=False)
        except Exception:  # no configuration, or one that fake tensors cannot have: for the run to say
            return
        try:
            adapted(model, recipe)
        except RuntimeError:  # peft moves its layers, which fake ones refuse: the options are checked without them
            if getattr(registry.optimizers().get(recipe.optimizer.name), "needs_model", False):
                return
            model = blueprint(recipe, converted=False)
        _optimizers(recipe, model)


def setting(recipe: Recipe, checkpointing: bool, ranks: int) -> str:
    """What is planned, in a line: the model and its dtype, the batch, and what saves memory."""
    data, model = recipe.data, recipe.model
    size = getattr(model, "size", None)
    name = f"{model.name} {size}" if size else model.name
    words = [f"{name} in {model.dtype}", f"{data.batch} x {data.sequence} tokens"]
    words += [f"{data.accumulate} batches a step"] if data.accumulate > 1 else []
    words += [f"{recipe.autocast} autocast"] if recipe.autocast != "none" else []
    words += ["checkpointing"] if checkpointing or recipe.checkpointing else []
    words += ["release"] if recipe.release else []
    return ", ".join([*words, f"{ranks} ranks"] if ranks > 1 else words)


def advice(recipe: Recipe, checkpointing: bool, ranks: int) -> str:
    """What is left to try where nothing fits, not even batches of 1."""
    release = "--release (one gradient at a time" + (", with clip: 0)" if recipe.clip else ")")
    left = {
        "--checkpointing (the inputs of blocks instead of all activations)": checkpointing or recipe.checkpointing,
        release: recipe.release or ranks > 1 or recipe.data.accumulate > 1,
        "more --ranks": recipe.release,
        "bfloat16": recipe.model.dtype == "bfloat16",
        "shorter sequences": recipe.data.sequence == 1,
    }
    return "nothing fits; try " + (", ".join(words for words, done in left.items() if not done) or "a smaller model")


def _optimizers(recipe: Recipe, model: nn.Module) -> list[Optimizer]:
    spec = recipe.optimizer
    return build_optimizers(model, spec.name, spec.lr, spec.fallback_lr, spec.options, recipe.schedule.steps)


def _how(recipe: Recipe, how: dict[str, Any]) -> dict[str, Any]:
    """The options of `plan` that a recipe decides, and those that are given."""
    device = how.get("device") or recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.bfloat16 if recipe.autocast == "bf16" else None
    decided = {"loss": task_of(recipe).loss, "accumulate": recipe.data.accumulate, "autocast": autocast}
    decided |= {"release": recipe.release}
    checkpointing = how.get("checkpointing") or recipe.checkpointing
    return {**decided, **how, "checkpointing": checkpointing, "device": device}


def bytes_of(text: str) -> int:
    """`24GiB`, `80 GB` or `16g` (binary) as bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", text.lower())
    if not match or (not match[2] and match[3] != "b"):  # a bare 24 would be bytes, in which nothing fits
        raise UserError(f"{text!r} is no size: write it like 24GiB or 80GB")
    power = " kmgt".index(match[2] or " ")
    return int(float(match[1]) * (1000 if match[3] == "b" else 1024) ** power)
