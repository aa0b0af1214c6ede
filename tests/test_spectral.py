"""SpectralLinear: the same function as the plain layer, true gradients, and surgery that leaves the weight alone."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from optimzoo.modules.replacement import convert, merge
from optimzoo.modules.spectral import SAMPLINGS, SpectralLinear

SHAPES = [(12, 20), (16, 16), (20, 12)]
FACTORS = ("U_a", "V_a", "s")


def spectral(
    m: int, n: int, bias: bool = True, dtype: torch.dtype = torch.float64, **options: object
) -> SpectralLinear:
    return SpectralLinear.from_linear(nn.Linear(n, m, bias=bias, dtype=dtype), rank=5, **options)


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def composed(layer: SpectralLinear) -> tuple[Tensor, dict[str, Tensor]]:
    """The dense weight as autograd sees it, and the leaves it was made of."""
    leaves = {name: getattr(layer, name).detach().clone().requires_grad_() for name in FACTORS}
    u = torch.cat([leaves["U_a"], layer.U_f], 1)
    v = torch.cat([leaves["V_a"], layer.V_f], 0)
    return u @ torch.diag(leaves["s"]) @ v, leaves


def shaken(layer: SpectralLinear, seed: int = 0) -> SpectralLinear:
    """Move the layer off its decomposition, as training does."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in FACTORS:
            p = getattr(layer, name)
            p.add_(torch.randn(p.shape, generator=gen, dtype=p.dtype), alpha=0.05)
        layer.renormalise()
    return layer


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("evaluation", ["factored", "materialised"])
def test_same_function_after_conversion(m: int, n: int, dtype: torch.dtype, bar: float, evaluation: str) -> None:
    for bias in (True, False):
        linear = nn.Linear(n, m, bias=bias, dtype=dtype)
        layer = SpectralLinear.from_linear(linear, rank=5, evaluation=evaluation)
        x = torch.randn(7, n, dtype=dtype)
        assert relative(layer(x), linear(x)) < bar
        assert relative(layer.to_linear()(x), linear(x)) < bar
        assert layer.bias is linear.bias
        assert layer.to_linear().weight.dtype == dtype


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("evaluation", ["factored", "materialised"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_autograds(m: int, n: int, evaluation: str, recompute: bool) -> None:
    """Default form: exactly those of U diag(s) V. Enhanced: the vectors' ones divided by their singular value."""
    for enhanced, bias, lead in itertools.product((False, True), (False, True), ((9,), (2, 5))):
        layer = shaken(spectral(m, n, bias, evaluation=evaluation, recompute=recompute, enhanced=enhanced))
        weight, leaves = composed(layer)
        x = torch.randn(*lead, n, dtype=torch.float64, requires_grad=True)
        x_ = x.detach().clone().requires_grad_()
        b = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
        dy = torch.randn(*lead, m, dtype=torch.float64)
        y, y_ = layer(x), nn.functional.linear(x_, weight, b)
        assert relative(y, y_) < 1e-12
        y.backward(dy)
        y_.backward(dy)
        r = layer.rank
        scale = leaves["s"].detach()[:r] if enhanced else torch.ones(r, dtype=torch.float64)
        assert relative(layer.U_a.grad, leaves["U_a"].grad / scale) < 1e-12
        assert relative(layer.V_a.grad, leaves["V_a"].grad / scale[:, None]) < 1e-12
        assert relative(layer.s.grad, leaves["s"].grad) < 1e-12
        assert relative(x.grad, x_.grad) < 1e-12
        if b is not None:
            assert relative(layer.bias.grad, b.grad) < 1e-12


def test_enhanced_gradient_reaches_vectors_whose_singular_value_is_zero() -> None:
    for enhanced in (True, False):
        layer = spectral(12, 20, enhanced=enhanced)
        with torch.no_grad():
            layer.s[2] = 0
        layer(torch.randn(9, 20, dtype=torch.float64)).square().sum().backward()
        assert (layer.U_a.grad[:, 2].norm().item() > 0.1) is enhanced
        assert (layer.V_a.grad[2].norm().item() > 0.1) is enhanced


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    for frozen in FACTORS:
        layer = spectral(12, 20)
        getattr(layer, frozen).requires_grad_(False)
        layer(torch.randn(9, 20, dtype=torch.float64)).sum().backward()
        assert getattr(layer, frozen).grad is None
        assert all(getattr(layer, name).grad is not None for name in FACTORS if name != frozen)


def saved_elements(layer: SpectralLinear, x: Tensor) -> int:
    own = {t.data_ptr() for t in itertools.chain(layer.parameters(), layer.buffers())}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            held[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(held.values())


def test_saves_x_and_z_or_x_alone() -> None:
    m, n, tokens = 16, 24, 40
    x = torch.randn(tokens, n, dtype=torch.float64)
    assert saved_elements(spectral(m, n), x) == tokens * (n + m)
    assert saved_elements(spectral(m, n, recompute=True), x) == tokens * n
    assert saved_elements(spectral(m, n, evaluation="materialised"), x) == tokens * n


def products(layer: SpectralLinear, tokens: int) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, layer.in_features, dtype=torch.float64))
    return counter.get_total_flops()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_backward_multiplies_no_more_than_its_formula(m: int, n: int) -> None:
    """Nothing of the size of 2 N m n that a dense gradient of the weight would take."""
    tokens, k = 9, min(m, n)
    for recompute in (False, True):
        layer = spectral(m, n, recompute=recompute)
        y = layer(torch.randn(tokens, n, dtype=torch.float64, requires_grad=True))
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        wanted = 2 * tokens * (k * (m + n) + layer.rank * (m + n) + k * n * recompute)
        assert counter.get_total_flops() == wanted


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_automatic_evaluation_takes_the_cheaper_way(m: int, n: int) -> None:
    layers = {how: spectral(m, n, evaluation=how) for how in ("auto", "factored", "materialised")}
    with torch.no_grad():
        for tokens in (3, max(m, n) - 1, max(m, n) + 1, 90):
            cost = {how: products(layer, tokens) for how, layer in layers.items()}
            assert cost["auto"] == min(cost["factored"], cost["materialised"])
    assert products(layers["auto"], 90) == products(layers["factored"], 90)  # Z is kept, so it might as well be used


def test_weights_have_the_promised_size_and_nothing_else_is_trained() -> None:
    for (m, n), rank in itertools.product(SHAPES, (5, 100)):
        layer = SpectralLinear.from_linear(nn.Linear(n, m, bias=False), rank=rank)
        k, r = min(m, n), min(m, n, rank)
        floats = [t for t in layer.state_dict().values() if t.is_floating_point()]
        assert sum(t.numel() for t in floats) == k * (m + n) + k
        assert sum(t.untyped_storage().nbytes() for t in floats) == 4 * (k * (m + n) + k)
        assert sum(p.numel() for p in layer.parameters()) == r * (m + n) + k


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swap_leaves_the_weight_bits_of_factors_and_identities(m: int, n: int, dtype: torch.dtype) -> None:
    layer = shaken(spectral(m, n, dtype=dtype))
    before, s, u = layer.dense(), layer.s.detach().clone(), layer.U_a.detach().clone()
    identity = {name: (id(t), t.data_ptr()) for name, t in layer.state_dict(keep_vars=True).items()}
    source = layer.swap(torch.tensor([1, 3]), torch.tensor([6, 9]))
    assert relative(layer.dense(), before) < 1e-12
    assert torch.equal(layer.s, s[source])
    assert torch.equal(layer.U_f[:, 9 - layer.rank], u[:, 3])
    assert source.tolist()[:10] == [0, 6, 2, 9, 4, 5, 1, 7, 8, 3]
    assert {name: (id(t), t.data_ptr()) for name, t in layer.state_dict(keep_vars=True).items()} == identity


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_new_decomposition_leaves_the_weight(m: int, n: int, dtype: torch.dtype) -> None:
    layer = shaken(spectral(m, n, dtype=dtype))
    before = layer.dense()
    identity = {name: (id(t), t.data_ptr()) for name, t in layer.state_dict(keep_vars=True).items()}
    layer.resvd()
    assert relative(layer.dense(), before) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert {name: (id(t), t.data_ptr()) for name, t in layer.state_dict(keep_vars=True).items()} == identity
    u = torch.cat([layer.U_a, layer.U_f], 1).double()
    assert (u.mT @ u - torch.eye(u.shape[1])).abs().max() < 1e-5
    assert bool((layer.s.diff() <= 0).all())


def test_renormalise() -> None:
    layer = spectral(12, 20, dtype=torch.float32)
    with torch.no_grad():
        layer.U_a.mul_(3)
        layer.V_a.mul_(torch.rand(5, 1))
        layer.s.sub_(layer.s.median())
    layer.renormalise()
    assert (layer.U_a.norm(dim=0) - 1).abs().max() < 1e-6
    assert (layer.V_a.norm(dim=1) - 1).abs().max() < 1e-6
    assert layer.s.min() == 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_round_of_draws(sampling: str) -> None:
    """Reselection keeps W, says where state goes, and depends on its arguments alone."""
    layer = shaken(spectral(12, 20))
    twin, before = copy.deepcopy(layer), layer.dense()
    seen: set[int] = set()
    for step in range(layer.round):
        torch.manual_seed(step)
        s = layer.s.detach().clone()
        moved = layer.reselect(step, seed=step, sampling=sampling)
        assert moved[layer.U_a] is None
        assert moved[layer.V_a] is None
        assert torch.equal(layer.s, s[moved[layer.s]])
        seen |= set(layer.perm[: layer.rank].tolist())
        torch.manual_seed(99)
        twin.reselect(step, seed=step, sampling=sampling)
        assert all(
            torch.equal(a, b) for a, b in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True)
        )
    assert relative(layer.dense(), before) < 1e-12
    assert layer.reselections == layer.round == 3
    if sampling == "sequential":
        assert seen == set(range(12))
    if sampling == "topr":
        assert layer.s[: layer.rank].min() >= layer.s[layer.rank :].max()
    assert layer.reselect(layer.round, seed=7, sampling=sampling)[layer.s] is None  # a round ends: new decomposition
    assert relative(layer.dense(), before) < 1e-12


