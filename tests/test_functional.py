"""The mathematics by its properties, and the references by the trajectories of the official code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from optimzoo.functional import norms, polar, projection, slices, subspace
from optimzoo.functional.directions import stateless_direction
from optimzoo.functional.moments import adam_direction
from optimzoo.functional.random import fold, generator, uniform
from optimzoo.functional.rounding import stochastic_round_
from optimzoo.memory import Workspace
from tests.reference import adamw, cosmos, frugal, lion, sm3, swan

GOLDEN = Path(__file__).parent / "golden"
SHAPES = [(48, 48), (40, 120), (120, 40), (64, 96)]
SPECTRA = ["gaussian", "2 decades", "3 decades", "4 decades", "half rank", "rank 8"]


def matrix(shape, spectrum, seed=0):
    m, n = shape
    draw, s = np.random.default_rng(seed), min(shape)
    if spectrum == "gaussian":
        return torch.from_numpy(draw.standard_normal(shape))
    if spectrum.endswith("rank") or spectrum.startswith("rank"):
        r = s // 2 if spectrum == "half rank" else 8
        return torch.from_numpy(draw.standard_normal((m, r)) @ draw.standard_normal((r, n)))
    u, v = np.linalg.qr(draw.standard_normal((m, s)))[0], np.linalg.qr(draw.standard_normal((n, s)))[0]
    return torch.from_numpy((u * np.logspace(0, -int(spectrum[0]), s)) @ v.T)


def cosine(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float((a * b).sum() / (a.norm() * b.norm()))


# ---- references = official code -------------------------------------------------------------------------------------


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


@pytest.mark.parametrize("i", [0, 1])
def test_reference_follows_official_cosmos(i):
    d = golden("cosmos")
    options = {"lr": 2e-3, "betas": (0.95, 0.95), "rank": 8, "gamma": 0.2, "lr_ratio": 0.2, "weight_decay": 0.1}
    path = cosmos.trajectory(d[f"w0_{i}"], d[f"g_{i}"], **options)
    np.testing.assert_allclose(path, d[f"w_{i}"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "projection", "options", "rtol", "atol"),
    [
        ("frugal_columns", "columns", {}, 1e-9, 0),
        ("frugal_rows", "rows", {}, 1e-9, 0),
        ("frugal_lion_columns", "columns", {"betas": (0.9, 0.99), "state_full": "lion"}, 1e-9, 0),
        ("frugal_svd", "svd", {}, 1e-6, 1e-7),
    ],
)
def test_reference_follows_official_frugal(name, projection, options, rtol, atol):
    d = golden(name)
    index = d["idx"] if "idx" in d.files else None
    path = frugal.trajectory(d["w0"], d["g"], projection, index, weight_decay=0.05, update_gap=5, **options)
    np.testing.assert_allclose(path, d["w"], rtol=rtol, atol=atol)


def test_reference_follows_official_sm3():
    d = golden("sm3_sparse")
    path, row, col = sm3.entries_trajectory(np.zeros(60), d["g"], d["idx"], tuple(d["shape"]))
    np.testing.assert_allclose(path, d["w"], rtol=1e-5, atol=2e-8)
    np.testing.assert_allclose(row, d["row"], rtol=1e-5)
    np.testing.assert_allclose(col, d["col"], rtol=1e-5)


def test_sparse_and_dense_sm3_agree_on_full_support():
    g = np.random.default_rng(0).standard_normal((6, 5, 7))
    path, _, _ = sm3.entries_trajectory(np.zeros(35), g.reshape(6, 35), np.arange(35), (5, 7))
    np.testing.assert_allclose(path.reshape(6, 5, 7), sm3.trajectory(np.zeros((5, 7)), g), rtol=1e-12)


def test_reference_follows_official_sparse_adam():
    d = golden("sft_adamw")
    path = adamw.per_entry_trajectory(np.zeros(60), d["g"], weight_decay=0.1)
    np.testing.assert_allclose(path, d["w"], rtol=1e-5, atol=2e-7)


def test_references_of_lion_and_adamw_agree_with_frugal_of_everything():
    g = np.random.default_rng(0).standard_normal((6, 5, 7))
    every = np.tile(np.arange(7), (6, 1))
    for kind, reference in (("adamw", adamw), ("lion", lion)):
        whole = frugal.trajectory(np.ones((5, 7)), g, "columns", every, state_full=kind, betas=(0.9, 0.99))
        np.testing.assert_allclose(whole, reference.trajectory(np.ones((5, 7)), g, betas=(0.9, 0.99)), rtol=1e-12)


def test_adam_direction_is_the_references():
    g = torch.randn(4, 3, 5, dtype=torch.float64)
    exp_avg, exp_avg_sq = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)
    w, path = torch.zeros(3, 5, dtype=torch.float64), adamw.trajectory(np.zeros((3, 5)), g.numpy())
    for t in range(4):
        w = w - 1e-3 * adam_direction(g[t], exp_avg, exp_avg_sq, t + 1, (0.9, 0.999), 1e-8)
        torch.testing.assert_close(w, torch.from_numpy(path[t]), rtol=1e-12, atol=0)


def test_stateless_directions():
    g = torch.randn(4, 5).mT
    for kind, u in (("sign", g.sign()), ("sgd", g), ("none", torch.zeros_like(g))):
        assert torch.equal(stateless_direction(g, kind, 0.5), 0.5 * u)
        assert stateless_direction(g, kind, 1.0).is_contiguous()
        own = g.clone()
        assert stateless_direction(own, kind, 1.0, out=own) is own
        assert torch.equal(own, u)


# ---- polar factors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_polar_exact_is_the_polar_factor(shape, spectrum):
    x = matrix(shape, spectrum).float()
    assert cosine(polar.polar_exact(x), swan.polar_factor(x.double().numpy())) >= 0.9999


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_exact_is_orthonormal_in_float64(shape):
    x = polar.polar_exact(matrix(shape, "3 decades"))
    gram = x.mT @ x if shape[0] > shape[1] else x @ x.mT
    torch.testing.assert_close(gram, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_newton_schulz_stays_finite_in_bfloat16(shape, spectrum):
    x = matrix(shape, spectrum).float()
    found = polar.newton_schulz(x)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    # Gaussian 0.98, four decades 0.82: the small directions are lifted towards 1, not past it.
    assert cosine(found, swan.polar_factor(x.double().numpy())) > 0.8
    assert torch.linalg.matrix_norm(found.float(), 2) < 1.35


@pytest.mark.parametrize("function", [polar.newton_schulz, polar.polar_exact])
def test_polar_batched_is_looped_and_writes_nothing(function):
    for shape in SHAPES:
        x = torch.stack([matrix(shape, "gaussian", seed) for seed in range(6)])
        before = x.clone()
        looped = torch.stack([function(each) for each in x])
        torch.testing.assert_close(function(x), looped, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(function(x.view(2, 3, *shape)).flatten(0, 1), looped, rtol=1e-10, atol=1e-12)
        assert torch.equal(x, before)
        torch.testing.assert_close(function(x[0].mT.contiguous().mT), function(x[0]), rtol=1e-10, atol=1e-12)


def test_newton_schulz_is_the_references_iteration():
    for shape in SHAPES:
        x = matrix(shape, "2 decades")
        torch.testing.assert_close(polar.newton_schulz(x), torch.from_numpy(cosmos.newton_schulz(x.numpy())))


@pytest.mark.parametrize("shape", [(128, 384), (384, 128)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_narrow_steps_on_the_gram_matrix_err_as_plain_ones_do(shape, spectrum, monkeypatch):
    x = matrix(shape, spectrum)
    exact, found = polar.newton_schulz(x), polar.newton_schulz(x.bfloat16()).double()
    monkeypatch.setattr(polar, "GRAM_FORM", float("inf"))
    plain = polar.newton_schulz(x.bfloat16()).double()
    assert not torch.equal(found, plain)
    assert (found - exact).norm() < 1.1 * (plain - exact).norm() + 0.006 * exact.norm()


@pytest.mark.parametrize("shape", [(96, 96), (96, 128), (128, 96)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_narrow_steps_are_as_exact_as_in_the_usual_order(shape, spectrum):
    """X <- a X + (b A + c A^2) X in bfloat16, as Muon's steps are written down."""
    x = matrix(shape, spectrum)
    exact, ours = polar.newton_schulz(x), polar.newton_schulz(x.bfloat16()).double()
    if shape[0] > shape[1]:
        x, exact, ours = x.mT, exact.mT, ours.mT
    found, (a, b, c) = x.bfloat16(), polar.QUINTIC
    found = found / found.float().norm().bfloat16()
    for _ in range(5):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    assert (ours - exact).norm() < 1.05 * (found.double() - exact).norm()


