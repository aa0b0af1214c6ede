"""The page of a comparison: verdicts by rule, table, Markdown, pictures, wandb; and bytes in a user's own loop."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from matplotlib.image import imread
from wandb.sdk.wandb_run import Run

import optimzoo
from optimzoo.training import UserError, compare, page, report
from optimzoo.training.claims import judge
from optimzoo.training.sections import Claim
from tests.test_recipes import text as text  # a fixture
from tests.test_recipes import toy

ENTRIES = "compare=[{label: A}, {label: B, optimizer: {name: torch.sgd, lr: 1e-1}}]"


def row(label: str, *losses: float | None, state: int = 2**20) -> dict[str, Any]:
    """A line of a comparison as `sweep.summary` writes it."""
    known = None not in losses
    return {
        "label": label,
        "optimizer": {"lr": 1e-3},
        "losses": list(losses),
        "validation_loss": sum(losses) / len(losses) if known else None,
        "spread": max(losses) - min(losses) if known else None,
        "bytes": {"state": state, "weights": 2**22, "workspace": 2**10, "state_by_kind": {}},
        "step_s": 0.1,
    }


# Rows whose means and spreads are 2.00 (0.02), 1.90 (0.04), 1.97 (0.01), 1.5 (0.01), and two that have no spread.
ROWS = [row("A", 1.99, 2.01), row("B", 1.88, 1.92), row("C", 1.965, 1.975), row("F", 1.495, 1.505), row("D", 1.0, None)]
ROWS.append(row("E", 1.0))


@pytest.mark.parametrize(
    ("rules", "verdict"),
    [
        ({"below": ["F", "B", "C", "A"]}, "holds"),
        ({"below": ["A", "B"]}, "not at this scale"),
        ({"below": ["F", "A", "B"]}, "holds partly"),
        ({"below": ["C", "A"]}, "holds"),  # 0.03 with spreads of 0.02 and 0.01
        ({"at_most": ["A", "C"]}, "not at this scale"),  # 0.03 above
        ({"at_most": ["C", "A"]}, "holds"),
        ({"near": ["A", "C"]}, "holds"),  # 0.03 apart, twice the pooled spread is 0.0316
        ({"near": ["A", "B"]}, "not at this scale"),
        ({"between": ["C", "B", "A"]}, "holds"),
        ({"between": ["B", "C", "A"]}, "not at this scale"),
        ({"closes": ["B", "A", "F"]}, "not at this scale"),  # a fifth of the gap
        ({"closes": ["F", "A", "F"]}, "holds"),
        ({"closes": ["B", "A", "C"]}, "not at this scale"),  # no gap
        ({"below": ["F", "A"], "near": ["A", "F"]}, "holds partly"),
        ({"below": ["E", "A"]}, "no verdict"),  # one seed
        ({"below": ["F", "A"], "near": ["D", "F"]}, "no verdict"),  # diverged
        ({"below": ["G", "A"]}, "no verdict"),  # no such row: its package is missing
    ],
)
def test_verdicts_follow_their_rules(rules: dict[str, list[str]], verdict: str) -> None:
    (found,) = judge([Claim.model_validate({"text": "claim", **rules})], ROWS)
    assert found["verdict"] == verdict, found
    assert all(part["found"] for part in found["parts"])


WRONG = {
    "claims=[{text: x}]": "claims.0: a claim needs one of below, at_most, near, between, closes",
    "claims=[{text: x, near: [A]}]": "claims.0: near takes 2 labels, not 1",
    "claims=[{text: x, below: [A]}]": "claims.0: below takes 2 labels or more, not 1",
    "claims=[{text: x, closes: [A, B, A, B]}]": "claims.0: closes takes 3 labels, not 4",
    "claims=[{text: x, belaw: [A, B]}]": "unknown key 'claims.0.belaw'; did you mean 'below'?",
    "claims=[{text: x, below: [A, b]}]": "claims: no entry of compare is called 'b'",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_claims_are_refused_by_name(change: str, text: Path) -> None:
    with pytest.raises(UserError) as caught:
        toy(text, ENTRIES, change)
    assert WRONG[change] in str(caught.value)


def test_a_comparison_leaves_a_page(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table, verdicts, pictures, Markdown and JSON say the same, in wandb too; again from cache without a process."""
    claims = "claims=[{text: A beats B, below: [A, B]}]"
    recipe = toy(text, ENTRIES, claims, "seeds=[0, 1]")
    out = tmp_path / "all"
    result = compare(recipe, out, quiet=True, command="optimzoo compare toy.yaml")
    assert len(result["methods"]) == 2
    (claim,) = result["claims"]
    assert claim["verdict"] in ("holds", "not at this scale")
    assert json.loads((out / "comparison.json").read_text()) == result

    block = (out / "comparison.md").read_text()
    _, *lines = page.lines(result["methods"])
    assert block.splitlines()[2:4] == [f"| {' | '.join(cells)} |" for cells in lines]
    assert f"| A beats B | **{claim['verdict']}** | " in block
    assert "`optimzoo compare toy.yaml`: 2 seed(s)" in block
    assert result["corpus"]["sha256"][:12] in block
    assert imread(out / "pareto.png").std() > 0.05

    monkeypatch.setattr(sys.modules["optimzoo.training.compare"], "_work", None)  # from here on everything is cached
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logged: dict[str, Any] = {}
    real = Run.log
    monkeypatch.setattr(Run, "log", lambda run, row, **more: (logged.update(row), real(run, row, **more)))
    assert compare(toy(text, ENTRIES, claims, "seeds=[0, 1]", "wandb={mode: offline}"), out, quiet=True) == result
    assert logged["comparison/methods"].data == lines
    assert {"comparison/validation loss", "comparison/loss against bytes"} <= set(logged)
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))

    for path in out.glob("*/result.json"):  # what other code made is said
        path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "other"}))
    assert len(compare(recipe, out, quiet=True)["stale"]) == 4
    assert "4 of the runs were made by other code" in (out / "comparison.md").read_text()


