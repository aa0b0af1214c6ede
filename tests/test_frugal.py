"""FRUGAL: official trajectories, its reference for every pair of rules, exact bytes, and the same part everywhere."""

import itertools
import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optimzoo.core import AdamW
from optimzoo.memory import Workspace
from optimzoo.optimizers import frugal
from optimzoo.optimizers.frugal import FRUGAL
from tests.cases import bare, give_gradients, same, tiny, train, weights
from tests.ranks import every_rank
from tests.reference import adamw, lion
from tests.reference import frugal as reference

GOLDEN = Path(__file__).parent / "golden"
PARTS = ("columns", "rows", "randk", "svd", "random")
EVERY = (*PARTS, "block")
every = pytest.mark.parametrize("projection", EVERY)


def parameter(shape=(12, 16), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def gradients(shape, steps, seed=1):
    return np.random.default_rng(seed).standard_normal((steps, *shape))


def stack(count=6, dtype=torch.float32):
    """Matrices of several sizes, as (name, parameter)."""
    sizes = [(8, 8), (16, 8), (8, 24), (16, 16), (24, 8), (8, 16), (16, 24)]
    return [(f"layer.{i}", parameter(sizes[i % 7], i, dtype)) for i in range(count)]


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "projection", "options", "rtol", "atol"),
    [
        ("frugal_columns", "columns", {}, 1e-9, 0),
        ("frugal_rows", "rows", {}, 1e-9, 0),
        ("frugal_lion_columns", "columns", {"betas": (0.9, 0.99), "state_full": "lion"}, 1e-9, 0),
        ("frugal_svd", "svd", {}, 1e-6, 1e-7),
    ],
)
def test_follows_the_official_trajectory(name, projection, options, rtol, atol, monkeypatch):
    d = np.load(GOLDEN / f"{name}.npz")
    p = nn.Parameter(torch.from_numpy(d["w0"].copy()))
    opt = FRUGAL([("w", p)], lr=1e-3, weight_decay=0.05, update_gap=5, projection=projection, **options)
    for t, g in enumerate(d["g"]):
        if "idx" in d.files:  # its choice of columns in the place of ours
            index = torch.from_numpy(d["idx"][t])
            monkeypatch.setattr(frugal, "draw_", lambda part, seed, index=index, **_: part.copy_(index))
        p.grad = torch.from_numpy(g.copy())
        opt.step()
        np.testing.assert_allclose(p.detach().numpy(), d["w"][t], rtol=rtol, atol=atol)


@pytest.mark.parametrize("projection", PARTS)
@pytest.mark.parametrize("state_full", ["adamw", "lion", "sgdm"])
@pytest.mark.parametrize("state_free", ["sign", "sgd", "none"])
def test_follows_its_reference(projection, state_full, state_free):
    """For chosen positions this also says that each of them receives exactly one of the two rules."""
    options = {"projection": projection, "state_full": state_full, "state_free": state_free, "update_gap": 3}
    options |= {"lr": 1e-2, "density": 0.3, "state_free_lr_scale": 0.5, "weight_decay": 0.1}
    for shape in ((12, 16), (16, 12)):
        p, gs, path, parts = parameter(shape), gradients(shape, 8), [], []
        start = p.detach().clone().numpy()
        opt = FRUGAL([("w", p)], **options)
        for g in gs:
            p.grad = torch.from_numpy(g.copy())
            opt.step()
            path.append(p.detach().clone().numpy())
            parts.append(opt.state[p]["part"].clone().numpy())
        chosen = {"basis" if projection == "random" else "index": parts} if projection != "svd" else {}
        expected = reference.trajectory(start, gs, **options, **chosen)
        np.testing.assert_allclose(np.stack(path), expected, rtol=1e-8, atol=1e-10)
        changes = [t for t in range(1, 8) if not np.array_equal(parts[t], parts[t - 1])]
        assert changes == [3, 6], "the part must change at the first step of a period and at no other"


