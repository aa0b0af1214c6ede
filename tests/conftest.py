"""One thread a test, so that two workers share two cores; nothing is ever downloaded."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # kernels of a device, on the CPU; read when they are imported

import pytest
import torch

from optimzoo.core import graphs
from optimzoo.functional import host_kernel

torch.set_num_threads(1)
graphs.BACKEND = "eager"  # where options are drawn at random, a C++ compiler would take minutes; test_graphs has others

with warnings.catch_warnings():  # where there is no C compiler, not every test with engine="compiled" need say so
    warnings.simplefilter("ignore")
    host_kernel.works()


@pytest.fixture(autouse=True)
def _global_rng_is_the_callers():
    """No test, and so no optimizer under test, may depend on what ran before it."""
    torch.manual_seed(0)
