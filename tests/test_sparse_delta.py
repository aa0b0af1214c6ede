"""SparseDeltaLinear: gradients of chosen entries, a weight that comes back bit for bit, no m x n temporary."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from optimzoo.functional import sparse
from optimzoo.functional.sparse import (
    entry_gradients,
    entry_gradients_and_candidates,
    exchange,
    outer_largest,
    random_entries,
    support,
)
from optimzoo.memory import Workspace
from optimzoo.modules.delta_file import load_delta, save_delta, trainable_numbers
from optimzoo.modules.replacement import convert, merge, unmerge
from optimzoo.modules.sparse_delta import SparseDeltaLinear
from optimzoo.optimizers.sft import SFT

SHAPES = [(12, 20), (16, 16), (33, 7), (1, 9), (9, 1)]


@pytest.fixture(params=[1 << 20, 64])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The whole matrix as one block of rows, and as many."""
    monkeypatch.setattr(sparse, "BLOCK", request.param)
    return request.param


def delta_layer(
    m: int, n: int, dtype: torch.dtype = torch.float64, bias: bool = True, **budget: float
) -> SparseDeltaLinear:
    layer = SparseDeltaLinear.from_linear(nn.Linear(n, m, bias=bias, dtype=dtype), **(budget or {"density": 0.3}))
    with torch.no_grad():
        layer.values.normal_(std=0.3)
    return layer


def effective(layer: SparseDeltaLinear) -> Tensor:
    """W + D as a dense leaf."""
    dense = layer.base.weight.detach().to(layer.values.dtype, copy=True).flatten()
    dense[layer.indices.long()] += layer.values.detach()
    return dense.view_as(layer.base.weight).to(layer.base.weight.dtype).requires_grad_()


def worst(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 24, dtype=dtype), nn.Linear(24, 8, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("tokens", [(5,), (2, 3), ()])
def test_outputs_and_gradients_are_those_of_the_dense_weight(
    m: int, n: int, tokens: tuple[int, ...], block: int
) -> None:
    layer = delta_layer(m, n)
    x, weight = torch.randn(*tokens, n, dtype=torch.float64, requires_grad=True), effective(layer)
    probe = torch.randn(*tokens, m, dtype=torch.float64)
    y, wanted = layer(x), nn.functional.linear(x, weight, layer.base.bias)
    assert worst(y, wanted) < 1e-12
    got_x, got_values = torch.autograd.grad((y * probe).sum(), [x, layer.values])
    dense_x, dense_w = torch.autograd.grad((wanted * probe).sum(), [x, weight])
    assert worst(got_x, dense_x) < 1e-12
    assert worst(got_values, dense_w.flatten()[layer.indices.long()]) < 1e-12
    assert layer.base.weight.grad is None


def test_gradcheck() -> None:
    layer = delta_layer(5, 4)
    layer.base.bias.requires_grad_(True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"values": values, "base.bias": bias}, (x,))

    assert torch.autograd.gradcheck(product, (x, layer.values, layer.base.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_layers_are_not_rounded_to_it(dtype: torch.dtype) -> None:
    grad, x = torch.randn(700, 16).to(dtype), torch.randn(700, 24).to(dtype)
    indices = random_entries(60, 16 * 24, 0).int()
    found = entry_gradients(grad, x, [support(indices, 16, 24)])[0]
    exact = (grad.double().T @ x.double()).flatten()[indices.long()]
    assert found.dtype == torch.float32
    assert worst(found.double(), exact) < 1e-6
    assert worst(exact.to(dtype).double(), exact) > 1e-4  # what rounding would have done


def test_candidates_are_the_largest_gradients_and_later_sums_are_exact(block: int) -> None:
    m, n, k = 20, 30, 50
    grad, x = torch.randn(9, m, dtype=torch.float64), torch.randn(9, n, dtype=torch.float64)
    own = support(random_entries(k, m * n, 1).int(), m, n)
    dense = (grad.T @ x).flatten()
    for count in (1, k, m * n):
        values, best, sums = entry_gradients_and_candidates(grad, x, own, count)
        assert torch.equal(best.long(), dense.abs().topk(count).indices.sort().values)
        assert worst(sums, dense[best.long()]) < 1e-12
        assert worst(values, dense[own.indices.long()]) < 1e-12
        again = entry_gradients(grad, x, [own, support(best, m, n)])
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], sums)


