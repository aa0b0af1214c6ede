"""What a terminal shows while a run goes on; on standard error, so that standard output stays clean."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from optimzoo.memory.ledger import human

Row = dict[str, Any]


def _progress() -> Progress:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    return Progress(*columns, console=Console(stderr=True))


def numbers(row: Row) -> str:
    """The last update in words."""
    loss = "diverged" if row["loss"] is None else f"loss {row['loss']:.3f}"
    return f"{loss}  {row['tokens_per_s']:,.0f} tokens/s  optimizer {human(row['memory/state_bytes'])}"


@contextlib.contextmanager
def bar(label: str, total: int, quiet: bool) -> Iterator[Callable[[int, Row], None]]:
    """A function of (updates done, metrics) that moves a bar, or where nobody watches prints a line now and then."""
    console = Console(stderr=True)
    if quiet:
        yield lambda done, row: None
    elif console.is_terminal:
        with _progress() as progress:
            task = progress.add_task(escape(label), total=total, numbers="")
            yield lambda done, row: progress.update(task, completed=done, numbers=numbers(row))
    else:
        yield lambda done, row: _line(console, label, done, total, row)


def _line(console: Console, label: str, done: int, total: int, row: Row) -> None:
    if "validation_loss" in row or done == total:
        console.print(f"{label} {done}/{total}  {numbers(row)}", markup=False, highlight=False, soft_wrap=True)


class Watch:
    """Bars for runs in other processes, drawn from their metrics; without a terminal, a line for each that ends."""

    def __init__(self, quiet: bool) -> None:
        self.progress = _progress()
        self.quiet = quiet
        self.progress.disable = quiet or not self.progress.console.is_terminal
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def look(self, name: str, total: int, rows: list[Row]) -> None:
        """Show the metrics so far of a run that is under way or has ended."""
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total, numbers="starting")
        task = self.progress.tasks[self.tasks[name]]
        if not rows or task.completed == len(rows):
            return
        self.progress.update(self.tasks[name], completed=len(rows), numbers=numbers(rows[-1]))
        if self.progress.disable and not self.quiet and len(rows) == total:
            _line(self.progress.console, name, total, total, rows[-1])
