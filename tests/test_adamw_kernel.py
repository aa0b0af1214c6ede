"""AdamW's kernel for devices, run by Triton's interpreter: its arithmetic, its flags, where it takes over."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import optimzoo
from optimzoo.core import AdamW
from optimzoo.functional import adamw_kernel, device_kernels
from optimzoo.functional.adamw_kernel import Options
from tests.cases import compiled_for_a_device, give_gradients, go_the_devices_way, same

triton = pytest.importorskip("triton", reason="Triton is made for Linux alone")

SHAPES = [(5,), (33, 47), (1,), (3 * adamw_kernel.CHUNK + 7,), (adamw_kernel.CHUNK,), (2, 3, 4)]
BETAS, EPS = (0.8, 0.95), 1e-6


def lists(w_dtype: torch.dtype, g_dtype: torch.dtype, offset: int = 0) -> list[list[Tensor]]:
    """Weights, gradients and averages; `offset` elements behind an address that a device reads vectors from."""

    def one(shape: tuple[int, ...], dtype: torch.dtype, positive: bool) -> Tensor:
        n = torch.Size(shape).numel()
        line = torch.rand(n + offset) if positive else torch.randn(n + offset)
        return line.to(dtype)[offset:].view(shape)

    kinds = [(w_dtype, False), (g_dtype, False), (torch.float32, False), (torch.float32, True)]
    return [[one(shape, dtype, positive) for shape in SHAPES] for dtype, positive in kinds]


def exactly(w, g, m, v, t, lr, weight_decay, maximize) -> tuple[Tensor, ...]:
    w, g, m, v = (x.double() for x in (w, -g if maximize else g, m, v))
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    v = BETAS[1] * v + (1 - BETAS[1]) * g**2
    u = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    return (1 - lr * weight_decay) * w - lr * u, m, v


@pytest.mark.parametrize(("checked", "maximize"), [(False, True), (True, False)])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), torch.tensor([0.01], dtype=torch.float64)])
@pytest.mark.parametrize(
    ("w_dtype", "g_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_steps_as_written_down_in_float64(w_dtype, g_dtype, lr, offset, checked, maximize):
    kinds = lists(w_dtype, g_dtype, offset)
    before = [[t.clone() for t in tensors] for tensors in kinds]
    steps = [torch.tensor(float(1 + 700 * i)) for i in range(len(SHAPES))]
    found_inf = torch.tensor([0.0, 1, 0, 0, 1, 0]) if checked else None
    options = {"lr": lr, "h": Options(BETAS, EPS, 0.3, maximize)}
    adamw_kernel.step_(*kinds, steps, found_inf, **options)
    assert same(kinds[1], before[1]), "gradients are not written"
    # The interpreter cuts bfloat16 off.
    ulp = {torch.float32: 2e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}[w_dtype]
    for i, step in enumerate(steps):
        old = [tensors[i] for tensors in before]
        new = [kinds[kind][i] for kind in (0, 2, 3)]
        if checked and found_inf[i]:
            assert same(new, [old[0], *old[2:]])
            continue
        wanted = exactly(*old, step.item(), 0.01, 0.3, maximize)
        for got, want, digits in zip(new, wanted, (ulp, 2e-7, 2e-7), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2 * digits, atol=2 * digits)
        assert not torch.equal(new[0], old[0])


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.5), (0.5, 0.0), (0.9, 0.99999)])
@pytest.mark.parametrize("step", [1.0, 2.0, 1e5])
def test_betas_at_their_ends_and_averages_of_other_sizes_than_gradients(betas, step):
    w, v = torch.ones(3), torch.rand(3)
    g, m = torch.tensor([1e-6, 1e3, 0.0]), torch.tensor([1e3, 1e-6, 0.0])
    wanted_m, wanted_v = (a.double() for a in (m, v))
    wanted_m = betas[0] * wanted_m + (1 - betas[0]) * g.double()
    wanted_v = betas[1] * wanted_v + (1 - betas[1]) * g.double() ** 2
    u = wanted_m / (1 - betas[0] ** step) / ((wanted_v / (1 - betas[1] ** step)).sqrt() + 1e-3)
    adamw_kernel.step_([w], [g], [m], [v], [torch.tensor(step)], None, lr=1e-3, h=Options(betas, 1e-3, 1e-4))
    torch.testing.assert_close(m.double(), wanted_m, rtol=3e-7, atol=0)
    torch.testing.assert_close(v.double(), wanted_v, rtol=3e-7, atol=0)
    torch.testing.assert_close(w.double(), (1 - 1e-7) - 1e-3 * u, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 16, 33])
def test_every_element_of_any_number_of_tensors_steps_once(count):
    """By its own tensor's flag and number: searched for in a table."""
    chunk, tile = adamw_kernel.CHUNK, adamw_kernel.TILE
    sizes = [(0, 1, tile + 5, chunk - 1, chunk, chunk + 1, 2 * chunk + 3, tile)[i * 5 % 8] for i in range(count)]
    kinds = [[torch.ones(size) for size in sizes] for _ in range(4)]
    steps = [torch.tensor(float(i + 1)) for i in range(count)]
    found_inf = torch.tensor([float(i % 3 == 1) for i in range(count)])
    adamw_kernel.step_(*kinds, steps, found_inf, lr=0.5, h=Options((0.5, 0.0), weight_decay=0.0))
    for i, w in enumerate(kinds[0]):
        wanted = 1.0 if i % 3 == 1 else 1 - 0.5 / (1 - 0.5 ** (i + 1))
        assert torch.allclose(w, torch.full_like(w, wanted), atol=1e-6), i