def test_largest_of_an_outer_product_outside_the_active_entries(block: int) -> None:
    m, n, count = 25, 31, 40
    row, col = torch.rand(m) ** 4, torch.rand(n) ** 4
    active = support(random_entries(100, m * n, 3).int(), m, n)
    scores = torch.outer(row.double(), col.double()).flatten()
    scores[active.indices.long()] = -1
    found = outer_largest(row, col, count, active)
    assert torch.equal(found.long(), scores.topk(count).indices.sort().values)
    tiny = outer_largest(row * 1e-22, col * 1e-22, count, active)  # products that float32 cannot hold
    assert torch.equal(tiny, found)


def test_choices_hold_no_matrix() -> None:
    m, n, k = 2048, 4096, 2000
    active = support(random_entries(k, m * n, 0).int(), m, n)
    with Workspace() as space:
        outer_largest(torch.rand(m), torch.rand(n), k, active)
    assert space.peak < 0.5 * 4 * m * n
    with Workspace() as space:
        random_entries(k, m * n, 0)
    assert space.peak < 100 * k


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_exchange_keeps_exactly_k_sorted_distinct_entries(data: st.DataObject) -> None:
    total = data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, total - 1))
    indices = torch.tensor(sorted(data.draw(st.permutations(range(total)))[:k]), dtype=torch.int32)
    drop = torch.tensor(data.draw(st.lists(st.integers(0, k - 1), max_size=k, unique=True)), dtype=torch.int64)
    dropped = {int(indices[i]) for i in drop}
    free = sorted(set(range(total)) - set(indices.tolist()) | dropped)
    grow = torch.tensor(data.draw(st.permutations(free))[: len(drop)], dtype=torch.int32)
    new, source = exchange(indices, drop, grow)
    assert new.tolist() == sorted(set(indices.tolist()) - dropped | set(grow.tolist()))
    for position, old in zip(new.tolist(), source.tolist(), strict=True):
        assert old == (indices.tolist().index(position) if position in indices.tolist() else -1)


def test_random_entries_are_sorted_distinct_and_uniform() -> None:
    total, counts = 30, torch.zeros(30)
    for count in (0, 1, 11, 29, 30):
        drawn = random_entries(count, total, 5)
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        assert drawn.numel() == count
    for seed in range(2000):
        counts[random_entries(6, total, seed)] += 1
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_backward_stays_below_a_fifth_of_the_dense_gradient() -> None:
    m, n = 4096, 11008
    layer = SparseDeltaLinear(
        nn.Linear(n, m, bias=False, device="meta").to_empty(device="cpu"), random_entries(m * n // 100, m * n, 0)
    )
    layer.base.weight.data.zero_()
    y = layer(torch.randn(256, n))  # no gradient of x: dX is the caller's
    with Workspace() as space:
        y.backward(torch.ones(()).expand_as(y))
    assert layer.values.grad is not None
    assert space.peak < 0.2 * 4 * m * n


def bits(layer: SparseDeltaLinear) -> tuple[Tensor, int]:
    return layer.base.weight.detach().clone(), layer.base.weight._version


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_weight_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    layer = delta_layer(24, 16, dtype)
    with torch.no_grad():
        layer.base.weight[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-30], dtype=dtype)
    whole, version = bits(layer)

    def unchanged() -> bool:
        now, count = bits(layer)
        return count == version and torch.equal(now.view(torch.uint8), whole.view(torch.uint8))

    x = torch.randn(5, 16, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert unchanged()
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(5, 17, dtype=dtype))
    assert unchanged()
    y = layer(x)
    with pytest.raises(RuntimeError, match="interrupted"), Interrupt():
        y.sum().backward()
    assert unchanged()


