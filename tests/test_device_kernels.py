"""FRUGAL's and SM3's kernels for devices, run by Triton's interpreter: their arithmetic, flags, and where they step."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import optimzoo
from optimzoo.core import ZooOptimizer
from optimzoo.functional import adamw_kernel, cover_kernel, device_kernels, part_kernel
from optimzoo.functional.cover import sm3_shapes, sm3_update
from optimzoo.functional.projection import put_, take
from optimzoo.optimizers.frugal import FRUGAL
from optimzoo.optimizers.sm3 import SM3
from tests.cases import compiled_for_a_device, give_gradients, go_the_devices_way, same

pytest.importorskip("triton", reason="Triton is made for Linux alone")

TRIALS = {
    "adamw": (adamw_kernel, "trial"),
    "lines": (part_kernel, "trial"),
    "parts": (part_kernel, "trial_of_parts"),
    "covers": (cover_kernel, "trial"),
}
SHAPES = [
    (4, part_kernel.COLUMNS),
    (1, 1),
    (part_kernel.ROWS + 3, part_kernel.COLUMNS + 16),
    (7, part_kernel.COLUMNS + 5),
    (part_kernel.ROWS + 1, 1),
    (2, 40),
]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
ULP = {torch.float32: 2e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the interpreter cuts bfloat16 off


class Options(part_kernel.Options):
    """Numbers that show in every digit."""

    def __new__(cls, **given):
        return super().__new__(cls, **{"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6} | given)


def noise(shapes: list[tuple[int, ...]], dtype: torch.dtype, offset: int = 0) -> list[Tensor]:
    """Tensors `offset` elements behind an address from which vectors can be read."""
    return [torch.randn(torch.Size(s).numel() + offset).to(dtype)[offset:].view(s) for s in shapes]


def parts(kind: str, density: float = 0.4) -> list[Tensor]:
    sizes = [shape[0 if kind == "rows" else 1] for shape in SHAPES]
    return [torch.randperm(n)[: max(1, int(density * n))].sort().values.to(torch.int32) for n in sizes]


@pytest.mark.parametrize(("offset", "lr", "maximize"), [(0, 0.01, False), (1, torch.tensor(0.01), True)])
@pytest.mark.parametrize(("w_dtype", "g_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("kind", "free"), [("rows", "sign"), ("columns", "sgd"), ("columns", "none"), ("rows", "none")]
)
def test_parts_step_as_written_down_in_float64(kind, free, w_dtype, g_dtype, offset, lr, maximize):
    ws, gs, index = noise(SHAPES, w_dtype, offset), noise(SHAPES, g_dtype, offset), parts(kind)
    lows = [take(w.float(), part, kind).shape for w, part in zip(ws, index, strict=True)]
    first, second = noise(lows, torch.float32, offset), [t.abs() for t in noise(lows, torch.float32, offset)]
    before = [[t.clone() for t in tensors] for tensors in (ws, gs, first, second)]
    found_inf = torch.tensor([0.0, 0, 0, 1, 0, 0])
    h = Options(state_free=free, state_free_lr_scale=0.5, maximize=maximize)
    part_kernel.step_(ws, gs, h, lr, found_inf, kind, part_kernel.Averages(index, first, second, 7.0))
    assert same(gs, before[1]), "gradients are not written"
    for i, part in enumerate(index):
        new, old = [tensors[i] for tensors in (ws, first, second)], [tensors[i] for tensors in before]
        if found_inf[i]:
            assert same(new, [old[0], *old[2:]])
            continue
        w, g, m, v = (t.double() for t in old)
        g = -g if maximize else g
        low = take(g, part, kind)
        m, v = 0.8 * m + (1 - 0.8) * low, 0.95 * v + (1 - 0.95) * low**2
        u = {"sign": g.sign(), "sgd": g, "none": 0 * g}[free] * 0.5
        u = put_(u, part, m / (1 - 0.8**7) / ((v / (1 - 0.95**7)).sqrt() + 1e-6), kind)
        wanted = (1 - 0.01 * 0.3) * w - 0.01 * u, m, v
        for got, want, digits in zip(new, wanted, (ULP[w_dtype], 2e-7, 2e-7), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2 * digits, atol=2 * digits)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("w_dtype", "g_dtype"), DTYPES)
@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
def test_the_plain_rule_steps_tensors_of_any_shape(free, w_dtype, g_dtype, offset):
    shapes = [(part_kernel.LINE,), (3,), (5, 2, 300), (2 * part_kernel.LINE + 1,), (0,), (1,)]
    ws, gs = noise(shapes, w_dtype, offset), noise(shapes, g_dtype, offset)
    before = [w.clone() for w in ws]
    gs[1][0] = 0.0
    h = Options(state_free=free, state_free_lr_scale=0.5)
    part_kernel.step_(ws, gs, h, 0.01, torch.tensor([0.0, 0, 0, 0, 0, 1]))
    for i, (w, g) in enumerate(zip(before, gs, strict=True)):
        u = {"sign": g.sign(), "sgd": g, "none": 0 * g}[free].double() * 0.5
        wanted = w.double() if i == 5 else (1 - 0.01 * 0.3) * w.double() - 0.01 * u
        torch.testing.assert_close(ws[i].double(), wanted, rtol=2 * ULP[w_dtype], atol=2 * ULP[w_dtype])


def test_places_that_are_none_are_left_alone():
    """Not every checkpoint is to be trusted: nothing is written beside a matrix and its averages, whatever it says."""
    wild = torch.tensor([-5, 2, 2, 900, 2**31 - 1], dtype=torch.int32)
    for kind, shape in (("rows", (5, 30)), ("columns", (20, 5))):
        around = [torch.full((20 * 30 + 64,), 7.0) for _ in range(4)]
        w, g, m, v = (
            t[32 : 32 + torch.Size(s).numel()].view(s)
            for t, s in zip(around, ((20, 30), (20, 30), shape, shape), strict=True)
        )
        part_kernel.step_([w], [g], Options(), 0.1, None, kind, part_kernel.Averages([wild], [m], [v], 1.0))
        assert all((t[:32] == 7).all() for t in around)
        assert all((t[32 + inner.numel() :] == 7).all() for t, inner in zip(around, (w, g, m, v), strict=True))


@pytest.mark.parametrize(("offset", "lr", "maximize"), [(0, 0.01, False), (1, torch.tensor(0.01), True)])
@pytest.mark.parametrize(("w_dtype", "g_dtype"), DTYPES)
def test_covers_step_as_written_down_in_float64(w_dtype, g_dtype, offset, lr, maximize):
    ws, gs = noise(SHAPES, w_dtype, offset), noise(SHAPES, g_dtype, offset)
    slices = [t.abs() for t in noise([(sum(shape),) for shape in SHAPES], torch.float32, offset)]
    before = [[t.clone() for t in tensors] for tensors in (ws, gs, slices)]
    found_inf = torch.tensor([0.0, 0, 1, 0, 0, 0])
    cover_kernel.step_(ws, gs, cover_kernel.Options(1e-3, 0.3, maximize), lr, found_inf, slices)
    assert same(gs, before[1]), "gradients are not written"
    for i, (m, n) in enumerate(SHAPES):
        w, g, old = (tensors[i].double() for tensors in before)
        if found_inf[i]:
            assert same([ws[i], slices[i]], [before[0][i], before[2][i]])
            continue
        row, column = old.split((m, n))
        accumulators = [t.view(size) for t, size in zip((row, column), sm3_shapes((m, n)), strict=True)]
        nu = sm3_update(g, accumulators)
        wanted = (1 - 0.01 * 0.3) * w - 0.01 * (-g if maximize else g) / (nu + 1e-3).sqrt()
        torch.testing.assert_close(ws[i].double(), wanted, rtol=2 * ULP[w_dtype], atol=2 * ULP[w_dtype])
        torch.testing.assert_close(slices[i].double(), torch.cat([row, column]), rtol=4e-7, atol=0)


@pytest.fixture
def tried(monkeypatch):
    """As after trials that found nothing: they have a test of their own."""
    monkeypatch.setattr(device_kernels, "_fault", lambda *args: "")


METHODS = {
    "columns": (FRUGAL, {}, part_kernel),
    "rows": (
        FRUGAL,
        {"projection": "rows", "density": 0.5, "state_free": "sgd", "state_free_lr_scale": 0.3},
        part_kernel,
    ),
    "blocks": (FRUGAL, {"projection": "block", "density": 0.4}, part_kernel),
    "density 0": (FRUGAL, {"density": 0.0, "maximize": True}, part_kernel),
    "sm3": (SM3, {}, cover_kernel),
}


@pytest.mark.parametrize(
    ("dtype", "poisoned"),
    [(torch.float32, True), (torch.float32, False), (torch.float16, True), (torch.float64, False)],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_device_with_kernels_steps_as_one_without(method, dtype, poisoned, tried, monkeypatch):
    """Some at a time and the rest after them; float64 is PyTorch's in any case."""
    cls, options, kernel = METHODS[method]
    calls, step_ = [], kernel.step_
    monkeypatch.setattr(kernel, "step_", lambda ws, *rest: calls.append(len(ws)) or step_(ws, *rest))
    found = []
    for device in ("cuda", "xpu"):
        go_the_devices_way(monkeypatch, device)
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(n, m, bias=i == 0) for i, (m, n) in enumerate([(24, 16), (24, 24), (33, 24)]))
        )
        model = model.to(dtype)
        own = {} if cls is SM3 else {"update_gap": 3}
        opt = cls(model, lr=1e-2, weight_decay=0.1, **own, **options)
        for number in range(6):
            give_gradients(model.parameters(), number)
            if poisoned and number in (1, 4):
                model[0].weight.grad[0, 0] = float("inf")
            opt.step()
        kept = [t for slots in opt.state.values() for t in slots.values()]
        found.append(([*model.parameters(), *kept], opt.skipped()))
    (ours, skipped), (theirs, also) = found
    assert bool(calls) == (dtype != torch.float64)
    assert skipped == also == ({"0.weight": 2} if poisoned else {})
    digits = 2**-8 if dtype == torch.float16 else 1e-6
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=digits, atol=digits)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (FRUGAL, {"state_full": "lion"}),
        (FRUGAL, {"state_full": "sgdm", "projection": "rows"}),
        (FRUGAL, {"projection": "randk"}),
        (FRUGAL, {"projection": "svd"}),
        (SM3, {"momentum": 0.9}),
    ],
)
def test_what_they_do_not_know_steps_as_on_other_devices(cls, options, tried, monkeypatch):
    found = []
    for device in ("cuda", "xpu"):
        go_the_devices_way(monkeypatch, device)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Linear(16, 24, bias=False))
        opt = cls(model, lr=1e-2, **options)
        for number in range(3):
            give_gradients(model.parameters(), number)
            opt.step()
        found.append([*model.parameters()])
    assert same(*found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"rounding": "error"}, {"rounding": "stochastic"}])