def test_a_block_is_adamw_while_it_is_its_turn_and_sign_otherwise():
    named = stack(7, torch.float64)
    gs = {name: gradients(p.shape, 16, i) for i, (name, p) in enumerate(named)}
    opt = FRUGAL(named, lr=1e-2, projection="block", update_gap=4, weight_decay=0.1)
    rules = {"adamw": adamw.trajectory, "stateless": sign_trajectory}
    for period in range(4):
        routes = {row[0]: row[2] for row in opt.routes()}
        before = {name: p.detach().clone().numpy() for name, p in named}
        for t in range(4 * period, 4 * period + 4):
            for name, p in named:
                p.grad = torch.from_numpy(gs[name][t].copy())
            opt.step()
        for name, p in named:
            part = gs[name][4 * period : 4 * period + 4]
            expected = rules[routes[name]](before[name], part, lr=1e-2, weight_decay=0.1)[-1]
            np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12, err_msg=f"{name} {routes[name]}")
    assert "its turn" in str(opt.routes())


def sign_trajectory(w, gs, lr, weight_decay):
    path = []
    for g in gs:
        w = w * (1 - lr * weight_decay) - lr * np.sign(g)
        path.append(w)
    return np.stack(path)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_density_one_is_adamw_bit_for_bit(projection, dtype):
    ours, theirs = stack(4, dtype), stack(4, dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    opt, plain = FRUGAL(ours, density=1.0, projection=projection, update_gap=3, **options), AdamW(theirs, **options)
    for step in range(8):
        give_gradients([p for _, p in ours], step)
        give_gradients([p for _, p in theirs], step)
        opt.step()
        plain.step()
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(ours, theirs, strict=True))


@every
def test_density_zero_is_signsgd_bit_for_bit_without_state(projection):
    ours = [*stack(3), ("large", parameter((700, 800), 9, torch.float32))]
    theirs = [p.detach().clone() for _, p in ours]
    opt = FRUGAL(ours, lr=1e-2, density=0.0, projection=projection, weight_decay=0.1, update_gap=2)
    assert opt.memory().total == 0
    for step in range(5):
        give_gradients([p for _, p in ours], step)
        opt.step()
        for q, (_, p) in zip(theirs, ours, strict=True):
            q.mul_(1 - 1e-2 * 0.1).add_(p.grad.sign(), alpha=-1e-2)
    assert all(torch.equal(p, q) for (_, p), q in zip(ours, theirs, strict=True))


def test_density_one_of_lion_is_lion():
    p, gs = parameter(), gradients((12, 16), 6)
    start = p.detach().clone().numpy()
    opt = FRUGAL([("w", p)], lr=1e-2, density=1.0, state_full="lion", betas=(0.9, 0.99), weight_decay=0.1)
    for g in gs:
        p.grad = torch.from_numpy(g.copy())
        opt.step()
    expected = lion.trajectory(start, gs, lr=1e-2, weight_decay=0.1)[-1]
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12)
    assert opt.memory().total == 8 * 12 * 16


def test_rounding_noise_of_a_gradient_inside_the_basis_is_never_signed():
    """The official code moves 96 % of the weights by a full step here."""
    p = parameter((96, 64), dtype=torch.float32)
    start = p.detach().clone()
    draw = torch.Generator().manual_seed(3)
    p.grad = torch.randn(96, 10, generator=draw) @ torch.randn(10, 64, generator=draw)
    opt = FRUGAL([("w", p)], lr=1.0, projection="svd")
    opt.step()
    moved = (start - p.detach()).double()
    assert torch.linalg.svdvals(moved)[16] < 1e-5 * torch.linalg.matrix_norm(moved, 2), "more than the basis moved"


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 100), (100, 24), (32, 32), (3, 3)])
@pytest.mark.parametrize("density", [0.25, 0.29])
def test_bytes_are_the_formulas(shape, density):
    (m, n), exactly = shape, lambda count: max(1, math.floor(density * count + 1e-6))
    k, rows, entries, r = exactly(n), exactly(m), exactly(m * n), exactly(min(m, n))
    basis = 4 * min(m, n) * r
    for projection, low, part in (
        ("columns", m * k, 4 * k),
        ("rows", rows * n, 4 * rows),
        ("randk", entries, 4 * entries),
        ("svd", max(m, n) * r, basis),
        ("random", max(m, n) * r, basis),
    ):
        for state_full, averages in (("adamw", 2), ("lion", 1), ("sgdm", 1)):
            p = parameter(shape, dtype=torch.float32)
            opt = FRUGAL([("w", p)], projection=projection, density=density, state_full=state_full)
            for _ in range(2):
                book = opt.memory()
                assert (book.total, book.slack) == (4 * averages * low + part, 0)
                give_gradients([p], 1)
                opt.step()
    assert exactly(100) == (29 if density == 0.29 else 25)


