"""Steps inside backward: the same weights and state to the bit, one gradient at a time, and refusals by name."""

import copy
import gc
import io
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import optimzoo
from optimzoo.core import AdamW, ZooOptimizer, release, release_gradients
from optimzoo.modules.replacement import convert
from optimzoo.modules.spectral import SpectralLinear
from optimzoo.optimizers.cosmos import COSMOS
from optimzoo.optimizers.frugal import FRUGAL
from optimzoo.optimizers.sst import SST
from tests.cases import PLAIN, give_gradients, loss_of, same, short_options, tiny, train, weights

every = pytest.mark.parametrize("cls", PLAIN.values(), ids=PLAIN.keys())


def steps(model: nn.Module, opt: ZooOptimizer, first: int, last: int) -> None:
    """The standard loop with a schedule."""
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
    for step in range(first, last):
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()
        schedule.step()


def state_of(opt: ZooOptimizer) -> list[Tensor]:
    return [t.clone() for slots in opt.state.values() for t in slots.values()]


Make = Callable[[], tuple[nn.Module, ZooOptimizer]]


def assert_released_is_stepped(make: Make, count: int = 8) -> None:
    twin_model, twin = make()
    steps(twin_model, twin, 0, count)
    model, opt = make()
    with release_gradients(model, opt):
        steps(model, opt, 0, count)
        assert all(p.grad is None for p in model.parameters())
    assert same(weights(model), weights(twin_model))
    assert same(state_of(opt), state_of(twin))
    assert list(opt.memory_history) == list(twin.memory_history)
    assert [group["step"] for group in opt.param_groups] == [count] * len(opt.param_groups)
    assert opt.skipped() == twin.skipped()
    train(model, opt, count, count + 2)  # and on without release
    train(twin_model, twin, count, count + 2)
    assert same(weights(model), weights(twin_model))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_step_to_the_bit(cls, dtype):
    def make():
        model, count = tiny(dtype=dtype), itertools.count(1)
        model.square.weight.register_hook(lambda g: g * float("nan") if next(count) == 4 else g)
        return model, cls(model, lr=1e-2, **short_options(cls))

    assert_released_is_stepped(make)


def test_periods_turn_as_with_step():
    def make():
        model = tiny()
        return model, FRUGAL(model, projection="block", density=0.4, update_gap=3, lr=1e-2)

    assert_released_is_stepped(make, 10)


def test_layers_that_choose_anew_do_so_as_with_step():
    def make():
        model = tiny()
        convert(model, SpectralLinear, match=("square", "tall", "wide"), rank=6)
        return model, SST(model, resample_every=4, warmup=2, lr=1e-2)

    assert_released_is_stepped(make, 14)


@pytest.mark.parametrize("rounding", ["stochastic", "error"])
def test_small_states_and_narrow_weights(rounding):
    def make():
        model = tiny(dtype=torch.bfloat16, width=64)
        return model, COSMOS(model, rank=8, state_dtype="int8", rounding=rounding)

    assert_released_is_stepped(make, 4)


def test_resumes_inside():
    model, whole = tiny(), tiny()
    opt, reference = (FRUGAL(m, update_gap=3, lr=1e-2) for m in (model, whole))
    train(whole, reference, 0, 8)
    with release_gradients(model, opt):
        train(model, opt, 0, 4)
        file = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    second = tiny(1)
    second.load_state_dict(values)
    resumed = FRUGAL(second)
    with release_gradients(second, resumed):
        resumed.load_state_dict(state)
        train(second, resumed, 4, 8)
    assert same(weights(second), weights(whole))


