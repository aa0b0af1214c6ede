"""Persistent bytes: every tensor that an optimizer or a module keeps alive, counted by storage.

A tensor's own size says little: a view keeps its whole base alive, a quantised tensor reports the dtype that it
imitates, a sharded one the size of all ranks together, and a projector may sit in an object that no state dict shows.
So everything reachable is walked and each storage is counted once, with the bytes that it holds on this rank.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from optimzoo.memory.reach import LEAVES, Path, attributes_of, is_weight, storage_parts, walk

KINDS = (
    "first moment",
    "second moment",
    "basis",
    "projector",
    "gram",
    "accumulator",
    "history",
    "index",
    "counter",
    "age",
    "candidates",
    "scale",
    "codes",
    "residual",
    "option",
    "parameter",
    "buffer",
    "gradient",
    "other",
)

# Names under which other people's optimizers keep their state.
_KNOWN = {
    "first moment": "exp_avg momentum momentum_buffer grad_avg state1",
    "second moment": "exp_avg_sq max_exp_avg_sq exp_inf square_avg acc_delta row_var col_var variance "
    "exp_avg_sq_row exp_avg_sq_col second_momentum_buffer state2",
    "accumulator": "sum grad_sum grad_sq_sum ax",
    "basis": "Q Q_L Q_R U V",
    "projector": "projector ortho_matrix",
    "gram": "GG gram L R preconditioner",
    "history": "prev prev_flat_grad old_dirs old_stps ro al d prev_loss H_diag",
    "counter": "step steps mu_product skips lost",
    "index": "index indices",
    "scale": "scale scales absmax absmax1 absmax2",
    "codes": "codes",
    "residual": "residual error compensation",
    "option": "lr initial_lr betas eps weight_decay eta mu",
}
_KIND_OF = {name: kind for kind, names in _KNOWN.items() for name in names.split()}


@dataclass(frozen=True)
class Entry:
    """One storage: who keeps it (`param`, `group`, `key`), as what, its bytes and how many of those tensors fill."""

    param: str
    group: str
    key: str
    kind: str
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    used: int


_FIELDS = tuple(f.name for f in fields(Entry) if f.name not in ("nbytes", "used"))


@dataclass(frozen=True)
class Ledger:
    """Bytes held on this rank, one entry a storage; what the allocator adds by rounding up is not in it."""

    entries: tuple[Entry, ...]

    @property
    def total(self) -> int:
        """Bytes of all storages."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def slack(self) -> int:
        """Bytes held that no tensor found here fills: what is left of a base when only a view of it is kept."""
        return sum(entry.nbytes - entry.used for entry in self.entries)

    def by(self, *names: str) -> dict[Any, int]:
        """Value -> bytes for one field of `Entry`, tuple of values -> bytes for several."""
        if not names:
            raise ValueError(f"name at least one field to sum by: {', '.join(_FIELDS)}")
        for name in names:
            if name not in _FIELDS:
                near = difflib.get_close_matches(name, _FIELDS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_FIELDS)}"
                raise ValueError(f"entries of a ledger have no field {name!r} to sum by; {hint}")
        sums: dict[Any, int] = {}
        for entry in self.entries:
            values = tuple(getattr(entry, name) for name in names)
            value = values if len(names) > 1 else values[0]
            sums[value] = sums.get(value, 0) + entry.nbytes
        return sums

    def table(self, *names: str) -> str:
        """The bytes by these fields, largest first, as aligned text."""
        sums = sorted(self.by(*names).items(), key=lambda item: -item[1])
        rows = [list(names)] + [[_text(v) for v in (value if len(names) > 1 else (value,))] for value, _ in sums]
        sizes = ["bytes"] + [human(size) for _, size in sums]
        for name, size in (("total", self.total), ("slack", self.slack)):
            if name == "total" or size:
                rows.append([name] + [""] * (len(names) - 1))
                sizes.append(human(size))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        right = max(map(len, sizes))
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + f"  {size:>{right}}"
            for row, size in zip(rows, sizes, strict=True)
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table("kind")