def test_weights_that_are_rounded_otherwise_are_not_theirs(method, options, tried, monkeypatch):
    go_the_devices_way(monkeypatch, "cuda")
    cls, own, kernel = METHODS[method]
    monkeypatch.setattr(kernel, "step_", None)
    model = nn.Linear(24, 16, bias=False).to(torch.bfloat16)
    before, opt = model.weight.detach().clone(), cls(model, **own, **options)
    for number in range(2):
        give_gradients(model.parameters(), number)
        opt.step()
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("method", METHODS)
def test_what_rounding_swallows_is_counted_without_them(method, tried, monkeypatch):
    go_the_devices_way(monkeypatch, "cuda")
    cls, own, _ = METHODS[method]
    model = nn.Linear(24, 16, bias=False).to(torch.bfloat16)
    opt = cls(model, lr=1e-5, **own)
    give_gradients(model.parameters(), 0)
    opt.step()
    with opt.count_lost() as lost:
        opt.step()
    assert 0 < lost.share <= 1


class Other(Tensor):
    """A subclass, whose values might be elsewhere."""


def test_a_way_that_is_remembered_changes_with_what_it_depends_on(tried, monkeypatch):
    """A member's way through the engine is found once, and again when its gradient or its slots are of another kind."""
    go_the_devices_way(monkeypatch, "cuda")
    calls, step_ = [], part_kernel.step_
    monkeypatch.setattr(part_kernel, "step_", lambda ws, *rest: calls.append(len(ws)) or step_(ws, *rest))
    w = nn.Parameter(torch.randn(24, 16))
    opt = FRUGAL([("w", w)])

    def stepped(g: Tensor) -> bool:
        calls.clear()
        w.grad = g
        before = w.detach().clone()
        opt.step()
        assert not torch.equal(before, w)
        return bool(calls)

    assert not stepped(torch.randn(24, 16)), "the part is drawn"
    assert stepped(torch.randn(24, 16))
    assert not stepped(torch.randn(16, 24).mT)
    assert stepped(torch.randn(24, 16))
    assert not stepped(torch.randn(24, 16).as_subclass(Other))
    assert stepped(torch.randn(24, 16))
    state = opt.state[w]
    state["exp_avg"] = state["exp_avg"].mT.contiguous().mT
    assert not stepped(torch.randn(24, 16))
    state["exp_avg"] = state["exp_avg"].contiguous()
    assert stepped(torch.randn(24, 16))
    monkeypatch.setattr("optimzoo.core.engine.capturing", lambda: True)
    monkeypatch.setattr("optimzoo.functional.device_kernels.capturing", lambda: True)
    assert not stepped(torch.randn(24, 16))


