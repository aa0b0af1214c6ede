"""What every optimizer promises, checked over the whole registry; what a class can do is read off the class."""

import copy
import inspect
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optimzoo.core import AdamW, member, stacks, stages, steps, storage
from optimzoo.core.apply import apply_update
from optimzoo.core.slots import COARSE_KINDS
from optimzoo.functional import subspace
from optimzoo.memory import KINDS, Workspace
from tests.cases import (
    ALL,
    PLAIN,
    SHORT,
    bare,
    build,
    direct,
    give_gradients,
    go_the_devices_way,
    loss_of,
    same,
    short_options,
    tiny,
    train,
    weights,
)
from tests.test_memory import reachable

every = pytest.mark.parametrize("cls", ALL.values(), ids=ALL.keys())
plain = pytest.mark.parametrize("cls", PLAIN.values(), ids=PLAIN.keys())  # those that need no layers of their own
states = pytest.mark.parametrize(
    ("state_dtype", "rounding"),
    [(None, "nearest"), (torch.bfloat16, "stochastic"), ("int8", "error")],
    ids=["wide", "narrow", "codes"],
)
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def reload(state: dict) -> dict:
    """Through a file, as `torch.load` reads it by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@plain
def test_takes_parameters_names_groups_and_modules(cls):
    model = tiny()
    with bare():
        assert len(cls(model.parameters()).param_groups) == 1
    assert cls(model.named_parameters()).param_groups[0]["param_names"][0] == "embed.weight"
    groups = [{"params": model.square.parameters(), "lr": 0.5}, {"params": [model.head.weight], "fallback": True}]
    before = [dict(g) for g in groups]
    assert [g["lr"] for g in cls(groups, lr=0.1).param_groups] == [0.5, 0.1]
    assert [g.keys() for g in groups] == [g.keys() for g in before], "a user's dictionary was edited"
    routed = cls(model).param_groups
    assert routed[0]["name"] == "matrices"
    assert sum(len(g["params"]) for g in routed) == len(list(model.parameters()))


@plain
def test_refuses_unknown_and_impossible_options_by_name(cls):
    model = tiny()
    with pytest.raises(TypeError, match=r"has no option 'weight_decya'; did you mean 'weight_decay'\?"):
        cls(model, weight_decya=0.1)
    with pytest.raises(TypeError, match=r"has no option 'fused': leave it out"):
        cls(model, fused=True)
    with pytest.raises(TypeError, match=r"groups have no option 'weight_decya'; did you mean 'weight_decay'\?"):
        cls([{"params": list(model.parameters()), "weight_decya": 0.1, "fallback": True}])
    for name, option in cls.options.items():
        nonsense = ["no such", (), (0.5, 7.0), float("nan"), float("inf")]
        for bound, out in ((option.ge, -1), (option.gt, 0), (option.le, 1), (option.lt, 0)):
            if bound is not None:
                beyond = type(bound)(bound + out)
                nonsense.append((0.5, beyond) if isinstance(option.default, tuple) else beyond)
        for value in nonsense:
            with pytest.raises((TypeError, ValueError), match=f"{cls.__name__}: {name}="):
                cls(model, **{name: value})


@plain
def test_refuses_what_it_cannot_optimize(cls):
    with pytest.raises(ValueError, match="got no parameters"):
        cls([])
    with pytest.raises(ValueError, match="without trainable parameters"):
        cls(nn.ReLU())
    with pytest.raises(TypeError, match="takes a module, an iterable"):
        cls(torch.zeros(3, requires_grad=True))
    with pytest.raises(TypeError, match="'w' is complex"):
        cls([("w", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])
    p = nn.Parameter(torch.zeros(4, 4))
    for unordered in ({p}, [{"params": {p}}]):
        with pytest.raises(TypeError, match=r"have no order.*give a list"):
            cls(unordered)
    with pytest.raises(TypeError, match=r"'0' is torch.float8_e4m3fn"):
        cls([nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))])
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    opt = cls(model)
    model.to_empty(device="cpu")  # puts other parameters in their places
    model(torch.ones(2, 16)).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' is on the meta device"):
        opt.step()
    embedding = nn.Embedding(9, 4, sparse=True)
    opt = cls(embedding)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="'weight' is sparse"):
        opt.step()


@every
def test_a_group_taken_out_is_gone_and_one_refused_was_never_there(cls):
    model = tiny()
    opt = build(cls, model)
    train(model, opt, 0, 2)
    held = opt.memory().total
    more = nn.Parameter(torch.zeros(8, 8, dtype=torch.float16))
    group = {"params": [("more", more)], "fallback": True}
    with pytest.raises(TypeError, match="'more' is float16"):
        opt.add_param_group({**group, "rounding": "stochastic"})
    assert opt.memory().total == held
    train(model, opt, 2, 3)
    opt.add_param_group(group)
    assert "more" in opt.memory().by("param")
    del opt.param_groups[-1]
    more.grad = torch.zeros(8, 8, dtype=torch.float16).to_sparse()  # nobody looks at it
    train(model, opt, 3, 4)
    assert "more" not in opt.memory().by("param").keys() | {name for name, *_ in opt.routes()}
    assert opt.memory().total == opt.memory_history[-1].state_bytes


@every
def test_options_of_a_group_are_checked_when_they_are_changed(cls):
    opt = build(cls, tiny())
    opt.param_groups[0]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match=r"weight_decay=-1.0"):
        opt.step()
    opt.param_groups[0]["weight_decay"] = 0.0
    for name in SHORT.keys() & {name for name, option in cls.options.items() if option.ge == 1}:  # a period, say
        before, opt.param_groups[0][name] = opt.param_groups[0][name], 0
        with pytest.raises(ValueError, match=f"{name}=0"):
            opt.step()
        opt.param_groups[0][name] = before
    opt.step()


@plain
def test_groups_of_a_module_want_names(cls):
    opt = cls(tiny())
    with pytest.raises(ValueError, match=r"\(name, tensor\) pairs"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4))]})


@every
@precisions
def test_lowers_the_loss(cls, dtype):
    model = tiny(dtype=dtype)
    start = sum(loss_of(model, s).item() for s in range(4))
    train(model, build(cls, model, lr=2e-2), 0, 60)
    assert sum(loss_of(model, s).item() for s in range(4)) < 0.5 * start


@every
@precisions
def test_gradients_and_the_global_generator_stay_the_callers(cls, dtype):
    for maximize in (False, True):
        model = tiny(dtype=dtype)
        rng = torch.get_rng_state()
        opt = build(cls, model, maximize=maximize)
        for step in range(5):
            give_gradients(model.parameters(), step)
            kept = [p.grad.clone() for p in model.parameters()]
            opt.step()
            assert same([p.grad for p in model.parameters()], kept), "p.grad was written to"
        assert torch.equal(torch.get_rng_state(), rng), "the global generator was drawn from"


@plain
def test_direction_is_a_tensor_of_its_own_and_slots_stay_in_place(cls):
    h = cls.hypers({})
    shape = (16, 24)
    slots = {k: storage.new_slot(s, torch.empty(shape), None, 1) for k, s in cls.slots(shape, h).items() if k != "step"}
    places = {name: t.data_ptr() for name, t in slots.items()}
    given = slots | {"step": 1.0, "seed": 3}
    g, w = torch.randn(shape), torch.randn(shape)
    if cls.refresh is not None:
        cls.refresh(g, w, h, **{k: given[k] for k in stages.keywords(cls.refresh) if k in given})
    g_before, w_before = g.clone(), w.clone()
    u = direct(cls, g, w, h, stages.asked(stages.first_stage(cls), given))
    assert torch.equal(g, g_before)
    assert torch.equal(w, w_before)
    assert {name: t.data_ptr() for name, t in slots.items()} == places
    assert u.shape == shape
    assert u.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in (*slots.values(), g, w)}


@every
@precisions
@states
def test_bytes_planned_measured_and_counted_agree(cls, dtype, state_dtype, rounding, monkeypatch):
    monkeypatch.setattr(storage, "SMALL", 32)
    options = {"state_dtype": state_dtype, "rounding": rounding}
    with FakeTensorMode():
        model = tiny(dtype=dtype)
        planned = build(cls, model, **options)
        totals = [planned.memory().total]
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            planned.step()
            totals.append(planned.memory().total)
    model = tiny(dtype=dtype)
    opt = build(cls, model, **options)
    for step, plan in enumerate(totals):
        book = opt.memory()
        assert book.total == plan == opt._state_bytes
        assert book.slack == 0
        assert set(book.by("kind")) <= set(KINDS)
        assert "other" not in book.by("kind")
        averages = [e for e in book.entries if e.kind in COARSE_KINDS and e.nbytes > 32 * e.dtype.itemsize]
        moving = {(m.name, key) for _, m in opt.begin().values() for key, slot in member.specs(m).items() if slot.moves}
        for e in averages if state_dtype == "int8" else ():
            assert e.dtype.itemsize == (4 if (e.param, e.key) in moving else 1), (e.param, e.key)
        train(model, opt, step, step + 1)
    assert [record.step for record in opt.memory_history] == [1, 2, 3, 4]
    assert [record.state_bytes for record in opt.memory_history][:3] == totals[1:]


@plain
def test_every_reachable_byte_is_in_the_ledger(cls):
    """Against the garbage collector's view of the object, which knows nothing of slots."""
    model = tiny()
    opt = cls(model, **short_options(cls))
    for step in range(4):
        assert opt.memory().total == sum(reachable(opt).values())
        train(model, opt, step, step + 1)


