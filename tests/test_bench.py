"""The bench: what it measures, what it says of a busy machine, and what it refuses."""

import json
import sys

import pytest
import torch
from rich.console import Console

from optimzoo.bench import candidates, show, steps, timing, training
from optimzoo.cli import main
from optimzoo.training.errors import UserError
from optimzoo.training.planning import described
from optimzoo.training.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture
def recipe() -> Recipe:
    small = {"model.size": None, "model.hidden_size": 16, "model.intermediate_size": 24, "model.heads": 2}
    small["model.vocab"] = 64
    return described("60m", "adamw", {}, "float32", 2, 8).replace(small)


def test_rounds_are_interleaved_and_percentiles_are_low():
    order: list[str] = []
    found = timing.interleaved({n: lambda n=n: [float(order.append(n) or len(order))] for n in "abc"}, 9)
    rounds = ["".join(order[start : start + 3]) for start in range(0, 27, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 2, "somebody always follows the same one"
    assert {n: [float(i + 1) for i, m in enumerate(order) if m == n] for n in "abc"} == {n: found[n][0] for n in "abc"}
    times = timing.summary([1.0] * 30 + [2.0] * 70)
    assert (times.p20, times.p50, times.spread) == (1.0, 2.0, 2.0)


def test_a_busy_machine_or_few_rounds_make_a_run_invalid():
    assert timing.verdict({"a": 1.1, "b": 1.29}, 50) is None
    assert "b (1.31)" in timing.verdict({"a": 1.1, "b": 1.31}, 50)
    assert "49 rounds" in timing.verdict({"a": 1.0}, 49)


def test_every_step_of_every_candidate_is_measured_on_its_own_weights(recipe):
    names = ["FRUGAL:projection=rows,density=0.5", "AdamW"]
    against = ["torch.adamw", "torch.muon:products=float32"]
    found = steps.measure_steps(recipe, names, against, layers=1, rounds=2, warmup=1, device=CPU)
    assert list(found["rows"]) == [*against, *names]
    for row in found["rows"].values():
        assert row["first"] > 0
        assert row["ratios"].keys() == set(against)
    rows = found["rows"]
    assert rows["torch.adamw"]["ratios"]["torch.adamw"] == 1
    assert rows["AdamW"]["state"] == rows["torch.adamw"]["state"] > rows["torch.muon:products=float32"]["state"]
    assert found["weights"] == 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16  # embeddings and head are frozen
    whole = steps.measure_steps(recipe, ["adamw"], [], layers=1, embeddings=True, rounds=1, device=CPU)
    assert whole["weights"] == found["weights"] + 2 * 16 * recipe.model.vocab


def test_muon_in_float32_steps_as_torch_does(recipe):
    model = candidates.subject(recipe, 1, False, CPU)
    plain, exact = (candidates.optimizers_on(model, f"torch.muon{how}") for how in (":lr=1", ":lr=1,products=float32"))
    for optimizer in (plain[0], exact[0]):
        optimizer.step()
    for one, two in zip(*(o.param_groups[0]["params"] for o in (plain[0], exact[0])), strict=True):
        assert torch.cosine_similarity(one.flatten(), two.flatten(), 0) > 0.99
        assert not torch.equal(one, two)


def test_training_steps_say_where_time_goes(recipe):
    names = ["torch.adamw", "WTA-CRS:ratio=0.5", "SST:rank=4", "sft:density=0.1"]
    found = training.measure_training(recipe, names, layers=1, rounds=2, warmup=1, device=CPU)
    assert found["rows"]["torch.adamw"]["ratio"] == 1
    for row in found["rows"].values():
        assert row["forward"] > 0
        assert row["backward"] > 0
        assert row["optimizer"] > 0


def test_what_cannot_be_built_here_is_said_in_its_row(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    names = ["galore:rank=4", "sst:rank=4"]  # no package, no layers: whatever the options say
    found = steps.measure_steps(recipe, names, ["torch.adamw"], layers=1, rounds=1, device=CPU)["rows"]
    assert list(found) == ["torch.adamw", *names]
    assert "galore needs galore-torch" in found["galore:rank=4"]["error"]
    assert found["sst:rank=4"].keys() == {"error"}


def test_tables_say_what_stands_in_brackets(capsys):
    """Rich takes [baselines] for a style, and shows nothing of it."""
    error = "galore needs galore-torch: pip install 'optimzoo[baselines]'"
    row = {"first": 1.0, "p20": 1.0, "p50": 1.0, "spread": 1.0, "state": 1, "workspace": 1, "ratios": {"a[b]": 1.0}}
    found = {"layers": 1, "weights": 1, "rounds": 1, "rows": {"a[b]": row, "galore": {"error": error}}}
    result = {"model": "m[x].json", "measured": [found | {"invalid": "a[b] (1.5)"}]}
    show(result, Console(width=300))
    shown = capsys.readouterr().out
    assert error in shown
    assert shown.count("a[b]") == 3
    assert "m[x].json" in shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cosmo", "no optimizer is called 'cosmo'; did you mean 'cosmos'"),
        ("Heavyball.Moun", "no optimizer is called 'Heavyball.Moun'; did you mean 'heavyball.muon'"),
        ("frugal:projektion=rows", "no option 'projektion'; did you mean 'projection'"),
        ("cosmos:rank=0", "rank=0 is out of range"),
        ("adamw:lr", "write options as name:key=value"),
        ("torch.muon:products=int8", "it must be float32"),
    ],
)
@pytest.mark.parametrize("yardstick", [True, False])
def test_what_is_wrong_with_a_candidate_is_told_before_a_step_is_taken(recipe, monkeypatch, text, words, yardstick):
    monkeypatch.setattr(steps, "_step", None)
    names, against = (["adamw"], ["torch.adamw", text]) if yardstick else (["adamw", text], ["torch.adamw"])
    with pytest.raises(UserError, match=words):
        steps.measure_steps(recipe, names, against, layers=1, rounds=1, device=CPU)


@pytest.mark.filterwarnings("ignore::Warning")  # of packages and of what they compile with
@pytest.mark.parametrize("name", candidates.PEERS)
def test_peers_are_measured_where_they_are_installed(recipe, name):
    found = steps.measure_steps(recipe, [name], ["torch.adamw"], layers=1, rounds=3, warmup=1, device=CPU)["rows"][name]
    if candidates.PEERS[name].missing:
        assert found["error"].endswith(f"pip install {name.split('.')[0]}")
    else:
        assert found["p20"] > 0
        assert found["state"] > 0


@pytest.fixture
def bench(capsys, monkeypatch, tmp_path):
    """`optimzoo bench` with these words: (exit code, standard output, standard error)."""

    def call(*words: str, rounds: int = 2) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["optimzoo", "bench", *words, "--rounds", str(rounds), "--threads", "1"])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def toy(tmp_path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(
        "model: {name: llama, hidden_size: 16, intermediate_size: 24, layers: 1, heads: 2}\n"
        "data: {name: python-source, sequence: 6, batch: 3}\noptimizer: {name: adamw, lr: 1e-2}\nschedule: {steps: 1}\n"
    )
    return str(path)


def test_command(bench, toy):
    for words, measured in (
        (["adamw", "--training"], 1),
        (["adamw", "--against", "torch.adamw"], 2),
        (["adamw", "--against", "torch.adamw", "--json"], 0),
    ):
        code, printed, told = bench(*words, "--model", toy, "--layers", "1,2", rounds=20)
        assert code == 0
        start, *lines = told.splitlines() or [""]
        assert start == (f"{measured} candidates x 20 rounds, at 2 depths" if measured else "")
        assert sum(line.startswith("adamw: first step ") for line in lines) == (2 if measured else 0)
        assert [line for line in lines if "round" in line] == [f"round {n} of 40" for n in range(4, 41, 4) if measured]
    result = json.loads(printed)
    assert [one["layers"] for one in result["measured"]] == [1, 2]
    assert "20 rounds" in result["measured"][0]["invalid"] or "p50/p20" in result["measured"][0]["invalid"]
    assert result["threads"] == 1


def test_what_is_measured_is_what_was_asked_for(bench, toy, monkeypatch):
    measured = []
    monkeypatch.setattr(training, "measure_training", lambda recipe, *_, **how: measured.append(recipe) or {})
    monkeypatch.setattr(steps, "measure_steps", lambda recipe, *_, **how: measured.append(recipe) or {})
    for words, dtype, shape in (
        ([], "float32", (3, 6)),
        (["--dtype", "bf16", "--batch", "2"], "bfloat16", (2, 6)),
        (["--sequence", "9"], "float32", (3, 9)),
    ):
        code, printed, _ = bench("--model", toy, "--training", *words, "--json")
        assert (code, json.loads(printed)["dtype"]) == (0, dtype)
        assert (measured[-1].data.batch, measured[-1].data.sequence) == shape
        assert measured[-1].model.dtype == dtype
    assert json.loads(bench("--model", toy, "--dtype", "bf16", "--json")[1])["dtype"] == measured[-1].model.dtype
    assert json.loads(bench("--json")[1])["dtype"] == "float32"
    assert (measured[-1].data.batch, measured[-1].data.sequence) == (4, 128)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "2"], "--batch is for measurements of whole training steps: add --training"),
        (["--sequence", "2"], "--sequence is for"),
        (["--training", "--against", "adamw"], "--against is for measurements of the optimizer's step alone: leave"),
        (["--training", "--embeddings"], "--embeddings is for"),
        (["--dtype", "int3"], "dtype='int3' must be"),
    ],
)
def test_what_would_have_no_effect_is_refused(bench, toy, words, message):
    for model in ([], ["--model", toy]):
        code, printed, error = bench(*model, *words)
        assert (code, printed) == (2, "")
        assert message in error


def test_a_model_that_is_no_llama_keeps_its_depth(bench, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "vocab_size": 64, **sizes}))
    recipe = tmp_path / "neox.yaml"
    recipe.write_text(
        f"model: {{name: transformers, config: {tmp_path / 'config.json'}}}\n"
        "data: {name: python-source}\noptimizer: {name: adamw, lr: 1e-2}\nschedule: {steps: 1}\n"
    )
    for model in (recipe, tmp_path / "config.json"):
        words = ["adamw", "--against", "torch.adamw", "--model", str(model)]
        code, printed, _ = bench(*words, "--json")
        assert code == 0
        assert [one["layers"] for one in json.loads(printed)["measured"]] == [None]
        assert "--layers needs a Llama" in bench(*words, "--layers", "1")[2]