def human(nbytes: int) -> str:
    """Bytes as text with a binary unit: 1536 -> "1.50 KiB"."""
    power = min(4, max(0, (abs(nbytes).bit_length() - 1) // 10))
    return f"{nbytes} B" if power == 0 else f"{nbytes / 1024**power:.2f} {'KMGT'[power - 1]}iB"


def _text(value: object) -> str:
    return str(value).removeprefix("torch.")


def ledger(
    of: torch.optim.Optimizer | nn.Module,
    names: Mapping[Tensor, str] | None = None,
    kinds: Mapping[tuple[Tensor, str], str] | None = None,
) -> Ledger:
    """Every byte that an optimizer keeps alive beside weights and gradients, or that a module does with both.

    `names`: parameter -> name, where the groups carry no `param_names`; `kinds`: (parameter, state key) -> one of
    `KINDS`. An optimizer's tensors outside its state have param "-" and their attribute path as key. A storage that
    several tensors share is counted once, for the first of them.
    """
    own = getattr(of, "memory", None)
    if kinds is None and hasattr(of, "memory_history") and callable(own):
        return own()  # one of ours: it knows what its tensors are
    if isinstance(of, torch.optim.Optimizer):
        return _of_optimizer(of, names or {}, kinds or {})
    if isinstance(of, nn.Module):
        return _of_module(of)
    raise TypeError(f"ledger() takes an optimizer or a module, not {type(of).__name__}; plain_tensors() takes anything")


class _Book:
    """Storages met so far, by identity, each with the entry that owns it and the layouts that tensors have in it."""

    def __init__(self) -> None:
        self.left_out: set[int] = set()
        self.owners: dict[int, tuple[tuple[str, str, str, str], Tensor]] = {}
        self.layouts: dict[int, dict[Any, int]] = {}

    def leave_out(self, t: Tensor | None) -> None:
        if t is not None:
            self.left_out.update(part.untyped_storage()._cdata for part in storage_parts(t))

    def add(self, t: Tensor, *owner: str) -> None:
        storage = t.untyped_storage()._cdata
        if storage in self.left_out:
            return
        self.owners.setdefault(storage, (owner, t))  # type: ignore[arg-type]  # four strings
        own = t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
        layout = (t.storage_offset(), t.shape, t.stride(), t.dtype)
        self.layouts.setdefault(storage, {})[layout] = own if t.numel() else 0

    def close(self) -> Ledger:
        entries = []
        for storage, (owner, t) in self.owners.items():
            held = int(t.untyped_storage().nbytes())
            used = min(held, sum(self.layouts[storage].values()))
            entries.append(Entry(*owner, t.dtype, t.device, held, used))
        return Ledger(tuple(entries))


def _of_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], kinds: Mapping[tuple[Tensor, str], str]
) -> Ledger:
    book, places = _Book(), {}
    attributes: dict[str, Any] = dict(attributes_of(optimizer))
    for g, group in enumerate(attributes.get("param_groups", ())):
        given = group.get("param_names", ())
        for i, p in enumerate(group["params"]):
            name = names[p] if p in names else given[i] if i < len(given) else f"{g}.{i}"
            places[id(p)] = (name, str(group.get("name", g)))
            book.leave_out(p)
            book.leave_out(p.grad if p.is_leaf else None)
    seen: dict[int, object] = {}
    for owner, slots in attributes.get("state", {}).items():
        is_tensor = issubclass(type(owner), Tensor)
        param, place = places.get(id(owner), ("-" if is_tensor else str(owner), "-"))
        for key, value in slots.items() if issubclass(type(slots), dict) else [("state", slots)]:
            for path, t in walk(value, (str(key),), seen, weights=False):
                kind = kinds.get((owner, key)) if is_tensor else None
                book.add(t, param, place, ".".join(path), kind or _kind(path))
    for path, t in walk(optimizer, (), seen, weights=False):
        book.add(t, "-", "-", ".".join(path), _kind(path))
    return book.close()


def _kind(path: Path) -> str:
    """The kind that the first known name in a path stands for."""
    for name in path:
        name = name.lstrip("_")
        kind = "scale" if name.endswith("_scale") else _KIND_OF.get(name)
        if kind:
            return kind
    return "other"


def _of_module(module: nn.Module) -> Ledger:
    """Parameters, buffers, gradients, then tensors that modules keep as plain attributes."""
    book, seen = _Book(), {}  # type: _Book, dict[int, object]
    bare = set(vars(nn.Module()))
    owned = {"parameter": module.named_parameters(), "buffer": module.named_buffers()}
    found = [(kind, name, t) for kind, pairs in owned.items() for name, t in pairs]
    found += [("gradient", name, t.grad) for _, name, t in found if t.is_leaf and t.grad is not None]
    for kind, name, t in found:
        seen[id(t)] = t
        for part in storage_parts(t):
            book.add(part, name, "-", kind, kind)
    for prefix, layer in module.named_modules():
        for attribute, value in attributes_of(layer):
            # Attributes of every bare module are its registries, just read, and its hooks, which are somebody else's.
            if attribute not in bare and not issubclass(type(value), LEAVES) and not is_weight(value):
                for path, t in walk(value, (attribute,), seen, weights=False):
                    book.add(t, prefix or "-", "-", ".".join(path), "other")
    return book.close()
