"""Corpora as one array of tokens each, and batches that are a function of (seed, step, micro-batch) alone."""

import hashlib
import platform
import sysconfig
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimzoo.training.errors import UserError, needs
from optimzoo.training.recipe import Recipe
from optimzoo.training.sections import HuggingFace, PythonSource, Text

VALIDATION = 20  # every twentieth document, by the hash of its name, is held out
# Distributions leave some of these out and patch others; what remains is nearly the same everywhere.
EXCLUDED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "ensurepip", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Token arrays for training and validation, and how many different tokens there may be."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    vocab: int

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What identifies the corpus; `sha256` covers the tokens of both parts."""
        digest = hashlib.sha256(self.train.data)
        digest.update(self.validation.data)
        sizes = {"train_tokens": len(self.train), "validation_tokens": len(self.validation)}
        return {"name": self.name, "sha256": digest.hexdigest(), **sizes, "python": platform.python_version()}

    def batch(self, seed: int, step: int, micro: int, batch: int, sequence: int) -> Tensor:
        """(batch, sequence + 1) int64 tokens of the training part, starting anywhere."""
        draws = words(seed, step, micro, count=batch)
        return _windows(self.train, draws % np.uint64(len(self.train) - sequence), sequence)

    def held_out(self, batch: int, sequence: int, batches: int) -> Iterator[Tensor]:
        """The same validation batches for every run, spread evenly over the validation part."""
        starts = np.linspace(0, len(self.validation) - sequence - 1, batch * batches).astype(np.int64)
        for part in starts.reshape(batches, batch):
            yield _windows(self.validation, part, sequence)


def words(*key: int, count: int) -> np.ndarray:
    """`count` 64-bit numbers of `key`, the same for ever and everywhere, which numpy's distributions do not promise."""
    return np.random.SeedSequence(key).generate_state(count, np.uint64)


def _windows(tokens: np.ndarray, starts: np.ndarray, sequence: int) -> Tensor:
    index = starts.astype(np.int64)[:, None] + np.arange(sequence + 1)
    return torch.from_numpy(tokens[index].astype(np.int64))


def build_corpus(recipe: Recipe) -> Corpus:
    """Read the recipe's data, and make sure that the model knows every token and that a sequence fits."""
    spec = recipe.data
    assert isinstance(spec, PythonSource | Text | HuggingFace)
    if isinstance(spec, PythonSource):
        corpus = _python_source()
    elif isinstance(spec, Text):
        corpus = _text(spec.path)
    else:
        corpus = _hugging_face(spec)
    for part in ("train", "validation"):
        if len(getattr(corpus, part)) <= spec.sequence + 1:
            found = len(getattr(corpus, part))
            raise UserError(f"data: the {part} part has {found} tokens, too few for data.sequence={spec.sequence}")
    vocab = getattr(recipe.model, "vocab", corpus.vocab)
    if corpus.vocab > vocab:
        raise UserError(f"model.vocab={vocab} is too small: the data has {corpus.vocab} different tokens")
    return corpus


def _python_source() -> Corpus:
    return _documents("python-source", *python_sources())


def python_sources() -> tuple[Path, list[str]]:
    """Where Python's standard library is, and which of its files are the embedded corpus."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not _excluded(name)]
    if len(names) < 100:
        raise UserError(f"data: Python's standard library has no sources in {root}; use data.name: text with a path")
    return root, names


def _excluded(name: str) -> bool:
    """Whether a file of the standard library is a test, somebody else's, or made for one machine."""
    *folders, leaf = name.split("/")
    made_here = leaf.startswith("_sysconfigdata") or any(folder.startswith("config-") for folder in folders)
    return made_here or not EXCLUDED.isdisjoint(folders)


def _text(path: Path) -> Corpus:
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return _documents(f"text:{path.name}", path, names)
    try:
        whole = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise UserError(f"data.path: cannot read {path.resolve()}: {error.strerror}") from error
    return _cut(f"text:{path.name}", whole, 256)


def _documents(name: str, root: Path, names: list[str]) -> Corpus:
    """Files as bytes; the hash of its path decides to which part a file belongs."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for leaf in names:
        parts[zlib.crc32(leaf.encode()) % VALIDATION == 0].append((root / leaf).read_bytes())
    arrays = {held_out: np.frombuffer(b"\n".join(texts), np.uint8) for held_out, texts in parts.items()}
    if not parts[True]:  # a handful of files: cut one part off instead
        return _cut(name, arrays[False], 256)
    return Corpus(name, arrays[False], arrays[True], 256)


def _cut(name: str, tokens: np.ndarray, vocab: int) -> Corpus:
    """A corpus without documents: its last twentieth is the validation part."""
    edge = len(tokens) - len(tokens) // VALIDATION
    return Corpus(name, tokens[:edge], tokens[edge:], vocab)


def _hugging_face(spec: HuggingFace) -> Corpus:
    tokenizer = tokenizer_of(spec.tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = {False: array("i"), True: array("i")}  # four bytes a token: lists of ints would take nine times that
    for text in _texts(spec):
        held_out = zlib.crc32(text.encode()) % VALIDATION == 0
        parts[held_out].extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end)
        if len(parts[False]) + len(parts[True]) >= spec.tokens:
            break
    arrays = {held_out: np.frombuffer(tokens, np.int32) for held_out, tokens in parts.items()}
    name = f"{spec.dataset}:{spec.split}"
    if not parts[True]:
        return _cut(name, arrays[False], len(tokenizer))
    return Corpus(name, arrays[False], arrays[True], len(tokenizer))


def tokenizer_of(name: str) -> Any:
    transformers = needs("transformers", "data.tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer: cannot load {name!r}: {first_line(error)}") from error


def _texts(spec: HuggingFace) -> Iterator[str]:
    """The documents of the data set in their order."""
    datasets = needs("datasets", f"data set {spec.dataset}")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            spec.dataset, spec.config, split=spec.split, data_files=spec.data_files, streaming=spec.streaming
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data.dataset: cannot load {spec.dataset!r}: {first_line(error)}") from error
    for row in rows:
        if spec.text_column not in row:
            raise UserError(f"data.text_column: {spec.text_column!r} is not a column; there are {', '.join(row)}")
        yield row[spec.text_column]


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
