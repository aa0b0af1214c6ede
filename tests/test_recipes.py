"""Recipes: every one parses and runs, wrong ones are refused in a sentence, and a run does what it says."""

import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from optimzoo.memory import ledger
from optimzoo.training import UserError, compare, load, results, train
from optimzoo.training.baselines import BASELINES
from optimzoo.training.data import _excluded, build_corpus
from optimzoo.training.folder import Folder
from optimzoo.training.model import build_model, loss_of
from optimzoo.training.optimizers import build_optimizers, missing
from optimzoo.training.parsing import parse
from optimzoo.training.planning import check
from optimzoo.training.recipe import Recipe, validate
from optimzoo.training.schedule import factor
from optimzoo.training.sections import Schedule, Sweep
from optimzoo.training.sweep import beyond, protocol
from optimzoo.training.trainer import update
from tests.cases import labelled

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not labelled(path))
GENERAL = [path for path in RECIPES if not path.stem.startswith("finetune_")]  # those have models of their own
LLAMA = "model={name: llama, hidden_size: 16, intermediate_size: 24, layers: 1, heads: 2}"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text((ROOT / "setup.cfg").read_text() * 20)
    return path


def toy(text: Path, *changes: str, optimizer: str = "{name: adamw, lr: 1e-2}", steps: int = 3) -> Recipe:
    """A recipe of one tiny layer."""
    data = {"name": "text", "path": str(text), "sequence": 16, "batch": 2}
    values = {"model": parse(LLAMA.partition("=")[2], ""), "data": data, "optimizer": parse(optimizer, "")}
    values |= {"schedule": {"steps": steps}, "eval": {"batches": 2}}
    for change in changes:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        if name:
            values[section] = {**values.get(section, {}), name: parse(value, "")}
        else:
            values[section] = parse(value, "")
    return validate(values, "toy")


# Every recipe in the folder.


@pytest.mark.parametrize("path", GENERAL, ids=lambda path: path.stem)
def test_recipe_runs_three_steps(path: Path, text: Path, tmp_path: Path) -> None:
    data = f"data={{name: text, path: '{text}', sequence: 16, batch: 2}}"
    short = [LLAMA, data, "schedule.steps=3", "schedule.warmup=1", "eval.batches=2", "sweep=null"]
    if "pretrain" in parse(path.read_text(), ""):
        short += ["pretrain.data={}", "pretrain.schedule.steps=2", "pretrain.schedule.warmup=0"]
    recipe = load(path, short)
    for label, entry in recipe.entries().items():
        if missing(entry.optimizer.name):
            continue  # its package is in the extra `baselines`
        result = train(entry, tmp_path / label, quiet=True)
        assert result["steps"] == 3
        assert math.isfinite(result["validation_loss"])
        names = {file.name for file in (tmp_path / label).iterdir()}
        written = {"recipe.yaml", "versions.json", "metrics.jsonl", "result.json", "loss.png", "memory.png"}
        written |= {"checkpoint.pt"} if entry.checkpoint.every else set()
        written |= {"delta.safetensors"} if any(part.kind == "sparse_delta" for part in entry.modules) else set()
        assert names == written


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_says_to_set_can_be_set(path: Path) -> None:
    """The comments of the large ones tell how they run at toy size, without a network."""
    comments = [line for line in path.read_text().splitlines() if line.startswith("#   --set")]
    for line in comments:
        words = shlex.split(line)[1:]
        assert load(path, [words[i + 1] for i, word in enumerate(words) if word == "--set"]).schedule.steps == 20


def test_the_saved_recipe_is_the_recipe(text: Path, tmp_path: Path) -> None:
    recipe = toy(text, "schedule.warmup=1", "clip=0.5")
    train(recipe, tmp_path / "run", quiet=True)
    assert load(tmp_path / "run" / "recipe.yaml") == recipe
    assert load(tmp_path / "run" / "recipe.yaml").key == recipe.key
    said = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "device: auto" in said  # defaults are written out, and what a recipe says is what it leaves to them
    other = load(tmp_path / "run" / "recipe.yaml", ["clip=0.25"])
    assert other.key != recipe.key == load(tmp_path / "run" / "recipe.yaml", ["wandb.mode=offline"]).key


# Parsing.


