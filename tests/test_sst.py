"""SST: the paper's rules step by step, what holds after every step, exact bytes, and resuming anywhere."""

import copy
import io
import math
import os
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optimzoo.memory import ledger
from optimzoo.modules.replacement import convert, merge
from optimzoo.modules.spectral import SAMPLINGS, SpectralLinear
from optimzoo.optimizers.sst import SST
from tests.cases import loss_of, same, tiny, train, weights
from tests.ranks import every_rank

LAYERS = ("square", "tall", "wide")
QUICK = {"resample_every": 4, "warmup": 2, "lr": 1e-2}


def spectral(seed: int = 0, dtype: torch.dtype = torch.float32, rank: int = 6, **options: object) -> nn.Module:
    model = tiny(seed, dtype)
    assert convert(model, SpectralLinear, match=LAYERS, rank=rank, **options) == list(LAYERS)
    return model


def layers(model: nn.Module) -> list[SpectralLinear]:
    return [m for m in model.modules() if isinstance(m, SpectralLinear)]


def everything(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.state_dict().values()]


class Reference:
    """The paper's loop on one weight, literal, with all vectors in one place and a set of active indices."""

    def __init__(self, weight: Tensor, rank: int, lr: float, every: int, warmup: int, decay: float) -> None:
        self.rank, self.lr, self.every, self.warmup, self.decay = rank, lr, every, warmup, decay
        self.u, self.s, self.v = torch.linalg.svd(weight, full_matrices=False)
        self.rounds = -(-self.s.numel() // rank)
        self.count = 0
        self.moments_of_s = self.fresh(self.s)

    @staticmethod
    def fresh(*like: Tensor) -> list:
        return [0, *(torch.zeros_like(t) for t in like), *(torch.zeros_like(t) for t in like)]

    def adam(self, state: list, grads: list[Tensor]) -> list[Tensor]:
        state[0] += 1
        n, out = len(grads), []
        for i, g in enumerate(grads, 1):
            state[i] = 0.9 * state[i] + 0.1 * g
            state[n + i] = 0.999 * state[n + i] + 0.001 * g * g
            out.append(state[i] / (1 - 0.9 ** state[0]) / ((state[n + i] / (1 - 0.999 ** state[0])).sqrt() + 1e-8))
        return out

    def choose(self, active: list[int]) -> None:
        self.active = active
        self.moments = self.fresh(self.u[:, active], self.v[active])

    def decompose(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        """Take over a decomposition of the same weight: where singular values are zero there is more than one."""
        wanted = torch.linalg.svdvals((self.u * self.s) @ self.v)
        assert (s - wanted).abs().max() < 1e-8
        assert ((u * s) @ v - (self.u * self.s) @ self.v).abs().max() < 1e-8
        for basis in (u.mT, v):
            assert (basis @ basis.mT - torch.eye(len(s))).abs().max() < 1e-12
        self.u, self.s, self.v = u, s, v
        self.moments_of_s = self.fresh(self.s)

    def step(self, g: Tensor) -> None:
        since, draw = self.count % self.every, self.count // self.every
        ramp = min(1, (since + 1) / self.warmup)
        a = self.active
        grads = [g @ self.v[a].mT, self.u[:, a].mT @ g]  # enhanced
        (ds,) = self.adam(self.moments_of_s, [(self.u.mT @ g @ self.v.mT).diagonal()])
        du, dv = self.adam(self.moments, grads)
        ramp_of_s = ramp if draw and draw % self.rounds == 0 else 1
        self.s = ((1 - self.lr * ramp_of_s * self.decay) * self.s - self.lr * ramp_of_s * ds).clamp(min=0)
        self.u[:, a] -= self.lr * ramp * du
        self.v[a] -= self.lr * ramp * dv
        self.u[:, a] /= self.u[:, a].norm(dim=0)
        self.v[a] /= self.v[a].norm(dim=1, keepdim=True)
        self.count += 1


@pytest.mark.parametrize(("m", "n"), [(12, 9), (9, 12)])
def test_follows_the_papers_loop_over_two_rounds(m: int, n: int) -> None:
    model = nn.Sequential(nn.Linear(n, m, bias=False, dtype=torch.float64), nn.Tanh(), nn.Tanh())
    rule = {"lr": 2e-2, "every": 5, "warmup": 3, "decay": 0.1}
    reference = Reference(model[0].weight.detach().clone(), 4, **rule)
    convert(model, SpectralLinear, match="0", rank=4)
    opt = SST(model, lr=2e-2, resample_every=5, warmup=3, weight_decay=0.1)
    layer = model[0]
    x, y = torch.randn(30, n, dtype=torch.float64), torch.randn(30, m, dtype=torch.float64)
    reference.choose(layer.perm[:4].tolist())
    clamped = False
    for step in range(1, 36):
        weight = ((reference.u * reference.s) @ reference.v).requires_grad_()
        (g,) = torch.autograd.grad((x @ weight.mT - y).square().mean(), weight)
        reference.step(g)
        opt.zero_grad()
        (layer(x) - y).square().mean().backward()
        opt.step()
        if step % 15 == 0:  # ceil(9 / 4) draws are a round
            slots = layer.perm.argsort()
            u, v = torch.cat([layer.U_a, layer.U_f], 1), torch.cat([layer.V_a, layer.V_f])
            reference.decompose(u.detach()[:, slots], layer.s.detach()[slots], v.detach()[slots])
        if step % 5 == 0:
            reference.choose(layer.perm[:4].tolist())
        dense = (reference.u * reference.s) @ reference.v
        assert (layer.dense() - dense).abs().max() < 1e-9, step
        assert (layer.s.detach().sort().values - reference.s.sort().values).abs().max() < 1e-9
        clamped |= bool(reference.s.min() == 0)
    assert clamped


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_invariants_after_every_step(sampling: str) -> None:
    model = spectral()
    opt = SST(model, sampling=sampling, **QUICK)
    drawn = 0
    identity = {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
    for step in range(26):
        counts = [int(layer.reselections) for layer in layers(model)]
        before = copy.deepcopy((model, opt))
        train(model, opt, step, step + 1)
        for layer, count, old, place in zip(layers(model), counts, layers(before[0]), range(3), strict=True):
            assert (layer.U_a.norm(dim=0) - 1).abs().max() < 1e-6
            assert (layer.V_a.norm(dim=1) - 1).abs().max() < 1e-6
            assert layer.s.min() >= 0
            fresh = int(layer.reselections) > count
            assert fresh == (step + 1 >= 4 + place and (step + 1 - place) % 4 == 0)
            drawn += fresh
            for p in (layer.U_a, layer.V_a):
                assert all(bool((t == 0).all()) for t in opt.state[p].values()) == fresh
            assert opt.state[layer.s]["reselections"] == layer.reselections
            if fresh and (layer.reselections - 1) % layer.round:
                moved = opt.state[layer.s]["exp_avg_sq"][layer.perm.argsort()]
                assert (moved >= 0.998 * before[1].state[old.s]["exp_avg_sq"][old.perm.argsort()]).all()
    assert drawn == 3 * 6
    assert {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()} == identity


def test_state_of_s_follows_its_value_and_starts_afresh_with_a_decomposition() -> None:
    model = spectral()
    opt = SST(model, **QUICK)
    train(model, opt, 0, 3)
    layer = model.square
    own = opt.state[layer.s]
    tags = torch.arange(1.0, layer.s.numel() + 1)
    own["exp_avg"].copy_(tags)
    own["exp_avg_sq"].copy_(tags * 100)
    values = dict(zip(tags.tolist(), layer.s.tolist(), strict=True))
    opt._draw("square", 1)
    assert not torch.equal(own["exp_avg"], tags)
    assert dict(zip(own["exp_avg"].tolist(), layer.s.tolist(), strict=True)) == values
    assert torch.equal(own["exp_avg_sq"], own["exp_avg"] * 100)
    assert own["step"] == 3
    opt._draw("square", layer.round)
    assert not own["exp_avg"].any()
    assert own["step"] == 0
    assert own["reselections"] == layer.reselections == 3


def test_weights_stay_while_nothing_learns() -> None:
    """Draws, swaps and decompositions over several rounds at learning rate 0 do not move the model."""
    model = spectral()
    before = [layer.dense() for layer in layers(model)]
    train(model, SST(model, lr=0.0, resample_every=2, warmup=1), 0, 30)
    for layer, old in zip(layers(model), before, strict=True):
        assert layer.reselections > 2 * layer.round
        assert (layer.dense() - old).norm() / old.norm() < 1e-6


def test_warmup_scales_vectors_only_and_leaves_lr_to_schedulers() -> None:
    model = spectral(rank=8)  # two draws a round
    opt = SST(model, lr=1e-2, resample_every=8, warmup=4, vector_lr_scale=0.5, stagger=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    for step in range(40):
        scales = {
            m.name: opt.paced(m).route.lr_scale for index in range(len(opt.param_groups)) for m in opt.members(index)
        }
        ramp = min(1, (step % 8 + 1) / 4)
        draw = step // 8
        assert scales["square.U_a"] == scales["wide.V_a"] == 0.5 * ramp
        assert scales["tall.s"] == (ramp if draw in (2, 4) else 1)
        assert scales["embed.weight"] == scales["square.bias"] == 1
        train(model, opt, step, step + 1)
        scheduler.step()
        assert all(math.isclose(group["lr"], 1e-2 / (2 + step)) for group in opt.param_groups)


def test_no_step_decomposes_more_than_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(SpectralLinear, "resvd", lambda layer: calls.append(layer.out_features))
    per_step = []
    model = spectral()
    opt = SST(model, **QUICK)
    for step in range(30):
        calls.clear()
        train(model, opt, step, step + 1)
        per_step.append(len(calls))
    assert max(per_step) == 1
    assert sum(per_step) == 2 * 3
    together = SST(spectral(), stagger=False, **QUICK)
    calls.clear()
    for _ in range(12):
        together.step()
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes(dtype: torch.dtype) -> None:
    rank, width = 6, dtype.itemsize
    model = tiny(0, dtype)
    rest = sum(p.numel() for p in model.parameters()) - sum(model.get_submodule(name).weight.numel() for name in LAYERS)
    sizes = [tuple(model.get_submodule(name).weight.shape) for name in LAYERS]
    convert(model, SpectralLinear, match=LAYERS, rank=rank)
    opt = SST(model)
    full = sum(min(m, n) * (m + n) + min(m, n) for m, n in sizes)
    trained = sum(rank * (m + n) + min(m, n) for m, n in sizes)
    held = ledger(model).by("kind")
    assert held["parameter"] == width * (trained + rest)
    counters = sum(4 * min(m, n) + 8 for m, n in sizes)  # perm and reselections
    assert held["parameter"] + held["buffer"] == width * (full + rest) + counters
    parameters = len(list(model.parameters()))
    for _ in range(3):
        assert opt.memory().total == 2 * width * (trained + rest) + 4 * parameters + width * len(sizes)
        assert opt.memory().slack == 0
        assert opt.memory().by("kind")["first moment"] == width * (trained + rest)
        train(model, opt, 0, 3)
        assert opt.memory_history[-1].state_bytes == opt.memory().total
    assert ledger(model).by("kind")["gradient"] == width * (trained + rest)


def saved(model: nn.Module, opt: SST) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    return file


def loaded(file: io.BytesIO) -> dict:
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_first", [True, False])
def test_resumes_bit_for_bit_anywhere(dtype: torch.dtype, model_first: bool) -> None:
    """Rounds of 3 draws of 4 steps, layers one step apart: step 13 lies between two staggered decompositions."""
    model = spectral(0, dtype)
    opt = SST(model, **QUICK)
    files = {}
    for step in range(30):
        if step in (0, 1, 3, 5, 6, 8, 12, 13, 14, 15, 22, 26):
            files[step] = saved(model, opt)
        train(model, opt, step, step + 1)
    assert [int(layer.reselections) for layer in layers(model)] == [8, 8, 8]
    for step, file in files.items():
        state = loaded(file)
        again = spectral(7, dtype)
        if model_first:
            again.load_state_dict(state["model"])
            other = SST(again, **QUICK)
        else:
            other = SST(again, lr=3.0, resample_every=4, warmup=2)
            again.load_state_dict(state["model"])
        other.load_state_dict(state["opt"])
        train(again, other, step, 30)
        assert same(everything(again), everything(model)), step
        assert all(
            torch.equal(opt.state[p][k], other.state[q][k]) for p, q in pairs(model, again) for k in opt.state[p]
        )


def pairs(a: nn.Module, b: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(a.parameters(), b.parameters(), strict=True))


def test_state_of_another_moment_is_refused() -> None:
    model = spectral()
    opt = SST(model, **QUICK)
    state = copy.deepcopy(opt.state_dict())
    train(model, opt, 0, 9)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"'square' was reselected 3 times and the loaded state is of reselection 1"):
        opt.load_state_dict(state)
    assert str(opt.state_dict()) == str(before)
    with pytest.raises(ValueError, match="load the model's state of the same step first"):
        SST(spectral(), **QUICK).load_state_dict(opt.state_dict())


def test_draws_depend_on_seed_name_and_count_alone() -> None:
    def perms(seed: int, wrap: bool, rng: int) -> list[list[int]]:
        torch.manual_seed(rng)
        model = spectral()
        whole = nn.ModuleDict({"module": model}) if wrap else model
        opt = SST(whole, seed=seed, resample_every=4, warmup=2, lr=0.0)
        state = torch.get_rng_state()
        seen = []
        for _ in range(6):
            opt.step()
            seen.append(model.tall.perm.tolist())
        assert torch.equal(torch.get_rng_state(), state)
        return seen

    assert perms(0, False, 1) == perms(0, True, 2)
    assert perms(0, False, 1) != perms(1, False, 1)


def test_takes_the_model_or_groups_and_the_model() -> None:
    for wrong in (lambda m: m.parameters(), lambda m: [{"params": m.parameters()}], lambda m: 3):
        with pytest.raises(TypeError, match=r"call SST\(model, ...\) or SST\(groups, model=model\)"):
            SST(wrong(spectral()))
    with pytest.raises(
        ValueError, match=r"SST found no SpectralLinear in Tiny: call optimzoo.convert\(model, optimzoo.SpectralLinear"
    ):
        SST(tiny())
    model = spectral()
    with pytest.raises(ValueError, match="no group holds the singular vectors of 'square'"):
        SST([model.square.s, model.embed.weight], model=model)
    with pytest.raises(TypeError, match=r"no option 'resample'.*did you mean 'resample_every'"):
        SST(model, resample=3)
    with pytest.raises(ValueError, match="warmup=20 is longer than resample_every=4"):
        SST(model, resample_every=4)
    twin = spectral()
    a, b = SST(model, **QUICK), SST([{"params": twin.parameters(), "weight_decay": 0.0}], model=twin, **QUICK)
    for group in a.param_groups:
        group["weight_decay"] = 0.0
    train(model, a, 0, 10)
    train(twin, b, 0, 10)
    assert same(weights(model), weights(twin))


def test_groups_and_routes() -> None:
    model = spectral()
    opt = SST(model)
    assert [group["name"] for group in opt.param_groups[:2]] == ["singular vectors", "singular values"]
    routes = {name: (rule, why) for name, _, rule, why, _ in opt.routes()}
    assert routes["wide.U_a"] == ("adamw", "singular vectors")
    assert routes["wide.s"] == ("singularvalues", "singular values")
    assert routes["embed.weight"][0] == routes["head.weight"][0] == routes["wide.bias"][0] == "adamw"
    assert opt.param_groups[0]["weight_decay"] == 0
    assert opt.param_groups[1]["weight_decay"] == 0.01


def test_copies_come_with_their_model() -> None:
    model = spectral()
    opt = SST(model, **QUICK)
    train(model, opt, 0, 5)
    with pytest.raises(TypeError, match=r"copy.deepcopy\(\(model, optimizer\)\) copies both"):
        copy.deepcopy(opt)
    twin, other = copy.deepcopy((model, opt))
    train(model, opt, 5, 14)
    assert not same(everything(model), everything(twin))
    train(twin, other, 5, 14)
    assert same(everything(model), everything(twin))


def test_casting_the_factors_is_refused_by_name() -> None:
    model = spectral()
    opt = SST(model, **QUICK)
    model.to(torch.bfloat16)
    for make in (lambda: SST(model), opt.step):
        with pytest.raises(
            TypeError, match=r"singular vectors of 'square' are torch.bfloat16.*cast the model before conv"
        ):
            make()


def test_models_in_bfloat16_train_with_float32_factors() -> None:
    model = spectral(0, torch.bfloat16)
    opt = SST(model, **QUICK)
    first = train(model, opt, 0, 1)
    assert train(model, opt, 1, 60) < 0.5 * first
    assert model.tall.U_a.dtype == torch.float32


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    model = spectral()
    opt = SST(model, **QUICK | {"resample_every": 50})
    train(model, opt, 0, 2)
    bad = {name: p for name, p in model.named_parameters() if name.startswith("square.")}
    before = {name: p.detach().clone() for name, p in bad.items()}
    for missing in (False, True):
        opt.zero_grad()
        loss_of(model).backward()
        for p in bad.values():
            p.grad = None if missing else p.grad.fill_(math.nan)
        opt.step()
        assert all(torch.equal(p, before[name]) for name, p in bad.items())
    assert opt.skipped() == dict.fromkeys(bad, 1)


def test_frozen_layers_stay() -> None:
    model = tiny()
    model.tall.weight.requires_grad_(False)
    convert(model, SpectralLinear, match=LAYERS, rank=6)
    model.wide.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items() if name.startswith(("tall.", "wide."))}
    opt = SST(model, **QUICK)
    train(model, opt, 0, 20)
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    model.wide.requires_grad_(True)
    train(model, opt, 20, 40)
    assert model.wide.reselections > 0


def test_a_group_added_later_does_not_turn_the_schedule_back() -> None:
    alone, joined = spectral(), spectral()
    counts = []
    for model in (alone, joined):
        opt = SST(model, **QUICK)
        train(model, opt, 0, 15)
        if model is joined:
            opt.add_param_group({"params": [("later", nn.Parameter(torch.zeros(3)))]})
        train(model, opt, 15, 30)
        counts.append([int(layer.reselections) for layer in layers(model)])
        assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True))
    assert counts[0] == counts[1]


