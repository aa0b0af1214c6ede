"""What data are for: the loss of a model on a batch, and what evaluation tells beside it."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from optimzoo.training.data import build_corpus
from optimzoo.training.examples import build_examples
from optimzoo.training.model import learned, loss_of
from optimzoo.training.recipe import Recipe
from optimzoo.training.sections import Batches, Labelled


class Data(Protocol):
    """What a run reads: batches that depend on (seed, step, micro-batch) alone, and fixed ones for validation."""

    @property
    def vocab(self) -> int: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def batch(self, seed: int, step: int, micro: int, batch: int, sequence: int) -> Any: ...

    def held_out(self, batch: int, sequence: int, batches: int) -> Iterator[Any]: ...


class Task(Protocol):
    """Data, and the loss and scores of a model on a batch of them."""

    def data(self, recipe: Recipe) -> Data:
        """Read the recipe's data."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean that is trained."""

    def scores(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """(n,) numbers by name, `loss` among them, whose means over the held-out batches are reported."""

    def weights(self, part: Any, batch: Any) -> Tensor:
        """What each score of these rows of the batch counts in the means; 1 where they are all of it."""

    def ids(self, batch: Any) -> Tensor:
        """(n,) numbers of the batch's examples, or places in the batch where examples have none."""

    def blank(self, spec: Any, size: int) -> Any:
        """A batch of `size` without values, for plans."""


class NextToken:
    """(batch, sequence + 1) tokens: each position predicts the next."""

    def data(self, recipe: Recipe) -> Data:
        return build_corpus(recipe)

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return loss_of(model, tokens)

    def scores(self, model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(model, tokens)[None]}

    def weights(self, part: Tensor, tokens: Tensor) -> Tensor:
        return (learned(part) / learned(tokens))[None]

    def ids(self, tokens: Tensor) -> Tensor:
        return torch.arange(len(tokens))

    def blank(self, spec: Batches, size: int) -> Tensor:
        return torch.empty(size, spec.sequence + 1, dtype=torch.int64, device="meta")


class Classification:
    """`input_ids` and `attention_mask` (batch, sequence), `labels` and `ids` (batch,), which number the examples."""

    def data(self, recipe: Recipe) -> Data:
        return build_examples(recipe)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(self.logits(model, batch), batch["labels"])

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = self.logits(model, batch), batch["labels"]
        hits = logits.argmax(1) == labels
        return {"loss": cross_entropy(logits, labels, reduction="none"), "accuracy": hits.float()}

    def weights(self, part: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return torch.ones(len(part["labels"]))

    def ids(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["ids"]

    def blank(self, spec: Labelled, size: int) -> dict[str, Tensor]:
        tokens, one = (size, spec.sequence), (size,)
        shapes = {"input_ids": tokens, "attention_mask": tokens, "labels": one, "ids": one}
        return {name: torch.empty(shape, dtype=torch.int64, device="meta") for name, shape in shapes.items()}


def task_of(recipe: Recipe) -> Task:
    """What the recipe's data are for."""
    return Classification() if isinstance(recipe.data, Labelled) else NextToken()
