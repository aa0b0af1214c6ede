"""SFT: Adam and SM3 on entries that move; each fault of the published code (SFT-1 to SFT-16) is a test it fails."""

import copy
import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import optimzoo
from optimzoo.functional import host_kernel, sparse
from optimzoo.memory import Workspace
from optimzoo.modules.delta_file import load_delta, save_delta
from optimzoo.modules.replacement import convert
from optimzoo.modules.sparse_delta import SparseDeltaLinear
from optimzoo.optimizers.sft import SFT
from tests.ranks import every_rank
from tests.reference import sm3 as sm3_reference

GOLDEN = Path(__file__).parent / "golden"
SHORT = {"reselect_every": 8, "accumulate": 3, "total_steps": 40}
both = pytest.mark.parametrize("regrow", ["gradient", "sm3"])


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 24, dtype=dtype), nn.LayerNorm(24, dtype=dtype)
        self.second = nn.Linear(24, 8, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def net(seed: int = 0, dtype: torch.dtype = torch.float32, freeze: bool = True, **budget: float) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net(dtype)
    model.requires_grad_(not freeze)
    convert(model, SparseDeltaLinear, seed=seed, **(budget or {"density": 0.2}))
    return model


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 12, generator=generator)
    return x.to(dtype), torch.sin(x.sum(1, keepdim=True) * torch.arange(1, 9)).to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(step, dtype)
    return (model(x).float() - y.float()).square().mean()


def advance(model: nn.Module, opt: SFT, first: int, last: int, dtype: torch.dtype = torch.float32) -> None:
    for step in range(first, last):
        opt.zero_grad()
        loss_of(model, step, dtype).backward()
        opt.step()


class Fixed:
    """One layer and a loss whose gradient never changes: G (m, n), whatever the values are."""

    def __init__(
        self, m: int = 10, n: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32, **options: object
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(n, m, bias=False, dtype=dtype))
        convert(self.model, SparseDeltaLinear, density=0.1)
        self.layer: SparseDeltaLinear = self.model[0]
        self.x = torch.randn(4, n, generator=generator).to(dtype)
        self.probe = torch.randn(4, m, generator=generator).to(dtype)
        self.gradient = (self.probe.float().T @ self.x.float()).flatten()
        self.opt = SFT(self.model, **(SHORT | {"lr": 1e-3} | options))
        self.p = self.layer.values
        self.clear = self.opt.zero_grad

    def backward(self, share: float = 1.0, factor: Tensor | float = 1.0) -> None:
        ((self.model(self.x) * self.probe).float() * share * factor).sum().backward()

    def run(self, steps: int, micro: int = 1) -> None:
        for _ in range(steps):
            self.clear()
            for _ in range(micro):
                self.backward(1 / micro)
            self.opt.step()

    @property
    def state(self) -> dict[str, Tensor]:
        return self.opt.state[self.p]


def entries(layer: SparseDeltaLinear, state: dict[str, Tensor]) -> dict[int, tuple[float, ...]]:
    """Position -> (value, m, v, age)."""
    columns = [layer.values, state["exp_avg"], state["exp_avg_sq"], state["age"]]
    return dict(zip(layer.indices.tolist(), zip(*(c.tolist() for c in columns), strict=True), strict=True))


# The rules.


def golden_layer(file: str, shape: tuple[int, int], index: np.ndarray, **options: object) -> tuple[nn.Module, SFT]:
    model = nn.Sequential(SparseDeltaLinear(nn.Linear(shape[1], shape[0], bias=False), torch.from_numpy(index)))
    return model, SFT(model, reselect_every=100, accumulate=50, total_steps=100, **options)


def follow(model: nn.Module, opt: SFT, gradients: np.ndarray) -> np.ndarray:
    path = []
    for g in torch.from_numpy(gradients):
        model[0].values.grad = g.clone()
        opt.step()
        path.append(model[0].values.detach().clone().numpy())
    return np.stack(path)


def test_golden_adam() -> None:
    golden = np.load(GOLDEN / "sft_adamw.npz")
    model, opt = golden_layer("sft_adamw", (20, 30), np.arange(0, 600, 10), lr=1e-3, weight_decay=0.1)
    np.testing.assert_allclose(follow(model, opt, golden["g"]), golden["w"], rtol=1e-5, atol=2e-7)


