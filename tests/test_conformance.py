"""What code written for torch.optim expects of any optimizer: hooks, groups edited between steps, schedulers, averages.

Promises of the zoo's own are in `test_contract.py`; here the habits are torch's, and torch's own classes share them.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from tests.cases import ALL, PLAIN, bare, build, give_gradients, loss_of, same, short_options, tiny, train, weights
from tests.test_contract import reload

every = pytest.mark.parametrize("cls", ALL.values(), ids=ALL.keys())
plain = pytest.mark.parametrize("cls", PLAIN.values(), ids=PLAIN.keys())


def everything(model: nn.Module, opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [*model.state_dict().values(), *(t for slots in opt.state.values() for t in slots.values())]


@every
def test_hooks_run_where_torch_runs_them(cls):
    model = tiny()
    opt, seen = build(cls, model, lr=1e-2), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        opt.register_step_pre_hook(lambda o, args, kwargs: (args, kwargs | {"closure": closure})),
        opt.register_step_post_hook(lambda *_: seen.append("post")),
    ]

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        seen.append("closure")
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    try:
        assert opt.step() > 0, "a pre hook may hand over another closure"
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "closure", "post", "global post"]
    opt.step()
    assert len(seen) == 4, "a removed hook ran"


@every
def test_hooks_of_saving_and_loading_may_change_what_goes_through(cls):
    model = tiny()
    opt = build(cls, model)
    train(model, opt, 0, 2)
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    opt.register_state_dict_post_hook(lambda o, state: state | {"note": 1})
    opt.register_state_dict_post_hook(lambda o, state: seen.append("first"), prepend=True)
    saved = opt.state_dict()
    assert saved["note"] == 1
    assert seen == ["saving", "first"]

    def rename(o: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["param_groups"] = [group | {"lr": 0.25} for group in state["param_groups"]]
        state.pop("note")

    opt.register_load_state_dict_pre_hook(rename)
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    opt.load_state_dict(saved)
    assert seen[-1] == 0.25
    assert saved["note"] == 1, "a hook reached the caller's dictionary"
    assert saved["param_groups"][0]["lr"] != 0.25


@every
def test_hooks_and_patches_do_not_follow_a_copy(cls):
    model = tiny()
    opt = build(cls, model)
    schedule = schedules.StepLR(opt, 2)  # patches `step` on the instance
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    train(model, opt, 0, 1)
    schedule.step()
    for twin_model, twin in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        before = weights(model)
        train(twin_model, twin, 1, 2)
        assert seen == ["post"]
        assert same(weights(model), before)
        twin.register_step_post_hook(lambda *_: None)
        twin.add_param_group({"params": [("more", nn.Parameter(torch.zeros(3)))]})


@plain
def test_order_and_names_of_parameters_are_the_callers(cls):
    model = tiny()
    params = list(model.parameters())[::-1]
    with bare():
        opt = cls(params)
    assert all(a is b for a, b in zip(opt.param_groups[0]["params"], params, strict=True))
    packed = opt.state_dict()
    assert packed["param_groups"][0]["params"] == list(range(len(params)))
    assert all(set(packed["state"][i]) == set(opt.state[p]) for i, p in enumerate(params))
    with pytest.raises(ValueError, match="given twice"):
        opt.add_param_group({"params": params[:1]})
    with pytest.raises(ValueError, match="non-leaf"):
        opt.add_param_group({"params": [params[0] * 2]})
    assert len(opt.param_groups) == 1


@every
def test_edits_of_groups_count_from_the_next_step(cls):
    model = tiny()
    opt = build(cls, model, lr=1e-2, weight_decay=0.0)
    train(model, opt, 0, 1)
    twin_model, twin = copy.deepcopy((model, opt))
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    train(model, opt, 1, 2)  # before anything is drawn or exchanged
    moved = [(a - b).abs().max() for a, b in zip(weights(model), before, strict=True)]
    assert max(moved) < 1e-6, "lr=0"  # SST brings its vectors back to length one
    for group in twin.param_groups:
        group["weight_decay"] = 0.5
        if "betas" in group:
            group["betas"] = [0.5, 0.75]  # as a file would have them
    decayed_model, decayed = copy.deepcopy((twin_model, twin))
    for group in decayed.param_groups:
        group["weight_decay"] = 0.0
    train(twin_model, twin, 1, 2)
    train(decayed_model, decayed, 1, 2)
    assert not same(weights(twin_model), weights(decayed_model)), "weight_decay"
    saved = reload(twin.state_dict())
    twin.load_state_dict(saved)
    assert [g["weight_decay"] for g in twin.param_groups] == [0.5] * len(twin.param_groups)


@plain
def test_groups_may_join_and_parameters_may_freeze_between_steps(cls):
    model = tiny()
    model.late = nn.Linear(16, 16)
    model.late.requires_grad_(False)

    def run(model: nn.Module, opt: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            opt.zero_grad()
            (loss_of(model, step) + model.late(model.embed.weight).square().mean()).backward()
            opt.step()

    opt = build(cls, model, lr=1e-2)
    run(model, opt, 0, 2)
    model.late.requires_grad_(True)
    names = {f"late.{n}": p for n, p in model.late.named_parameters()}
    opt.add_param_group({"params": list(names.items()), "lr": 0.5, "name": "late"})
    assert [p is q for p, q in zip(opt.param_groups[-1]["params"], names.values(), strict=True)] == [True, True]
    model.norm.requires_grad_(False)
    frozen = [p.clone() for p in model.norm.parameters()]
    run(model, opt, 2, 4)
    assert all(torch.equal(p, old) for p, old in zip(model.norm.parameters(), frozen, strict=True))
    assert opt.param_groups[-1]["step"] == 2
    twin = copy.deepcopy(model)
    twin.requires_grad_(True)
    places = dict(twin.named_parameters())
    named = [[(name, places[name]) for name in g["param_names"]] for g in opt.param_groups]
    other = cls(
        [{"params": pairs, "fallback": g.get("fallback")} for g, pairs in zip(opt.param_groups, named, strict=True)]
    )
    twin.norm.requires_grad_(False)
    other.load_state_dict(reload(opt.state_dict()))
    model.norm.requires_grad_(True)
    twin.norm.requires_grad_(True)
    run(model, opt, 4, 7)
    run(twin, other, 4, 7)
    assert same(weights(model), weights(twin))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda opt: schedules.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "one cycle": lambda opt: schedules.OneCycleLR(opt, max_lr=2e-2, total_steps=12, cycle_momentum=False),
    "plateau": lambda opt: schedules.ReduceLROnPlateau(opt, patience=0, factor=0.5, min_lr=1e-5),
    "restarts": lambda opt: schedules.CosineAnnealingWarmRestarts(opt, T_0=3, T_mult=2),
    "sequence": lambda opt: schedules.SequentialLR(
        opt, [schedules.LinearLR(opt, 0.1, total_iters=3), schedules.ExponentialLR(opt, 0.9)], milestones=[3]
    ),
    "chain": lambda opt: schedules.ChainedScheduler([schedules.ConstantLR(opt, 0.5, 2), schedules.StepLR(opt, 2)]),
    "cyclic": lambda opt: schedules.CyclicLR(opt, 1e-3, 1e-2, step_size_up=2, cycle_momentum=False),
    "average": lambda opt: SWALR(opt, swa_lr=1e-3, anneal_epochs=9),
}


def scheduled(model: nn.Module, opt: torch.optim.Optimizer, schedule: Any, first: int, last: int) -> None:
    for step in range(first, last):
        loss = train(model, opt, step, step + 1)
        schedule.step(*([loss] if isinstance(schedule, schedules.ReduceLROnPlateau) else []))


@every
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_schedulers_set_the_rate_and_resume(cls, tensor):
    for name, make in SCHEDULES.items():
        model = tiny()
        opt = build(cls, model, lr=torch.tensor(1e-2) if tensor else 1e-2)
        schedule = make(opt)
        scheduled(model, opt, schedule, 0, 4)
        rates = [float(group["lr"]) for group in opt.param_groups]
        assert rates == pytest.approx([float(rate) for rate in schedule.get_last_lr()]), name
        other = tiny(seed=1)
        resumed = build(cls, other, lr=torch.tensor(1e-2) if tensor else 1e-2)
        again = make(resumed)
        other.load_state_dict(reload(model.state_dict()))
        resumed.load_state_dict(reload(opt.state_dict()))
        again.load_state_dict(copy.deepcopy(schedule.state_dict()))
        scheduled(model, opt, schedule, 4, 7)
        scheduled(other, resumed, again, 4, 7)
        assert same(everything(other, resumed), everything(model, opt)), name
        moved = [float(group["lr"]) for group in opt.param_groups]
        assert name == "plateau" or moved != rates, name


@every
def test_one_cycle_cycles_the_first_beta_or_the_momentum_or_says_that_there_is_none(cls):
    model = tiny()
    opt = build(cls, model, lr=1e-2)
    make = {"max_lr": 1e-2, "total_steps": 8}
    if not {"betas", "momentum"} & cls.options.keys():
        with pytest.raises(ValueError, match="must support momentum or beta1"):
            schedules.OneCycleLR(opt, **make)
        return
    schedule = schedules.OneCycleLR(opt, **make)
    values = []
    for step in range(8):
        scheduled(model, opt, schedule, step, step + 1) if step < 7 else None
        group = opt.param_groups[0]
        values.append(group["betas"][0] if "betas" in group else group["momentum"])
    assert min(values) < 0.87 < 0.94 < max(values)
    assert opt.memory().total == opt._state_bytes
    reload(opt.state_dict())


@every
def test_a_scaler_skips_a_step_whole_and_loses_nothing(cls):
    """Scaled by powers of two, the run is the unscaled one, in which the skipped step never was."""
    results = []
    for scaled in (True, False):
        model = tiny()
        opt = build(cls, model, lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=scaled)
        for step in range(6):
            if step == 3 and not scaled:
                continue
            opt.zero_grad()
            loss = loss_of(model, step)
            scaler.scale(loss * float("inf") if step == 3 else loss).backward()
            before = everything(model, opt) if step == 3 else []
            before = [t.clone() for t in before]
            scaler.unscale_(opt)
            if step != 3:
                nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            scaler.step(opt)
            scaler.update()
            assert step != 3 or same(everything(model, opt), before)
        results.append(everything(model, opt))
        assert {group["step"] for group in opt.param_groups} == {5}
        assert not opt.skipped()
    assert same(*results)


@every
def test_clipping_reaches_the_step(cls):
    """Gradients that clipping brings to the same tensors give the same step."""
    results = []
    for factor in (1.0, 4.0):  # a power of two, so that nothing but the clipping differs
        model = tiny()
        opt = build(cls, model, lr=1e-2)
        give_gradients(model.parameters(), 1)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        opt.step()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@plain
def test_averages_of_weights_are_of_the_weights(cls):
    model = tiny()
    opt = cls(model, lr=1e-2, **short_options(cls))
    mean, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    seen = []
    for step in range(3):
        train(model, opt, step, step + 1)
        mean.update_parameters(model)
        ema.update_parameters(model)
        seen.append(weights(model))
    for i, p in enumerate(mean.module.parameters()):
        torch.testing.assert_close(p.data, sum(w[i] for w in seen) / 3, rtol=1e-5, atol=1e-6)
    for i, p in enumerate(ema.module.parameters()):
        torch.testing.assert_close(p.data, seen[0][i] / 4 + seen[1][i] / 4 + seen[2][i] / 2, rtol=1e-5, atol=1e-6)


@every
def test_zeroed_gradients_are_not_missing_ones(cls):
    model = tiny()
    opt = build(cls, model, lr=1e-2)
    train(model, opt, 0, 1)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for g in opt.param_groups for p in g["params"])
    opt.step()
    opt.zero_grad()
    assert all(p.grad is None for g in opt.param_groups for p in g["params"])
    opt.step()  # nothing to do, and no error
    assert all(torch.isfinite(t).all() for t in everything(model, opt) if t.is_floating_point())


dynamos_own = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor",
    "ignore:.*torch.jit.script_method",
    "ignore:.*torch.autograd.function.Function.*should not be instantiated",
)


@dynamos_own
@pytest.mark.parametrize(("name", "how"), [("cosmos", "loop"), ("cosmos", "model"), ("sst", "model"), ("sft", "model")])
def test_a_compiled_model_and_a_compiled_loop_train_the_same(name, how):
    results = []
    for compiled in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = tiny()
        opt = build(ALL[name], model, lr=1e-2)
        forward = torch.compile(model, backend="eager") if compiled and how == "model" else model

        def loop(step: int, opt: Any = opt, forward: Any = forward) -> torch.Tensor:
            opt.zero_grad()
            loss = loss_of(forward, step)
            loss.backward()
            opt.step()
            return loss

        run = torch.compile(loop, backend="eager") if compiled and how == "loop" else loop
        for step in range(5):
            run(step)
        captured = torch._dynamo.utils.counters["stats"]["calls_captured"]
        assert (0 < captured < 40) == compiled, f"{captured} operations: was the step traced?"
        results.append(everything(model, opt))
    assert same(*results)


@every
def test_a_compiled_model_keeps_names_and_seeds(cls):
    model = tiny()
    plain_names = [n for g in build(cls, model).param_groups for n in g["param_names"]]
    compiled = cls(torch.compile(model, backend="eager"), **short_options(cls))
    assert [m.name for _, m in compiled.begin().values()] == plain_names


@every
def test_its_text_names_every_option_of_every_group(cls):
    model = tiny()
    text = repr(build(cls, model, lr=0.125))
    assert text.startswith(f"{cls.__name__} (")
    assert text.count("lr: 0.125") == text.count("Parameter Group")
    assert all(f"{name}: " in text for name in cls.options)