@every
def test_state_is_plain_tensors(cls):
    model = tiny()
    opt = build(cls, model)
    train(model, opt, 0, 2)
    state = opt.state_dict()
    trainable = sum(len(g["params"]) for g in opt.param_groups)
    assert len(state["state"]) == trainable, "checkpoints of several ranks need an entry for every parameter"
    for slots in state["state"].values():
        assert all(type(t) is torch.Tensor for t in slots.values())
    for group in state["param_groups"]:
        for key, value in group.items():
            plain = isinstance(value, int | float | str | bool | tuple | type(None))
            assert plain or key in ("params", "param_names"), key


@every
@precisions
@states
def test_resumes_bit_for_bit_at_every_step(cls, dtype, state_dtype, rounding, monkeypatch):
    monkeypatch.setattr(storage, "SMALL", 32)
    options = {"state_dtype": state_dtype, "rounding": rounding, "lr": 1e-2}
    whole = tiny(dtype=dtype)
    train(whole, build(cls, whole, **options), 0, 8)
    for stop in range(8):
        first = tiny(dtype=dtype)
        opt = build(cls, first, **options)
        train(first, opt, 0, stop)
        saved, values = reload(opt.state_dict()), reload(first.state_dict())
        second = tiny(seed=1, dtype=dtype)
        resumed = build(cls, second, **{**options, "lr": 5.0})
        second.load_state_dict(values)
        resumed.load_state_dict(saved)
        dtypes = [{k: t.dtype for k, t in slots.items()} for slots in opt.state.values()]
        assert [{k: t.dtype for k, t in slots.items()} for slots in resumed.state.values()] == dtypes
        train(second, resumed, stop, 8)
        assert same(weights(second), weights(whole)), f"stopped after {stop} steps"


