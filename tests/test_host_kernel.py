"""The kernel in C behind engine="compiled" on a CPU: its arithmetic, what it leaves alone, where it takes over."""

import functools
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import optimzoo
from optimzoo.core import AdamW, host_lists, storage
from optimzoo.functional import host_kernel
from tests.cases import PLAIN, bare, build, same, tiny, train, weights

pytestmark = pytest.mark.skipif(not host_kernel.works(), reason="no C compiler with OpenMP here")

# Lines of 8192 and segments of 1024 elements, threads from 2^15 on, and none at all.
SHAPES = [(7, 2500), (2, 7000), (300, 5), (1, 9), (9, 1), (33, 1024), (40, 1025), (5,), (2, 3, 4), (0, 4), (3, 0)]
GREATEST = 40  # of gradients
FRUGAL = {"update_gap": 3, "density": 0.3}
CASES = {
    "adamw": ("AdamW", {}),
    "adamw-betas": ("AdamW", {"betas": (0.0, 0.5), "eps": 1e-3}),
    "adamw-near-1": ("AdamW", {"betas": (0.5, 0.999999)}),
    "rows": ("FRUGAL", FRUGAL | {"projection": "rows"}),
    "rows-sgd": ("FRUGAL", FRUGAL | {"projection": "rows", "state_free": "sgd", "state_free_lr_scale": 0.5}),
    "columns": ("FRUGAL", FRUGAL | {"projection": "columns"}),
    "columns-most": ("FRUGAL", FRUGAL | {"projection": "columns", "density": 0.95, "state_free_lr_scale": 0.1}),
    "columns-none": ("FRUGAL", FRUGAL | {"projection": "columns", "state_free": "none"}),
    "block": ("Stateless", FRUGAL | {"projection": "block"}),
    "signs": ("Stateless", {"density": 0.0}),
    "sm3": ("SM3", {}),
}
cases = pytest.mark.parametrize(("rule", "options"), CASES.values(), ids=CASES)
IN_BASES = {  # whose products are the library's; of what is left, which signs are noise depends on the dtype
    "svd-sgd": ("FRUGAL", FRUGAL | {"projection": "svd", "state_free": "sgd", "state_free_lr_scale": 0.5}),
    "random-none": ("FRUGAL", FRUGAL | {"projection": "random", "state_free": "none"}),
}
all_cases = pytest.mark.parametrize(("rule", "options"), (CASES | IN_BASES).values(), ids=CASES | IN_BASES)


NARROW = host_kernel.NARROW


@pytest.fixture(autouse=True)
def _narrow_ones_too(monkeypatch):
    monkeypatch.setattr(host_kernel, "NARROW", 1)


@pytest.fixture
def stepped(monkeypatch) -> list[str]:
    """The rules whose kernel was called."""
    called, step = [], host_lists._step
    monkeypatch.setattr(host_lists, "_step", lambda b, *more: called.append(b[0].route.rule.__name__) or step(b, *more))
    return called


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(1)
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(f"w{i}", nn.Parameter(t.to(dtype))) for i, t in enumerate(numbers)]


def give(named: list[tuple[str, nn.Parameter]], step: int, poison: float | None = None) -> None:
    """Gradients, of which one element in the fourth of each five is `poison`."""
    generator = torch.Generator().manual_seed(step)
    for i, (_, p) in enumerate(named):
        g = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 3 - 1)
        if poison is not None and (step + i) % 5 == 3 and g.numel():
            g.view(-1)[-1] = poison
        p.grad = g.to(p.dtype)


def optimizer(rule: str, named, **options):
    """What steps matrices by this rule, and vectors by that rule or by AdamW."""
    with bare():
        return getattr(optimzoo, {"Stateless": "FRUGAL"}.get(rule, rule))(named, lr=1e-2, **options)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("poison", [None, torch.nan, -torch.inf])