def test_the_table_says_whose_addresses_are_multiples():
    even, odd = (lists(torch.bfloat16, torch.bfloat16, offset) for offset in (0, 1))
    for kind in range(4):
        kinds = [[t[0], (o if at == kind else t)[1]] for at, (t, o) in enumerate(zip(even, odd, strict=True))]
        table, programs = adamw_kernel._table(*kinds, [torch.ones(())] * 2)
        assert table[:, 1].tolist() == [1, 0]
    assert programs == 2
    assert table[:, 2:6].tolist() == [[tensors[i].data_ptr() for tensors in kinds] for i in range(2)]


def test_nothing_beside_the_tensors_is_written():
    kinds = lists(torch.float32, torch.float32)
    around = [[torch.full((t.numel() + 64,), 7.0) for t in tensors] for tensors in kinds]
    inner = [
        [a[32:-32].copy_(t.view(-1)) for a, t in zip(*pair, strict=True)] for pair in zip(around, kinds, strict=True)
    ]
    adamw_kernel.step_(*inner, [torch.ones(())] * len(SHAPES), None, lr=0.1, h=Options(BETAS, EPS, 0.0))
    for tensors in around:
        assert all((a[:32] == 7).all() and (a[-32:] == 7).all() for a in tensors)


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_device_with_it_steps_as_one_without(dtype, poisoned, monkeypatch):
    """The optimizer by the kernel, in one call, and by PyTorch's; float64 is PyTorch's in any case."""
    monkeypatch.setattr(device_kernels, "_fault", lambda *args: "")  # tried elsewhere
    calls, step_ = [], adamw_kernel.step_
    monkeypatch.setattr(
        adamw_kernel, "step_", lambda ws, *rest, **more: calls.append(len(ws)) or step_(ws, *rest, **more)
    )
    found = []
    for device in ("cuda", "xpu"):
        go_the_devices_way(monkeypatch, device)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 24)).to(dtype)
        opt = AdamW(model, lr=1e-2, weight_decay=0.1)
        for number in range(4):
            give_gradients(model.parameters(), number)
            if poisoned and number in (0, 2):
                model[0].weight.grad[0, 0] = float("inf")
            opt.step()
        averages = [t for slots in opt.state.values() for t in slots.values()]
        found.append(([*model.parameters(), *averages], opt.skipped()))
    (ours, skipped), (theirs, also) = found
    assert sum(calls) == (0 if dtype == torch.float64 else 4 * 6)
    assert len(calls) in (0, 8)  # two groups, decayed and not
    assert skipped == also == ({"0.weight": 2} if poisoned else {})
    digits = 2**-9 if dtype == torch.float16 else 1e-6
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=digits, atol=digits)