@every
def test_copies_and_pickles_go_on_the_same(cls):
    model = tiny()
    opt = build(cls, model)
    train(model, opt, 0, 3)
    for twin_model, twin in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        assert list(twin.memory_history) == list(opt.memory_history)
        assert twin.memory().total == opt.memory().total
        reference_model, reference = copy.deepcopy((model, opt))
        train(twin_model, twin, 3, 7)
        train(reference_model, reference, 3, 7)
        assert same(weights(twin_model), weights(reference_model))
    assert len(opt.memory_history) == 3


@plain
def test_a_foreign_or_broken_checkpoint_changes_nothing(cls):
    model = tiny()
    opt = cls(model, lr=0.3, **short_options(cls))
    train(model, opt, 0, 2)
    before = copy.deepcopy(opt.state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, 0, 1)
    short = copy.deepcopy(before)
    short["param_groups"][0]["params"] = short["param_groups"][0]["params"][:-1]
    crooked = copy.deepcopy(before)
    number = next(i for i, slots in crooked["state"].items() if slots)
    key = next(iter(crooked["state"][number]))
    crooked["state"][number][key] = torch.zeros(3, 5, 7)
    strange = copy.deepcopy(before)
    strange["param_groups"][0]["lr"] = -1.0
    for bad, words in (
        ({}, "no optimizer state"),
        (sgd.state_dict(), "groups of"),
        (short, "groups of"),
        (crooked, "in the checkpoint"),
        (strange, "out of range"),
    ):
        with pytest.raises(ValueError, match=words):
            opt.load_state_dict(bad)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i, slots in before["state"].items():
            assert all(torch.equal(after["state"][i][k], t) for k, t in slots.items())
    calls = []
    opt.register_load_state_dict_pre_hook(lambda o, state: calls.append(len(state["state"])))
    opt.register_load_state_dict_post_hook(lambda o: calls.append(len(o.state)))
    opt.load_state_dict(state_dict=before)
    assert calls == [len(before["state"])] * 2, "hooks must see the whole state before and after"