@pytest.mark.parametrize("density", [0.25, 0.5, 0.1])
def test_blocks_are_cut_by_bytes_and_everyone_has_a_turn(density):
    named = stack(14)
    opt = FRUGAL(named, projection="block", density=density, update_gap=2)
    total, largest = sum(8 * p.numel() for _, p in named), max(8 * p.numel() for _, p in named)
    turns = dict.fromkeys((name for name, _ in named), 0)
    periods = round(1 / density)
    for period in range(2 * periods):
        held = opt.memory()
        counters = held.by("kind").get("counter", 0)
        assert held.slack == 0
        assert held.total - counters <= density * total + largest
        for name in {entry.param for entry in held.entries}:
            turns[name] += 1
        for step in range(2):
            give_gradients([p for _, p in named], 2 * period + step)
            opt.step()
        if period == periods - 1:
            assert set(turns.values()) == {1}
    assert set(turns.values()) == {2}


@every
def test_planned_bytes_are_measured_bytes(projection):
    totals = []
    for mode in (FakeTensorMode(), None):
        with mode or torch.no_grad():
            model = tiny()
            opt = FRUGAL(model, projection=projection, update_gap=2)
            found = [opt.memory().total]
            for step in range(5):
                if mode is None:
                    give_gradients(model.parameters(), step)
                else:
                    for p in model.parameters():
                        p.grad = torch.empty_like(p)
                opt.step()
                found.append(opt.memory().total)
        totals.append(found)
    assert totals[0] == totals[1]


@every
@pytest.mark.parametrize("state_free", ["sign", "sgd"])
def test_workspace(projection, state_free):
    named = [(f"w{i}", parameter((256, 512), i, torch.float32)) for i in range(3)]
    opt = FRUGAL(named, projection=projection, state_free=state_free, update_gap=2)
    for step in range(4):
        give_gradients([p for _, p in named], step)
        with Workspace() as space:
            opt.step()
        # New averages of a block are state, not workspace, but are born in the step that needs them.
        grown = 0 if projection != "block" or step % 2 else 2
        # A Gram matrix, its eigenvectors, and the basis, in float64.
        drawn = (2 + 0.25) * 8 * 256**2 if projection == "svd" and step % 2 == 0 else 0
        assert space.peak <= max(drawn, (FRUGAL.workspace + grown) * 256 * 512 * 4), step


# ---- choices --------------------------------------------------------------------------------------------------------


@every
def test_resumes_inside_a_period_bit_for_bit(projection):
    options = {"projection": projection, "update_gap": 3, "lr": 1e-2, "seed": 5}
    whole = tiny()
    train(whole, FRUGAL(whole, **options), 0, 8)
    for stop in (1, 2, 3, 4, 6):
        first = tiny()
        opt = FRUGAL(first, **options)
        train(first, opt, 0, stop)
        second = tiny(seed=1)
        second.load_state_dict(first.state_dict())
        torch.manual_seed(stop)  # nothing may hang on the global generator
        resumed = FRUGAL(second, projection=projection)
        resumed.load_state_dict(opt.state_dict())
        train(second, resumed, stop, 8)
        assert same(weights(second), weights(whole)), f"stopped after {stop} steps"


@pytest.mark.parametrize("projection", [*PARTS[:3], "random", "block"])
def test_the_choice_depends_on_seed_name_and_period_alone(projection):
    def parts(seed, order=1, prefix=""):
        named = [(prefix + name, p) for name, p in stack(6)][::order]
        stripped = [(name.removeprefix(prefix), p) for name, p in named]
        opt, found = FRUGAL(named, projection=projection, seed=seed, update_gap=2), []
        for step in range(4):
            torch.randn(seed + order + 3)  # somebody else draws
            give_gradients([p for _, p in sorted(named)], step)
            opt.step()
            if step % 2 == 0:
                rules = {row[0]: row[2] for row in opt.routes()}
                chosen = {name: opt.state[p].get("part", p.new_empty(0)).clone() for name, p in stripped}
                found.append({name: (rules[name], chosen[name]) for name, _ in sorted(stripped)})
        return found

    def equal(a, b):
        pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x]
        return all(r == s and torch.equal(t, u) for (r, t), (s, u) in pairs)

    assert equal(parts(1), parts(1, order=-1))
    assert equal(parts(1), parts(1, prefix="module."))  # DDP's
    assert not equal(parts(1), parts(2))
    first, second = parts(1)
    assert not equal([first], [second])


