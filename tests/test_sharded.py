"""FSDP2 and DDP: what several ranks compute together is what one process computes alone, to the bit."""

import itertools
import os
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_leaves

import optimzoo
from optimzoo.core import shards, storage
from optimzoo.core.checkpoint import adopt_groups
from optimzoo.training.folder import Folder
from tests.cases import ALL, PLAIN, Tiny, build, give_gradients, go_the_devices_way, short_options, tiny, train
from tests.ranks import run_together
from tests.test_memory import reachable


class Odd(Tiny):
    """Row counts that no number of ranks divides, fewer rows than ranks, a convolution, rows that fill no register."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(16, dtype)
        self.thin = nn.Linear(16, 2, dtype=dtype)
        self.conv = nn.Conv2d(4, 9, 2, dtype=dtype)
        self.long = nn.Linear(16, 43, dtype=dtype)
        self.ragged = nn.Linear(7, 13, dtype=dtype)


def odd(dtype: torch.dtype = torch.float32) -> Odd:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odd(dtype)


def sharded(model: nn.Module, **how) -> nn.Module:
    for name in ("square", "wide"):
        fully_shard(model.get_submodule(name), **how)
    return fully_shard(model, **how)


def rows_of(full: Tensor, like: DTensor) -> DTensor:
    """The same tensor spread as torch spreads it, with nothing of optimzoo's."""
    rank, chunks = dist.get_rank(), full.chunk(dist.get_world_size())
    mine = chunks[rank] if rank < len(chunks) else full[:0]
    return DTensor.from_local(
        mine.clone(), like.device_mesh, like.placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.detach()


def hand_over(alone: nn.Module, together: nn.Module, seed: int) -> None:
    """The same full gradients for both."""
    give_gradients(alone.parameters(), seed)
    for p, q in zip(alone.parameters(), together.parameters(), strict=True):
        q.grad = rows_of(p.grad, q) if isinstance(q, DTensor) else p.grad.clone()


def assert_same(alone, opt, together, twin) -> None:
    for (name, p), q in zip(alone.named_parameters(), together.parameters(), strict=True):
        held, other = opt.state[p], twin.state[q]
        assert held.keys() == other.keys()
        for key, t in {"weight": p.detach(), **held}.items():
            found = whole(q if key == "weight" else other[key])
            assert torch.equal(found, t), f"{key} of {name} differs by {(found.float() - t.float()).abs().max()}"


OPTIONS: dict[str, list[dict]] = {
    "adamw": [{"weight_decay": 0.1}, {"maximize": True, "engine": "compiled"}],
    "frugal": [
        *({"projection": projection} for projection in ("rows", "randk", "svd", "random", "block")),
        {"state_full": "lion"},
        {"projection": "block", "state_full": "sgdm"},
        {"density": 0.0},
        {"density": 1.0, "state_full": "lion"},
    ],
    "cosmos": [{"rank": 4}, {"nesterov": False, "engine": "compiled"}],
    "sm3": [{"momentum": 0.9, "engine": "compiled"}],
    "swan": [{"backend": "exact"}],
}
# "compiled" is the twin's alone: graphs and kernels are for what one process has alone, so shards take the eager way.
NARROW = [
    {"state_dtype": "bfloat16", "rounding": "stochastic", "engine": "compiled"},
    {"state_dtype": "int8", "rounding": "error"},
    {"state_dtype": "int8", "rounding": "stochastic"},
]


def pair(name: str, dtype: torch.dtype = torch.float32, **options):
    """One class on a whole and on a sharded model; `engine` is the sharded one's."""
    shards.SMALL = storage.SMALL = 32
    engine = options.pop("engine", "auto")
    options = soon(PLAIN[name]) | {"lr": 1e-2} | options
    alone, together = odd(dtype), sharded(odd(dtype))
    return alone, PLAIN[name](alone, **options), together, PLAIN[name](together, engine=engine, **options)


def soon(cls) -> dict:
    """Schedules that turn at every second step: steps 0 to 2 reach into a second period, steps 3 and 4 into a third."""
    options = short_options(cls)
    return options | {name: 2 for name, gap in options.items() if name == "update_gap"}


def same_as_one_process(folder: Path, *, name: str, options: dict, dtype: torch.dtype = torch.float32) -> None:
    alone, opt, together, twin = pair(name, dtype, **options)
    planned = twin.memory().total
    for step in range(3):
        hand_over(alone, together, step)
        kept = [q.grad.to_local().clone() for q in together.parameters()]
        opt.step()
        twin.step()
        assert all(torch.equal(q.grad.to_local(), g) for q, g in zip(together.parameters(), kept, strict=True))
    assert_same(alone, opt, together, twin)
    book = twin.memory()
    assert book.total == twin._state_bytes == sum(reachable(twin).values())
    assert book.slack == 0
    if options.get("projection") != "block":
        assert book.total == planned
    if dist.get_world_size() == 4 and planned > 1000:
        assert book.total < 0.6 * opt.memory().total, "state is not spread"


def bad_gradients(folder: Path, *, name: str) -> None:
    """Ranks agree: one number that is none, in the rows of one of them, and the parameter is left alone by all."""
    alone, opt, together, twin = pair(name)
    last = dist.get_rank() == dist.get_world_size() - 1
    for step in range(3):
        hand_over(alone, together, step)
        if step == 1:
            alone.long.weight.grad[-1, 3] = torch.nan
            together.long.weight.grad.to_local()[-1:, 3] = (
                torch.nan if last else together.long.weight.grad.to_local()[-1:, 3]
            )
        if step == 2:
            alone.tall.weight.grad = together.tall.weight.grad = None
            if dist.get_world_size() > 1:  # a rank that has none while others do
                alone.square.weight.grad[: -(-16 // dist.get_world_size())] = 0
            if dist.get_world_size() > 1 and dist.get_rank() == 0:
                together.square.weight.grad = None
        opt.step()
        twin.step()
    assert_same(alone, opt, together, twin)
    assert opt.skipped() == twin.skipped() == {"long.weight": 1}


def zero_is_no_step(folder: Path) -> None:
    """COSMOS leaves a matrix alone whose gradient is zero everywhere, not one that is zero on this rank."""
    alone, opt, together, twin = pair("cosmos", rank=4)
    for step in range(3):
        hand_over(alone, together, step)
        if step == 1:
            alone.tall.weight.grad.zero_()
            together.tall.weight.grad.to_local().zero_()
            alone.square.weight.grad[:4] = 0
            together.square.weight.grad = rows_of(alone.square.weight.grad, together.square.weight)
        opt.step()
        twin.step()
    assert_same(alone, opt, together, twin)
    assert twin.skipped() == {"tall.weight": 1}


def beside_whole_ones(folder: Path) -> None:
    """On a device a leaf that is no parameter may be in a list with rows of others, whose ranks judge them together."""
    with pytest.MonkeyPatch.context() as patch:
        go_the_devices_way(patch)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for bad, turned in itertools.product("sw", (False, True)):
            s = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]))
            w = torch.ones(8, 8, requires_grad=True)
            named = [("s", s), ("w", w)]
            opt = ALL["adamw"](named[::-1] if turned else named, lr=0.5, weight_decay=0.0)
            g = {"s": torch.ones(8, 8), "w": torch.ones(8, 8)}
            g[bad][0, 0] = float("nan")  # in the first rank's rows
            s.grad, w.grad = distribute_tensor(g["s"], mesh, [Shard(0)]), g["w"]
            opt.step()
            for t, name in ((s.to_local(), "s"), (w, "w")):
                assert torch.allclose(t, torch.full_like(t, 1.0 if name == bad else 0.5)), (name, bad, turned, t)
            assert {name: count for name, count in opt.skipped().items() if count} == {bad: 1}


