"""The byte accounting against walks, sizes and peaks found in another way."""

import copy
import functools
import gc
import io
import pickle
import threading
import types
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from optimzoo.memory import (
    KINDS,
    Entry,
    History,
    Ledger,
    StepMemory,
    Workspace,
    ledger,
    log_memory,
    plain_tensors,
    track,
)

MATRIX = 512 * 1024 * 4


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, dtype=dtype), nn.ReLU(), nn.Linear(8, 3, dtype=dtype))


def backward(model: nn.Module) -> Tensor:
    model.zero_grad()
    p = next(model.parameters())
    loss = model(torch.randn(5, p.shape[1], dtype=p.dtype)).square().mean()
    loss.backward()
    return loss


def referents(x: object) -> list[object]:
    if isinstance(x, types.FunctionType):  # its globals lead to the whole program
        return [x.__closure__, x.__defaults__, x.__kwdefaults__, x.__dict__]
    return gc.get_referents(x)


def reachable(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> dict[int, int]:
    """Storage -> bytes of all tensors that the collector's own graph reaches from the optimizer, weights left out."""
    weights = {id(p) for group in optimizer.param_groups for p in group["params"]}
    weights |= set() if model is None else set(map(id, model.parameters()))  # frozen ones, too
    found: dict[int, int] = {}
    seen: set[int] = set()
    todo: list[object] = [vars(optimizer)]
    while todo:
        x = todo.pop()
        if id(x) in seen or id(x) in weights or isinstance(x, type | types.ModuleType | nn.Module | DeviceMesh):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor) and not isinstance(x, DTensor):  # which holds nothing but its local tensor
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        todo += referents(x)
    return found


# The ledger against the collector's graph.

FOREIGN = {
    "AdamW": torch.optim.AdamW,
    "AdamW, lr as a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "AMSGrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adafactor": torch.optim.Adafactor,
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
    "SGD": lambda p: torch.optim.SGD(p, momentum=0.9),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_ledger_is_what_the_collector_reaches(name: str, steps: int) -> None:
    model = mlp()
    opt = FOREIGN[name](list(model.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)  # wraps step, holds the optimizer weakly
    for _ in range(steps):
        opt.step(functools.partial(backward, model))
        scheduler.step()
    found = ledger(opt)
    assert found.total == sum(reachable(opt).values())
    assert found.slack == 0
    assert (found.total > 0) == (steps > 0 or "tensor" in name)
    assert set(found.by("kind")) <= set(KINDS) - {"other"}
    assert found.total < 200 or found.by("param").keys() - {"-"}


def test_kinds_names_groups_and_fields_of_adamw() -> None:
    model = mlp()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [
        {"params": matrices, "name": "matrices"},
        {"params": [("first", model[0].bias), ("last", model[2].bias)]},
    ]
    groups[1] = {"params": [model[0].bias, model[2].bias], "param_names": ["first", "last"]}
    groups[0]["param_names"] = ["a", "b"]
    opt = torch.optim.AdamW(groups)
    backward(model)
    opt.step()
    found = ledger(opt)
    assert found.by("kind") == {"first moment": 332, "second moment": 332, "counter": 16}
    assert found.by("group") == {"matrices": 2 * (48 + 24) * 4 + 8, "1": 2 * (8 + 3) * 4 + 8}
    assert found.by("param", "key")["first", "exp_avg"] == 32
    assert found.by("dtype", "device") == {(torch.float32, torch.device("cpu")): 680}
    named = ledger(opt, names={p: n for n, p in model.named_parameters()}, kinds={(matrices[0], "exp_avg"): "basis"})
    assert set(named.by("param")) == {n for n, _ in model.named_parameters()}
    assert named.by("kind")["basis"] == 192


def test_unnamed_parameters_are_called_by_position() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), momentum=0.9)
    backward(model)
    opt.step()
    assert list(ledger(opt).by("param")) == ["0.0", "0.1", "0.2", "0.3"]


def test_unknown_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no field 'knd' to sum by; did you mean 'kind'"):
        Ledger(()).by("knd")
    with pytest.raises(ValueError, match="no field 'nbytes'"):
        Ledger(()).by("nbytes")
    with pytest.raises(ValueError, match="at least one field"):
        Ledger(()).by()


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match="takes an optimizer or a module, not list"):
        ledger([torch.zeros(3)])  # type: ignore[arg-type]