def test_golden_sm3() -> None:
    golden = np.load(GOLDEN / "sm3_sparse.npz")
    shape = tuple(int(side) for side in golden["shape"])
    model, opt = golden_layer("sm3_sparse", shape, golden["idx"], lr=1e-2, regrow="sm3")
    path = follow(model, opt, golden["g"])
    np.testing.assert_allclose(path, golden["w"], rtol=1e-5, atol=2e-8)
    exact, row, col = sm3_reference.entries_trajectory(np.zeros(60), golden["g"], golden["idx"], shape)
    np.testing.assert_allclose(path, exact, rtol=1e-5, atol=2e-8)
    for name, wanted, mine in (("row", golden["row"], row), ("col", golden["col"], col)):
        np.testing.assert_allclose(opt.state[model[0].values][name].numpy(), wanted, rtol=1e-5, atol=2e-8)
        np.testing.assert_allclose(opt.state[model[0].values][name].numpy(), mine, rtol=1e-5)


def test_adam_follows_its_formula_in_float64() -> None:
    index, generator = np.arange(0, 60, 7), np.random.default_rng(0)
    layer = SparseDeltaLinear(nn.Linear(10, 6, bias=False, dtype=torch.float64), torch.from_numpy(index))
    model = nn.Sequential(layer)
    opt = SFT(model, lr=1e-2, weight_decay=0.5, reselect_every=100, accumulate=50, total_steps=100)
    gradients = generator.normal(size=(30, 9)) * 10.0 ** -generator.integers(0, 6, size=(30, 1))
    w, m, v = np.zeros(9), np.zeros(9), np.zeros(9)
    for t, (got, g) in enumerate(zip(follow(model, opt, gradients), gradients, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 1e-2 * (m / (1 - 0.9**t)) / ((np.sqrt(v) + 1e-6) / np.sqrt(1 - 0.999**t))
        w = w * (1 - 1e-2 * 0.5)
        np.testing.assert_allclose(got, w, rtol=1e-11)


def test_ages_stop_before_they_overflow() -> None:
    fixed = Fixed()
    fixed.state["age"].fill_(torch.iinfo(torch.int16).max - 1)
    fixed.run(2)
    assert fixed.state["age"].tolist() == [torch.iinfo(torch.int16).max] * fixed.p.numel()


# The faults of the published code.


def test_sft_1_seeded_entries_take_a_first_step_of_exactly_lr() -> None:
    """Seeding with age a where a + 1 was meant made it 1.045 lr."""
    fixed = Fixed(accumulate=5)
    fixed.run(5)
    born = fixed.state["age"] == 5
    assert born.any()
    assert not fixed.p[born].any()
    before = fixed.p.detach().clone()
    fixed.run(1)
    step = (fixed.p.detach() - before)[born].abs()
    torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-4, atol=0)
    assert (fixed.state["age"][born] == 6).all()


def test_sft_2_every_phase_collects_exactly_accumulate_updates() -> None:
    """All phases but the first were one update longer."""
    fixed = Fixed(reselect_every=7, accumulate=4, total_steps=60)
    for c in range(30):
        collecting = c % 7 < 4
        assert ("candidates" in fixed.state) == collecting, c
        assert (fixed.layer.watched is not None) == collecting, c
        if collecting:
            assert fixed.state["grad_micro"] == c % 7
        assert fixed.layer.reselections == (c + 3) // 7, c
        fixed.run(1)


@pytest.mark.parametrize("micro", [2, 8])
def test_sft_3_seeds_do_not_depend_on_gradient_accumulation(micro: int) -> None:
    """Micro-batch gradients, already divided by their number, were taken for whole ones."""
    whole, split = Fixed(), Fixed()
    whole.run(3)
    split.run(3, micro)
    assert torch.equal(whole.layer.indices, split.layer.indices)
    for key in ("exp_avg", "exp_avg_sq", "age"):
        torch.testing.assert_close(whole.state[key], split.state[key], rtol=1e-5, atol=1e-12)


def test_sft_3_also_when_micro_batches_differ() -> None:
    whole, split = Fixed(m=6, n=6, dtype=torch.float64), Fixed(m=6, n=6, dtype=torch.float64)
    for _ in range(3):
        for fixed, parts in ((whole, [slice(0, 4)]), (split, [slice(0, 3), slice(3, 4)])):
            fixed.opt.zero_grad()
            for part in parts:
                strong = fixed.x.clone()
                strong[:3] *= 100  # the first part alone decides what the candidates are
                (fixed.model(strong[part]) * fixed.probe[part]).sum().backward()
            fixed.opt.step()
    assert torch.equal(whole.layer.indices, split.layer.indices)
    for key in ("exp_avg", "exp_avg_sq", "age"):
        torch.testing.assert_close(whole.state[key], split.state[key], rtol=1e-9, atol=0)


def test_sft_4_ages_advance_with_coarse_weights_and_state() -> None:
    """In bfloat16 the age stayed 1 for ever, and with it the bias correction."""
    fixed = Fixed(dtype=torch.bfloat16, state_dtype=torch.bfloat16, accumulate=7)
    fixed.run(6)
    assert fixed.state["exp_avg"].dtype == torch.bfloat16
    assert fixed.state["age"].dtype == torch.int16
    assert (fixed.state["age"] == 6).all()
    assert fixed.p.dtype == torch.float32
    steps = fixed.p.detach().abs() / 1e-3  # a constant gradient moves an entry by lr an update
    torch.testing.assert_close(steps, torch.full_like(steps, 6.0), rtol=0.02, atol=0)


def reload(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@both
def test_sft_5_resume_at_every_step_is_bit_exact(regrow: str) -> None:
    """A resumed run counted from 0 again, and so replaced and zeroed the whole delta in its first phase."""
    options = {"lr": 1e-2, "regrow": regrow, **SHORT}
    model = net()
    opt = SFT(model, **options)
    saved, path = [], []
    for step in range(23):
        saved.append(reload({"model": model.state_dict(), "opt": opt.state_dict()}))
        advance(model, opt, step, step + 1)
        path.append(copy.deepcopy(model.state_dict()))
    for step, state in enumerate(saved):
        again = net(seed=5)  # other weights, other entries
        resumed = SFT(again, **options)
        again.load_state_dict(state["model"])
        resumed.load_state_dict(state["opt"])
        last = min(step + 10, 23)
        values = {name: t.clone() for name, t in again.state_dict().items()}
        if step > SHORT["accumulate"]:
            advance(again, resumed, step, min(step + SHORT["accumulate"], 23))
            kept = np.isin(again.first.indices.numpy(), values["first.indices"].numpy()).mean()
            assert kept >= 0.75, "the first full replacement ran again"
            advance(again, resumed, min(step + SHORT["accumulate"], 23), last)
        else:
            advance(again, resumed, step, last)
        assert all(torch.equal(again.state_dict()[k], t) for k, t in path[last - 1].items()), step


def test_sft_6_indices_stay_sorted_and_state_follows_its_entry() -> None:
    """New indices were written over dropped ones in place."""
    model = net()
    opt = SFT(model, lr=1e-2, **SHORT)
    for step in range(20):
        advance(model, opt, step, step + 1)
        for layer in (model.first, model.second):
            assert (layer.indices.diff() > 0).all()
    before = entries(model.first, opt.state[model.first.values])
    k = len(before)
    candidates = torch.arange(k, dtype=torch.int32)
    state = opt.state[model.first.values]
    state |= {
        "candidates": candidates,
        "grad_sum": torch.ones(k),
        "grad_sq_sum": torch.ones(k),
        "grad_micro": torch.tensor(3.0),
    }
    group = dict(opt.param_groups[0], step=19)  # the third exchange: a share of 0.2 (1 - 19 / 40)
    with torch.no_grad():
        opt._exchange(model.first.values, model.first, group)
    after = entries(model.first, state)
    assert len(after) == k
    dropped = sorted(before, key=lambda position: abs(before[position][0]))[: int(k * 0.2 * (1 - 19 / 40))]
    assert set(before) - set(after) <= set(dropped)
    assert set(after) - set(before) <= set(candidates.tolist())
    for position in set(before) & set(after):
        assert after[position] == before[position]
    for position in set(after) - set(before):
        assert after[position] == pytest.approx((0.0, (1 - 0.9**3) / 3, (1 - 0.999**3) / 3, 3))


def test_dropped_candidates_that_grow_again_keep_everything() -> None:
    fixed = Fixed(lr=1e-2)
    top = fixed.gradient.abs().topk(fixed.p.numel()).indices
    with torch.no_grad():
        fixed.layer.indices.copy_(top.sort().values)
    fixed.run(2)
    before = entries(fixed.layer, fixed.state)
    fixed.run(1)  # the first exchange drops all and wants the same ones back
    after = entries(fixed.layer, fixed.state)
    assert after.keys() == before.keys()
    assert all(value[3] == 3 and value[0] != 0 for value in after.values())


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for regrow in ("gradient", "sm3"):
        model = net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        opt = SFT(wrapped, lr=1e-2, regrow=regrow, **SHORT)
        for step in range(21):
            opt.zero_grad()
            loss_of(wrapped, 2 * step + rank).backward()
            opt.step()
            if step == 9 and regrow == "gradient":
                sums = {name: t.clone() for name, t in opt.state[model.first.values].items()}
                torch.save(sums, f"{folder}/sums_{rank}.pt")
        torch.save(model.state_dict(), f"{folder}/{regrow}_{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # DDP's destructor may wait for a gloo thread that waits for the interpreter


def test_sft_7_two_ranks_choose_the_same_entries(tmp_path: Path) -> None:
    """Candidates and sums were each rank's own, so the ranks went different ways."""
    every_rank(2, _rank, str(tmp_path))
    for regrow in ("gradient", "sm3"):
        one, two = (torch.load(tmp_path / f"{regrow}_{rank}.pt") for rank in range(2))
        assert all(torch.equal(one[k], two[k]) for k in one)
        assert one["first.reselections"] == 3
    one, two = (torch.load(tmp_path / f"sums_{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert one["grad_micro"] == 2


@both
def test_a_rate_of_zero_keeps_the_random_entries(regrow: str) -> None:
    model = net()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    opt = SFT(model, lr=1e-2, regrow=regrow, rate=0.0, **SHORT)
    advance(model, opt, 0, 20)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert not any("candidates" in state for state in opt.state.values())


@pytest.mark.parametrize("policy", ["linear", "cosine"])
@both
def test_sft_8_the_first_exchange_replaces_every_entry(policy: str, regrow: str) -> None:
    """With the cosine policy the random first entries stayed for good."""
    fixed = Fixed(m=20, n=30, policy=policy, regrow=regrow)
    first = set(fixed.layer.indices.tolist())
    fixed.run(SHORT["accumulate"])
    now = set(fixed.layer.indices.tolist())
    if regrow == "gradient":
        assert now == set(fixed.gradient.abs().topk(len(first)).indices.tolist())
    else:
        assert not now & first
    fixed.run(SHORT["reselect_every"])
    progress = (SHORT["accumulate"] + SHORT["reselect_every"]) / SHORT["total_steps"]
    share = 0.2 * (1 - progress if policy == "linear" else (1 + math.cos(math.pi * progress)) / 2)
    assert len(now - set(fixed.layer.indices.tolist())) <= int(len(first) * share)


def test_sft_9_small_gradients_are_not_lost_in_eps() -> None:
    """1e-8 under SM3's root (or Adam's eps handed on to it) turned gradients of 1e-6 into plain SGD."""
    fixed = Fixed(regrow="sm3", lr=1e-3, eps=1e-3)
    fixed.backward(1e-6)
    fixed.opt.step()
    torch.testing.assert_close(fixed.p.detach().abs(), torch.full_like(fixed.p, 1e-3), rtol=1e-3, atol=0)


def test_sft_10_no_entry_inherits_momentum() -> None:
    """SM3's momentum outlived the entries it belonged to, and its option was swallowed."""
    fixed = Fixed(regrow="sm3")
    assert fixed.state.keys() == {"row", "col", "reselections"}
    with pytest.raises(TypeError, match="no option 'momentum'"):
        Fixed(regrow="sm3", momentum=0.9)


def test_sft_11_density_is_that_of_the_converted_layers() -> None:
    """It counted embeddings, so the layers got several times the density asked for."""
    model = nn.Sequential(nn.Embedding(1000, 20), nn.Linear(20, 50), nn.Linear(50, 20))
    convert(model, SparseDeltaLinear, density=0.05)
    assert sum(m.values.numel() for m in model if isinstance(m, SparseDeltaLinear)) == 100


def test_sft_12_all_layers_are_saved_and_errors_are_sentences(tmp_path: Path) -> None:
    """Undefined names instead of messages, and a configuration of the last layer only."""
    pytest.importorskip("safetensors")
    model = net()
    opt = SFT(model, lr=1e-2, **SHORT)
    advance(model, opt, 0, 5)
    assert save_delta(model, tmp_path / "delta") == ["first", "second"]
    again = net(seed=3)
    for name in ("first", "second"):
        again.get_submodule(name).base.load_state_dict(model.get_submodule(name).base.state_dict())
    load_delta(again, tmp_path / "delta")
    assert torch.equal(again(batch(0)[0]), model(batch(0)[0]))
    with pytest.raises(ValueError, match="SFT: state_dtype='auto'"):
        SFT(model, state_dtype="auto", **SHORT)
    with pytest.raises(ValueError, match="SFT: regrow='gradients'"):
        SFT(model, regrow="gradients", **SHORT)


@both
def test_sft_13_exchanges_hold_no_matrix(regrow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four masks of the weight's size or 25 bytes for each of its elements; at conversion a dense layer and draw."""
    monkeypatch.setattr(sparse, "BLOCK", 1 << 15)
    m = n = 1024
    linear = nn.Linear(n, m, bias=False)
    with Workspace() as space:
        model = nn.Sequential(linear)
        convert(model, SparseDeltaLinear, density=0.005)
    assert space.peak < 0.25 * 4 * m * n
    opt = SFT(model, regrow=regrow, reselect_every=4, accumulate=1, total_steps=40)
    x = torch.randn(8, n)
    for step in range(6):
        y = model(x)
        with Workspace() as space:
            (y * x).sum().backward()
        assert space.peak < 0.3 * 4 * m * n, step
        with Workspace() as space:
            opt.step()
        assert space.peak < 0.3 * 4 * m * n, step
    assert model[0].reselections == 2


def test_sft_15_no_kernel_is_shipped_that_nothing_builds() -> None:
    """A file was, for CUDA; there is one kernel here, which is compiled when it is asked for."""
    files = {path for path in Path(optimzoo.__file__).parent.rglob("*") if path.suffix in (".cu", ".cpp", ".c", ".cuh")}
    assert files == {host_kernel.SOURCE}


def test_sft_16_sums_of_many_bfloat16_gradients_are_exact() -> None:
    """In bfloat16 the counter stopped at 256 of 640 micro-batches: age 2 for 5, mean gradient 2.5 times too large."""
    fixed = Fixed(dtype=torch.bfloat16, accumulate=5)
    fixed.run(5, micro=64)
    born = fixed.state["age"] == 5
    assert born.all()
    exact = fixed.gradient[fixed.layer.indices.long()]
    torch.testing.assert_close(fixed.state["exp_avg"] / (1 - 0.9**5), exact, rtol=5e-3, atol=0)
    torch.testing.assert_close(fixed.state["exp_avg_sq"] / (1 - 0.999**5), exact**2, rtol=1e-2, atol=0)


# What comes between backward and step.


def test_a_loss_scale_and_clipping_reach_the_sums() -> None:
    plain, scaled, clipped = Fixed(), Fixed(), Fixed()
    for _ in range(3):
        for fixed in (plain, scaled, clipped):
            fixed.opt.zero_grad()
            fixed.backward(factor=1024.0 if fixed is scaled else 1.0)
        scaled.p.grad.div_(1024)
        clipped.p.grad.mul_(0.25)
        for fixed in (plain, scaled, clipped):
            fixed.opt.step()
    for key, factor in (("exp_avg", 0.25), ("exp_avg_sq", 0.0625)):
        torch.testing.assert_close(scaled.state[key], plain.state[key], rtol=1e-5, atol=0)
        torch.testing.assert_close(clipped.state[key], plain.state[key] * factor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("by_model", [False, True])
@pytest.mark.parametrize("before", [0, 1])
def test_what_no_step_used_is_dropped(before: int, by_model: bool) -> None:
    fixed, clean = Fixed(), Fixed()
    if by_model:  # as trainers do
        fixed.clear = fixed.model.zero_grad
    fixed.run(before)
    fixed.clear()
    other = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    (fixed.model(other) * fixed.probe).sum().backward()  # a step that a loss scaler skips
    fixed.run(3 - before)
    clean.run(3)
    assert torch.equal(fixed.layer.indices, clean.layer.indices)
    torch.testing.assert_close(fixed.state["exp_avg"], clean.state["exp_avg"])
    assert torch.equal(fixed.state["age"], clean.state["age"])


def test_a_layer_that_is_used_twice_in_a_pass_sums_both() -> None:
    once, twice = Fixed(), Fixed()
    for fixed in (once, twice):
        fixed.clear = fixed.model.zero_grad
    once.run(2)
    for _ in range(2):
        twice.clear()
        sum(((twice.model(twice.x) * twice.probe) * share).sum() for share in (0.25, 0.75)).backward()
        twice.opt.step()
    torch.testing.assert_close(twice.state["grad_sum"], once.state["grad_sum"])


@pytest.mark.parametrize("at", [0, 1])
def test_a_gradient_that_is_not_finite_counts_for_nothing(at: int) -> None:
    fixed = Fixed()
    for step in range(3):
        fixed.opt.zero_grad()
        fixed.backward(factor=float("nan") if step == at else 1.0)
        fixed.opt.step()
    assert fixed.opt.skipped() == {"0.values": 1}
    assert torch.equal(fixed.layer.indices.long(), fixed.gradient.abs().topk(fixed.p.numel()).indices.sort().values)
    exact = fixed.gradient[fixed.layer.indices.long()]
    new = fixed.p == 0
    torch.testing.assert_close(fixed.state["exp_avg"][new], (exact * (1 - 0.9**2))[new], rtol=1e-5, atol=0)
    assert (fixed.state["age"] == 2).all()


@both
def test_a_layer_without_gradients_keeps_its_entries(regrow: str) -> None:
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]).requires_grad_(False)
    convert(model, SparseDeltaLinear, density=0.2)
    opt = SFT(model, regrow=regrow, **SHORT)
    before = [layer.indices.clone() for layer in model]
    for _ in range(4):
        opt.zero_grad()
        model[0](torch.randn(3, 6)).square().sum().backward()
        opt.step()
    assert not torch.equal(model[0].indices, before[0])
    assert torch.equal(model[1].indices, before[1])


def test_maximize_of_the_negated_loss_is_the_same() -> None:
    one, two = Fixed(), Fixed(maximize=True)
    for _ in range(6):
        for fixed, sign in ((one, 1.0), (two, -1.0)):
            fixed.opt.zero_grad()
            fixed.backward(sign)
            fixed.opt.step()
    assert torch.equal(one.p, two.p)
    assert torch.equal(one.layer.indices, two.layer.indices)


# Bytes.


def held(model: nn.Module, opt: SFT) -> dict[str, float]:
    """Bytes an entry of what training adds to the frozen model, gradients included; `opt` alone beside it."""
    layers = [m for m in model.modules() if isinstance(m, SparseDeltaLinear)]
    k = sum(layer.values.numel() for layer in layers)
    book = opt.memory()
    assert book.slack == 0
    delta = sum(t.nbytes for layer in layers for t in (layer.values, layer.indices, layer.reselections))
    gradient = sum(layer.values.grad.nbytes for layer in layers)
    watches = [layer.watched for layer in layers if layer.watched is not None]
    sums = sum(t.nbytes for watch in watches for t in (watch.sums, watch.raw) if t is not None)
    return {"all": (delta + gradient + sums + book.total) / k, "opt": book.total / k}


def test_bytes_an_entry() -> None:
    """Gradient regrowth: 22 outside of a phase, 38 in it; SM3: 12 and the row and column accumulators."""
    m = n = 512
    for regrow in ("gradient", "sm3"):
        model = nn.Sequential(nn.Linear(n, m, bias=False)).requires_grad_(False)
        convert(model, SparseDeltaLinear, density=0.25)
        k = model[0].values.numel()
        small = 200 / k  # counters and the sixteen sums that stand for the gradient
        opt = SFT(model, regrow=regrow, reselect_every=4, accumulate=2, total_steps=40)
        for step in range(8):
            opt.zero_grad()
            model(torch.randn(2, n)).square().sum().backward()
            bytes_ = held(model, opt)
            if regrow == "sm3":
                assert bytes_["all"] <= 12 + 4 * (m + n) / k + small
            elif step % 4 < 2:
                assert bytes_["all"] <= 38 + small
                assert bytes_["opt"] <= 22 + small
            else:
                assert bytes_["all"] <= 22 + small
                assert bytes_["opt"] <= 10 + small
            opt.step()
            assert opt.memory_history[-1].state_bytes == opt.memory().total


@both
def test_bytes_planned_on_fake_tensors_are_those_measured(regrow: str) -> None:
    def totals() -> list[int]:
        model = net()
        opt, found = SFT(model, regrow=regrow, **SHORT), []
        for _ in range(12):
            opt.zero_grad()
            model(torch.ones(4, 12)).sum().backward()
            opt.step()
            found.append(opt.memory().total)
        return found

    real = totals()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert totals() == real


# The interface.


def test_takes_the_model_or_groups_with_it() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"SFT\(model, ...\) or SFT\(groups, model=model\)"):
        SFT(model.parameters(), **SHORT)
    with pytest.raises(TypeError, match="total_steps"):
        SFT(model, lr=1e-3)
    with pytest.raises(ValueError, match="accumulate=8 must be less than reselect_every=8"):
        SFT(model, total_steps=10, reselect_every=8, accumulate=8)
    with pytest.raises(ValueError, match="convert"):
        SFT(Net(), **SHORT)
    with pytest.raises(TypeError, match="bfloat16"):
        SFT(net().to(torch.bfloat16), **SHORT)
    with pytest.raises(ValueError, match="no values"):
        SFT([nn.Parameter(torch.ones(3))], model=model, **SHORT)
    groups = [{"params": [model.first.values], "lr": 1e-2}, {"params": [model.second.values]}]
    opt, other = SFT(groups, lr=1e-2, model=model, **SHORT), net()
    plain = SFT(other, lr=1e-2, **SHORT)
    advance(model, opt, 0, 14)
    advance(other, plain, 0, 14)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_rest_of_the_model_is_frozen_or_adamw() -> None:
    frozen = net()
    before = {k: t.clone() for k, t in frozen.state_dict().items() if "values" not in k}
    opt = SFT(frozen, lr=1e-2, total_steps=40)
    assert [g["name"] for g in opt.param_groups] == ["deltas"]
    advance(frozen, opt, 0, 3)
    assert all(torch.equal(frozen.state_dict()[k], t) for k, t in before.items())
    model = net(freeze=False)
    opt = SFT(model, lr=1e-2, weight_decay=10.0, fallback_lr_scale=0.5, **SHORT)
    assert {row[0]: row[2] for row in opt.routes()} == {
        "first.values": "collecting",
        "second.values": "collecting",
        "norm.weight": "adamw",
        "norm.bias": "adamw",
    }
    twin = copy.deepcopy(model.norm)
    adamw = torch.optim.AdamW(twin.parameters(), lr=5e-3, weight_decay=0.0)
    loss_of(model, 0).backward()
    twin.weight.grad, twin.bias.grad = model.norm.weight.grad.clone(), model.norm.bias.grad.clone()
    opt.step()
    adamw.step()
    torch.testing.assert_close(model.norm.weight, twin.weight)
    torch.testing.assert_close(model.norm.bias, twin.bias)


def test_state_of_other_entries_is_refused() -> None:
    model = net()
    opt = SFT(model, lr=1e-2, **SHORT)
    start = copy.deepcopy(model.state_dict())
    advance(model, opt, 0, 4)
    state = opt.state_dict()
    model.load_state_dict(start)
    with pytest.raises(ValueError, match=r"'first' was reselected 0 times .* reselection 1"):
        opt.load_state_dict(state)


@both
def test_copies_of_model_and_optimizer_go_on_alike(regrow: str) -> None:
    model = net()
    opt = SFT(model, lr=1e-2, regrow=regrow, **SHORT)
    advance(model, opt, 0, 9)
    other, copied = copy.deepcopy((model, opt))
    advance(model, opt, 9, 15)
    advance(other, copied, 9, 15)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(TypeError, match="copies both"):
        copy.deepcopy(opt)


def test_no_global_random_number_is_drawn() -> None:
    model = net()
    opt = SFT(model, lr=1e-2, **SHORT)
    before = torch.get_rng_state()
    advance(model, opt, 0, 6)
    assert torch.equal(torch.get_rng_state(), before)


@both
def test_learns(regrow: str) -> None:
    model = net()
    opt = SFT(model, lr=2e-2 if regrow == "gradient" else 1e-1, regrow=regrow, total_steps=200)
    start = sum(loss_of(model, step).item() for step in range(8))
    for step in range(200):
        opt.zero_grad()
        loss_of(model, step % 8).backward()
        opt.step()
    assert sum(loss_of(model, step).item() for step in range(8)) < 0.7 * start