@pytest.mark.parametrize("shape", [(48, 48), (40, 120), (120, 40), (2, 33, 70), (2, 70, 33), (3, 5, 30)])
def test_blocks_of_a_large_product_are_no_other_product(shape, monkeypatch):
    x = torch.randn(shape, dtype=torch.float64)
    plain = [function(x) for function in (polar.newton_schulz, polar.polar_exact)]
    narrow = polar.newton_schulz(x.bfloat16())
    monkeypatch.setattr(polar, "BLOCKED", 0)
    monkeypatch.setattr(polar, "ROWS", 16)
    for function, wanted in zip((polar.newton_schulz, polar.polar_exact), plain, strict=True):
        torch.testing.assert_close(function(x), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(polar.newton_schulz(x.bfloat16()), narrow, rtol=0, atol=2**-5)
    wide = x if x.shape[-2] < x.shape[-1] else x.mT
    out = x.new_empty(*wide.shape[:-1], wide.shape[-2])
    polar._square(wide, out)
    torch.testing.assert_close(out, wide @ wide.mT)


def test_polar_of_nothing_is_nothing():
    for function in (polar.newton_schulz, polar.polar_exact):
        assert torch.equal(function(torch.zeros(3, 5)).float(), torch.zeros(3, 5))
    tiny = polar.polar_exact(1e-15 * matrix((8, 8), "gaussian").float())
    assert cosine(tiny, polar.polar_exact(matrix((8, 8), "gaussian").float())) > 0.9999


@pytest.mark.parametrize("shape", [(256, 512), (512, 256), (256, 256)])
def test_polar_workspace(shape):
    x, (m, n), s = torch.randn(shape), shape, min(shape)
    with Workspace() as fast:
        polar.newton_schulz(x)
    assert fast.peak <= 2 * (2 * m * n + 2 * s * s)
    with Workspace() as exact:
        polar.polar_exact(x)
    assert exact.peak <= 3.01 * x.nbytes


@pytest.mark.parametrize("function", [polar.newton_schulz, polar.polar_exact, norms.standardise_rows])
def test_matrix_functions_compile_to_one_graph(function, monkeypatch):
    monkeypatch.setattr(polar, "BLOCKED", 0)
    monkeypatch.setattr(polar, "ROWS", 8)
    x = matrix((12, 20), "gaussian").float()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))