def test_table() -> None:
    cpu = torch.device("cpu")
    rows = [
        ("w", "0", "U", "basis", torch.float32, cpu, 4096, 1024),
        ("w", "0", "step", "counter", torch.float32, cpu, 4, 4),
    ]
    assert Ledger(tuple(Entry(*row) for row in rows)).table("kind", "dtype").splitlines() == [
        "kind     dtype       bytes",
        "basis    float32  4.00 KiB",
        "counter  float32       4 B",
        "total             4.00 KiB",
        "slack             3.00 KiB",
    ]
    assert str(Ledger(())).splitlines() == ["kind   bytes", "total    0 B"]


# Places where state hides.


class Plain(torch.optim.Optimizer):
    """An optimizer that does nothing, to be filled by a test."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {"lr": 0.1})  # type: ignore[arg-type]

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                temporary = p.detach() * 2
                p.data.sub_(temporary, alpha=1e-3)


def plain(*shape: int) -> Plain:
    return Plain([nn.Parameter(torch.zeros(shape or (2,)))])


def state_of(opt: torch.optim.Optimizer) -> dict:
    return opt.state[opt.param_groups[0]["params"][0]]


def test_a_view_keeps_its_base() -> None:
    opt = plain()
    state_of(opt)["Q"] = torch.linalg.svd(torch.randn(32, 32))[0][:, :4]
    found = ledger(opt)
    assert (found.total, found.slack) == (32 * 32 * 4, 32 * 28 * 4)
    assert "slack" in str(found)
    state_of(opt)["Q"] = state_of(opt)["Q"].clone()
    assert (ledger(opt).total, ledger(opt).slack) == (32 * 4 * 4, 0)
    state_of(opt)["Q"] = torch.zeros(100)[:1].expand(50)  # fifty times the same number
    assert (ledger(opt).total, ledger(opt).slack) == (400, 396)


class Slotted:
    __slots__ = ("__private", "empty")

    def __init__(self, t: Tensor) -> None:
        self.__private = t


class Child(Slotted):
    __slots__ = ("more",)


class Projector:
    def __init__(self, t: Tensor) -> None:
        self.ortho_matrix = t

    @property
    def trap(self) -> None:
        raise AssertionError("a property was called")

    def method(self) -> None: ...


def test_every_hiding_place() -> None:
    opt = plain()
    t = [torch.zeros(10**k) for k in range(6)] + [torch.zeros(3)]
    child = Child(t[1])
    child.more = t[2]

    def closed(default: Tensor = t[4]) -> Tensor:
        return t[5] + default

    held = t[:]
    del t
    t = held
    state_of(opt)["projector"] = Projector(t[0])
    state_of(opt)["nested"] = {0: {"exp_avg": deque([child])}}
    opt.__dict__["mapping"] = types.MappingProxyType({"a": functools.partial(print, {t[3]: None})})
    opt.__dict__["f"] = closed
    opt.__dict__["bound"] = Projector(t[6]).method
    opt.__dict__["of_list"] = [torch.zeros(7)].append
    found = ledger(opt)
    assert (found.total, found.slack) == (4 * (111_111 + 3 + 7), 0)
    assert found.by("key")["projector.ortho_matrix"] == 4
    assert found.by("kind")["projector"] == 4
    assert found.by("kind")["first moment"] == 440  # by the first known name of the path
    assert sum(x.numel() for x in plain_tensors(opt)) == found.total // 4 + 2  # with the weight


def test_what_is_not_the_optimizers() -> None:
    model = mlp()
    opt = torch.optim.AdamW(model.parameters())
    backward(model)
    opt.step()
    before = ledger(opt).total
    big = torch.zeros(1000)
    opt.__dict__.update(
        model=model,
        frozen=nn.Parameter(torch.zeros(9)),
        alias=model[0].weight.data[2:],
        gradients=[p.grad for p in model.parameters()],
        weak=weakref.ref(big),
        proxy=weakref.proxy(big),
        module=torch,
        cls=Projector,
        lock=threading.Lock(),
        generator=(x for x in [big]),
    )
    opt.register_step_post_hook(lambda *_: big)  # a trainer's, with all that the trainer holds
    assert ledger(opt).total == before


def test_state_keyed_by_anything_and_without_a_dictionary() -> None:
    opt = plain()
    opt.state["shared"] = {"gram": torch.zeros(4), 3: torch.zeros(2)}
    opt.state["bare"] = torch.zeros(5)
    opt.state[torch.zeros(1)] = {"step": torch.zeros(())}
    found = ledger(opt)
    assert found.by("param") == {"shared": 24, "bare": 20, "-": 8}  # with the key, which is nobody's parameter
    assert found.by("kind") == {"gram": 16, "other": 32, "counter": 4}


def test_a_parameter_kept_as_state_is_state() -> None:
    opt = plain()
    state_of(opt)["master"] = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    assert ledger(opt).total == 16


def test_shared_storage_is_counted_once_for_the_first() -> None:
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(5))
    opt, flat = Plain([a, b]), torch.zeros(8)
    opt.state[a]["exp_avg"], opt.state[b]["exp_avg"] = flat[:3], flat[3:]
    opt.__dict__["again"] = [flat[:3], flat[:3].view(3, 1)[:, 0], flat.expand(7, 8)]
    found = ledger(opt)
    assert (found.total, found.slack, list(found.by("param"))) == (32, 0, ["0.0"])


def test_linked_state_deeper_than_the_recursion_limit() -> None:
    opt, chain = plain(), [torch.zeros(3)]
    for _ in range(5000):
        chain = [chain]
    state_of(opt)["chain"] = chain
    chain.append(chain)  # a cycle
    assert ledger(opt).total == 12


class Eight(torch.Tensor):
    """A wrapper that says float32 and holds a byte a number, a scale, and one table for all."""

    table = torch.zeros(256)

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Eight":
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale", "table"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        whole = [x.codes.float() * x.scale if isinstance(x, Eight) else x for x in args]
        return func(*whole, **(kwargs or {}))


def eight(*shape: int) -> Eight:
    return Eight(torch.zeros(shape, dtype=torch.uint8), torch.ones(()))


def test_wrapper_subclasses_are_opened() -> None:
    a, b = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(8))
    opt = Plain([a, b])
    opt.state[a]["exp_avg"], opt.state[b]["exp_avg"] = eight(64, 64), eight(8)
    assert opt.state[a]["exp_avg"].nbytes == 64 * 64 * 4  # what it claims
    found = ledger(opt)
    assert found.by("param") == {"0.0": 4096 + 4 + 1024, "0.1": 8 + 4}
    assert found.by("kind", "dtype")["first moment", torch.uint8] == 4104
    assert found.slack == 0


def test_fake_and_meta_cost_what_real_does() -> None:
    def held(device: str) -> dict:
        with torch.device(device):
            model = mlp()
        opt = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        found = ledger(opt)
        total = ledger(model).total
        assert {e.device.type for e in found.entries if e.key != "step"} == {device}
        return {**found.by("param", "key", "kind", "dtype"), "model": total}

    real = held("cpu")
    assert held("meta") == real
    with FakeTensorMode():
        assert held("cpu") == real


def test_ledger_of_a_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.BatchNorm1d(4)
            self.tied = self.inner
            self.embedding = nn.Embedding(10, 4, sparse=True)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight
            self.lazy = nn.LazyLinear(3)
            self.mask = [torch.zeros(6)]
            self.register_forward_hook(lambda *_: big)

    big = torch.zeros(999)
    model = Model()
    model.embedding(torch.tensor([1, 2])).sum().backward()
    found = ledger(model)
    # two rows of gradient and their indices; BatchNorm counts batches in an int64
    assert found.by("kind") == {
        "parameter": 2 * 16 + 160,
        "buffer": 2 * 16 + 8,
        "gradient": 2 * 16 + 2 * 8,
        "other": 24,
    }
    assert found.by("param")["inner.weight"] == 16
    assert found.by("key")["mask.0"] == 24


def test_dtensor_counts_this_ranks_shard() -> None:
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)]))
        opt = torch.optim.AdamW([p], foreach=False)
        history = track(opt, workspace=True)
        p.grad = torch.ones_like(p)
        opt.step()
        opt.step()
        found = ledger(opt)
        assert found.by("kind") == {"first moment": 128, "second moment": 128, "counter": 4}
        assert history[-1] == StepMemory(2, 260, 2 * 128)  # operations on the shards are seen
    finally:
        dist.destroy_process_group()


def naive(opt: torch.optim.Optimizer) -> int:
    return sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values() if isinstance(t, Tensor))


@pytest.mark.filterwarnings("ignore")
def test_torchao_eight_bit_holds_a_quarter_of_what_it_says() -> None:
    optim = pytest.importorskip("torchao.optim")
    p = nn.Parameter(torch.randn(512, 1024))
    opt = optim.AdamW8bit([p])
    p.grad = torch.randn_like(p)
    with torch.compiler.set_stance("force_eager"):
        opt.step()
    n = p.numel()
    kinds = ledger(opt).by("kind")
    assert kinds["first moment"] == kinds["second moment"] == n + n // 256 * 4 + 256 * 4  # codes, scales, table
    assert naive(opt) > 3.9 * ledger(opt).total


@pytest.mark.filterwarnings("ignore")
def test_galore_holds_three_times_what_it_says() -> None:
    galore = pytest.importorskip("galore_torch")
    p = nn.Parameter(torch.randn(512, 1024))
    group = {"params": [p], "rank": 64, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
    opt = galore.GaLoreAdamW([group], no_deprecation_warning=True)
    p.grad = torch.randn_like(p)
    opt.step()
    found = ledger(opt)
    assert found.by("kind")["projector"] > found.by("kind")["first moment"]
    assert found.total > 1.4 * naive(opt)
    assert found.total == sum(reachable(opt).values())


# Workspace.


def test_temporaries_views_in_place_and_out() -> None:
    x = torch.ones(1000)
    with Workspace() as ws:
        y = x + 1
        assert ws.live == 4000
        y.mul_(2).view(10, 100)[2:].add_(1)
        x[5:].add_(1)
        assert (ws.live, ws.peak) == (4000, 4000)
        z = y[10:] * 1
        assert ws.live == 4000 + 3960
        view = y[:1]
        del y
        assert ws.live == 4000 + 3960
        del view, z
        assert (ws.live, ws.peak) == (0, 7960)
        out = torch.empty(0)
        torch.add(x, 1, out=out)
        assert ws.live == 4000
        out.untyped_storage().resize_(0)
        out.resize_(0)
        assert ws.live == 0
        (x + 1 - x.sum()).sum()
        kept = x.clone()
        assert ws.live == 4000
    assert (ws.live, ws.peak) == (4000, 8004)
    del kept
    assert ws.live == 4000  # what the block left behind
    with ws:
        assert (ws.live, ws.peak) == (0, 0)


def test_what_existed_before_is_not_workspace() -> None:
    x, old = torch.ones(1000), torch.ones(500)
    with Workspace() as ws:
        x.add_(1)
        old.add_(1)
        del old  # its address may be used again at once
        for _ in range(50):
            y = torch.empty(500).fill_(1)
            assert ws.live == 2000
            del y
        x.resize_(1500)
        assert (ws.live, ws.peak) == (2000, 2000)
    assert not ws._known


def test_temporaries_inside_a_wrapper_subclass_are_seen() -> None:
    x = eight(100)
    with Workspace() as ws:
        y = x + 1  # codes as floats, those times the scale
        assert ws.live == y.nbytes == 400
    assert ws.peak == 800


def test_a_loop_does_not_pile_up() -> None:
    x = torch.ones(1000)
    with Workspace() as ws:
        for _ in range(20):
            x = x * 2
    assert ws.peak == 8000


def test_nested_blocks_see_the_same() -> None:
    with Workspace() as outer, Workspace() as inner:
        torch.zeros(10) + 1
    assert outer.peak == inner.peak == 80


def test_pause_skips_births_and_sees_deaths() -> None:
    with Workspace() as ws:
        y = torch.ones(100)
        with ws.paused():
            z = torch.ones(1000) * 2
            del y
            assert _get_current_dispatch_mode() is None
        assert (ws.live, ws.peak) == (0, 400)
        z.add_(1)
        assert ws.live == 0
        with pytest.raises(KeyError), ws.paused():
            raise KeyError
        assert torch.ones(50) is not None
    assert (ws.peak, _get_current_dispatch_mode()) == (400, None)


def eight_weights(**options: object) -> torch.optim.Optimizer:
    ps = [nn.Parameter(torch.ones(512, 1024)) for _ in range(8)]
    for p in ps:
        p.grad = torch.ones_like(p)
    return torch.optim.AdamW(ps, **options)  # type: ignore[arg-type]


ADAMW = {
    "loop": ({"foreach": False}, 3.0),
    "foreach": ({"foreach": True}, 8.0),
    "fused": ({"fused": True}, 0.0),
}


@pytest.mark.parametrize("name", ADAMW)
def test_workspace_of_adamw_in_largest_matrices(name: str) -> None:
    options, matrices = ADAMW[name]

    def peaks() -> list[int]:
        opt = eight_weights(**options)
        history = track(opt, workspace=True)
        for _ in range(3):
            opt.step()
        return [record.workspace_bytes for record in history if record.workspace_bytes is not None]

    real = peaks()
    assert real[2] == pytest.approx(matrices * MATRIX, abs=64)
    with FakeTensorMode():
        inside = peaks()
    assert inside == real


def test_fake_mode_inside_the_block() -> None:
    with Workspace() as ws, FakeTensorMode():
        x = torch.ones(1000)
        y = x * 2 + 1
        del x
    assert (ws.peak, ws.live) == (12000, 4000)
    assert y.shape == (1000,)


def test_compiled_functions_stay_compiled_and_unseen() -> None:
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    f = torch.compile(lambda x: x.mul_(2), backend=backend, fullgraph=True)
    x = torch.ones(10)
    with Workspace() as ws:
        f(x)
        f(x)
    assert len(seen) == 1
    assert x[0] == 4
    assert ws.peak <= 40


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_the_allocators() -> None:
    from optimzoo.memory.workspace import measure

    device = torch.device("cuda")
    x = torch.ones(1 << 20, device=device)
    with measure(device) as ws:
        y = x * 2
        with ws.paused():
            kept = torch.cat([x] * 8)
        z = y + x
    assert ws.peak == 2 * x.nbytes
    assert kept.numel() + z.numel() == 9 * x.numel()


# History.


def step(opt: torch.optim.Optimizer, model: nn.Module) -> None:
    backward(model)
    opt.step()


def test_track_records_every_step_of_a_foreign_optimizer() -> None:
    model = mlp()
    opt = torch.optim.AdamW(model.parameters())
    history = track(opt)
    for _ in range(3):
        step(opt, model)
    assert list(history) == [StepMemory(n, ledger(opt).total) for n in (1, 2, 3)]
    assert history[-2:] == [history[1], history[2]]
    history.remove()
    assert "step" not in vars(opt)
    step(opt, model)
    history.remove()
    assert len(history) == 3


@pytest.mark.parametrize("workspace", [False, True])
def test_a_step_that_raises_leaves_no_mode_and_no_record(workspace: bool) -> None:
    class Broken(Plain):
        def step(self, closure=None):
            if closure is not None:
                closure()
            raise RuntimeError("boom")

    opt = Broken([nn.Parameter(torch.zeros(3))])
    history = track(opt, workspace=workspace)

    def bad() -> None:
        raise KeyError("closure")

    with pytest.raises(RuntimeError, match="boom"):
        opt.step()
    with pytest.raises(RuntimeError, match="boom"):
        opt.step(lambda: None)
    with pytest.raises(KeyError, match="closure"):
        opt.step(closure=bad)
    assert _get_current_dispatch_mode() is None
    assert len(history) == 0


@pytest.mark.parametrize("positional", [True, False])
def test_the_closure_is_not_workspace(positional: bool) -> None:
    opt = plain(10)
    history = track(opt, workspace=True)
    modes: list[object] = []

    def closure() -> Tensor:
        modes.append(_get_current_dispatch_mode())
        assert torch.is_grad_enabled()
        return torch.ones(100_000).sum()

    opt.step(closure) if positional else opt.step(closure=closure)
    assert modes == [None]
    assert history[-1] == StepMemory(1, 0, 40)


def test_lbfgs_calls_its_closure_many_times() -> None:
    model = mlp()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=4)
    history = track(opt, workspace=True)
    calls: list[object] = []

    def closure() -> Tensor:
        calls.append(_get_current_dispatch_mode())
        return backward(model)

    assert opt.step(closure) is not None
    assert len(calls) > 1
    assert set(calls) == {None}
    assert history[0].state_bytes == ledger(opt).total


@pytest.mark.parametrize("first", ["track", "scheduler"])
@pytest.mark.parametrize("workspace", [False, True])
def test_schedulers_in_both_orders(first: str, workspace: bool) -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    if first == "track":
        history = track(opt, workspace=workspace)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)]
    if first == "scheduler":
        history = track(opt, workspace=workspace)
    schedulers.append(torch.optim.lr_scheduler.ExponentialLR(opt, 0.5))
    for _ in range(2):
        step(opt, model)
        for scheduler in schedulers:
            scheduler.step()  # warns, here an error, unless it saw that step was called
    assert opt.param_groups[0]["lr"] == 1 / 16
    assert [record.step for record in history] == [1, 2]
    history.remove()
    step(opt, model)
    schedulers[0].step()
    assert len(history) == 2


def test_grad_scaler_and_step_hooks() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    history, hooks = track(opt, workspace=True), []
    opt.register_step_post_hook(lambda *_: hooks.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        opt.zero_grad()
        scaler.scale(model(torch.randn(5, 6)).square().mean() * factor).backward()
        scaler.step(opt)
        scaler.update()
    assert len(history) == len(hooks) == 2  # the scaler skipped one


def test_copies_of_a_tracked_optimizer() -> None:
    model = mlp()
    opt = torch.optim.AdamW(model.parameters())
    history = track(opt, workspace=True)
    step(opt, model)
    other = copy.deepcopy(opt)
    buffer = io.BytesIO()
    torch.save(opt, buffer)
    again = pickle.loads(pickle.dumps(opt))
    for clone in (other, again):
        for p in clone.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        before = model[0].weight.clone()
        clone.step()
        assert torch.equal(before, model[0].weight)
    assert len(history) == 1
    assert list(pickle.loads(pickle.dumps(history))) == list(copy.deepcopy(history)) == list(history)


def test_tracking_does_not_keep_the_optimizer_alive() -> None:
    gc.disable()
    try:
        opt = plain()
        history = track(opt, workspace=True)
        gone = weakref.ref(opt)
        opt.step()
        del opt
        assert gone() is None
    finally:
        gc.enable()
    history.remove()
    assert len(history) == 1


def test_two_trackers_agree() -> None:
    opt = plain(10)
    a, b = track(opt, workspace=True), track(opt, workspace=True)
    opt.step(lambda: torch.ones(1000))
    assert list(a) == list(b) == [StepMemory(1, 0, 40)]
    a.remove()  # not the outermost: it stays in place and passes on
    opt.step()
    b.remove()
    opt.step()
    assert (len(a), len(b)) == (1, 2)


class Own(Plain):
    """What the optimizers of the zoo do: one record at the end of each step, from a running total."""

    def __init__(self, params: object) -> None:
        self.memory_history = History()
        super().__init__(params)

    def step(self, closure=None):
        super().step(closure)
        if self.param_groups[0]["lr"]:
            self.memory_history.append(StepMemory(len(self.memory_history) + 1, 123))


def test_own_history_is_completed_not_doubled() -> None:
    opt = Own([nn.Parameter(torch.zeros(10))])
    assert track(opt) is opt.memory_history
    assert "step" not in vars(opt)
    opt.step()
    for _ in range(2):  # asking twice measures once
        history = track(opt, workspace=True)
    assert history is opt.memory_history
    assert vars(opt)["step"].__wrapped__ is Own.step
    opt.param_groups[0]["lr"] = 0.0  # a step without a record
    opt.step()
    opt.param_groups[0]["lr"] = 0.1
    opt.step()
    history.remove()
    opt.step()
    assert list(history) == [StepMemory(1, 123), StepMemory(2, 123, 40), StepMemory(3, 123)]
    assert "step" not in vars(opt)
    assert ledger(opt).total == 0


def test_measuring_later_ends_no_logging() -> None:
    rows: list[dict] = []
    run = SimpleNamespace(log=lambda row, commit: rows.append(row))
    opt = Own([nn.Parameter(torch.zeros(10))])
    log_memory(opt, run)
    log_memory(opt, run)  # to another run, say
    history = track(opt, workspace=True)
    opt.step()
    assert rows == [{"memory/state_bytes": 123}] * 2
    assert list(history) == [StepMemory(1, 123, 40)]
    history.remove()
    opt.step()
    assert len(rows) == 2
    track(opt, workspace=True)
    opt.step()
    assert history[-1] == StepMemory(3, 123, 40)


def test_history_keeps_the_newest() -> None:
    history = History(maxlen=3)
    for n in range(5):
        history.append(StepMemory(n, 0))
    assert [record.step for record in history] == [2, 3, 4]


def test_old_records_are_not_walked() -> None:
    history = History()
    history.append(torch.zeros(5))  # stands for thousands of records: the walk must not look at any
    opt = plain()
    opt.__dict__["history"] = history
    assert ledger(opt).total == 0