def test_the_table_ranks_and_says_what_is_open() -> None:
    shown = [method["label"] for method in page.ranked(ROWS)]
    assert shown == ["E", "F", "B", "C", "A", "D"]
    headings, *lines = page.lines([row("D", 1.0, None), {**row("E", 1.0), "interior": False}, row("A", 1.0, 1.5)])
    assert headings[:4] == ["method", "best lr", "validation loss", "spread"]
    assert [line[:4] for line in lines] == [
        ["E", "0.001 (edge)", "1.000", "-"],
        ["A", "0.001", "1.250", "0.500"],
        ["D", "0.001", "diverged", "-"],
    ]
    graded = {**row("F", 1.0), "accuracies": [0.5, 0.75]}
    assert page.lines([graded])[0][4:5] == ["accuracy"]
    assert page.lines([graded])[1][4] == "0.625 (spread 0.250)"


# Four dots on each other, a crowd beside them and some with room: state in MiB and loss, as a leaderboard had them.
CROWD = [(1.7, 1.59), (1.69, 1.586), (1.73, 1.585), (1.73, 1.565), (2.0, 1.627), (2.23, 1.651), (2.45, 1.652)]
CROWD += [(2.46, 1.52), (3.75, 1.628), (6.54, 1.586), (0.51, 1.41), (1.73, 1.348), (4.83, 1.348), (3.5, 1.411)]
SPOT = [(1 + i / 16, 2 + i / 50) for i in range(8)]


@pytest.mark.parametrize("places", [CROWD, SPOT, SPOT[:2], [(1.0, 2.0)] * 24], ids=["crowd", "spot", "two", "one"])
def test_names_in_the_pareto_picture_are_beside_their_dots(places: list[tuple[float, float]], tmp_path: Path) -> None:
    """Or a line leads there. No name lies on another or on a dot; bytes of zero have a place; every dot looks its own.

    24 methods on one dot have no places of their own, but names still stand apart.
    """
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    rows = [row(f"method {i}", loss, loss + 0.01, state=int(2**20 * held)) for i, (held, loss) in enumerate(places)]
    nothing = [row("nothing", 3.0, 3.1, state=0)] if places is SPOT else []
    names, dots, looks = {}, {}, set()
    annotate, plot = Axes.annotate, Axes.plot

    def annotated(axes: Axes, name: str, *args: Any, **kwargs: Any) -> Any:
        names[name] = annotate(axes, name, *args, **kwargs)
        return names[name]

    def plotted(axes: Axes, *args: Any, **kwargs: Any) -> Any:
        if "marker" in kwargs:
            dots[len(dots)] = (axes, args)
            looks.add((kwargs["color"], kwargs["marker"]))
        return plot(axes, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "annotate", annotated)
        patch.setattr(Axes, "plot", plotted)
        page.draw_pareto([*rows, *nothing, row("gone", None)], tmp_path / "pareto.png")
    shown = [method["label"] for method in page.ranked([*rows, *nothing])]
    assert set(names) == set(shown)
    assert len(looks) == len(dots) == len(shown)
    spots = [axes.transData.transform(place) for axes, place in dots.values()]
    boxes = [Text.get_window_extent(names[label]) for label in shown]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for i, (label, box) in enumerate(zip(shown, boxes, strict=True)):
        assert not any(box.contains(*spot) for spot in spots)
        apart = [abs(spot - spot.clip(box.min, box.max)).max() for spot in spots]
        assert names[label].arrow_patch or apart[i] == min(apart), label
    assert imread(tmp_path / "pareto.png").std() > 0.05