# ---- subspaces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
@pytest.mark.parametrize("spectrum", [*SPECTRA, "zero columns", "one entry", "nothing"])
def test_a_subspace_is_followed_in_float32_as_in_float64(spectrum, scale):
    g = matrix((48, 40), spectrum if spectrum in SPECTRA else "gaussian") * scale
    if spectrum == "zero columns":
        g[:, 5:] = 0
    elif spectrum == "one entry":
        g[1:], g[:, 1:] = 0, 0
    elif spectrum == "nothing":
        g.zero_()
    start = torch.linalg.qr(matrix((40, 12), "gaussian", 9)).Q
    found = {}
    for dtype in (torch.float32, torch.float64):
        basis, gram = start.to(dtype), torch.zeros(12, 12, dtype=dtype)
        for step in range(20):
            subspace.follow((g * (1 + step % 3)).to(dtype), basis, gram, 0.9)
        orthogonal = basis.double().mT @ basis.double()
        torch.testing.assert_close(orthogonal, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)
        found[dtype] = gram.double().trace() / scale**2
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_a_basis_stays_orthonormal_when_the_gradient_leaves_it(decay):
    basis, gram = torch.linalg.qr(torch.randn(160, 64)).Q, torch.zeros(64, 64)
    for _ in range(5):
        subspace.follow(torch.randn(200, 80) @ torch.eye(80, 160), basis, gram, decay)
    away = torch.randn(160, 1)
    away -= basis @ (basis.mT @ away)
    for _ in range(3):
        subspace.follow(1e6 * torch.randn(200, 1) @ away.mT, basis, gram, decay)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["gaussian", "rank 3", "zeros", "lines", "last lines"])
