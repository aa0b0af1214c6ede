"""Several parameters as one tensor, and narrow weights through wide copies: what a device does, run on the CPU."""

import pytest
import torch
from torch import Tensor, nn

import optimzoo
from optimzoo.core import AdamW, lists, stacks, storage
from optimzoo.functional import batched
from optimzoo.functional.batched import batch_is_as_alone
from optimzoo.functional.polar import quintic_
from optimzoo.functional.subspace import near_orthonormal, orthonormal
from optimzoo.memory import Workspace
from optimzoo.optimizers import cosmos, swan
from optimzoo.optimizers.cosmos import COSMOS
from optimzoo.optimizers.frugal import FRUGAL
from optimzoo.optimizers.sm3 import SM3
from optimzoo.optimizers.swan import SWAN
from tests.cases import give_gradients, go_the_devices_way, same

PARTS = ("columns", "rows", "randk", "svd", "random", "block")
CASES = {
    "cosmos": (COSMOS, {"rank": 8}),
    "cosmos up": (COSMOS, {"rank": 8, "maximize": True, "nesterov": False}),
    "swan": (SWAN, {}),
    "swan exact": (SWAN, {"backend": "exact"}),
    "sm3": (SM3, {}),
    "sm3 momentum": (SM3, {"momentum": 0.9}),
    **{f"frugal {part}": (FRUGAL, {"projection": part, "update_gap": 3}) for part in PARTS},
    "frugal nothing": (FRUGAL, {"density": 0}),
    "frugal lion": (FRUGAL, {"state_full": "lion"}),
    "frugal sgdm": (FRUGAL, {"state_full": "sgdm", "state_free": "sgd"}),
    "adamw": (AdamW, {}),
}


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    wide, tall = [nn.Linear(48, 32) for _ in range(5)], [nn.Linear(32, 48) for _ in range(2)]
    model = nn.Sequential(*wide, *tall, *(nn.Conv2d(3, 8, 3) for _ in range(4)), nn.LayerNorm(32)).to(dtype)
    for convolution in model[-3:-1]:
        convolution.to(memory_format=torch.channels_last)
    return model


def stepped(case: str, dtype: torch.dtype, poisoned: bool) -> tuple[list[Tensor], dict[str, int], set[str]]:
    """Weights and state after some steps, what was skipped, and kinds of state."""
    cls, options = CASES[case]
    model = model_of(dtype)
    opt = cls(model, lr=1e-2, weight_decay=0.1, **options)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(6):
        give_gradients(model.parameters(), step)
        if poisoned and step in (0, 4):
            next(iter(model.parameters())).grad[0, 0] = float("nan")
        opt.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    state = [t for slots in opt.state.values() for t in slots.values()]
    return [*model.parameters(), *state], opt.skipped(), set(opt.memory().by("kind"))


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_stack_steps_as_each_of_its_parameters(case, dtype, poisoned, monkeypatch):
    go_the_devices_way(monkeypatch)
    for rule in (cosmos, swan):
        monkeypatch.setattr(rule, "product_dtype", lambda t: t.dtype)
    sizes, step = [], stacks.step
    monkeypatch.setattr(stacks, "step", lambda tasks: sizes.append(len(tasks)) or step(tasks))
    monkeypatch.setattr(stacks, "DEVICE_ROOM", 4 * 32 * 48 * 4 * 4)  # three or four of them at a time
    together = stepped(case, dtype, poisoned)
    assert 2 in sizes
    monkeypatch.setattr(stacks, "DEVICE_ROOM", 0)
    sizes.clear()
    alone = stepped(case, dtype, poisoned)
    assert not sizes
    if CASES[case][0].prepare is None and "basis" not in together[2]:
        assert same(together[0], alone[0])
    for a, b in zip(together[0], alone[0], strict=True):  # products of a batch round off other digits
        torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    assert together[1] == alone[1] == ({"0.weight": 2} if poisoned else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cls", "options", "shape"),
    [
        (COSMOS, {}, (64, 64)),
        (COSMOS, {"rank": 32}, (32, 128)),
        (COSMOS, {"rank": 16}, (96, 33)),
        (SWAN, {"backend": "exact"}, (256, 9)),
        (SWAN, {}, (33, 33)),
        (SM3, {"momentum": 0.9}, (65, 31)),
        (FRUGAL, {"projection": "random"}, (31, 65)),
        (FRUGAL, {"projection": "rows", "state_full": "lion"}, (65, 31)),
    ],
)
def test_stacks_of_any_shape_keep_to_the_room(cls, options, shape, dtype, monkeypatch):
    go_the_devices_way(monkeypatch)
    monkeypatch.setattr(stacks, "DEVICE_ROOM", 1 << 20)
    sizes, step = [], stacks.step
    monkeypatch.setattr(stacks, "step", lambda tasks: sizes.append(len(tasks)) or step(tasks))
    named = [(f"w{i}", nn.Parameter(torch.randn(shape).to(dtype))) for i in range(100)]
    opt = cls(named, **options)
    for number in range(2):
        give_gradients([p for _, p in named], number)
        with Workspace() as space:
            opt.step()
    assert max(sizes) > 1
    assert space.peak <= 1 << 20


