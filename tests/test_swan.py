"""SWAN: the polar factor of the standardised gradient, at RMS 1, with no state."""

import numpy as np
import pytest
import torch
from torch import nn

from optimzoo.memory import Workspace
from optimzoo.optimizers.swan import SWAN
from tests.cases import tiny, train
from tests.reference import swan as reference

SHAPES = [(48, 48), (96, 40), (40, 96)]
SPECTRA = ["gaussian", "4 decades", "half rank", "rank 5", "rows over 3 decades"]
both = pytest.mark.parametrize("backend", ["fast", "exact"])


def gradient(shape, spectrum, seed=0, dtype=torch.float32):
    m, n = shape
    draw, s = np.random.default_rng(seed), min(shape)
    g = draw.standard_normal(shape)
    if spectrum == "4 decades":
        u, v = np.linalg.qr(draw.standard_normal((m, s)))[0], np.linalg.qr(draw.standard_normal((n, s)))[0]
        g = (u * np.logspace(0, -4, s)) @ v.T
    elif "rank" in spectrum:
        r = s // 2 if spectrum == "half rank" else 5
        g = draw.standard_normal((m, r)) @ draw.standard_normal((r, n))
    elif spectrum.startswith("rows"):
        g *= np.logspace(0, -3, m)[:, None]
    return torch.from_numpy(g).to(dtype)


def direction(g, **options):
    """What one step does to a weight, over lr."""
    p = nn.Parameter(torch.zeros(g.shape, dtype=g.dtype))
    opt = SWAN([("w", p)], lr=1.0, **options)
    p.grad = g.clone()
    opt.step()
    return -p.detach()


def cosine(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("center", [True, False])
def test_exact_is_the_polar_factor_of_the_standardised_gradient(shape, spectrum, center):
    g = gradient(shape, spectrum)
    u = direction(g, backend="exact", center=center)
    assert cosine(u, reference.direction(g.double().numpy(), center)) >= 0.999
    assert float(u.square().mean().sqrt()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_follows_its_reference_in_float64(shape):
    gs = [gradient(shape, "gaussian", seed, torch.float64) for seed in range(4)]
    p = nn.Parameter(gradient(shape, "gaussian", 9, torch.float64))
    options = {"lr": 1e-2, "lr_ratio": 0.3, "weight_decay": 0.1}
    expected = reference.trajectory(p.detach().numpy().copy(), [g.numpy() for g in gs], **options)
    opt = SWAN([("w", p)], backend="exact", **options)
    for g, w in zip(gs, expected, strict=True):
        p.grad = g
        opt.step()
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=0, atol=1e-2 * 0.3 * 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_is_finite_of_the_same_size_and_near(shape, spectrum, dtype):
    g = gradient(shape, spectrum, dtype=dtype)
    u = direction(g, backend="fast").float()
    assert torch.isfinite(u).all()
    assert float(u.square().mean().sqrt()) == pytest.approx(1, abs=1e-5 if dtype == torch.float32 else 2e-3)
    if dtype == torch.float32:  # rounding the gradient to bfloat16 adds directions that the reference takes for its own
        assert cosine(u, reference.direction(g.double().numpy())) > 0.8


@both
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_the_gradients_size_does_not_matter(backend, scale):
    g = gradient((40, 48), "gaussian")
    assert cosine(direction(g * scale, backend=backend), direction(g, backend=backend)) > 0.9999


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_without_spread_are_left_alone(backend, shape):
    g = gradient(shape, "gaussian")
    g[0], g[5], g[-1] = 0, 3.3, 0.1 + 1e-8 * g[-1]
    u = direction(g, backend=backend)
    assert u[[0, 5, -1]].eq(0).all()
    assert u[1:5].ne(0).any(1).all()
    assert float(u.square().mean().sqrt()) == pytest.approx(1, abs=1e-5)
    for flat in (0.0, 0.7):
        assert direction(torch.full(shape, flat), backend=backend).eq(0).all()


def test_row_sums_of_a_weight_never_change_with_centring():
    g = gradient((40, 64), "gaussian")
    assert float(direction(g, backend="exact").sum(1).abs().max()) < 1e-3
    assert float(direction(g, backend="exact", center=False).sum(1).abs().max()) > 0.1


@pytest.mark.parametrize("lr_ratio", [1.0, 0.2])
def test_a_step_has_rms_lr_times_lr_ratio(lr_ratio):
    p = nn.Parameter(torch.zeros(32, 48))
    opt = SWAN([("w", p)], lr=1e-3, lr_ratio=lr_ratio)
    p.grad = 1e-6 * gradient((32, 48), "gaussian")
    opt.step()
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(1e-3 * lr_ratio, rel=1e-5)
    assert SWAN.options["lr_ratio"].default == 1.0


def test_matrices_have_no_state_at_all():
    model = tiny()
    opt = SWAN(model)
    train(model, opt, 0, 3)
    assert opt.param_groups[0]["name"] == "matrices"
    for p in opt.param_groups[0]["params"]:
        assert opt.state[p] == {}
    book = opt.memory()
    assert book.slack == 0
    rest = [p for group in opt.param_groups[1:] for p in group["params"]]
    assert book.total == sum(8 * p.numel() + 4 for p in rest)
    assert "matrices" not in book.by("group")


@pytest.mark.parametrize(
    ("shape", "rule"), [((7, 32), "adamw"), ((32, 7), "adamw"), ((8, 32), "swan"), ((32, 8), "swan")]
)
def test_thin_matrices_go_to_the_fallback(shape, rule):
    opt = SWAN([("w", nn.Parameter(torch.zeros(shape)))])
    ((_, _, found, reason, _),) = opt.routes()
    assert found == rule
    assert rule == "swan" or "shorter than 8" in reason


@both
@pytest.mark.parametrize("shape", [(256, 256), (512, 256), (256, 512)])
def test_workspace(backend, shape):
    named = [(f"w{i}", nn.Parameter(torch.zeros(shape))) for i in range(3)]
    opt = SWAN(named, backend=backend)
    for _, p in named:
        p.grad = torch.randn(shape)
    with Workspace() as space:
        opt.step()
    assert space.peak <= SWAN.workspace * 4 * shape[0] * shape[1]
    assert SWAN.workspace == 3.5


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ns_steps": 10}, TypeError, "SWAN has no option 'ns_steps'"),
        ({"backend": "exakt"}, ValueError, "backend='exakt' is not known; it must be one of 'fast', 'exact'"),
        ({"center": 1}, TypeError, "center=1 must be True or False"),
        ({"lr_ratio": -0.1}, ValueError, "lr_ratio=-0.1 is out of range"),
    ],
)
def test_refuses_by_name(options, error, words):
    with pytest.raises(error, match=words):
        SWAN(tiny(), **options)