def refusals(folder: Path) -> None:
    model = nn.Sequential(OrderedDict(square=nn.Linear(12, 12)))
    model = fully_shard(model, shard_placement_fn=lambda p: Shard(1 if p.ndim > 1 else 0))
    with pytest.raises(TypeError, match=r"'square.weight' has the placements .*shards by rows are supported"):
        optimzoo.AdamW(model)
    for name in ("sst", "sft"):
        model = odd()
        build(ALL[name], model)
        with pytest.raises(TypeError, match="is sharded: use DistributedDataParallel, or leave the layers out"):
            ALL[name](fully_shard(model), **short_options(ALL[name]))
    model = sharded(odd())
    opt = optimzoo.AdamW(model)
    model.tall.weight.grad = rows_of(torch.zeros(32, 16), model.tall.weight).redistribute(placements=[Replicate()])
    with pytest.raises(RuntimeError, match=r"'tall.weight' is not sharded like the parameter"):
        opt.step()


def the_first_ones(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    sent = dist.broadcast(bucket.buffer(), 0, async_op=True)
    return sent.get_future().then(lambda future: future.value()[0])


def same_under_ddp(folder: Path, *, name: str) -> None:
    """Every rank has the same batch, so that the mean of the gradients is each of them; but not to the bit on three."""
    alone, together = tiny(), tiny()
    opt, twin = build(ALL[name], alone, lr=1e-2), build(ALL[name], together, lr=1e-2)
    train(alone, opt, 0, 8)
    module = nn.parallel.DistributedDataParallel(together)
    if dist.get_world_size() == 3:
        module.register_comm_hook(None, the_first_ones)
    train(module, twin, 0, 8)
    for (key, p), q in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert torch.equal(p, q), key


def recipe_runs(folder: Path, *, strategy: str, optimizer: str) -> None:
    """Losses of one process; stopped and resumed, the run goes on as it would have, to the bit."""
    from optimzoo.training import trainer
    from optimzoo.training.recipe import validate

    text = folder / f"corpus-{strategy}"
    if dist.get_rank() == 0:
        text.write_text(Path(__file__).read_text() * 3)
    dist.barrier()
    values = {
        "model": {"name": "llama", "hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 2},
        "data": {"name": "text", "path": str(text), "sequence": 16, "batch": 12, "accumulate": 2},
        "optimizer": {"name": optimizer, "lr": 1e-3},
        "schedule": {"steps": 6},
        "eval": {"every": 3, "batches": 2},
        "checkpoint": {"every": 3},
        "threads": 1,
    }
    together = validate({**values, "distributed": {"strategy": strategy}}, "recipe")
    result = trainer.train(together, folder / f"run-{strategy}", quiet=True)
    update, calls = trainer.update, []

    def stops(*how):
        calls.append(how)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return update(*how)

    trainer.update = stops
    with pytest.raises(KeyboardInterrupt):
        trainer.train(together, folder / f"stopped-{strategy}", quiet=True)
    trainer.update = update
    resumed = trainer.train(together, folder / f"stopped-{strategy}", resume=True, quiet=True)
    assert resumed["validation_loss"] == result["validation_loss"]
    dist.barrier()
    if dist.get_rank() == 0:
        files = [folder / f"{kind}-{strategy}" / "checkpoint.pt" for kind in ("run", "stopped")]
        one, other = (tree_leaves(torch.load(file, weights_only=True)) for file in files)
        assert len(one) == len(other)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))
        alone = trainer.train(validate(values, "recipe"), folder / f"alone-{strategy}", quiet=True)
        rows = [Folder(folder / f"{kind}-{strategy}").rows() for kind in ("run", "alone")]
        for key in ("loss", "gradient_norm"):
            assert all(abs(a[key] - b[key]) < 1e-4 for a, b in zip(*rows, strict=True)), key
        assert abs(result["validation_loss"] - alone["validation_loss"]) < 1e-4


