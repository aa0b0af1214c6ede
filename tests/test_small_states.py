"""Eight-bit state and narrow weights: what is kept, how far it is off, what it costs, and that nothing drifts."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optimzoo.core import AdamW, storage
from optimzoo.core.apply import CHUNK, apply_update
from optimzoo.core.slots import Slot
from optimzoo.functional import quantize
from optimzoo.functional.quantize import BLOCK, blocks, dequantize, quantize_
from optimzoo.functional.random import hash16
from optimzoo.memory import Workspace
from optimzoo.optimizers.cosmos import COSMOS
from optimzoo.optimizers.frugal import FRUGAL
from tests.cases import give_gradients, same, tiny, train, weights

DTYPES = {torch.int8: 127, torch.uint8: 255}
kinds = pytest.mark.parametrize("dtype", DTYPES, ids=["signed", "unsigned"])


def averages(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers over eight decades, as averages of gradients are; squares where they have no sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (4 * torch.rand(n, generator=generator) - 8)
    return x if dtype == torch.int8 else x.square()


def coded(x: Tensor, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(x.shape, dtype=dtype), torch.empty(blocks(x.numel()))
    quantize_(codes, scale, x, seed)
    return codes, scale


# The maths.


@kinds
@pytest.mark.parametrize("shape", [(1,), (BLOCK,), (BLOCK + 1,), (3, 50), (0,), (quantize._CHUNK + 5,), (3, 5, 70)])
def test_every_element_lands_on_a_neighbour_of_its_own(dtype, shape):
    x = averages(torch.Size(shape).numel(), dtype).view(shape)
    codes, scale = coded(x, dtype)
    top, power = DTYPES[dtype], 2 if dtype == torch.int8 else 4
    back = dequantize(codes, scale).double().flatten()
    for start in range(0, x.numel(), BLOCK):
        piece = x.flatten()[start : start + BLOCK].double()
        size = piece.abs().max()
        assert scale[start // BLOCK] == size
        place = (piece.abs() / size) ** (1 / power) * top
        below = ((place - 1e-3).floor() / top) ** power * size
        above = ((place + 1e-3).ceil().clamp(1, top) / top) ** power * size
        got = back[start : start + BLOCK]
        assert (got.abs() >= below * (1 - 1e-5)).all()
        assert (got.abs() <= above * (1 + 1e-5)).all()
        assert (got * piece >= 0).all()


@kinds
def test_the_mean_over_draws_is_the_number(dtype):
    x = averages(BLOCK, dtype)
    draws = torch.stack([dequantize(*coded(x, dtype, seed)).double() for seed in range(3000)])
    off = (draws.mean(0) - x).abs()
    floor = x.max() / 255**4 if dtype == torch.uint8 else 0.0  # below it only upwards
    assert (off <= 5 * draws.std(0) / 3000**0.5 + floor + 1e-6 * x.abs()).all()


def test_zero_stays_zero_and_nothing_else_becomes_it():
    x = torch.tensor([0.0, 1e-38, 1e-20, 1.0])
    assert (dequantize(*coded(x, torch.uint8))[1:] > 0).all()
    assert dequantize(*coded(x, torch.uint8))[0] == 0
    for dtype in DTYPES:
        codes, scale = coded(torch.zeros(300), dtype)
        assert not codes.any()
        assert not scale.any()
        assert not dequantize(codes, scale).any()


@kinds
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_finite_comes_out_of_a_poisoned_block(dtype, poison):
    x = averages(3 * BLOCK, dtype)
    x[BLOCK + 3] = poison
    finite = dequantize(*coded(x, dtype)).isfinite().view(3, BLOCK).all(1)
    assert finite.tolist() == [True, False, True]


@kinds
def test_codes_compile_whole_and_plan_on_fakes(dtype):
    x = averages(500, dtype)
    codes, scale = torch.empty(500, dtype=dtype), torch.empty(blocks(500))

    def there_and_back(x, codes, scale, seed):
        quantize_(codes, scale, x, seed)
        return dequantize(codes, scale)

    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    for seed in (3, 4, 2**62 + 1):
        expected = there_and_back(x, codes.clone(), scale.clone(), seed)
        assert torch.equal(compiled(x, codes, scale, torch.tensor(seed)), expected)
    with FakeTensorMode():
        fake = there_and_back(torch.empty(500), torch.empty(500, dtype=dtype), torch.empty(blocks(500)), 1)
        assert fake.shape == (500,)


def test_an_average_does_not_stand_still(monkeypatch):
    """A second moment that moves by a thousandth a step follows the exact one; rounded to nearest it does not move."""
    target = torch.tensor([1.0, 0.25]).repeat(4 * BLOCK)
    ends = {}
    for draw in ("by chance", "to nearest"):
        if draw == "to nearest":
            monkeypatch.setattr(quantize, "hash16", lambda n, seed, device, first: torch.full((n,), 2**15))
        state = dict(zip(("v", "v_scale"), coded(torch.ones_like(target), torch.uint8), strict=True))
        for step in range(1500):
            opened = storage.open_slot(state, "v", torch.float32).lerp_(target, 2e-3)
            storage.close_slot(state, "v", opened, step)
        ends[draw] = storage.open_slot(state, "v", torch.float32)[1::2].mean().item()
    exact = 0.25 + 0.75 * (1 - 2e-3) ** 1500
    assert abs(ends["by chance"] / exact - 1) < 0.03
    assert ends["to nearest"] == 1


# In the engine.


def test_adamw_in_a_quarter_of_its_bytes():
    wide, small = AdamW([("w", matrix())]), AdamW([("w", matrix())], state_dtype="int8")
    book = small.memory()
    assert book.total <= 0.27 * wide.memory().total
    assert book.slack == 0
    n = 96 * 128
    assert book.by("key") == {
        **{"exp_avg": n, "exp_avg_scale": 4 * n // BLOCK},
        **{"exp_avg_sq": n, "exp_avg_sq_scale": 4 * n // BLOCK, "step": 4},
    }
    assert book.by("kind") == {"first moment": n, "second moment": n, "scale": 8 * n // BLOCK, "counter": 4}


def matrix(shape: tuple[int, ...] = (96, 128), dtype: torch.dtype = torch.float32, scale: float = 1.0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(5)
    return nn.Parameter((torch.randn(shape, generator=generator) * scale).to(dtype))


def test_only_averages_are_coded_and_only_large_ones():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 16))
    opt = COSMOS(model, rank=32, state_dtype="int8")
    found = {key: t.dtype for key, t in opt.state[model[0].weight].items()}
    assert found == {
        **{"momentum": torch.int8, "momentum_scale": torch.float32, "basis": torch.float32, "gram": torch.float32},
        **{"exp_avg_sq": torch.uint8, "exp_avg_sq_scale": torch.float32, "step": torch.float32},
    }
    assert all(t.dtype == torch.float32 for t in opt.state[model[1].weight].values())  # 2048 elements
    opt = FRUGAL(model, state_dtype="int8", density=0.5)
    assert opt.state[model[0].weight]["part"].dtype == torch.int32
    assert opt.state[model[0].weight]["exp_avg"].dtype == torch.int8
    moving = {"m": Slot((100, 100), "first moment", moves=True), "v": Slot((100, 100), "second moment", fill=1.0)}
    assert all(slot.dtype == torch.float32 for slot in storage.stored(moving, torch.float32, "int8").values())


def test_slices_are_whole_blocks_and_workspace_does_not_grow():
    assert CHUNK % BLOCK == 0 == quantize._CHUNK % BLOCK
    peaks = []
    for rows in (3 * CHUNK // 128, 12 * CHUNK // 128):
        p = nn.Parameter(torch.zeros(rows * 128 + 77))
        opt = AdamW([("w", p)], state_dtype="int8", lr=1.0, weight_decay=0.0, betas=(0.0, 0.0))
        give_gradients([p], 1)
        with Workspace() as space:
            opt.step()
        peaks.append(space.peak)
        opened = storage.open_slot(opt.state[p], "exp_avg", torch.float32)
        blockwise = p.grad[:-77].view(-1, BLOCK).abs().amax(1, keepdim=True)
        assert ((opened - p.grad)[:-77].view(-1, BLOCK).abs() <= blockwise * 2 / 127).all()
        far = p.grad.abs() > 1e-3  # from Adam's eps
        assert (p.detach() + p.grad.sign())[far].abs().max() < 1e-3
    assert peaks[0] == peaks[1] < 12 * 4 * CHUNK


@pytest.mark.parametrize("cls", [AdamW, COSMOS], ids=["adamw", "cosmos"])
def test_training_ends_where_wide_state_ends(cls, monkeypatch):
    monkeypatch.setattr(storage, "SMALL", 32)
    losses = {}
    for state_dtype in (None, "int8"):
        runs = []
        for seed in range(2):
            model = tiny(seed)
            opt = cls(model, lr=5e-3, state_dtype=state_dtype)
            train(model, opt, 0, 100)
            runs.append(sum(train(copy.deepcopy(model), NoStep(), s, s + 1) for s in range(4)) / 4)
        losses[state_dtype] = sum(runs) / 2
    assert losses[None] < 0.1
    assert abs(losses["int8"] - losses[None]) < 0.01


class NoStep:
    """Only the loss is wanted."""

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


FORMS = (None, "bfloat16", "int8")


@pytest.mark.parametrize("cls", [AdamW, COSMOS], ids=["adamw", "cosmos"])
@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
def test_a_checkpoint_loads_into_every_form(cls, before, after, monkeypatch):
    monkeypatch.setattr(storage, "SMALL", 32)
    model = tiny()
    opt = cls(model, state_dtype=before, lr=1e-2)
    train(model, opt, 0, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twin = cls(model, state_dtype=after)
    keys = {p: {k: t.dtype for k, t in slots.items()} for p, slots in twin.state.items()}
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert {p: {k: t.dtype for k, t in slots.items()} for p, slots in twin.state.items()} == keys
    for p, slots in opt.state.items():
        for key in storage.slot_names(slots):
            a, b = (storage.open_slot(s, key, torch.float32) for s in (slots, twin.state[p]))
            exact = before == after or after is None
            worst = 0.0 if exact else a.abs().max().item() * (2 / 127 if after == "int8" else 2**-8)
            assert (a - b).abs().max() <= worst, key
    opt.param_groups[0]["state_dtype"] = after  # the same on a running optimizer
    train(model, opt, 3, 4)
    assert opt.state[opt.param_groups[0]["params"][0]].keys() == twin.state[opt.param_groups[0]["params"][0]].keys()


def test_codes_without_scales_are_refused():
    opt = AdamW([("w", matrix())], state_dtype="int8")
    broken = copy.deepcopy(opt.state_dict())
    del broken["state"][0]["exp_avg_scale"]
    with pytest.raises(ValueError, match=r"codes for 'exp_avg' of 'w' without 'exp_avg_scale'"):
        opt.load_state_dict(broken)
    broken = copy.deepcopy(opt.state_dict())
    broken["state"][0]["exp_avg_scale"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"'exp_avg_scale' of 'w' is \(3,\) in the checkpoint and \(96,\) here"):
        opt.load_state_dict(broken)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_keeps_codes_and_errors(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def made():
        model = tiny(width=64, dtype=torch.bfloat16)
        return model, AdamW(model, state_dtype="int8", rounding="error")

    model, opt = made()
    train(model, opt, 0, 3)
    dcp.save({"opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path, no_dist=True)
    fresh, twin = made()
    state = {"opt": get_optimizer_state_dict(fresh, twin)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(fresh, twin, state["opt"])
    for a, b in zip(opt.state.values(), twin.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert {t.dtype for t in opt.state[model.square.weight].values()} == {
        *(torch.int8, torch.uint8, torch.float32, torch.bfloat16)
    }


# Narrow weights.


def walked(rounding: str, layout: str = "rows", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, object]:
    """(weight with its error, the exact path, what was lost) after 200 steps of 1e-4 on weights around 0.5."""
    p = matrix(dtype=dtype, scale=0.1)
    p.data += 0.5
    if layout == "columns":
        p = nn.Parameter(p.detach().T.contiguous().T)
    start = p.detach().double()
    opt = AdamW([("w", p)], lr=1e-4, weight_decay=0.0, rounding=rounding)
    with opt.count_lost() as lost:
        assert opt.memory().total == opt._state_bytes
        for _ in range(200):
            p.grad = torch.ones_like(p)
            opt.step()
    assert opt.memory().total == opt._state_bytes
    error = opt.state[p].get("rounding_error", torch.zeros(()))
    return p.detach().double() + error.double(), start - 200 * 1e-4, lost


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_small_steps_of_bfloat16_weights_add_up(layout):
    """A step of 1e-4 is a twentieth of a unit: lost to nearest, right on average by chance, kept by an error term."""
    near, exact, lost = walked("nearest", layout)
    assert (near - exact).abs().max() > 0.019
    assert lost.share > 0.99
    assert lost.elements()["w"] == round(lost.share * 200 * 96 * 128)
    chance, exact, lost = walked("stochastic", layout)
    assert abs((chance - exact).mean().item()) < 2e-4
    assert (chance - exact).std() < 0.02
    assert 0.5 < lost.share < 0.999
    kept, exact, lost = walked("error", layout)
    assert (kept - exact).abs().max() < 1e-3
    assert lost.share == 0


def test_an_error_term_serves_float16_and_chance_refuses_it():
    kept, exact, lost = walked("error", dtype=torch.float16)
    assert (kept - exact).abs().max() < 1e-4
    assert lost.share == 0
    with pytest.raises(TypeError, match=r"'w' is float16; use rounding='error'"):
        AdamW([("w", matrix(dtype=torch.float16))], rounding="stochastic")


def test_wide_weights_have_nothing_to_round():
    results = []
    for rounding in ("nearest", "stochastic", "error"):
        model = tiny()
        opt = AdamW(model, rounding=rounding)
        with opt.count_lost() as lost:
            train(model, opt, 0, 3)
        assert not lost
        assert lost.share == 0
        results.append((weights(model), opt.memory().total))
    assert all(same(results[0][0], w) and results[0][1] == total for w, total in results)


def test_the_price_of_an_error_term_is_in_the_ledger():
    model = tiny(dtype=torch.bfloat16)
    plain, careful = COSMOS(model).memory(), COSMOS(model, rounding="error").memory()
    assert careful.by("kind")["residual"] == 2 * sum(p.numel() for p in model.parameters())
    assert careful.total - plain.total == careful.by("kind")["residual"]


def test_a_large_weight_is_rounded_in_slices_as_at_once(monkeypatch):
    for name in ("error", "seed"):
        results = []
        for view in (lambda t: t, lambda t: t.T.contiguous().T):  # the second has no line of memory to slice
            w = view(matrix((700, 400), torch.bfloat16).detach())
            extra = {name: torch.zeros(700, 400, dtype=torch.bfloat16) if name == "error" else 3}
            apply_update(w, torch.full((700, 400), 0.3), 1e-3, 0.0, None, False, **extra)
            results.append(w)
        a, b = results
        assert torch.equal(a, b) if name == "error" else abs((a - b).double().mean()) < 1e-4


def test_counting_reads_nothing_and_changes_nothing(monkeypatch):
    results = []
    for count in (False, True):
        model = tiny(dtype=torch.bfloat16)
        opt = AdamW(model, lr=1e-2)
        if count:
            with opt.count_lost() as lost:
                train(model, opt, 0, 4)
            assert set(lost.elements()) == {name for name, _ in model.named_parameters()}
            assert 0 < lost.share < 1
        else:
            train(model, opt, 0, 4)
        results.append(weights(model))
    assert same(*results)
    with FakeTensorMode():  # a read of a tensor would raise here
        model = tiny(dtype=torch.bfloat16)
        opt = AdamW(model, rounding="error", state_dtype="int8")
        with opt.count_lost():
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            opt.step()


def test_a_skipped_step_leaves_weight_and_error_alone(monkeypatch):
    """Half a unit of error, itself rounded, could move a weight by a step of nothing."""
    w = torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)  # odd, so that a tie moves it
    error = torch.tensor([2.0**-8], dtype=torch.bfloat16)
    before = w.clone()
    apply_update(w, torch.ones(1), 0.1, 0.1, torch.tensor(False), False, error=error)
    assert torch.equal(w, before)


def test_two_numbers_from_one_hash_are_as_good_as_one_each():
    drawn = hash16(100_001, 7).double()
    assert drawn.shape == (100_001,)
    assert drawn.min() >= 0
    assert drawn.max() < 2**16
    assert abs(drawn.mean() / 2**16 - 0.5) < 4 * (1 / 12) ** 0.5 / 100_001**0.5
    halves = torch.stack([drawn[:100_000:2], drawn[1::2]])
    assert abs(torch.corrcoef(halves)[0, 1]) < 0.02
    for first, n in ((0, 7), (3, 10), (4, 9), (99_991, 10)):
        assert torch.equal(hash16(n, 7, first=first), drawn[first : first + n].long())
    assert not torch.equal(hash16(1000, 8), hash16(1000, 7))


def test_codes_are_loaded_as_they_are():
    """Not opened and closed again: the largest code of a block need not be the largest there is."""
    opt = AdamW([("w", matrix())], state_dtype="int8")
    state = copy.deepcopy(opt.state_dict())
    state["state"][0]["exp_avg"] = torch.arange(96 * 128).view(96, 128).fmod(7).to(torch.int8)
    state["state"][0]["exp_avg_scale"] = torch.full((96,), 3.0)
    opt.load_state_dict(state)
    held = next(iter(opt.state.values()))
    assert all(torch.equal(t, state["state"][0][key]) for key, t in held.items())
