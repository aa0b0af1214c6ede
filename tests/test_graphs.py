"""engine="compiled": what graphs do, how many there are, and what happens where nothing can be compiled.

Most use torch's tracer without a code generator, which needs no C++ compiler: "aot_eager" does all that comes before
one, and takes twice as long as "eager", which runs what was traced.
"""

import os
import subprocess
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import optimzoo
from optimzoo.core import graphs, storage
from tests.cases import ALL, PLAIN, build, give_gradients, go_the_devices_way, same, tiny, train, weights
from tests.test_contract import every, plain


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr(graphs, "BACKEND", "eager")
    monkeypatch.setattr(graphs, "_graphs", type(graphs._graphs)(dict))
    monkeypatch.setattr(graphs, "_failed", False)
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def functionalized(monkeypatch, traced):
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")


def made() -> int:
    return sum(len(functions) for place in graphs._graphs.values() for functions in place.values())


def few(dtype: torch.dtype) -> nn.Module:
    """A tall matrix, a wide one, an embedding and a vector: every shape takes a second to compile, so there are few."""
    torch.manual_seed(0)
    tall, wide = nn.Linear(16, 48, dtype=dtype), nn.Linear(48, 16, bias=False, dtype=dtype)
    return nn.Sequential(OrderedDict(embed=nn.Embedding(11, 16, dtype=dtype), tall=tall, wide=wide))


def trained(cls, how, steps=7, **options) -> list[torch.Tensor]:
    model = few(options.pop("dtype", torch.float32))
    opt = build(cls, model, lr=1e-2, engine=how, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=5)
    for step in range(steps):
        give_gradients(model.parameters(), step)
        opt.step()
        schedule.step()
    return weights(model)


@every
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "rounding", "device"),
    [
        (torch.bfloat16, torch.bfloat16, "stochastic", False),
        (torch.bfloat16, "int8", "error", True),
    ],
    ids=["narrow-host", "codes-device"],
)
def test_a_graph_steps_as_the_eager_engine_does(cls, dtype, state_dtype, rounding, device, functionalized, monkeypatch):
    monkeypatch.setattr(storage, "SMALL", 32)
    if device:  # whether gradients are finite is a tensor, and kernels go other ways
        go_the_devices_way(monkeypatch)
    options = {"dtype": dtype, "state_dtype": state_dtype, "rounding": rounding}
    eager, compiled = (trained(cls, how, **options) for how in ("auto", "compiled"))
    one, other = (torch.cat([t.flatten() for t in tensors]) for tensors in (eager, compiled))
    assert torch.isclose(one, other, rtol=1e-5, atol=1e-6).float().mean() > 0.997
    # Where roundings are by chance, a last digit may decide which way.
    torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)
    assert counters["stats"]["unique_graphs"] == made() > 0


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8"])
def test_a_graph_rounds_with_the_draws_of_the_eager_engine(state_dtype, functionalized, monkeypatch):
    """To the bit, where the arithmetic is element by element: another seed would move other elements."""
    monkeypatch.setattr(storage, "SMALL", 32)
    options = {"dtype": torch.bfloat16, "state_dtype": state_dtype, "rounding": "stochastic"}
    assert same(*(trained(optimzoo.AdamW, how, **options) for how in ("auto", "compiled")))
    assert made() > 0


@plain
def test_no_new_graphs_when_rates_and_steps_move(cls):
    for projection in ({"projection": "rows"}, {"projection": "svd"}) if cls is optimzoo.FRUGAL else ({},):
        options = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16, **projection}
        trained(cls, "compiled", steps=6, **options)  # past two refreshes
        known = made()
        trained(cls, "compiled", steps=12, **options)
        assert counters["stats"]["unique_graphs"] == made() == known > 0


def test_every_shape_has_a_graph_of_its_own():
    shapes = torch._dynamo.config.recompile_limit + 2  # graphs of one code
    named = [(f"w{i}", nn.Parameter(torch.zeros(8 + i, 12, dtype=torch.bfloat16))) for i in range(shapes)]
    opt = optimzoo.FRUGAL(named, projection="rows", engine="compiled")
    for step in range(3):
        give_gradients([p for _, p in named], step)
        opt.step()
    assert counters["stats"]["unique_graphs"] == made() == shapes


