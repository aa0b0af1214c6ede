"""In other people's loops: Hugging Face Trainer, Accelerate and Lightning, and the examples that show them."""

import csv
import json
import os
import runpy
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimzoo
from optimzoo.memory.rehearsal import garbage_of_its_own
from tests.cases import ALL, converted, loss_of, same, short_options, tiny, weights
from tests.ranks import started

EXAMPLES = sorted((Path(__file__).parents[1] / "recipes" / "examples").glob("*.py"))
every = pytest.mark.parametrize("cls", ALL.values(), ids=ALL.keys())
MINE = {"learning_rate": 1e-2, "weight_decay": 0.07, "adam_beta1": 0.85, "adam_beta2": 0.97, "adam_epsilon": 1e-5}
NO_BETAS = "SM3 has no use for adam_beta"


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Trainers collect garbage, a third of a second each time in a process that has imported so much."""
    with garbage_of_its_own():
        yield


def llama(cls: type, seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return converted(cls, LlamaForCausalLM(config))


def hf_trainer(cls: type, folder: Path, seed: int = 0, callbacks: Any = (), **changed: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from optimzoo.integrations.transformers import optimizer_cls_and_kwargs

    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        lr_scheduler_type="cosine",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"max_steps": 40, "logging_steps": 20, "save_steps": 20} | MINE | changed,
    )
    tokens = torch.randint(0, 40, (24, 8), generator=torch.Generator().manual_seed(0))
    options = {name: value for name, value in short_options(cls).items() if name != "total_steps"}
    return Trainer(
        llama(cls, seed),
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],  # an epoch of 12 steps
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(cls, args, **options),
        callbacks=list(callbacks),
    )


def train_and_die(cls: type, folder: Path) -> None:
    """Killed by the system at step 20, as soon as the checkpoint is written."""
    from transformers import TrainerCallback

    warnings.filterwarnings("ignore", message=NO_BETAS)  # this process has filters of its own

    class Kill(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    hf_trainer(cls, folder, callbacks=[Kill()]).train()


def held(opt: Any) -> list[torch.Tensor]:
    """All state, in the order of the groups."""
    inner = getattr(opt, "optimizer", opt)
    return [t for group in inner.param_groups for p in group["params"] for t in inner.state[p].values()]


no_betas = pytest.mark.filterwarnings(f"ignore:{NO_BETAS}")


@every
@no_betas
def test_huggingface_trainer_killed_and_resumed_is_uninterrupted(cls: type, tmp_path: Path) -> None:
    whole = hf_trainer(cls, tmp_path / "whole")
    whole.train()
    killed = started(train_and_die, cls, tmp_path / "killed")
    killed.join(240)
    assert killed.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["checkpoint-20"]
    resumed = hf_trainer(cls, tmp_path / "killed", seed=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 40
    assert same(list(resumed.model.state_dict().values()), list(whole.model.state_dict().values()))
    assert same(held(resumed.optimizer), held(whole.optimizer))
    assert not same(weights(whole.model), weights(llama(cls))), "nothing was trained"


@every
@no_betas
def test_huggingface_arguments_reach_every_group(cls: type, tmp_path: Path) -> None:
    from transformers import Trainer

    trainer = hf_trainer(cls, tmp_path)
    opt = trainer.create_optimizer()
    assert type(opt) is cls
    decayed = set(Trainer.get_decay_parameter_names(trainer, trainer.model))
    betas = (MINE["adam_beta1"], MINE["adam_beta2"])
    for group in opt.param_groups:
        assert group["lr"] == MINE["learning_rate"]
        assert group.get("betas", betas) == group.get("fallback_betas", betas) == betas
        assert group.get("fallback_eps", MINE["adam_epsilon"]) == MINE["adam_epsilon"]
        if "eps" in cls.options:  # Adam's is Adam's; SM3's and SFT's stand for something else
            own = cls.options["eps"].default
            assert group["eps"] == (MINE["adam_epsilon"] if own == 1e-8 else own)
        for name in group["param_names"]:
            drivens = (
                cls.needs_model and group["weight_decay"] == 0
            )  # decay is not for singular vectors, nor SFT's rest
            assert drivens or group["weight_decay"] == (MINE["weight_decay"] if name in decayed else 0.0), name
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0, MINE["weight_decay"]}
    if "total_steps" in cls.options:
        assert opt.param_groups[0]["total_steps"] == 40
    assert sum(len(g["params"]) for g in opt.param_groups) == len(
        [p for p in trainer.model.parameters() if p.requires_grad]
    )


def test_huggingface_decay_is_trainers_own_where_the_zoo_would_choose_otherwise(tmp_path: Path) -> None:
    """A vector that is neither norm nor bias is decayed there, a matrix under a norm is not."""
    from transformers import TrainingArguments

    from optimzoo.integrations.transformers import optimizer

    model = tiny()
    model.sinks = nn.Parameter(torch.zeros(4))
    model.norm.norm = nn.Linear(8, 8, bias=False)
    args = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.5)
    opt = optimizer(model, args, "cosmos")
    decay = {n: g["weight_decay"] for g in opt.param_groups for n in g["param_names"]}
    assert decay["sinks"] == decay["square.weight"] == decay["embed.weight"] == 0.5
    assert decay["norm.norm.weight"] == decay["norm.weight"] == decay["square.bias"] == 0.0
    assert opt.param_groups[0]["betas"] == (0.95, 0.95), "untouched arguments leave a method its own betas"
    assert opt.param_groups[0]["name"] == "matrices"
    assert [g["name"] for g in opt.param_groups if "undecayed" in g["name"]] == [
        "matrices, undecayed",
        "vectors, undecayed",
    ]


def test_huggingface_errors_name_the_fix(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from optimzoo.integrations.transformers import optimizer_cls_and_kwargs

    args = TrainingArguments(output_dir=str(tmp_path), adam_beta2=0.9, adam_epsilon=1e-6)
    with pytest.raises(TypeError, match=r"COSMOS has no option 'rnak'; did you mean 'rank'\?"):
        optimizer_cls_and_kwargs("cosmos", args, rnak=8)
    factory, _ = optimizer_cls_and_kwargs("sm3", args)
    with pytest.warns(UserWarning, match=r"SM3 has no use for adam_beta\* and adam_epsilon of TrainingArguments"):
        factory()(tiny())
    with pytest.raises(TypeError, match=r"pass optimizers=\("):
        factory([{"params": []}], lr=0.1)


def test_huggingface_logs_hold_the_bytes(tmp_path: Path) -> None:
    from optimzoo.integrations.transformers import log_memory

    trainer = hf_trainer(optimzoo.COSMOS, tmp_path, max_steps=4, logging_steps=2, save_steps=100)
    log_memory(trainer)
    optimzoo.track(trainer.create_optimizer(), workspace=True)
    trainer.train()
    book = trainer.optimizer.optimizer.memory()
    for row in trainer.state.log_history:
        assert row["memory/state_bytes"] == book.total
        assert row["memory/first_moment_bytes"] == book.by("kind")["first moment"]
        assert row["memory/workspace_bytes"] > 0


def accelerated(cls: type, seed: int = 0, **how: Any) -> tuple[Any, nn.Module, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(**how)
    model = converted(cls, tiny(seed))
    return accelerator, *accelerator.prepare(model, cls(model, lr=1e-2, **short_options(cls)))


def accelerate_steps(accelerator: Any, model: nn.Module, opt: Any, first: int, last: int, offset: int = 0) -> None:
    for batch in range(2 * first, 2 * last):  # two micro-batches a step
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch + offset))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()


@every
def test_accelerate_prepares_and_resumes(cls: type, tmp_path: Path) -> None:
    accelerator, model, opt = accelerated(cls, gradient_accumulation_steps=2)
    accelerate_steps(accelerator, model, opt, 0, 4)
    accelerator.save_state(tmp_path)
    assert opt.optimizer.memory_history[-1].step == 4, "only every second batch is a step"
    accelerate_steps(accelerator, model, opt, 4, 8)
    again, other, resumed = accelerated(cls, seed=1, gradient_accumulation_steps=2)
    again.load_state(tmp_path)
    accelerate_steps(again, other, resumed, 4, 8)
    assert same(weights(other), weights(model))
    assert same(held(resumed), held(opt))


def on_rank(rank: int, file: Path, alone: dict[str, list[torch.Tensor]]) -> None:
    """Every class under DDP: first with the same batches on both ranks, which is one process; then with others."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # what the parent had
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"  # unset, Accelerate sets it and warns
    os.environ["MASTER_ADDR"] = "localhost"  # Accelerate wants one, although a file is where they meet
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for name, cls in ALL.items():
        accelerator, model, opt = accelerated(cls, gradient_accumulation_steps=2)
        assert accelerator.num_processes == 2
        assert type(model) is nn.parallel.DistributedDataParallel
        accelerate_steps(accelerator, model, opt, 0, 5)
        assert same(weights(model), alone[name]), name
        accelerate_steps(accelerator, model, opt, 5, 9, offset=rank)
        flat = torch.cat([t.double().flatten() for t in [*weights(model), *held(opt)]])
        both = [torch.empty_like(flat) for _ in range(2)]
        torch.distributed.all_gather(both, flat)
        assert torch.equal(*both), name


