"""Name -> optimizer class, found by reading `optimizers/`: a new file there is all that a new method needs."""

import functools
import importlib
import pkgutil
from collections.abc import Collection

from optimzoo import optimizers as package
from optimzoo.core import AdamW, ZooOptimizer
from optimzoo.core.hyper import nearest


@functools.cache
def optimizers() -> dict[str, type[ZooOptimizer]]:
    """Lower-case name -> class, in alphabetical order. A file holds the class of its own name."""
    found: dict[str, type[ZooOptimizer]] = {"adamw": AdamW}
    for module in pkgutil.iter_modules(package.__path__):
        for name, value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).items():
            if name.lower() == module.name and isinstance(value, type) and issubclass(value, ZooOptimizer):
                found[module.name] = value
    return dict(sorted(found.items()))


def optimizer(name: str) -> type[ZooOptimizer]:
    """The class of that name; ValueError names the nearest one."""
    return optimizers()[named(name, optimizers())]


def named(name: str, known: Collection[str]) -> str:
    """The known name that this is, SWAN as well as swan; ValueError names the nearest one."""
    if name.lower() not in known:
        raise ValueError(f"no optimizer is called {name!r}{nearest(name.lower(), known)}")
    return name.lower()
