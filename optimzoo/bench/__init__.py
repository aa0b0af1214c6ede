"""What a step costs on this machine: optimizers side by side in one process, and whole training steps."""

from optimzoo.bench.command import Wanted, run, show

__all__ = ["Wanted", "run", "show"]
