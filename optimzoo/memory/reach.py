"""Every tensor that an object keeps alive, however it hides it."""

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class Opaque:
    """Base of objects that hold numbers only: the walk does not enter them."""

    __slots__ = ()


LEAVES = (
    *(str, bytes, bytearray, int, float, complex, bool, type(None), range, slice, type, torch.dtype, torch.device),
    *(types.ModuleType, types.CodeType, types.FrameType, types.TracebackType),
    *(types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType),
    *(weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType, TorchDispatchMode, Opaque),
)
Path = tuple[str, ...]


def plain_tensors(x: object) -> Iterator[Tensor]:
    """Every ordinary tensor reachable from x, once: in containers, attributes, slots, closures, wrapper subclasses.

    Weak references, classes, modules of code, frames and generators are not followed, and no property is called.
    """
    return (t for _, t in walk(x, (), {}, weights=True))


def storage_parts(t: Tensor) -> Iterator[Tensor]:
    """The strided tensors that hold t's elements on this rank: a DTensor's shard, codes with scales, sparse values."""
    if is_traceable_wrapper_subclass(t):
        for name in t.__tensor_flatten__()[0]:
            part = getattr(t, name)
            if isinstance(part, Tensor):  # a DTensor names its mesh as well
                yield from storage_parts(part)
    elif t.layout is torch.sparse_coo:
        yield from (t._indices(), t._values())
    elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (t.crow_indices(), t.col_indices(), t.values())
    elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (t.ccol_indices(), t.row_indices(), t.values())
    elif t.layout is torch.strided and not is_lazy(t):
        yield t


def walk(root: object, path: Path, seen: dict[int, object], *, weights: bool) -> Iterator[tuple[Path, Tensor]]:
    """(path, tensor) in the order of the attributes; `weights=False` stops at modules and parameters below the root.

    A stack instead of recursion: linked states may be deeper than Python's limit. `seen` keeps what it has met alive,
    so that no address is used twice.
    """
    stack = [(path, root)]
    while stack:
        path, x = stack.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        if issubclass(type(x), Tensor):
            yield from ((path, part) for part in storage_parts(x))  # type: ignore[arg-type]  # isinstance may lie: proxies
        below = [
            ((*path, name) if name else path, child)
            for name, child in _children(x)
            if not issubclass(type(child), LEAVES) and (weights or not is_weight(child))
        ]
        stack.extend(reversed(below))


def is_weight(x: object) -> bool:
    if issubclass(type(x), Tensor):
        return isinstance(x, nn.Parameter)  # asks the tensor: a sharded parameter is one without being of that class
    return issubclass(type(x), nn.Module)


def _children(x: object) -> Iterator[tuple[str, object]]:
    """(name, object) of what x refers to; by type(x) and raw attributes: isinstance and properties run x's code."""
    kind = type(x)
    if issubclass(kind, types.FunctionType):
        yield from _of_function(x)  # type: ignore[arg-type]  # narrowed by its type, not by isinstance
    elif issubclass(kind, types.MethodType | types.BuiltinMethodType):
        yield from (("", getattr(x, name, None)) for name in ("__self__", "__func__"))
    elif issubclass(kind, functools.partial):
        yield from (("", getattr(x, name)) for name in ("func", "args", "keywords"))
    elif issubclass(kind, dict | types.MappingProxyType):
        for key, value in list(dict.items(x) if issubclass(kind, dict) else x.items()):  # type: ignore[arg-type,attr-defined]
            yield "", key
            yield str(key) if issubclass(type(key), str | int) else "*", value
    elif issubclass(kind, list | tuple | set | frozenset | deque):
        yield from ((str(index), child) for index, child in enumerate(list(x)))  # type: ignore[call-overload]
    if not issubclass(kind, FakeTensor) and not (issubclass(kind, Tensor) and is_traceable_wrapper_subclass(x)):
        # A fake tensor's attributes lead to its mode and from there to everybody's; a wrapper names its own parts.
        yield from attributes_of(x)


def _of_function(f: types.FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable that was never assigned
            continue
    yield "", f.__defaults__
    yield "", f.__kwdefaults__


def attributes_of(x: object) -> Iterator[tuple[str, object]]:
    """(name, value) from `__dict__` and from every `__slots__` of the classes, read without calling anything of x's.

    Hooks of an optimizer are left out: what they hold belongs to whoever registered them.
    """
    try:
        own = object.__getattribute__(x, "__dict__")
    except AttributeError:
        own = {}
    hooked = issubclass(type(x), torch.optim.Optimizer)
    for name, value in list(own.items()):
        if not (hooked and name.endswith("_hooks")):
            yield str(name), value
    for cls in type(x).__mro__:
        for name, member in vars(cls).items() if "__slots__" in vars(cls) else ():
            if type(member) is types.MemberDescriptorType:
                try:
                    yield name, member.__get__(x)
                except AttributeError:  # a slot that was never filled
                    continue
