"""Transformers models, with random weights or with trained ones, frozen and converted as the recipe says."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimzoo import modules
from optimzoo.core.hyper import nearest
from optimzoo.memory.fakes import checkpoint_blocks
from optimzoo.training.errors import UserError
from optimzoo.training.lora import inject
from optimzoo.training.recipe import Recipe
from optimzoo.training.sections import Conversion, Labelled, Llama, Pretrained

HEADS = {"CausalLM": "causal language model", "SequenceClassification": "sequence classifier"}


def build_model(recipe: Recipe, device: torch.device, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The recipe's model on `device`, with `weights` if given. Random ones depend on the seed alone.

    The caller's random state stays.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _trained(recipe, recipe.model) if isinstance(recipe.model, Pretrained) else _from_config(recipe)
        model.to(device=device, dtype=getattr(torch, recipe.model.dtype))
        if weights is not None:
            try:
                model.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(f"pretrain: its weights do not fit this model: {error}") from error
        adapted(model, recipe)
    if recipe.checkpointing:
        try:
            checkpoint_blocks(model)
        except ValueError as error:
            raise UserError(f"checkpointing: {error}") from error
    return model


def adapted(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Freeze, then convert: what `modules` puts in is trained."""
    freeze(model, (recipe.freeze,) if isinstance(recipe.freeze, str) else recipe.freeze)
    for conversion in recipe.modules:
        convert(model, conversion)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("freeze: nothing is left to train; freeze less, or add an adapter to modules")
    return model


def norm_cache(recipe: Recipe, model: nn.Module, examples: int) -> modules.NormCache | None:
    """What the model's sampled layers remember of their gradients' sizes, where the recipe says `norms`."""
    if recipe.norms == "none":
        return None
    length = recipe.data.sequence if recipe.norms in ("token", "position") else None
    try:
        return modules.NormCache(model, examples, recipe.norms, length)
    except ValueError as error:
        raise UserError(f"norms: {error}") from error


def blueprint(recipe: Recipe, converted: bool = True) -> nn.Module:
    """The recipe's model, built in its dtype at once: fake parameters cannot be converted to another one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, recipe.model.dtype))
    try:
        model = _from_config(recipe)
    finally:
        torch.set_default_dtype(before)
    return adapted(model, recipe) if converted else model


def _trained(recipe: Recipe, spec: Pretrained) -> nn.Module:
    """The model with its weights, in the recipe's dtype from the start; a head that it lacks has random ones."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(spec.id, revision=spec.revision or "main")
        model = getattr(transformers, f"AutoModelFor{recipe.data.head}").from_pretrained(
            spec.id,
            revision=spec.revision or "main",
            config=fitted(config, recipe),
            dtype=getattr(torch, spec.dtype),
        )
    except (OSError, ValueError, ImportError) as error:  # no such name, no network, another kind of model, no library
        raise UserError(f"model.id: cannot load {spec.id!r}: {' '.join(str(error).split())}") from error
    model.config.use_cache = False
    trained: nn.Module = model.train()
    return trained


def _from_config(recipe: Recipe) -> nn.Module:
    # Importing transformers takes seconds: only a run pays for it.
    import transformers
    from transformers import AutoConfig, LlamaConfig

    spec = recipe.model
    build = getattr(transformers, f"AutoModelFor{recipe.data.head}").from_config
    if isinstance(spec, Llama):
        config: Any = LlamaConfig(
            vocab_size=spec.vocab,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.heads,
            max_position_embeddings=recipe.data.sequence,
            tie_word_embeddings=False,
            use_cache=False,
        )
        return build(fitted(config, recipe), attn_implementation="sdpa")
    try:
        if isinstance(spec, Pretrained):
            config = AutoConfig.from_pretrained(spec.id, revision=spec.revision or "main")
        elif isinstance(spec.config, Path):
            config = AutoConfig.from_pretrained(spec.config, local_files_only=True)
        else:
            config = AutoConfig.for_model(**spec.config)
        config.use_cache = False
        config.dtype = torch.get_default_dtype()  # the recipe's, or to be converted: not what the file asks for
        return build(fitted(config, recipe))
    except Exception as error:  # every architecture checks its own fields, with errors of its own
        text = " ".join(str(error).split("\n")[:2])
        place = f"id: {spec.id}" if isinstance(spec, Pretrained) else f"config: {spec.config}"
        raise UserError(f"model.{place} is no {HEADS[recipe.data.head]}'s configuration: {text}") from error


def fitted(config: Any, recipe: Recipe) -> Any:
    """The configuration with as many classes as the recipe's data have."""
    if isinstance(recipe.data, Labelled):
        config.num_labels = recipe.data.classes
    return config


def check_room(model: nn.Module, sequence: int, vocab: int) -> None:
    """Make sure that the model's configuration has a position for every token and a row for every word of the data."""
    config: Any = model.config
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0
    if 0 < positions < sequence:  # models without a limit have none, 0 or -1
        raise UserError(
            f"model.config: the model has {positions} positions (max_position_embeddings), too few for "
            f"data.sequence={sequence}; make one of them fit the other"
        )
    if config.vocab_size < vocab:
        raise UserError(
            f"model.config: vocab_size={config.vocab_size} is too small: the data has {vocab} different tokens"
        )


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Make every parameter whose name matches one of the patterns constant."""
    named = dict(model.named_parameters())
    for pattern in patterns:
        found = [p for name, p in named.items() if fnmatchcase(name, pattern)]
        if not found:
            raise UserError(f"freeze: no parameter is called {pattern!r}; they have names like {list(named)[-1]!r}")
        for p in found:
            p.requires_grad_(False)


def convert(model: nn.Module, conversion: Conversion) -> list[str]:
    """Replace the layers that one entry of the recipe's `modules` names; the names of those layers."""
    known, options = modules.kinds(), conversion.model_extra or {}
    try:
        if conversion.kind == "lora":
            return inject(model, conversion.match, options)
        if conversion.kind not in known:
            raise ValueError(f"no layer is called {conversion.kind!r}{nearest(conversion.kind, [*known, 'lora'])}")
        return modules.convert(model, known[conversion.kind], conversion.match, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"modules: {error}") from error


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of (batch, sequence + 1) tokens: each position predicts the next, if that is one to learn.

    Tokens of prompts, which are read but not learned, come as their complement: negative.
    """
    seen = tokens[:, :-1]
    logits = model(input_ids=torch.where(seen < 0, ~seen, seen)).logits
    targets = tokens[:, 1:].clamp(min=-1)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)


def learned(tokens: Tensor) -> Tensor:
    """Of how many tokens `loss_of` is the mean."""
    return (tokens[:, 1:] >= 0).sum()
