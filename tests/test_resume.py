"""kill -9 at any moment, then resume: the same weights, bit for bit. Real processes, really killed."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from optimzoo.training import UserError, load, train
from optimzoo.training import folder as folder_module
from optimzoo.training.folder import Folder, write

ROOT = Path(__file__).parents[1]
STEPS = 30
RECIPE = f"""
model: {{name: llama, hidden_size: 16, intermediate_size: 24, layers: 1, heads: 2}}
data: {{name: text, path: PATH, sequence: 16, batch: 2, accumulate: 2}}
optimizer: OPTIMIZER
modules: MODULES
schedule: {{name: cosine, warmup: 5, steps: {STEPS}}}
memory: {{every: 7}}
eval: {{every: 4, batches: 2}}
checkpoint: {{every: EVERY}}
threads: 1
"""
OPTIMIZERS = (
    "{name: cosmos, lr: 1e-2, rank: 4, fallback_lr: 3e-3}",
    "{name: torch.muon, lr: 1e-2, fallback_lr: 3e-3}",
    "{name: adamw, lr: 1e-2}",
)
# Every class of the zoo with its schedules turning, and the layers that a recipe gives it.
KILLED = {
    "adamw": (OPTIMIZERS[2], "[]"),
    "cosmos": (OPTIMIZERS[0], "[]"),
    "frugal": ("{name: frugal, lr: 1e-2, update_gap: 4}", "[]"),
    "frugal block": ("{name: frugal, lr: 1e-2, update_gap: 4, projection: block, state_dtype: int8}", "[]"),
    "swan": ("{name: swan, lr: 1e-2}", "[]"),
    "sm3": ("{name: sm3, lr: 1e-1, momentum: 0.9}", "[]"),
    "sst": ("{name: sst, lr: 1e-2, resample_every: 4, warmup: 2}", "[{kind: spectral, rank: 4}]"),
    "sft": (
        f"{{name: sft, lr: 1e-2, reselect_every: 5, accumulate: 2, total_steps: {STEPS}}}",
        "[{kind: sparse_delta, density: 0.1}]",
    ),
    "adamw, sampled": (OPTIMIZERS[2], "[{kind: sampled, ratio: 0.5}]"),
    "torch.muon": (OPTIMIZERS[1], "[]"),
}
KILLS = 200


def run(recipe: Path, folder: Path, sync_s: float, limit: int | None) -> None:
    """In a process of its own: train on a slow disk, or on one with room for files of `limit` bytes."""
    torch.set_num_threads(1)
    sync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(sync_s)
        sync(handle)

    folder_module.os.fsync = slow  # type: ignore[assignment]  # this process ends with the run
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train(load(recipe), folder, resume=True, quiet=True)
    except UserError as error:
        (folder / "refused").write_text(str(error))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Start `run` in a process forked from a server that has done the slow imports once."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.llama.modeling_llama", "optimzoo.training"])
    children = []

    def begin(recipe: Path, folder: Path, sync_s: float = 0.0, limit: int | None = None) -> BaseProcess:
        child = context.Process(target=run, args=(recipe, folder, sync_s, limit))
        child.start()
        children.append(child)
        return child

    yield begin
    for child in children:
        if child.is_alive():
            child.kill()
        child.join()


def written(tmp_path: Path, optimizer: str, modules: str = "[]", every: int = 3) -> Path:
    (tmp_path / "corpus.txt").write_text((ROOT / "setup.cfg").read_text() * 10)
    path = tmp_path / "recipe.yaml"
    parts = {"PATH": str(tmp_path / "corpus.txt"), "OPTIMIZER": optimizer, "MODULES": modules, "EVERY": str(every)}
    text = RECIPE
    for word, part in parts.items():
        text = text.replace(word, part)
    path.write_text(text)
    return path


def kill_when(child: BaseProcess, moment: Callable[[], bool]) -> None:
    """SIGKILL as soon as `moment` says so; the process must still be running then."""
    deadline = time.monotonic() + 300
    while not moment():
        assert child.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def lines(folder: Path, count: int) -> Callable[[], bool]:
    metrics = folder / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= count


def same(one: Any, other: Any) -> bool:
    """Equality of nested state, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_run(folder: Path, whole: Path) -> None:
    ours, theirs = (torch.load(place / "checkpoint.pt", weights_only=True) for place in (folder, whole))
    assert ours["step"] == theirs["step"] == STEPS
    assert same(ours["model"], theirs["model"])
    assert same(ours["optimizers"], theirs["optimizers"])
    assert same(ours["schedulers"], theirs["schedulers"])
    timeless = [
        [{k: v for k, v in row.items() if not k.endswith("_s")} for row in Folder(place).rows()]
        for place in (folder, whole)
    ]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda text: text.split(",")[0].removeprefix("{name: "))
