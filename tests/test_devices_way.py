"""What the engine tells apart where several parameters step together on a device: kinds, rates, gradients, names."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from optimzoo.core import AdamW, Slot, ZooOptimizer
from optimzoo.functional import device_kernels
from optimzoo.optimizers import cosmos
from optimzoo.optimizers.cosmos import COSMOS
from optimzoo.optimizers.frugal import FRUGAL
from tests.cases import give_gradients, go_the_devices_way, tiny, weights

SHAPES = {"matrix": (4, 4), "vector": (4,)}


@pytest.fixture(params=["xpu", "cuda"])
def device(request, monkeypatch):
    """A function after which steps go the way of a device, without our kernels or with them."""
    monkeypatch.setattr(device_kernels, "_fault", lambda *args: "")
    monkeypatch.setattr(cosmos, "product_dtype", lambda t: t.dtype)  # the host's are bfloat16 where it has such
    return lambda: go_the_devices_way(monkeypatch, request.param)


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-9 if a.dtype == torch.float16 else 2e-5, atol=1e-5)


def on_both(device, make, prepare, steps: int = 4) -> tuple[tuple, tuple]:
    """Weights and skips after some steps, on the host and then on a device; `prepare(model, step)` gives gradients."""
    found = []
    for _ in range(2):
        model = tiny()
        opt = make(model)
        for step in range(steps):
            prepare(model, step)
            opt.step()
        found.append((weights(model), opt.skipped()))
        device()
    return found[0], found[1]


def gradients(model: nn.Module, step: int) -> None:
    give_gradients(model.parameters(), step)


def moved(opt: ZooOptimizer, named: list[tuple[str, nn.Parameter]]) -> list[float]:
    """How far a step by gradients of one goes: in AdamW, all of the rate."""
    before = [p.detach().clone() for _, p in named]
    for _, p in named:
        p.grad = torch.ones_like(p)
    opt.step()
    return [round((old - p.detach()).mean().item(), 5) for old, (_, p) in zip(before, named, strict=True)]


def test_rates_are_those_of_each_route(device):
    """A matrix whose turn it is and a vector in one group, both by AdamW with the same options but for the rate."""
    device()
    named = [("w", nn.Parameter(torch.zeros(8, 8))), ("v", nn.Parameter(torch.zeros(8)))]
    opt = FRUGAL(named, lr=1e-2, projection="block", density=0.99, fallback_lr_scale=0.1)
    assert [row[2] for row in opt.routes()] == ["adamw", "adamw"]
    assert [moved(opt, named) for _ in range(2)] == [[1e-2, 1e-3]] * 2


class Paced(AdamW):
    """The parameter "late" steps at a rate that changes with the steps."""

    def paced(self, member):
        if member.name != "late":
            return member
        return replace(member, route=replace(member.route, lr_scale=1 / (1 + self.param_groups[0]["step"])))


def test_rates_may_change_from_step_to_step(device):
    device()
    named = [(name, nn.Parameter(torch.zeros(8))) for name in ("early", "late", "other")]
    opt = Paced(named, lr=1e-2, weight_decay=0.0)
    assert [moved(opt, named) for _ in range(3)] == [[1e-2, rate, 1e-2] for rate in (1e-2, 5e-3, 0.00333)]


@pytest.mark.parametrize("what", ["zeros", "inf", "nan", "squares"])
@pytest.mark.parametrize("which", [("square.weight",), ("square.weight", "tall.weight", "norm.weight"), ()])
@pytest.mark.parametrize("cls", [AdamW, COSMOS, FRUGAL])
@pytest.mark.parametrize("device", ["xpu"], indirect=True)  # no kernel judges
def test_gradients_are_judged_as_on_the_host(cls, which, what, device):
    """Zeros are no step of COSMOS' matrices, but one of all others; () is all parameters."""

    def prepare(model: nn.Module, step: int) -> None:
        gradients(model, step)
        for name, p in model.named_parameters():
            if step in (1, 2) and (name in which or not which):
                if what == "zeros":
                    p.grad.zero_()
                else:
                    p.grad.view(-1)[0] = {"inf": float("inf"), "nan": float("nan"), "squares": 1e20}[what]

    (host, skips), (ours, also) = on_both(device, lambda model: cls(model, lr=1e-3), prepare)
    close(ours, host)
    assert also == skips
    assert bool(skips) == (what != "zeros" or cls is COSMOS)


