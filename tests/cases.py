"""Tiny problems and awkward shapes, shared by the contract over the whole registry."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from optimzoo.core import ZooOptimizer
from optimzoo.modules import convert, kinds
from optimzoo.registry import optimizers

ALL = optimizers()
PLAIN = {name: cls for name, cls in ALL.items() if not cls.needs_model}
# Options that make schedules turn within a few steps, where a class has them.
SHORT = {"update_gap": 3, "resample_every": 3, "warmup": 1, "reselect_every": 3, "accumulate": 1, "total_steps": 200}
LAYERS = {"rank": 4, "density": 0.3}  # what layers need to be told, where they have such an option


def labelled(recipe: Path) -> bool:
    """Whether a recipe classifies, by the name of its data."""
    return re.search(r"^data:\s*\{?\s*name: (glue|python-packages)", recipe.read_text(), re.M) is not None


def short_options(cls: type[ZooOptimizer]) -> dict:
    return {name: value for name, value in SHORT.items() if name in cls.options}


def converted(cls: type[ZooOptimizer], model: nn.Module) -> nn.Module:
    """The same model, its layers converted where the class drives layers of its own."""
    if cls.needs_model:
        kind = next(kind for kind in kinds().values() if getattr(kind, "driver", None) == cls.__name__)
        told = {name: value for name, value in LAYERS.items() if name in kind.options}
        convert(model, kind, exclude="head", **told)
    return model


def direct(rule, g: Tensor, w: Tensor, h, slots: dict) -> Tensor:
    """A rule's direction on one matrix, in one go whether or not it is written in stages."""
    if rule.prepare is None:
        return rule.direction(g, w, h, **slots)
    x, *kept = rule.prepare(g, w, h, **slots)
    return rule.conclude(rule.products(h)(x), h, *kept)


def go_the_devices_way(monkeypatch, device: str = "xpu") -> None:
    """Whether gradients are finite is a tensor from here on, nothing is read, and pieces are a device's.

    "cuda" has Triton's kernels too, run by its interpreter.
    """
    for name, module in list(sys.modules.items()):
        for asked, answer in (("on_host", False), ("device_type", device)):
            if name.startswith("optimzoo.") and hasattr(module, asked):
                monkeypatch.setattr(module, asked, lambda t, answer=answer: answer)


def compiled_for_a_device(script: str, cache: Path) -> str:
    """What goes wrong when a script compiles kernels for a GPU that need not be there, without the interpreter."""
    surroundings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    surroundings["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
    return "" if done.stdout == "compiled\n" else done.stdout + done.stderr


def build(cls: type[ZooOptimizer], model: nn.Module, **options) -> ZooOptimizer:
    """The optimizer on the model, converted where it has to be."""
    return cls(converted(cls, model), **short_options(cls) | options)


class Tiny(nn.Module):
    """An embedding, three hidden matrices (square, tall, wide), norms, biases and a head: every role once."""

    def __init__(self, width: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        of = {"dtype": dtype}  # fake parameters cannot be converted later
        self.embed = nn.Embedding(11, width, **of)
        self.square = nn.Linear(width, width, **of)
        self.tall = nn.Linear(width, 2 * width, bias=False, **of)
        self.norm = nn.LayerNorm(2 * width, **of)
        self.wide = nn.Linear(2 * width, width, **of)
        self.head = nn.Linear(width, 11, bias=False, **of)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + torch.tanh(self.square(x))
        return self.head(x + self.wide(torch.tanh(self.norm(self.tall(x)))))


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, width: int = 16) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny(width, dtype)


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    """Cross entropy of predicting the next of a few tokens that depend on the step alone."""
    tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(step % 4))
    logits = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), (tokens[:, :-1] * 3 + 1).flatten() % 11)


def train(model: nn.Module, opt: torch.optim.Optimizer, first: int, last: int) -> float:
    """Steps first..last-1 of the standard loop; the last loss."""
    loss = torch.zeros(())
    for step in range(first, last):
        loss = loss_of(model, step)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return loss.item()


def give_gradients(params: Iterator[Tensor] | list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def bare() -> Iterator[None]:
    """Bare tensors as matrices on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pass the model, or groups")
        yield