def test_killed_and_resumed_is_uninterrupted(optimizer: str, tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    recipe, folder, whole = written(tmp_path, optimizer), tmp_path / "killed", tmp_path / "whole"
    train(load(recipe), whole, quiet=True)
    # Before the first checkpoint; between two; while one is being written, on a disk that takes a while.
    kill_when(start(recipe, folder), lines(folder, 1))
    assert len(Folder(folder).rows()) < STEPS
    kill_when(start(recipe, folder), lines(folder, 8))
    kill_when(start(recipe, folder, sync_s=0.05), (folder / "checkpoint.pt.partial").exists)
    before = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert 3 <= before < STEPS
    kill_when(start(recipe, folder, sync_s=0.02), lines(folder, 20))
    last = start(recipe, folder)
    last.join()
    assert last.exitcode == 0
    assert_same_run(folder, whole)
    assert not list(folder.glob("*.partial"))


@pytest.mark.long
@pytest.mark.parametrize("name", KILLED)
def test_two_hundred_kills(
    name: str, tmp_path: Path, start: Callable[..., BaseProcess], capsys: pytest.CaptureFixture
) -> None:
    """SIGKILL at moments that chance spreads over the whole run, its checkpoints and pictures, five to a run.

    All of them: pytest -m long tests/test_resume.py
    """
    recipe, whole, count = written(tmp_path, *KILLED[name], every=2), tmp_path / "whole", KILLS // len(KILLED)
    began = time.monotonic()
    child = start(recipe, whole)
    child.join()
    lasts, chance, found = time.monotonic() - began, random.Random(name), Counter[str]()
    while found.total() < count:
        folder = tmp_path / str(found.total())
        moments = sorted(chance.random() for _ in range(5))
        for since, until in pairwise((0.0, *moments)):
            child = start(recipe, folder)
            child.join(lasts * (until - since))
            child.kill()
            child.join()
            refused_nothing(folder)
            if child.exitcode == 0:
                break
            found[moment(folder)] += 1
        last = start(recipe, folder)
        last.join()
        refused_nothing(folder)
        assert last.exitcode == 0
        assert_same_run(folder, whole)
        assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{name}: {found.total()} kills in {time.monotonic() - began:.0f} s: {dict(sorted(found.items()))}")


def refused_nothing(folder: Path) -> None:
    refused = folder / "refused"
    assert not refused.exists(), refused.read_text()


def moment(folder: Path) -> str:
    """What a run was at when it was killed."""
    if partial := list(folder.glob("*.partial")):
        return f"writing {partial[0].name.removesuffix('.partial')}"
    if not (folder / "metrics.jsonl").exists():
        return "before the first update"
    if (folder / "result.json").exists():
        return "drawing"
    return "training" if len(Folder(folder).rows()) < STEPS else "after the last update"


def test_a_full_disk_loses_nothing(tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    recipe, folder, whole = written(tmp_path, OPTIMIZERS[0]), tmp_path / "full", tmp_path / "whole"
    train(load(recipe), whole, quiet=True)
    kill_when(start(recipe, folder), lines(folder, 8))
    saved = (folder / "checkpoint.pt").read_bytes()
    child = start(recipe, folder, limit=len(saved) // 2)
    child.join()
    assert child.exitcode == 0
    refused = (folder / "refused").read_text()
    assert "checkpoint.pt: File too large; the previous checkpoint.pt is intact; free some space" in refused
    assert (folder / "checkpoint.pt").read_bytes() == saved
    assert not list(folder.glob("*.partial"))
    train(load(recipe), folder, resume=True, quiet=True)
    assert_same_run(folder, whole)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*No space left on device; the previous x.json is intact"):
        write(path, fail)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_the_command_itself(tmp_path: Path) -> None:
    recipe, folder, whole = written(tmp_path, OPTIMIZERS[0]), tmp_path / "killed", tmp_path / "whole"
    arguments = [sys.executable, "-m", "optimzoo", "run", str(recipe), "--out", str(folder), "--resume", "--json"]
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not lines(folder, 5)():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    result = train(load(recipe), folder, resume=True, quiet=True)
    train(load(recipe), whole, quiet=True)
    assert_same_run(folder, whole)
    assert json.loads((folder / "result.json").read_text()) == result