@pytest.mark.parametrize(("n", "r"), [(150, 90), (40, 39), (7, 1)])
def test_a_rotation_has_the_columns_as_its_first_ones(n, r, kind, dtype):
    x = {
        "gaussian": torch.randn(n, r),
        "rank 3": torch.randn(n, 3) @ torch.randn(3, r),
        "zeros": torch.zeros(n, r),
        "lines": torch.eye(n, r),
        "last lines": -3 * torch.eye(n)[:, -r:],
    }[kind].to(dtype)
    x[:, r // 2] = 0
    close = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 1e-14}
    rotation = subspace.Rotation.onto(x)
    q, basis = torch.eye(n, dtype=dtype) - rotation.v @ rotation.t @ rotation.v.mT, rotation.basis()
    torch.testing.assert_close(q.mT @ q, torch.eye(n, dtype=dtype), **close)
    torch.testing.assert_close(basis, q[:, :r], **close)
    torch.testing.assert_close(basis, subspace.orthonormal(x), **close)
    size = x.norm().clamp_min(1)
    torch.testing.assert_close(basis @ (basis.mT @ x) / size, x / size, **close)
    d = torch.randn(33, n, dtype=dtype)
    turned = rotation.turn_(d.clone())
    torch.testing.assert_close(turned / n, d @ q / n, **close)
    torch.testing.assert_close(rotation.back_(turned, turned @ rotation.v) / n, d / n, **close)


@pytest.mark.parametrize(
    ("shape", "fewer"), [((40, 40), True), ((90, 40), True), ((31, 40), True), ((30, 40), False), ((99, 39), False)]
)
def test_a_basis_comes_with_a_rotation_where_that_leaves_fewer_columns(shape, fewer):
    basis = torch.linalg.qr(torch.randn(shape[1], 10)).Q
    rotation = subspace.follow(torch.randn(shape), basis, torch.zeros(10, 10), 0.9)[1]
    assert (rotation is not None) == fewer
    if rotation is not None:
        assert torch.equal(rotation.basis(), basis)


def test_transposed_in_pieces(monkeypatch):
    monkeypatch.setattr(slices, "TRANSPOSED", 40)
    for shape in [(17, 9), (9, 17), (3, 50), (1, 4), (5, 0)]:
        x = torch.randn(shape, dtype=torch.bfloat16)
        out = torch.empty(shape[::-1], dtype=torch.bfloat16)
        slices.transpose_into(out, x)
        assert torch.equal(out, x.mT)


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_standardise_rows_at_any_scale(center, scale):
    g = matrix((9, 40), "gaussian").float()
    x = norms.standardise_rows(g * scale, center)
    torch.testing.assert_close(x, torch.from_numpy(swan.standardise_rows(g, center)).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [8, 1000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_without_spread_become_exactly_zero(n, dtype):
    g = torch.randn(6, n)
    g[1], g[2], g[3] = 0, 3.3, 0.1 + 1e-8 * g[3]
    x = norms.standardise_rows(g.to(dtype))
    assert x[1:4].eq(0).all()
    torch.testing.assert_close(x[[0, 4, 5]].square().mean(1), torch.ones(3, dtype=x.dtype), rtol=1e-4, atol=0)
    assert norms.standardise_rows(torch.full((4, n), 0.7, dtype=dtype)).eq(0).all()
    assert norms.standardise_rows(torch.zeros(4, n, dtype=dtype)).eq(0).all()


def test_scale_to_rms():
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(norms.scale_to_rms_(x, 0.5).square().mean((1, 2)), torch.full((3,), 0.25))
    assert norms.scale_to_rms_(torch.zeros(4, 5)).eq(0).all()


# ---- projections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "density", "k"), [(100, 0.29, 29), (3, 0.25, 1), (1, 0.01, 1), (32, 0.25, 8), (7, 1.0, 7)]
)
def test_share_counts_exactly(n, density, k):
    assert projection.share(n, density) == k


def chosen(n, k, seed):
    return projection.choose_(torch.empty(k, dtype=torch.int32), seed, n=n)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), density=st.floats(0.001, 1), seed=st.integers(0, 2**63 - 1))