def test_draws_follow_the_mixture() -> None:
    """First-slot probabilities of the ablations and of the mixture, at rank 1, against their formulas."""
    layer = SpectralLinear.from_linear(nn.Linear(6, 6, dtype=torch.float64), rank=1)
    share = layer.s.detach() / layer.s.sum()
    draws = 4000
    for sampling, p in {"mix": (share + 1 / 6) / 2, "sigma": share, "uniform": torch.full_like(share, 1 / 6)}.items():
        counts = torch.zeros(6, dtype=torch.float64)
        for seed in range(draws):
            counts[layer.choose(0, seed, sampling)] += 1
        chi2 = ((counts - draws * p) ** 2 / (draws * p)).sum()
        assert chi2 < 25.7, sampling  # the 0.9999 quantile of chi-square with 5 degrees of freedom


def test_draws_without_enough_singular_values() -> None:
    layer = spectral(12, 20)
    with torch.no_grad():
        layer.s[2:] = 0
    for sampling in SAMPLINGS:
        assert len(set(layer.choose(1, 3, sampling).tolist())) == layer.rank
    assert {0, 1} <= set(layer.choose(1, 3, "sigma").tolist())
    with pytest.raises(ValueError, match="'multinomial' is not one of 'mix'"):
        layer.reselect(0, sampling="multinomial")


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24, bias=False), nn.Tanh(), nn.Linear(24, 3))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_train_and_merge(dtype: torch.dtype, bar: float) -> None:
    net = model().to(dtype)
    x = torch.randn(32, 10, dtype=dtype)
    plain = net(x)
    names = convert(net, SpectralLinear, match=("0", "2"), rank=4)
    assert names == ["0", "2"]
    assert relative(net(x), plain) < bar
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    layers = [layer for layer in net if isinstance(layer, SpectralLinear)]
    losses = []
    for step in range(12):
        loss = (net(x) - x[:, :3].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for layer in layers:
            layer.renormalise()
            if step % 3 == 0:
                layer.reselect(step // 3, seed=step)
    assert losses[-1] < 0.7 * losses[0]
    trained = net(x)
    assert merge(net) == ["0", "2"]
    assert all(type(layer) in (nn.Linear, nn.Tanh) for layer in net)
    assert relative(net(x), trained) < bar


def test_tied_weights_are_refused() -> None:
    net = model()
    net.add_module("again", nn.Linear(24, 24))
    net.again.weight = net[2].weight
    with pytest.raises(ValueError, match=r"shared with another module"):
        convert(net, SpectralLinear, match="2")


def test_bfloat16_models_keep_float32_factors() -> None:
    linear = nn.Linear(20, 12, dtype=torch.bfloat16)
    layer = SpectralLinear.from_linear(linear, rank=5)
    x = torch.randn(7, 20, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert {getattr(layer, name).dtype for name in (*FACTORS, "U_f", "V_f")} == {torch.float32}
    assert torch.equal(layer.to_linear().weight, linear.weight)
    y.sum().backward()
    assert {getattr(layer, name).grad.dtype for name in FACTORS} == {torch.float32}
    assert relative(y, linear(x)) < 2e-2


@pytest.mark.parametrize("evaluation", ["factored", "materialised"])
def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(evaluation: str) -> None:
    layer = spectral(12, 20, dtype=torch.float32, evaluation=evaluation)
    exact = copy.deepcopy(layer)
    x = torch.rand(6000, 20) + 0.5  # a one-sided sum over many tokens: bfloat16 would stall
    dy = torch.rand(6000, 12) + 0.5
    exact(x).backward(dy)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy.to(torch.bfloat16))
    for name in (*FACTORS, "bias"):
        grad = getattr(layer, name).grad
        assert grad.dtype == torch.float32
        assert relative(grad, getattr(exact, name).grad) < 1e-2, name
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    layer = spectral(12, 20)
    x = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, wanted[name]) for name, p in layer.named_parameters())


# The tracer of PyTorch itself makes an autograd.Function, against PyTorch's own advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("evaluation", ["factored", "materialised"])
def test_compiles_as_one_graph_and_survives_surgery(evaluation: str) -> None:
    layer = shaken(spectral(12, 20, evaluation=evaluation))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 20, dtype=torch.float64)
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        layer.zero_grad()
        layer(x).square().sum().backward()
        wanted = {name: p.grad.clone() for name, p in layer.named_parameters()}
        layer.zero_grad()
        compiled(x).square().sum().backward()
        assert all(relative(p.grad, wanted[name]) < 1e-12 for name, p in layer.named_parameters())
        layer.reselect(step, seed=step)
        layer.resvd()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_state_dict_round_trip_and_deepcopy() -> None:
    layer = shaken(spectral(12, 20))
    layer.reselect(0, seed=4)
    other = spectral(12, 20)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(7, 20, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    assert other.reselections == 1
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_unknown_options_and_bounds_are_refused() -> None:
    for options, message in (
        ({"ranks": 3}, "did you mean 'rank'"),
        ({"evaluation": "dense"}, "it must be one of 'auto'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            SpectralLinear.from_linear(nn.Linear(4, 4), **options)