def test_a_captured_step_is_pytorchs(monkeypatch):
    """A replay would read the table of addresses from where the host had it once."""
    go_the_devices_way(monkeypatch, "cuda")
    w = nn.Parameter(torch.ones(8, 8))
    opt = AdamW([("w", w)], lr=torch.tensor(0.1))
    w.grad = torch.ones(8, 8)
    opt.step()
    for module in ("core.engine", "core.optimizer", "functional.device_kernels"):
        monkeypatch.setattr(f"optimzoo.{module}.capturing", lambda: True)
    monkeypatch.setattr(adamw_kernel, "step_", None)
    before = w.detach().clone()
    opt.step()
    assert not torch.equal(w, before)


def test_a_second_average_of_a_constant_gradient_stays_however_near_1_beta2_is():
    w, g, m, v = (torch.full((4,), value) for value in (0.0, 3.0, 3.0, 9.0))
    h = Options((0.9, 1 - 1e-7), weight_decay=0.0)
    for step in range(1, 50):
        adamw_kernel.step_([w], [g], [m], [v], [torch.tensor(float(step))], None, lr=0.0, h=h)
    assert (v == 9).all()
    assert (m == 3).all()


@pytest.fixture
def untried(monkeypatch):
    """As before the first step on this device."""
    go_the_devices_way(monkeypatch, "cuda")
    monkeypatch.setattr(device_kernels, "_told", set())
    device_kernels._fault.cache_clear()
    yield
    device_kernels._fault.cache_clear()


@pytest.mark.parametrize("how", ["raises", "does nothing"])
def test_where_it_does_not_work_pytorchs_steps_and_it_is_said_once(how, untried, monkeypatch):
    def broken(*args, **kwargs):
        if how == "raises":
            raise RuntimeError("no C compiler\nand more")

    words = {
        "raises": "no C compiler$",
        "does nothing": r"ends at \[1.0, .*\] with torch.float32, and not at 0.25, 1, 0.25$",
    }
    monkeypatch.setattr(adamw_kernel, "step_", broken)
    w = nn.Parameter(torch.ones(8, 8))
    opt = AdamW([("w", w)])
    w.grad = torch.ones(8, 8)
    with pytest.warns(RuntimeWarning, match="Triton does not work there: .*" + words[how]):
        opt.step()
    assert not torch.equal(w, torch.ones(8, 8))
    opt.step()


def test_the_first_trial_minds_nothing_around_it(untried):
    w = nn.Parameter(torch.ones(8, 8))
    opt = AdamW([("w", w)])
    w.grad = torch.ones(8, 8)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.inference_mode():  # what a script may have set for its model
            opt.step()
    finally:
        torch.set_default_dtype(before)
    assert opt.state[w]["step"] == 1
    assert not torch.equal(w, torch.ones(8, 8))


