"""Labelled examples of one length, and batches that go through them in a new order every epoch."""

import functools
import hashlib
import platform
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimzoo.training.data import check_columns, data_set, python_sources, tokenizer_of, words
from optimzoo.training.errors import UserError
from optimzoo.training.recipe import Recipe
from optimzoo.training.sections import PACKAGES, Glue, PythonPackages

Batch = dict[str, Tensor]
VALIDATION = 5  # every fifth piece of the embedded corpus, by its hash, is held out
PAD, END, BEGIN = range(3)  # the first two as BERT and T5 have them by default
WORDS = 2048  # words are numbered by their hash
TEXTS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass(frozen=True)
class Part:
    """`tokens` (n, sequence), of which the first `lengths` (n,) are no padding, and `labels` (n,)."""

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, ids: np.ndarray) -> Batch:
        """The batch of these examples, as `tasks.Classification` reads it."""
        mask = np.arange(self.tokens.shape[1]) < self.lengths[ids, None]
        parts = {"input_ids": self.tokens[ids], "attention_mask": mask, "labels": self.labels[ids], "ids": ids}
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in parts.items()}


@dataclass(frozen=True)
class Examples:
    """Examples for training and validation; `accumulate` micro-batches make one step."""

    name: str
    train: Part
    validation: Part
    vocab: int
    accumulate: int

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What identifies the examples; `sha256` covers both parts."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            for values in (part.tokens, part.lengths, part.labels):
                digest.update(np.ascontiguousarray(values).data)
        sizes = {"train_examples": len(self.train), "validation_examples": len(self.validation)}
        return {"name": self.name, "sha256": digest.hexdigest(), **sizes, "python": platform.python_version()}

    def batch(self, seed: int, step: int, micro: int, batch: int, sequence: int) -> Batch:
        """The next `batch` training examples; every epoch has each once, in an order of its own."""
        places = (step * self.accumulate + micro) * batch + np.arange(batch)
        epochs, ranks = np.divmod(places, len(self.train))
        orders = {int(epoch): _order(seed, int(epoch), len(self.train)) for epoch in np.unique(epochs)}
        return self.train.take(np.array([orders[epoch][rank] for epoch, rank in zip(epochs, ranks, strict=True)]))

    def held_out(self, batch: int, sequence: int, batches: int) -> Iterator[Batch]:
        """The same validation examples for every run, spread evenly over the validation part, none twice."""
        count = min(len(self.validation), batch * batches)
        ids = np.linspace(0, len(self.validation) - 1, count).astype(np.int64)
        for start in range(0, count, batch):
            yield self.validation.take(ids[start : start + batch])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.argsort(words(seed, epoch, count=count), kind="stable")


def build_examples(recipe: Recipe) -> Examples:
    """Read the recipe's labelled data."""
    spec = recipe.data
    assert isinstance(spec, PythonPackages | Glue)
    return _python_packages(spec) if isinstance(spec, PythonPackages) else _glue(spec)


def _python_packages(spec: PythonPackages) -> Examples:
    root, names = python_sources()
    rows: dict[bool, list[tuple[list[int], int]]] = {False: [], True: []}
    for name in names:
        package = name.partition("/")[0]
        if package in PACKAGES:
            for piece in _pieces((root / name).read_bytes(), spec.sequence - 2):
                held_out = zlib.crc32(str(piece).encode()) % VALIDATION == 0
                rows[held_out].append(([BEGIN, *piece, END], PACKAGES.index(package)))
    train, validation = (_padded(rows[held_out], spec.sequence, PAD) for held_out in (False, True))
    return Examples("python-packages", train, validation, WORDS, spec.accumulate)


def _pieces(text: bytes, longest: int) -> Iterator[list[int]]:
    """Whole lines as numbers of their words and signs, as many together as fit; a line that is too long is cut."""
    piece: list[int] = []
    for line in text.splitlines():
        found = [BEGIN + 1 + zlib.crc32(word) % (WORDS - BEGIN - 1) for word in re.findall(rb"\w+|[^\w\s]", line)]
        if piece and len(piece) + len(found) > longest:
            yield piece
            piece = []
        piece += found[:longest]
    if piece:
        yield piece


def _glue(spec: Glue) -> Examples:
    tokenizer = tokenizer_of(spec.tokenizer)
    if tokenizer.pad_token_id is None:
        raise UserError(f"data.tokenizer: {spec.tokenizer!r} has no token for padding; choose one that has")
    train = _glue_part(spec, "train", tokenizer)
    validation = _glue_part(spec, "validation_matched" if spec.task == "mnli" else "validation", tokenizer)
    return Examples(f"glue:{spec.task}", train, validation, len(tokenizer), spec.accumulate)


def _glue_part(spec: Glue, split: str, tokenizer: Any) -> Part:
    rows, columns = data_set(spec.dataset, spec.task, split=split), (*TEXTS[spec.task], "label")
    check_columns(rows.column_names, columns)
    *texts, labels = (list(rows[column]) for column in columns)
    tokens = tokenizer(*texts, truncation=True, max_length=spec.sequence)["input_ids"]
    return _padded(zip(tokens, labels, strict=True), spec.sequence, tokenizer.pad_token_id)


def _padded(rows: Iterable[tuple[list[int], int]], sequence: int, pad: int) -> Part:
    tokens, labels = zip(*rows, strict=True)
    padded = np.full((len(tokens), sequence), pad, np.int32)
    for row, some in zip(padded, tokens, strict=True):
        row[: len(some)] = some
    return Part(padded, np.array([len(some) for some in tokens]), np.array(labels))
