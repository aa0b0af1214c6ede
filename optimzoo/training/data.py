"""Corpora as one array of tokens each, and batches that are a function of (seed, step, micro-batch) alone."""

import hashlib
import platform
import re
import sysconfig
import zlib
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimzoo.training.errors import UserError, needs
from optimzoo.training.recipe import Recipe
from optimzoo.training.sections import Documents, HuggingFace, PythonSource, Text

COLUMN = r"\{(\w+)\}"  # of a row, in the template of a prompt or a response
VALIDATION = 20  # every twentieth document, by the hash of its name, is held out
# Distributions leave some of these out and patch others; what remains is nearly the same everywhere.
EXCLUDED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "ensurepip", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Token arrays for training and validation, and how many different tokens there may be.

    Tokens that are read but not to be learned come as their complement, negative. Sequences may start anywhere, or
    with `train_starts` and `validation_starts` at these places.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    vocab: int
    train_starts: np.ndarray | None = None
    validation_starts: np.ndarray | None = None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What identifies the corpus; `sha256` covers the tokens of both parts."""
        digest = hashlib.sha256(self.train.data)
        digest.update(self.validation.data)
        sizes = {"train_tokens": len(self.train), "validation_tokens": len(self.validation)}
        return {"name": self.name, "sha256": digest.hexdigest(), **sizes, "python": platform.python_version()}

    def batch(self, seed: int, step: int, micro: int, batch: int, sequence: int) -> Tensor:
        """(batch, sequence + 1) int64 tokens of the training part."""
        draws = words(seed, step, micro, count=batch)
        if self.train_starts is not None:
            return _windows(self.train, self.train_starts[draws % np.uint64(len(self.train_starts))], sequence)
        return _windows(self.train, draws % np.uint64(len(self.train) - sequence), sequence)

    def held_out(self, batch: int, sequence: int, batches: int) -> Iterator[Tensor]:
        """The same validation batches for every run, spread evenly over the validation part."""
        known = self.validation_starts
        last = len(self.validation) - sequence - 1 if known is None else len(known) - 1
        starts = np.linspace(0, last, batch * batches).astype(np.int64)
        for part in (starts if known is None else known[starts]).reshape(batches, batch):
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
        corpus = _python_source(spec)
    elif isinstance(spec, Text):
        corpus = _text(spec)
    elif spec.response is not None:
        corpus = _exchanges(spec)
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


def _python_source(spec: PythonSource) -> Corpus:
    root, names = python_sources()
    return _documents("python-source", root, _chosen(spec, names))


def python_sources() -> tuple[Path, list[str]]:
    """Where Python's standard library is, and which of its files are the embedded corpus."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not _excluded(name)]
    if len(names) < 100:
        raise UserError(f"data: Python's standard library has no sources in {root}; use data.name: text with a path")
    return root, names


def _chosen(spec: Documents, names: list[str]) -> list[str]:
    """The names of the part of a corpus that the recipe asks for."""
    found = [name for name in names if not spec.include or _matches(name, spec.include)]
    found = [name for name in found if not _matches(name, spec.exclude)]
    if not found:
        near = ", ".join(names[:: max(1, len(names) // 3)][:3])
        raise UserError(f"data: no file matches include and not exclude; files are named like {near}")
    return found


def _matches(name: str, patterns: str | tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ((patterns,) if isinstance(patterns, str) else patterns))


def _excluded(name: str) -> bool:
    """Whether a file of the standard library is a test, somebody else's, or made for one machine."""
    *folders, leaf = name.split("/")
    made_here = leaf.startswith("_sysconfigdata") or any(folder.startswith("config-") for folder in folders)
    return made_here or not EXCLUDED.isdisjoint(folders)


def _text(spec: Text) -> Corpus:
    path = spec.path
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return _documents(f"text:{path.name}", path, _chosen(spec, names))
    if spec.include or spec.exclude:
        raise UserError(f"data.include and data.exclude choose files of a folder, and {path} is none")
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
    for text in (row[spec.text_column] for row in _rows(spec, [spec.text_column])):
        held_out = zlib.crc32(text.encode()) % VALIDATION == 0
        parts[held_out].extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end)
        if len(parts[False]) + len(parts[True]) >= spec.tokens:
            break
    arrays = {held_out: np.frombuffer(tokens, np.int32) for held_out, tokens in parts.items()}
    name = f"{spec.dataset}:{spec.split}"
    if not parts[True]:
        return _cut(name, arrays[False], len(tokenizer))
    return Corpus(name, arrays[False], arrays[True], len(tokenizer))


def _exchanges(spec: HuggingFace) -> Corpus:
    """Prompts and responses, one after the other; a sequence starts where a prompt does and may hold several.

    Rows whose prompt leaves no room for a response are passed over.
    """
    tokenizer = tokenizer_of(spec.tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = {False: array("i"), True: array("i")}
    starts = {False: array("q"), True: array("q")}
    for texts in _filled(spec, [spec.prompt, spec.response or ""]):
        read, learned = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        read = read or end
        if len(read) > spec.sequence:
            continue
        held_out = zlib.crc32("".join(texts).encode()) % VALIDATION == 0
        starts[held_out].append(len(parts[held_out]))
        parts[held_out].extend([~token for token in read] + learned + end)
        if len(parts[False]) + len(parts[True]) >= spec.tokens:
            break
    if not starts[True] and len(starts[False]) > 1:  # few rows: the last of them
        cut = starts[False].pop()
        starts[True].append(0)
        parts = {False: parts[False][:cut], True: parts[False][cut:]}
    if not starts[True]:
        raise UserError(
            f"data: fewer than two prompts of {spec.dataset} are shorter than data.sequence={spec.sequence}"
        )
    room = array("i", [-1] * (spec.sequence + 1))  # so that a sequence may start at the last one; not to be learned
    train, validation = (np.frombuffer(parts[held_out] + room, np.int32) for held_out in (False, True))
    places = [np.frombuffer(starts[held_out], np.int64) for held_out in (False, True)]
    return Corpus(f"{spec.dataset}:{spec.split}", train, validation, len(tokenizer), *places)


def _filled(spec: HuggingFace, templates: list[str]) -> Iterator[list[str]]:
    """The templates with each row's columns in place of their names."""
    columns = re.findall(COLUMN, "".join(templates))
    for row in _rows(spec, columns):
        yield [_fill(text, row) for text in templates]


def _fill(text: str, row: dict[str, Any]) -> str:
    return re.sub(COLUMN, lambda found: str(row[found[1]]), text)


def tokenizer_of(name: str) -> Any:
    transformers = needs("transformers", "data.tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer: cannot load {name!r}: {_first_line(error)}") from error


def _rows(spec: HuggingFace, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of the data set in their order, each with `columns`."""
    how = {"split": spec.split, "data_files": spec.data_files, "streaming": spec.streaming}
    for row in data_set(spec.dataset, spec.config, **how):
        check_columns(row, columns)
        yield row


def data_set(name: str, config: str | None, **how: Any) -> Any:
    """Rows of a data set by its name and that of its part, if it has parts."""
    datasets = needs("datasets", f"data set {name}")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, **how)
    except (OSError, ValueError, RuntimeError) as error:
        what = f"{config} of {name!r}" if config else repr(name)
        raise UserError(f"data.dataset: cannot load {what}: {_first_line(error)}") from error


def check_columns(known: Collection[str], columns: Iterable[str]) -> None:
    """Refuse data without one of these columns."""
    for column in columns:
        if column not in known:
            raise UserError(f"data: {column!r} is not a column; there are {', '.join(known)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