@pytest.mark.parametrize("case", CASES)
def test_a_plan_for_a_device_knows_the_stacks(case, monkeypatch):
    cls, options = CASES[case]
    model = nn.Sequential(*(nn.Linear(48, 32, bias=False) for _ in range(30)))
    plan = optimzoo.plan(model, lambda model: cls(model, **options), device="xpu")
    go_the_devices_way(monkeypatch)
    monkeypatch.setattr(storage, "_CPU_HAS_BFLOAT16", True)  # the same products on both
    opt, peaks = cls(model, **options), []
    for number in range(3):
        give_gradients(model.parameters(), number)
        with Workspace() as space:
            opt.step()
        peaks.append(space.peak)
    assert plan.workspace == pytest.approx(max(peaks), rel=0.01, abs=64)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_slots_that_a_rule_leaves_alone_are_not_written(mode, monkeypatch):
    go_the_devices_way(monkeypatch)
    written, write = [], stacks._write
    monkeypatch.setattr(stacks, "_write", lambda *args: written.append(args) or write(*args))
    named = [(f"w{i}", nn.Parameter(torch.randn(8, 6))) for i in range(3)]
    opt = FRUGAL(named)
    for number in range(2):  # the first step draws, each for itself
        give_gradients([p for _, p in named], number)
        with mode():
            opt.step()
    assert len(written) == (2 if mode is torch.no_grad else 3)  # both averages, and the part where nothing is known
    assert all(opt.state[p]["exp_avg"].any() for _, p in named)


def test_what_draws_by_chance_or_is_counted_steps_alone(monkeypatch):
    go_the_devices_way(monkeypatch)
    stepped, step = [], stacks.step
    monkeypatch.setattr(stacks, "step", lambda tasks: stepped.append(tasks) or step(tasks))
    for options in ({"state_dtype": "int8"}, {"state_dtype": torch.bfloat16}, {"rounding": "stochastic"}):
        model = nn.Sequential(*(nn.Linear(96, 64, bias=False) for _ in range(3))).to(torch.bfloat16)
        opt = COSMOS(model, rank=8, **options)
        for number in range(3):
            give_gradients(model.parameters(), number)
            opt.step()
    model = nn.Sequential(*(nn.Linear(96, 64, bias=False) for _ in range(3))).to(torch.bfloat16)
    opt = SWAN(model)
    give_gradients(model.parameters(), 0)
    with opt.count_lost():
        opt.step()
    assert not stepped
    opt.step()
    assert stepped, "without these, they would"


@pytest.mark.parametrize(("device", "room"), [(False, 0), (True, 0), (True, 9 * 96), (True, 1 << 28)])
def test_narrow_weights_step_as_wide_ones_do_but_for_their_rounding(device, room, monkeypatch):
    if device:
        go_the_devices_way(monkeypatch)
    monkeypatch.setattr(lists, "PIECE", 96)  # whole lines of the kernel, which rounds what is left over in another way
    monkeypatch.setattr("optimzoo.functional.slices.DEVICE_PIECE", 96)
    monkeypatch.setattr(stacks, "DEVICE_ROOM", room)
    shapes = [(31, 17), (5,), (8, 4, 3)]
    narrow = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
    exact = [nn.Parameter(p.detach().float()) for p in narrow]
    one, two = (AdamW([(f"p{i}", p) for i, p in enumerate(ps)], lr=0.1, weight_decay=0.5) for ps in (narrow, exact))
    for step in range(4):
        give_gradients(narrow, step)
        for p, q in zip(narrow, exact, strict=True):
            q.grad = p.grad.float()
        one.step()
        two.step()
        for p, q in zip(narrow, exact, strict=True):
            q.data = q.data.bfloat16().float()
            assert torch.equal(p, q.bfloat16())
            assert all(torch.equal(t, two.state[q][key]) for key, t in one.state[p].items())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e15])
@pytest.mark.parametrize("decades", [0, 2, 5])
def test_a_followed_basis_is_that_of_reflections(scale, decades):
    """Up to signs, where float32 knows the columns."""
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    h = (vectors * torch.logspace(0, -decades, 40, dtype=torch.float64) * scale) @ vectors.mT
    basis = torch.linalg.qr(torch.randn(40, 6)).Q
    x = (h @ basis.double()).float()
    found, wanted = near_orthonormal(x, basis), orthonormal(x)
    assert torch.allclose(found.mT @ found, torch.eye(6), atol=1e-6)
    assert torch.allclose((found.mT @ wanted).abs(), torch.eye(6), atol=3e-5)
    both = near_orthonormal(torch.stack([x, 2 * x]), torch.stack([basis, basis]))
    assert torch.allclose(both, found.expand_as(both), atol=1e-6)