def test_chosen_indices_are_sorted_distinct_and_of_the_seed(n, density, seed):
    index = chosen(n, projection.share(n, density), seed)
    assert (index.diff() > 0).all()
    assert 0 <= index[0] <= index[-1] < n
    assert torch.equal(index, chosen(n, index.numel(), seed))


def test_every_index_is_equally_likely_and_seeds_differ():
    draws = torch.zeros(40)
    for seed in range(2000):
        draws[chosen(40, 10, fold(7, "layer", seed)).long()] += 1
    # Hypergeometric counts have variance 2000 * 1/4 * 3/4: 39 degrees of freedom, 99.9 % below 72.
    assert float((draws - 500).square().sum() / 375 * 39 / 40) < 72
    assert not torch.equal(chosen(40, 10, 1), chosen(40, 10, 2))


def test_entries_of_large_matrices_are_chosen_stretch_by_stretch():
    n = 3 * (1 << 14) + 17
    index = chosen(n, n // 4, 5)
    assert (index.diff() > 0).all()
    assert int(index[-1]) < n
    with pytest.raises(ValueError, match="columns"):
        chosen(2**31, 5, 0)


@pytest.mark.parametrize(("kind", "low"), [("columns", (5, 3)), ("rows", (2, 6)), ("randk", (15,))])
def test_put_writes_what_take_reads_and_nothing_else(kind, low):
    g = torch.randn(5, 6)
    shapes = projection.part_shapes((5, 6), kind, 0.5)
    assert shapes == (shapes[0], low)
    part = torch.empty(shapes[0], dtype=torch.int32)
    projection.draw_(part, 3, kind=kind, shape=(5, 6), g=g)
    taken = projection.take(g, part, kind)
    assert taken.shape == low
    u = projection.put_(torch.zeros(5, 6), part, taken, kind)
    assert int((u == g).sum()) == int((u != 0).sum()) == taken.numel()
    assert torch.equal(projection.take(u, part, kind), taken)
    assert torch.equal(projection.take(g.mT.contiguous().mT, part, kind), taken)
    assert projection.rest_of(g, part, taken, kind, signed=True) is g


@pytest.mark.parametrize("kind", ["svd", "random"])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (12, 12)])
def test_bases_are_orthonormal_and_project(shape, kind):
    g = torch.randn(shape)
    (side, r), low_shape = projection.part_shapes(shape, kind, 0.34)
    assert (side, r) == (12, 4)
    basis = torch.empty(side, r)
    projection.draw_(basis, 9, kind=kind, shape=shape, g=g)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4), rtol=0, atol=2e-6)
    low = projection.take(g, basis, kind)
    assert low.shape == low_shape
    once = projection.put_(torch.zeros(shape), basis, low, kind)
    torch.testing.assert_close(projection.take(once, basis, kind), low, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projection.rest_of(g, basis, low, kind, signed=False), g - once, rtol=0, atol=1e-5)
    assert torch.equal(projection.rest_of(g, basis, low, kind, signed=True).sign(), (g - once).sign())
    if kind == "svd":
        assert low.square().sum() >= 0.9999 * torch.linalg.svdvals(g)[:4].square().sum()