def test_parts_of_different_layers_differ():
    named = [(f"layer.{i}", parameter((16, 64), i, torch.float32)) for i in range(4)]
    opt = FRUGAL(named)
    give_gradients([p for _, p in named], 0)
    opt.step()
    parts = [opt.state[p]["part"] for _, p in named]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(parts, 2))


@pytest.mark.parametrize("projection", PARTS)
def test_a_parameter_without_a_gradient_keeps_its_part_and_its_weights(projection):
    named = stack(2)
    opt = FRUGAL(named, projection=projection, update_gap=2)
    late = named[1][1]
    part, start = opt.state[late]["part"].clone(), late.detach().clone()
    for step in range(3):
        give_gradients([named[0][1]], step)
        opt.step()
    assert torch.equal(opt.state[late]["part"], part)
    assert torch.equal(late, start)
    give_gradients([late], 9)  # in the middle of a period, before any choice of its own
    opt.step()
    assert torch.isfinite(late).all()
    assert not torch.equal(late, start)
    if part.dtype == torch.int32:
        assert (part.diff() > 0).all(), "the part must be one from the beginning"


def test_the_fallback_keeps_its_averages_when_blocks_take_turns():
    model = tiny()
    with bare():
        opt = FRUGAL(model.parameters(), projection="block", update_gap=2)  # matrices and vectors in one group
    twin = tiny()
    plain = AdamW(twin.named_parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(5):
        give_gradients(model.parameters(), step)
        give_gradients(twin.parameters(), step)
        opt.step()
        plain.step()
    for name in ("norm.weight", "norm.bias", "square.bias"):
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name)), name


def _train_on_rank(rank, file):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for projection in EVERY:
        model = tiny()
        opt = FRUGAL(model, projection=projection, update_gap=2, lr=1e-2)
        torch.manual_seed(rank)  # ranks differ in everything but the model and the mean gradient
        torch.randn(7 * rank + 1)
        for step in range(3):
            give_gradients(model.parameters(), 2 * step + rank)
            for p in model.parameters():
                torch.distributed.all_reduce(p.grad)
            opt.step()
            mine = [t for slots in opt.state.values() for t in slots.values()] + weights(model)
            everything = torch.cat([t.double().flatten() for t in mine])
            both = [torch.empty_like(everything) for _ in range(2)]
            torch.distributed.all_gather(both, everything)
            assert torch.equal(both[0], both[1]), (projection, step)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_choose_the_same(tmp_path):
    every_rank(2, _train_on_rank, tmp_path / "meet")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"projection": "colums"}, "projection='colums' is not known; it must be one of 'columns', 'rows'"),
        ({"density": 1.5}, "density=1.5 is out of range"),
        ({"update_gap": 0}, "update_gap=0 is out of range"),
        ({"state_full": "sgd"}, "state_full='sgd' is not known; it must be one of 'adamw'"),
        ({"state_free": "same"}, "state_free='same' is not known; it must be one of 'sign'"),
    ],
)
def test_refuses_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        FRUGAL(stack(1), **options)


def test_what_rounding_left_out_outlives_a_period():
    named = [(f"w{i}", parameter((16, 16), i, torch.bfloat16)) for i in range(4)]
    opt = FRUGAL(named, lr=1e-4, projection="block", update_gap=2, rounding="error")
    for step in range(8):
        give_gradients([p for _, p in named], step)
        opt.memory()  # a period begins
        exact = [p.double() + opt.state[p]["rounding_error"].double() for _, p in named]
        opt.step()
        for (_, p), before in zip(named, exact, strict=True):
            moved = p.double() + opt.state[p]["rounding_error"].double() - before
            assert moved.abs().max() < 5e-4  # steps of 1e-4, while a weight is rounded by up to 4e-3
        if step % 2:
            kept = [opt.state[p]["rounding_error"].clone() for _, p in named]
            opt.memory()
            assert all(torch.equal(opt.state[p]["rounding_error"], k) for (_, p), k in zip(named, kept, strict=True))
            assert any(k.any() for k in kept)
