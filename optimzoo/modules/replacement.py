"""Layers that stand in for `nn.Linear`: `convert` puts them in, `merge` takes them out, `unmerge` puts them back."""

import difflib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from optimzoo.core.hyper import Hyper, nearest
from optimzoo.functional.names import TAKEN_OUT

HEADS = ("lm_head", "*.lm_head")  # never converted by a wildcard, whatever the model calls its output embeddings
_KEPT = "_optimzoo_kept"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Replacement(nn.Module, ABC):
    """A layer that takes an `nn.Linear`'s place and can become one again."""

    options: ClassVar[Mapping[str, Hyper]] = {}
    in_features: int
    out_features: int

    @classmethod
    @abstractmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        """Build the layer from `linear`, on its device, giving outputs in its dtype; it decides what is trainable."""

    @abstractmethod
    def to_linear(self) -> nn.Linear:
        """Give the plain layer that computes the same function, in the dtype of the layer that was converted."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why the layer cannot take this module's place, None when it can."""
        return plain(module)

    @classmethod
    def resolve(cls, **options: Any) -> dict[str, Any]:
        """Give every option a checked value: unknown names raise TypeError, values out of bounds ValueError."""
        for name in options:
            if name not in cls.options:
                raise TypeError(f"{cls.__name__} has no option {name!r}{nearest(name, cls.options)}")
        given = {name: cls.options[name].check(cls.__name__, name, value) for name, value in options.items()}
        return {name: option.default for name, option in cls.options.items()} | given

    @classmethod
    def prepare(cls, linears: Mapping[str, nn.Linear], **options: Any) -> dict[str, dict[str, Any]]:
        """Give `from_linear`'s options for each matched layer; a kind whose layers share a budget overrides it."""
        return {name: cls.resolve(**options) for name in linears}

    @classmethod
    def probe(cls, model: nn.Module, names: Sequence[str], batch: Any) -> None:
        """Warn where converting these layers of `model` is of no use, as a run of it on `batch` shows."""
        raise TypeError(f"{cls.__name__} has nothing to find out from a batch; leave batch= out")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product with x is computed in; autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def plain(module: nn.Module) -> str | None:
    """Why a module is no `nn.Linear` with a weight of plain numbers, None when it is one."""
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, and only a plain nn.Linear can be replaced"
    return None


def convert(
    model: nn.Module,
    kind: type[Replacement],
    match: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    *,
    batch: Any = None,
    **options: Any,
) -> list[str]:
    """Replace the `nn.Linear` layers whose names match by `kind`, in place, and return their names.

    Make the optimizer afterwards: one that has parameters of replaced layers refuses to step.

    `match` and `exclude` are shell patterns on module names (`"*.mlp.*"`). A pattern with a wildcard passes over output
    heads, layers that share their weight with another module, layers already replaced and subclasses of `nn.Linear`
    (whose owner may read the weight without calling them; quantized ones are known to some kinds); naming one of these
    in full is an error, except for a head that shares nothing, which is then converted.

    With a `batch`, on which the model is run once (`model(**batch)`, `model(*batch)` or `model(batch)`), kinds that are
    about activations warn by name of layers where they can save nothing, and of what keeps the input there.

    A converted model saves and loads with `state_dict` between models converted alike; before writing it for
    `from_pretrained`, `merge` it: the keys of a replaced layer mean nothing to a plain model.
    """
    if not (isinstance(kind, type) and issubclass(kind, Replacement)):
        raise TypeError(f"convert makes layers such as optimzoo.SpectralLinear: give such a class, not {kind!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert changes a model in place and returns names of layers; it takes no {type(model).__name__}"
        )
    if isinstance(model, nn.Linear | Replacement):
        raise ValueError("convert replaces layers inside a model, and this is a single layer: pass its parent module")
    layers = select(model, kind.__name__, match, exclude, kind.refuses)
    for name, layer in layers.items():
        if any(getattr(layer, hooks) for hooks in _HOOKS):
            raise ValueError(f"{name!r} has hooks that convert would drop: remove them first, and add them again after")
    prepared = kind.prepare(layers, **options)
    if batch is not None:
        kind.probe(model, list(layers), batch)
    trained = {p: p.requires_grad for layer in layers.values() for p in layer.parameters()}
    for name, layer in layers.items():
        try:
            put(model, name, kind.from_linear(layer, **prepared[name]).train(layer.training))
        except (TypeError, ValueError, RuntimeError) as error:  # all or nothing
            for earlier, original in layers.items():
                put(model, earlier, original)
            for p, requires_grad in trained.items():
                p.requires_grad_(requires_grad)
            raise type(error)(f"{name!r} cannot become {kind.__name__}: {error}") from error
    return list(layers)


