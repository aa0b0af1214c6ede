"""Plans against measurements of the same thing on real tensors."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Muon

import optimzoo
from optimzoo import planning
from optimzoo.core import stacks, storage
from optimzoo.functional import slices
from optimzoo.memory import Unplannable, Workspace, ledger
from optimzoo.memory.rehearsal import garbage_of_its_own
from optimzoo.modules import convert
from optimzoo.training.planning import bytes_of
from tests.cases import PLAIN, go_the_devices_way, tiny
from tests.cases import loss_of as tiny_loss
from tests.test_cli import command, refused  # noqa: F401  # the fixture

transformers = pytest.importorskip("transformers")


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=176, num_hidden_layers=1, num_attention_heads=4
    )
    config.use_cache = False
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # not .to(dtype): the function also builds fake models
    try:
        return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


IDS = torch.randint(0, 384, (2, 33), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
BASE = IDS.untyped_storage().nbytes()


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest: two optimizers of one model."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [Muon(inner), AdamW(rest, foreach=False)]


MAKES: dict[str, Callable] = {
    **PLAIN,
    **{f"frugal {how}": lambda m, how=how: optimzoo.FRUGAL(m, projection=how) for how in ("svd",)},
    "bfloat16 state": lambda m: optimzoo.COSMOS(m, state_dtype=torch.bfloat16),
    "torch AdamW": lambda m: AdamW(m.parameters(), foreach=False),
    "torch AdamW foreach": lambda m: AdamW(m.parameters(), foreach=True),
    "torch AdamW fused": lambda m: AdamW(m.parameters(), fused=True),
    "torch SGD": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "torch Muon": muon,
}


@garbage_of_its_own()
def measured(model: nn.Module, make: Callable, loss: Callable, micro: int = 1, steps: int = 3) -> tuple[int, int, int]:
    """(state, workspace, peak) of real steps; what a lazy first step makes is state from the second step on."""
    made = make(model)
    optimizers = made if isinstance(made, list) else [made]
    held, workspace, peak = ledger(model).total + BASE, 0, 0
    for _ in range(steps):
        before = sum(ledger(o).total for o in optimizers)
        with Workspace() as whole:
            for _ in range(micro):
                loss(model).backward()
            with Workspace() as step:
                for o in optimizers:
                    o.step()
        state = sum(ledger(o).total for o in optimizers)
        workspace = max(workspace, step.peak - (state - before))
        peak = max(peak, held + before + whole.peak if state == before else 0)
        model.zero_grad()
        gc.collect()
    return state, workspace, peak


def hf_loss(model: nn.Module) -> torch.Tensor:
    return model(**BATCH).loss


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in MAKES), *((name, torch.bfloat16) for name in PLAIN)]
)
def test_planned_is_measured(name: str, dtype: torch.dtype) -> None:
    plan = optimzoo.plan(llama(dtype), MAKES[name], BATCH)
    state, workspace, peak = measured(llama(dtype), MAKES[name], hf_loss)
    assert plan.state == state == sum(plan.state_by_kind.values())
    assert plan.workspace == pytest.approx(workspace, rel=0.01, abs=64)
    assert plan.peak == pytest.approx(peak, rel=0.03)
    assert plan.peak == max(plan.peaks.values()) == sum(plan.at_peak.values())
    assert plan.gradients == plan.parameters


def test_the_allocator_agrees() -> None:
    """A second ruler: the allocator's own events, with scratch memory of kernels, as the profiler records them."""
    from torch.profiler import ProfilerActivity, profile

    model = llama()
    opt = optimzoo.COSMOS(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        hf_loss(model).backward()
        opt.step()
    live = top = 0
    for event in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=_start):
        live += event.nbytes()
        top = max(top, live)
    held = ledger(model).total - sum(p.grad.nbytes for p in model.parameters()) + opt.memory().total + BASE
    assert optimzoo.plan(llama(), "cosmos", BATCH).peak == pytest.approx(held + top, rel=0.03)