def test_what_has_no_graph_steps_eagerly():
    """Nothing to step, gradients whose strides change: neither raises, nor compiles at every step."""
    for shape in ((0,), (0, 4), (4, 0)):
        p = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        opt = optimzoo.AdamW([("w", p)], engine="compiled")
        p.grad = torch.zeros_like(p)
        opt.step()
    known, p = made(), nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16))
    opt = optimzoo.AdamW([("w", p)], engine="compiled")
    for width in range(9, 20):
        p.grad = torch.ones(4, width, dtype=torch.bfloat16)[:, :8]
        opt.step()
    assert made() == known
    assert (p < 0).all()


def test_options_that_move_at_every_step_are_not_compiled_for_ever(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 3)
    results = []
    for how in ("auto", "compiled"):
        model = tiny(dtype=torch.bfloat16)
        opt = optimzoo.FRUGAL(model, engine=how)
        for step in range(2 * graphs.MOST):
            opt.param_groups[0]["state_free_lr_scale"] = 0.1 + 0.01 * step
            give_gradients(model.parameters(), step)
            opt.step()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert all(len(place) <= graphs.MOST for place in graphs._graphs.values())


@pytest.mark.parametrize("name", PLAIN)
def test_the_engine_is_the_running_optimizers_and_resume_is_exact(name):
    cls = ALL[name]
    whole, first, second = (tiny(dtype=torch.bfloat16) for _ in range(3))
    train(whole, build(cls, whole, engine="compiled"), 0, 8)
    opt = build(cls, first, engine="compiled")
    train(first, opt, 0, 5)
    second.load_state_dict(first.state_dict())
    eager = build(cls, second)
    eager.load_state_dict(opt.state_dict())
    assert {group["engine"] for group in eager.param_groups} == {"auto"}
    resumed = build(cls, second, engine="compiled")
    resumed.load_state_dict(opt.state_dict())
    train(second, resumed, 5, 8)
    assert same(weights(second), weights(whole))


def test_what_cannot_be_compiled_steps_without_and_says_so_once(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(graphs, "BACKEND", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = trained(optimzoo.FRUGAL, "compiled", dtype=torch.bfloat16)
    (warning,) = [w for w in caught if "engine='compiled'" in str(w.message)]
    assert "no compiler here" in str(warning.message)
    for a, b in zip(compiled, trained(optimzoo.FRUGAL, "auto", dtype=torch.bfloat16), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


SCRIPT = """
import sys, warnings
import torch, torch._inductor.config, optimzoo
from optimzoo.core import graphs
from torch import nn
def steps(how):
    p = nn.Parameter(torch.ones(24, 40))
    opt = optimzoo.AdamW([("w", p)], state_dtype=torch.bfloat16, engine=how)
    for step in range(3):
        p.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step))
        opt.step()
    return p
for compiler in (None, *sys.argv[1:]):  # $CXX first
    if compiler:
        torch._inductor.config.cpp.cxx = (compiler,)
        torch._dynamo.reset()
        graphs._graphs.clear()
        graphs._failed = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(steps("compiled"), steps("auto"), rtol=1e-2, atol=1e-5)
    print([str(w.message).split(":")[0] for w in caught if issubclass(w.category, RuntimeWarning)])
"""


def test_without_a_compiler_and_with_the_real_code_generator(tmp_path):
    """Both in one process: most of the time goes into imports and into what both do before a compiler is called."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compilers, reason = [get_cpp_compiler()], ""
    except RuntimeError as error:
        compilers, reason = [], f"no C++ compiler: {error}"
    surroundings = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "/no/such"}
    command = [sys.executable, "-c", SCRIPT, *compilers]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines() == ["[\"engine='compiled'\"]", *("[]" for _ in compilers)]
    if reason:
        pytest.skip(reason)
    assert [*tmp_path.rglob("*.so")], "nothing was generated"