class Interrupt(TorchDispatchMode):
    """Products fail."""

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.ops.aten.mm.default:
            raise RuntimeError("interrupted")
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_another_user_of_the_weight_sees_it_unchanged_in_backward() -> None:
    layer = delta_layer(6, 6)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    other = x @ layer.base.weight.T  # autograd saves W here
    layer(x)
    (gradient,) = torch.autograd.grad(other.sum(), x)
    assert torch.equal(gradient, torch.ones(3, 6, dtype=torch.float64) @ layer.base.weight)


def test_a_weight_of_two_layers_is_refused() -> None:
    model = Two()
    model.third = nn.Linear(12, 24)
    model.third.weight = model.first.weight
    assert convert(model, SparseDeltaLinear, density=0.1) == ["second"]
    with pytest.raises(ValueError, match=r"'first'.*shared"):
        convert(model, SparseDeltaLinear, match="first", density=0.1)


def test_a_trainable_base_weight_and_a_strided_one_are_refused() -> None:
    layer = delta_layer(4, 4)
    layer.base.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen"):
        layer(torch.randn(2, 4, dtype=torch.float64))
    linear = nn.Linear(4, 6)
    linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    with pytest.raises(ValueError, match="contiguous"):
        SparseDeltaLinear.from_linear(linear, entries=3)


def test_sft_14_the_effective_weight_is_rounded_once() -> None:
    """bf16(W + D), not bf16(W + bf16(D)), and what merge writes is what the layer computed."""
    layer = delta_layer(64, 64, torch.bfloat16)
    once = (layer.base.weight.float().flatten()[layer.indices.long()] + layer.values.detach()).bfloat16()
    twice = layer.base.weight.flatten()[layer.indices.long()] + layer.values.detach().bfloat16()
    merged = layer.to_linear()
    assert torch.equal(merged.weight.flatten()[layer.indices.long()], once)
    assert not torch.equal(once, twice)
    x = torch.randn(9, 64, dtype=torch.bfloat16)
    assert torch.equal(layer(x), merged(x))
    assert layer.values.dtype == torch.float32


def test_autocast_computes_in_its_dtype_and_gives_float32_gradients() -> None:
    layer = delta_layer(24, 16, torch.float32)
    x, whole = torch.randn(5, 16, requires_grad=True), bits(layer)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        wanted = nn.functional.linear(x, effective(layer), layer.base.bias)
        assert torch.equal(y, wanted)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.float32
    assert torch.equal(bits(layer)[0], whole)
    with pytest.raises(TypeError, match="autocast"):
        layer(x.bfloat16())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer = delta_layer(8, 8)
    layer.watch(torch.full((5,), -1, dtype=torch.int32))
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    layer(x).tanh().sum().backward()
    plain, sums = layer.values.grad, layer.watched.sums
    layer.values.grad = None
    layer.clear_sums(keep=True)
    checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(layer.values.grad, plain)
    assert torch.equal(layer.watched.sums, sums)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, at a graph break
def test_a_compiled_model_gives_the_same() -> None:
    model = Two()
    convert(model, SparseDeltaLinear, density=0.2)
    x = torch.randn(5, 12)
    wanted = torch.autograd.grad(model(x).square().sum(), model.first.values)[0]
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x).square().sum(), model.first.values)[0], wanted)


def test_under_fake_tensors_everything_runs_and_nothing_is_read() -> None:
    with FakeTensorMode():
        model = Two()
        convert(model, SparseDeltaLinear, density=0.1)
        model.first.watch(torch.empty(29, dtype=torch.int32))
        model(torch.randn(5, 12)).sum().backward()
        assert model.first.values.grad.shape == model.first.values.shape == (29,)
        assert model.first.watched.sums.shape == (29,)


