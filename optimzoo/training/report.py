"""One table and two pictures from the folders of finished runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from optimzoo.memory import KINDS
from optimzoo.memory.ledger import human
from optimzoo.training.folder import Folder, write

Result = Mapping[str, Any]
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
WEIGHTS, WORKSPACE = "#BBBBBB", "#FFFFFF"
# A kind of memory looks the same in every picture.
KIND = {kind: (COLOURS[i % 8], ("", "....", "xxxx")[i // 8]) for i, kind in enumerate(KINDS)}


def styles(count: int) -> list[tuple[str, str]]:
    """As many colours with markers, the first 48 of which differ."""
    return [(COLOURS[i % 8], MARKERS[i // 8 % len(MARKERS)]) for i in range(count)]


def ink(colour: str) -> tuple[float, ...]:
    """The colour, darkened until small letters of it can be read on white (4.5 to 1, as WCAG asks)."""
    from matplotlib.colors import to_rgb

    rgb: tuple[float, ...] = to_rgb(colour)
    while True:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
        if 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) >= 4.5:
            return rgb
        rgb = tuple(0.95 * v for v in rgb)


def duration(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def loss_text(method: Result) -> str:
    """A validation loss, with its spread where there are several seeds."""
    if method["validation_loss"] is None:
        return "diverged"
    spread = f" (spread {method['spread']:.3f})" if len(method.get("losses", ())) > 1 else ""
    return f"{method['validation_loss']:.3f}{spread}"


def accuracy_text(method: Result) -> str:
    """The share of right answers, with its spread where there are several seeds."""
    values = [v for v in method.get("accuracies", [method.get("validation_accuracy")]) if v is not None]
    spread = f" (spread {max(values) - min(values):.3f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{spread}" if values else "-"


def table(methods: Sequence[Result], title: str) -> Table:
    """One column a method: loss, optimizer bytes by kind, workspace, time of a step."""
    kinds = list(dict.fromkeys(kind for method in methods for kind in method["bytes"]["state_by_kind"]))
    result = Table("", title=escape(title), title_justify="left")
    for method in methods:
        result.add_column(escape(method["label"]), justify="right")
    held = [method["bytes"] for method in methods]

    result.add_row("learning rate", *(f"{method['optimizer']['lr']:g}" for method in methods))
    result.add_row("validation loss", *map(loss_text, methods))
    accuracies = [accuracy_text(method) for method in methods]
    if set(accuracies) != {"-"}:
        result.add_row("validation accuracy", *accuracies)
    result.add_row("optimizer bytes", *(human(one["state"]) for one in held))
    for kind in kinds:
        result.add_row(
            f"  {kind}", *(human(one["state_by_kind"][kind]) if kind in one["state_by_kind"] else "" for one in held)
        )
    result.add_row("  as a multiple of the weights", *(f"{one['state'] / one['weights']:.2f}" for one in held))
    result.add_row(
        "workspace of a step", *("-" if one["workspace"] is None else human(one["workspace"]) for one in held)
    )
    result.add_row("saved for backward", *(human(one["activations"]) for one in held))
    result.add_row("time of a step", *(duration(method["step_s"]) for method in methods))
    result.add_row("  of it the optimizer", *(duration(method["optimizer_s"]) for method in methods))
    return result


def sweeps(methods: Sequence[Result]) -> Table:
    """What each sweep tried: the best value is marked, and an edge is called one."""
    result = Table(
        "", "sweep (validation loss of the first seed)", title="How the best value was found", title_justify="left"
    )
    for method in methods:
        tried = []
        for value, loss in method["tried"]:
            text = f"{value:g}: {'diverged' if loss is None else f'{loss:.3f}'}"
            tried.append(f"[bold]{text}[/bold]" if value == method["best"] else text)
        edge = "" if method["interior"] else "  (the best is on the edge)"
        result.add_row(escape(f"{method['label']} {method['key']}"), "   ".join(tried) + edge)
    return result


def draw_loss(runs: Mapping[str, Sequence[Path]], path: Path) -> None:
    """Training loss (smoothed, thin) and validation loss (dots) of every method's runs."""
    drawing, axes = figure(4.5)
    lowest, highest = float("inf"), 0.0
    for (label, folders), (colour, marker) in zip(runs.items(), styles(len(runs)), strict=True):
        for index, folder in enumerate(folders):
            rows = [row for row in Folder(folder).rows() if row["loss"] is not None]
            if not rows:
                continue
            smooth = _smooth([row["loss"] for row in rows])
            axes.plot([row["step"] for row in rows], smooth, color=colour, alpha=0.45, linewidth=1)
            held_out = [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
            name = label if index == 0 else None
            if held_out:
                axes.plot(*zip(*held_out, strict=True), color=colour, marker=marker, markersize=4, label=name)
            lowest, highest = min(lowest, *smooth), max(highest, smooth[min(len(smooth) - 1, 20)])
    if highest > lowest:
        axes.set_ylim(lowest - 0.05 * (highest - lowest), highest)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_title("validation loss (dots) and smoothed training loss", loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    save(drawing, path)


def draw_memory(methods: Sequence[Result], path: Path) -> None:
    """Bytes beside each other: weights, what the optimizer remembers by kind, what a step needs for a moment."""
    drawing, axes = figure(1.6 + 0.6 * len(methods))
    visible = max(method["bytes"]["weights"] for method in methods) / 1000  # counters would be lines in the legend only
    held = [method["bytes"]["state_by_kind"] for method in methods]
    kinds = [kind for kind in KIND if any(one.get(kind, 0) > visible for one in held)]
    longest = 0.0
    for line, method in enumerate(methods):
        held = method["bytes"]
        parts = [("weights", held["weights"], WEIGHTS, "")]
        parts += [(kind, held["state_by_kind"].get(kind, 0), *KIND[kind]) for kind in kinds]
        parts += [("workspace of a step", held["workspace"] or 0, WORKSPACE, "////")]
        left = 0.0
        for name, nbytes, colour, hatch in parts:
            width = nbytes / 2**20
            edge = "#555555" if colour == WORKSPACE else "white"
            axes.barh(
                line, width, 0.62, left, color=colour, hatch=hatch, edgecolor=edge, label=name if line == 0 else None
            )
            left += width
        longest = max(longest, left)
        axes.annotate(f"  state {human(held['state'])}", (left, line), va="center", fontsize=9)
    axes.set_yticks(range(len(methods)), [method["label"] for method in methods])
    axes.set(xlim=(0, 1.2 * longest), ylim=(len(methods) - 0.5, -0.5))  # room for the words, and around the bars
    axes.set_xlabel("MiB")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    save(drawing, path)


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential average without the bias of its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def figure(height: float) -> tuple[Any, Any]:
    """A figure and its axes, without pyplot: nothing global, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, height), dpi=130, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def save(drawing: Any, path: Path) -> None:
    write(path, lambda file: drawing.savefig(file, format="png"))
