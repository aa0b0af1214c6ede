"""Fair comparisons: where the best learning rate lies, and how much seeds differ there.

A search is a generator: it yields lists of single runs and is sent the list of their results, so that several searches
can share a few processes.
"""

import math
from collections.abc import Generator, Sequence
from typing import Any

from optimzoo.training.errors import UserError
from optimzoo.training.parsing import flat
from optimzoo.training.recipe import Recipe
from optimzoo.training.sections import Sweep

Result = dict[str, Any]
Search = Generator[list[Recipe], list[Result], dict[str, Any]]


def search(recipe: Recipe, sweep: Sweep | None, seeds: Sequence[int]) -> Search:
    """The runs of one method: all seeds, with a sweep only where the first seed found the best value."""
    return over_seeds(recipe, seeds) if sweep is None else protocol(recipe, sweep, seeds)


def over_seeds(recipe: Recipe, seeds: Sequence[int]) -> Search:
    """Every seed once."""
    runs = [recipe.replace({"seed": seed}) for seed in seeds]
    return {"results": (yield runs), "runs": runs}


def protocol(recipe: Recipe, sweep: Sweep, seeds: Sequence[int]) -> Search:
    """With one seed go on by factors in the better direction until the best value is interior; then the other seeds.

    A sweep with `values` tries these alone, and says whether the best of them is interior.
    """
    first, *others = seeds
    start = number(recipe, sweep.key)
    tried: dict[float, tuple[Recipe, Result]] = {}
    wanted = sweep.values or tuple(rounded(start * sweep.factor**power) for power in (-1, 0, 1))
    while wanted:
        runs = [recipe.replace({sweep.key: value, "seed": first}) for value in wanted]
        tried |= zip(wanted, zip(runs, (yield runs), strict=True), strict=True)
        best = min(tried, key=lambda value: (loss(tried[value][1]), value))
        wanted = () if sweep.values or len(tried) >= sweep.limit else beyond(best, tried, sweep.factor)
    run, result = tried[best]
    more = [run.replace({"seed": seed}) for seed in others]
    return {
        "results": [result, *((yield more) if more else [])],
        "runs": [run, *more],
        "key": sweep.key,
        "best": best,
        "interior": not beyond(best, tried, sweep.factor),
        "tried": [[value, tried[value][1]["validation_loss"]] for value in sorted(tried)],
    }


def beyond(best: float, tried: dict[float, Any], factor: float) -> tuple[float, ...]:
    """The next value outwards when the best one lies on the edge of what was tried, none when it is interior."""
    above = (rounded(best * factor),) if best == max(tried) else ()
    below = (rounded(best / factor),) if best == min(tried) else ()
    return below + above


def number(recipe: Recipe, key: str) -> float:
    value = flat(recipe.run()).get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"sweep: {key}={value!r} is no number of the recipe; name one such as optimizer.lr")
    return value


def rounded(value: float) -> float:
    """Ten digits, so that going up and down again by a factor comes back to the same value."""
    return float(f"{value:.10g}")


def loss(result: Result) -> float:
    """The validation loss; a run that diverged counts as infinite."""
    return math.inf if result["validation_loss"] is None else result["validation_loss"]


def summary(label: str, found: dict[str, Any]) -> dict[str, Any]:
    """One line of the comparison: the mean over seeds and its spread (largest minus smallest)."""
    results = found.pop("results")
    runs = found.pop("runs")
    losses = [loss(result) for result in results]
    known = all(map(math.isfinite, losses))
    return {
        "label": label,
        "optimizer": runs[0].run()["optimizer"],
        "validation_loss": sum(losses) / len(losses) if known else None,
        "spread": max(losses) - min(losses) if known else None,
        "losses": [result["validation_loss"] for result in results],
        "accuracies": [result["validation_accuracy"] for result in results],
        "seeds": [run.seed for run in runs],
        **found,
        "bytes": results[0]["bytes"],
        "step_s": lowest(results, "step_s"),
        "optimizer_s": lowest(results, "optimizer_s"),
    }


def lowest(results: Sequence[Result], key: str) -> float | None:
    """The quickest run's median: others were slowed down by whatever else the machine did."""
    return min((result[key] for result in results if result[key] is not None), default=None)