def test_a_trial_that_runs_out_of_memory_says_nothing_of_the_kernel(untried, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    w, p = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    opt = AdamW([("p", p), ("w", w)])
    w.grad, p.grad_dtype = torch.ones(8, 8), None
    p.grad = torch.ones(8, 8, dtype=torch.float64)  # which no kernel takes, but for wide copies
    with monkeypatch.context() as patch:
        patch.setattr(adamw_kernel, "step_", full)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    assert opt.state[w]["step"] == opt.state[p]["step"] == 0
    opt.step()
    assert opt.state[w]["step"] == opt.state[p]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_that_raises_does_so_before_anything_moves(dtype, untried, monkeypatch):
    """Of a bfloat16 weight whose gradient no kernel takes that is the trial of the wide copies, in float32."""
    step_ = adamw_kernel.step_

    def full(ws, *args, **kwargs):
        if ws[0].dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step_(ws, *args, **kwargs)

    w = nn.Parameter(torch.ones(8, 8, dtype=dtype))
    opt = AdamW([("w", w)], weight_decay=0.0)
    w.grad_dtype = None
    w.grad = torch.ones(8, 8, dtype=torch.float32 if dtype == torch.float32 else torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(adamw_kernel, "step_", full)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    assert opt.state[w]["step"] == 0
    assert (w == 1).all()


def test_what_has_no_address_of_its_own_or_another_dtype_is_pytorchs(untried):
    """A subclass may keep its values elsewhere. A view may be lazily negated, which no kernel knows."""
    w = nn.Parameter(torch.ones(4, 4))
    twin = TwoTensor(torch.ones(4, 4), torch.ones(4, 4))
    assert device_kernels.fits(w, torch.ones(4, 4))
    for weight, g in ((twin, torch.ones(4, 4)), (w, twin), (w, torch.ones(4, 4).double())):
        assert not device_kernels.fits(weight, g)
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    p.grad_dtype = None
    p.grad = torch.full((4, 4), 2.0, dtype=torch.float64)
    q = nn.Parameter(torch.ones(4, 4))
    q.grad = torch._neg_view(torch.ones(4, 4))
    twins = nn.Parameter(twin)
    opt = AdamW([("p", p), ("w", w), ("q", q), ("twins", twins)], lr=0.1, weight_decay=0.0)
    w.grad, twins.grad = torch.ones(4, 4), torch.ones(4, 4)
    opt.step()
    assert torch.allclose(twins.a, torch.tensor(0.9))
    assert torch.allclose(q, torch.tensor(1.1))
    assert (p == torch.tensor(0.9, dtype=torch.bfloat16)).all()
    assert torch.allclose(w, torch.tensor(0.9))


def test_autograd_notices_a_step_between_forward_and_backward(untried):
    w = nn.Parameter(torch.ones(3))
    opt = AdamW([("w", w)])
    w.grad = torch.ones(3)
    loss = (w * w).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


COMPILE = """
import itertools
import re
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimzoo.functional import adamw_kernel, device_kernels
from optimzoo.functional.triton_adamw import step_some

given = {"table": "*i64", "found_inf": "*fp32", "count": "i32", "top": "i32"}
rest = "beta1 one_minus_beta1 beta2 one_minus_beta2 log_beta1 log_beta2 eps weight_decay"
given |= dict.fromkeys(rest.split(), "fp32")
sizes = {"columns": adamw_kernel.COLUMNS, "chunk": adamw_kernel.CHUNK, "tile": adamw_kernel.TILE}
types = [(tl.float32, tl.float32), (tl.bfloat16, tl.bfloat16), (tl.bfloat16, tl.float32), (tl.float16, tl.float16)]
for (w, g), flag in itertools.product(types, (True, False)):
    lr = {"lr": "*fp32" if flag else "fp32"}
    fixed = {"checked": flag, "maximize": flag, "lr_is_tensor": flag, "w_type": w, "g_type": g, **sizes}
    constants = {(step_some.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(step_some, given | lr | dict.fromkeys(fixed, "constexpr"), constants)
    made = compile(source, target=GPUTarget("cuda", 80, 32), options=device_kernels.OPTIONS).asm["ptx"]
    assert "ld.global.v4.b32" in made and "st.global.v4.b32" in made
    assert not re.search(r"fma\\.rn\\.f32", made)
    assert not re.search(r"@%p\\d+ (ld|st)\\.global\\S*\\.v[24]", made)  # with a mask, as where addresses are odd
    assert re.search(r"@%p\\d+ ld\\.global\\.b(16|32)", made)
print("compiled")
"""


def test_compiles_and_reads_several_elements_at_once(tmp_path):
    """For a GPU that need not be there, without the interpreter. No product is fused with a sum, in some elements."""
    assert not compiled_for_a_device(COMPILE, tmp_path)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_plans_for_cuda_know_that_narrow_weights_need_no_copies(device):
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(6))).bfloat16()
    assert optimzoo.plan(model, AdamW, device=device).workspace < 6 * 256
    assert optimzoo.plan(model, AdamW, device="xpu").workspace > 6 * 256 * 256