@all_cases
def test_steps_as_pytorch_does_in_float64(rule, options, poison, maximize, stepped):
    own, exact = parameters(), parameters(torch.float64)
    shared = {"weight_decay": 0.1, "maximize": maximize, **options}
    opt, twin = optimizer(rule, own, engine="compiled", **shared), optimizer(rule, exact, **shared)
    for step in range(8):
        for named in (own, exact):
            give(named, step, poison)
        opt.step()
        twin.step()
    for (name, p), (_, q) in zip(own, exact, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        for key, slot in opt.state[p].items():
            torch.testing.assert_close(slot.double(), twin.state[q][key].double(), rtol=1e-5, atol=GREATEST * 1e-7)
    assert opt.skipped() == twin.skipped()
    assert bool(opt.skipped()) == (poison is not None)
    assert rule in stepped


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e20])
@all_cases
def test_what_a_bad_gradient_would_change_stays_to_the_bit(rule, options, poison, stepped):
    """Also where only squares are too large, and where the last of many threads sees it."""
    named, before = parameters(shapes=[*SHAPES, (2000, 100)]), torch.get_num_threads()
    opt = optimizer(rule, named, engine="compiled", weight_decay=0.1, **options)
    torch.set_num_threads(7)
    try:
        for step in range(7):
            give(named, step)
            opt.step()
        held = [t for _, p in named if p.numel() for t in (p, *opt.state[p].values())]
        kept, count = [t.detach().clone() for t in held], len(stepped)
        for _, p in named:
            p.grad = torch.ones_like(p)
            if p.numel():
                p.grad.view(-1)[-1] = poison
        for _ in range(20):
            opt.step()
            assert same(held, kept)
            opt.param_groups[0]["step"] = 7  # no new period
    finally:
        torch.set_num_threads(before)
    assert len(stepped) > count
    assert opt.skipped() == {name: 20 for name, p in named if p.numel()}


@all_cases
def test_without_the_check_whatever_comes_is_stepped(rule, options):
    named = parameters()
    opt = optimizer(rule, named, engine="compiled", check_finite=False, weight_decay=0.1, **options)
    for step in range(2):
        give(named, step, poison=1e20)
        opt.step()
    assert opt.skipped() == {}
    for (_, p), (_, before) in zip(named, parameters(), strict=True):
        assert ((p != before).double().mean() > 0.9) == bool(p.numel())


@pytest.mark.parametrize("maximize", [False, True])
def test_signs_of_what_a_basis_leaves_are_those_without_the_kernel(maximize, stepped):
    shapes = [(70, 65), (65, 140), (300, 5), (40, 1025)]
    found = []
    for engine in ("auto", "compiled"):
        named = parameters(shapes=shapes)
        options = FRUGAL | {"projection": "svd", "maximize": maximize, "state_free_lr_scale": 0.5}
        opt = optimizer("FRUGAL", named, engine=engine, weight_decay=0.1, **options)
        for step in range(5):
            give(named, step)
            if step == 4:  # within the basis, where all that is left is noise
                for _, p in named:
                    part = opt.state[p]["part"]
                    p.grad = p.grad @ part @ part.T if p.shape[0] >= p.shape[1] else part @ (part.T @ p.grad)
            opt.step()
        found.append([p.detach() for _, p in named])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert stepped


@pytest.mark.parametrize("threads", [2, 3, 7])
@cases
def test_threads_change_nothing(rule, options, threads, stepped):
    shapes = [*SHAPES, (513, 301), (3 * 8192 + 7,)]
    results, before = [], torch.get_num_threads()
    for number in (1, threads):
        torch.set_num_threads(number)
        try:
            named = parameters(shapes=shapes)
            opt = optimizer(rule, named, engine="compiled", weight_decay=0.1, **options)
            for step in range(4):
                give(named, step)
                opt.step()
        finally:
            torch.set_num_threads(before)
        results.append([p.detach() for _, p in named] + [t for _, p in named for t in opt.state[p].values()])
    assert same(*results)
    assert stepped


@pytest.mark.parametrize("cut", [1, 15, 8191, 20000])
def test_an_elements_digits_do_not_depend_on_its_place(cut):
    """Weights, in groups of their own or not, and cut or not: shards and release count on it."""
    n = 3 * 8192 + 7
    whole, left, right = (parameters(shapes=[(n,)]) for _ in range(3))
    parts = [("a", nn.Parameter(left[0][1].detach()[:cut].clone())), ("b", nn.Parameter(right[0][1].detach()[cut:]))]
    one, two = (optimizer("AdamW", named, engine="compiled") for named in (whole, parts))
    for step in range(3):
        give(whole, step)
        g = whole[0][1].grad
        for (_, p), part in zip(parts, (g[:cut], g[cut:]), strict=True):
            p.grad = part.clone()
        one.step()
        two.step()
    assert torch.equal(whole[0][1], torch.cat([p for _, p in parts]))