@pytest.mark.parametrize("cls", [FRUGAL, SM3])
def test_autograd_notices_a_step_between_forward_and_backward(cls, tried, monkeypatch):
    go_the_devices_way(monkeypatch, "cuda")
    w = nn.Parameter(torch.randn(8, 8))
    opt = cls([("w", w)])
    for _ in range(2):
        w.grad = torch.ones(8, 8)
        loss = (w * w).sum()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("columns", [32, 31])
@pytest.mark.parametrize("odd", [None, 0, 1, 2, 3])
def test_tables_say_what_may_be_read_as_vectors(odd, columns):
    """All lines begin at multiples: of weights, gradients and averages. Accumulators and places are read one by one."""

    def one(at: int, shape: tuple[int, ...]) -> Tensor:
        return noise([shape], torch.float32, int(odd == at))[0]

    w, g, places = one(0, (8, columns)), one(1, (8, columns)), torch.arange(4, dtype=torch.int32)
    averages = part_kernel.Averages([places], [one(2, (4, columns))], [one(3, (4, columns))], 1.0)
    whole = columns == 32
    assert part_kernel._table([w], [g], averages)[0][0, 1] == (whole and odd is None)
    assert part_kernel._table([w], [g], None)[0][0, 1] == (odd not in (0, 1))
    slices = [torch.zeros(8 + columns)]
    assert cover_kernel._table([w], [g], slices, slices)[0][0, 1] == (whole and odd not in (0, 1))


