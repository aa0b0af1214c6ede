"""optimzoo: memory-efficient optimizers for PyTorch that account for every byte they hold."""

from optimzoo.core import AdamW, param_groups
from optimzoo.memory import Ledger, Plan, StepMemory, ledger, track
from optimzoo.optimizers.cosmos import COSMOS
from optimzoo.optimizers.frugal import FRUGAL
from optimzoo.optimizers.swan import SWAN
from optimzoo.planning import fit, plan

__version__ = "0.1.0"

__all__ = [
    "COSMOS",
    "FRUGAL",
    "SWAN",
    "AdamW",
    "Ledger",
    "Plan",
    "StepMemory",
    "fit",
    "ledger",
    "param_groups",
    "plan",
    "track",
]