def evaluation(folder: Path, *, strategy: str) -> None:
    """What one process finds, of last batches too that cannot be split evenly, and of rows of which not all counts."""
    from optimzoo.training.data import Corpus
    from optimzoo.training.distributed import Ranks
    from optimzoo.training.examples import Examples, Part
    from optimzoo.training.model import build_model
    from optimzoo.training.recipe import validate
    from optimzoo.training.tasks import task_of
    from optimzoo.training.trainer import evaluate

    draw, world, cpu = np.random.default_rng(0), dist.get_world_size(), torch.device("cpu")
    tokens = draw.integers(0, 256, 400)
    prompts = np.where(np.arange(400) < 260, ~tokens, tokens)  # the first rows count nothing, others little
    cases: dict[str, Any] = {"prompts": Corpus("", tokens, prompts, 256, np.arange(9), np.array([0, 253, 256, 300]))}
    for name, rows in {"one row more": 4 * world + 1, "one row a rank and one": 5 * world + 1}.items():
        part = Part(draw.integers(0, 40, (rows, 9)), draw.integers(4, 10, rows), draw.integers(0, 2, rows))
        cases[name] = Examples("", part, part, 40, 1)
    for name, corpus in cases.items():
        labelled = isinstance(corpus, Examples)
        sizes = {"hidden_size": 16, "intermediate_size": 24}
        bert = {"model_type": "bert", "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40, **sizes}
        llama = {"name": "llama", "layers": 2, "heads": 2, **sizes}
        values = {
            "model": {"name": "transformers", "config": bert} if labelled else llama,
            "data": {"name": "python-packages" if labelled else "python-source", "sequence": 9, "batch": 4 * world},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "schedule": {"steps": 1},
            "eval": {"batches": 2},
        }
        recipe = validate(values, "recipe")
        task, model = task_of(recipe), build_model(recipe, cpu)
        ranks = Ranks(dist.get_rank(), world, strategy)
        alone = evaluate(recipe, task, model, corpus, Ranks(0, 1, None), cpu)
        ranks.spread(model)
        together = evaluate(recipe, task, model, corpus, ranks, cpu)
        assert None not in alone.values()
        assert together == pytest.approx(alone, abs=1e-5), name


MOVING = {
    **{name: (name, {}) for name in PLAIN},
    "block": ("frugal", {"projection": "block"}),
    "codes": ("cosmos", {"state_dtype": "int8", "rank": 4}),
}


def saved(folder: Path, *, label: str) -> None:
    """After three steps, in a period that is not the first: nested and flattened."""
    name, options = MOVING[label]
    alone, _, together, twin = pair(name, **options)
    for step in range(3):
        hand_over(alone, together, step)
        twin.step()
    for flat in (False, True):
        how = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = {
            "model": get_model_state_dict(together),
            "optimizer": get_optimizer_state_dict(together, twin, options=how),
        }
        parts = state["optimizer"] if flat else state["optimizer"]["state"]
        keys = [None] * dist.get_world_size()
        dist.all_gather_object(keys, [(k, sorted(v) if isinstance(v, dict) else "") for k, v in parts.items()])
        assert all(other == keys[0] for other in keys), "ranks must save the same keys"
        dcp.save(state, checkpoint_id=folder / f"{label}-{flat}")


def moved(folder: Path, *, label: str, flat: bool, whole: bool = False) -> None:
    """Onto other ranks, or with `whole` onto none; then on, into another period, as if nothing had happened."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # what no_dist asks for
    name, options = MOVING[label]
    alone, opt, together, twin = pair(name, **options)
    if whole:
        together = odd()
        twin = PLAIN[name](together, **soon(PLAIN[name]) | options)
    for step in range(3):
        hand_over(alone, together, step)
        opt.step()
    with torch.no_grad():
        for p in together.parameters():
            p.add_(1)
    twin.param_groups[0]["lr"] = 5.0
    state = {"model": get_model_state_dict(together)}
    dcp.load(state, checkpoint_id=folder / f"{label}-{flat}", no_dist=whole)
    set_model_state_dict(together, state["model"])
    optimzoo.load_dcp(together, twin, folder / f"{label}-{flat}")
    assert_same(alone, opt, together, twin)
    for step in range(3, 5):
        hand_over(alone, together, step)
        opt.step()
        twin.step()
    assert_same(alone, opt, together, twin)


def states_in_and_out(folder: Path, *, label: str) -> None:
    """Shards through a file of each rank; the whole state of one process into shards, and back."""
    name, options = MOVING[label]
    alone, opt, together, twin = pair(name, **options)
    for step in range(3):
        hand_over(alone, together, step)
        opt.step()
        twin.step()
    file = folder / f"{label}-{dist.get_world_size()}-{dist.get_rank()}.pt"
    torch.save(twin.state_dict(), file)
    full = StateDictOptions(full_state_dict=True)
    everything = get_optimizer_state_dict(together, twin, options=full)
    for way in ("shards", "whole", "full"):
        again = PLAIN[name](together, **soon(PLAIN[name]) | options)
        if way == "shards":
            again.load_state_dict(torch.load(file, weights_only=True))
        elif way == "whole":
            again.load_state_dict(opt.state_dict())
        else:  # groups first, as `load_dcp` does: torch looks for a place for every tensor, and blocks move theirs
            adopt_groups(again, everything["param_groups"])
            set_optimizer_state_dict(together, again, everything, options=full)
        assert_same(alone, opt, together, again)


def part_of_loss(model: nn.Module, step: int, ranks: int = 1, rank: int = 0) -> Tensor:
    tokens = torch.randint(0, 11, (12, 9), generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), (tokens[:, :-1] * 3 + 1).flatten() % 11)


def same_losses(folder: Path, *, name: str, parallel: str) -> None:
    """Each rank has its part of the batch: what one process computes, but for the order of sums.

    In float64, where that order is too small to turn a sign or a leading vector into another.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    options = short_options(ALL[name]) | {"lr": 1e-3}
    if name == "cosmos":
        options["rank"] = 4  # at full rank it divides by directions that hold rounding only, in one process as in two
    if name == "sft":
        options["regrow"] = "sm3"  # candidates come from the first rank's part of the batch, as SFT's text says
    alone, together = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    if parallel == "sampled":
        for model in (alone, together):
            optimzoo.convert(model, optimzoo.SampledLinear, exclude="head", ratio=1.0)
    opt = build(ALL[name], alone, **options)
    if parallel == "ddp":
        twin = build(ALL[name], together, **options)
        module = nn.parallel.DistributedDataParallel(together)
    else:
        module = sharded(together)
        twin = ALL[name](module, **options)
    for step in range(6):
        losses = []
        for model, optimizer, part in ((alone, opt, (1, 0)), (module, twin, (ranks, rank))):
            optimizer.zero_grad()
            loss = part_of_loss(model, step, *part)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        dist.all_reduce(losses[1])
        assert abs(losses[0] - losses[1] / ranks) < 1e-6, step


def replicated_and_sharded(folder: Path, *, name: str) -> None:
    """HSDP: rows over two ranks, and two of each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    alone, together = odd(), fully_shard(odd(), mesh=mesh)
    options = short_options(PLAIN[name]) | {"lr": 1e-2}
    opt, twin = PLAIN[name](alone, **options), PLAIN[name](together, **options)
    for step in range(4):
        give_gradients(alone.parameters(), step)
        for p, q in zip(alone.parameters(), together.parameters(), strict=True):
            q.grad = distribute_tensor(p.grad, mesh, q.placements)
        opt.step()
        twin.step()
    assert_same(alone, opt, together, twin)


def accelerated(folder: Path, *, name: str, before: int) -> None:
    """Accelerate shards the model after the optimizer was made, and puts other parameters into its groups."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1"}
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP  # which it does by itself on accelerators only
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    options = short_options(PLAIN[name]) | {"lr": 1e-2}
    alone, together = odd(), odd()
    opt, twin = PLAIN[name](alone, **options), PLAIN[name](together, **options)
    for step in range(before):
        hand_over(alone, together, step)
        opt.step()
        twin.step()
    together, prepared = accelerator.prepare(together, twin)
    assert all(isinstance(p, DTensor) for p in together.parameters())
    for step in range(before, before + 4):
        hand_over(alone, together, step)
        opt.step()
        prepared.step()
    assert_same(alone, opt, together, twin)
    assert twin.memory().total == sum(reachable(twin).values())