def test_a_parameter_that_becomes_another_type_is_asked_again(tried, monkeypatch):
    go_the_devices_way(monkeypatch, "cuda")
    w = nn.Parameter(torch.ones(4, 4))
    opt = FRUGAL([("w", w)], density=0.0, lr=0.5)
    w.grad = torch.ones(4, 4)
    opt.step()
    monkeypatch.setattr(part_kernel, "step_", None)
    torch.utils.swap_tensors(w, nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4))))
    w.grad = TwoTensor(torch.ones(4, 4), torch.ones(4, 4))
    opt.step()
    assert (w.a == 0.5).all()


@pytest.mark.parametrize("name", TRIALS)
def test_a_kernel_that_makes_nan_is_told(name, monkeypatch):
    module, trial = TRIALS[name]
    step_ = module.step_

    def broken(ws: list[Tensor], *args, **more) -> None:
        step_(ws, *args, **more)
        ws[0].view(-1)[0] = float("nan")

    monkeypatch.setattr(module, "step_", broken)
    assert "torch.float32" in getattr(module, trial)(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", TRIALS)
@pytest.mark.parametrize("dtype", device_kernels.DTYPES)
def test_a_kernel_that_does_not_do_what_it_should_is_told(name, dtype, monkeypatch):
    module, trial = TRIALS[name]
    assert getattr(module, trial)(torch.device("cpu"), dtype) == ""
    monkeypatch.setattr(module, "step_", lambda *args, **more: None)
    assert str(dtype) in getattr(module, trial)(torch.device("cpu"), dtype)


def test_rows_and_columns_are_both_tried(monkeypatch):
    for kind in ("rows", "columns"):
        with monkeypatch.context() as patch:
            step_ = part_kernel.step_
            patch.setattr(part_kernel, "step_", lambda *args, k=kind, s=step_: None if args[5] == k else s(*args))
            assert part_kernel.trial_of_parts(torch.device("cpu"), torch.float32).startswith(kind)


def test_state_that_is_not_written_is_told_too(monkeypatch):
    parts, covers = part_kernel.step_, cover_kernel.step_

    def without_averages(*args):
        averages = args[6]._replace(**{n: [t.clone() for t in getattr(args[6], n)] for n in ("exp_avg", "exp_avg_sq")})
        parts(*args[:6], averages)

    monkeypatch.setattr(part_kernel, "step_", without_averages)
    monkeypatch.setattr(cover_kernel, "step_", lambda *args: covers(*args[:5], [t.clone() for t in args[5]]))
    for trial in (part_kernel.trial_of_parts, cover_kernel.trial):
        assert trial(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("method", "trial"), [("columns", "trial_of_parts"), ("blocks", "trial"), ("sm3", "trial")])
def test_where_they_do_not_work_pytorchs_steps_and_it_is_said_once(method, trial, monkeypatch):
    cls, options, kernel = METHODS[method]
    go_the_devices_way(monkeypatch, "cuda")
    monkeypatch.setattr(device_kernels, "_told", set())

    def broken(*args, **more):
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(kernel, "step_", broken)
    monkeypatch.setattr(kernel, trial, broken)
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Linear(16, 24, bias=False))
    opt = cls(model, **options)
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(3):
            give_gradients(model.parameters(), number)
            opt.step()
    assert [str(one.message).split(" there: ")[1] for one in said] == ["no C compiler"]
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_plans_for_cuda_know_that_they_need_no_copies(method):
    cls, options, _ = METHODS[method]
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(6))).bfloat16()

    def made(model: nn.Module) -> ZooOptimizer:
        opt = cls(model, **options)
        for group in opt.param_groups:
            group["step"] = 1  # no part is drawn
        return opt

    assert optimzoo.plan(model, made, device="cuda").workspace < 6 * 256 * 16
    assert optimzoo.plan(model, made, device="xpu").workspace > 6 * 256 * 256


