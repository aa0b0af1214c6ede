"""Where a run of several lives: a folder that is readable, and another one when anything that decides it is."""

import hashlib
import json
import re
from pathlib import Path

from optimzoo.training.folder import versions
from optimzoo.training.recipe import Recipe
from optimzoo.training.tasks import task_of

_CORPORA: dict[str, str] = {}


def place(out: Path, label: str, run: Recipe) -> Path:
    """The folder of one run, named by a hash of recipe, corpora and versions."""
    corpora = [_corpus_hash(one) for one in (run, run.preparation()) if one]
    facts = [run.key, *corpora, *(versions()[name] for name in ("torch", "optimzoo"))]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    words = re.sub(r"[^a-z0-9.]+", "-", f"{label} lr {run.optimizer.lr:g} seed {run.seed}".lower())
    return out / f"{words.strip('-')}-{digest}"


def _corpus_hash(run: Recipe) -> str:
    data = json.dumps(run.run()["data"])
    if data not in _CORPORA:
        _CORPORA[data] = task_of(run).data(run).facts["sha256"]
    return _CORPORA[data]
