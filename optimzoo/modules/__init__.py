"""Replacements for `nn.Linear`, found by reading this folder: a new kind is a new file."""

import importlib
import pkgutil
import re
from functools import cache

from optimzoo.modules.norm_cache import NormCache
from optimzoo.modules.replacement import Replacement, convert, merge, unmerge

__all__ = ["NormCache", "Replacement", "convert", "kinds", "merge", "unmerge"]


@cache
def kinds() -> dict[str, type[Replacement]]:
    """Every replacement by its short name: `SparseDeltaLinear` is `sparse_delta`."""
    found: dict[str, type[Replacement]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, Replacement) and item.__module__ == module.__name__:
                found[re.sub(r"(?<!^)(?=[A-Z])", "_", item.__name__.removesuffix("Linear")).lower()] = item
    found.pop("replacement")
    return dict(sorted(found.items()))
