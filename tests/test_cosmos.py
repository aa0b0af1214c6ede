"""COSMOS: the official trajectory, the formula of its bytes, and none of the faults of the published code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optimzoo import COSMOS
from optimzoo.core import storage
from optimzoo.core.hyper import SMALLEST
from optimzoo.functional import subspace
from optimzoo.memory import Workspace
from optimzoo.optimizers import cosmos
from tests.cases import bare, give_gradients, go_the_devices_way, tiny
from tests.reference import cosmos as reference

GOLDEN = np.load(Path(__file__).parent / "golden" / "cosmos.npz")


def matrix(*shape, dtype=torch.float32, seed=0):
    return nn.Parameter(
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    )


def optimizer(p, **options):
    return COSMOS([("w", p)], **options)


def test_follows_the_official_trajectory():
    ws = [nn.Parameter(torch.from_numpy(GOLDEN[f"w0_{i}"].astype(np.float64))) for i in range(2)]
    opt = COSMOS([(f"w{i}", w) for i, w in enumerate(ws)], rank=8)  # everything else are the defaults
    for t in range(12):
        for i, w in enumerate(ws):
            w.grad = torch.from_numpy(GOLDEN[f"g_{i}"][t].astype(np.float64))
        opt.step()
        for i, w in enumerate(ws):
            np.testing.assert_allclose(w.detach().numpy(), GOLDEN[f"w_{i}"][t], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_follows_the_reference_in_float64(shape, nesterov):
    options = {"lr": 1e-2, "rank": 3, "gamma": 0.4, "lr_ratio": 0.3, "weight_decay": 0.05, "betas": (0.9, 0.97)}
    p = matrix(*shape, dtype=torch.float64)
    draw = np.random.default_rng(1)
    gradients = draw.standard_normal((10, *shape))
    path = reference.trajectory(p.detach().numpy(), gradients, nesterov=nesterov, **options)
    opt = optimizer(p, nesterov=nesterov, **options)
    for g, expected in zip(gradients, path, strict=True):
        p.grad = torch.from_numpy(g)
        opt.step()
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "zero columns", "rank 3", "falls"])
@pytest.mark.parametrize(("shape", "rank"), [((40, 32), 1), ((32, 32), 8), ((30, 36), 9), ((9, 10), 2), ((4, 4), 1)])
def test_fewer_columns_outside_of_the_basis_are_no_other_step(shape, rank, kind, monkeypatch):
    """In float64, in which products of what a basis leaves of a matrix are as exact as those of its own columns."""

    def path():
        p = matrix(*shape, dtype=torch.float64)
        opt = optimizer(p, lr=0.1, rank=rank, gamma=0.5, lr_ratio=0.3)
        for step in range(6):
            g = matrix(*shape, dtype=torch.float64, seed=step).detach()
            if kind == "zero columns":
                g[:, 1::2] = 0
            elif kind == "rank 3":
                g = g[:, :3] @ g[:3]
            elif kind == "falls":
                g = g * torch.logspace(0, -4, shape[1], dtype=torch.float64)
            p.grad = g
            opt.step()
        return p.detach()

    found, follow = path(), subspace.follow
    monkeypatch.setattr(cosmos, "follow", lambda *given: (follow(*given)[0], None))
    torch.testing.assert_close(found, path(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (64, 64), (5, 200)])
@pytest.mark.parametrize("rank", [4, 16, 1000])
def test_bytes_are_the_formula(shape, rank):
    p, (m, n) = matrix(*shape), shape
    opt, r = optimizer(p, rank=rank), min(rank, *shape)
    for _ in range(3):
        assert opt.memory().total == 4 * (m * n + r * (m + n) + r * r) + 4
        assert opt.memory().slack == 0
        p.grad = torch.randn_like(p)
        opt.step()
    assert torch.isfinite(p).all()


def test_the_rms_of_a_step_is_lr_times_lr_ratio_whatever_the_gradient():
    for scale in (1e-12, 1.0, 1e12):
        p = matrix(48, 40)
        before = p.detach().clone()
        opt = optimizer(p, lr=1e-2, weight_decay=0.0, eps=1e-37, rank=8)
        p.grad = scale * torch.randn_like(p)
        opt.step()
        rms = (p - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2 * 1e-2, rel=1e-4), scale


def test_momentum_drives_the_step_without_nesterov():
    """The published code drops the momentum with nesterov=False: a vanishing gradient then gives an arbitrary step."""
    p = matrix(24, 20)
    opt = optimizer(p, nesterov=False, weight_decay=0.0, rank=4)
    p.grad = torch.randn_like(p)
    opt.step()
    before, expected = p.detach().clone(), p.grad.clone()
    p.grad = torch.full_like(p, 1e-30)
    opt.step()
    step = before - p.detach()
    assert nn.functional.cosine_similarity(step.flatten(), expected.flatten(), dim=0) > 0.5


def test_a_zero_gradient_is_no_step():
    p = matrix(24, 20)
    opt = optimizer(p, rank=4)
    p.grad = torch.randn_like(p)
    opt.step()
    before, slots = p.detach().clone(), {k: t.clone() for k, t in opt.state[p].items()}
    p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.equal(p, before)
    assert all(torch.equal(t, slots[k]) for k, t in opt.state[p].items())
    assert opt.skipped() == {"w": 1}


def test_the_basis_stays_orthonormal_and_finds_the_leading_space():
    p = matrix(64, 48)
    opt = optimizer(p, rank=6)
    lead = torch.linalg.qr(torch.randn(48, 6)).Q
    for _ in range(200):
        p.grad = torch.randn(64, 6) @ lead.T + 0.05 * torch.randn(64, 48)
        opt.step()
    basis = opt.state[p]["basis"]
    assert (basis.T @ basis - torch.eye(6)).abs().max() < 1e-5
    assert torch.linalg.svdvals(basis.T @ lead).min() > 0.999
    assert torch.equal(opt.state[p]["gram"], opt.state[p]["gram"].T)


@pytest.mark.parametrize(("shape", "rank"), [((40, 32), 1), ((16, 200), 16)])
def test_rounding_is_never_blown_up(shape, rank):
    """A gradient inside the basis: null columns of the basis and all outside of it hold rounding only."""
    p = matrix(*shape)
    opt = optimizer(p, rank=16, weight_decay=0.0)
    g = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    for _ in range(1 if rank == 16 else 3):
        before = p.detach().clone()
        p.grad = g.clone()
        opt.step()
        step = p.detach() - before
        inside = torch.linalg.svd(g, full_matrices=False).Vh[:rank].T
        assert (step - step @ inside @ inside.T).norm() < 1e-3 * step.norm()


@pytest.mark.parametrize("shape", [(96, 320), (320, 96), (512, 512)])
@pytest.mark.parametrize("way", ["exact", "gram", "products", "a device's"])
def test_the_first_basis_holds_the_energy(shape, way, monkeypatch):
    if way == "a device's":
        go_the_devices_way(monkeypatch)
    monkeypatch.setattr(subspace, "EXACT_SHARE", 16 if way == "exact" else 0)
    monkeypatch.setattr(subspace, "GRAM_SIDE", 0 if way == "products" else 1024)
    g = torch.randn(shape)  # the hardest case: no singular value stands out
    basis = subspace.leading_basis(g, 32, seed=0)
    best = torch.linalg.svdvals(g)[:32].square().sum()
    assert (g @ basis).square().sum() > (0.99999 if way == "exact" else 0.999) * best
    assert (basis.T @ basis - torch.eye(32)).abs().max() < 1e-5
    sizes = (g @ basis).norm(dim=0)
    assert (sizes[1:] < sizes[:-1] * (1 + 1e-3)).all(), "in descending order"


@pytest.mark.parametrize(("shape", "rank", "share"), [((1024, 1024), 64, 0.9994), ((2048, 512), 32, 0.999)])
def test_filters_find_what_hardly_stands_out(shape, rank, share):
    g = torch.randn(shape)
    best = torch.linalg.svdvals(g)[:rank].square().sum()
    assert (g @ subspace.leading_basis(g, rank, seed=0)).square().sum() > share * best


@pytest.mark.parametrize("size", [0.0, 1e-17, 1e16])
@pytest.mark.parametrize("rank", [3, 192])
def test_a_first_basis_is_one_whatever_the_gradients_size_and_rank(size, rank):
    g = torch.randn(200, rank) @ torch.randn(rank, 192)
    basis = subspace.leading_basis(size * g, 16, seed=0)
    assert (basis.T @ basis - torch.eye(16)).abs().max() < 1e-5
    best = torch.linalg.svdvals(g)[:16].square().sum()
    assert size == 0 or (g @ basis).square().sum() > 0.999 * best


def test_a_first_basis_tells_large_directions_from_small_ones():
    """Singular values over four decades: filters of the largest must not hide the others in their rounding."""
    u, v = (torch.linalg.qr(torch.randn(256, 256, dtype=torch.float64)).Q for _ in range(2))
    g = (u * torch.logspace(0, -4, 256, dtype=torch.float64)) @ v.T
    basis = subspace.leading_basis(g.float(), 32, seed=0).double()
    assert torch.linalg.svdvals(basis.T @ v[:, :32]).min() > 0.999


def test_a_seeded_basis_catches_up_without_any_first_gradient():
    """A parameter whose gradient comes late starts from its seeded basis: power iteration finds the energy."""
    early, late = matrix(64, 48), matrix(64, 48)
    opt = COSMOS([("early", early), ("late", late)], rank=8)
    early.grad = torch.randn_like(early)
    opt.step()
    lead = torch.randn(8, 48)
    for _ in range(10):
        late.grad = torch.randn(64, 8) @ lead + 0.3 * torch.randn(64, 48)
        opt.step()
    best = torch.linalg.svdvals(late.grad)[:8].square().sum()
    assert (late.grad @ opt.state[late]["basis"]).square().sum() > 0.95 * best


def test_bf16_weights_keep_an_exact_basis():
    p = matrix(64, 48, dtype=torch.bfloat16)
    opt = optimizer(p, state_dtype=torch.bfloat16, rank=8)
    for _ in range(5):
        p.grad = torch.randn_like(p)
        opt.step()
    dtypes = {k: t.dtype for k, t in opt.state[p].items()}
    assert dtypes["basis"] == dtypes["gram"] == torch.float32
    assert dtypes["momentum"] == dtypes["exp_avg_sq"] == torch.bfloat16
    basis = opt.state[p]["basis"]
    assert (basis.T @ basis - torch.eye(8)).abs().max() < 1e-5


def test_matrices_are_routed_by_role_never_by_size():
    model = tiny(width=16)
    model.big = nn.Linear(16, 11_000, bias=False)
    rules = {name: rule for name, _, rule, _, _ in COSMOS(model).routes()}
    assert rules["big.weight"] == rules["square.weight"] == "cosmos"
    assert rules["embed.weight"] == rules["head.weight"] == rules["norm.weight"] == "adamw"
    with pytest.warns(UserWarning, match=r"all 5 two-dimensional tensors .* pass the model"):
        COSMOS([p for p in tiny().parameters()])
    with bare():
        assert COSMOS(tiny().parameters()).routes()[0][2] == "cosmos"


def test_options_live_in_the_groups_and_in_the_checkpoint():
    one, two = matrix(24, 20), matrix(24, 20)
    opt = COSMOS([{"params": [("one", one)], "rank": 3}, {"params": [("two", two)], "gamma": 0.5}], rank=5)
    give_gradients([one, two], 0)
    opt.step()
    assert opt.state[one]["basis"].shape == (20, 3)
    assert opt.state[two]["basis"].shape == (20, 5)
    assert [g["gamma"] for g in opt.state_dict()["param_groups"]] == [0.2, 0.5]
    opt.param_groups[0]["rank"] = 4
    with pytest.raises(ValueError, match=r"'basis' of 'one' would change from \(20, 3\) to \(20, 4\)"):
        opt.step()


@pytest.mark.parametrize("shape", [(512, 512), (1376, 512), (512, 1376), (420, 512)])
@pytest.mark.parametrize("rank", [32, 128, 170])
@pytest.mark.parametrize("narrow", [True, False])
def test_workspace_in_largest_matrices(shape, rank, narrow, monkeypatch):
    monkeypatch.setattr(storage, "_CPU_HAS_BFLOAT16", narrow)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # as many are stacked
    ps = [matrix(*shape) for _ in range(2)]
    opt = COSMOS([(f"w{i}", p) for i, p in enumerate(ps)], rank=rank)
    for p in ps:
        p.grad = torch.randn_like(p)
    opt.step()
    with Workspace() as space:
        opt.step()
    assert space.peak <= COSMOS.workspace * ps[0].numel() * 4


def test_the_smallest_eps_leaves_weights_alone_whose_gradient_is_next_to_nothing():
    p = matrix(64, 64)
    before, opt = p.detach().clone(), optimizer(p, rank=16, eps=1e-30, weight_decay=0.0)
    for step in range(3):
        p.grad = 1e-30 * matrix(64, 64, seed=step).detach()
        opt.step()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=3 * 2e-3)  # NaN is not close


def test_the_smallest_eps_divides_nothing_into_infinity():
    p = matrix(40, 30)
    opt = COSMOS([("w", p)], lr=0.1, rank=30, eps=SMALLEST)
    for _ in range(3):  # all of it in the basis: nothing is left for Muon
        p.grad = torch.randn(40, 2) @ torch.randn(2, 30)
        opt.step()
    assert p.isfinite().all()