def test_one_gradient_is_judged_as_several_are(device):
    device()
    for value, skipped in ((0.0, 1), (1e20, 1), (float("inf"), 1), (float("nan"), 1), (1.0, 0)):
        w = nn.Parameter(torch.ones(4, 4))
        opt = COSMOS([("w", w)], rank=2)
        w.grad = torch.full((4, 4), value)
        opt.step()
        assert opt.skipped().get("w", 0) == skipped, value


def test_zeros_are_judged_by_each_rule(device):
    device()
    named = [(f"{kind}{i}", nn.Parameter(torch.ones(shape))) for i in range(2) for kind, shape in SHAPES.items()]
    opt = COSMOS(named, rank=2)
    for _, p in named:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert {name: count for name, count in opt.skipped().items() if count} == {"matrix0": 1, "matrix1": 1}


def test_squares_of_single_numbers_overflow_too(device):
    device()
    named = [(f"w{i}", nn.Parameter(torch.ones(1))) for i in range(3)]
    opt = AdamW(named)
    for i, (_, p) in enumerate(named):
        p.grad = torch.full_like(p, 1e20 if i == 1 else 1.0)
    opt.step()
    assert opt.skipped() == {"w1": 1}


def test_nobody_judges_where_nothing_is_asked(device, monkeypatch):
    device()
    monkeypatch.setattr("optimzoo.core.gradients._judged", None)
    model = tiny()
    opt = AdamW(model, check_finite=False)
    gradients(model, 0)
    opt.step()
    assert opt.skipped().get("square.weight", 0) == 0


class Signs(ZooOptimizer):
    """An element-wise rule that leaves gradients of zeros alone, also empty ones."""

    elementwise = True
    skips_zero = True
    slots = staticmethod(lambda shape, h: {"exp_avg": Slot(shape, "first moment")})
    direction = staticmethod(lambda g, w, h, *, exp_avg: exp_avg.copy_(g).sign())


@pytest.mark.parametrize("check", [True, False])
def test_empty_gradients_are_judged_beside_full_ones(check, device):
    device()
    named = [(f"w{i}", nn.Parameter(torch.ones(n))) for i, n in enumerate((3, 0, 3, 0, 3))]
    opt = Signs(named, lr=0.5, check_finite=check)
    for i, (_, p) in enumerate(named):
        p.grad = torch.full_like(p, 0.0 if i == 2 else 1.0)
    opt.step()
    assert [p.tolist() for _, p in named] == [[0.5] * 3, [], [1.0] * 3, [], [0.5] * 3]
    assert opt.skipped() == {"w1": 1, "w2": 1, "w3": 1}


def test_a_name_given_twice_counts_both(device):
    device()
    ws = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    opt = AdamW([("w", ws[0]), ("v", ws[1]), ("w", ws[2])])
    for w in ws:
        w.grad = torch.full((3,), float("nan"))
    opt.step()
    assert opt.skipped() == {"w": 2, "v": 1}


def test_gradients_of_another_dtype_step_beside_others(device):
    """From the second step on, and of one parameter alone."""

    def stepped() -> list[Tensor]:
        torch.manual_seed(0)
        ws = [nn.Parameter(torch.randn(6, 5).half()) for _ in range(3)]
        opt = AdamW([(f"w{i}", w) for i, w in enumerate(ws)], lr=0.1)
        for step in range(3):
            for i, w in enumerate(ws):
                w.grad_dtype = None
                w.grad = torch.randn(6, 5).to(torch.float32 if step and i == 1 else torch.float16)
            opt.step()
        return [w.detach() for w in ws]

    host = stepped()
    device()
    close(stepped(), host)


@pytest.mark.parametrize("cls", [AdamW, FRUGAL, COSMOS])
def test_no_gradient_is_no_step(cls, device):
    def prepare(model: nn.Module, step: int) -> None:
        gradients(model, step)
        if step in (0, 2):
            model.tall.weight.grad = model.norm.weight.grad = None

    (host, skips), (ours, also) = on_both(device, lambda model: cls(model, lr=1e-3), prepare)
    close(ours, host)
    assert also == skips == {}


def test_what_is_remembered_of_a_member_holds_no_tensor(device):
    """Slots that are replaced, as loading does, are freed at once, and the ledger knows."""
    device()
    model = tiny()
    opt = FRUGAL(model)
    for step in range(2):
        gradients(model, step)
        opt.step()
    before = opt.memory().total
    opt.load_state_dict(opt.state_dict())
    assert opt.memory().total == before