def _strided(p: nn.Parameter) -> None:
    p.grad = torch.randn(*reversed(p.shape)).mT


def _negative(p: nn.Parameter) -> None:
    p.grad = torch._neg_view(torch.randn(p.shape))


def _ordinary(p: nn.Parameter) -> None:
    p.grad = torch.randn(p.shape).to(p.dtype)


OTHERS = {
    "float64": (lambda: torch.randn(6, 80, dtype=torch.float64), _ordinary, {}),
    "bfloat16": (lambda: torch.randn(6, 80, dtype=torch.bfloat16), _ordinary, {"rounding": "stochastic"}),
    "strided": (lambda: torch.randn(6, 80), _strided, {}),
    "negative": (lambda: torch.randn(6, 80), _negative, {}),
    "transposed": (lambda: torch.randn(80, 6).mT, _ordinary, {}),
}


@pytest.mark.parametrize("rule", ["AdamW", "FRUGAL", "SM3"])
@pytest.mark.parametrize(("make", "gradient", "options"), OTHERS.values(), ids=OTHERS)
def test_what_it_cannot_read_steps_as_ever(rule, make, gradient, options, stepped):
    results = []
    for engine in ("auto", "compiled"):
        torch.manual_seed(0)
        p = nn.Parameter(make())
        opt = optimizer(rule, [("w", p)], engine=engine, **options)
        for _ in range(3):
            gradient(p)
            opt.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-2 if options else 0, atol=0)
    assert not stepped


