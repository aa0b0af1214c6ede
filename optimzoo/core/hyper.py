"""Options declared once: default, bounds and meaning. Constructors, their checks and their help are made from this."""

import collections
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What may be added to a divisor: where a gradient is zero, less than float32's smallest normal number is 0 / 0.
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Hyper:
    """One option of an optimizer. `parse` turns what a user or a recipe may write into what is stored."""

    default: Any
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    one_of: tuple = ()
    doc: str = ""
    parse: Callable[[Any], Any] | None = None

    @property
    def bounds(self) -> str:
        """The allowed values in words, empty when everything of the right type is allowed."""
        if self.one_of:
            return "one of " + ", ".join(repr(v) for v in self.one_of)
        signs = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)

    def check(self, owner: str, name: str, value: Any) -> Any:
        """The value as it is stored; ValueError or TypeError names the option and what it may be."""
        if self.parse is not None:
            value = self.parse(value)
        if value is None and self.default is None:
            return value
        if isinstance(value, np.generic):
            value = value.item()
        if self.one_of:
            if not any(
                value is allowed or (isinstance(value, type(allowed)) and value == allowed) for allowed in self.one_of
            ):
                raise ValueError(f"{owner}: {name}={shown(value)} is not known; it must be {self.bounds}")
            return value
        if isinstance(self.default, tuple) and isinstance(self.default[0], float):
            return self._check_tuple(owner, name, value)
        if isinstance(self.default, bool | int | float) or self.bounds:
            self._check_number(owner, name, value)
        return value

    def _check_tuple(self, owner: str, name: str, value: Any) -> tuple:
        if not isinstance(value, list | tuple) or len(value) != len(self.default):
            raise TypeError(
                f"{owner}: {name}={shown(value)} must be {len(self.default)} numbers, such as {self.default}"
            )
        for item in value:
            self._check_number(owner, name, item)
        return tuple(value)

    def _check_number(self, owner: str, name: str, value: Any) -> None:
        example = self.default[0] if isinstance(self.default, tuple) else self.default
        if isinstance(example, bool):
            if not isinstance(value, bool):
                raise TypeError(f"{owner}: {name}={shown(value)} must be True or False")
            return
        if isinstance(value, Tensor) and value.numel() == 1 and isinstance(example, float):
            if type(value) is not Tensor or value.device.type != "cpu":
                return  # a learning rate that lives on the device: reading it here would synchronise
            value = value.item()
        kinds = (int,) if isinstance(example, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            word = "an integer" if kinds == (int,) else "a number"
            raise TypeError(f"{owner}: {name}={shown(value)} must be {word}, not {type(value).__name__}")
        inside = (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )
        if not inside:
            raise ValueError(f"{owner}: {name}={shown(value)} is out of range; it must be {self.bounds or 'finite'}")


def hyper(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    one_of: Iterable = (),
    doc: str = "",
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """Declare an option in a class body: `rank: int = hyper(64, ge=1, doc="columns of the basis")`."""
    return Hyper(default, ge, gt, le, lt, tuple(one_of), doc, parse)


def shown(value: Any) -> str:
    """A value as it stands in a sentence: on one line, and short."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not write out a whole number of more than 4300 digits
        text = f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean ...?' when a known name is close, else ': known are ...'."""
    names = sorted(known)
    name = str(name)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"


def dtype_name(value: Any) -> Any:
    """`torch.bfloat16` -> "bfloat16": options are names and numbers, so that `weights_only` loads them."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def hashable(value: Any) -> Any:
    """A list as a tuple: groups are the user's to edit, and a file has lists where options are tuples."""
    return tuple(value) if isinstance(value, list) else value


def options_of(cls: type) -> dict[str, Hyper]:
    """All options of a class, its bases' first; takes the declarations off the class.

    `optimizer.rank` would otherwise look like a value, while values live in the groups.
    """
    own = {name: value for name, value in vars(cls).items() if isinstance(value, Hyper)}
    for name in own:
        delattr(cls, name)
    inherited: dict[str, Hyper] = {}
    for base in reversed(cls.__mro__[1:]):
        inherited |= getattr(base, "options", {})
    return inherited | own


def options_type(name: str, options: dict[str, Hyper]) -> Any:
    """The named tuple in which a rule gets its options: all but `lr`, which moves at every step."""
    return collections.namedtuple(name, [option for option in options if option != "lr"])


def signature(options: dict[str, Hyper]) -> inspect.Signature:
    """The constructor that the options make: (params, lr=..., *, ...)."""
    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    rest = [inspect.Parameter(n, keyword, default=o.default) for n, o in options.items() if n != "lr"]
    lr = inspect.Parameter("lr", positional, default=options["lr"].default)
    return inspect.Signature([inspect.Parameter("params", positional), lr, *rest])
