"""Bytes that a forward pass keeps for backward: which module and operation holds them, and what else does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from optimzoo.memory.reach import storage_parts


class Holder(NamedTuple):
    """One reason why a tensor is alive: the operation `op`, called in `module`, wants it in backward."""

    module: str
    op: str

    def __str__(self) -> str:
        return f"{self.module or '(model)'} ({self.op})" if self.op else self.module or "(model)"


class Activation(NamedTuple):
    """One storage that is kept for backward; `holders` in the order in which they took hold."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    holders: tuple[Holder, ...]


class Freed(NamedTuple):
    """Bytes that go when a module keeps nothing, and who else holds what it would have freed."""

    nbytes: int
    held_by: tuple[str, ...]


class Saved(NamedTuple):
    """What one forward pass keeps for backward."""

    entries: tuple[Activation, ...]

    @property
    def total(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def by_module(self) -> dict[str, int]:
        """Bytes by the module that holds them first; each storage counts once."""
        found: dict[str, int] = {}
        for entry in self.entries:
            name = entry.holders[0].module
            found[name] = found.get(name, 0) + entry.nbytes
        return found

    def freed_without(self, names: Sequence[str]) -> dict[str, Freed]:
        """What goes if these modules all kept nothing, so whether sampling their inputs can pay.

        An input that several of them hold counts for the first; an input that another operation keeps (a norm or an
        activation that saved its output) stays, and `held_by` tells who it is.
        """
        result: dict[str, Freed] = {}
        counted: set[int] = set()
        for name in names:
            nbytes, others = 0, []
            for i, entry in enumerate(self.entries):
                if all(holder.module != name for holder in entry.holders):
                    continue
                outside = [str(holder) for holder in entry.holders if holder.module not in names]
                others += outside
                nbytes += 0 if outside or i in counted else entry.nbytes
                counted.add(i)
            result[name] = Freed(nbytes, tuple(dict.fromkeys(others)))
        return result

    def table(self) -> str:
        """The storages, largest first, with everyone who holds them."""
        lines = [f"{'MiB':>9}  {'shape':<22} {'dtype':<9} held by"]
        for entry in sorted(self.entries, key=lambda entry: -entry.nbytes):
            shape, dtype = "x".join(map(str, entry.shape)), str(entry.dtype).removeprefix("torch.")
            lines.append(f"{entry.nbytes / 2**20:9.3f}  {shape:<22} {dtype:<9} {', '.join(map(str, entry.holders))}")
        return "\n".join([*lines, f"{self.total / 2**20:9.3f}  in total"])


class _Packed:
    """What autograd is given to keep instead of the bare tensor, so that it can be asked who it is."""

    __slots__ = ("__weakref__", "module", "ops", "tensor")

    def __init__(self, tensor: Tensor, module: str) -> None:
        self.tensor, self.module, self.ops = tensor, module, dict[str, None]()


def saved(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Any] | None = None) -> Saved:
    """Run one forward pass and tell what it keeps for backward.

    The pass is `loss(model, batch)`, or without a loss `model(**batch)`, `model(*batch)` or `model(batch)`. Counted
    are whole storages, once each, as a view keeps its base; parameters and buffers of the model are left out. Works on
    fake tensors. Of a checkpointed block only the inputs are kept; a compiled graph is one operation.
    """
    stack, packed = [""], list[ref[_Packed]]()
    current_op = [""]

    def pack(tensor: Tensor) -> _Packed:
        item = _Packed(tensor.detach(), stack[-1])  # an output knows its node, and the two would keep each other alive
        packed.append(ref(item))
        return item

    def unpack(item: _Packed) -> Tensor:
        if current_op[0]:
            item.ops[current_op[0]] = None
        return item.tensor

    def leave(*_: Any) -> None:
        stack.pop()

    hooks: list[RemovableHandle] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            output = (loss or call)(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for node in _nodes(output):
        current_op[0] = node.name().removesuffix("0").removesuffix("Backward")
        _touch(node)
    return _collect([item for item in (r() for r in packed) if item is not None], model)


def call(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)`, `model(*batch)` or `model(batch)`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _nodes(output: Any) -> Iterator[Node]:
    """Every node of the graph behind the tensors in `output`."""
    waiting = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _touch(node: Node) -> None:
    """Read what the node saved, so that `unpack` learns the operation: a node does not say it when it saves."""
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            getattr(node, name)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _collect(items: list[_Packed], model: nn.Module) -> Saved:
    own = {_storage(part) for t in (*model.parameters(), *model.buffers()) for part in storage_parts(t)}
    groups: dict[int, list[tuple[Tensor, _Packed]]] = {}
    for item in items:
        for part in storage_parts(item.tensor):
            if _storage(part) not in own:
                groups.setdefault(_storage(part), []).append((part, item))
    entries = []
    for same in groups.values():
        first = same[0][0]
        holders = dict.fromkeys(Holder(item.module, op) for _, item in same for op in item.ops or ("",))
        nbytes = first.untyped_storage().nbytes()
        entries.append(Activation(tuple(first.shape), first.dtype, nbytes, tuple(holders)))
    return Saved(tuple(entries))
