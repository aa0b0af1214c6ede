"""Recipes that classify: data by epochs, accuracy beside the loss, any architecture of transformers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from optimzoo.training import UserError, compare, load, train, trainer
from optimzoo.training.folder import Folder
from optimzoo.training.model import build_model
from optimzoo.training.planning import plans
from optimzoo.training.recipe import Recipe, validate
from optimzoo.training.report import table
from optimzoo.training.sections import PACKAGES
from optimzoo.training.tasks import task_of
from optimzoo.training.trainer import update
from tests.cases import labelled

BERT = {
    **{"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 16},
}
T5 = {
    **{"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40},
    **{"eos_token_id": 1, "decoder_start_token_id": 0},
}
SENTENCES = [
    f"the {animal} {verb} the {thing}"
    for animal in ("cat", "dog", "cow")
    for verb in ("sees", "eats")
    for thing in ("house", "tree", "grass", "moon", "old old old moon")
]


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laid_out(tmp_path_factory.mktemp("glue"))


def laid_out(root: Path) -> Path:
    """A folder laid out as GLUE is, with a tokenizer in it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    known = {word: index for index, word in enumerate(["[PAD]", "</s>", "[CLS]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A </s>", pair="[CLS] $A $B </s>", special_tokens=[("[CLS]", 2), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(root / "tokenizer")
    rows = {
        "sst2": [{"sentence": text, "label": int("cat" in text)} for text in SENTENCES],
        "mnli": [{"premise": text, "hypothesis": SENTENCES[0], "label": len(text) % 3} for text in SENTENCES],
        "qnli": [{"question": text, "label": 0} for text in SENTENCES],  # lacks its second text
    }
    header = ["---", "configs:"]
    for task, examples in rows.items():
        header += [f"- config_name: {task}", "  data_files:"]
        for split, part in (("train", examples[:-7]), ("validation" + "_matched" * (task == "mnli"), examples[-7:])):
            (root / f"{task}-{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
            header += [f"  - split: {split}", f"    path: {task}-{split}.jsonl"]
    (root / "README.md").write_text("\n".join([*header, "---"]))
    return root


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def toy(glue: Path, config: dict = BERT, data: dict | None = None, **changes: object) -> Recipe:
    data = {"name": "glue", "task": "sst2", "dataset": str(glue), "tokenizer": str(glue / "tokenizer")} | (data or {})
    values = {"model": {"name": "transformers", "config": config}, "data": {"sequence": 12, "batch": 4} | data}
    values |= {"optimizer": {"name": "adamw", "lr": 1e-2}, "schedule": {"steps": 3}, "eval": {"batches": 3}}
    return validate(values | changes, "toy")


def test_glue_is_read_padded_and_masked(glue: Path) -> None:
    recipe = toy(glue)
    data = task_of(recipe).data(recipe)
    assert data.facts["train_examples"] == 23
    batch = next(iter(data.held_out(4, 12, 3)))
    assert [tuple(part.shape) for part in batch.values()] == [(4, 12), (4, 12), (4,), (4,)]
    assert batch["input_ids"][0, 0] == 2
    assert torch.equal(batch["attention_mask"] == 1, batch["input_ids"] != 0)
    lengths = [len(SENTENCES[i].split()) + 2 for i in range(23, 27)]
    assert batch["attention_mask"].sum(1).tolist() == lengths == [7, 10, 7, 7]
    pairs = toy(glue, data={"task": "mnli"})
    assert task_of(pairs).data(pairs).batch(0, 0, 0, 4, 12)["attention_mask"].sum(1).min() == 12, "both texts, cut"
    assert build_model(pairs, torch.device("cpu")).config.num_labels == 3
    short = toy(glue, data={"sequence": 6})
    assert task_of(short).data(short).batch(0, 0, 0, 4, 6)["input_ids"][:, -1].eq(1).all(), "the end is not cut off"


def test_an_epoch_has_every_example_once(glue: Path) -> None:
    recipe = toy(glue, data={"accumulate": 2})
    data = task_of(recipe).data(recipe)
    seen = [int(i) for step in range(6) for micro in (0, 1) for i in data.batch(5, step, micro, 4, 12)["ids"]]
    assert sorted(seen[:23]) == list(range(23)) == sorted(seen[23:46])
    assert seen[:23] != seen[23:46]
    again = data.batch(5, 3, 1, 4, 12)
    assert all(torch.equal(part, again[name]) for name, part in data.batch(5, 3, 1, 4, 12).items())
    assert not torch.equal(again["ids"], data.batch(6, 3, 1, 4, 12)["ids"])
    held_out = list(data.held_out(4, 12, 5))
    assert [i for batch in held_out for i in batch["ids"].tolist()] == list(range(7)), "all of a small part, none twice"


def test_the_embedded_corpus_in_packages(glue: Path) -> None:
    recipe = validate(toy(glue).run() | {"data": {"name": "python-packages", "sequence": 64}}, "")
    one = task_of(recipe).data(recipe)
    assert one.facts == task_of(recipe).data(recipe).facts
    assert min(np.bincount(one.train.labels)) > 50
    assert len(np.bincount(one.validation.labels)) == len(PACKAGES)
    assert 0.15 < len(one.validation) / (len(one.train) + len(one.validation)) < 0.25
    assert one.train.tokens.max() < one.vocab
    assert not set(map(bytes, one.train.tokens)) & set(map(bytes, one.validation.tokens))
    assert min(one.train.lengths.min(), one.validation.lengths.min()) > 2, "there is something between begin and end"


@pytest.mark.parametrize("config", [BERT, BERT | {"model_type": "roberta"}, T5], ids=["bert", "roberta", "t5"])
def test_a_run_tells_its_accuracy(glue: Path, config: dict, tmp_path: Path) -> None:
    recipe = toy(glue, config, schedule={"steps": 25}, eval={"batches": 3, "every": 10})
    result = train(recipe, tmp_path / "run", quiet=True)
    rows = Folder(tmp_path / "run").rows()
    assert [row["step"] for row in rows if "validation_accuracy" in row] == [10, 20, 25]
    model = build_model(recipe, torch.device("cpu")).eval()
    model.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"])
    data = task_of(recipe).data(recipe)
    right = []
    with torch.no_grad():
        for batch in data.held_out(1, 12, 7):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            right.append(int(logits.argmax()) == int(batch["labels"]))
    assert result["validation_accuracy"] == pytest.approx(sum(right) / 7), "the last batch is smaller and counts less"
    assert load(tmp_path / "run" / "recipe.yaml") == recipe


def test_a_comparison_and_a_plan_of_classifiers(glue: Path, tmp_path: Path) -> None:
    entries = [{"label": "A"}, {"label": "B", "optimizer": {"name": "torch.sgd", "lr": 0.1}}]
    recipe = toy(glue, compare=entries, seeds=[0, 1])
    methods = compare(recipe, tmp_path / "all", quiet=True)["methods"]
    assert all(len(method["accuracies"]) == 2 for method in methods)
    assert "validation accuracy" in table(methods, "").columns[0]._cells
    planned = plans(recipe)["A"]
    model = build_model(recipe, torch.device("cpu"))
    assert planned.parameters == sum(p.numel() * 4 for p in model.parameters())
    assert planned.activations > 0


WRONG = {
    "cola": ({"data": {"task": "cola"}}, r"data\.dataset: cannot load cola of"),
    "column": ({"data": {"task": "qnli"}}, r"data: 'sentence' is not a column; there are question, label"),
    "heads": ({"config": BERT | {"num_attention_heads": 3}}, r"no sequence classifier's configuration"),
    "type": ({"config": {"hidden_size": 3}}, r"no sequence classifier's configuration: .*model_type"),
    "vocabulary": ({"config": BERT | {"vocab_size": 8}}, r"vocab_size=8 is too small"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_classified_is_refused_by_name(wrong: str, glue: Path, tmp_path: Path) -> None:
    changes, message = WRONG[wrong]
    with pytest.raises(UserError, match=message):
        train(toy(glue, **changes), tmp_path / "run", quiet=True)


def test_a_task_without_classes_is_unknown(glue: Path) -> None:
    with pytest.raises(UserError, match=r"data\.task='stsb' must be 'cola'"):
        toy(glue, data={"task": "stsb"})


# Sampled layers, and what a step keeps for backward.

SAMPLED = [{"kind": "sampled", "match": "bert.encoder.*", "exclude": "*.attention.output.dense"}]
RECIPES = [
    path
    for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")
    if labelled(path) and not path.stem.startswith("finetune_")
]


@pytest.mark.parametrize("path", sorted(RECIPES), ids=lambda path: path.stem)
def test_recipe_runs_three_steps(path: Path, glue: Path, tmp_path: Path) -> None:
    """Every entry of every recipe that classifies, on a tiny model with the recipe's own names of layers."""
    whole, tiny = load(path), toy(glue, T5 if "t5" in path.stem else BERT).run()
    for label, entry in whole.entries().items():
        changes = {name: tiny[name] for name in ("model", "data", "schedule", "eval")}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
            result = train(validate(entry.run() | changes, label), tmp_path / label, quiet=True)
        assert result["steps"] == 3
        assert result["validation_accuracy"] is not None


@pytest.mark.parametrize("what", ["exact", "sampled", "checkpointing"])
def test_what_a_step_keeps_is_what_was_planned(what: str, glue: Path, tmp_path: Path) -> None:
    changes = {"exact": {}, "sampled": {"modules": SAMPLED}, "checkpointing": {"checkpointing": True}}[what]
    recipe = toy(glue, BERT | {"num_hidden_layers": 2}, {"batch": 8}, **changes)
    measured = train(recipe, tmp_path / "run", quiet=True)["bytes"]["activations"]
    inputs, loss = 8 * (8 * 12 + 8), 4  # tokens and labels count as inputs in a plan, the loss as kept
    assert measured - inputs + loss == plans(recipe)["adamw"].activations
    if what != "exact":
        exact = toy(glue, BERT | {"num_hidden_layers": 2}, {"batch": 8})
        assert measured < train(exact, tmp_path / "exact", quiet=True)["bytes"]["activations"]


@pytest.mark.parametrize("norms", ["token", "position"])
def test_a_resumed_run_remembers_its_norms(
    norms: str, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy(glue, modules=SAMPLED, norms=norms, schedule={"steps": 7}, checkpoint={"every": 2})
    train(recipe, tmp_path / "whole", quiet=True)
    steps = []

    def stop(*arguments: object) -> None:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "part", quiet=True)
    train(recipe, tmp_path / "part", resume=True, quiet=True)
    whole, part = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "part"))
    assert whole["norms"]["typical"].max() > 0
    assert all(torch.equal(whole["norms"][name], part["norms"][name]) for name in ("norms", "typical"))
    assert all(torch.equal(p, part["model"][name]) for name, p in whole["model"].items())


def test_norms_without_use_are_refused(glue: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"norms: NormCache finds no SampledLinear"):
        train(toy(glue, norms="token"), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"norms='token' needs labelled data, .*; use position"):
        validate(toy(glue).run() | {"norms": "token", "data": {"name": "python-source"}}, "toy")