def test_what_lies_elsewhere_than_at_its_address_is_not_read(stepped):
    p = nn.Parameter(TwoTensor(torch.ones(3, 4), torch.ones(3, 4)))
    opt = AdamW([("w", p)], lr=0.1, engine="compiled")
    p.grad = TwoTensor(torch.ones(3, 4), torch.ones(3, 4))
    opt.step()
    assert not stepped
    torch.testing.assert_close(p.a, torch.full((3, 4), 0.899), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_resumes_and_releases_to_the_bit(name):
    cls = PLAIN[name]
    whole, first, second, released = (tiny() for _ in range(4))
    train(whole, build(cls, whole, engine="compiled"), 0, 8)
    opt = build(cls, first, engine="compiled")
    train(first, opt, 0, 5)
    second.load_state_dict(first.state_dict())
    resumed = build(cls, second, engine="compiled")
    resumed.load_state_dict(opt.state_dict())
    train(second, resumed, 5, 8)
    assert same(weights(second), weights(whole))
    opt = build(cls, released, engine="compiled")
    optimzoo.release_gradients(released, opt)
    train(released, opt, 0, 8)
    assert same(weights(released), weights(whole))


@pytest.mark.parametrize("rule", ["AdamW", "FRUGAL", "SM3"])
def test_autograd_sees_that_weights_have_changed(rule, stepped):
    named = parameters(shapes=[(80, 80)])
    p = named[0][1]
    opt = optimizer(rule, named, engine="compiled")
    give(named, 0)
    opt.step()  # FRUGAL's first one chooses
    loss, count = (p * p).sum(), len(stepped)
    opt.step()
    assert len(stepped) > count
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # what is made here has no version
        optimizer(rule, named, engine="compiled").step()


def test_a_schedule_and_numbers_that_change_are_followed():
    results = []
    for engine in ("auto", "compiled"):
        named = parameters()
        opt = optimizer("AdamW", named, engine=engine)
        opt.param_groups[0]["lr"] = torch.tensor(0.03)
        for step in range(4):
            opt.param_groups[0]["betas"] = (0.8 + 0.01 * step, 0.9)
            opt.param_groups[0]["lr"].mul_(0.5)
            give(named, step)
            opt.step()
        results.append([p.detach() for _, p in named])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


BROKEN = {
    "missing": "exit 127",
    "silent": "exit 1",
    "blank": "echo >&2; exit 1",
    "not UTF-8": "printf '\\377\\n' >&2; exit 1",
    "no output": "exit 0",
    "not a library": "for last; do :; done; while [ $# -gt 2 ]; do shift; done; echo > $1",
    "hanging": "sleep 60",
    "no quotation": None,
}


@pytest.mark.parametrize("how", BROKEN)
def test_without_a_compiler_everything_steps_as_ever_and_one_warning_says_so(how, monkeypatch, tmp_path):
    monkeypatch.setattr(host_kernel, "_compiled", functools.cache(host_kernel._compiled.__wrapped__))
    monkeypatch.setattr(host_kernel, "_warned", False)
    monkeypatch.setattr(host_kernel, "PATIENCE", 0.2)
    compiler = tmp_path / "compiler"
    if BROKEN[how] is not None:
        compiler.write_text(f"#!/bin/sh\n{BROKEN[how]}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler) if BROKEN[how] is not None else "cc '")
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for engine in ("auto", "compiled"):
            named = parameters()
            for rule in ("AdamW", "FRUGAL", "SM3"):
                opt = optimizer(rule, named, engine=engine)
                for step in range(3):
                    give(named, step)
                    opt.step()
            results.append([p.detach() for _, p in named])
    assert same(*results)
    (warning,) = [w for w in caught if w.category is RuntimeWarning]
    assert "engine='compiled'" in str(warning.message)


def test_it_is_compiled_once_by_any_number_of_threads(monkeypatch):
    called, compiler = [], host_kernel._compiler
    monkeypatch.setattr(host_kernel, "_compiled", functools.cache(host_kernel._compiled.__wrapped__))
    monkeypatch.setattr(host_kernel, "_compiler", lambda: called.append(1) or compiler())
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(lambda _: host_kernel.works(), range(6)))
    assert len(called) == 1


def test_nothing_is_read_or_written_beyond_a_tensor():
    """A checkpoint may hold any numbers where rows or columns are chosen, and a gradient may be anything."""
    for projection in ("rows", "columns"):
        for place, wrong in ((0, -100_000), (-1, 80), (1, 3)):  # below, beyond, and more than what follows
            p, other = (nn.Parameter(torch.randn(size, 80)) for size in (80, 90))
            opt = optimizer("FRUGAL", [("w", p), ("other", other)], projection=projection, engine="compiled")
            p.grad, other.grad = torch.randn(80, 80), torch.randn(90, 80)
            opt.step()
            opt.state[p]["part"][place] = wrong if place != 1 else opt.state[p]["part"][2] + wrong
            before = p.detach().clone()
            with pytest.raises(IndexError, match=rf"not the {projection} .*\(80, 80\)"):
                opt.step()
            assert torch.equal(p, before)
    p = nn.Parameter(torch.randn(80, 80))
    opt = optimizer("FRUGAL", [("w", p)], engine="compiled")
    p.grad = torch.randn(80, 80)
    opt.step()
    p.grad.data = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"[Ss]ize"):
        opt.step()


@pytest.mark.parametrize("left", [0, 400])
def test_a_storage_that_was_freed_is_not_read(left):
    for start in (0, 100):
        t = torch.zeros(start + 80 * 80)[start:].view(80, 80)
        assert host_kernel.reads(t)
        t.untyped_storage().resize_(left)
        assert not host_kernel.reads(t)


def test_groups_rates_and_a_way_of_ones_own_are_kept():
    results = []
    for engine in ("auto", "compiled"):
        model = tiny(width=80)
        opt = optimzoo.FRUGAL(model, lr=1e-2, fallback_lr_scale=0.3, update_gap=3, engine=engine)
        for step in range(5):
            give([*model.named_parameters()], step)
            opt.step()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    class Own(optimzoo.AdamW):
        @staticmethod
        def update(ws, gs, h, lr, found_inf, *, slots):
            ws[0].sub_(1)

    p = nn.Parameter(torch.zeros(3))
    opt = Own([("w", p)], engine="compiled")
    p.grad = torch.ones(3)
    opt.step()
    assert (p == -1).all()


