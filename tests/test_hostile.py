"""Hostile models, options and gradients: nothing breaks without a name, nothing is lost, nothing becomes NaN.

The short profile runs with the suite. The long one, 10,000 cases:

    pytest -m long tests/test_hostile.py
"""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import optimzoo
from optimzoo.core import ZooOptimizer, storage
from optimzoo.core.member import specs
from tests.cases import ALL, build
from tests.scenes import BAD, Scene, scenes
from tests.test_contract import reload
from tests.test_memory import reachable

HOME = str(Path(optimzoo.__file__).parent)
CASES = 10_000
COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
COMMON |= {"database": None, "phases": (Phase.explicit, Phase.generate)}  # a case is small enough to be read as it is
SHORT = settings(max_examples=40, **COMMON)
LONG = settings(max_examples=-(-CASES // len(ALL)), **COMMON)


def ours(error: BaseException, scene: Scene) -> bool:
    """Whether we raised it, and it says about what: the class, an option or a parameter."""
    if not isinstance(error, ValueError | TypeError | RuntimeError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    names = [scene.kind.__name__, "SparseDeltaLinear", "SpectralLinear", *scene.kind.options]
    names += [piece.replace(" ", "_") for piece, _ in scene.pieces]
    return frame.filename.startswith(HOME) and any(name in str(error) for name in names)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Codes also for the small tensors of these cases."""
    with mock.patch.object(storage, "SMALL", 32):
        yield


def play(scene: Scene) -> None:
    """One case from construction to the end, with all that is promised checked on the way."""
    with small_blocks():
        try:
            model = scene.model()
            opt = scene.optimizer(model)
        except Exception as error:
            if not ours(error, scene):
                raise
            event(f"refused: {str(error)[:50]}")
            return
        if scene.seed == 0:  # the dearest check
            rehearse(scene, model, opt)
        twin = None
        for step in range(len(scene.gradients)):
            if step == scene.stop:
                twin = resumed(scene, model, opt)
            try:
                one_step(scene, model, opt, step)
            except RuntimeError as error:
                if not (scene.poisoned and ours(error, scene)):
                    raise
                return
            if twin is not None:
                scene.give(*twin, step)
                twin[1].step()
        assert opt.memory().total == sum(reachable(opt, model).values()) == opt._state_bytes
        if twin is not None:
            for (name, p), q in zip(model.named_parameters(), twin[0].parameters(), strict=True):
                assert torch.equal(p.nan_to_num(), q.nan_to_num()), f"{name} differs after a resume"


def rehearse(scene: Scene, model: nn.Module, opt: ZooOptimizer) -> None:
    """The bytes of the same optimizer on tensors that do not exist."""
    with FakeTensorMode():
        planned = scene.optimizer(scene.model()).memory().total
    assert planned == opt.memory().total == sum(reachable(opt, model).values())


def resumed(scene: Scene, model: nn.Module, opt: ZooOptimizer) -> tuple[nn.Module, ZooOptimizer]:
    """A second model and optimizer that went through files."""
    twin = scene.model()
    twin_opt = scene.optimizer(twin)
    twin.load_state_dict(reload(model.state_dict()))
    twin_opt.load_state_dict(reload(opt.state_dict()))
    return twin, twin_opt


def one_step(scene: Scene, model: nn.Module, opt: ZooOptimizer, step: int) -> None:
    got = scene.give(model, opt, step)
    params = dict(model.named_parameters())
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in params.items()}
    before = {name: p.detach().clone() for name, p in params.items()}
    held = {p: {key: t.clone() for key, t in slots.items()} for p, slots in opt.state.items()}
    opt.step()
    plan = {member.p: member for _, member in opt.begin().values()}
    for name, p in params.items():
        g = grads[name]
        assert (p.grad is None) == (g is None), name
        assert g is None or torch.equal(p.grad.nan_to_num(), g.nan_to_num()), f"the gradient of {name} was written to"
        if p in plan:
            assert opt.state[p].keys() == specs(plan[p]).keys(), f"state of {name} is lost"
        if scene.poisoned:
            continue
        assert torch.isfinite(p).all(), f"{name} is not finite"
        bad = got[name] in BAD[:2] and p.numel() > 0
        still = (g is None or bad) and not scene.kind.needs_model
        if still:
            assert torch.equal(p, before[name]), f"{name} moved"
        for key, t in opt.state.get(p, {}).items():
            assert torch.isfinite(t).all(), f"{key} of {name} is not finite"
            same = held[p].get(key)
            if still and not plan[p].route.periodic:
                assert torch.equal(t, same), f"{key} of {name} moved"


every = pytest.mark.parametrize("cls", ALL)


@every
def test_what_no_class_takes_is_refused_by_name(cls: str) -> None:
    if ALL[cls].needs_model:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(3, 0), nn.Linear(8, 8))
        with pytest.raises(ValueError, match="'1' cannot become"):
            build(ALL[cls], model)
        assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model), "half converted"
        return
    w, v = (nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    for params, words in (
        ([("w", w), ("v", v), ("w", w)], "parameter 'w' is given twice"),
        ([{"params": [("w", w)]}, {"params": [("v", v), ("w", w)]}], "parameter 'w' is given twice"),
        ([("w", nn.Parameter(torch.zeros(1, 8).expand(8, 8)))], "elements of parameter 'w' share memory"),
        ([("w", "not a tensor")], "parameter 'w' is no tensor but str"),
        ([("w", nn.Parameter(torch.zeros(8, dtype=torch.complex64)))], "'w' is complex"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            ALL[cls](params)
    with pytest.raises(TypeError, match=r"'w' is float16; use rounding='error'"):
        ALL[cls]([("w", nn.Parameter(torch.zeros(8, dtype=torch.float16)))], rounding="stochastic")


@every
@SHORT
@given(data=st.data())
def test_hostile_cases(cls: str, data: st.DataObject) -> None:
    play(data.draw(scenes((cls,))))


@pytest.mark.long
@every
@LONG
@given(data=st.data())
def test_ten_thousand_hostile_cases(cls: str, data: st.DataObject) -> None:
    play(data.draw(scenes((cls,))))
