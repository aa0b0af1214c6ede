"""Cases that several processes run together, each case once for every number of ranks."""

import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Case = Callable[[Path], None]
PRELOADED = ["tests.test_sharded", "tests.test_trainers", "transformers.trainer", "accelerate"]


def started(work: Callable[..., None], *args: Any) -> BaseProcess:
    """A process that does `work`, forked from one that has imported everything, once, and computed nothing.

    Autograd refuses to run in the fork of a process in which it has had threads.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_alone, args=(work, *args))
    process.start()
    return process


def _alone(work: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as setup.cfg has it for tests, whose filters end with their process
    # torch says so of every nn.Linear with a bias on three dimensions; no model here changes its output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    try:
        work(*args)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # DDP's destructor may wait for a gloo thread that waits for the interpreter


def run_together(world: int, cases: dict[str, Case], folder: Path) -> dict[str, str]:
    """Run every case on `world` gloo ranks; what went wrong by case, "" where nothing did.

    The processes stop at the first failure, as the ranks are out of step then; cases after it are not run.
    """
    meet = folder / f"meet_{world}"
    workers = [started(_rank, rank, world, cases, folder, meet) for rank in range(world)]
    for worker in workers:
        worker.join()
    found = dict.fromkeys(cases, "not run, because a case before it failed")
    for rank in range(world):
        log = folder / f"{world}_{rank}"
        for path in log.iterdir() if log.exists() else ():
            text = path.read_text()
            found[path.name] = (
                text if found[path.name].startswith("not run") or not found[path.name] else found[path.name]
            )
    return found


def every_rank(world: int, work: Callable[..., None], *args: Any) -> None:
    """Run `work(rank, *args)` in `world` processes, which meet as they like; fails where one of them does."""
    ranks = [started(work, rank, *args) for rank in range(world)]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * world


def _rank(rank: int, world: int, cases: dict[str, Case], folder: Path, meet: Path) -> None:
    log = folder / f"{world}_{rank}"
    log.mkdir()
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=world, timeout=timedelta(minutes=10)
    )
    code = 0
    for name, case in cases.items():
        try:
            torch.manual_seed(rank)  # ranks differ in everything but what a case makes alike
            with warnings.catch_warnings():  # what a case filters is filtered for it alone
                case(folder)
            (log / name).write_text("")
        except Exception:
            (log / name).write_text(f"rank {rank}:\n{traceback.format_exc()}")
            code = 1
            break
    if not code:
        dist.barrier()
    os._exit(code)