def test_numbers_and_words_are_what_they_look_like() -> None:
    found = parse("{a: 1e-3, b: 2.5E+4, c: off, d: no, e: true, f: 1_000, g: 1e3, h: .5, i: '1e-3', j: 2001-01-01}", "")
    assert found == {
        **{"a": 1e-3, "b": 2.5e4, "c": "off", "d": "no", "e": True, "f": 1000, "g": 1000.0, "h": 0.5},
        **{"i": "1e-3", "j": "2001-01-01"},
    }
    assert isinstance(found["g"], float)


def test_overrides_reach_nested_keys() -> None:
    recipe = load(RECIPES[0], ["optimizer.lr=1e-3", "optimizer.betas=[0.8, 0.9]", "schedule.steps=7", "seed=3"])
    assert (recipe.optimizer.lr, recipe.optimizer.options["betas"]) == (1e-3, [0.8, 0.9])
    assert (recipe.schedule.steps, recipe.seed) == (7, 3)


def test_sizes_fill_in_what_is_not_said(text: Path) -> None:
    spec = toy(text, "model={name: llama, size: 60m, layers: 2}").model
    assert (spec.hidden_size, spec.intermediate_size, spec.layers, spec.heads, spec.vocab) == (512, 1376, 2, 8, 32000)


WRONG = {
    "optimzer={name: adamw, lr: 1}": ("unknown key 'optimzer'", "did you mean 'optimizer'?"),
    "schedule.warmpu=3": ("unknown key 'schedule.warmpu'", "did you mean 'warmup'?"),
    "model.hiden_size=3": ("unknown key 'model.hiden_size'", "did you mean 'hidden_size'?"),
    "data.pth=x": ("unknown key 'data.pth'", "did you mean 'path'?"),
    "optimizer.name=cosmo": ("no optimizer is called 'cosmo'", "did you mean 'cosmos'?"),
    "optimizer={name: SWANN, lr: 1}": ("no optimizer is called 'SWANN'", "did you mean 'swan'?"),
    "optimizer={name: torch.adam, lr: 1}": ("'torch.adam'", "did you mean 'torch.adamw'?"),
    "optimizer={name: adamw}": ("optimizer.lr is missing",),
    "data={name: texts}": ("data.name='texts'", "did you mean 'text'?"),
    "data={path: x}": ("data must say its name",),
    "data.batch=0": ("data.batch=0", "greater than 0"),
    "schedule.steps=many": ("schedule.steps='many'", "integer"),
    "schedule.warmup=4": ("schedule: warmup=4 is longer than steps=3", "make it a part of them"),
    "schedule.name=cosin": ("schedule.name='cosin'", "'cosine'"),
    "model.heads=5": ("hidden_size=16 must be a multiple of 2 * heads=10",),
    "model.size=61m": ("model.size='61m'", "'60m'"),
    "modules=[{match: x}]": ("modules.0.kind is missing",),
    "seed=99999999999999999999999999": ("seed=9999", "must be less than 9223372036854775808"),
    "seeds=[0, -1]": ("seeds.1=-1", "greater than or equal to 0"),
    "seeds=[0, 1, 0]": ("seeds: [0, 1, 0] names a seed twice; name each once",),
    "threads=100000000": ("threads=100000000", "less than or equal to 1024"),
}


@pytest.mark.parametrize("name", ["SWAN", "Torch.AdamW"])
def test_names_of_optimizers_may_be_in_capitals(name: str, text: Path) -> None:
    recipe, plain = (toy(text, optimizer=f"{{name: {one}, lr: 1e-2}}") for one in (name, name.lower()))
    assert recipe == plain


