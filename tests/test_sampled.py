"""WTA-CRS: unbiased, less variable than plain sampling, and saving the bytes it says."""

import copy
import functools
import io
import os
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optimzoo.functional import random
from optimzoo.functional.sampling import CRITERIA, column_row_sample, probabilities, winners
from optimzoo.memory.activations import saved
from optimzoo.modules import convert
from optimzoo.modules.norm_cache import NormCache
from optimzoo.modules.sampled import SampledLinear, sample_size
from optimzoo.modules.sampled_matmul import SampledMatmul
from optimzoo.modules.spectral import SpectralLinear
from tests.ranks import every_rank

N, DIM_IN, DIM_OUT, DRAWS = 400, 64, 48, 4000
K = int(0.3 * N)


# --- the estimator -------------------------------------------------------------------------------------------------


def terms(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """X, dY and what the sampler is told about their rows."""
    g = random.generator(7)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x, dy = normal(N, DIM_IN), normal(N, DIM_OUT)
    if kind != "uniform":
        x = x * normal(N, 1).exp()
    weights = x.norm(dim=1) * dy.norm(dim=1)
    if kind == "uniform":
        weights = torch.ones(N, dtype=torch.float64)
    if kind == "stale":
        weights = weights * (0.5 * normal(N)).exp()
    if kind == "zeros":
        x = torch.where(torch.arange(N)[:, None] % 3 == 0, 0.0, x)
        weights = x.norm(dim=1) * dy.norm(dim=1)
    if kind == "tiny":
        weights = weights * 1e-9
    return x, dy, weights


def coefficients(sampler: Callable[..., tuple[Tensor, Tensor]], weights: Tensor, *options: object) -> Tensor:
    """(DRAWS, N): how often, and with what scale, each draw takes each row."""
    rows = weights.expand(DRAWS, N)
    index, scale = sampler(rows, K, random.fold(0, "draws"), *options)
    return torch.zeros(DRAWS, N, dtype=torch.float64).scatter_add_(1, index.long(), scale.double())


def trace_variance(x: Tensor, dy: Tensor, p: Tensor, k: int, c: int) -> float:
    """tr Var = ((1 - P_C) sum_R |t_i|^2 / p_i - |G_R|^2) / (k - c), t_i the terms, R those that have not won."""
    rest = p.argsort(descending=True)[c:]
    rest = rest[p[rest] > 0]
    t = x[rest].norm(dim=1) * dy[rest].norm(dim=1)
    g = dy[rest].T @ x[rest]
    return float((p[rest].sum() * (t.square() / p[rest]).sum() - g.square().sum()) / (k - c))


def verdict(found: Tensor, x: Tensor, dy: Tensor, variance: float) -> tuple[float, float]:
    """Mean squared error of the averaged gradient in units of variance / draws; the worst of 32 projections' z."""
    exact = dy.T @ x
    error = dy.T @ (x * found.mean(0)[:, None]) - exact
    directions = torch.randn(32, DIM_OUT, DIM_IN, generator=random.generator(3), dtype=torch.float64)
    per_row = torch.einsum("nm,qmd,nd->nq", dy, directions, x)
    values = found @ per_row
    standard_error = values.std(0) / DRAWS**0.5
    z = (values.mean(0) - per_row.sum(0)) / standard_error
    return float(error.square().sum()) * DRAWS / variance, float(z.abs().max())


@pytest.mark.parametrize("mix", [0.0, 0.05])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["uniform", "heavy", "stale", "zeros", "tiny"])
def test_the_estimate_is_unbiased(kind, criterion, mix):
    x, dy, weights = terms(kind)
    p = probabilities(weights, mix)
    c = int(winners(p.topk(K).values, criterion))
    ratio, z = verdict(coefficients(column_row_sample, weights, criterion, mix), x, dy, trace_variance(x, dy, p, K, c))
    assert 0.8 <= ratio <= 1.25
    assert z < 4.5


