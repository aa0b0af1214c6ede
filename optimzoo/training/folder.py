"""The folder of one run. Files are replaced at once or not at all, so that a kill or a full disk loses nothing."""

import contextlib
import json
import os
import platform
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from optimzoo.training.errors import UserError, reason
from optimzoo.training.parsing import flat, parse
from optimzoo.training.recipe import Recipe, validate

PACKAGES = ("optimzoo", "numpy", "transformers", "datasets", "pydantic")
FORMAT = "optimzoo run 1"


def write(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Give `path` what `fill` writes, or leave it as it was: the new file takes its place once it is on the disk."""
    partial = path.with_name(path.name + ".partial")  # in the same folder: a rename across disks is a copy
    try:
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        kept = f"; the previous {path.name} is intact" if path.exists() else ""
        raise UserError(
            f"cannot write {path}: {reason(error)}{kept}; free some space and go on with --resume"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Bring the rename itself to the disk, where the system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class Folder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.recipe = path / "recipe.yaml"
        self.comparison = path / "comparison.json"  # of a folder that holds runs instead of being one's
        self.delta = path / "delta.safetensors"
        self.pictures = (path / "loss.png", path / "memory.png")

    def open(self, recipe: Recipe, resume: bool) -> None:
        """Make the folder a home for `recipe`: a new one, or with `resume` the one that already is."""
        if self.recipe.exists() and self.begun():
            if not resume:
                raise UserError(f"{self.path} already holds a run; go on with --resume, or choose another --out")
            self._same(recipe)
        elif self.comparison.exists():
            raise UserError(f"{self.path} holds a comparison, whose pictures would be replaced; choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.path}: {error.strerror}; choose another --out") from error
        header = f"# A resolved recipe: optimzoo run {self.recipe.name} --out {self.path.name} --resume\n"
        write_text(self.recipe, header + yaml.safe_dump(recipe.run(), sort_keys=False))

    def begun(self) -> bool:
        """Whether there is something to go on with: a run refused before its first update has left its recipe only."""
        rows = self.metrics.exists() and self.metrics.stat().st_size > 0
        return rows or self.checkpoint.exists() or self.result.exists()

    def _same(self, recipe: Recipe) -> None:
        try:
            text = self.recipe.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.recipe} is damaged: {error}; choose another --out") from error
        other = validate(parse(text, str(self.recipe)), str(self.recipe))
        if other.key != recipe.key:
            raise UserError(f"{self.path} holds another run ({difference(other, recipe)}); choose another --out")

    def save(self, recipe: Recipe, step: int, parts: dict[str, Any]) -> None:
        """Write the checkpoint after `step` updates."""
        state = {"format": FORMAT, "key": recipe.key, "step": step, **parts}
        write(self.checkpoint, lambda file: torch.save(state, file))

    def load(self, recipe: Recipe, device: torch.device) -> dict[str, Any] | None:
        """The checkpoint, None where there is none yet."""
        if not self.checkpoint.exists():
            return None
        remedy = "put a good copy in its place, or delete it to start again from step 0"
        try:
            with zipfile.ZipFile(self.checkpoint) as archive:
                if archive.testzip() is not None:  # torch itself does not look at the checksums
                    raise ValueError("a checksum is wrong")
            state = torch.load(self.checkpoint, map_location=device, weights_only=True)
        except Exception as error:  # a damaged archive raises anything from EOFError to UnpicklingError
            raise UserError(f"{self.checkpoint} is damaged or no checkpoint of torch; {remedy}") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise UserError(f"{self.checkpoint} is not a checkpoint of an optimzoo run; {remedy}")
        if state.get("key") != recipe.key:
            raise UserError(f"{self.checkpoint} belongs to another recipe; {remedy}")
        step = state.get("step")
        if type(step) is not int or not 0 <= step <= recipe.schedule.steps:
            raise UserError(f"{self.checkpoint} is damaged: step is {str(step)[:20]}; {remedy}")
        return state

    def finished(self, recipe: Recipe) -> dict[str, Any] | None:
        """The result of a finished run of this very recipe."""
        try:
            result = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return result if isinstance(result, dict) and result.get("key") == recipe.key else None

    @contextlib.contextmanager
    def log(self, step: int) -> Iterator["Log"]:
        """The metrics, cut back to the first `step` updates, open for more."""
        rows = self.rows()[:step]
        if len(rows) < step:
            raise UserError(
                f"{self.metrics} holds {len(rows)} of the {step} updates that {self.checkpoint.name} has seen; put a "
                "good copy in its place, or delete the checkpoint to start again from step 0"
            )
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        with self.metrics.open("ab", buffering=0) as file:  # unbuffered: nothing is left to fail when it closes
            yield Log(file, rows)

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of every update; a line that a kill has torn, or that is none of ours, ends them."""
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError, RecursionError):
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if not isinstance(row, dict) or row.get("step") != len(rows) + 1 or "loss" not in row:
                    break
                rows.append(row)
        return rows


class Log:
    """One JSON line an update."""

    def __init__(self, file: IO[bytes], rows: list[dict[str, Any]]) -> None:
        self.file, self.rows = file, rows

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        try:
            self.file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise UserError(
                f"cannot write {self.file.name}: {reason(error)}; free some space and use --resume"
            ) from error

    @property
    def diverged(self) -> bool:
        """Whether the last update's loss was no number."""
        return bool(self.rows) and self.rows[-1]["loss"] is None

    def sync(self) -> None:
        """Bring every line to the disk: before a checkpoint says that they are there."""
        os.fsync(self.file.fileno())


def difference(one: Recipe, other: Recipe) -> str:
    """The dotted keys in which two recipes differ."""
    ours, theirs = flat(one.run()), flat(other.run())
    return ", ".join(sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))[:4])


def versions() -> dict[str, str]:
    """Python, platform and the packages that decide the numbers."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"torch": str(torch.__version__)}  # which tells the build too
