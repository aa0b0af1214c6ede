"""optimzoo: memory-efficient optimizers for PyTorch that account for every byte they hold."""

from optimzoo.core import AdamW, load_dcp, param_groups, release_gradients
from optimzoo.memory import Ledger, Plan, StepMemory, ledger, log_memory, track
from optimzoo.modules import convert, merge, unmerge
from optimzoo.modules.delta_file import load_delta, save_delta, trainable_numbers
from optimzoo.modules.norm_cache import NormCache
from optimzoo.modules.sampled import SampledLinear
from optimzoo.modules.sampled_matmul import SampledMatmul
from optimzoo.modules.sparse_delta import SparseDeltaLinear
from optimzoo.modules.spectral import SpectralLinear
from optimzoo.optimizers.cosmos import COSMOS
from optimzoo.optimizers.frugal import FRUGAL
from optimzoo.optimizers.sft import SFT
from optimzoo.optimizers.sm3 import SM3
from optimzoo.optimizers.sst import SST
from optimzoo.optimizers.swan import SWAN
from optimzoo.planning import fit, plan

__version__ = "0.1.0"

__all__ = [
    "COSMOS",
    "FRUGAL",
    "SFT",
    "SM3",
    "SST",
    "SWAN",
    "AdamW",
    "Ledger",
    "NormCache",
    "Plan",
    "SampledLinear",
    "SampledMatmul",
    "SparseDeltaLinear",
    "SpectralLinear",
    "StepMemory",
    "convert",
    "fit",
    "ledger",
    "load_dcp",
    "load_delta",
    "log_memory",
    "merge",
    "param_groups",
    "plan",
    "release_gradients",
    "save_delta",
    "track",
    "trainable_numbers",
    "unmerge",
]