def faulty(fault: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The published code's behaviour in one respect, ours in all others."""

    def sampler(weights: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
        index, scale = column_row_sample(weights, k, seed)
        if fault == "unweighted first epoch":  # WTA-1
            return index, torch.ones_like(scale)
        if fault == "without replacement":  # WTA-2
            keys = random.uniform(weights.numel(), seed).reshape(weights.shape)
            return keys.topk(k).indices, torch.ones_like(scale)
        total = weights.sum(-1, keepdim=True)  # WTA-3: the floor is added to each weight but once to the sum
        p = (weights + 1e-8) / (total + 1e-8)
        top = p.topk(k).values
        left = 1 - (top.cumsum(-1) - top)
        c = (left / torch.arange(k, 0, -1)).argmin(-1, keepdim=True)
        drawn = torch.arange(k) >= c
        mass = left.gather(-1, c)
        return index, torch.where(drawn, mass / ((k - c) * p.gather(-1, index.long())), 1.0)

    return sampler


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("unweighted first epoch", "heavy"), ("without replacement", "uniform"), ("floor in the sum", "tiny")],
)
def test_the_faults_of_the_published_code_would_be_seen(fault, kind):
    x, dy, weights = terms(kind)
    p = probabilities(weights)
    variance = trace_variance(x, dy, p, K, int(winners(p.topk(K).values)))
    ratio, z = verdict(coefficients(faulty(fault), weights), x, dy, variance)
    assert not 0.8 <= ratio <= 1.25
    assert z > 4.5


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("k", [1, 2, 7, 50])
def test_some_rows_are_always_left_to_chance(criterion, k):
    """WTA-4: a rounded tail below zero, or c = k, must not turn the estimate into a biased top-k."""
    for seed in range(20):
        weights = torch.rand(60, generator=random.generator(seed), dtype=torch.float64).pow(8)
        weights[k:] *= 1e-14
        p = probabilities(weights)
        c = int(winners(p.topk(k).values, criterion))
        assert 0 <= c < k
        index, scale = column_row_sample(weights, k, random.fold(seed), criterion)
        rest = torch.ones(60, dtype=torch.bool).scatter(0, p.topk(k).indices[:c], False)
        drawn = index[c:].long()
        assert rest[drawn].all()
        torch.testing.assert_close(scale[c:].double(), p[rest].sum() / ((k - c) * p[drawn]), rtol=1e-6, atol=0)


def test_degenerate_weights():
    index, scale = column_row_sample(torch.zeros(3, 50), 10, random.fold(1))
    assert torch.equal(scale, torch.full((3, 10), 5.0)), "weights that sum to zero are equal ones"
    assert index.dtype == torch.int32
    assert not torch.equal(index[0], index[1])
    index, scale = column_row_sample(torch.eye(20)[3], 5, random.fold(1))
    assert (index[0], scale[0], scale[1:].sum()) == (3, 1, 0), "what is known to be zero weighs nothing"
    index, scale = column_row_sample(torch.rand(2, 5), 5, random.fold(1))
    assert torch.equal(index, torch.arange(5).expand(2, 5))
    assert scale.eq(1).all()
    assert column_row_sample(torch.tensor([1.0, torch.nan, 2.0]), 2, 1)[1].isnan().any(), "a NaN must not vanish"


def test_batches_equal_single_rows_in_law():
    weights = torch.rand(3, N, generator=random.generator(0))
    p = probabilities(weights)
    for row, c in zip(p, winners(p.topk(K).values), strict=True):
        assert int(c) == int(winners(row.topk(K).values))


def test_variance_against_plain_column_row_sampling():
    """N=4096, n=64, m=48, ratio 0.3, log-normal rows: paper <= 0.70 of plain sampling, variance <= 0.58, five seeds."""
    n, k = 4096, int(0.3 * 4096)
    for seed in range(5):
        g = random.generator(seed)
        x = torch.randn(n, 64, generator=g, dtype=torch.float64) * torch.randn(n, 1, generator=g).double().exp()
        dy = torch.randn(n, 48, generator=g, dtype=torch.float64)
        p = probabilities(x.norm(dim=1) * dy.norm(dim=1))
        plain = trace_variance(x, dy, p, k, 0)
        parts = [trace_variance(x, dy, p, k, int(winners(p.topk(k).values, c))) / plain for c in CRITERIA]
        assert parts[0] <= 0.70, f"seed {seed}: paper {parts[0]:.3f}"
        assert parts[1] <= 0.58, f"seed {seed}: variance {parts[1]:.3f}"