@pytest.mark.parametrize("change", WRONG)
def test_wrong_recipes_are_refused_by_name(change: str, text: Path) -> None:
    with pytest.raises(UserError) as caught:
        toy(text, change)
    for part in WRONG[change]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG_RUNS = {
    "optimizer.rnk=3": ("no option 'rnk'",),
    "optimizer.weight_decay=-1": ("weight_decay=-1", ">= 0"),
    "optimizer={name: torch.adamw, lr: 1, beta: 1}": ("no option is called 'beta'", "did you mean 'betas'?"),
    "data.path=/nowhere/x.txt": ("cannot read /nowhere/x.txt", "No such file"),
    "data.sequence=100000": ("too few for data.sequence=100000",),
    "model.vocab=32": ("model.vocab=32 is too small", "256"),
    "model={name: transformers, config: /nowhere.json}": ("model.config: /nowhere.json",),
    "modules=[{kind: spektral}]": ("modules: no layer is called 'spektral'",),
    "optimizer={name: torch.muon, lr: 1e-3, ns_steps: 500}": ("optimizer torch.muon: ", "steps", "less than 100"),
    "optimizer={name: torch.muon, lr: 1e-3, nesterov: off}": ("nesterov='off' must be like its default True",),
    "optimizer={name: torch.adamw, lr: 1e-3, betas: 3}": (
        "torch.adamw: betas=3 must be like its default [0.9, 0.999]",
    ),
    "optimizer={name: torch.adamw, lr: 1e-3, eps: x}": ("torch.adamw: eps='x' must be like its default 1e-08",),
}