def test_accelerate_with_two_ranks_is_one_process_on_the_same_batches(tmp_path: Path) -> None:
    alone = {}
    for name, cls in ALL.items():
        accelerator, model, opt = accelerated(cls, gradient_accumulation_steps=2)
        accelerate_steps(accelerator, model, opt, 0, 5)
        alone[name] = weights(model)
    children = [started(on_rank, rank, tmp_path / "meet", alone) for rank in range(2)]
    for child in children:
        child.join(240)
    assert [child.exitcode for child in children] == [0, 0]


def lightning_module(cls: type, seed: int = 0) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = converted(cls, tiny(seed))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return loss_of(self.net, int(batch))

        def configure_optimizers(self) -> Any:
            opt = cls(self.net, lr=1e-2, **short_options(cls))
            return [opt], [{"scheduler": torch.optim.lr_scheduler.StepLR(opt, 4), "interval": "step"}]

    return Module()


def lightning_trainer(folder: Path, **how: Any) -> Any:
    import lightning.pytorch as pl

    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False} | how,
    )


lightning_warnings = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.. is deprecated",
    "ignore:.*does not have many workers",
    "ignore:.*number of training batches",
)


@every
@lightning_warnings
def test_lightning_trains_and_resumes(cls: type, tmp_path: Path) -> None:
    data = torch.utils.data.DataLoader(range(4), batch_size=1)
    whole = lightning_module(cls)
    trainer = lightning_trainer(tmp_path, max_epochs=2)
    trainer.fit(whole, data)
    first = lightning_trainer(tmp_path, max_epochs=1)
    first.fit(lightning_module(cls), data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    module, resumed = lightning_module(cls, seed=1), lightning_trainer(tmp_path, max_epochs=2)
    resumed.fit(module, data, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.global_step == 8
    assert same(weights(module), weights(whole))
    assert same(held(resumed.optimizers[0]), held(trainer.optimizers[0]))


@lightning_warnings
def test_lightning_logs_hold_the_bytes(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    from optimzoo.integrations.lightning import MemoryMonitor

    data = torch.utils.data.DataLoader(range(12), batch_size=1)
    how = {"callbacks": [MemoryMonitor()], "logger": CSVLogger(tmp_path), "log_every_n_steps": 2}
    trainer = lightning_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, **how)
    trainer.fit(lightning_module(optimzoo.COSMOS), data)
    book = trainer.optimizers[0].memory()
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    assert {row["memory/state_bytes"] for row in rows} == {str(book.total)}
    assert {row["memory/basis_bytes"] for row in rows} == {str(book.by("kind")["basis"])}


def test_metrics_are_for_any_optimizer() -> None:
    from optimzoo.integrations import memory_metrics

    model = tiny()
    opt = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    opt.step()
    count = sum(p.numel() for p in model.parameters())
    metrics = memory_metrics(opt)
    assert metrics["memory/first_moment_bytes"] == metrics["memory/second_moment_bytes"] == 4 * count
    assert metrics["memory/state_bytes"] == optimzoo.ledger(opt).total


@lightning_warnings
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_as_they_stand(path: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(path.read_text().splitlines()) <= 60
    runpy.run_path(str(path), run_name="__main__")
    first = capsys.readouterr().out
    assert "total" in first or "memory/state_bytes" in first
    if path.stem == "huggingface_trainer":
        trained = json.loads((tmp_path / "checkpoints/checkpoint-40/trainer_state.json").read_text())["log_history"]
        shutil.rmtree(tmp_path / "checkpoints/checkpoint-40")
        runpy.run_path(str(path), run_name="__main__")
        again = json.loads((tmp_path / "checkpoints/checkpoint-40/trainer_state.json").read_text())["log_history"]
        assert [row["loss"] for row in again] == [row["loss"] for row in trained]