def _start(event) -> int:
    return event.start_ns()


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(Unplannable, match=r"torch's Adafactor cannot be planned: it reads the value"):
        optimzoo.plan(tiny(), lambda m: Adafactor(m.parameters()))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(Unplannable, match="give plan a loss="):
        optimzoo.plan(tiny().requires_grad_(False), None, tokens)

    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 if x.sum() > 0 else 2)

    with pytest.raises(Unplannable, match="Reads cannot be planned: it reads the value"):
        optimzoo.plan(Reads(4, 4), "adamw", torch.ones(2, 4))
    with pytest.raises(ValueError, match="build it in its dtype"):
        optimzoo.plan(lambda: nn.Linear(4, 4).to(torch.bfloat16), "adamw")
    with pytest.raises(ValueError, match="did you mean 'cosmos'"):
        optimzoo.plan(tiny(), "cosmo")
    with pytest.raises(ValueError, match="accumulate=2 adds gradients up"):
        optimzoo.plan(tiny(), "adamw", release=True, accumulate=2)
    with pytest.raises(ValueError, match="works in one process"):
        optimzoo.plan(tiny(), "adamw", release=True, world_size=2)
    with pytest.raises(TypeError, match="needs an optimizer of optimzoo, not AdamW"):
        optimzoo.plan(tiny(), AdamW, tokens, release=True)
    with pytest.raises(TypeError, match="lambda model: AdamW"):
        optimzoo.plan(tiny(), AdamW(tiny().parameters()))
    with pytest.raises(TypeError, match="must return an optimizer or a list of them, not int"):
        optimzoo.plan(tiny(), lambda model: 3)
    with pytest.raises(ValueError, match="world_size=0"):
        optimzoo.plan(tiny(), "adamw", world_size=0)
    with pytest.raises(ValueError, match="Tiny has no gradient_checkpointing_enable"):
        optimzoo.plan(tiny(), "adamw", checkpointing=True)


def test_model_and_random_state_are_the_callers() -> None:
    model = llama().eval()
    before = [p.detach().clone() for p in model.parameters()]
    random = torch.get_rng_state()
    plan = optimzoo.plan(model, "cosmos", BATCH, checkpointing=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    assert not model.training
    with torch.device("meta"):
        on_meta = llama()
    assert optimzoo.plan(on_meta, "cosmos", BATCH, checkpointing=True) == plan
    assert optimzoo.plan(llama, optimzoo.COSMOS, BATCH, checkpointing=True) == plan
    assert str(plan) == plan.table()
    assert json.loads(json.dumps(plan.as_dict()))["peak"] == plan.peak


def test_tied_weights_count_once() -> None:
    model = tiny()
    model.head.weight = model.embed.weight
    plan = optimzoo.plan(model, AdamW, torch.zeros(4, 8, dtype=torch.int64))
    assert plan.parameters == ledger(model).total
    assert plan.state == 2 * plan.parameters + 4 * len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "swan", "bfloat16 state"])
def test_release(name: str) -> None:
    """Live gradients never exceed the largest one, in the plan and in a real backward."""
    plan = optimzoo.plan(llama(), MAKES[name], BATCH, release=True)
    model = llama()
    opt = MAKES[name](model)
    largest = max(p.nbytes for p in model.parameters())
    assert plan.gradients == largest
    alone = optimzoo.plan(llama(), MAKES[name], release=True)
    assert (alone.state, alone.gradients, alone.workspace) == (plan.state, largest, plan.workspace)
    assert plan.state == optimzoo.plan(llama(), MAKES[name]).state

    held = ledger(model).total + BASE + opt.memory().total
    with optimzoo.release_gradients(model, opt), Workspace() as whole:
        hf_loss(model).backward()
        opt.step()
    assert plan.peak == pytest.approx(held + whole.peak, rel=0.03)
    assert plan.moment.startswith("backward")  # where a large workspace may cost more than gradients saved


