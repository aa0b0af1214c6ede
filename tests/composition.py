"""What works with what: every cell of the README's table is a check that runs. `python -m tests.composition` writes it.

A cell says "yes" where a check passed, and refers to our own words where they refused. Anything else is an error.
"""

import json
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import optimzoo
from optimzoo.core import AdamW, ZooOptimizer, storage
from optimzoo.core.member import specs
from optimzoo.core.slots import COARSE_KINDS
from optimzoo.modules import Replacement
from tests.cases import ALL, build, loss_of, same, tiny, weights
from tests.ranks import every_rank
from tests.test_contract import reload

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- composition -->\n", "<!-- end of composition -->\n"
HOME = str(Path(optimzoo.__file__).parent)
YES = "yes"


@dataclass(frozen=True)
class Row:
    """One line of the table. `draws`: what is kept depends on single backward passes, not on their sum alone."""

    name: str
    make: Callable[..., ZooOptimizer]
    draws: bool = False
    releases: bool = False

    def start(self, model: nn.Module, loop: dict[str, Any] | None = None, **options: Any) -> ZooOptimizer:
        """The optimizer; `loop` is what a released backward has to be told about the loop around it."""
        opt = self.make(model, **{"lr": 1e-2} | options)
        if self.releases:
            optimzoo.release_gradients(model, opt, **loop or {})
        return opt


def _built(cls: type[ZooOptimizer], model: nn.Module, **options: Any) -> ZooOptimizer:
    few = {"rank": 4} if "rank" in cls.options else {}
    return build(cls, model, **few, **options)


def _sampled(model: nn.Module, **options: Any) -> ZooOptimizer:
    optimzoo.convert(model, optimzoo.SampledLinear, exclude=("head", "wide"), ratio=0.6)
    return AdamW(model, **options)


def rows() -> list[Row]:
    """Every class of the registry, and what is no class of its own."""
    found = [Row(cls.__name__, partial(_built, cls), cls is ALL["sft"]) for cls in ALL.values()]
    block = Row("FRUGAL, blocks", partial(_built, ALL["frugal"], projection="block"))
    found.insert([row.name for row in found].index("FRUGAL") + 1, block)
    found.append(Row("`SampledLinear`, AdamW", _sampled, draws=True))
    return [*found, Row("`release_gradients`, AdamW", AdamW, releases=True)]


def half(model: nn.Module, step: int, part: slice) -> Tensor:
    """The loss of `loss_of` on some of its four sequences."""
    tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(step % 4))[part]
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), (tokens[:, :-1] * 3 + 1).flatten() % 11)


def go(model: nn.Module, opt: ZooOptimizer, steps: range, loss: Callable[[int], Tensor]) -> None:
    for step in steps:
        opt.zero_grad()
        loss(step).backward()
        opt.step()