@pytest.mark.parametrize("budget", [{"density": 0.1}, {"entries": 48}, {"lora_rank": 1}])
def test_one_budget_is_shared_by_size(budget: dict[str, float]) -> None:
    model = Two()
    convert(model, SparseDeltaLinear, **budget)
    first, second = model.first.values.numel(), model.second.values.numel()
    total = {"density": int(0.1 * (288 + 192)), "entries": 48, "lora_rank": (12 + 24) + (24 + 8)}[next(iter(budget))]
    assert first + second == total
    assert abs(first / total - 288 / 480) < 2 / total
    numbers = trainable_numbers(model)
    assert numbers == (total, 288 + 24 + 192 + total)
    assert f"{total:,} of" in str(numbers)


def test_budgets_are_refused_by_name() -> None:
    for wrong, error, text in [
        ({}, TypeError, "exactly one of density, entries, lora_rank; none"),
        ({"density": 0.1, "entries": 3}, TypeError, "density and entries"),
        ({"density": 0.0}, ValueError, "density"),
        ({"density": 1.5}, ValueError, "density"),
        ({"entries": 10_000}, ValueError, "10,000 entries of 480"),
        ({"entries": 1}, ValueError, "too few"),
        ({"entries": 2.5}, TypeError, "whole number"),
        ({"lora_rank": 100}, ValueError, "lora_rank=100"),
        ({"densty": 0.1}, TypeError, "did you mean 'density'"),
    ]:
        with pytest.raises(error, match=text):
            convert(Two(), SparseDeltaLinear, **wrong)


def test_first_entries_depend_on_seed_and_name_alone() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + len(found))
        model = Two()
        before = torch.get_rng_state()
        convert(model, SparseDeltaLinear, density=0.2, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        found.append(model.first.indices)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].dtype == torch.int32


def trained(seed: int = 0) -> Two:
    torch.manual_seed(seed)
    model = Two()
    convert(model, SparseDeltaLinear, density=0.2)
    for layer in (model.first, model.second):
        layer.values.data.normal_()
    return model


def test_merge_computes_the_same_and_unmerge_is_bit_exact() -> None:
    model, x = trained(), torch.randn(4, 12)
    y, state = model(x), {k: t.clone() for k, t in model.state_dict().items()}
    assert merge(model, keep=True) == ["first", "second"]
    assert type(model.first) is nn.Linear
    assert torch.equal(model(x), y)
    unmerge(model)
    assert all(torch.equal(model.state_dict()[k], t) for k, t in state.items())
    merge(model)
    assert torch.equal(model(x), y)


def test_a_saved_delta_goes_onto_a_plain_model(tmp_path) -> None:
    pytest.importorskip("safetensors")
    model, x = trained(), torch.randn(4, 12)
    assert save_delta(model, tmp_path / "delta.safetensors") == ["first", "second"]
    assert (tmp_path / "delta.safetensors").stat().st_size < 8 * 96 + 1000
    torch.manual_seed(0)
    plain = Two()
    assert load_delta(plain, tmp_path / "delta.safetensors") == ["first", "second"]
    assert torch.equal(plain(x), model(x))
    other = trained()
    convert_again = convert(torch.nn.Sequential(nn.Linear(3, 3)), SparseDeltaLinear, density=0.5)
    assert convert_again == ["0"]
    other.first.values.data.zero_()
    values = other.first.values
    load_delta(other, tmp_path / "delta.safetensors")
    assert other.first.values is values  # an optimizer that holds it goes on
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="no layer 'first'"):
        load_delta(nn.Sequential(nn.Linear(12, 24)), tmp_path / "delta.safetensors")
    wrong = Two()
    wrong.first = nn.Linear(12, 25)
    with pytest.raises(ValueError, match=r"24x12.*25x12"):
        load_delta(wrong, tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="no SparseDeltaLinear"):
        save_delta(wrong, tmp_path / "x.safetensors")


def test_a_missing_safetensors_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_delta(trained(), tmp_path / "delta.safetensors")