def test_trains_and_merges() -> None:
    model = spectral()
    opt = SST(model, lr=1e-2, resample_every=10, warmup=2)
    first = train(model, opt, 0, 1)
    assert train(model, opt, 1, 60) < 0.3 * first
    assert all(layer.reselections > layer.round for layer in layers(model))
    trained = loss_of(model, 3).item()
    assert merge(model) == list(LAYERS)
    assert abs(loss_of(model, 3).item() - trained) < 1e-5


def test_plans_on_fake_tensors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = spectral()
        opt = SST(model, resample_every=1, warmup=1)
        for _ in range(4):
            loss_of(model).backward()
            opt.step()
        planned = opt.memory().total
    real = SST(spectral(), resample_every=1, warmup=1)
    assert planned == real.memory().total


class LowRank(nn.Module):
    """LoRA with alpha = r on a frozen layer."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), a=5**0.5))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + x @ self.a.mT @ self.b.mT


def _student(method: str, seed: int, d: int = 32, rank: int = 4, steps: int = 1000) -> float:
    """Error, as a share of the variance, of a student that a full-rank change separates from its teacher.

    Learning rates are the best of factors of two around them; those of `s` and of vectors were swept apart.
    """
    torch.manual_seed(seed)
    student, teacher = (
        nn.Sequential(nn.Linear(d, d, bias=False), nn.Tanh(), nn.Linear(d, d, bias=False)) for _ in range(2)
    )
    for p, q in pairs(student, teacher):
        nn.init.normal_(p, std=d**-0.5)
        q.data.copy_(0.6 * p + 0.8 * torch.randn_like(p) * d**-0.5)
    if method == "lora":
        student = nn.Sequential(LowRank(student[0], rank), student[1], LowRank(student[2], rank))
    opt: torch.optim.Optimizer
    if method == "sst":
        convert(student, SpectralLinear, match="*", rank=rank)
        every = steps // (5 * d // rank)
        opt = SST(student, lr=7.5e-3, vector_lr_scale=4.0, resample_every=every, warmup=every // 10, weight_decay=0.0)
    else:
        trained = [p for p in student.parameters() if p.requires_grad]
        opt = torch.optim.AdamW(trained, lr=0.02 if method == "adamw" else 0.03, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    gen = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(2048, d, generator=gen)
    y = teacher(x).detach()
    for _ in range(steps):
        batch = torch.randn(64, d, generator=gen)
        opt.zero_grad()
        (student(batch) - teacher(batch).detach()).square().mean().backward()
        opt.step()
        falling.step()
    with torch.no_grad():
        return ((student(x) - y).square().mean() / y.var()).item()


@pytest.mark.long
def test_closes_most_of_the_gap_that_lora_leaves_to_full_rank_training() -> None:
    full, lora, sst = (torch.tensor([_student(how, seed) for seed in range(3)]) for how in ("adamw", "lora", "sst"))
    spread = max(t.max() - t.min() for t in (full, lora, sst))
    assert lora.mean() - full.mean() > 3 * spread  # there is a gap
    assert (lora.mean() - sst.mean()) / (lora.mean() - full.mean()) > 0.8


def _rank(rank: int, file: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = spectral()
    opt = SST(model, **QUICK)
    ddp = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    svd = torch.linalg.svd
    if rank == 1:  # as valid as the other sign, and what another device may well return
        torch.linalg.svd = lambda w, **how: (lambda u, s, v: (-u, s, -v))(*svd(w, **how))
    for step in range(30):  # two rounds and a half
        opt.zero_grad()
        loss_of(ddp, step + rank).backward()
        opt.step()
        mine = torch.cat(
            [t.double().flatten() for t in [*everything(model), *(v for s in opt.state.values() for v in s.values())]]
        )
        both = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        assert torch.equal(*both), step
    assert all(layer.reselections == 8 for layer in layers(model))
    torch.distributed.destroy_process_group()
    os._exit(0)  # DDP's destructor may wait for a gloo thread that waits for the interpreter


def test_two_ranks_stay_bit_identical(tmp_path: object) -> None:
    every_rank(2, _rank, f"{tmp_path}/rendezvous")
