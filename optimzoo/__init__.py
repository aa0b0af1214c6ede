"""optimzoo: memory-efficient optimizers for PyTorch that account for every byte they hold."""

from optimzoo.core import AdamW, param_groups, release_gradients
from optimzoo.memory import Ledger, StepMemory, ledger, track
from optimzoo.optimizers.cosmos import COSMOS
from optimzoo.optimizers.frugal import FRUGAL
from optimzoo.optimizers.swan import SWAN

__version__ = "0.1.0"

__all__ = [
    "COSMOS",
    "FRUGAL",
    "SWAN",
    "AdamW",
    "Ledger",
    "StepMemory",
    "ledger",
    "param_groups",
    "release_gradients",
    "track",
]
