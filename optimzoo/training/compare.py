"""Several runs on one page. Finished runs are not repeated, interrupted ones go on from their checkpoint."""

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from optimzoo.training import page, report
from optimzoo.training.claims import judge
from optimzoo.training.errors import UserError
from optimzoo.training.folder import Folder, write_json, write_text
from optimzoo.training.optimizers import missing
from optimzoo.training.places import place
from optimzoo.training.planning import check
from optimzoo.training.progress import Watch
from optimzoo.training.recipe import Recipe, validate
from optimzoo.training.results import code
from optimzoo.training.surroundings import log_table
from optimzoo.training.sweep import Search, search, summary
from optimzoo.training.trainer import prepare, train

Result = dict[str, Any]


def compare(
    recipe: Recipe,
    folder: str | Path,
    jobs: int = 1,
    quiet: bool = False,
    command: str = "optimzoo compare",
    source: str = "recipe",
) -> Result:
    """Run every entry of the recipe's `compare`, with its sweep and seeds, and put them on one page.

    `jobs` processes work at a time. Each run has its own folder below `folder`, named by a hash of all that decides its
    result (recipe, corpus, versions), which is how a second call finds what the first one did. The page: a table, the
    recipe's claims with verdicts, `comparison.json`, the same for a README in `comparison.md` (where `command` is said
    to have made it), and three pictures. What one entry gets wrong is told, after `source`, before any of them runs.
    """
    out, home = Path(folder), Folder(Path(folder))
    if home.begun() and not home.comparison.exists():
        raise UserError(f"{out} holds a single run, whose pictures would be replaced; choose another --out")
    code()  # before anybody changes the sources that this process has loaded
    seeds = recipe.seeds or (recipe.seed,)
    entries = recipe.entries()
    absent = {label: why for label, entry in entries.items() if (why := missing(entry.optimizer.name))}
    if len(absent) == len(entries):
        raise UserError("; ".join(absent.values()))
    entries = {label: entry for label, entry in entries.items() if label not in absent}
    hows = {label: (entry, entry.sweep or recipe.sweep, entry.seeds or seeds) for label, entry in entries.items()}
    for label, how in hows.items():
        try:
            _check(label, next(search(*how)), out)
        except UserError as error:
            raise UserError(f"{source}: compare entry {label!r}: {error}") from error
    for entry in entries.values():
        prepare(entry, out, quiet)  # once, and before several processes ask for the same
    searches = {label: search(*how) for label, how in hows.items()}
    with _executor(jobs) as executor, Watch(quiet or jobs == 1) as watch:
        found = _drive(searches, out, executor, watch, quiet or jobs > 1)
    runs = {label: [place(out, label, run) for run in one["runs"]] for label, one in found.items()}
    first = next(iter(found.values()))["results"][0]
    stale = [
        str(place(out, label, run))
        for label, one in found.items()
        for run, result in _pairs(one)
        if result["code"] != code()
    ]
    methods = [summary(label, one) for label, one in found.items()]
    result = {"methods": methods, "claims": judge(recipe.claims, methods), "corpus": first["corpus"]}
    result |= {"versions": first["versions"], "stale": stale, "missing": absent}
    _publish(recipe, result, runs, out, command)
    return result


def _check(label: str, runs: Sequence[Recipe], out: Path) -> None:
    """Refuse now what the ends of a sweep would after hours of other runs; what is finished has shown that it can."""
    open_ = [run for run in (runs[0], runs[-1]) if not Folder(place(out, label, run)).finished(run)]
    for run in {run.replace({"seed": 0, "optimizer.lr": 1.0}).key: run for run in open_}.values():
        check(run)


def _publish(recipe: Recipe, result: Result, runs: dict[str, list[Path]], out: Path, command: str) -> None:
    """The files of the page, and where the recipe asks for it the same in wandb."""
    methods = result["methods"]
    write_json(Folder(out).comparison, result)
    write_text(out / "comparison.md", page.markdown(result, command))
    report.draw_loss({_label(method): runs[method["label"]] for method in methods}, out / "loss.png")
    report.draw_memory(methods, out / "memory.png")
    page.draw_pareto(methods, out / "pareto.png")
    headings, *lines = page.lines(methods)
    log_table(recipe, out, headings, lines, methods)


def _pairs(found: dict[str, Any]) -> Sequence[tuple[Recipe, Result]]:
    return list(zip(found["runs"], found["results"], strict=True))


def _label(method: Result) -> str:
    return f"{method['label']} (lr {method['optimizer']['lr']:g})"


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args, **kwargs))
        return future


def _executor(jobs: int) -> Executor:
    """Workers forked from a fresh process that has done the slow imports once, not from this one with its threads."""
    if jobs == 1:
        return _Here()
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _die_at_once)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optimzoo.training", "transformers.models.llama.modeling_llama"])
    return ProcessPoolExecutor(jobs, context, _die_at_once)


def _die_at_once() -> None:
    """Ctrl-C ends a worker without a traceback: what it has not saved is repeated by the next call."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _known(result: Result | None) -> Future | None:
    """What a finished run left, without a process that looks for it."""
    if result is None:
        return None
    future: Future = Future()
    future.set_result(result)
    return future


def _work(values: dict[str, Any], folder: Path, quiet: bool) -> Result:
    return train(validate(values, "recipe"), folder, resume=True, quiet=quiet)


def _drive(
    searches: dict[str, Search], out: Path, executor: Executor, watch: Watch, quiet: bool
) -> dict[str, dict[str, Any]]:
    """Feed the searches with results until each has returned what it found."""
    found: dict[str, dict[str, Any]] = {}
    pending: dict[str, list[Future]] = {}
    folders: dict[Future, tuple[str, int, Folder]] = {}

    def go_on(label: str, results: list[Result] | None) -> None:
        try:
            runs = next(searches[label]) if results is None else searches[label].send(results)
        except StopIteration as end:
            found[label] = end.value
            return
        pending[label] = []
        for run in runs:
            home = place(out, label, run)
            future = _known(Folder(home).finished(run)) or executor.submit(_work, run.run(), home, quiet)
            pending[label].append(future)
            folders[future] = (home.name, run.schedule.steps, Folder(home))

    try:
        for label in searches:
            go_on(label, None)
        while pending:
            waiting = [future for futures in pending.values() for future in futures if not future.done()]
            wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in [future for future in folders if future.running() or future.done()]:
                ended, (name, steps, home) = future.done(), folders[future]
                watch.look(name, steps, home.rows())
                if ended:  # before its last rows were read
                    del folders[future]
            for label in [label for label, futures in pending.items() if all(future.done() for future in futures)]:
                go_on(label, [future.result() for future in pending.pop(label)])
    except BrokenProcessPool as error:
        raise UserError(
            "a run was killed, perhaps for want of memory; the same command goes on with fewer --jobs"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
    return {label: found[label] for label in searches}