@pytest.mark.parametrize("kind", ["zero", "rank one", "jump", "low rank", "huge", "subnormal"])
def test_a_followed_basis_stays_one_whatever_comes(kind):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 8)).Q
    left, right = torch.randn(64, 1), torch.randn(1, 8)
    away = left - basis @ (basis.mT @ left)
    x = {
        "zero": torch.zeros(64, 8),
        "rank one": left @ right,
        "jump": basis + 1e12 * (away @ right),
        "low rank": torch.randn(64, 3) @ torch.randn(3, 8),
        "huge": 1e37 * torch.randn(64, 8),
        "subnormal": 1e-41 * torch.randn(64, 8),
    }[kind]
    found = near_orthonormal(x, basis)
    assert torch.allclose(found.mT @ found, torch.eye(8), atol=1e-5)
    if kind == "zero":
        assert torch.allclose(found, basis, atol=1e-6)  # nothing is known, so nothing turns


@pytest.mark.parametrize("info", ["as it is", "0"])
def test_a_basis_is_kept_where_a_decomposition_fails(info, monkeypatch):
    """Also where the library says of NaN that nothing failed, as devices' do; the others in a batch turn."""
    if info == "0":
        factor, nothing = torch.linalg.cholesky_ex, torch.zeros(3, dtype=torch.int32)
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: (factor(a).L, nothing[: a.shape[0]]))
    basis = torch.linalg.qr(torch.randn(3, 16, 4)).Q
    x = torch.randn(3, 16, 4)
    x[1] = float("inf")
    x[2] = float("nan")
    found = near_orthonormal(x, basis)
    assert torch.equal(found[1:], basis[1:])
    assert torch.allclose(found[0], near_orthonormal(x[:1], basis[:1])[0], atol=1e-6)
    assert not torch.allclose(found[0], basis[0], atol=1e-2)


def test_a_first_failure_is_not_forgotten(monkeypatch):
    factor, infos = torch.linalg.cholesky_ex, [1, 0]
    told = lambda a: (factor(a).L, torch.tensor(infos.pop(0), dtype=torch.int32))  # noqa: E731
    monkeypatch.setattr(torch.linalg, "cholesky_ex", told)
    basis = torch.linalg.qr(torch.randn(24, 6)).Q
    assert torch.equal(near_orthonormal(torch.randn(24, 6), basis), basis)
    assert not infos


def test_float64_keeps_its_digits():
    basis = torch.linalg.qr(torch.randn(24, 6, dtype=torch.float64)).Q
    x = 1e-60 * torch.randn(24, 6, dtype=torch.float64)
    assert torch.equal(near_orthonormal(x, basis), orthonormal(x))


@pytest.mark.parametrize("shape", [(3, 33, 45), (45, 33), (2, 64, 40)])
def test_products_on_a_device_have_aligned_rows(shape, monkeypatch):
    x = torch.randn(shape).bfloat16().div_(40)
    wanted = quintic_(x.clone())
    go_the_devices_way(monkeypatch)
    rows, name = [], "addmm" if x.ndim == 2 else "baddbmm"
    add = getattr(torch, name)
    monkeypatch.setattr(
        torch, name, lambda *args, out, **more: rows.append(out.shape[-1]) or add(*args, out=out, **more)
    )
    found = quintic_(x.clone())
    assert found.shape == shape
    last = -(-shape[-1] // 8) * 8
    assert rows[1::2] == [last] * 5  # the products that make x
    torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_trial_finds_the_same_bits_where_they_must_be(threads, monkeypatch):
    """Sums of two terms have one order, and products of two bfloat16 numbers are exact."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batched._tried.cache_clear()
        assert batch_is_as_alone(2, (2, 2), torch.bfloat16, threads)
        batched._tried.cache_clear()
        bmm = torch.bmm
        monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(a, b).nextafter(torch.ones(())))
        assert not batch_is_as_alone(2, (2, 2), torch.bfloat16, threads)
    finally:
        batched._tried.cache_clear()
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(128, 2048), (64, 4096), (168, 294), (128, 128), (100, 260)])
def test_where_a_trial_finds_the_same_bits_products_have_them(shape):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(2, *shape).div_((shape[0] * shape[1]) ** 0.5).bfloat16()
        together = quintic_(x.clone())[-1]
        alone = quintic_(x[-1].clone())
        assert torch.equal(together, alone) or not batch_is_as_alone(2, shape, torch.bfloat16, 2)
    finally:
        torch.set_num_threads(before)
