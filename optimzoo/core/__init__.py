"""Everything that an optimizer file must not contain: the step loop, options, routing, precision, checkpoints."""

from optimzoo.core.adamw import AdamW
from optimzoo.core.hyper import hyper
from optimzoo.core.load_dcp import load_dcp
from optimzoo.core.matrix import MatrixOptimizer
from optimzoo.core.optimizer import ZooOptimizer
from optimzoo.core.release import release_gradients
from optimzoo.core.routing import Route, param_groups
from optimzoo.core.slots import Lists, Slot, Tensors

__all__ = [
    "AdamW",
    "Lists",
    "MatrixOptimizer",
    "Route",
    "Slot",
    "Tensors",
    "ZooOptimizer",
    "hyper",
    "load_dcp",
    "param_groups",
    "release_gradients",
]
