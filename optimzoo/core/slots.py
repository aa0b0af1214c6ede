"""What an optimizer remembers for one tensor, as data: known before it exists, so planned before it is allocated."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Averages tolerate a coarser grid; a basis loses its orthogonality on one, an index or a counter its meaning.
COARSE_KINDS = frozenset({"first moment", "second moment"})


Tensors = list[Tensor]
Lists = dict[str, Tensors]  # a slot's name -> that slot of several parameters


@dataclass(frozen=True)
class Slot:
    """One remembered tensor: its shape, its kind (one of `memory.KINDS`), its dtype and how it starts.

    `dtype=None` is the precision of the computation (at least float32, the weight's own when wider), and for the
    averages of `COARSE_KINDS` the group's `state_dtype`. `fill` is a number, or a function of the tensor and a seed
    made from the parameter's name, which fills it in place. `moves` says that entries change places between steps, so
    that no scale may be shared by a block of them.
    """

    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype | None = None
    fill: float | Callable[[Tensor, int], None] = 0.0
    moves: bool = False