@pytest.mark.parametrize("shape", [(256, 256), (512, 200), (200, 512)])
def test_a_gradient_inside_its_basis_leaves_exactly_nothing(shape):
    basis = torch.empty(projection.part_shapes(shape, "svd", 0.5)[0])
    for seed in range(3):
        g = matrix(shape, "half rank", seed).float() * 10.0 ** (5 * seed - 5)
        projection.draw_(basis, 0, kind="svd", shape=shape, g=g)
        assert projection.rest_of(g, basis, projection.take(g, basis, "svd"), "svd", signed=True).eq(0).all()
    nothing = torch.zeros(shape)
    assert projection.rest_of(nothing, basis, projection.take(nothing, basis, "svd"), "svd", signed=True).eq(0).all()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=20),
    parts=st.sampled_from([(1, 4), (1, 10), (3, 10), (1, 2), (9, 10), (1, 1)]),
    seed=st.integers(0, 2**31),
)
def test_turns_are_fair_and_bounded(sizes, parts, seed):
    turns, periods = parts
    named = {f"layer.{i}": size for i, size in enumerate(sizes)}
    active = [projection.whose_turn(named, turns / periods, p, seed) for p in range(2 * periods)]
    for lap in (active[:periods], active[periods:]):
        for name in named:
            assert sum(name in names for names in lap) == turns
    largest = max(sum(named[name] for name in names) for names in active)
    assert largest <= turns / periods * sum(sizes) + max(sizes) + 1e-6


def test_turns_follow_names_and_seed_not_order():
    named = {f"layer.{i}": 10 for i in range(12)}
    reordered = dict(reversed(named.items()))
    assert projection.whose_turn(named, 0.25, 5, 1) == projection.whose_turn(reordered, 0.25, 5, 1)
    laps = [frozenset(projection.whose_turn(named, 0.25, p, seed)) for p in range(8) for seed in (1, 2)]
    assert len(set(laps)) > 12  # drawn anew each lap, and for each seed


# ---- random numbers -------------------------------------------------------------------------------------------------


def test_seeds_are_stable_across_versions_and_processes():
    assert fold(0, "model.layers.0.weight", 3) == 7940472862474097614
    assert uniform(3, 12345).tolist() == [0.6415309309959412, 0.7797510623931885, 0.765064537525177]


def test_neighbouring_seeds_share_nothing():
    draws = torch.stack([uniform(1024, seed) for seed in range(32)])
    assert len(draws[:, 0].unique()) == 32, "a position must not be the same for all seeds"
    assert not torch.equal(draws[10].sort().values, draws[11].sort().values), "one seed is another's, permuted"
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.15


def test_uniform_is_uniform():
    for seed in (0, 1, fold(3, "w", 9), 2**63 - 1):
        x = uniform(100_000, seed)
        assert x.dtype == torch.float32
        assert float(x.min()) >= 0
        assert float(x.max()) < 1
        counts = torch.histc(x, 100, 0, 1)
        assert float((counts - 1000).square().sum() / 1000) < 160  # chi-square, 99 degrees: 99.99 % below 160


def test_uniform_draws_are_independent_across_seeds_and_positions():
    n = 50_000
    rows = torch.stack([uniform(n, fold(0, "w", i)) for i in range(8)] + [uniform(n, i) for i in range(8)])
    correlation = torch.corrcoef(rows.double()) - torch.eye(16)
    assert float(correlation.abs().max()) < 5 / math.sqrt(n)
    for lag in (1, 2, 3, 64, 1000):
        pair = torch.corrcoef(torch.stack([rows[0, :-lag], rows[0, lag:]]).double())
        assert abs(float(pair[0, 1])) < 5 / math.sqrt(n)


def test_uniform_compiles_and_does_not_recompile_for_another_seed():
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda seed: uniform(64, seed), backend=graphs, fullgraph=True)
    for seed in (0, 7, 2**62 + 5):
        assert torch.equal(compiled(torch.tensor(seed)), uniform(64, seed))
    assert graphs.frame_count == 1


def test_nothing_here_moves_the_global_generator():
    before = torch.get_rng_state()
    g = torch.randn(8, 8, generator=generator(1))
    chosen(100, 10, 3)
    projection.draw_(g[:, :2], 3, kind="random", shape=(8, 8))
    uniform(10, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact():
    exact = torch.tensor([1.0, -2.5, 0.0, math.inf])
    target = torch.empty(4, dtype=torch.bfloat16)
    assert torch.equal(stochastic_round_(target, exact, 1).float(), exact)
    source = torch.full((40_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16, 1 + 2^-7
    mean = float(stochastic_round_(torch.empty(40_000, dtype=torch.bfloat16), source, 2).double().mean())
    assert abs(mean - (1 + 2**-9)) < 5 * 2**-7 * math.sqrt(3) / 4 / 200