def near(one: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    for p, q in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def learns(model: nn.Module, start: float) -> None:
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert loss_of(model).item() < 0.8 * start


# One check for each column: returns nothing where it works, or the words that qualify it.


def accumulation(row: Row) -> None:
    """Two halves, one step: the step of the whole, or of the two gradients' sum."""
    one, two = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    opt, other = row.start(one, loop={"accumulate": 2}), row.start(two)
    for step in range(4):
        opt.zero_grad()
        other.zero_grad()
        sums: list[Tensor] = []
        for part in (slice(0, 2), slice(2, 4)):
            (half(one, step, part) / 2).backward()
            if row.draws:
                (half(two, step, part) / 2).backward()
                grads = [p.grad.clone() for p in two.parameters() if p.grad is not None]
                sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else grads
                two.zero_grad(set_to_none=False)  # None would throw away what SFT's layers gather beside gradients
        if not row.draws:
            half(two, step, slice(0, 4)).backward()
        for p, total in zip([p for p in two.parameters() if p.requires_grad], sums, strict=False):
            p.grad = total
        opt.step()
        other.step()
    near(one, two)


def clipping(row: Row) -> None:
    """The step of clipped gradients is that of a loss which is smaller by the same factor."""
    one, two = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    opt, other = row.start(one, loop={"max_norm": 0.1}), row.start(two)
    for step in range(4):
        opt.zero_grad()
        half(one, step, slice(0, 4)).backward()
        norm = nn.utils.clip_grad_norm_(one.parameters(), 0.1)
        opt.step()
        factor = min(1.0, 0.1 / (norm.item() + 1e-6))
        go(two, other, range(step, step + 1), lambda s, factor=factor: factor * half(two, s, slice(0, 4)))
    near(one, two)


def grad_scaler(row: Row) -> None:
    """A scale changes nothing, and a step with an infinity in it does nothing."""
    one, two = tiny(), tiny()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    opt, other = row.start(one, loop={"scaler": scaler}), row.start(two)
    for step in range(5):
        opt.zero_grad()
        scaler.scale(loss_of(one, step)).backward()
        if step == 2:
            next(p for p in one.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
            before = weights(one)
        scaler.step(opt)
        scaler.update()
        if step == 2:
            assert same(weights(one), before)
            scaler.update(2.0**12)
            half(two, step, slice(0, 4))  # the same number of forward passes
        else:
            go(two, other, range(step, step + 1), lambda s: loss_of(two, s))
    near(one, two, 1e-5)


def autocast(row: Row) -> None:
    model = tiny()
    opt, start = row.start(model), loss_of(model).item()

    def loss(step: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, step)

    go(model, opt, range(40), loss)
    learns(model, start)


def release(row: Row) -> None:
    one, two = tiny(), tiny()
    opt, other = row.start(one), row.start(two)
    optimzoo.release_gradients(one, opt)
    for model, optimizer in ((one, opt), (two, other)):
        go(model, optimizer, range(6), lambda s, model=model: loss_of(model, s))
    assert same(weights(one), weights(two))


def compile_(row: Row) -> None:
    one, two = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    opt, other = row.start(one), row.start(two)
    torch._dynamo.reset()
    # Where neither layers nor hooks are ours, what torch makes of the graph is no optimizer's business.
    ours = row.releases or any(isinstance(layer, Replacement) for layer in one.modules())
    compiled = torch.compile(one, backend="aot_eager" if ours else "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo looks at `.grad` of everything it meets
        go(one, opt, range(3), lambda s: half(compiled, s, slice(0, 4)))
    go(two, other, range(3), lambda s: half(two, s, slice(0, 4)))
    near(one, two)


def scheduler(row: Row) -> None:
    one, two = tiny(), tiny()
    opt, other = row.start(one), row.start(two)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    for step in range(5):
        for group in other.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        go(one, opt, range(step, step + 1), lambda s: loss_of(one, s))
        go(two, other, range(step, step + 1), lambda s: loss_of(two, s))
        schedule.step()
    assert same(weights(one), weights(two))


def resume(row: Row) -> None:
    one, two = tiny(), tiny(seed=1)
    opt = row.start(one)
    go(one, opt, range(4), lambda s: loss_of(one, s))
    other = row.start(two)
    two.load_state_dict(reload(one.state_dict()))
    other.load_state_dict(reload(opt.state_dict()))
    for model, optimizer in ((one, opt), (two, other)):
        go(model, optimizer, range(4, 9), lambda s, model=model: loss_of(model, s))
    assert same(weights(one), weights(two))


def int8(row: Row) -> str | None:
    with mock.patch.object(storage, "SMALL", 32):
        model = tiny()
        opt, start = row.start(model, state_dtype="int8"), loss_of(model).item()
        averages = [s for _, m in opt.begin().values() for s in specs(m).values() if s.kind in COARSE_KINDS]
        go(model, opt, range(30), lambda s: loss_of(model, s))
        learns(model, start)
    if not averages:
        return "no effect: it keeps no averages, and accumulators stay float32"
    if any(slot.moves for slot in averages):
        return "in part: averages that change places stay float32, those of AdamW beside them take a byte"
    return None


CHECKS: dict[str, Callable[[Row], str | None]] = {
    **{"accumulation": accumulation, "clipping": clipping, "GradScaler": grad_scaler, "autocast": autocast},
    **{"release": release, "compile": compile_, "scheduler": scheduler, "resume": resume, "int8 state": int8},
}
RANKS = ("DDP", "FSDP2")
COLUMNS = ("accumulation", "clipping", "GradScaler", "autocast", "release", "compile", "scheduler", *RANKS, "resume")
COLUMNS = (*COLUMNS, "int8 state")


def cell(check: Callable[[Row], str | None], row: Row) -> str:
    """Yes, or our own words."""
    try:
        return check(row) or YES
    except (TypeError, ValueError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not frames[-1].filename.startswith(HOME):
            raise
        return " ".join(str(error).split())


# Two ranks, all rows in one pair of processes.


def _train_on_rank(rank: int, meeting: str, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    found: dict[str, dict[str, str]] = {}
    for row in rows():
        found[row.name] = {}
        for column, wrap in (("DDP", _ddp), ("FSDP2", _fsdp2)):
            try:
                found[row.name][column] = cell(lambda row, wrap=wrap, column=column: wrap(row, out, column), row)
            except Exception:
                found[row.name][column] = "error: " + traceback.format_exc()
    if rank == 0:
        (Path(out) / "cells.json").write_text(json.dumps(found))
    torch.distributed.barrier()


def _ddp(row: Row, out: str, column: str) -> None:
    model = tiny(dtype=torch.float64)
    opt = row.start(model)
    _on_rank(row, model, nn.parallel.DistributedDataParallel(model), opt, out, column)


def _fsdp2(row: Row, out: str, column: str) -> None:
    from torch.distributed.fsdp import fully_shard

    model = tiny(dtype=torch.float64)
    row.make(model)  # converts the layers, where there are any to convert
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)
    opt = _anew(row, model)
    _on_rank(row, model, model, opt, out, column)


def _anew(row: Row, model: nn.Module) -> ZooOptimizer:
    """The row's optimizer on a model that is converted already."""
    with mock.patch("tests.cases.convert"), mock.patch("optimzoo.convert"):
        return row.start(model)


def _on_rank(row: Row, model: nn.Module, wrapped: nn.Module, opt: ZooOptimizer, out: str, column: str) -> None:
    rank = torch.distributed.get_rank()
    go(model, opt, range(4), lambda s: half(wrapped, s, slice(2 * rank, 2 * rank + 2)))
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    torch.save([p.detach().clone() for p in found], Path(out) / f"{row.name} {column} {rank}.pt")


def on_ranks() -> dict[str, dict[str, str]]:
    """Row -> {DDP, FSDP2}: two gloo ranks with half of a batch each, against one process with all of it."""
    with tempfile.TemporaryDirectory() as folder:
        every_rank(2, _train_on_rank, f"{folder}/meet", folder)
        found = json.loads((Path(folder) / "cells.json").read_text())
        for row in rows():
            for column in RANKS:
                assert not found[row.name][column].startswith("error: "), found[row.name][column]
                if found[row.name][column] != YES:
                    continue
                here, there = (torch.load(f"{folder}/{row.name} {column} {rank}.pt") for rank in range(2))
                assert same(here, there), f"{row.name} {column}: the ranks differ"
                model = tiny(dtype=torch.float64)
                opt = row.start(model)
                go(model, opt, range(4), lambda s, model=model: half(model, s, slice(0, 4)))
                if not row.draws:
                    for p, q in zip(weights(model), here, strict=True):
                        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    return found


# The table.


def found() -> dict[str, dict[str, str]]:
    """Row -> column -> what its check found."""
    ranks = on_ranks()
    return {
        row.name: {name: ranks[row.name][name] if name in RANKS else cell(CHECKS[name], row) for name in COLUMNS}
        for row in rows()
    }


def table(cells: dict[str, dict[str, str]]) -> str:
    """The cells as Markdown, reasons as numbered notes below."""
    notes: list[str] = []
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, row in cells.items():
        shown = []
        for words in row.values():
            words = re.sub(r"^\w+: parameter '[^']+'", "a parameter", words)
            if words != YES:
                notes += [words] if words not in notes else []
                kind = "in part" if words.startswith("in part") else "no effect" if "no effect" in words else "refused"
                words = f"{kind} [{notes.index(words) + 1}]"
            shown.append(words)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{i}. {words}" for i, words in enumerate(notes, 1))]) + "\n"


def written() -> str:
    """The table in the README."""
    text = README.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def main() -> None:
    """Put the table that the checks make into the README."""
    README.write_text(README.read_text().replace(BEGIN + written(), BEGIN + table(found())))


if __name__ == "__main__":
    main()