@pytest.mark.parametrize("change", WRONG_RUNS)
def test_what_only_a_run_can_find_is_refused_too(change: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(toy(text, change), tmp_path / "run", quiet=True)
    for part in WRONG_RUNS[change]:
        assert part in str(caught.value)


WRONG_CONFIGS = {
    '{"n_embd": "x"}': ("config.json is no causal language model's configuration", "'n_embd'"),
    '{"n_head": 0}': ("config.json is no causal language model's configuration", "zero"),
    '{"n_positions": 15}': ("the model has 15 positions", "data.sequence=16"),
    '{"vocab_size": 255}': ("vocab_size=255 is too small: the data has 256 different tokens",),
}


@pytest.mark.parametrize("wrong", WRONG_CONFIGS)
def test_wrong_transformers_configs_are_refused(wrong: str, text: Path, tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 256, "n_positions": 16}
    (tmp_path / "config.json").write_text(json.dumps(config | json.loads(wrong)))
    with pytest.raises(UserError, match=r"^model\.config: ") as caught:
        train(
            toy(text, f"model={{name: transformers, config: '{tmp_path}/config.json'}}"), tmp_path / "run", quiet=True
        )
    for part in WRONG_CONFIGS[wrong]:
        assert part in str(caught.value)


def test_a_recipe_that_is_none(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=r"x.yaml: No such file or directory$"):  # there are no others to name
            load(place / "x.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [\n")
    with pytest.raises(UserError, match=r"bad\.yaml, line 2: not valid YAML"):
        load(bad)
    bad.write_text("- 1\n")
    with pytest.raises(UserError, match="a recipe is a mapping of sections"):
        load(bad)
    bad.write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load(bad)
    with pytest.raises(UserError, match=r"quickstrt.yaml.*did you mean 'quickstart.yaml'"):
        load(ROOT / "recipes" / "quickstrt.yaml")
    with pytest.raises(UserError, match=r"key\.sub=value"):
        load(RECIPES[0], ["optimizer.lr"])


# Data.


def test_python_source_is_split_by_path() -> None:
    values = {"data": {"name": "python-source"}, "optimizer": {"name": "adamw", "lr": 1}, "schedule": {"steps": 1}}
    recipe = validate(values | {"model": parse(LLAMA.partition("=")[2], "")}, "")
    one, two = build_corpus(recipe), build_corpus(recipe)
    assert one.facts == two.facts
    assert len(one.facts["sha256"]) == 64
    share = len(one.validation) / (len(one.train) + len(one.validation))
    assert 0.02 < share < 0.1
    assert 5e6 < len(one.train) < 20e6
    assert b"import asyncio" in one.train.tobytes()
    for name in (
        "test/test_x.py",
        "idlelib/x.py",
        "site-packages/y/z.py",
        "_sysconfigdata__linux.py",
        "a/__pycache__/b.py",
    ):
        assert _excluded(name)
    assert not _excluded("unittest/case.py")


def test_batches_are_a_function_of_seed_step_and_micro_batch(text: Path) -> None:
    corpus = build_corpus(toy(text))
    first = corpus.batch(0, 5, 1, 4, 16)
    assert first.shape == (4, 17)
    assert first.dtype == torch.int64
    assert torch.equal(first, corpus.batch(0, 5, 1, 4, 16))
    others = [corpus.batch(*place, 4, 16) for place in ((1, 5, 1), (0, 6, 1), (0, 5, 2), (5, 0, 1))]
    assert not any(torch.equal(first, other) for other in others)
    held_out = list(corpus.held_out(2, 16, 3))
    assert [batch.shape for batch in held_out] == [(2, 17)] * 3
    whole = corpus.validation.tobytes()
    assert all(bytes(row.to(torch.uint8).tolist()) in whole for batch in held_out for row in batch)
    starts = np.concatenate([corpus.batch(0, step, 0, 64, 16)[:, 0].numpy() for step in range(50)])
    assert len(set(starts)) > 20  # not always from the same place


def test_a_folder_of_texts(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for index in range(60):
        (folder / "deep" / f"{index}.txt").write_text(f"document {index} " * 20)
    corpus = build_corpus(toy(text, f"data.path={folder}"))
    assert 0 < len(corpus.validation) < len(corpus.train) / 4
    assert not any(part in corpus.train.tobytes() for part in set(corpus.validation.tobytes().split(b"\n")))


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_data_and_tokenizer(
    tmp_path: Path, text: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"story": f"once upon a time there were {index} bears and a house"} for index in range(200)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    words = sorted({word for row in rows for word in row["story"].split()} | {"<end>", "<unk>"})
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    data = (
        f"data={{name: huggingface, dataset: json, data_files: '{tmp_path / 'rows.json'}', text_column: story, "
        f"tokenizer: '{tmp_path / 'tokenizer'}', tokens: 1200, sequence: 8, batch: 2, "
        f"streaming: {json.dumps(streaming)}}}"
    )
    recipe = toy(text, data, f"model.vocab={len(words)}")
    corpus = build_corpus(recipe)
    per_row = len(rows[0]["story"].split()) + 1
    assert len(corpus.train) + len(corpus.validation) == -(-1200 // per_row) * per_row
    assert corpus.train[per_row - 1] == words.index("<end>")
    assert [words[index] for index in corpus.train[:3]] == ["once", "upon", "a"]
    assert math.isfinite(train(recipe, tmp_path / "run", quiet=True)["validation_loss"])
    with pytest.raises(UserError, match=r"'text' is not a column; there are story"):
        build_corpus(toy(text, data.replace("text_column: story, ", ""), f"model.vocab={len(words)}"))


# The loop.


@pytest.mark.parametrize("name", ["adamw", "cosmos", "torch.adamw"])
def test_bytes_of_a_step_are_those_of_a_walk(name: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(toy(text), torch.device("cpu"))
    optimizers = build_optimizers(model, name, 1e-2, None, {"rank": 4} if name == "cosmos" else {})
    loss_of(model, build_corpus(toy(text)).batch(0, 0, 0, 2, 16)).backward()
    update(optimizers)
    walked = sum(ledger(optimizer).total for optimizer in optimizers)
    calls: list[object] = []
    monkeypatch.setattr(results, "ledger", lambda optimizer: calls.append(optimizer) or ledger(optimizer))
    assert results.state_bytes(optimizers) == walked > 0
    assert len(calls) == name.startswith("torch.")


def test_other_code_is_known_by_all_that_decides_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel in C too."""
    shutil.copytree(ROOT / "optimzoo", tmp_path / "optimzoo", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(results, "__file__", str(tmp_path / "optimzoo" / "training" / "results.py"))
    code = results.code.__wrapped__
    for name, decides in {"functional/host_kernel.c": True, "core/adamw.py": True, "training/page.py": False}.items():
        before = code()
        with (tmp_path / "optimzoo" / name).open("a") as file:
            file.write("\n")
        assert (code() != before) == decides, name


def test_schedule_is_its_formula() -> None:
    cosine = Schedule(name="cosine", warmup=3, steps=13, min_ratio=0.2)
    assert [factor(cosine, step) for step in range(3)] == [0.25, 0.5, 0.75]
    assert factor(cosine, 3) == 1.0
    assert factor(cosine, 8) == pytest.approx(0.6)
    assert factor(cosine, 13) == factor(cosine, 99) == pytest.approx(0.2)
    linear = Schedule(name="linear", steps=10, min_ratio=0)
    assert [factor(linear, step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert factor(Schedule(name="constant", steps=10), 9) == 1.0


def test_the_trainer_is_the_plain_loop(text: Path, tmp_path: Path) -> None:
    """Accumulation, clipping, schedule and decay against a loop written out with torch's own parts, bit for bit."""
    recipe = toy(
        *(text, "data.accumulate=2", "clip=0.3", "schedule.warmup=2"),
        optimizer="{name: torch.adamw, lr: 1e-2, weight_decay: 0.1}",
        steps=5,
    )
    train(recipe, tmp_path / "run", quiet=True)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]

    corpus, model = build_corpus(recipe), build_model(recipe, torch.device("cpu"))
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor(recipe.schedule, step)
        for micro in range(2):
            (loss_of(model, corpus.batch(0, step, micro, 2, 16)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(saved[name], p) for name, p in model.state_dict().items())


def test_a_released_run_is_the_run(text: Path, tmp_path: Path) -> None:
    """Same weights and state to the bit, with one gradient at a time; what needs all of them is refused at load."""
    cosmos, found = "{name: cosmos, lr: 1e-2, rank: 4}", []
    for release in ("false", "true"):
        recipe = toy(text, "clip=0", f"release={release}", "schedule.warmup=2", optimizer=cosmos, steps=4)
        result = train(recipe, tmp_path / release, quiet=True)
        state = torch.load(tmp_path / release / "checkpoint.pt", weights_only=True)
        tensors = [t for t in tree_leaves((state["model"], state["optimizers"])) if isinstance(t, torch.Tensor)]
        found.append((result["validation_loss"], result["key"], recipe.key, tensors))
    assert found[0][:3] == found[1][:3]
    assert len(found[0][3]) > 12
    assert all(torch.equal(a, b) for a, b in zip(found[0][3], found[1][3], strict=True))
    row = Folder(tmp_path / "true").rows()[-1]
    assert (row["gradient_norm"], row["memory/workspace_bytes"], row["optimizer_s"]) == (None, None, None)
    assert row["step_s"] > 0

    for changes, words in (
        ((), r"nothing can be clipped to a total norm \(clip=1\); add clip: 0"),
        (("clip=0", "data.accumulate=2"), "none adds up over data.accumulate=2 batches"),
        (
            ("clip=0", "optimizer={name: torch.adamw, lr: 1}"),
            "needs an optimizer of optimzoo, and optimizer.name='torch",
        ),
    ):
        with pytest.raises(UserError, match=f"toy: release: true uses each gradient.*{words}"):
            toy(text, "release=true", *changes)


def test_the_metrics_say_what_was_promised(text: Path, tmp_path: Path) -> None:
    recipe = toy(text, "memory.every=5", "eval.every=4", optimizer="{name: cosmos, lr: 1e-2, rank: 4}", steps=11)
    result = train(recipe, tmp_path / "run", quiet=True)
    rows = Folder(tmp_path / "run").rows()
    assert [row["step"] for row in rows] == list(range(1, 12))
    measured = [row["step"] for row in rows if row["memory/workspace_bytes"] is not None]
    assert measured == [1, 2, 3, 5, 10]
    assert [row["step"] for row in rows if row["step_s"] is None] == measured
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 8, 11]
    assert {row["memory/state_bytes"] for row in rows} == {result["bytes"]["state"]}
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 * factor(recipe.schedule, step) for step in range(11)])
    assert result["versions"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["python"] == result["corpus"]["python"]


@pytest.mark.parametrize("name", ["adamw", "torch.adamw"])
def test_bytes_of_adamw_are_eight_a_weight(name: str, text: Path, tmp_path: Path) -> None:
    result = train(toy(text, optimizer=f"{{name: {name}, lr: 1e-2}}"), tmp_path / "run", quiet=True)
    tensors = sum(1 for _ in build_model(toy(text), torch.device("cpu")).parameters())
    held = result["bytes"]
    assert held["weights"] == 4 * result["parameters"]
    assert held["state_by_kind"]["first moment"] == held["state_by_kind"]["second moment"] == held["weights"]
    assert held["state"] == 2 * held["weights"] + 4 * tensors


def test_the_callers_things_stay_the_callers(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(toy(text, "threads=2"), tmp_path / "run", quiet=True)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_a_run_that_diverges_ends_with_a_result(text: Path, tmp_path: Path) -> None:
    recipe = toy(text, "clip=0", optimizer="{name: torch.sgd, lr: 1e30}", steps=20)
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result["diverged"]
    assert result["validation_loss"] is None
    assert result["steps"] < 20
    assert train(recipe, tmp_path / "run", resume=True, quiet=True) == result


def test_bf16_autocast_and_weights(text: Path, tmp_path: Path) -> None:
    recipe = toy(text, "autocast=bf16", "model.dtype=bfloat16", optimizer="{name: cosmos, lr: 1e-2, rank: 4}")
    result = train(recipe, tmp_path / "run", quiet=True)
    assert math.isfinite(result["validation_loss"])
    assert result["bytes"]["weights"] == 2 * result["parameters"]


def test_transformers_config(text: Path, tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 256, "n_positions": 32}))
    recipe = toy(text, f"model={{name: transformers, config: '{tmp_path / 'config.json'}'}}")
    assert math.isfinite(train(recipe, tmp_path / "run", quiet=True)["validation_loss"])


@pytest.mark.parametrize("name", ["adamw", "cosmos", *BASELINES])
def test_fallback_lr_is_absolute_for_every_optimizer(name: str, text: Path) -> None:
    installed(name)
    recipe = toy(text)
    model = build_model(recipe, torch.device("cpu"))
    options = {"rank": 4} if name == "cosmos" else {}
    optimizers = build_optimizers(model, name, 8e-3, 3e-3, options)
    found: dict[int, float] = {}
    for optimizer in optimizers:
        scale = {"matrix": 1.0, "rest": 1.0}
        if name == "cosmos":
            scale["rest"] = optimizer.param_groups[0]["fallback_lr_scale"]
        for group in optimizer.param_groups:
            for p in group["params"]:
                kind = "rest" if name == "cosmos" and group.get("fallback") else "matrix"
                assert id(p) not in found
                found[id(p)] = float(group["lr"]) * scale[kind]
    assert len(found) == sum(1 for _ in model.parameters())
    for key, p in model.named_parameters():
        rest = p.ndim < 2 or "embed" in key or "lm_head" in key
        assert found[id(p)] == pytest.approx(3e-3 if rest else 8e-3), key


def installed(name: str) -> None:
    """Skip where a baseline's package is missing."""
    if why := missing(name):
        pytest.skip(why)


OTHERS = [name for name, baseline in BASELINES.items() if baseline.package]


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_with_another_packages_optimizer_resumes_bit_for_bit(name: str, text: Path, tmp_path: Path) -> None:
    """Through a checkpoint that `weights_only` loads, past a change of projection; their bytes are counted."""
    installed(name)
    options = {"galore": ", rank: 4, update_proj_gap: 2", "apollo": ", rank: 4, update_proj_gap: 2"}.get(name, "")
    recipe = toy(text, "checkpoint.every=3", optimizer=f"{{name: {name}, lr: 1e-2{options}}}", steps=6)
    whole = train(recipe, tmp_path / "whole", quiet=True)
    half = tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "save", stops_after(3, Folder.save))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, half, quiet=True)
    result = train(recipe, half, resume=True, quiet=True)
    assert [row["loss"] for row in Folder(half).rows()] == [row["loss"] for row in Folder(tmp_path / "whole").rows()]
    assert result["validation_loss"] == whole["validation_loss"]
    assert result["bytes"]["state"] == whole["bytes"]["state"] > 0
    with pytest.raises(UserError, match=f"optimizer {name}: no option is called 'betaz'.*did you mean 'betas'"):
        train(toy(text, optimizer=f"{{name: {name}, lr: 1e-2, betaz: 1}}"), tmp_path / "wrong", quiet=True)