@plain
def test_loads_by_name_when_the_order_differs(cls):
    model = tiny()
    opt = cls(model.named_parameters(), **short_options(cls))
    train(model, opt, 0, 4)
    twin = copy.deepcopy(model)
    turned = cls(reversed(list(twin.named_parameters())), **short_options(cls))
    turned.load_state_dict(reload(opt.state_dict()))
    train(model, opt, 4, 7)
    train(twin, turned, 4, 7)
    assert same(weights(model), weights(twin))


@plain
def test_loads_by_position_when_names_repeat(cls):
    def made(fill):
        ps = [nn.Parameter(torch.zeros(8, 8)) for _ in range(2)]
        opt = cls([("w", ps[0]), ("module.w", ps[1])], **short_options(cls))
        for i, p in enumerate(ps):
            p.grad = torch.full_like(p, fill * (i + 1)).addcmul_(torch.eye(8), torch.tensor(fill))
        opt.step()
        return opt, ps

    (opt, ps), (other, qs) = made(0.5), made(3.0)
    other.load_state_dict(reload(opt.state_dict()))
    for p, q in zip(ps, qs, strict=True):
        assert all(torch.equal(t, other.state[q][key]) for key, t in opt.state[p].items())


@plain
def test_a_parameter_does_not_depend_on_its_neighbours(cls):
    model = tiny()
    named = list(model.named_parameters())
    together = copy.deepcopy(named)
    opt = cls(together, **short_options(cls))
    for step in range(4):
        give_gradients([p for _, p in together], step)
        opt.step()
    for i, (name, p) in enumerate(named):
        alone = cls([(name, p)], **short_options(cls))
        for step in range(4):
            give_gradients([q for _, q in named], step)
            alone.step()
        assert torch.equal(p, together[i][1]), name


@plain
def test_every_slot_moves_within_a_period(cls):
    model = tiny()
    opt = cls(model, **short_options(cls))
    train(model, opt, 0, 1)
    before = {p: {k: t.clone() for k, t in slots.items()} for p, slots in opt.state.items()}
    train(model, opt, 1, 2 + max(short_options(cls).values(), default=0))
    for p, slots in opt.state.items():
        for key, t in slots.items():
            assert not torch.equal(t, before[p][key]), f"{key} of a {tuple(p.shape)} parameter stands still"


