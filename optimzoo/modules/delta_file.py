"""Sparse deltas as small files, and how much of a model is trained."""

import difflib
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from optimzoo.functional.sparse import index_dtype
from optimzoo.modules.replacement import put
from optimzoo.modules.sparse_delta import SparseDeltaLinear

_FORMAT = "optimzoo sparse delta 1"


def save_delta(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Write values and indices of every `SparseDeltaLinear` to one safetensors file and return the layers' names."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseDeltaLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SparseDeltaLinear to save; merged models save as usual")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.values": layer.values.detach(), f"{name}.indices": layer.indices}
    shapes = {name: f"{layer.out_features}x{layer.in_features}" for name, layer in layers.items()}
    partial = f"{os.fspath(path)}.partial"  # takes the file's place once it is whole
    _safetensors("safetensors.torch").save_file(
        {k: t.contiguous() for k, t in tensors.items()}, partial, {"format": _FORMAT} | shapes
    )
    os.replace(partial, path)
    return list(layers)


def load_delta(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Put a saved delta on a model, in place, and return the layers' names; plain `nn.Linear` layers are converted.

    All is checked before anything changes.
    """
    with _safetensors("safetensors").safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if about.pop("format", None) != _FORMAT:
            raise ValueError(f"{os.fspath(path)!r} holds no sparse delta; write one with save_delta")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping, only a method
    modules = dict(model.named_modules())
    for name, shape in sorted(about.items()):
        _check(modules, name, shape)
    names = [name for name in modules if name in about]  # the file keeps no order
    for name in names:
        _load_layer(model, name, tensors[f"{name}.values"], tensors[f"{name}.indices"])
    return names


def _check(modules: dict[str, nn.Module], name: str, shape: str) -> None:
    module = modules.get(name)
    if module is None:
        near = difflib.get_close_matches(name, modules, n=1)
        raise ValueError(f"the model has no layer {name!r}" + (f"; did it become {near[0]!r}?" if near else ""))
    if not isinstance(module, SparseDeltaLinear | nn.Linear):
        raise ValueError(f"{name!r} is a {type(module).__name__}; a delta needs the nn.Linear that it was trained on")
    if shape != f"{module.out_features}x{module.in_features}":
        raise ValueError(
            f"the delta of {name!r} is for {shape}, the layer is {module.out_features}x{module.in_features}"
        )


def _load_layer(model: nn.Module, name: str, values: Tensor, indices: Tensor) -> None:
    module = model.get_submodule(name)
    if not isinstance(module, SparseDeltaLinear) or module.values.shape != values.shape:
        base = module.base if isinstance(module, SparseDeltaLinear) else module
        assert isinstance(base, nn.Linear)
        module = SparseDeltaLinear(base, indices.to(index_dtype(base.out_features, base.in_features))).train(
            module.training
        )
        put(model, name, module)
    with torch.no_grad():
        module.values.copy_(values)
        module.indices.copy_(indices)


class TrainableNumbers(NamedTuple):
    """How many numbers of a model are trained, and how many it has."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"trainable: {self.trainable:,} of {self.total:,} numbers ({share:.4f} %)"


def trainable_numbers(model: nn.Module) -> TrainableNumbers:
    """Count trained and all parameters of a model; a quantized base counts the numbers that it stands for."""
    bases = {id(m.base.weight): m.base for m in model.modules() if isinstance(m, SparseDeltaLinear)}
    trainable = total = 0
    for p in model.parameters():
        base = bases.get(id(p))
        total += p.numel() if base is None else base.out_features * base.in_features
        trainable += p.numel() if p.requires_grad else 0
    return TrainableNumbers(trainable, total)


def _safetensors(part: str) -> ModuleType:
    try:
        return importlib.import_module(part)
    except ImportError as error:
        raise ImportError("sparse deltas are saved as safetensors files: pip install safetensors") from error