COMPILE = """
import itertools
import re
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimzoo.functional import cover_kernel, part_kernel, triton_cover, triton_parts
from optimzoo.functional.device_kernels import OPTIONS

floats = "scale beta1 one_minus_beta1 beta2 one_minus_beta2 grown root eps weight_decay".split()
whole = ["count", "top", "deepest"]
tiles = {
    triton_parts.step_lines: {"line": part_kernel.LINE, "columns": part_kernel.WIDTH},
    triton_parts.step_matrices: {
        "tile_rows": part_kernel.ROWS, "tile_columns": part_kernel.COLUMNS, "columns": part_kernel.WIDTH,
        "some_rows": part_kernel.SOME
    },
    triton_cover.step_some: {
        "tile_rows": cover_kernel.ROWS, "tile_columns": cover_kernel.COLUMNS, "columns": cover_kernel.WIDTH,
        "some_rows": cover_kernel.SOME
    },
}
types = [(tl.float32, tl.float32), (tl.bfloat16, tl.bfloat16), (tl.float16, tl.float32)]
for kernel, (number, (w, g)) in itertools.product(tiles, enumerate(types)):
    flag = number == 1
    fixed = {"checked": flag, "maximize": flag, "lr_is_tensor": flag, "w_type": w, "g_type": g, **tiles[kernel]}
    fixed |= {"free": "sign" if flag else "sgd"} if "free" in kernel.arg_names else {}
    fixed |= {"by_rows": flag} if "by_rows" in kernel.arg_names else {}
    given = {"table": "*i64", "found_inf": "*fp32", "lr": "*fp32" if flag else "fp32"}
    given |= dict.fromkeys(fixed, "constexpr") | dict.fromkeys(whole, "i32") | dict.fromkeys(floats, "fp32")
    constants = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, {name: given[name] for name in kernel.arg_names}, constants)
    asm = compile(source, target=GPUTarget("cuda", 80, 32), options=OPTIONS).asm
    made = asm["ptx"]
    assert not re.search(r"tt\\.load.*tt\\.divisibility", asm["ttir"]), "a promise about all uses of a number"
    assert re.search(r"ld\\.global\\.v[24]\\.b32", made) and re.search(r"st\\.global\\.v[24]\\.b32", made), kernel
    assert not re.search(r"fma\\.rn\\.f32", made)
print("compiled")
"""


def test_compile_and_read_several_elements_at_once(tmp_path):
    """For a GPU that need not be there, without the interpreter. No product is fused with a sum, in some elements."""
    assert not compiled_for_a_device(COMPILE, tmp_path)