@plain
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_bad_gradient_touches_nothing_of_its_parameter(cls, poison):
    model = tiny()
    opt = cls(model, **short_options(cls))
    train(model, opt, 0, 2)
    names = dict(model.named_parameters())
    poisoned = list(names)[:: len(names) // 3][:3]
    for name in poisoned:
        p = names[name]
        give_gradients(model.parameters(), 7)
        p.grad.view(-1)[3] = poison
        before, slots = p.detach().clone(), {k: t.clone() for k, t in opt.state[p].items()}
        others = weights(model)
        opt.step()
        assert torch.equal(p, before), name
        assert all(torch.equal(t, slots[k]) for k, t in opt.state[p].items()), name
        moved = [not torch.equal(a, b) for a, b in zip(weights(model), others, strict=True)]
        assert sum(moved) == len(moved) - 1
    assert opt.skipped() == dict.fromkeys(poisoned, 1)


@every
@precisions
def test_the_path_without_host_reads_equals_the_other(cls, dtype, monkeypatch):
    """What runs on CUDA and on fake tensors: the same weights and state, bad gradients included, with nothing read."""
    monkeypatch.setattr(storage, "_CPU_HAS_BFLOAT16", True)  # the same products on both
    # A device has a decomposition of its own, which has tests of its own.
    monkeypatch.setattr(subspace, "near_orthonormal", lambda x, basis: subspace.orthonormal(x))
    results = []
    for device_path in (False, True):
        model = tiny(dtype=dtype)
        opt = build(cls, model)
        if device_path:
            go_the_devices_way(monkeypatch)
        for step in range(6):
            give_gradients(model.parameters(), step)
            if step in (0, 2, 3):  # also where bases are found
                list(model.parameters())[3].grad.view(-1)[0] = float("nan")
            opt.step()
        results.append(weights(model) + [t.clone() for slots in opt.state.values() for t in slots.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@every
def test_maximizing_is_minimizing_the_negative(cls):
    model = tiny()
    up, down = copy.deepcopy(model), model
    one, two = build(cls, up, maximize=True), build(cls, down)
    for step in range(5):
        give_gradients(up.parameters(), step)
        for p, q in zip(up.parameters(), down.parameters(), strict=True):
            q.grad = -p.grad
        one.step()
        two.step()
    assert same(weights(up), weights(down))


@plain
def test_list_form_equals_direction(cls):
    if cls.update is None:
        pytest.skip("has no list form")
    h, lr, shape = cls.hypers({"weight_decay": 0.1}), 0.01, (7, 9)
    one, two = torch.randn(shape), None
    two = one.clone()
    slots = {k: storage.new_slot(s, one, None, 1) for k, s in cls.slots(shape, h).items()}
    copies = {k: t.clone() for k, t in slots.items()}
    for step in range(1, 5):
        g = torch.randn(shape)
        for counter in (slots, copies):
            if "step" in counter:
                counter["step"].fill_(step)
        asked = {"step": float(step)} if "step" in stages.keywords(cls.update) else {}
        cls.update([one], [g], h, lr, None, slots={k: [t] for k, t in slots.items()}, **asked)
        given = copies | {"step": float(step)}
        u = direct(cls, g, two, h, stages.asked(stages.first_stage(cls), given))
        apply_update(two, u, lr, h.weight_decay, None, cls.decay_after)
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


@plain
def test_compiles_whole_and_once(cls):
    h, shape = cls.hypers({}), (16, 24)
    slots = {k: storage.new_slot(s, torch.empty(shape), None, 1) for k, s in cls.slots(shape, h).items()}
    wanted, counter = stages.keywords(stages.first_stage(cls)), torch.zeros((), dtype=torch.float64)

    def step(g, w, lr, counter, slots):
        given = slots | {"step": counter}
        u = direct(cls, g, w, h, {k: given[k] for k in wanted if k in given})
        return w.sub_(u * lr)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for t in range(1, 4):
        compiled(torch.randn(shape), torch.zeros(shape), torch.tensor(0.1 / t), counter.add_(1), slots)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@plain
@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 0), (torch.float32, 1 << 24), (torch.bfloat16, 1 << 24)])
@pytest.mark.parametrize("layers", [2, 16])
@pytest.mark.parametrize("maximize", [False, True])
def test_workspace_on_a_device_is_bounded_by_the_largest_matrix_or_by_a_constant(
    cls, dtype, maximize, layers, room, monkeypatch
):
    go_the_devices_way(monkeypatch)
    monkeypatch.setattr(stacks, "DEVICE_ROOM", room)
    stepped, step = [], stacks.step
    monkeypatch.setattr(stacks, "step", lambda tasks: stepped.append(len(tasks)) or step(tasks))
    model = nn.Sequential(*(nn.Linear(512, 256, bias=False, dtype=dtype) for _ in range(layers)))
    opt = cls(model, maximize=maximize)
    for step_number in range(3):
        give_gradients(model.parameters(), step_number)
        with nullcontext() if step_number == 0 else Workspace() as space:  # the first step finds bases
            opt.step()
        if space is not None:
            assert space.peak <= max(room, (cls.workspace + maximize) * 256 * 512 * 4)
    assert bool(stepped) == (room > 0 and cls is not AdamW)  # which steps lists