def test_names_are_dark_enough_to_read() -> None:
    from matplotlib.colors import to_rgb

    assert len(set(report.styles(24))) == 24
    assert report.ink("#000000") == (0, 0, 0)
    assert sum(report.ink("#F0E442")) < 0.55 * sum(to_rgb("#F0E442"))


def test_a_kind_of_memory_looks_the_same_in_every_picture(tmp_path: Path) -> None:
    """Whatever is drawn beside it; and no bar reaches the frame."""
    from matplotlib.axes import Axes

    def drawn(*methods: dict[str, int]) -> dict[str, tuple]:
        looks: dict[str, tuple] = {}
        barh = Axes.barh

        def bar(axes: Axes, line: int, width: float, height: float, left: float, **kwargs: Any) -> Any:
            if kwargs["label"]:
                looks[kwargs["label"]] = (kwargs["color"], kwargs["hatch"])
            made = barh(axes, line, width, height, left, **kwargs)
            ends.append((axes, left + width))
            return made

        ends: list[tuple[Axes, float]] = []
        rows = [row(str(i), 1.0) for i in range(len(methods))]
        for one, kinds in zip(rows, methods, strict=True):
            one["bytes"] |= {"state_by_kind": kinds, "state": sum(kinds.values()), "workspace": 4}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Axes, "barh", bar)
            report.draw_memory(rows, tmp_path / "memory.png")
        axes = ends[0][0]
        assert axes.get_xlim()[1] > 1.1 * max(end for _, end in ends)
        assert axes.get_ylim()[0] > len(methods) - 0.6
        return looks

    cosmos = {"first moment": 2**20, "basis": 2**19, "gram": 2**18, "second moment": 2**20}
    adamw = {"first moment": 2**20, "second moment": 2**20}
    alone, beside = drawn(cosmos), drawn(adamw, cosmos, {"scale": 2**20, "age": 2**19})
    assert alone.items() <= beside.items()
    assert len(set(beside.values())) == len(beside)


@pytest.mark.parametrize("ours", [True, False])
def test_log_memory_joins_the_rows_of_a_users_own_loop(ours: bool, tmp_path: Path) -> None:
    """With a real wandb run: bytes and the user's own numbers are one row a step."""
    model = torch.nn.Linear(8, 4)
    opt = optimzoo.AdamW(model, lr=1e-2) if ours else torch.optim.AdamW(model.parameters(), lr=1e-2)
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True, console="off")) as run:
        rows: list[dict[str, Any]] = []  # what the user and `log_memory` send, one after the other
        save = run._partial_history_callback
        run._partial_history_callback = lambda data, step, commit: (
            rows.append({**data, "commit": commit}),
            save(data, step, commit),
        )
        history = optimzoo.log_memory(opt, run, workspace=True)
        for step in range(3):
            opt.zero_grad()
            model(torch.ones(2, 8)).sum().backward()
            opt.step()
            run.log({"loss": float(step)})
        history.remove()
        opt.step()
    sent = [r for r in rows if "memory/state_bytes" in r]
    held = opt.memory().total if ours else optimzoo.ledger(opt).total
    assert [r["memory/state_bytes"] for r in sent] == [held] * 3
    assert all(r["memory/workspace_bytes"] >= 0 for r in sent)
    assert [r["commit"] is False for r in rows] == [True, False] * 3  # ours wait for the row of the user