@pytest.mark.parametrize("shape", [(500, 2), (500, 63), (63, 500)])
@pytest.mark.parametrize("rule", ["FRUGAL", "SM3"])
def test_narrow_matrices_are_left_to_pytorch(rule, shape, stepped, monkeypatch):
    monkeypatch.setattr(host_kernel, "NARROW", NARROW)
    named = parameters(shapes=[shape])
    opt = optimizer(rule, named, engine="compiled")
    for step in range(3):
        give(named, step)
        opt.step()
    assert not stepped


def test_nothing_depends_on_defaults_for_new_tensors():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        named = parameters(shapes=[(300, 4000), (300, 4), (300,)])
        give(named, 0)
        opt = optimizer("SM3", named, engine="compiled")
        with torch.device("meta"):
            opt.step()
        give(named, 0)
        opt.step()
        assert all(p.isfinite().all() for _, p in named)
    finally:
        torch.set_default_dtype(before)


def test_zeros_move_nothing_and_a_beta_of_zero_forgets_everything():
    named = parameters(shapes=[(80, 80)])
    before = named[0][1].detach().clone()
    opt = optimizer("SM3", named, engine="compiled")
    named[0][1].grad = torch.zeros(80, 80)
    opt.step()
    assert torch.equal(named[0][1], before)
    opt = optimizer("AdamW", named, engine="compiled", betas=(0.0, 0.0))
    for size in (1e15, 1e-15):
        named[0][1].grad = torch.full((80, 80), size)
        opt.step()
    assert (opt.state[named[0][1]]["exp_avg"] == torch.tensor(1e-15)).all()


