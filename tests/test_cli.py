"""The command: what it prints, what it refuses, and with which exit code."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import optimzoo
from optimzoo import registry
from optimzoo.cli import main, parse_shape

ROOT = Path(__file__).parents[1]
RECIPE = """
model: {name: llama, hidden_size: 16, intermediate_size: 24, layers: 1, heads: 2}
data: {name: text, path: %s, sequence: 16, batch: 2}
optimizer: {name: adamw, lr: 1e-2}
schedule: {steps: 4}
eval: {every: 2, batches: 2}
compare:
  - label: AdamW
  - label: COSMOS
    optimizer: {name: cosmos, lr: 1e-2, rank: 4, fallback_lr: 3e-3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text((ROOT / "setup.cfg").read_text() * 10)
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE % (tmp_path / "corpus.txt"))
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """The command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["optimzoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code or 0, *capsys.readouterr()

    return call


def refused(answer: tuple[int, str, str]) -> str:
    """The one sentence of a command that was refused."""
    code, out, err = answer
    assert (code, out) == (2, ""), answer
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_help_names_every_command_and_option(command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    assert all(name in out for name in ("list", "show", "run", "compare", "--version"))
    assert all(option in command("run", "--help")[1] for option in ("--set", "--out", "--resume", "--json", "recipe"))
    assert all(option in command("compare", "--help")[1] for option in ("--jobs", "--sweep", "--seeds"))


def test_python_m_optimzoo_and_version(command) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "optimzoo", "list", "--json"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert {"adamw", "cosmos"} <= {row["name"] for row in json.loads(done.stdout)}
    assert command("--version")[1].strip() == version("optimzoo")


def test_list_has_bytes_a_weight(command) -> None:
    _, out, _ = command("list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["adamw"]["bytes_per_weight"] == pytest.approx(8, rel=1e-6)
    n, r = 4096, 64
    assert rows["cosmos"]["bytes_per_weight"] == pytest.approx(4 * (1 + 2 * r / n + r**2 / n**2), rel=1e-6)
    assert all("arXiv" in row["paper"] for row in rows.values())
    text = command("list")[1]
    assert all(name in text for name in rows)


@pytest.mark.parametrize("name", sorted(registry.optimizers()))
def test_show(command, name: str) -> None:
    code, out, _ = command("show", name, "--shape", "96,64")
    assert code == 0
    assert all(option in out for option in ("lr", "weight_decay"))
    _, out, _ = command("show", name, "--shape", "96x64", "--json")
    shown = json.loads(out)
    assert shown["shape"] == [96, 64]
    assert shown["total"] == sum(slot["bytes"] for slot in shown["slots"])
    assert shown["options"]["lr"]["allowed"]


@pytest.mark.parametrize("name", sorted(registry.optimizers()))
def test_show_counts_what_an_optimizer_holds(command, name: str) -> None:
    """In a layer of its own where it needs one, and then the layer is named."""
    import torch

    model, kind = torch.nn.ModuleDict({"it": torch.nn.Linear(160, 96, bias=False)}), registry.optimizer(name)
    layer = {
        "sst": (optimzoo.SpectralLinear, {"rank": 64}),
        "sft": (optimzoo.SparseDeltaLinear, {"density": 0.01}),
    }.get(name)
    if layer:
        optimzoo.convert(model, layer[0], **layer[1])
    optimizer = kind(model, **({"total_steps": 9} if name == "sft" else {}))
    shown = json.loads(command("show", name, "--shape", "96,160", "--json")[1])
    assert shown["total"] == optimizer.memory().total
    state = [t for slots in optimizer.state.values() for t in slots.values()]
    assert [(slot["shape"], slot["bytes"]) for slot in shown["slots"]] == [(list(t.shape), t.nbytes) for t in state]
    text = {"sst": "SpectralLinear(rank=64)", "sft": "SparseDeltaLinear(density=0.01)"}.get(name)
    assert shown["layer"] == text
    rows = {row["name"]: row for row in json.loads(command("list", "--json")[1])}
    assert rows[name]["layer"] == text
    if text:
        assert rows[name]["bytes_per_weight"] < 0.3
        assert all(text in " ".join(command(*words)[1].split()) for words in (["list"], ["show", name]))


def test_show_knows_which_weights_go_to_adamw(command) -> None:
    few = json.loads(command("show", "swan", "--shape", "7,8", "--json")[1])
    assert [slot["name"] for slot in few["slots"]] == ["exp_avg", "exp_avg_sq", "step"]
    assert json.loads(command("show", "sm3", "--shape", "7,3,2", "--json")[1])["total"] == 48
    assert json.loads(command("show", "adamw", "--shape", "7", "--json")[1])["total"] == 60


def test_run_and_resume(command, recipe: Path, tmp_path: Path) -> None:
    code, out, err = command("run", recipe)
    assert code == 0
    assert "validation loss" in out
    assert "4/4" in err
    assert {"loss.png", "memory.png", "result.json"} <= {path.name for path in (tmp_path / "runs" / "toy").iterdir()}
    assert "already holds a run" in refused(command("run", recipe))
    code, out, err = command("run", recipe, "--resume", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "runs" / "toy" / "result.json").read_text())
    assert "optimizer.lr" in refused(command("run", recipe, "--resume", "--set", "optimizer.lr=1e-3"))
    before = (tmp_path / "runs" / "toy" / "loss.png").stat().st_mtime_ns
    (tmp_path / "runs" / "toy" / "memory.png").unlink()  # as a kill between the result and the pictures leaves it
    assert command("run", recipe, "--resume")[0] == 0
    assert (tmp_path / "runs" / "toy" / "memory.png").stat().st_size
    now = (tmp_path / "runs" / "toy" / "loss.png").stat().st_mtime_ns
    assert now > before
    assert command("run", recipe, "--resume")[0] == 0
    assert (tmp_path / "runs" / "toy" / "loss.png").stat().st_mtime_ns == now  # nothing was missing


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["run"], "stopped; --resume goes on from the last checkpoint\n"),
        (["compare"], "stopped; the same command goes on from the last checkpoints\n"),
        (["plan"], ""),
        (["bench", "--model"], ""),
    ],
)
def test_who_stops_it_is_told_how_to_go_on(
    command, recipe: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], advice: str
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optimzoo.training.load", stop)
    monkeypatch.setattr("optimzoo.bench.command.load", stop)
    assert command(*words, recipe) == (130, "", advice)


def test_a_run_and_a_comparison_keep_out_of_each_others_folders(command, recipe: Path, tmp_path: Path) -> None:
    err = command("run", recipe)[2]
    assert err.endswith(f"note: none of its 2 entries to compare was run; optimzoo compare {recipe} does\n")
    picture = (tmp_path / "runs" / "toy" / "loss.png").read_bytes()
    assert "toy holds a single run" in refused(command("compare", recipe))
    assert (tmp_path / "runs" / "toy" / "loss.png").read_bytes() == picture
    assert command("compare", recipe, "--out", "all")[0] == 0
    for how in ((), ("--resume",)):
        assert "all holds a comparison" in refused(command("run", recipe, "--out", "all", *how))
    assert command("compare", recipe, "--out", "all")[0] == 0
    (tmp_path / "runs" / "toy" / "comparison.json").write_text("{}")  # as versions before left both in one folder
    assert command("compare", recipe)[0] == 0
    assert command("run", recipe, "--resume", "--set", "compare=[]")[2] == ""


def test_json_prints_nothing_else(command, recipe: Path) -> None:
    code, out, err = command("compare", recipe, "--json", "--out", "all")
    assert (code, err) == (0, "")
    assert [method["label"] for method in json.loads(out)["methods"]] == ["AdamW", "COSMOS"]


def test_compare_in_processes(command, recipe: Path) -> None:
    code, out, err = command("compare", recipe, "--jobs", 2, "--sweep", "optimizer.lr=1e-2,2e-2", "--seeds", "0,1")
    assert code == 0
    assert all(
        word in out for word in ("AdamW", "COSMOS", "optimizer bytes", "workspace", "spread", "on the edge", "0.01: ")
    )
    assert err.count("4/4") == 6


def test_labels_and_folders_in_brackets_are_shown(command, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("label: COSMOS", "label: 'COSMOS [r4]'"))
    claim = "claims=[{text: '[bold] words', near: [AdamW, 'COSMOS [r4]']}]"
    _, out, _ = command("compare", recipe, "--set", claim, "--sweep", "optimizer.lr=1e-2", "--out", "all [x]")
    assert out.count("COSMOS [r4]") >= 2
    assert "[bold] words" in out
    assert out.count("all [x]") >= 2
    assert command("run", recipe, "--out", "one [x]")[2].count("one [x] 4/4") == 1


def test_wrong_input_is_one_sentence_and_exit_code_2(command, recipe: Path, tmp_path: Path) -> None:
    assert "no optimizer is called 'COSMO'; did you mean 'cosmos'?" in refused(command("show", "COSMO"))
    assert "--shape 3,x" in refused(command("show", "cosmos", "--shape", "3,x"))
    assert "goes to adamw" in refused(command("show", "cosmos", "--shape", "7"))
    assert "did you mean 'toy.yaml'?" in refused(command("run", tmp_path / "tay.yaml"))
    assert "did you mean 'warmup'?" in refused(command("run", recipe, "--set", "schedule.warmpu=1"))
    assert "no optimizer is called 'galor'" in refused(command("run", recipe, "--set", "optimizer.name=galor"))
    assert "rank=0" in refused(command("run", recipe, "--set", "optimizer={name: cosmos, lr: 1, rank: 0}"))
    assert "cannot read /no/such" in refused(command("run", recipe, "--set", "data.path=/no/such", "--out", "o"))
    assert "names a seed twice" in refused(command("compare", recipe, "--seeds", "0,0", "--jobs", 2))
    (tmp_path / "file").write_text("")
    assert "cannot make the folder" in refused(command("run", recipe, "--out", tmp_path / "file" / "x"))
    code, _, err = command("run", recipe, "--no-such-option")
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("wrong", ["data.path=/no/such", "optimizer.rnk=3", "data.sequence=100000"])
@pytest.mark.parametrize("how", [(), ("--resume",)])
def test_a_run_that_was_refused_is_none(command, recipe: Path, tmp_path: Path, wrong: str, how: tuple) -> None:
    refused(command("run", recipe, "--set", wrong))
    assert command("run", recipe, *how)[0] == 0
    for name in ("checkpoint.pt", "result.json", "metrics.jsonl"):  # each of them alone is something to lose
        assert "already holds a run" in refused(command("run", recipe))
        (tmp_path / "runs" / "toy" / name).unlink()
    assert command("run", recipe)[0] == 0


@pytest.mark.parametrize("content", [b"", b"junk", "cut"])
def test_a_corrupt_checkpoint(command, recipe: Path, tmp_path: Path, content: bytes | str) -> None:
    run = tmp_path / "runs" / "toy"
    command("run", recipe, "--set", "checkpoint.every=1")
    (run / "result.json").unlink()
    saved = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(saved[: len(saved) // 2] if content == "cut" else content)
    before = (run / "checkpoint.pt").read_bytes()
    assert "checkpoint.pt is damaged" in refused(command("run", recipe, "--resume"))
    assert (run / "checkpoint.pt").read_bytes() == before
    (run / "checkpoint.pt").write_bytes(saved)
    assert command("run", recipe, "--resume")[0] == 0


def test_a_foreign_checkpoint(command, recipe: Path, tmp_path: Path) -> None:
    import torch

    run = tmp_path / "runs" / "toy"
    command("run", recipe)
    (run / "result.json").unlink()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({"model": state["model"]}, run / "checkpoint.pt")
    assert "is not a checkpoint of an optimzoo run" in refused(command("run", recipe, "--resume"))
    torch.save(state | {"key": "other"}, run / "checkpoint.pt")
    assert "belongs to another recipe" in refused(command("run", recipe, "--resume"))
    torch.save({key: part for key, part in state.items() if key != "key"}, run / "checkpoint.pt")
    assert "belongs to another recipe" in refused(command("run", recipe, "--resume"))
    for part in ({"optimizers": [[]]}, {"optimizers": [{**state["optimizers"][0], "state": []}]}, {"step": "x"}):
        torch.save(state | part, run / "checkpoint.pt")
        words = "is damaged: step is x" if "step" in part else "does not fit the model and optimizer"
        assert words in refused(command("run", recipe, "--resume"))
    del state["model"]["lm_head.weight"]
    torch.save(state, run / "checkpoint.pt")
    assert "does not fit the model" in refused(command("run", recipe, "--resume"))


def test_other_damaged_files(command, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "toy"
    command("run", recipe)
    (run / "result.json").write_text("[1]")
    assert command("run", recipe, "--resume")[0] == 0  # made again from the checkpoint
    assert isinstance(json.loads((run / "result.json").read_text()), dict)
    (run / "result.json").unlink()
    (run / "recipe.yaml").write_bytes(b"\xff\xfe")
    assert "recipe.yaml is damaged" in refused(command("run", recipe, "--resume"))


def test_a_missing_extra_is_one_sentence() -> None:
    for missing, arguments in (("typer", ["list"]), ("yaml", ["run", "x.yaml"])):
        script = f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {arguments!r}; "
        script += "from optimzoo.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 2
        assert "pip install 'optimzoo[recipes]'" in done.stderr
        assert missing in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1


def test_shapes() -> None:
    assert parse_shape("4096,11008") == parse_shape("4096x11008") == (4096, 11008)
    for wrong in ("", "4,", "4,-1", "0,3"):
        with pytest.raises(ValueError, match="positive sizes"):
            parse_shape(wrong)
