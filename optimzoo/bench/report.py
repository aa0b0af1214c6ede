"""Measurements as tables."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from optimzoo.bench.training import PARTS
from optimzoo.memory.ledger import human


def table(found: dict[str, Any]) -> Table:
    """Every candidate: time, ratios to the yardsticks, first step, bytes."""
    rows = found["rows"]
    yardsticks = next((list(row["ratios"]) for row in rows.values() if "ratios" in row), [])
    of = f"{found['weights'] / 1e6:.1f} million weights" + (f", {found['layers']} layers" if found["layers"] else "")
    result = Table("optimizer", title=f"One step, {of}; {found['rounds']} rounds", title_justify="left")
    for name in (
        "p20, ms",
        *(f"/ {escape(yard)}" for yard in yardsticks),
        "p50/p20",
        "first / p20",
        "state",
        "workspace",
    ):
        result.add_column(name, justify="right")
    for label, row in rows.items():
        if "error" in row:
            result.add_row(escape(label), escape(row["error"]))
            continue
        ratios = [f"{row['ratios'][yard]:.2f}" for yard in yardsticks]
        first, steady = f"{row['first'] / row['p20']:.1f}", f"{row['spread']:.2f}"
        result.add_row(
            escape(label),
            f"{1e3 * row['p20']:.2f}",
            *ratios,
            steady,
            first,
            human(row["state"]),
            human(row["workspace"]),
        )
    return result


def training_table(found: dict[str, Any]) -> Table:
    """Whole training steps: time, ratio, and how much of it each part takes."""
    title = f"Training step, {found['batch']} x {found['sequence']} tokens; {found['rounds']} rounds"
    result = Table("method", title=title, title_justify="left")
    for name in ("p20, ms", "ratio", "p50/p20", *(f"{part}, ms" for part in PARTS)):
        result.add_column(name, justify="right")
    for label, row in found["rows"].items():
        parts = [f"{1e3 * row[part]:.1f}" for part in PARTS]
        result.add_row(escape(label), f"{1e3 * row['p20']:.1f}", f"{row['ratio']:.2f}", f"{row['spread']:.2f}", *parts)
    return result


def growth(found: list[dict[str, Any]]) -> Table:
    """The same candidates at several depths: time a layer and workspace, which should both stay as they are."""
    result = Table("optimizer", title="Milliseconds a layer, and workspace", title_justify="left")
    for one in found:
        result.add_column(f"{one['layers']} layers", justify="right")
    for label in found[0]["rows"]:
        rows = [one["rows"][label] for one in found]
        if all("p20" in row for row in rows):
            cells = zip(found, rows, strict=True)
            result.add_row(
                escape(label),
                *(f"{1e3 * row['p20'] / one['layers']:.3f}, {human(row['workspace'])}" for one, row in cells),
            )
    return result