def test_what_is_no_number_stays_in_accumulators_where_nobody_checks():
    results = []
    for engine in ("auto", "compiled"):
        named = parameters(shapes=[(24, 80)])
        opt = optimizer("SM3", named, engine=engine, check_finite=False)
        for step in range(3):
            give(named, step)
            if step == 1:
                named[0][1].grad[3, 5] = torch.nan
            opt.step()
        results.append((named[0][1].detach(), opt.state[named[0][1]]["slices"]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


# ---- the last stage of rules with products --------------------------------------------------------------------------


class Plain(NamedTuple):
    """What it asks of options."""

    weight_decay: float = 0.3
    maximize: bool = False
    check_finite: bool = True


def directions(shape: tuple[int, int], turned: bool) -> torch.Tensor:
    x = torch.randn(*reversed(shape) if turned else shape).bfloat16()
    return x.mT if turned else x


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(70, 65), (64, 96), (3, 9000), (9000, 3), (1, 1), (33, 1024), (2, 400_000)])
def test_directions_come_to_their_size_and_move_weights_as_in_float64(shape, turned):
    w, x = torch.randn(shape), directions(shape, turned)
    wanted = (1 - 0.1 * 0.3) * w.double() - 0.1 * 0.5 * x.double() * x.numel() ** 0.5 / x.double().norm()
    host_kernel.conclude_(w, x, Plain(), 0.1, 0.5)
    torch.testing.assert_close(w.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_a_last_stage_does_not_depend_on_threads_nor_write_elsewhere(turned):
    shape, before, found = (513, 301), torch.get_num_threads(), []
    w, x = torch.randn(shape), directions(shape, turned)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            around = torch.full((64 + w.numel() + 64,), 7.0)
            inner = around[64:-64].view(shape).copy_(w)
            host_kernel.conclude_(inner, x, Plain(), 0.1, 0.5)
        finally:
            torch.set_num_threads(before)
        assert (torch.cat((around[:64], around[-64:])) == 7).all()
        found.append([inner])
    assert all(same(found[0], other) for other in found[1:])


def test_zeros_are_no_direction_and_what_is_no_number_stays_one():
    w, nothing = torch.randn(40, 70), torch.zeros(40, 70).bfloat16()
    before = w.clone()
    host_kernel.conclude_(w, nothing, Plain(weight_decay=0.0), 5.0, 1.0)
    assert torch.equal(w, before)
    nothing[3, 5] = torch.nan
    host_kernel.conclude_(w, nothing, Plain(weight_decay=0.0), 0.1, 0.0)
    assert torch.equal(w, before), "no step, whatever its direction"
    host_kernel.conclude_(w, nothing, Plain(), 0.1, 1.0)
    assert w.isnan().all()


def test_numbers_of_the_kernel_are_those_of_its_caller():
    text = host_kernel.SOURCE.read_text()
    assert f"LINE = {host_kernel.LINE}," in text


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_largest_number_is_found_wherever_it_lies(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (1, 31, 8192, 8193, 100_003):
            for place in {0, n // 3, n // 2, n - 1}:
                g = torch.rand(n)
                g[place] = -3.0
                assert host_kernel.largest(g, Plain()) == 3.0
                g[place] = torch.inf
                assert host_kernel.largest(g, Plain()) is None
                assert host_kernel.largest(g, Plain(check_finite=False)) == torch.inf
                g[place] = torch.nan
                assert host_kernel.largest(g, Plain()) is None
                assert math.isnan(host_kernel.largest(g, Plain(check_finite=False)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
def test_what_is_outside_of_a_basis_steps_as_written_down(free, threads):
    w, g, inside = (torch.randn(100_003) for _ in range(3))
    inside[::3] = g[::3] + 0.01 * torch.randn(len(g[::3]))
    wanted, left = w.double() * (1 - 0.1 * 0.3), (g - inside).double()
    u = {"sign": left.sign() * (left.abs() >= 0.02), "sgd": left, "none": 0 * left}[free]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        host_kernel.step_outside_(w, g, inside, Plain(maximize=True), 0.1, (free, 0.5), 0.02)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(w.double(), wanted + 0.1 * 0.5 * u, rtol=1e-6, atol=1e-6)


@pytest.fixture
def concluded(monkeypatch) -> list[str]:
    """The rules whose last stage was the kernel's."""
    called, conclude = [], host_lists.conclude

    def told(task, x, kept) -> bool:
        done = conclude(task, x, kept)
        called.extend([task.rule.__name__] * done)
        return done

    monkeypatch.setattr(host_lists, "conclude", told)
    monkeypatch.setattr(storage, "_CPU_HAS_BFLOAT16", True)
    return called


@pytest.mark.parametrize("poison", [None, torch.nan])
@pytest.mark.parametrize("lr_ratio", [1.0, 0.0])
def test_rules_with_products_end_as_without_the_kernel(lr_ratio, poison, concluded):
    found = []
    for engine in ("auto", "compiled"):
        named = parameters(shapes=[(70, 65), (70, 65), (65, 140), (140, 65), (300, 20)])
        opt = optimizer("SWAN", named, engine=engine, weight_decay=0.1, lr_ratio=lr_ratio)
        for step in range(6):
            give(named, step, poison)
            opt.step()
        found.append(([p.detach() for _, p in named], opt.skipped()))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert found[0][1] == found[1][1]
    assert concluded == ["SWAN"] * (30 - sum(found[1][1].values()))


def test_what_a_last_stage_cannot_read_ends_as_ever(concluded):
    """Weights that lie on their side, narrow ones, and rules with an end of their own."""
    narrow = parameters(torch.bfloat16, [(70, 65)])
    lying = [("w", nn.Parameter(torch.randn(65, 70).mT))]
    transposed = [{"params": parameters(shapes=[(70, 65)]), "layout": "transposed"}]

    class Own(optimzoo.SWAN):
        @staticmethod
        def conclude(u, h):
            return torch.ones(u.shape)

    own = [("w", nn.Parameter(torch.randn(70, 65)))]
    for cls, given in ((optimzoo.SWAN, narrow), (optimzoo.SWAN, lying), (optimzoo.SWAN, transposed), (Own, own)):
        with bare():
            opt = cls(given, lr=0.1, engine="compiled")
        (p,) = opt.param_groups[0]["params"]
        before = p.detach().clone()
        p.grad = torch.randn(70, 65).to(p.dtype)
        opt.step()
        assert (p != before).double().mean() > 0.5
    assert not concluded
    torch.testing.assert_close(p.detach(), before - 0.1)  # by its own end


def test_autograd_sees_a_last_stage(concluded):
    named = parameters(shapes=[(80, 80)])
    p = named[0][1]
    opt = optimizer("SWAN", named, engine="compiled")
    give(named, 0)
    loss = (p * p).sum()
    opt.step()
    assert concluded
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