def merge(model: nn.Module, keep: bool = False) -> list[str]:
    """Turn every replaced layer back into an `nn.Linear`, in place, and return their names.

    With `keep=True` the replaced layers stay alive beside the plain ones (outside of the state dict) for `unmerge`.
    """
    if isinstance(model, Replacement):
        raise ValueError("merge replaces layers inside a model, and this is a single layer: call its to_linear()")
    layers = {name: layer for name, layer in _walk(model) if isinstance(layer, Replacement)}
    for name, layer in layers.items():
        linear = layer.to_linear().train(layer.training)
        if keep:
            linear.__dict__[_KEPT] = layer  # not through __setattr__: a submodule would enter the state dict
        put(model, name, linear)
    return list(layers)


def unmerge(model: nn.Module) -> list[str]:
    """Put back the layers that `merge(model, keep=True)` took out, bit for bit, and return their names.

    What was trained into the plain layers in between is dropped with them.
    """
    kept = {name: layer.__dict__[_KEPT] for name, layer in _walk(model) if _KEPT in layer.__dict__}
    if not kept:
        raise ValueError("nothing to unmerge: only merge(model, keep=True) keeps the replaced layers")
    for name, layer in kept.items():
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        put(model, name, layer.to(plain.weight.device).train(plain.training))
    return list(kept)


def _patterns(match: str | Sequence[str]) -> tuple[str, ...]:
    return (match,) if isinstance(match, str) else tuple(match)


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below `module` with its name, those seen twice included; replaced layers are leaves."""
    for name, child in module._modules.items():
        if child is not None:
            yield prefix + name, child
            if not isinstance(child, Replacement):
                yield from _walk(child, f"{prefix}{name}.")


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace one layer; parameters that go with the old one are marked, so that no optimizer trains them in vain."""
    parent, _, leaf = name.rpartition(".")
    for p in model.get_submodule(name).parameters():
        setattr(p, TAKEN_OUT, True)
    for p in layer.parameters():
        vars(p).pop(TAKEN_OUT, None)
    setattr(model.get_submodule(parent), leaf, layer)


def select(
    model: nn.Module,
    kind: str,
    match: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    refuses: Callable[[nn.Module], str | None] = plain,
) -> dict[str, nn.Linear]:
    """The layers by name that `convert` with these patterns replaces; `kind` is what errors call the replacement."""
    match, exclude = _patterns(match), _patterns(exclude)
    modules = dict(_walk(model))
    refusals = _refusals(model, modules, refuses)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    chosen: dict[str, nn.Linear] = {}
    for name, module in modules.items():
        if not _matches(name, match) or _matches(name, exclude):
            continue
        if name in match and name in refusals:
            raise ValueError(f"{name!r} cannot become {kind}: {refusals[name]}")
        if name not in match and (module is head or _matches(name, HEADS)):
            continue
        if name not in refusals:
            assert isinstance(module, nn.Linear)
            chosen[name] = module
    if not chosen:
        raise ValueError(f"match={match} finds no layer for {kind}; {_advice(modules, refusals, match)}")
    return chosen


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _advice(modules: Mapping[str, nn.Module], refusals: Mapping[str, str], match: tuple[str, ...]) -> str:
    for name, module in modules.items():
        if name in refusals and _matches(name, match) and isinstance(module, Replacement | nn.Linear):
            return f"{name!r} is passed over: {refusals[name]}"
    names = [name for name in modules if name not in refusals]
    near = [name for pattern in match for name in difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)]
    return f"layers are named like {', '.join(near or names[:3])}" if names else "the model has no layer to convert"


def _refusals(
    model: nn.Module, modules: Mapping[str, nn.Module], refuses: Callable[[nn.Module], str | None]
) -> dict[str, str]:
    """Why each module that is not a free-standing `nn.Linear`, or another one that `refuses` lets pass, stays."""
    parameters = [p for module in (model, *modules.values()) for p in module._parameters.values() if p is not None]
    owners = Counter(map(id, parameters))
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        if isinstance(module, Replacement):
            reasons[name] = f"it is a {type(module).__name__} already; merge(model) first"
        elif reason := refuses(module):
            reasons[name] = reason
        elif owners[id(module.weight)] > 1:
            reasons[name] = "its weight is shared with another module, which would keep the old one; untie them first"
    return reasons
