"""What papers claim, judged by the numbers of a comparison: by rule, and not without seeds and their spread.

The spread of a method is its largest loss minus its smallest over the seeds at its best learning rate.

    below [A, B, ...]   each mean lies below the next by more than the larger of their spreads
    at_most [A, B]      A's mean does not lie above B's by more than that
    near [A, B]         the means differ by at most twice the pooled spread (the spreads' root mean square)
    between [A, B, C]   A's mean lies above B's and below C's
    closes [A, B, C]    B's mean lies above C's by at least three spreads, and A's closes half of that gap or more
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from optimzoo.training.sections import Claim

Method = Mapping[str, Any]
HOLDS, PARTLY, NOT, OPEN = "holds", "holds partly", "not at this scale", "no verdict"


def judge(claims: Sequence[Claim], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Every claim with its verdict, and for each of its parts what was found."""
    known = {method["label"]: method for method in methods}
    return [_verdict(claim, known) for claim in claims]


def _verdict(claim: Claim, known: Mapping[str, Method]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for rule, names in claim.rules():
        if why := next((text for name in names if (text := _unfit(name, known))), None):
            parts.append({"rule": rule, "methods": list(names), "holds": None, "found": why})
            continue
        groups = pairwise(names) if rule == "below" else (names,)
        for group in groups:
            holds, found = RULES[rule](*(known[name] for name in group))
            parts.append({"rule": rule, "methods": list(group), "holds": holds, "found": found})
    answers = [part["holds"] for part in parts]
    judged = HOLDS if all(answers) else PARTLY if any(answers) else NOT
    verdict = OPEN if None in answers else judged
    return {"text": claim.text, "verdict": verdict, "parts": parts}


def _unfit(name: str, known: Mapping[str, Method]) -> str | None:
    """Why a method cannot be judged by."""
    if name not in known:
        return f"there is no row {name}"
    if known[name]["validation_loss"] is None:
        return f"{name} diverged"
    return f"{name} has one seed and no spread" if len(known[name]["losses"]) < 2 else None


def _above(a: Method, b: Method) -> tuple[float, float]:
    """(how far a's mean lies above b's, the larger of their spreads)."""
    return a["validation_loss"] - b["validation_loss"], max(a["spread"], b["spread"])


def _below(a: Method, b: Method) -> tuple[bool, str]:
    gain, spread = _above(b, a)
    return gain > spread, f"{b['label']} - {a['label']} = {gain:.3f}, spread {spread:.3f}"


def _at_most(a: Method, b: Method) -> tuple[bool, str]:
    loss, spread = _above(a, b)
    return loss <= spread, f"{a['label']} - {b['label']} = {loss:.3f}, spread {spread:.3f}"


def _near(a: Method, b: Method) -> tuple[bool, str]:
    difference, pooled = abs(_above(a, b)[0]), math.hypot(a["spread"], b["spread"]) / math.sqrt(2)
    return difference <= 2 * pooled, f"|{a['label']} - {b['label']}| = {difference:.3f}, pooled spread {pooled:.3f}"


def _between(a: Method, b: Method, c: Method) -> tuple[bool, str]:
    under, over = _above(a, b)[0], _above(c, a)[0]
    found = f"{a['label']} - {b['label']} = {under:.3f}, {c['label']} - {a['label']} = {over:.3f}"
    return under > 0 and over > 0, found


def _closes(a: Method, b: Method, c: Method) -> tuple[bool, str]:
    gap, spread = _above(b, c)
    spread = max(spread, a["spread"])
    if gap < 3 * spread:
        return False, f"no gap to close: {b['label']} - {c['label']} = {gap:.3f}, spread {spread:.3f}"
    share = _above(b, a)[0] / gap
    return share >= 0.5, f"{share:.0%} of {b['label']} - {c['label']} = {gap:.3f}, spread {spread:.3f}"


RULES: dict[str, Callable[..., tuple[bool, str]]] = {
    "below": _below,
    "at_most": _at_most,
    "near": _near,
    "between": _between,
    "closes": _closes,
}
