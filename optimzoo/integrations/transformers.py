"""Hugging Face Trainer: optimizers that follow its TrainingArguments, and a callback that logs their bytes."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
except ImportError as error:
    raise ImportError("optimzoo.integrations.transformers needs pip install 'optimzoo[integrations]'") from error

from optimzoo.core import AdamW, ZooOptimizer
from optimzoo.integrations import memory_metrics
from optimzoo.registry import optimizer as by_name


def optimizer_cls_and_kwargs(
    cls: str | type[ZooOptimizer], args: TrainingArguments, **options: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What Trainer takes as `optimizer_cls_and_kwargs`: it then builds `optimizer(model, args, cls, **options)` itself.

    `Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(optimzoo.COSMOS, args, rank=64), ...)`.
    Options are checked now, not when training starts.
    """
    kind = by_name(cls) if isinstance(cls, str) else cls
    kind.checked(options)

    def factory(*groups: Any, **_: Any) -> Callable[..., ZooOptimizer]:
        if groups:
            raise TypeError(
                "this version of transformers hands parameters instead of the model to its optimizer: "
                "pass optimizers=(optimzoo.integrations.transformers.optimizer(model, args, ...), None) to Trainer"
            )
        return lambda model: optimizer(model, args, kind, **options)

    return factory, {}


def optimizer(model: nn.Module, args: TrainingArguments, cls: str | type[ZooOptimizer], **options: Any) -> ZooOptimizer:
    """The optimizer of `model` with what TrainingArguments say, wherever `options` say nothing else.

    `learning_rate` and `weight_decay` are taken as they are, and the parameters that Trainer would not decay under
    AdamW are not decayed. `adam_beta1`, `adam_beta2` and `adam_epsilon` are those of AdamW, which takes embeddings,
    heads, norms and biases; the betas are the method's own too, unless both are left at their defaults. `max_steps`
    is SFT's `total_steps`. A method without betas or epsilon warns about those that were set.
    """
    kind = by_name(cls) if isinstance(cls, str) else cls
    chosen = _from_arguments(kind, args) | options
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # reads no trainer
    groups = [part for group in kind.default_groups(model) for part in _split(kind, group, decayed)]
    given: dict[str, Any] = {"model": model} if kind.needs_model else {}
    return kind(groups, **given, **chosen)


def _from_arguments(kind: type[ZooOptimizer], args: TrainingArguments) -> dict[str, Any]:
    """The options that TrainingArguments set for a class."""
    betas, eps = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
    plain = (TrainingArguments.adam_beta1, TrainingArguments.adam_beta2), TrainingArguments.adam_epsilon
    options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    options |= {"fallback_betas": betas, "fallback_eps": eps}
    if betas != plain[0]:
        options["betas"] = betas
    if "eps" in kind.options and kind.options["eps"].default == AdamW.options["eps"].default:
        options["eps"] = eps  # where it stands for something else than Adam's, Adam's value would do harm
    if "total_steps" in kind.options and args.max_steps > 0:
        options["total_steps"] = args.max_steps
    unused = [] if "fallback_betas" in kind.options or "betas" in kind.options or betas == plain[0] else ["adam_beta*"]
    unused += [] if "fallback_eps" in kind.options or "eps" in options or eps == plain[1] else ["adam_epsilon"]
    if unused:
        warnings.warn(f"{kind.__name__} has no use for {' and '.join(unused)} of TrainingArguments", stacklevel=3)
    return {name: value for name, value in options.items() if name in kind.options}


def _split(kind: type[ZooOptimizer], group: dict[str, Any], decayed: set[str]) -> list[dict[str, Any]]:
    """A group as one that Trainer decays and one that it does not; layers of a method's own decay as it says."""
    if kind.needs_model and group.get("weight_decay") == 0:
        return [group]
    group = {key: value for key, value in group.items() if key != "weight_decay"}
    parts = {flag: [(n, p) for n, p in group["params"] if (n in decayed) == flag] for flag in (True, False)}
    both = all(parts.values())
    yes = {**group, "params": parts[True]}
    no = {**group, "params": parts[False], "weight_decay": 0.0}
    if both and "name" in group:
        no["name"] = f"{group['name']}, undecayed"
    return [part for part in (yes, no) if part["params"]]


class MemoryCallback(TrainerCallback):
    """Adds the optimizer's bytes (`optimzoo.integrations.memory_metrics`) to everything that Trainer logs.

    Reporters such as wandb are told before a Trainer's own `callbacks`: use `log_memory(trainer)` to be before them.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **_: Any) -> None:
        """Extend what is about to be reported, and its entry in `state.log_history`."""
        if optimizer is None or logs is None:
            return  # evaluation without training
        metrics = memory_metrics(getattr(optimizer, "optimizer", optimizer))  # Accelerate wraps it
        logs.update(metrics)
        state.log_history[-1].update(metrics)


def log_memory(trainer: Trainer) -> None:
    """Have a Trainer log the bytes of its optimizer to all its reporters."""
    trainer.callback_handler.callbacks.insert(0, MemoryCallback())