@plain
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("layers", [2, 8])
@pytest.mark.parametrize("maximize", [False, True])
def test_workspace_is_bounded_by_the_largest_matrix(cls, maximize, layers, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # how many matrices are stacked
    monkeypatch.setattr(storage, "_CPU_HAS_BFLOAT16", True)
    largest = 256 * 512 * 4
    model = nn.Sequential(*(nn.Linear(512, 256, bias=False) for _ in range(layers)))
    opt = cls(model, maximize=maximize)
    for step in range(3):
        give_gradients(model.parameters(), step)
        if step == 0:  # the first step finds bases
            opt.step()
            continue
        with Workspace() as space:
            opt.step()
        assert space.peak <= (cls.workspace + maximize) * largest


@plain
@precisions
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_matrices_of_one_shape_step_as_each_of_them_alone(cls, dtype, shape, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(storage, "_CPU_HAS_BFLOAT16", True)
    stacks, size = [], steps._stack_size
    monkeypatch.setattr(steps, "_stack_size", lambda *args: stacks.append(size(*args)) or stacks[-1])

    def stepped(count, among):
        named = [(f"w{i}", nn.Parameter(torch.ones(shape, dtype=dtype))) for i in range(5)]
        largest = nn.Parameter(torch.ones(160, 160, dtype=dtype))  # what it would take is the room for stacks
        optimizers = [cls([*pairs, ("largest", largest)], lr=0.1) for pairs in among(named)]
        for step in range(count):
            give_gradients([p for _, p in named] + [largest], step)
            for opt in optimizers:
                opt.step()
        return [p for _, p in named]

    together = stepped(3, lambda named: [named])
    alone = stepped(3, lambda named: [[pair] for pair in named])
    assert same(together, alone)
    assert cls.prepare is None or max(stacks) > 1


@plain
@pytest.mark.parametrize("shape", [(128, 2048), (168, 294), (168, 168), (600, 300)])
def test_matrices_step_as_alone_where_threads_share_their_sums(cls, shape, monkeypatch):
    monkeypatch.setattr(storage, "_CPU_HAS_BFLOAT16", True)

    def stepped(among):
        named = [(f"w{i}", nn.Parameter(torch.ones(shape))) for i in range(2)]
        largest = nn.Parameter(torch.ones(1024, 512))
        optimizers = [cls([*pairs, ("largest", largest)], lr=0.1) for pairs in among(named)]
        give_gradients([p for _, p in named] + [largest], 0)
        for opt in optimizers:
            opt.step()
        return [p for _, p in named]

    torch.set_num_threads(2)
    try:
        assert same(stepped(lambda named: [named]), stepped(lambda named: [[pair] for pair in named]))
    finally:
        torch.set_num_threads(1)


@every
@precisions
def test_autocast_around_a_step_changes_nothing(cls, dtype):
    results = []
    for enabled in (False, True):
        model = tiny(dtype=dtype)
        opt = build(cls, model)
        for step in range(4):
            give_gradients(model.parameters(), step)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                opt.step()
        results.append(weights(model))
    assert same(*results)


@plain
@precisions
def test_awkward_shapes(cls, dtype):
    shapes = [(), (0,), (1,), (5,), (1, 6), (6, 1), (3, 0), (2, 2), (17, 5), (3, 4, 5), (8, 4, 3, 3)]
    model = nn.Module()
    for i, shape in enumerate(shapes):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape).to(dtype)))
    model.conv = nn.Conv2d(4, 8, 3).to(dtype, memory_format=torch.channels_last)
    model.strided = nn.Linear(12, 10).to(dtype)
    model.strided.weight = nn.Parameter(torch.randn(12, 10).to(dtype).T)
    opt = cls(model, lr=0.1, **short_options(cls))
    frozen = model.p3.detach().clone()
    for step in range(5):
        give_gradients(model.parameters(), step)
        model.p3.grad = None
        before = weights(model)
        opt.step()
        for old, p in zip(before, model.parameters(), strict=True):
            assert torch.isfinite(p).all()
            assert p.numel() == 0 or p is model.p3 or not torch.equal(old, p), tuple(p.shape)
    assert torch.equal(model.p3, frozen)