CORE = {f"{name}-core": partial(same_as_one_process, name=name, options={}) for name in PLAIN}
CASES = {
    f"{name}-{'-'.join(f'{v}' for v in options.values())}": partial(same_as_one_process, name=name, options=options)
    for name in PLAIN
    for options in OPTIONS.get(name, [])
}
CASES |= {
    f"{name}-narrow-{'-'.join(f'{v}' for v in options.values())}": partial(
        same_as_one_process, name=name, options=options, dtype=torch.bfloat16
    )
    for name in PLAIN
    for options in NARROW
}
CASES |= {f"{name}-bad": partial(bad_gradients, name=name) for name in PLAIN}
CASES |= {f"{name}-ddp": partial(same_under_ddp, name=name) for name in ALL}
CASES |= {"zero": zero_is_no_step, "refusals": refusals, "beside": beside_whole_ones}
CASES |= {f"{label}-state": partial(states_in_and_out, label=label) for label in MOVING}
CASES |= {f"{name}-losses-ddp": partial(same_losses, name=name, parallel="ddp") for name in ALL}
CASES |= {f"{name}-losses-fsdp2": partial(same_losses, name=name, parallel="fsdp2") for name in PLAIN}
CASES |= {"sampled-losses-fsdp2": partial(same_losses, name="adamw", parallel="sampled")}
CASES |= {"recipe-ddp": partial(recipe_runs, strategy="ddp", optimizer="adamw")}
CASES |= {"recipe-fsdp2": partial(recipe_runs, strategy="fsdp2", optimizer="frugal")}
CASES |= {f"evaluation-{how}": partial(evaluation, strategy=how) for how in ("ddp", "fsdp2")}
CASES |= {"cosmos-accelerate": partial(accelerated, name="cosmos", before=0)}
CASES |= {"adamw-accelerate-late": partial(accelerated, name="adamw", before=2)}
SAVED = {f"{label}-saved": partial(saved, label=label) for label in MOVING}
# Of the two forms each label has one on four ranks and the other on one, blocks have both; `long` has all of all.
FLAT = {label: number % 2 == 1 for number, label in enumerate(MOVING)}
MOVED, MOVED_TO_ONE, MOVED_TO_NONE = (
    {
        f"{label}-{word}-{flat}": partial(moved, label=label, flat=flat, whole=word == "none")
        for label in MOVING
        for flat in ((False, True) if label == "block" else (FLAT[label] != (word == "one"),))
    }
    for word in ("moved", "one", "none")
)
EVERY_FORM = {
    f"{label}-moved-{flat}": partial(moved, label=label, flat=flat) for label in MOVING for flat in (False, True)
}
HSDP = {f"{name}-hsdp": partial(replicated_and_sharded, name=name) for name in PLAIN}


def assert_all(world: int, cases: dict, folder: Path) -> None:
    wrong = {case: text for case, text in run_together(world, cases, folder).items() if text}
    assert not wrong, "\n".join(f"{case} on {world} ranks: {text}" for case, text in wrong.items())


def test_two_ranks(tmp_path):
    assert_all(2, CORE | CASES, tmp_path)


def test_four_ranks_and_the_state_of_two_on_four_and_on_one(tmp_path):
    assert_all(2, SAVED, tmp_path)
    assert_all(4, CORE | MOVED | HSDP, tmp_path)
    assert_all(1, MOVED_TO_ONE | MOVED_TO_NONE, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 3, 4])
def test_every_form_of_the_state_of_two_on_others(world, tmp_path):
    assert_all(2, SAVED, tmp_path)
    none = {f"{case}-none": partial(found, whole=True) for case, found in EVERY_FORM.items()} if world == 1 else {}
    assert_all(world, EVERY_FORM | none, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 3, 4])
def test_every_case_on_other_numbers_of_ranks(world, tmp_path):
    assert_all(world, CORE | CASES, tmp_path)
