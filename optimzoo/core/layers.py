"""What an optimizer needs to know of layers that change what they train: the one meeting point of the two.

Neither side imports the other. A layer names the optimizer that drives it, which finds its layers in the model.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from optimzoo.core.matrix import MatrixOptimizer
from optimzoo.core.member import Member
from optimzoo.core.shards import is_sharded
from optimzoo.core.slots import Slot
from optimzoo.functional.names import clean_name
from optimzoo.functional.slices import has_values


class Scheduled(Protocol):
    """A layer that trains only some of its entries and chooses them anew when its optimizer says so."""

    driver: str  # the name of the optimizer class that calls `reselect`
    reselections: Tensor  # 0-dim int64 buffer: how often `reselect` was called, so that a checkpoint can be matched

    def reselect(self, step: int, **how: Any) -> Mapping[Tensor, Tensor | None]:
        """Choose the trained entries anew, in place.

        Returns for each trained parameter that changed where its optimizer state comes from: a (entries,) int64 tensor
        of old positions, -1 where an entry is new, or None when all of it is new.
        """
        ...


def scheduled_layers(model: nn.Module, driver: "type[LayerOptimizer]") -> dict[str, Any]:
    """The layers that an optimizer of this class is to drive, by their names without wrappers."""
    named = [(clean_name(name), module) for name, module in model.named_modules()]
    found = {name: module for name, module in named if getattr(module, "driver", None) == driver.__name__}
    if not found:
        raise ValueError(
            f"{driver.__name__} found no {driver.works_on} in {type(model).__name__}: call "
            f"optimzoo.convert(model, optimzoo.{driver.works_on}, ...) first"
        )
    return found


class LayerOptimizer(MatrixOptimizer):
    """Base of optimizers that change their layers between steps: made from the model, or from groups and the model.

    One parameter of each layer keeps the layer's count in its slot "reselections" (`COUNTER`), so that a state is never
    continued on a layer that has moved on.
    """

    needs_model: ClassVar[bool] = True
    works_on: ClassVar[str]  # the class of its layers
    layers: dict[str, Any]

    def __init__(self, params: Any, lr: float | Tensor | None = None, *, model: Any = None, **options: Any) -> None:
        name = type(self).__name__
        model = params if isinstance(params, nn.Module) else model
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{name} works on layers of a model: call {name}(model, ...) or {name}(groups, model=model)"
            )
        self.layers = scheduled_layers(model, type(self))
        super().__init__(params, lr, **options)
        for layer in self.layers.values():  # a model that was trained before has counts of its own
            self.note_count(layer)

    def note_count(self, layer: Any) -> None:
        """Bring the layer's count in the state up to date."""
        for p in layer.parameters():
            if "reselections" in self.state.get(p, {}):
                self.state[p]["reselections"].copy_(layer.reselections)

    def refuse_capture(self, group: dict[str, Any], members: list[Member]) -> None:
        raise RuntimeError(f"{type(self).__name__} chooses entries on the host: step outside of the CUDA graph")

    def members(self, index: int) -> list[Member]:
        for name, layer in self.layers.items():
            for part, p in layer.named_parameters():
                if is_sharded(p):
                    raise TypeError(
                        f"{type(self).__name__} chooses entries of whole tensors, and {name}.{part} is sharded: use "
                        f"DistributedDataParallel, or leave the layers out of fully_shard (ignored_params=...)"
                    )
        return super().members(index)

    def admit_state(self, values: dict[Tensor, dict[str, Tensor]]) -> None:
        for name, layer in self.layers.items():
            for p in layer.parameters():
                saved = values.get(p, {}).get("reselections")
                if saved is not None and int(saved) != count_of(layer):
                    raise ValueError(
                        f"{name!r} was reselected {count_of(layer)} times and the loaded state is of reselection "
                        f"{int(saved)}: load the model's state of the same step first, then the optimizer's"
                    )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if any(id(layer) not in memo for layer in self.layers.values()):
            raise TypeError(
                f"a copy of this {type(self).__name__} alone would go on changing the original's layers: "
                "copy.deepcopy((model, optimizer)) copies both"
            )
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"layers": self.layers}


COUNTER = Slot((), "counter")  # in the weight's dtype: a slot of another one would keep the rule from running in place


def count_of(layer: Scheduled) -> int:
    """How often the layer was reselected; 0 for one that is only planned."""
    return int(layer.reselections) if has_values(layer.reselections) else 0
