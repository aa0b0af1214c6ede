"""Bytes: what stays, what comes and goes, what would be needed. Works on any torch optimizer or module."""

from optimzoo.memory.history import History, StepMemory, log_memory, track
from optimzoo.memory.ledger import KINDS, Entry, Ledger, ledger
from optimzoo.memory.plan import Plan, plan
from optimzoo.memory.reach import plain_tensors
from optimzoo.memory.rehearsal import Unplannable
from optimzoo.memory.workspace import Workspace

__all__ = [
    "KINDS",
    "Entry",
    "History",
    "Ledger",
    "Plan",
    "StepMemory",
    "Unplannable",
    "Workspace",
    "ledger",
    "log_memory",
    "plain_tensors",
    "plan",
    "track",
]
