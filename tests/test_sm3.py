"""SM3: the reference, its bounds, its bytes; and the same for chosen entries of a matrix."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimzoo.functional import part_steps
from optimzoo.functional.cover import sm3_cover, sm3_shapes, sm3_sparse_update, sm3_update
from optimzoo.memory import Workspace
from optimzoo.optimizers.sm3 import SM3
from tests.reference import sm3 as reference

GOLDEN = Path(__file__).parent / "golden" / "sm3_sparse.npz"
SHAPES = [(), (7,), (1,), (5, 6), (1, 6), (6, 1), (3, 4, 5), (2, 3, 2, 4)]


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(math.prod(shape) + steps)
    return [torch.randn(shape, generator=generator, dtype=dtype) * 10.0 ** -(i % 3) for i in range(steps)]


def run(p: nn.Parameter, opt: SM3, steps: list[Tensor]) -> list[Tensor]:
    path = []
    for g in steps:
        p.grad = g.clone()
        opt.step()
        path.append(p.detach().clone())
    return path


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"eps": 1e-4}])
@pytest.mark.parametrize("shape", [(5, 6), (1, 6), (12, 3)])
def test_follows_the_reference(shape: tuple[int, int], options: dict[str, float]) -> None:
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start, steps = p.detach().clone(), gradients(shape, 9)
    path = run(p, SM3([("w", p)], lr=1e-2, **options), steps)
    wanted = reference.trajectory(start.numpy(), [g.numpy() for g in steps], lr=1e-2, **options)
    np.testing.assert_allclose(np.stack([w.numpy() for w in path]), wanted, rtol=1e-12, atol=1e-14)


def tensor_reference(steps: list[Tensor]) -> list[Tensor]:
    """nu of each step for any rank, slice by slice: every accumulator is a number in a dictionary."""
    shape, mu, out = steps[0].shape, {}, []
    for g in steps:
        nu = torch.empty_like(g)
        for place in np.ndindex(*shape):
            sets = [(axis, i) for axis, i in enumerate(place)] if len(shape) > 1 else [(0, place)]
            nu[place] = min(mu.get(s, 0.0) for s in sets) + g[place].item() ** 2
        mu = {}
        for place in np.ndindex(*shape):
            sets = [(axis, i) for axis, i in enumerate(place)] if len(shape) > 1 else [(0, place)]
            for s in sets:
                mu[s] = max(mu.get(s, 0.0), nu[place].item())
        out.append(nu)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_of_any_rank_keep_one_number_a_slice(shape: tuple[int, ...]) -> None:
    steps = gradients(shape, 5)
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = SM3([("w", p)], lr=1.0)
    before = torch.zeros(shape, dtype=torch.float64)
    for w, nu, g in zip(run(p, opt, steps), tensor_reference(steps), steps, strict=True):
        torch.testing.assert_close(before - w, g / nu.sqrt(), rtol=1e-12, atol=1e-13)
        before = w
    assert opt.memory().total == 8 * (sum(shape) if len(shape) > 1 else math.prod(shape))
    assert opt.memory().slack == 0


def test_vectors_are_diagonal_adagrad() -> None:
    p, q = (nn.Parameter(torch.zeros(9)) for _ in range(2))
    steps = gradients((9,), 6, torch.float32)
    ours = run(p, SM3([("w", p)], lr=0.1), steps)
    adagrad = torch.optim.Adagrad([q], lr=0.1, eps=0.0)
    for w, g in zip(ours, steps, strict=True):
        q.grad = g.clone()
        adagrad.step()
        torch.testing.assert_close(w, q.detach(), rtol=1e-6, atol=1e-7)


def sm3_one(shape: tuple[int, ...], steps: list[Tensor]) -> list[Tensor]:
    """SM3-I of a matrix: the other, looser bound."""
    row, col, out = torch.zeros(shape[0], 1).double(), torch.zeros(1, shape[1]).double(), []
    for g in steps:
        row, col = row + (g * g).amax(1, keepdim=True), col + (g * g).amax(0, keepdim=True)
        out.append(torch.minimum(row, col))
    return out


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 30), st.integers(0, 10**6))
def test_bounds(m: int, n: int, count: int, seed: int) -> None:
    """Sum of squares <= nu of SM3-II <= nu of SM3-I, and accumulators never fall."""
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(count)]
    accumulators = [torch.zeros(shape, dtype=torch.float64) for shape in sm3_shapes((m, n))]
    total = torch.zeros(m, n, dtype=torch.float64)
    for g, looser in zip(steps, sm3_one((m, n), steps), strict=True):
        before = [a.clone() for a in accumulators]
        nu, total = sm3_update(g, accumulators), total + g * g
        assert (total <= nu * (1 + 1e-12)).all()
        assert (nu <= looser * (1 + 1e-12)).all()
        assert all((a >= b).all() for a, b in zip(accumulators, before, strict=True))
        assert (sm3_cover(*accumulators) >= total * (1 - 1e-12)).all()


def test_overestimates_independent_gradients_as_stated() -> None:
    """11 x 13, 200 steps: SM3-I 3.98 times the true sum on average, SM3-II 3.28 (specification 2.6)."""
    steps = [torch.randn(11, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(200)]
    accumulators = [torch.zeros(shape, dtype=torch.float64) for shape in sm3_shapes((11, 13))]
    for g in steps:
        nu = sm3_update(g, accumulators)
    total = torch.stack(steps).square().sum(0)
    assert (nu / total).mean() == pytest.approx(3.28, abs=0.15)
    assert (sm3_one((11, 13), steps)[-1] / total).mean() == pytest.approx(3.98, abs=0.15)


def test_golden_entries() -> None:
    golden = np.load(GOLDEN)
    (m, n), index = golden["shape"], torch.from_numpy(golden["idx"])
    row, col, w = torch.zeros(int(m)), torch.zeros(int(n)), torch.zeros(index.numel())
    for g, wanted in zip(torch.from_numpy(golden["g"]), golden["w"], strict=True):
        nu = sm3_sparse_update(g, index, row, col)
        w -= 1e-2 * g / (nu + 1e-30).sqrt()
        np.testing.assert_allclose(w.numpy(), wanted, rtol=1e-5, atol=2e-8)
    np.testing.assert_allclose(row.numpy(), golden["row"], rtol=1e-5, atol=2e-8)
    np.testing.assert_allclose(col.numpy(), golden["col"], rtol=1e-5, atol=2e-8)
    path, row64, col64 = reference.entries_trajectory(np.zeros(60), golden["g"], golden["idx"], golden["shape"])
    np.testing.assert_allclose(w.numpy(), path[-1], rtol=1e-5, atol=2e-8)
    np.testing.assert_allclose(row.numpy(), row64, rtol=1e-5)
    np.testing.assert_allclose(col.numpy(), col64, rtol=1e-5)


def test_sm3_1_rows_without_an_entry_are_untouched() -> None:
    """A port wrote 0 into the accumulators of rows that a sparse gradient did not reach."""
    row, col = torch.tensor([5.0, 6.0, 7.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    sm3_sparse_update(torch.tensor([10.0, 0.1]), torch.tensor([4, 6]), row, col)
    assert row.tolist() == [5.0, 101.0, 7.0]
    assert col.tolist() == [101.0, 2.0, pytest.approx(3.01), 4.0]


def test_sm3_2_state_is_m_plus_n_without_momentum_and_never_coarse() -> None:
    """A port kept a full momentum buffer at momentum 0, and accumulators in bfloat16, where they stop growing."""
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 30), nn.Conv2d(2, 3, 3)).to(torch.bfloat16)
    sizes = (50 + 8) + (8 + 30) + 30 + (3 + 2 + 3 + 3) + 3
    for state_dtype in (None, torch.bfloat16):
        opt = SM3(model, state_dtype=state_dtype)
        assert opt.memory().total == 4 * sizes
        assert all(t.dtype == torch.float32 for slots in opt.state.values() for t in slots.values())
    with_momentum = SM3(model, momentum=0.9)
    assert with_momentum.memory().total == 4 * sizes + 4 * sum(p.numel() for p in model.parameters())
    p = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    opt = SM3([("w", p)], lr=0.1, state_dtype=torch.bfloat16)
    run(p, opt, [torch.full((4, 4), 1.0, dtype=torch.bfloat16)] * 400)
    assert opt.state[p]["slices"].tolist() == [400.0] * 8


def test_sm3_3_parameters_without_gradient_are_left_alone() -> None:
    """A port looked at the parameter instead of its gradient, and fell over unused ones."""
    used, unused = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    opt = SM3([("used", used), ("unused", unused)], lr=0.1)
    used.grad = torch.ones(3, 3)
    opt.step()
    assert torch.equal(unused, torch.ones(3, 3))
    assert not opt.state[unused]["slices"].any()
    assert not torch.equal(used, torch.ones(3, 3))


def test_zero_gradients_move_nothing_and_divide_by_nothing() -> None:
    p = nn.Parameter(torch.ones(3, 3))
    opt = SM3([("w", p)], lr=0.1)
    assert torch.equal(run(p, opt, [torch.zeros(3, 3)])[0], torch.ones(3, 3))


def test_nothing_is_left_to_adamw() -> None:
    model = nn.Sequential(nn.Embedding(40, 8), nn.LayerNorm(8), nn.Linear(8, 40))
    assert {row[2] for row in SM3(model).routes()} == {"sm3"}


@pytest.mark.parametrize("shape", [(100, 40), (33, 7), (16, 300), (1, 50), (50, 1), (100, 200)])
def test_a_matrix_steps_in_blocks_of_rows_as_in_one(shape, monkeypatch) -> None:
    results = []
    for piece in (part_steps.PIECE, 100, 2000):
        monkeypatch.setattr(part_steps, "PIECE", piece)
        p = nn.Parameter(torch.ones(shape))
        opt = SM3([("w", p)], weight_decay=0.1)
        run(p, opt, gradients(shape, 5, torch.float32))
        results.append((p.detach(), opt.state[p]["slices"]))
    for one, *blocks in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in blocks)


@pytest.mark.parametrize(
    ("shape", "most"),
    [((256, 512), 1.1), ((8, 64, 256), 1.1), ((1 << 17,), 1.1), ((3000, 2000), 0.2), ((4, 2_000_000), 0.8)],
)
def test_workspace_of_a_step_is_one_tensor_or_a_piece(shape: tuple[int, ...], most: float) -> None:
    p = nn.Parameter(torch.zeros(shape))
    opt = SM3([("w", p)])
    run(p, opt, [torch.ones(shape)])
    p.grad = torch.ones(shape)
    with Workspace() as space:
        opt.step()
    assert space.peak <= most * 4 * p.numel()