def test_a_state_dict_brings_its_own_entries() -> None:
    source, target = trained(0), trained(0)
    convert_other = Two()
    convert(convert_other, SparseDeltaLinear, density=0.2, seed=9)
    target = convert_other
    x = torch.randn(4, 12)
    target(x).sum().backward()  # the edges of the old entries are known now
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))
    target.zero_grad()
    target(x).square().sum().backward()
    source(x).square().sum().backward()
    assert torch.equal(target.first.values.grad, source.first.values.grad)
    clone = copy.deepcopy(source)
    assert torch.equal(clone(x), source(x))


def quantized(how: str) -> nn.Linear:
    """A layer of 64 x 64 bfloat16 weights in the given form."""
    pytest.importorskip(how.partition(".")[0])
    linear = nn.Linear(64, 64, dtype=torch.bfloat16)
    if how == "bitsandbytes.4bit":
        import bitsandbytes as bnb

        four = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16)
        four.load_state_dict(linear.state_dict())
        return four.to("cpu")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig() if how == "torchao.int8" else IntxWeightOnlyConfig(torch.int4))
    return linear


@pytest.mark.parametrize("how", ["torchao.int8", "torchao.int4", "bitsandbytes.4bit"])
def test_a_quantized_base(how: str, tmp_path: Path) -> None:
    model = nn.Sequential(quantized(how))
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    before = model(x)
    assert convert(model, SparseDeltaLinear, density=0.1) == ["0"]
    layer: SparseDeltaLinear = model[0]
    assert trainable_numbers(model) == (409, 64 * 64 + 64 + 409)
    assert worst(layer(x), before) < 0.02
    layer.values.data.normal_()
    layer.watch(torch.full((20,), -1, dtype=torch.int32))
    y = layer(x)
    y.sum().backward()
    assert layer.values.grad is not None
    dense = torch.ones(5, 64).T @ x.detach().float()
    assert worst(layer.values.grad, dense.flatten()[layer.indices.long()]) < 1e-5
    assert worst((y - before).float(), x.float() @ effective_delta(layer).float().T) < 0.05
    with pytest.raises(ValueError, match="save_delta"):
        merge(model)
    save_delta(model, tmp_path / "delta.safetensors")
    other = nn.Sequential(layer.base)
    load_delta(other, tmp_path / "delta.safetensors")
    assert torch.equal(other(x), y)


def test_sft_trains_a_quantized_base() -> None:
    model = nn.Sequential(quantized("torchao.int8"))
    convert(model, SparseDeltaLinear, density=0.1)
    opt = SFT(model, lr=1e-2, reselect_every=4, accumulate=2, total_steps=40)
    x, losses = torch.randn(32, 64, dtype=torch.bfloat16), []
    for _ in range(40):
        opt.zero_grad()
        loss = (model(x).float() - x.float().roll(1, 1)).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_weights_whose_numbers_cannot_be_read_are_refused() -> None:
    class Locked(torch.Tensor):
        """As torchao's packed formats: a wrapper that multiplies and gives nothing back."""

        @staticmethod
        def __new__(cls, inner: Tensor) -> "Locked":
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return [], None

        @staticmethod
        def __tensor_unflatten__(*_) -> Tensor:
            raise NotImplementedError

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return args[0]

    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(Locked(model[0].weight.data), requires_grad=False)
    with pytest.raises(ValueError, match="'0' is passed over: its weight is a Locked, whose numbers cannot be read"):
        convert(model, SparseDeltaLinear, density=0.1)
    eight = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    with pytest.raises(ValueError, match="'0' cannot become SparseDeltaLinear: it is a Linear8bitLt"):
        convert(nn.Sequential(eight), SparseDeltaLinear, "0", density=0.1)


def effective_delta(layer: SparseDeltaLinear) -> Tensor:
    delta = torch.zeros(layer.out_features * layer.in_features)
    delta[layer.indices.long()] = layer.values.detach()
    return delta.view(layer.out_features, layer.in_features).bfloat16()
