"""Steps captured in a CUDA graph: what a replay would repeat is refused by name. Replays were seen on a GPU."""

import pytest
import torch
from torch import nn

from optimzoo.core import AdamW, ZooOptimizer, release_gradients
from optimzoo.optimizers.cosmos import COSMOS
from optimzoo.optimizers.frugal import FRUGAL
from optimzoo.optimizers.sft import SFT
from optimzoo.optimizers.sm3 import SM3
from optimzoo.optimizers.sst import SST
from optimzoo.optimizers.swan import SWAN
from tests.cases import build, give_gradients, go_the_devices_way, same, tiny, weights


def made(cls: type[ZooOptimizer], steps: int, dtype: torch.dtype = torch.float32, **options) -> tuple:
    model = tiny(dtype=dtype)
    opt = build(cls, model, **{"lr": torch.tensor(1e-2)} | options)
    for step in range(steps):
        give_gradients(model.parameters(), step)
        opt.step()
    give_gradients(model.parameters(), steps)
    return model, opt


@pytest.fixture
def capture(monkeypatch):
    go_the_devices_way(monkeypatch)
    return lambda: monkeypatch.setattr("optimzoo.core.optimizer.capturing", lambda: True)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((cls, {}) for cls in (AdamW, COSMOS, SWAN, SM3)),
        (FRUGAL, {"density": 0.0}),
        (AdamW, {"dtype": torch.float64}),
        (AdamW, {"dtype": torch.bfloat16, "rounding": "error"}),
        (AdamW, {"rounding": "stochastic"}),  # float32 weights are not rounded
    ],
)
def test_what_counts_on_the_device_is_captured(cls, options, capture):
    model, opt = made(cls, 1, **options)
    before = weights(model)
    capture()
    opt.step()
    assert not same(before, weights(model))


@pytest.mark.parametrize(
    ("cls", "steps", "options", "words"),
    [
        (SWAN, 1, {"lr": 1e-2}, "give lr=torch"),
        (COSMOS, 0, {}, "is decomposed in it"),
        (FRUGAL, 1, {"projection": "columns"}, "counts its steps on the host"),
        (FRUGAL, 1, {"projection": "block", "density": 0.25}, "counts its steps on the host"),
        (SST, 1, {}, "chooses entries on the host"),
        (SFT, 1, {}, "chooses entries on the host"),
        (AdamW, 1, {"state_dtype": torch.bfloat16}, "by the same chance"),
        (AdamW, 1, {"dtype": torch.bfloat16, "rounding": "stochastic"}, "by the same chance"),
    ],
)
def test_what_the_host_decides_is_refused(cls, steps, options, words, capture):
    model, opt = made(cls, steps, **options)
    before = weights(model)
    capture()
    with pytest.raises(RuntimeError, match=words):
        opt.step()
    assert same(before, weights(model))


def test_blocks_are_refused_in_a_period_in_which_none_steps(capture):
    opt = FRUGAL([("w", nn.Parameter(torch.ones(8, 8)))], lr=torch.tensor(1e-2), projection="block", update_gap=1)
    for group in opt.param_groups:
        group["step"] = next(step for step in range(4) if not _active(opt, step))
    opt.memory()
    capture()
    opt.param_groups[0]["params"][0].grad = torch.ones(8, 8)
    with pytest.raises(RuntimeError, match="counts its steps on the host"):
        opt.step()


def _active(opt: FRUGAL, step: int) -> bool:
    opt.param_groups[0]["step"] = step
    return opt.routes()[0][2] == "adamw"


def test_a_released_step_is_asked_too(capture):
    model, opt = made(SWAN, 0, lr=1e-2)
    opt.zero_grad()
    release_gradients(model, opt)
    capture()
    with pytest.raises(RuntimeError, match="give lr=torch"):
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()


def test_slots_are_not_born_inside(capture):
    model, opt = made(AdamW, 1)
    opt.add_param_group({"params": [("v", nn.Parameter(torch.ones(3)))]})
    model.square.weight.requires_grad_(False)
    capture()
    with pytest.raises(RuntimeError, match="take a step before"):
        opt.step()
