"""optimzoo: memory-efficient optimizers for PyTorch that account for every byte they hold."""

from optimzoo.core import AdamW, param_groups
from optimzoo.memory import Ledger, StepMemory, ledger, track
from optimzoo.optimizers.cosmos import COSMOS

__version__ = "0.1.0"

__all__ = ["COSMOS", "AdamW", "Ledger", "StepMemory", "ledger", "param_groups", "track"]
