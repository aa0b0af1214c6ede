"""What is measured: an optimizer's name with options, `frugal:projection=rows,density=0.5`, on a model of its own."""

import copy
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optimzoo.core import param_groups
from optimzoo.functional.polar import QUINTIC
from optimzoo.training.baselines import Baseline, class_of, everything_of, matrices_only
from optimzoo.training.errors import UserError
from optimzoo.training.model import build_model
from optimzoo.training.optimizers import build_optimizers, check_name
from optimzoo.training.parsing import parse
from optimzoo.training.recipe import Recipe

DEFAULTS = (
    "cosmos",
    "swan",
    "frugal:projection=block",
    "frugal:projection=rows",
    "frugal:projection=columns",
    "frugal:projection=svd",
    "adamw",
    "adamw:check_finite=false",
    "sm3",
    "frugal:projection=block,engine=compiled",
    "frugal:projection=rows,engine=compiled",
    "frugal:projection=columns,engine=compiled",
    "frugal:projection=svd,engine=compiled",
    "adamw:engine=compiled",
    "sm3:engine=compiled",
    "swan:engine=compiled",
)
AGAINST = ("torch.adamw", "torch.muon")
# Measured, but in no recipe: their runs were not seen to resume bit for bit. heavyball takes gradients away by default.
PEERS = {
    "bitsandbytes.adamw8bit": Baseline(
        everything_of("bitsandbytes.optim", "AdamW8bit"), ("bitsandbytes",), "bitsandbytes"
    ),
    "heavyball.muon": Baseline(
        matrices_only(class_of("heavyball", "Muon"), consume_grad=False), ("heavyball",), "heavyball"
    ),
}
LR = 1e-5  # the same gradient is taken a hundred times


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """`name:key=value,key=value` as the name and its options, values read as YAML."""
    name, _, rest = text.partition(":")
    options = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{text}: write options as name:key=value,key=value")
        options[key.replace("-", "_")] = parse(value, text)
    try:
        return check_name(name, PEERS), options
    except ValueError as error:
        raise UserError(str(error)) from error


def subject(recipe: Recipe, layers: int | None, embeddings: bool, device: torch.device) -> nn.Module:
    """The model whose parameters are stepped, with gradients. Without `embeddings`, tables and head are frozen."""
    if layers is not None:
        if recipe.model.name != "llama":
            raise UserError("--layers needs a Llama, not a configuration file")
        recipe = recipe.replace({"model.layers": layers})
    if not embeddings and recipe.model.name == "llama":
        recipe = recipe.replace({"model.vocab": 64})
    model = build_model(recipe, device)
    if not embeddings:
        for group in param_groups(model):
            if group["name"] == "embeddings and heads":
                for _, p in group["params"]:
                    p.requires_grad_(False)
    give_gradients(model)
    return model


def give_gradients(model: nn.Module) -> None:
    """Gradients of noise, the same in every run on this kind of device."""
    generators: dict[torch.device, torch.Generator] = {}
    for p in model.parameters():
        if p.requires_grad:
            generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(0))
            p.grad = torch.randn(p.shape, generator=generator, device=p.device).mul_(1e-3).to(p)


def optimizers_on(model: nn.Module, text: str) -> list[Optimizer]:
    """A copy of the model, and what steps all of it."""
    name, options = parsed(text)
    own = copy.deepcopy(model)
    for p, original in zip(own.parameters(), model.parameters(), strict=True):
        p.grad = None if original.grad is None else original.grad.clone()  # a deep copy drops it
    products = options.pop("products", None) if name == "torch.muon" else None
    found = built(own, name, options)
    if products is not None:
        if products != "float32":
            raise UserError(f"{text}: products={products} is not known; it must be float32")
        _in_float32(found[0])
    return found


def can_be_built(model: nn.Module, text: str) -> bool:
    """Whether the optimizer can be built when its options are left out, so that they are what is wrong with `text`."""
    name, options = parsed(text)
    try:
        return bool(options) and bool(optimizers_on(model, name))
    except UserError:
        return False


def built(model: nn.Module, name: str, options: dict[str, Any]) -> list[Optimizer]:
    """What steps all of this model."""
    lr = options.pop("lr", LR)
    if name not in PEERS:
        return build_optimizers(model, name, lr, None, options)
    if package := PEERS[name].missing:
        raise UserError(f"{name} needs {package}: pip install {package}")
    return PEERS[name].build(model, lr, None, options)


def _in_float32(muon: Optimizer) -> None:
    """Let torch's Muon do its products in float32: the yardstick where the hardware has none in bfloat16."""
    step = muon.step

    def exact(grad: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
        tall = grad.shape[0] > grad.shape[1]
        x = grad.mT.clone() if tall else grad.clone()
        x.div_(x.norm().clamp(min=eps))
        for _ in range(steps):
            gram = x @ x.mT
            poly = torch.addmm(gram, gram, gram, beta=QUINTIC[1], alpha=QUINTIC[2])
            x = torch.addmm(x, poly, x, beta=QUINTIC[0])
        return x.mT if tall else x

    def stepped() -> Any:
        with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", exact):
            return step()

    muon.step = stepped  # type: ignore[method-assign, assignment]