# --- the layer -----------------------------------------------------------------------------------------------------


def layer(n: int = DIM_IN, m: int = DIM_OUT, dtype: torch.dtype = torch.float64, **options: object) -> SampledLinear:
    linear = nn.Linear(n, m).to(dtype)
    return SampledLinear.from_linear(linear, name="layer", **SampledLinear.resolve(**options))


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, dtype=dtype)
    return x * torch.randn(*shape[:-1], 1, dtype=dtype).exp()


def gradients(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    module(x).backward(dy)
    return x.grad, module.weight.grad, module.bias.grad


def test_output_input_gradient_and_bias_gradient_are_exact():
    sampled = layer()
    x, dy = rows(4, 50, DIM_IN), rows(4, 50, DIM_OUT)
    expected = gradients(sampled.to_linear(), x, dy)
    found = gradients(sampled, x, dy)
    assert torch.equal(sampled(x), sampled.to_linear()(x))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[1], expected[1])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_weight_gradient_is_unbiased_through_backward(criterion):
    sampled = layer(criterion=criterion)
    x, dy, draws = rows(200, DIM_IN), torch.randn(200, DIM_OUT, dtype=torch.float64), 1200
    exact = gradients(sampled.to_linear(), x, dy)[1]
    found = torch.stack([gradients(sampled, x, dy)[1] for _ in range(draws)])
    directions = torch.randn(32, DIM_OUT * DIM_IN, dtype=torch.float64)
    values = found.flatten(1) @ directions.T
    z = (values.mean(0) - directions @ exact.flatten()) / (values.std(0) / draws**0.5)
    assert z.abs().max() < 4.5
    p = probabilities(x.norm(dim=1), 0.05)
    variance = trace_variance(x, dy, p, 60, int(winners(p.topk(60).values, criterion)))
    # The error of a mean lies in about 85 directions, so that one ratio scatters by 0.15: four of them are averaged.
    parts = (found - exact).unflatten(0, (4, draws // 4)).mean(1)
    assert 0.8 <= float(parts.square().sum((1, 2)).mean()) * (draws / 4) / variance <= 1.25
    assert 0.9 <= float((found - exact).square().sum((1, 2)).mean()) / variance <= 1.1


def test_exact_outside_training_without_gradient_and_for_few_rows():
    x, dy = rows(100, DIM_IN), rows(100, DIM_OUT)
    for prepare in (nn.Module.eval, lambda m: m.weight.requires_grad_(False), lambda m: setattr(m, "ratio", 1.0)):
        sampled = layer()
        prepare(sampled)
        sampled(x.clone().requires_grad_()).backward(dy)
        assert int(sampled.draws) == 0
    sampled = layer()
    with torch.no_grad():
        sampled(x)
    torch.testing.assert_close(gradients(sampled, x[:10], dy[:10])[1], dy[:10].T @ x[:10])
    assert int(sampled.draws) == 0
    sampled(x)
    assert int(sampled.draws) == 1


def test_draws_differ_by_call_name_seed_and_stop_at_the_state_dict():
    x, dy = rows(100, DIM_IN), rows(100, DIM_OUT)
    first, second = layer(), layer(seed=1)
    second.load_state_dict(first.state_dict())
    other = SampledLinear.from_linear(first.to_linear(), name="other")
    again = SampledLinear.from_linear(first.to_linear(), name="_orig_mod.module.layer")
    one, two = gradients(first, x, dy)[1], gradients(first, x, dy)[1]
    assert not torch.equal(one, two)
    assert not torch.equal(one, gradients(second, x, dy)[1])
    assert not torch.equal(one, gradients(other, x, dy)[1])
    assert torch.equal(one, gradients(again, x, dy)[1]), "wrappers must not change the draws"
    resumed = layer()
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(gradients(first, x, dy)[1], gradients(resumed, x, dy)[1])


def test_consecutive_draws_are_independent():
    """Accumulating four micro-batches must average the noise: same rows, variance a quarter."""
    sampled, draws = layer(), 300
    x, dy = rows(200, DIM_IN), rows(200, DIM_OUT)
    exact = dy.T @ x
    found = torch.stack([gradients(sampled, x, dy)[1] for _ in range(draws)]) - exact
    single = found.square().sum((1, 2)).mean()
    of_four = found.unflatten(0, (-1, 4)).mean(1).square().sum((1, 2)).mean()
    assert 0.2 < float(of_four / single) < 0.31


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.float64, False), (torch.float32, True)])
def test_saved_bytes_of_a_layer(dtype, autocast):
    sampled, x = layer(dtype=dtype), rows(6, 50, DIM_IN, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = saved(sampled, x)
    k, itemsize = 90, 2 if autocast else dtype.itemsize
    assert found.total == k * DIM_IN * itemsize + 4 * k + 4 * k
    row_dtype = torch.bfloat16 if autocast else dtype
    assert {(entry.shape, entry.dtype) for entry in found.entries} == {
        ((k, DIM_IN), row_dtype),
        ((k,), torch.int32),
        ((k,), torch.float32),
    }


def test_a_gelu_mlp_saves_what_was_planned():
    tokens, d = 1000, 64
    mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
    x = torch.randn(tokens, d)
    exact = saved(mlp, x)
    freed = exact.freed_without(["0", "2"])
    assert [freed[name].nbytes for name in "02"] == [tokens * d * 4, tokens * 4 * d * 4]
    assert {entry.holders[0].op for entry in exact.entries} == {"Addmm", "Gelu"}
    convert(mlp, SampledLinear)
    found, k = saved(mlp, x), sample_size(tokens, 0.3)
    assert found.total == tokens * 4 * d * 4 + k * d * 4 + k * 4 * d * 4 + 2 * 8 * k
    assert found.total <= 0.65 * exact.total


def test_an_aliased_input_is_named_and_warned_about():
    mlp = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(500, 32)
    assert saved(mlp, x).freed_without(["2"])["2"] == (0, ("1 (Tanh)",))
    convert(mlp, SampledLinear)
    with pytest.warns(UserWarning, match=r"sampling '2' saves no memory"):
        mlp(x).sum().backward()
    mlp(x).sum().backward()  # told once: a second warning would be an error here


def test_asking_what_is_saved_keeps_nothing():
    """Softmax saves its own output: a graph that held it through us would hold itself, and the model, for ever."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
    saved(model, torch.randn(2, 4))
    weight = weakref.ref(model[0].weight)
    del model
    assert weight() is None


def test_convert_tells_from_a_batch_where_nothing_can_be_saved():
    mlp = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Dropout(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 8))
    x, state = torch.randn(500, 32), torch.get_rng_state()
    with pytest.raises(TypeError, match=r"SpectralLinear has nothing to find out from a batch"):
        convert(mlp, SpectralLinear, batch=x)
    assert type(mlp[0]) is nn.Linear
    convert(copy.deepcopy(mlp), SampledLinear, batch=x)  # the dropout's output is kept by nobody else
    mlp[2] = nn.Identity()
    with pytest.warns(UserWarning, match=r"saves no memory .*: 1 x '3', kept by 1 \(Tanh\)$"):
        assert convert(mlp, SampledLinear, batch=x) == ["0", "3", "5"]
    assert torch.equal(torch.get_rng_state(), state)
    assert int(mlp[0].draws) == 0


def test_convert_tells_it_of_a_transformer_block_by_block():
    model, ids = llama(num_hidden_layers=2)
    line = r": 2 x 'layers\.\*\.self_attn\.o_proj', kept by layers\.\*\.self_attn \(ScaledDotProduct\w+\)$"
    with pytest.warns(UserWarning, match=line):
        convert(model, SampledLinear, match=[*INPUTS, "*.o_proj"], batch={"input_ids": ids})
    model, _ = llama()
    convert(model, SampledLinear, match=INPUTS, batch=ids)
    model, _ = llama()
    with pytest.warns(
        UserWarning, match=r"1 x 'layers\.\*\.mlp\.up_proj', kept by layers\.\*\.mlp\.gate_proj \(\w+\)$"
    ):
        convert(model, SampledLinear, match="*.up_proj", batch=ids)


def llama(**options: object) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**size | {"num_hidden_layers": 1} | options)
    return transformers.LlamaModel(config), torch.randint(0, 64, (4, 40))


INPUTS = ["*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj", "*.down_proj"]


def test_a_llama_block_saves_what_was_planned():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, ids = llama(num_key_value_heads=2)
    exact = saved(model, ids)
    names = convert(model, SampledLinear, match=INPUTS)
    found = saved(model, ids)
    tokens, k = ids.numel(), sample_size(ids.numel(), 0.3)
    widths = (32, 32, 88)  # one sample for q, k and v, one for gate and up, one for down
    assert sum(freed.nbytes for freed in exact.freed_without(names).values()) == sum(4 * tokens * n for n in widths)
    assert exact.total - found.total == sum(4 * tokens * n - 4 * k * n - 8 * k for n in widths)
    with FakeTensorMode():
        fake, ids = llama(num_key_value_heads=2)
        convert(fake, SampledLinear, match=INPUTS)
        assert saved(fake, ids).total == found.total


def test_a_llama_block_trains_without_false_alarms_and_o_proj_raises_one():
    model, ids = llama()
    convert(model, SampledLinear, match=INPUTS)
    model(ids).last_hidden_state.square().sum().backward()
    attention = model.layers[0].self_attn
    assert [int(attention.get_submodule(name).draws) for name in ("q_proj", "k_proj", "v_proj")] == [1, 0, 0]
    assert attention.q_proj.site is attention.v_proj.site
    assert attention.q_proj.site.input is None, "neither the input nor the sample may outlive the forward pass here"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.layers.parameters())
    convert(model, SampledLinear, match="*.o_proj")
    with pytest.warns(UserWarning, match=r"sampling 'layers\.\*\.self_attn\.o_proj' saves no memory"):
        model(ids).last_hidden_state.square().sum().backward()


# --- sharing -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        return self.q_proj(x) + self.k_proj(other) * self.v_proj(other)


def test_sharing_follows_the_tensor_not_the_name():
    model = Attention()
    assert len(convert(model, SampledLinear)) == 3
    x, other = torch.randn(2, 100, 16)
    counts = lambda: [int(m.draws) for m in (model.q_proj, model.k_proj, model.v_proj)]  # noqa: E731
    model(x)
    assert counts() == [1, 0, 0]
    model(x, other)
    assert counts() == [2, 1, 0], "cross-attention: k and v share, q does not"
    model.v_proj.requires_grad_(False)
    model(x)
    assert counts() == [3, 1, 0]
    assert (model.q_proj.site.input, model.q_proj.site.shared, model.q_proj.site.seen) == (None, None, 0)
    twin = copy.deepcopy(model)
    assert twin.q_proj.site.members == [twin.q_proj, twin.k_proj, twin.v_proj]
    apart = Attention()
    convert(apart, SampledLinear, share=())
    apart(x)
    assert [int(m.draws) for m in apart.children()] == [1, 1, 1]


def test_skipped_members_neither_mix_up_nor_leak():
    model = Attention()
    convert(model, SampledLinear)
    x = torch.randn(100, 16)
    model.q_proj(x)
    first = model.q_proj.site.shared
    model(x)
    assert int(model.q_proj.draws) == 2, "a second call of the same layer opens a new round"
    assert first is not None
    assert model.q_proj.site.input is None


# --- how the layer is run -------------------------------------------------------------------------------------------


def mlp(**options: object) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    convert(model, SampledLinear, **options)
    return model


def grads(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch._dynamo's own
def test_compiles_in_one_graph_without_recompiling():
    model, x = mlp(), torch.randn(100, 16)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(x).square().sum().backward()
            twin(x).square().sum().backward()
            for a, b in zip(grads(model), grads(twin), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert int(model[0].draws) == 3


def test_autocast_and_low_precision():
    sampled, x, dy = layer(dtype=torch.float32), rows(300, DIM_IN).float(), torch.randn(300, DIM_OUT)
    twin = copy.deepcopy(sampled)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = sampled(x), sampled.to_linear()(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.backward(dy.bfloat16())
    full = gradients(twin, x, dy)
    assert sampled.weight.grad.dtype == torch.float32
    assert (sampled.weight.grad - full[1]).norm() < 0.01 * full[1].norm(), "the same rows, in bfloat16"
    half = sampled.to(torch.bfloat16)
    assert half.draws.dtype == torch.int64
    assert gradients(half, x.bfloat16(), dy.bfloat16())[1].dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(use_reentrant):
    model, draws = mlp(), 200
    x = torch.randn(100, 16, requires_grad=True)
    twin = copy.deepcopy(model).eval()
    twin(x).square().sum().backward()
    dx, expected = x.grad, grads(twin)[0]
    found = []
    for _ in range(draws):
        x.grad = None
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        torch.testing.assert_close(x.grad, dx, rtol=1e-4, atol=1e-4)
        found.append(grads(model)[0])
    values = torch.stack(found)
    directions = torch.randn(32, expected.numel())
    z = (values.flatten(1) - expected.flatten()) @ directions.T
    assert (z.mean(0) / (z.std(0) / draws**0.5)).abs().max() < 4.5


def test_a_checkpointed_llama_and_its_accumulated_micro_batches():
    model, ids = llama()
    convert(model, SampledLinear, match=INPUTS)
    model.layers[0].forward = functools.partial(checkpoint, model.layers[0].forward, use_reentrant=False)
    for micro in ids.split(2):
        model(micro).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.layers.parameters())
    assert model.layers[0].mlp.up_proj.site.input is None


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # between peft and transformers
def test_lora_layers_of_peft():
    peft = pytest.importorskip("peft")
    model, ids = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(model, config)
    nn.init.normal_(model.base_model.model.layers[0].mlp.down_proj.lora_B.default.weight)
    exact = saved(model, ids)
    names = convert(model, SampledLinear, match="*.lora_A.*")
    assert len(names) == 4
    found = saved(model, ids)
    tokens, k = ids.numel(), sample_size(ids.numel(), 0.3)
    assert exact.total - found.total == sum(4 * tokens * n - 4 * k * n - 8 * k for n in (32, 88))
    model(ids).last_hidden_state.square().sum().backward()
    assert all(model.get_submodule(name).weight.grad is not None for name in names)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


# --- the norm cache -------------------------------------------------------------------------------------------------


def cached(mode: str, **options: object) -> tuple[nn.Module, NormCache, Tensor, Tensor]:
    model = nn.Sequential(layer(16, 12, mix=0.05))
    return model, NormCache(model, 20, mode, **options), rows(5, 30, 16), rows(5, 30, 12)


@pytest.mark.parametrize(("mode", "length"), [("sample", None), ("token", 32)])
def test_the_cache_holds_the_sizes_of_the_last_visit_and_lowers_the_noise(mode, length):
    model, cache, x, dy = cached(mode, length=length, dtype=torch.float32)
    dy = dy * torch.randn(5, 1, 1).mul(2).exp()
    ids, exact = torch.tensor([3, 1, 19, 4, 7]), dy.flatten(0, 1).T @ x.flatten(0, 1)

    def noise(visit: Callable[[], object]) -> float:
        errors = []
        for _ in range(60):
            model.zero_grad()
            visit()
            errors.append(float((model[0].weight.grad - exact).square().sum()))
        return sum(errors) / len(errors)

    def visit() -> None:
        with cache.batch(ids):
            model(x).backward(dy)

    before = noise(lambda: model(x).backward(dy))
    assert cache.norms.eq(-1).all()
    visit()
    sizes = dy.norm(dim=-1).float()
    expected = sizes if mode == "token" else sizes.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(cache.norms[0, ids][:, : expected.shape[1]], expected)
    assert cache.norms[0, [0, 2, 5]].eq(-1).all()
    assert noise(visit) < 0.7 * before
    assert model[0].site.norms is None


@pytest.mark.parametrize("mode", ["token", "position"])
def test_one_token_with_all_the_gradient_is_kept_once_its_place_is_known(mode):
    """A classifier reads one token of a text; of its row, draws by |x| alone keep no more than of others."""
    model, cache, x, dy = cached(mode, length=32, dtype=torch.float32)
    dy[:, 1:] *= 1e-3
    exact = dy.flatten(0, 1).T @ x.flatten(0, 1)

    def errors(ids: range) -> float:
        model.zero_grad()
        with cache.batch(ids):
            model(x).backward(dy)
        return float((model[0].weight.grad - exact).norm() / exact.norm())

    assert errors(range(5)) > 0.2
    assert max(errors(range(5, 10)) for _ in range(5)) < 0.02, "samples never seen are like those that were"
    sizes = dy.norm(dim=-1).float().mean(0)
    torch.testing.assert_close(cache.typical[0, :30], sizes)
    assert cache.typical[0, 30:].eq(-1).all()
    if mode == "position":
        assert cache.norms.numel() == 0


def test_what_the_cache_expects_of_samples():
    model, cache, x, dy = cached("token", length=30, dtype=torch.float32)
    dy[:, 20:] = 0  # padding
    with cache.batch([0, 1, 2, 3, 4]):
        assert model[0].site.norms.eq(1).all(), "nothing is known"
        model(x).backward(dy)
    sizes = dy.norm(dim=-1).float()
    with cache.batch([3, 9]):
        torch.testing.assert_close(model[0].site.norms, torch.stack([sizes[3], sizes.mean(0)]))
        assert model[0].site.norms[1, 20:].eq(0).all()
    cache.typical[0, 25:] = -1
    with cache.batch([9]):
        torch.testing.assert_close(model[0].site.norms[0, 25:], cache.typical[0, :25].mean().expand(5))


def test_a_stale_cache_leaves_the_mean_alone():
    model, cache, x, dy = cached("token", length=30)
    ids = list(range(5))
    cache.norms[0, :5] = torch.rand(5, 30) * (torch.rand(5, 30) > 0.3)
    cache.norms[0, 2] = -1
    exact, draws, kept = dy.flatten(0, 1).T @ x.flatten(0, 1), 800, cache.norms.clone()
    found = []
    for _ in range(draws):
        cache.norms.copy_(kept)
        model.zero_grad()
        with cache.batch(ids):
            model(x).backward(dy)
        found.append(model[0].weight.grad - exact)
    values = torch.stack(found).flatten(1) @ torch.randn(16 * 12, 32, dtype=torch.float64)
    assert (values.mean(0) / (values.std(0) / draws**0.5)).abs().max() < 4.5


def test_an_overflowed_step_tells_the_cache_nothing():
    model, cache, x, dy = cached("sample")
    for scale in (torch.inf, 1.0):
        with cache.batch(range(5)):
            model(x).backward(dy * torch.tensor([scale, 1, 1, 1, 1])[:, None, None])
        assert cache.norms[0, :5, 0].gt(0).tolist() == [scale == 1.0, True, True, True, True]
        assert cache.norms.isfinite().all()


def test_the_cache_travels_in_its_state_dict_and_names_what_does_not_fit():
    model, cache, x, dy = cached("sample")
    with cache.batch([0, 1, 2, 3, 4]):
        model(x).backward(dy)
    twin = NormCache(copy.deepcopy(model), 20)
    twin.load_state_dict(torch.load(_saved(cache.state_dict()), weights_only=True))
    assert torch.equal(twin.norms, cache.norms)
    with pytest.raises(ValueError, match=r"\(1, 20, 1\), this one \(1, 30, 1\)"):
        NormCache(model, 30).load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="another mode"):
        NormCache(model, 20, "token", length=4).load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="entered with 2 ids"), cache.batch([0, 1]):
        model(x)
    with pytest.raises(ValueError, match="mode='sample'"), NormCache(model, 20, "token", length=8).batch(range(5)):
        model(x)
    with pytest.raises(IndexError, match=r"0\.\.19"), cache.batch([20]):
        pass
    with pytest.raises(ValueError, match="not one of 'none'"):
        NormCache(model, 20, "exact")
    with pytest.raises(ValueError, match="convert the model first"):
        NormCache(nn.Linear(2, 2), 20)
    none = NormCache(model, 20, "none")
    with none.batch([99]):
        model(x).backward(dy)
    assert none.norms.numel() == 0


def _saved(state: dict) -> object:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_layers_that_share_an_input_share_their_norms():
    model = Attention()
    convert(model, SampledLinear)
    cache, x = NormCache(model, 4, dtype=torch.float32), torch.randn(4, 30, 16)
    assert list(cache.sites) == ["q_proj"]
    outputs = {}
    for module in model.children():
        keep = lambda m, _, y: y.register_hook(functools.partial(outputs.__setitem__, m)) and None  # noqa: E731
        module.register_forward_hook(keep)
    with cache.batch(range(4)):
        model(x).square().sum().backward()
    joint = sum(dy.norm(dim=-1).square().mean(1) for dy in outputs.values()).sqrt()
    torch.testing.assert_close(cache.norms[0, :, 0], joint)


# --- attention scores -----------------------------------------------------------------------------------------------


def test_sampled_matmul_is_unbiased_and_saves_its_sample():
    product, draws = SampledMatmul(ratio=0.3), 400
    a, b, dc = rows(2, 3, 60, 8), rows(2, 3, 50, 8).mT.contiguous(), torch.randn(2, 3, 60, 50, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    exact = torch.autograd.grad(a @ b, (a, b), dc)
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(copy.deepcopy(product).eval()(a, b), a @ b)
    found = [torch.autograd.grad(product(a, b), (a, b), dc) for _ in range(draws)]
    for i in range(2):
        values = torch.stack([f[i] for f in found]).flatten(1) - exact[i].flatten()
        values = values @ torch.randn(values.shape[1], 32, dtype=torch.float64)
        assert (values.mean(0) / (values.std(0) / draws**0.5)).abs().max() < 4.5
    assert saved(product, (a, b)).total == 6 * (18 + 15) * (8 * 8 + 8)
    assert saved(product, (a, b.detach())).total == 6 * 15 * (8 * 8 + 8)
    with pytest.raises(ValueError, match="equal leading dimensions"):
        product(a, b[0])


# --- two ranks ------------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    convert(model, SampledLinear)
    cache = NormCache(model, 8)
    picked = []
    keep = SampledLinear.draw
    SampledLinear.draw = lambda *args: picked.append(keep(*args)) or picked[-1]
    parallel = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(4, 30, 16)
    for _ in range(2):
        model.zero_grad()
        with cache.batch([rank * 4 + i for i in range(4)]):
            parallel(x).square().sum().backward()
    torch.save((picked[0][1], model[0].weight.grad, cache.norms), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # DDP's destructor may wait for a gloo thread that waits for the interpreter


def test_two_ranks_draw_independently_and_agree_on_gradients_and_cache(tmp_path):
    every_rank(2, _rank, str(tmp_path))
    (indices, grad, norms), (other_indices, other_grad, other_norms) = (
        torch.load(tmp_path / f"{r}.pt") for r in (0, 1)
    )
    assert not torch.equal(indices, other_indices), "the same input on both ranks must be sampled independently"
    assert torch.equal(grad, other_grad)
    assert torch.equal(norms, other_norms)
    assert norms.min() > 0, "every rank knows the samples of both"