def stops_after(step: int, save: Any) -> Any:
    def stopping(self: Folder, recipe: Recipe, done: int, parts: dict[str, Any]) -> None:
        save(self, recipe, done, parts)
        if done == step:
            raise KeyboardInterrupt

    return stopping


def test_a_missing_package_costs_its_row_only(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    entries = "compare=[{label: GaLore, optimizer: {name: galore, lr: 1e-2}}, {label: A}]"
    result = compare(toy(text, entries), tmp_path / "all", quiet=True)
    assert [method["label"] for method in result["methods"]] == ["A"]
    assert result["missing"] == {"GaLore": "galore needs galore-torch: pip install 'optimzoo[baselines]'"}
    with pytest.raises(UserError, match="needs galore-torch"):
        compare(toy(text, entries.replace(", {label: A}", "")), tmp_path / "none", quiet=True)
    with pytest.raises(UserError, match="needs galore-torch"):
        train(toy(text, optimizer="{name: galore, lr: 1e-2}"), tmp_path / "run", quiet=True)


LATE = {
    "{label: C, optimizer: {name: cosmos, lr: 1e-2, rnk: 4}}": "optimizer cosmos: .*'rnk'; did you mean 'rank'",
    "{label: C, optimizer: {name: torch.muon, lr: 1e-2, ns_steps: 500}}": "optimizer torch.muon: .*less than 100",
    "{label: C, modules: [{kind: spektral}]}": "modules: no layer is called 'spektral'; did you mean 'spectral'",
    "{label: C, optimizer: {name: sst, lr: 1e-2}}": "optimizer sst: ",
    "{label: C, modules: [{kind: lora, rank: 2}], optimizer: {name: adamw, lr: 1e-2, epz: 1}}": "did you mean 'eps'",
    "{label: C, optimizer: {eps: 1e-8}, sweep: {key: optimizer.eps, values: [1e-8, -1]}}": "eps=-1.0 is out of range",
    "{label: C, optimizer: {name: cosmos, lr: 1, rank: 4}, sweep: {key: optimizer.rank}}": "must be an integer",
    "{label: C, sweep: {key: optimizer.name}}": "is no number of the recipe",
}


@pytest.mark.parametrize("entry", LATE)
def test_what_the_last_entry_gets_wrong_is_told_before_the_first_runs(entry: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^toy.yaml: compare entry 'C': .*{LATE[entry]}"):
        compare(toy(text, f"compare=[{{label: A}}, {entry}]"), tmp_path / "all", quiet=True, source="toy.yaml")
    assert not (tmp_path / "all").exists()


def test_the_early_check_lets_pass_what_it_cannot_build(text: Path) -> None:
    """On fake tensors there are no layers of peft's, and some models cannot be: such runs speak for themselves."""
    check(toy(text, "modules=[{kind: lora, rank: 2}]", "freeze=['*']"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimzoo.training.planning.blueprint", lambda recipe, converted: torch.ones(1).item() / 0)
        check(toy(text))


def test_lora_trains_adapters_and_what_is_in_no_layer(text: Path, tmp_path: Path) -> None:
    recipe = toy(text, "modules=[{kind: lora, rank: 2, match: '*_proj', exclude: '*.o_proj'}]")
    plain, model = (build_model(r, torch.device("cpu")) for r in (toy(text), recipe))
    tokens = build_corpus(recipe).batch(0, 0, 0, 2, 16)
    assert torch.equal(loss_of(plain, tokens), loss_of(model, tokens))  # B is zero
    again = build_model(recipe, torch.device("cpu"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    for name, p in model.named_parameters():
        frozen = "base_layer" in name
        assert p.requires_grad == (not frozen), name
        assert frozen <= ("_proj." in name)
    assert "model.layers.0.self_attn.o_proj.weight" in dict(model.named_parameters())
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.scaling == {"default": 1.0}
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert train(recipe, tmp_path / "run", quiet=True)["bytes"]["state_by_kind"]["first moment"] == 4 * learning
    for change, said in {"rnk: 2": "did you mean 'rank'", "match: 'no.*'": "finds no layer for LoRA"}.items():
        with pytest.raises(UserError, match=f"modules: .*{said}"):
            build_model(toy(text, f"modules=[{{kind: lora, {change}}}]"), torch.device("cpu"))


def test_frozen_factors_are_weights_too(text: Path, tmp_path: Path) -> None:
    """Of a spectral layer k (m + n) + k elements are counted, trained or not, and what says which vectors are where."""
    result = train(toy(text, "modules=[{kind: spectral, rank: 2}]"), tmp_path / "run", quiet=True)
    square, long, other = 2 * 16 * 16 + 16, 16 * (16 + 24) + 16, 2 * 256 * 16 + 3 * 16
    assert 0 <= result["bytes"]["weights"] - 4 * (4 * square + 3 * long + other) < 1000
    assert result["parameters"] < 4 * square + 3 * long + other  # those that learn


def test_wandb_offline_never_asks(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(toy(text, "wandb={mode: offline}"), tmp_path / "run", quiet=True)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="wandb login"):
        train(toy(text, "wandb={mode: online}"), tmp_path / "online", quiet=True)


# Comparisons.


def settle(recipe: Recipe, sweep: Sweep, seeds: list[int], loss: dict[float, float | None]) -> tuple[dict, list]:
    """Drive a search with losses from a table."""
    search, asked = protocol(recipe, sweep, seeds), []
    answers = None
    while True:
        try:
            runs = search.send(answers)
        except StopIteration as end:
            return end.value, asked
        asked.append([(run.optimizer.lr, run.seed) for run in runs])
        answers = [{"validation_loss": loss[run.optimizer.lr]} for run in runs]


def test_protocol_goes_on_until_the_best_is_interior(text: Path) -> None:
    recipe = toy(text, optimizer="{name: adamw, lr: 2e-3}")
    loss = {1e-3: 2.2, 2e-3: 2.1, 4e-3: 2.0, 8e-3: 1.9, 16e-3: None}
    found, asked = settle(recipe, Sweep(), [0, 1, 2], loss)
    assert asked == [[(1e-3, 0), (2e-3, 0), (4e-3, 0)], [(8e-3, 0)], [(16e-3, 0)], [(8e-3, 1), (8e-3, 2)]]
    assert (found["best"], found["interior"]) == (8e-3, True)
    assert found["tried"] == [[value, loss[value]] for value in sorted(loss)]
    down = {1e-3: None, 2e-3: None, 4e-3: None, 5e-4: None, 2.5e-4: 3.0, 1.25e-4: 3.5}
    assert settle(recipe, Sweep(), [0], down)[0]["best"] == 2.5e-4
    limited, _ = settle(recipe, Sweep(limit=4), [0], loss)
    assert (limited["best"], limited["interior"]) == (8e-3, False)
    given, asked = settle(recipe, Sweep(values=(4e-3, 2e-3)), [0], loss)
    assert (given["best"], given["interior"], len(asked)) == (4e-3, False, 1)
    assert beyond(2.0, {1.0: 0, 2.0: 0, 4.0: 0}, 2) == ()


def test_compare_caches_and_reports(text: Path, tmp_path: Path) -> None:
    entries = "compare=[{label: A}, {label: B, optimizer: {name: torch.sgd, lr: 1e-1}}]"
    recipe = toy(text, entries, "sweep={values: [1e-3, 1e-2]}", "seeds=[0, 1]")
    result = compare(recipe, tmp_path / "all", quiet=True)
    assert [method["label"] for method in result["methods"]] == ["A", "B"]
    for method in result["methods"]:
        assert len(method["losses"]) == 2
        assert method["spread"] == pytest.approx(max(method["losses"]) - min(method["losses"]))
        assert method["validation_loss"] == pytest.approx(sum(method["losses"]) / 2)
    folders = [path for path in (tmp_path / "all").iterdir() if path.is_dir()]
    assert len(folders) == 6  # two rates with one seed, the other seed at the best, for two methods
    stamps = {path: (path / "result.json").stat().st_mtime_ns for path in folders}
    assert compare(recipe, tmp_path / "all", quiet=True) == result
    assert stamps == {path: (path / "result.json").stat().st_mtime_ns for path in folders}
    assert {"comparison.json", "loss.png", "memory.png"} <= {path.name for path in (tmp_path / "all").iterdir()}
    own = toy(text, "compare=[{label: A, seeds: [3], sweep: {values: [1e-2]}}, {label: B}]", "seeds=[0]")
    swept, plain = compare(own, tmp_path / "own", quiet=True)["methods"]  # an entry's own protocol
    assert (swept["seeds"], swept["best"], plain["seeds"], "best" in plain) == ([3], 1e-2, [0], False)
    with pytest.raises(UserError, match="two entries have the same label"):
        compare(toy(text, "compare=[{label: A}, {label: A}]"), tmp_path / "twice", quiet=True)
    with pytest.raises(UserError, match="is no number of the recipe"):
        compare(toy(text, "sweep={key: optimizer.lrr}"), tmp_path / "key", quiet=True)