@plain
def test_a_frozen_parameter_keeps_its_state(cls):
    model = tiny()
    opt = cls(model, **short_options(cls))
    train(model, opt, 0, 2)
    p = model.square.weight
    before = {key: t.clone() for key, t in opt.state[p].items()}
    p.requires_grad_(False)
    opt.memory()
    saved = reload(opt.state_dict())
    train(model, opt, 2, 3)
    assert all(torch.equal(t, before[key]) for key, t in opt.state[p].items())
    other = tiny()
    resumed = cls(other, **short_options(cls))
    other.square.weight.requires_grad_(False)
    resumed.state.pop(other.square.weight)
    resumed.load_state_dict(saved)
    assert resumed.state[other.square.weight].keys() == before.keys()


@plain
def test_narrow_averages_of_narrow_weights_still_move(cls):
    """Rounded to nearest, an average with decay 0.999 in bfloat16 stands still for ever."""
    p = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    opt = cls([("w", p)], state_dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    opt.step()
    before = {key: t.float().mean().item() for key, t in opt.state[p].items() if t.dtype == torch.bfloat16}
    p.grad = torch.full_like(p, 1e-3)
    for _ in range(300):
        opt.step()
    for key, t in opt.state[p].items():
        if key in before:
            assert t.float().mean().item() < 0.9 * before[key], key


@plain
def test_a_refused_gradient_leaves_no_half_step(cls):
    model = nn.Sequential(nn.Embedding(9, 16, sparse=True), nn.Linear(16, 16))
    opt = cls(model)
    before = weights(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert same(weights(model), before)


@plain
def test_state_follows_the_parameters(cls):
    model = tiny()
    opt = cls(model)
    model.to(torch.float64)
    give_gradients(model.parameters(), 0)
    opt.step()
    kept = [t for slots in opt.state.values() for key, t in slots.items() if key != "step" and t.is_floating_point()]
    assert {t.dtype for t in kept} <= {torch.float64}

    model = tiny()
    model.square.weight.requires_grad_(False)
    opt = cls(model.named_parameters())
    model.square.weight.requires_grad_(True)
    train(model, opt, 0, 1)
    assert model.square.weight in opt.state

    opt = cls([("w", nn.Parameter(torch.zeros(16, 16)))])
    new = nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))
    opt.param_groups[0]["params"] = [new]  # what FSDP2's `prepare` does after construction
    new.grad = torch.ones_like(new)
    opt.step()
    assert list(opt.state) == [new]

    opt.add_param_group({"params": [("v", nn.Parameter(torch.zeros(16, 16)))], "lr": 0.5})
    assert len(opt.state) == 2
    assert opt.param_groups[1]["step"] == 0


@every
def test_lives_with_the_rest_of_torch(cls):
    model = tiny()
    opt = build(cls, model, lr=torch.tensor(1e-2))
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    assert opt.step(closure).item() > opt.step(closure).item()
    assert seen == ["pre", "post"] * 2

    model = tiny()
    opt = build(cls, model, lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=9, cycle_momentum=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        opt.zero_grad(set_to_none=step % 2 == 0)
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        schedule.step()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    opt.load_state_dict(reload(opt.state_dict()))


@every
def test_signature_and_docstring_tell_a_reader(cls):
    signature = inspect.signature(cls)
    assert list(signature.parameters)[:2] == ["params", "lr"]
    assert set(signature.parameters) == {"params", *cls.options}
    assert cls.__doc__
    assert all(option.doc for option in cls.options.values())
    assert "arXiv" in cls.paper
