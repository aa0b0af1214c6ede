"""Fine-tuning recipes: a run before the run, trained weights, frozen ones, parts of a corpus, prompts and responses."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

import optimzoo
from optimzoo.memory import Plan
from optimzoo.modules.delta_file import load_delta
from optimzoo.training import UserError, compare, load, train
from optimzoo.training.data import build_corpus
from optimzoo.training.folder import Folder
from optimzoo.training.model import build_model, loss_of
from optimzoo.training.planning import plans
from optimzoo.training.recipe import Recipe, validate
from optimzoo.training.trainer import prepare
from tests.test_classification import laid_out
from tests.test_recipes import ROOT, toy


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text((ROOT / "setup.cfg").read_text() * 20)
    return path


def test_a_pretraining_runs_once_and_every_entry_starts_from_it(text: Path, tmp_path: Path) -> None:
    recipe = toy(
        text,
        "pretrain={optimizer: {name: adamw, lr: 1e-2}, schedule: {steps: 4}, data: {batch: 3}}",
        "compare=[{label: all}, {label: delta, freeze: ['*'], modules: [{kind: sparse_delta, density: 0.1}], "
        "optimizer: {name: sft, lr: 1e-3, reselect_every: 2, accumulate: 1}}]",
        "seeds=[0, 1]",
        "checkpoint.every=0",
    )
    result = compare(recipe, tmp_path, quiet=True)
    (before,) = tmp_path.glob("pretrain-*")
    first = Folder(before).finished(recipe.preparation())
    assert (first["steps"], first["tokens"], first["seed"]) == (4, 4 * 3 * 16, 0)
    for entry in recipe.entries().values():
        assert entry.preparation() == recipe.preparation()
        weights = prepare(entry, tmp_path, quiet=True)
        start = build_model(entry, torch.device("cpu"), weights)
        plain = {name.replace(".base.", "."): value for name, value in start.state_dict().items()}
        assert all(torch.equal(plain[name], value) for name, value in weights.items())
    stamp = (before / "result.json").stat().st_mtime_ns
    (alone,) = tmp_path.glob("delta-*seed-1-*")
    (alone / "result.json").unlink()
    losses = {method["label"]: method["losses"] for method in result["methods"]}
    again = train(recipe.entries()["delta"].replace({"seed": 1}), alone, resume=True, quiet=True)
    assert again["validation_loss"] == losses["delta"][1]
    assert (before / "result.json").stat().st_mtime_ns == stamp
    assert max(losses["delta"]) < first["best_validation_loss"] + 0.5
    for change, message in {
        "pretrain={optimizer: {name: adamw, lr: 1}}": "pretrain.schedule is missing",
        "pretrain={optimzer: {}}": "did you mean 'optimizer'",
        "pretrain={optimizer: {name: torch.sgd, lr: 1e30}, clip: 0, schedule: {steps: 9}}": "diverged; lower pretrain",
    }.items():
        with pytest.raises(UserError, match=message):
            train(toy(text, change), tmp_path / "wrong" / "run", quiet=True)


def test_fine_tuning_a_saved_model_leaves_a_small_delta(text: Path, tmp_path: Path) -> None:
    """The real loading code on a model saved on the spot; the schedule tells SFT how long the run is."""
    plain = build_model(toy(text), torch.device("cpu"))
    plain.save_pretrained(tmp_path / "model")
    model = f"model={{name: pretrained, id: '{tmp_path / 'model'}'}}"
    adapter = ["freeze='*'", "modules=[{kind: sparse_delta, lora_rank: 2, match: '*.mlp.*'}]"]
    sft = "{name: sft, lr: 1e-2, reselect_every: 3, accumulate: 1}"
    recipe = toy(text, model, *adapter, optimizer=sft, steps=5)
    assert all(
        torch.equal(p, plain.state_dict()[name])
        for name, p in build_model(toy(text, model), torch.device("cpu")).state_dict().items()
    )
    result = train(recipe, tmp_path / "run", quiet=True)
    layers = [m for name, m in plain.named_modules() if ".mlp." in name and isinstance(m, torch.nn.Linear)]
    assert result["trainable"] == sum(2 * (m.in_features + m.out_features) for m in layers)
    assert result["parameters"] == sum(p.numel() for p in plain.parameters()) + result["trainable"]
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["optimizers"][0]["param_groups"][0]["total_steps"] == 5
    load_delta(plain, tmp_path / "run" / "delta.safetensors")
    optimzoo.merge(plain)
    corpus = build_corpus(recipe)
    losses = [loss_of(plain, tokens).item() for tokens in corpus.held_out(2, 16, recipe.eval.batches)]
    assert sum(losses) / len(losses) == pytest.approx(result["validation_loss"], abs=1e-6)
    assert plans(recipe)["sft"].peak > 0  # from the configuration alone


def test_freezing_names_what_it_does_not_find(text: Path) -> None:
    model = build_model(toy(text, "freeze=['*embed*', lm_head.weight]"), torch.device("cpu"))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight", "lm_head.weight"]
    for change, message in {
        "freeze='*embeding*'": r"no parameter is called '\*embeding\*'; they have names like 'lm_head.weight'",
        "freeze='*'": "nothing is left to train",
        "model={name: pretrained, id: /nowhere}": "model.id: cannot load '/nowhere'",
    }.items():
        with pytest.raises(UserError, match=message):
            build_model(toy(text, change), torch.device("cpu"))


PARTS = {
    "data.include='*'": [True, True, True],
    "data.include='a/*'": [True, True, False],
    "data.include=['*/1.txt']": [True, False, True],
    "data.exclude=['a/1*', 'b*']": [False, True, False],
}


def test_parts_of_a_corpus(text: Path, tmp_path: Path) -> None:
    for name in ("a/1.txt", "a/2.txt", "b/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"this is {name} " * 30)

    def read(change: str) -> bytes:
        corpus = build_corpus(toy(text, f"data.path={tmp_path}", change))
        return corpus.train.tobytes() + corpus.validation.tobytes()

    found = {name: [leaf in read(name) for leaf in (b"a/1", b"a/2", b"b/1")] for name in PARTS}
    assert found == PARTS
    with pytest.raises(UserError, match=r"no file matches include and not exclude; files are named like a/1\.txt"):
        read("data.include='c/*'")
    with pytest.raises(UserError, match="choose files of a folder"):
        build_corpus(toy(text, "data.include='*'"))
    values = toy(text).run() | {"data": {"name": "python-source", "include": ["json/*"]}}
    corpus = build_corpus(validate(values, ""))
    assert b"class JSONDecoder" in corpus.train.tobytes() + corpus.validation.tobytes()
    assert len(corpus.train) < 2e5


def word_tokenizer(folder: Path, text: str) -> PreTrainedTokenizerFast:
    words = sorted({*text.split(), "<end>", "<unk>"})
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.save_pretrained(folder / "tokenizer")
    return made


def test_the_loss_counts_responses_alone(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"q": f"how many bears are {n % 7}", "a": " ".join(["bear"] * (n % 5 + 1))} for n in range(40)]
    tokenizer = word_tokenizer(tmp_path, "question answer " + " ".join(f"{row['q']} {row['a']}" for row in rows))
    data = (
        f"data={{name: huggingface, dataset: json, data_files: '{tmp_path / 'rows.json'}', sequence: 12, batch: 2, "
        f"prompt: 'question {{q}} answer', response: '{{a}}', tokenizer: '{tmp_path / 'tokenizer'}'}}"
    )
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    recipe = toy(text, data, f"model.vocab={len(tokenizer)}")
    corpus = build_corpus(recipe)
    tokens = corpus.batch(0, 0, 0, 4, 12)
    for row in tokens.tolist():
        assert [tokenizer.decode(~token) for token in row[:7]][:3] == ["question", "how", "many"]
        assert all(token < 0 for token in row[:7])
        assert tokenizer.decode(row[7]) == "bear"
    model = build_model(recipe, torch.device("cpu"))
    logits = model(input_ids=torch.where(tokens < 0, ~tokens, tokens)[:, :-1]).logits
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].clamp(min=0).flatten(), reduction="none"
    )
    learned = (tokens[:, 1:] >= 0).flatten()
    torch.testing.assert_close(loss_of(model, tokens), each[learned].mean())
    assert math.isfinite(train(recipe, tmp_path / "run", quiet=True)["validation_loss"])
    assert len(corpus.validation_starts) > 0
    with pytest.raises(UserError, match="fewer than two prompts"):
        build_corpus(toy(text, data.replace("sequence: 12", "sequence: 6"), f"model.vocab={len(tokenizer)}"))


# The recipes for real models, on small ones that are saved on the spot and loaded by the same code.


def runs(recipe: Recipe, folder: Path) -> dict[str, dict]:
    results, planned = {}, {}
    for label, entry in recipe.entries().items():
        results[label] = train(entry, folder / label, quiet=True)
        assert math.isfinite(results[label]["validation_loss"])
        assert (folder / label / "delta.safetensors").exists() == label.startswith("SFT")
        (planned[label],) = plans(entry).values()
    refused = {label: str(plan) for label, plan in planned.items() if not isinstance(plan, Plan)}
    assert list(refused) == ["LoRA"], refused  # PEFT casts its adapters, and fake parameters cannot be cast
    assert "cannot be converted" in refused["LoRA"]
    assert list(results) == ["SFT-AG", "SFT-SM3", "LoRA", "full"]
    trained = [result["trainable"] for result in results.values()]
    assert trained[0] == trained[1] == trained[2] < trained[3] == results["full"]["parameters"]
    return results


SHORT = ["schedule.steps=3", "schedule.warmup=1", "data.batch=2", "data.sequence=12", "eval.batches=2"]


def test_tuning_a_causal_model_to_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"instruction": f"say {n}", "context": f"{n} bears", "response": f"there are {n} bears"} for n in range(30)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = word_tokenizer(tmp_path, " ".join(" ".join(row.values()) for row in rows))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    small = [f"model.id={tmp_path / 'model'}", f"data.tokenizer={tmp_path / 'tokenizer'}", "data.dataset=json"]
    small += [f"data.data_files={tmp_path / 'rows.json'}", "data.accumulate=2"]
    runs(load(ROOT / "recipes" / "finetune_instructions.yaml", [*SHORT, *small]), tmp_path)


def test_roberta_on_glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    glue = laid_out(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=40, max_position_embeddings=20, pad_token_id=0, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    small = [f"model.id={tmp_path / 'model'}", f"data.tokenizer={glue / 'tokenizer'}", f"data.dataset={glue}"]
    results = runs(load(ROOT / "recipes" / "finetune_roberta_glue.yaml", [*SHORT, *small, "data.task=sst2"]), tmp_path)
    assert all(0 <= result["validation_accuracy"] <= 1 for result in results.values())