def test_accumulation_autocast_and_checkpointing() -> None:
    plain = optimzoo.plan(llama(), "frugal", BATCH)
    more = optimzoo.plan(llama(), "frugal", BATCH, accumulate=5)
    assert more.peak == pytest.approx(measured(llama(), PLAIN["frugal"], hf_loss, micro=5)[2], rel=0.03)
    assert more.peak > plain.peak

    def under_autocast(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return hf_loss(model)

    cast = optimzoo.plan(llama(), "frugal", BATCH, autocast=torch.bfloat16)
    assert cast.peak == pytest.approx(measured(llama(), PLAIN["frugal"], under_autocast)[2], rel=0.03)
    assert cast.activations != plain.activations

    model = llama().train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    less = optimzoo.plan(llama(), "frugal", BATCH, checkpointing=True)
    assert less.peak == pytest.approx(measured(model, PLAIN["frugal"], hf_loss)[2], rel=0.03)
    assert less.activations < 0.7 * plain.activations


def test_shards_are_arithmetic() -> None:
    one, eight = (optimzoo.plan(llama(), "adamw", BATCH, world_size=ranks) for ranks in (1, 8))
    for part in ("parameters", "state", "gradients"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8, rel=0.001)
    assert eight.activations == one.activations
    assert one.peak - eight.peak == pytest.approx((one.parameters + one.state) * 7 / 8, rel=0.001)
    assert any("gathered" in note for note in eight.notes)
    assert not any("gathered" in note for note in one.notes)


@pytest.mark.parametrize("kind", ["spectral", "sampled", "sparse_delta"])
def test_converted_layers(kind: str) -> None:
    from optimzoo.modules import kinds
    from optimzoo.registry import optimizers

    options = {"spectral": {"rank": 4}, "sampled": {"ratio": 0.3}, "sparse_delta": {"density": 0.05}}[kind]
    makes = {"spectral": optimizers()["sst"], "sparse_delta": lambda m: optimzoo.SFT(m, total_steps=100)}
    make = makes.get(kind, optimzoo.AdamW)

    def conversion(model: nn.Module) -> None:
        convert(model, kinds()[kind], match="*mlp*", **options)

    plan = optimzoo.plan(llama(), make, BATCH, convert=conversion)
    model = llama()
    conversion(model)
    state, workspace, peak = measured(model, make, hf_loss, steps=2)
    assert plan.state == state
    assert plan.workspace == pytest.approx(workspace, rel=0.01, abs=64)
    assert plan.peak == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("density", [0.25, 0.4])
def test_blocks_are_planned_at_their_largest_period(density: float) -> None:
    held, options = [], {"projection": "block", "density": density, "update_gap": 1}
    model = tiny()
    opt = optimzoo.FRUGAL(model, **options)
    for step in range(int(1 / density) + 1):
        held.append(opt.memory().total)
        tiny_loss(model, step).backward()
        opt.step()
    assert len(set(held)) > 1
    assert optimzoo.plan(tiny(), lambda m: optimzoo.FRUGAL(m, **options)).state == max(held)


@pytest.mark.parametrize("name", PLAIN)
def test_the_way_of_a_device_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device costs beyond the CPU (kept state of skipped steps, counters on the device) is in a plan for it."""
    plan = optimzoo.plan(tiny(width=64), PLAIN[name], device="xpu")
    go_the_devices_way(monkeypatch)
    monkeypatch.setattr(storage, "_CPU_HAS_BFLOAT16", True)  # the same products on both
    model = tiny(width=64)
    state, workspace, _ = measured(model, PLAIN[name], tiny_loss)
    assert plan.state == state
    assert plan.workspace == pytest.approx(workspace, rel=0.01, abs=64)


@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_slices_stand_for_all(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of many slices is planned by two of them, and costs no more than some slices either way."""
    rows = 2050
    if device == "xpu":
        rows = 3 * slices.DEVICE_PIECE // 2048
        monkeypatch.setattr(stacks, "DEVICE_ROOM", 9 * slices.DEVICE_PIECE)  # for one slice's copies
        go_the_devices_way(monkeypatch)
    make = {"adamw": optimzoo.AdamW, "signs": lambda m: optimzoo.FRUGAL(m, density=0.0)}
    for make_one in make.values():
        model = nn.Sequential(nn.Linear(2048, rows, bias=False, dtype=torch.bfloat16), nn.Linear(rows, 8).bfloat16())
        x = torch.ones(2, 2048, dtype=torch.bfloat16)
        plan = optimzoo.plan(model, make_one, x, device=device)
        state, workspace, _ = measured(model, make_one, lambda m, x=x: m(x).float().mean())
        assert (plan.state, plan.workspace) == (state, pytest.approx(workspace, rel=0.01, abs=64))
        assert workspace < 24 * slices.piece_size(model[0].weight, 1 << 18)  # six temporaries of one piece, in float32


# What fits.


def test_largest_batch() -> None:
    def bent(size: int) -> int:
        return max(1000 + 3 * size, 400 + 17 * size, 31 * size)

    for memory in (1002, 1003, 1100, 1417, 5000, 123_456):
        found = planning.largest(bent, memory)
        assert bent(found) <= memory < bent(found + 1) if found else bent(1) > memory
        assert planning.largest(bent, memory, guess=40) == found
    assert planning.largest(lambda size: 5, 10) == planning.LARGEST_BATCH


@pytest.mark.parametrize("release", [False, True])
def test_fit_is_what_plans_say(release: bool) -> None:
    def of(size: int) -> torch.Tensor:
        return torch.zeros(size, 24, dtype=torch.int64)

    makes = {"swan": optimzoo.SWAN, "adamw": optimzoo.AdamW, "adafactor": lambda m: Adafactor(m.parameters())}
    memory = 2**18
    found = optimzoo.fit(tiny, of, memory, batch=2, optimizers=makes, release=release)
    assert [row.name for row in found.rows] == ["swan", "adamw", "adafactor"]
    assert "Adafactor" in found.rows[-1].refused
    assert found.rows[-1].refused in found.table()
    for row in found.rows[:-1]:
        make = makes[row.name]
        assert row.batch > 2
        at, beyond = (optimzoo.plan(tiny, make, of(row.batch + more), release=release).peak for more in (0, 1))
        assert at <= memory < beyond
        assert row.peak == pytest.approx(optimzoo.plan(tiny, make, of(2), release=release).peak, rel=0.001)


def test_fit_knows_the_registry_and_the_baselines() -> None:
    names = set(planning.methods())
    assert set(PLAIN) | {"torch.adamw", "torch.muon", "torch.adafactor"} <= names
    found = optimzoo.fit(tiny, lambda size: torch.zeros(size, 8, dtype=torch.int64), 2**20)
    assert {row.name for row in found.rows if row.peak} >= set(PLAIN) | {n for n in names if "8bit" in n}
    assert "not covered" in found.table()
    assert not any(row.name == "sst" for row in found.rows)


# The command.


def test_plan_of_a_recipe(command, tmp_path: Path) -> None:  # noqa: F811
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        "model: {name: llama, hidden_size: 64, intermediate_size: 96, layers: 1, heads: 2}\n"
        "data: {name: text, path: absent.txt, sequence: 32, batch: 4}\n"
        "optimizer: {name: cosmos, lr: 1e-3, rank: 8}\nschedule: {steps: 3}\n"
        "compare: [{label: one}, {label: two, optimizer: {name: torch.adafactor, lr: 1e-3}}]\n"
    )
    code, out, _ = command("plan", recipe, "--device", "cpu", "--json")
    assert code == 0
    plans = json.loads(out)
    assert "Adafactor cannot be planned" in plans["two"]["error"]

    from optimzoo.training import load
    from optimzoo.training.model import build_model, loss_of

    entry = load(recipe).entries()["one"]
    tokens = torch.zeros(4, 33, dtype=torch.int64)
    real = measured(
        build_model(entry, torch.device("cpu")), lambda m: optimzoo.COSMOS(m, rank=8), lambda m: loss_of(m, tokens)
    )
    assert plans["one"]["state"] == real[0]
    assert plans["one"]["workspace"] == pytest.approx(real[1], rel=0.01)
    assert plans["one"]["peak"] == pytest.approx(real[2], rel=0.03)
    assert "the peak is in" in command("plan", recipe)[1]
    alone = "optimizer={name: torch.adafactor, lr: 1e-3}"
    assert "Adafactor" in refused(command("plan", recipe, "--set", "compare=[]", "--set", alone))
    assert "--density" in refused(command("plan", recipe, "--density", "0.5"))
    words = {"optimizer": "swan", "dtype": "bf16", "batch": 64, "sequence": 8, "accumulate": 2}
    for name, value in words.items():
        meant = "bfloat16" if value == "bf16" else value
        for start in (["plan"], ["fit", "--gpu", "1GiB"])[: 1 if name == "optimizer" else 2]:  # `fit` tries all of them
            error = refused(command(*start, recipe, f"--{name}", value))
            assert f"--{name} is for --model; in a recipe it is --set" in error
            assert f".{name}={meant}\n" in error or "optimizer.name=swan" in error
    shown = command("plan", recipe, "--set", "compare=[]", "--set", "data.batch=64", "--set", "model.dtype=bfloat16")[1]
    assert shown.startswith("COSMOS: llama in bfloat16, 64 x 32 tokens\n")
    assert "add clip: 0" in refused(command("plan", recipe, "--set", "compare=[]", "--release"))
    code, out, _ = command("plan", recipe, "--set", "compare=[]", "--set", "clip=0", "--release", "--json")
    assert (code, json.loads(out)["cosmos"]["gradients"]) == (0, 4 * 256 * 64)