class Tied(nn.Module):
    """One matrix as embedding and head, one used at three depths, some of it recomputed in backward."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.embed, self.deep = nn.Embedding(11, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            x = x + (checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x))
        return self.head(x)

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.deep(x))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_shared_weight_steps_once_its_gradient_is_complete(recompute):
    def make():
        torch.manual_seed(1)
        model = Tied(recompute)
        return model, COSMOS(model, rank=4)

    assert_released_is_stepped(make)


@every
def test_live_gradients_never_exceed_the_largest_parameter(cls):
    class Tracker:
        """Bytes of gradient storages alive, seen when each is complete."""

        live = peak = 0

        def note(self, p: Tensor) -> None:
            storage = p.grad.untyped_storage()
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            self.refs.append(weakref.ref(storage, lambda _: self.gone(size)))

        def gone(self, size: int) -> None:
            self.live -= size

        def __init__(self, model: nn.Module) -> None:
            self.refs: list = []
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(self.note)

    peaks = []
    for released in (False, True):
        model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(32, 32), nn.Tanh())))
        opt = cls(model, **short_options(cls))
        tracker = Tracker(model)
        if released:
            release_gradients(model, opt)
        for _ in range(3):
            opt.zero_grad()
            model(torch.randn(8, 32)).square().mean().backward()
            opt.step()
        peaks.append(tracker.peak)
        assert len(tracker.refs) == 3 * 12
    everything, largest = 6 * 4 * (32 * 32 + 32), 4 * 32 * 32
    assert peaks[0] == everything
    assert peaks[1] <= largest


# What cannot work, or must not go wrong silently.


def test_what_needs_all_gradients_is_refused_at_set_up():
    model = tiny()
    opt = AdamW(model)
    scaler = torch.amp.GradScaler("cpu")
    for given, words in (
        ({"accumulate": 4}, "accumulate=4 adds gradients up"),
        ({"max_norm": 1.0}, "max_norm=1.0 needs the norm of all gradients"),
        ({"scaler": scaler}, "a GradScaler looks at all gradients"),
    ):
        with pytest.raises(ValueError, match=words):
            release_gradients(model, opt, **given)
    with pytest.raises(TypeError, match="needs an optimizer of optimzoo, not SGD"):
        release_gradients(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="9 parameters of this AdamW are not in Linear"):
        release_gradients(nn.Linear(3, 3), opt)
    give_gradients(model.parameters(), 0)
    with pytest.raises(RuntimeError, match=r"'square.weight' has a gradient already.*call opt.zero_grad"):
        release_gradients(model, opt)
    opt.zero_grad()
    assert not opt.releasing
    with optimzoo.release_gradients(model, opt, scaler=torch.amp.GradScaler("cpu", enabled=False)):
        with pytest.raises(RuntimeError, match="this AdamW already releases gradients"):
            release_gradients(model, opt)
        train(model, opt, 0, 1)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(release, "alone", lambda: False)
    model = tiny()
    with pytest.raises(RuntimeError, match="several processes average gradients after backward"):
        release_gradients(model, AdamW(model))


def test_a_closure_is_refused():
    model = tiny()
    opt = AdamW(model)
    with release_gradients(model, opt):
        for call in (lambda: opt.step(lambda: None), lambda: opt.step(closure=lambda: None)):
            with pytest.raises(RuntimeError, match=r"step\(closure\) is refused"):
                call()
        opt.step(None)
        opt.step(closure=None)


def test_accumulation_is_noticed():
    model = tiny()
    opt = AdamW(model)
    with release_gradients(model, opt):
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match=r"got a second gradient before opt.step\(\)"):
            loss_of(model).backward()


def test_gradients_from_elsewhere_are_noticed():
    model = tiny()
    opt = AdamW(model.named_parameters())
    with release_gradients(model, opt):
        model.square.weight.grad = torch.ones(16, 16)
        with pytest.raises(RuntimeError, match=r"parameter square.weight still has a gradient at step\(\)"):
            opt.step()
    model = tiny()
    model.square.weight.requires_grad_(False)
    opt = AdamW(model.named_parameters())
    with release_gradients(model, opt):
        model.square.weight.requires_grad_(True)
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match="became trainable after release_gradients"):
            opt.step()


@pytest.mark.parametrize("unscale", [False, True])
def test_an_unannounced_scaler_is_noticed(unscale):
    model = tiny()
    opt, scaler = AdamW(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    with release_gradients(model, opt):
        scaler.scale(loss_of(model)).backward()
        if unscale:
            scaler.unscale_(opt)
        with pytest.raises(RuntimeError, match="a GradScaler looks at all gradients"):
            scaler.step(opt)


def test_remove_gives_everything_back():
    model = tiny()
    opt = AdamW(model)
    before = opt.memory().total
    handle = release_gradients(model, opt)
    assert opt.memory().total == before
    train(model, opt, 0, 2)
    handle.remove()
    handle.remove()
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    old = weights(model)
    opt.step()
    assert not same(old, weights(model))
    assert not opt._optimizer_step_pre_hooks
    assert not opt._optimizer_step_post_hooks
    twin_model, twin = copy.deepcopy((model, opt))
    assert not twin.releasing
    train(twin_model, twin, 3, 4)


@every
def test_a_model_and_its_optimizer_can_be_freed(cls):
    """Hooks of tensors are nothing that the garbage collector follows."""
    model = tiny()
    opt = cls(model, **short_options(cls))
    release_gradients(model, opt)
    steps(model, opt, 0, 2)
    refs = [weakref.ref(model.square.weight), weakref.ref(opt)]
    del model, opt
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
