"""What counts as a matrix, and what AdamW takes over.

Embeddings and heads are two-dimensional but no matrices in this sense: their rows are separate vectors. Only the module
knows which is which, so a module is the best input; names are the second best; a bare tensor says nothing.
"""

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optimzoo.functional.names import clean_name

FALLBACK_NAMES = (
    *("*embed*", "*wte*", "*wpe*"),
    *("*lm_head*", "head", "*.head", "*classifier*", "score", "*.score", "*router*"),
)
LAYOUTS = ("as is", "flattened", "transposed")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Route:
    """Where one parameter goes: its rule, that rule's options, the factor on the group's lr, and why.

    `layout` says how the rule sees the parameter: "as is", "flattened" (a convolution as (out, in * kernel)) or
    "transposed" (weights stored as (in, out)). `periodic` slots start afresh whenever the group's `period` changes.
    """

    rule: Any
    h: Any
    lr_scale: float = 1.0
    reason: str = "every parameter"
    layout: str = "as is"
    periodic: bool = False


def as_matrix(t: Tensor, layout: str) -> Tensor:
    """The tensor as its rule sees it; a view wherever memory allows one."""
    if layout == "flattened":
        return t.reshape(t.shape[0], -1)
    return t.mT if layout == "transposed" else t


def from_matrix(u: Tensor, p: Tensor, layout: str) -> Tensor:
    """The way back: a direction in the parameter's own shape."""
    if layout == "flattened":
        return u.reshape(p.shape)
    return u.mT if layout == "transposed" else u


def matrix_shape(p: Tensor, layout: str) -> tuple[int, ...]:
    """The shape in which a rule sees the parameter."""
    if layout == "flattened":
        return (p.shape[0], p.numel() // max(p.shape[0], 1))
    return tuple(reversed(p.shape)) if layout == "transposed" else tuple(p.shape)


def why_not_matrix(p: Tensor, name: str, group: dict[str, Any]) -> str | None:
    """The reason why a parameter is left to AdamW, None for a matrix."""
    if group.get("fallback"):
        return f"it is in the group {group['name']!r}" if "name" in group else "its group says fallback=True"
    if p.ndim < 2:
        return f"it has {p.ndim} dimension{'s' * (p.ndim != 1)}"
    layout = group.get("layout", "as is")
    if p.ndim > 2 and layout != "flattened":
        return f"it has {p.ndim} dimensions and is no convolution of a module given to the constructor"
    if min(matrix_shape(p, layout)) < 2:
        return "it has a unit or empty side"
    if "param_names" in group and not group.get("by_type"):
        pattern = named_fallback(name)
        return pattern and f"its name matches {pattern!r}"
    return None


def named_fallback(name: str) -> str | None:
    """The pattern by which a name reads like an embedding, a head or a bias; None when it does not."""
    lowered = clean_name(name).lower()
    called = (lowered, lowered.rpartition(".")[0])  # the parameter, or the module whose parameter it is
    patterns = (*FALLBACK_NAMES, "*bias*")
    return next((p for p in patterns if any(fnmatch.fnmatchcase(one, p) for one in called)), None)


def _owners(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module, str]]:
    """(full name, parameter, module, attribute) of every trainable parameter, a tied one at each of its places."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if p.requires_grad:
                yield (f"{prefix}.{attribute}" if prefix else attribute), p, module, attribute


def _table_sizes(model: nn.Module) -> tuple[set[int], set[int]]:
    """(ids of the parameters of embeddings and output heads, row counts by which a head is known).

    Those are the vocabulary's. Positions have tables too, often as long as a layer is wide: where the model does not
    say which of its tables holds tokens, one as long as wide does not count.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    rows = {m.weight.shape[0] for m in embeddings if m.weight.shape[0] != m.weight.shape[1]}
    tables: list[nn.Module] = [*embeddings]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        for module in model.modules():
            try:
                found = getattr(module, getter)() if hasattr(module, getter) else None
            except (NotImplementedError, AttributeError):
                continue  # transformers' base classes raise where a model has no such table
            if isinstance(found, nn.Module):
                tables.append(found)
                if isinstance(found, nn.Embedding) and module is model:
                    rows = {found.weight.shape[0]}
    return {id(p) for table in tables for p in table.parameters(recurse=False)}, rows


def _kind(name: str, p: Tensor, module: nn.Module, tables: set[int], rows: set[int]) -> str:
    """Which group a module's parameter belongs to. First match wins; the order is part of the promise."""
    if id(p) in tables:
        return "embeddings and heads"
    if isinstance(module, nn.Linear) and p.ndim == 2 and p.shape[0] in rows:
        return "embeddings and heads"
    if p.ndim >= 2 and (named_fallback(name) not in (None, "*bias*") or "router" in type(module).__name__.lower()):
        return "embeddings and heads"
    if p.ndim < 2 or "bias" in name.rsplit(".", 1)[-1] or re.search("norm", type(module).__name__, re.IGNORECASE):
        return "vectors"
    if isinstance(module, _TRANSPOSED_CONVOLUTIONS):
        return "other tensors"
    if isinstance(module, _CONVOLUTIONS):
        return "convolutions"
    if p.ndim > 2:
        return "other tensors"
    # GPT-2 stores its linear layers as (in, out); transformers is no dependency, so the class is known by its name, and
    # FSDP makes it a base.
    return "transposed matrices" if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) else "matrices"


_FLAGS: dict[str, dict[str, Any]] = {
    "matrices": {},
    "convolutions": {"layout": "flattened"},
    "transposed matrices": {"layout": "transposed"},
    "embeddings and heads": {"fallback": True},
    "other tensors": {"fallback": True},
    "vectors": {"fallback": True, "weight_decay": 0.0},
}


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The module's trainable parameters as torch parameter groups, routed by module type, tying and name.

    The first group holds the matrices; groups without members are left out. Vectors (norms, biases) are not decayed.
    Works with any torch optimizer that ignores additional keys.
    """
    tables, rows = _table_sizes(model)
    members: dict[str, list[tuple[str, Tensor]]] = {kind: [] for kind in _FLAGS}
    places: dict[int, tuple[Tensor, str, str]] = {}
    for name, p, module, _ in _owners(model):
        kind = _kind(clean_name(name), p, module, tables, rows)
        if id(p) not in places or kind == "embeddings and heads":
            first = places.get(id(p), (p, name, kind))[1]
            places[id(p)] = (p, first, kind)
    for p, name, kind in places.values():
        members[kind].append((name, p))
    return [
        {"params": named, "name": kind, "by_type": True, **_FLAGS[kind]} for kind, named in members.items() if named
    ]