def test_plan_and_fit_of_a_configuration(command, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    two = {name: make for name, make in planning.methods().items() if name in ("frugal", "torch.adafactor")}
    monkeypatch.setattr(planning, "methods", lambda: two)  # other tests fit all of them
    config = tmp_path / "config.json"
    llama().config.save_pretrained(tmp_path)
    words = ("--model", config, "--batch", 2, "--sequence", 32, "--dtype", "bf16")
    code, out, err = command("plan", *words, "--optimizer", "frugal", "--density", "0.5", "--checkpointing", "--json")
    assert (code, err) == (0, "")
    (plan,) = json.loads(out).values()
    assert plan["parameters"] == 2 * sum(p.numel() for p in llama().parameters())
    assert {"index", "first moment"} <= set(plan["state_by_kind"])
    code, out, told = command("fit", "--gpu", "24GiB", *words, "--json")
    assert told == ""
    start, *lines = command("fit", "--gpu", "24GiB", *words)[2].splitlines()
    assert start == "2 optimizers to plan"
    assert [line.split(": ")[0] for line in lines] == [f"{i}/2 {name}" for i, name in enumerate(two, 1)]
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert code == 0
    assert rows["frugal"]["batch"] > 100
    assert "Adafactor" in rows["torch.adafactor"]["refused"]


def test_plan_and_fit_say_what_they_are_about_and_what_is_left_to_try(command, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    few = {name: make for name, make in planning.methods().items() if name in ("swan", "sm3")}
    monkeypatch.setattr(planning, "methods", lambda: few)  # other tests fit all of them
    llama().config.save_pretrained(tmp_path)
    words = ("--model", tmp_path / "config.json", "--batch", 2, "--sequence", 32)
    shown = command("plan", *words, "--optimizer", "swan", "--release")[1]
    assert shown.startswith("SWAN: transformers in bfloat16, 2 x 32 tokens, release\n")
    shown = command("fit", "--gpu", "10KiB", *words, "--accumulate", 4, "--checkpointing", "--ranks", 2)[1]
    assert shown.startswith(
        "transformers in bfloat16, 2 x 32 tokens, 4 batches a step, checkpointing, 2 ranks, in 10KiB\n"
    )
    assert shown.endswith("nothing fits; try more --ranks, shorter sequences\n")
    assert "nothing fits" not in command("fit", "--gpu", "1GiB", *words)[1]
    unplanned = command("fit", "--gpu", "1KiB", *words, "--release", "--ranks", 2)[1]
    assert "one process" in unplanned
    assert "nothing fits" not in unplanned
    assert (
        "with clip: 0" in command("fit", "--gpu", "10KiB", Path(__file__).parents[1] / "recipes" / "quickstart.yaml")[1]
    )


def test_wrong_words_are_one_sentence(command, tmp_path: Path) -> None:  # noqa: F811
    assert "did you mean '60m'" in refused(command("plan", "--model", "6m"))
    assert "did you mean 'density'" in refused(
        command("plan", "--model", "60m", "--optimizer", "frugal", "--densty", "1")
    )
    assert "did you mean 'cosmos'" in refused(command("plan", "--model", "60m", "--optimizer", "cosmo"))
    assert "give one recipe, or --model" in refused(command("plan"))
    assert "give it a value" in refused(command("plan", "--model", "60m", "--density"))
    for size in ("much", "24", "24i", "24.5", "ib"):
        assert "write it like 24GiB" in refused(command("fit", "--gpu", size, "--model", "60m"))
    assert "dtype" in refused(command("plan", "--model", "60m", "--dtype", "int3"))
    (tmp_path / "config.json").write_text("{}")
    assert "configuration" in refused(command("plan", "--model", tmp_path / "config.json"))


def test_sizes_in_words() -> None:
    sizes = {"24GiB": 24 * 2**30, "16g": 16 * 2**30, "80 GB": 80 * 10**9, "1.5k": 1536, "512b": 512}
    assert {text: bytes_of(text) for text in sizes} == sizes


SEVEN = """
import json, resource, sys, time
import torch, transformers.models.llama.modeling_llama
import optimzoo
from optimzoo.training import planning
recipe = planning.described("7b", sys.argv[1], {}, "bf16", 1, 2048, device=sys.argv[2])
began = time.perf_counter()
(plan,) = planning.plans(recipe, **json.loads(sys.argv[3])).values()
seconds = time.perf_counter() - began
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, plan.as_dict()]))
"""


def seven(name: str, device: str, **how: object) -> tuple[float, float, dict]:
    """(seconds after imports, GiB of the process, plan) of Llama-7B in bfloat16, one sequence of 2048 tokens."""
    words = [sys.executable, "-c", SEVEN, name, device, json.dumps(how)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


@pytest.mark.long
@pytest.mark.parametrize("name", ["adamw", "torch.adamw"])
def test_seven_billion_parameters_in_seconds(name: str) -> None:
    seconds, gib, plan = seven(name, "cpu")
    assert plan["parameters"] == 2 * 6_738_415_616
    assert seconds < 10
    assert gib < 2


@pytest.mark.long
def test_seven_billion_parameters_train_within_24_gib() -> None:
    whole, released = (
        seven("swan", "cuda", checkpointing=True, release=release)[2]["peak"] / 2**30 for release in (False, True)
    )
    assert released < 24 < whole


@pytest.mark.parametrize("release", [False, True])
def test_a_plan_keeps_no_model(release: bool) -> None:
    kept = []

    def make() -> nn.Module:
        model = tiny()
        kept.append(weakref.ref(model.square.weight))
        return model

    for batch in (None, torch.zeros(2, 9, dtype=torch.long)):
        planning.plan(make, optimzoo.SWAN, batch, loss=lambda model, x: model(x).sum(), release=release)
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_a_plan_gives_back_what_it_hides_from_the_garbage_collector() -> None:
    for frozen in (False, True):
        if frozen:
            gc.freeze()
        try:
            planning.plan(tiny, optimzoo.SWAN)
            assert bool(gc.get_freeze_count()) == frozen  # somebody else's stays
        finally:
            gc.unfreeze()
