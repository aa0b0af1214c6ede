"""The page that a comparison leaves: a line a method, on a terminal and in Markdown, and loss against bytes."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from optimzoo.memory.ledger import human
from optimzoo.training.labels import label
from optimzoo.training.report import accuracy_text, duration, figure, ink, save, styles

Method = Mapping[str, Any]


def ranked(methods: Sequence[Method]) -> list[Method]:
    """The best loss first, those that diverged last."""
    return sorted(methods, key=lambda method: (method["validation_loss"] is None, method["validation_loss"]))


def lines(methods: Sequence[Method]) -> list[list[str]]:
    """The headings, then a line a method, the best loss first."""
    accuracies = [accuracy_text(method) for method in ranked(methods)]
    made = []
    for method, accuracy in zip(ranked(methods), accuracies, strict=True):
        held, loss = method["bytes"], method["validation_loss"]
        cells = {
            "method": method["label"],
            "best lr": f"{method['optimizer']['lr']:g}" + ("" if method.get("interior", True) else " (edge)"),
            "validation loss": "diverged" if loss is None else f"{loss:.3f}",
            "spread": f"{method['spread']:.3f}" if len(method["losses"]) > 1 and loss is not None else "-",
            "accuracy": accuracy,
            "weights": human(held["weights"]),
            "optimizer state": human(held["state"]),
            "workspace": "-" if held["workspace"] is None else human(held["workspace"]),
            "step": duration(method["step_s"]),
        }
        if set(accuracies) == {"-"}:
            del cells["accuracy"]
        made.append(cells)
    return [list(made[0]), *(list(cells.values()) for cells in made)]


def table(methods: Sequence[Method], title: str) -> Table:
    """One line a method, the best loss first."""
    headings, *rest = lines(methods)
    result = Table(title=escape(title), title_justify="left")
    for heading in headings:
        result.add_column(heading, justify="left" if heading == "method" else "right")
    for cells in rest:
        result.add_row(*map(escape, cells))
    return result


def verdicts(claims: Sequence[Mapping[str, Any]]) -> Table:
    """One line a claim, and what was found for each part of it."""
    result = Table("claim", "verdict", "by", title="What the papers claim", title_justify="left")
    for claim in claims:
        parts = "\n".join(map(_part, claim["parts"]))
        result.add_row(escape(claim["text"]), claim["verdict"], escape(parts))
    return result


def _part(part: Mapping[str, Any]) -> str:
    sign = {True: "yes", False: "no", None: "open"}[part["holds"]]
    return f"{sign}: {part['found']}"


def markdown(result: Mapping[str, Any], command: str) -> str:
    """Table, verdicts and where they come from, for a README."""
    headings, *rest = lines(result["methods"])
    text = [_line(headings), _line(["---"] * len(headings)), *map(_line, rest)]
    if result["claims"]:
        text += ["", _line(["claim", "verdict", "by"]), _line(["---"] * 3)]
        for claim in result["claims"]:
            text.append(_line([claim["text"], f"**{claim['verdict']}**", "; ".join(map(_part, claim["parts"]))]))
    corpus, packages = result["corpus"], result["versions"]
    seeds = max(len(method["losses"]) for method in result["methods"])
    text += ["", f"Made by `{command}`: {seeds} seed(s) at the best learning rate, torch {packages['torch']}, "]
    text[-1] += f"Python {corpus['python']}, data {corpus['name']}, sha256 {corpus['sha256'][:12]}."
    text += [f"No row {label}: {why}." for label, why in result["missing"].items()]
    if result["stale"]:
        text.append(f"{len(result['stale'])} of the runs were made by other code than this.")
    return "\n".join(text) + "\n"


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(part.replace('|', chr(92) + '|') for part in parts)} |"


def draw_pareto(methods: Sequence[Method], path: Path) -> None:
    """Loss against bytes of state, with the seeds' range; the line joins those that nothing beats in both."""
    shown = [method for method in ranked(methods) if method["validation_loss"] is not None]
    drawing, axes = figure(5.5)
    least = min((held for method in shown if (held := method["bytes"]["state"])), default=2) / 2  # the place of zero
    points = [(max(method["bytes"]["state"], least) / 2**20, method["validation_loss"]) for method in shown]
    bars, edge = [], {"markeredgecolor": "white", "markeredgewidth": 0.6}  # dots on each other are told apart
    for method, (held, loss), (colour, marker) in zip(shown, points, styles(len(shown)), strict=True):
        low, high = min(method["losses"]), max(method["losses"])
        axes.errorbar(held, loss, [[loss - low], [high - loss]], color=colour, capsize=2, linewidth=1)
        axes.plot(held, loss, color=colour, marker=marker, markersize=7, **edge)
        bars.append(((held, low), (held, high)))
    best: list[tuple[float, float]] = []
    for held, loss in points:  # by rising loss: a point belongs to the front when it holds less than all before it
        if not best or held < best[-1][0]:
            best.append((held, loss))
    if best:
        axes.plot(*zip(*best, strict=True), color="#888888", linewidth=1, linestyle="--", zorder=0)
    sizes = [held for held, _ in points]
    axes.margins(x=0.15, y=0.08)
    if sizes and max(sizes) > 4 * min(sizes):  # a narrower axis would have no numbers
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_xlim(0, 1.15 * max(sizes, default=1))
    axes.set(xlabel="optimizer state (MiB)", ylabel="validation loss (nats a token), not from 0")
    swept = any("best" in method for method in methods)
    axes.set_title("loss against bytes" + swept * ", each at its best learning rate", loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    colours = [ink(colour) for colour, _ in styles(len(shown))]
    named = [(method["label"], *rest) for method, *rest in zip(shown, points, colours, strict=True)]
    label(drawing, axes, named, [*bars, *pairwise(best)])
    save(drawing, path)
