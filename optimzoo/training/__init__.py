"""A recipe becomes a run: `load` reads one, `train` runs one, `compare` runs several and puts them on one page."""

from importlib.util import find_spec

from optimzoo.training.errors import MISSING_EXTRA

if missing := [name for name in ("pydantic", "yaml", "transformers", "rich", "matplotlib") if find_spec(name) is None]:
    raise ImportError(MISSING_EXTRA.format(what="optimzoo.training", missing=", ".join(missing)))

from optimzoo.training import page, planning, report
from optimzoo.training.compare import compare
from optimzoo.training.errors import UserError
from optimzoo.training.recipe import Recipe, load
from optimzoo.training.trainer import train

__all__ = ["Recipe", "UserError", "compare", "load", "page", "planning", "report", "train"]
