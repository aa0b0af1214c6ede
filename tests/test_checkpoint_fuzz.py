"""Checkpoints and recipes at random: resumed in another arrangement, damaged, of another class, or written to do harm.

Everything either goes on as before or is refused in one sentence; nothing is half loaded. More cases of the same:

    pytest -m long tests/test_checkpoint_fuzz.py
"""

import copy
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optimzoo.core import ZooOptimizer
from optimzoo.training import UserError, load, train
from optimzoo.training.parsing import parse
from optimzoo.training.recipe import validate
from tests.cases import ALL, PLAIN, build, short_options, tiny
from tests.cases import train as steps
from tests.scenes import Scene, scenes
from tests.test_contract import reload
from tests.test_hostile import COMMON, ours, small_blocks

every = pytest.mark.parametrize("cls", ALL)
plain = pytest.mark.parametrize("cls", PLAIN)
FEW, MANY = settings(max_examples=15, **COMMON), settings(max_examples=500, **COMMON)
GRADIENTS = ("normal", "none", "zero", "one", "constant")
HOW = ("reordered", "added before", "added after", "other state", "wider")


def added(opt: ZooOptimizer) -> nn.Parameter:
    """One more parameter in a group of its own."""
    p = nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
    opt.add_param_group({"params": [("added", p)], "lr": 1e-2})
    return p


def elsewhere(scene: Scene, how: str, stop: int, other: str | None) -> None:
    """Train, save after `stop` steps, load in the way that `how` says, go on with both."""
    with small_blocks():
        try:
            model = scene.model()
            opt = scene.optimizer(model)
        except Exception as error:
            if not ours(error, scene):
                raise
            return
        named = "param_names" in opt.param_groups[0]
        news = [added(opt)] if how == "added before" and named else []
        for step in range(stop):
            go(scene, model, opt, news, step)
        saved, values = reload(opt.state_dict()), reload(model.state_dict())
        twin = scene.model()
        twin.load_state_dict(values)
        if how == "reordered" and named and not scene.kind.needs_model:
            groups = [
                {**g, "params": list(zip(g["param_names"], g["params"], strict=True))[::-1]} for g in opt.param_groups
            ]
            ours_by_name = dict(twin.named_parameters())
            for group in groups:
                group["params"] = [(name, ours_by_name[name]) for name, _ in group["params"]]
                del group["param_names"]
            resumed = scene.kind(groups)
        else:
            options = scene.options | ({"state_dtype": other} if how == "other state" else {})
            resumed = Scene(**{**vars(scene), "options": options}).optimizer(twin)
        twins = [added(resumed)] if how == "added before" and named else []
        for p, q in zip(news, twins, strict=True):
            q.data.copy_(p.data)
        resumed.load_state_dict(saved)
        if how == "wider" and not scene.kind.needs_model:
            wider(resumed, twin)
            return
        if how == "added after" and named:
            news, twins = [added(opt)], [added(resumed)]
        for step in range(stop, stop + 3):
            go(scene, model, opt, news, step)
            go(scene, twin, resumed, twins, step)
        alike = opt.param_groups[0]["state_dtype"] == resumed.param_groups[0]["state_dtype"]
        for p, q in zip([*model.parameters(), *news], [*twin.parameters(), *twins], strict=True):
            assert torch.isfinite(q).all()
            assert torch.equal(p, q) or not alike, how


def go(scene: Scene, model: nn.Module, opt: ZooOptimizer, news: list[nn.Parameter], step: int) -> None:
    scene.give(model, opt, step)
    for p in news:
        p.grad = torch.full_like(p, 0.1 * (step + 1))
    opt.step()


def wider(opt: ZooOptimizer, model: nn.Module) -> None:
    """The model moves to float64 after the load: the state follows, to the bit where it widens."""
    before = {p: {key: t.clone() for key, t in slots.items()} for p, slots in opt.state.items()}
    model.to(torch.float64)
    opt.memory()
    for p, slots in before.items():
        for key, t in slots.items():
            now = opt.state[p].get(key)
            if now is not None and t.is_floating_point() and now.dtype.itemsize >= t.dtype.itemsize:
                assert torch.equal(now, t.to(now.dtype)), key


def cases(cls: str, data: st.DataObject) -> None:
    how, stop = data.draw(st.sampled_from(HOW)), data.draw(st.integers(0, 4))
    other = data.draw(st.sampled_from(["float32", "bfloat16", "int8", None]))
    elsewhere(data.draw(scenes((cls,), GRADIENTS)), how, stop, other)


@every
@FEW
@given(data=st.data())
def test_resumes_elsewhere(cls: str, data: st.DataObject) -> None:
    cases(cls, data)


@pytest.mark.long
@every
@MANY
@given(data=st.data())
def test_resumes_elsewhere_often(cls: str, data: st.DataObject) -> None:
    cases(cls, data)


# Damaged optimizer states.

JUNK: tuple[Any, ...] = (
    *(None, "junk", -1, 10**400, float("nan"), True, [], {}, (), [[]], {"a": 1}, b"x"),
    *(torch.zeros(()), torch.zeros(3, 5, 7), torch.full((2,), float("nan")), torch.zeros(2, dtype=torch.complex64)),
    *(torch.zeros(4, dtype=torch.int8), torch.zeros(0), torch.zeros(16, 16, dtype=torch.bool)),
)


def check(error: Exception, word: str = "") -> None:
    """One sentence, with the word in it."""
    assert "\n" not in str(error), error
    assert len(str(error)) < 2000, error
    assert word in str(error), error


def damage(value: Any, chance: random.Random) -> Any:
    """The nested state with one thing replaced, removed or added somewhere."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        value = copy.copy(value)
        key = chance.choice([*value] if isinstance(value, dict) else [*range(len(value))])
        what = chance.random()
        if what < 0.1:
            del value[key]
        elif what < 0.2 and isinstance(value, dict):
            value[chance.choice(["junk", 99, "step", "exp_avg"])] = chance.choice(JUNK)
        else:
            value[key] = damage(value[key], chance)
        return value
    return chance.choice(JUNK)


def corrupt(cls: str, seeds: range) -> None:
    def fresh() -> tuple[nn.Module, ZooOptimizer]:
        model = tiny()
        opt = build(ALL[cls], model, state_dtype="int8")
        steps(model, opt, 0, 3)
        return model, opt

    with small_blocks():
        model, opt = fresh()
        good = copy.deepcopy(opt.state_dict())
        refused = 0
        for seed in seeds:
            bad = damage(good, random.Random(seed))
            try:
                opt.load_state_dict(bad)
            except (ValueError, TypeError, RuntimeError) as error:
                refused += 1
                check(error)
                after = opt.state_dict()
                assert after["param_groups"] == good["param_groups"], f"seed {seed}"
                for i, slots in good["state"].items():
                    assert all(torch.equal(after["state"][i][k], t) for k, t in slots.items()), f"seed {seed}"
            else:
                steps(model, opt, 3, 4)
                model, opt = fresh()
        assert refused > len(seeds) // 3


@every
def test_damaged_states_change_nothing(cls: str) -> None:
    corrupt(cls, range(60))


@pytest.mark.long
@every
def test_damaged_states_change_nothing_often(cls: str) -> None:
    corrupt(cls, range(60, 2000))


@plain
def test_states_of_other_classes_are_refused_or_the_same(cls: str) -> None:
    for name, other in PLAIN.items():
        model = tiny()
        opt, theirs = ALL[cls](model, **short_options(ALL[cls])), other(model, **short_options(other))
        steps(model, theirs, 0, 2)
        saved, before = reload(theirs.state_dict()), copy.deepcopy(opt.state_dict())
        try:
            opt.load_state_dict(saved)
        except ValueError as error:
            assert name != cls
            check(error, "it was saved by another optimizer or with other options")
            after = opt.state_dict()
            assert after["param_groups"] == before["param_groups"]
        else:
            assert {i: s.keys() for i, s in saved["state"].items()} == {
                i: s.keys() for i, s in opt.state_dict()["state"].items()
            }


# Damaged folders of a run.

RECIPE = """
model: {name: llama, hidden_size: 16, intermediate_size: 24, layers: 1, heads: 2}
data: {name: text, path: PATH, sequence: 16, batch: 2}
optimizer: {name: cosmos, lr: 1e-2, rank: 4, fallback_lr: 3e-3}
schedule: {steps: 3}
eval: {batches: 1}
checkpoint: {every: 2}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict]:
    """A recipe, the folder of its finished run, and the result."""
    home = tmp_path_factory.mktemp("run")
    (home / "corpus.txt").write_text("what a small corpus this is; " * 400)
    (home / "recipe.yaml").write_text(RECIPE.replace("PATH", str(home / "corpus.txt")))
    recipe = load(home / "recipe.yaml")
    result = train(recipe, home / "whole", quiet=True)
    return recipe, home, result


class Harm:
    """A pickle that makes a file when it is opened by a careless reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_no_damage_to_a_checkpoint_goes_unnoticed(run: tuple[Any, Path, dict]) -> None:
    recipe, home, _ = run
    folder = home / "damaged"
    folder.mkdir()
    good = (home / "whole" / "checkpoint.pt").read_bytes()
    shutil.copy(home / "whole" / "recipe.yaml", folder)
    chance = random.Random(0)
    bad = [good[: chance.randrange(len(good))] for _ in range(8)] + [b"", b"PK", good + b"x" * 100]
    for _ in range(20):
        flipped = bytearray(good)
        flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        bad.append(bytes(flipped))
    state = torch.load(home / "whole" / "checkpoint.pt", weights_only=True)
    harmful = home / "harm"
    for content in (pickle.dumps(Harm(harmful)), *map(saved_as, (Harm(harmful), {**state, "model": Harm(harmful)}))):
        bad.append(content)
    for part in (
        {"format": "other"},
        {"key": "x"},
        {"model": {}},
        {"step": "x"},
        {"optimizers": []},
        {"schedulers": 3},
    ):
        bad.append(saved_as(state | part))
    bad += [saved_as({k: v for k, v in state.items() if k != part}) for part in state]
    bad += [saved_as(damage(state, random.Random(seed))) for seed in range(15)]
    unnoticed = 0
    for content in bad:
        (folder / "checkpoint.pt").write_bytes(content)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        try:
            train(recipe, folder, resume=True, quiet=True)
        except UserError as error:
            check(error, "checkpoint.pt")
        else:
            unnoticed += 1
            assert same_weights(folder, home / "whole")
        for file in ("result.json", "loss.png", "memory.png"):
            (folder / file).unlink(missing_ok=True)
    assert not harmful.exists(), "a checkpoint was executed"
    assert unnoticed < len(bad) / 4  # bits that say nothing: names of records, padding between them


def saved_as(state: Any) -> bytes:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def same_weights(folder: Path, whole: Path) -> bool:
    one, other = (torch.load(place / "checkpoint.pt", weights_only=True)["model"] for place in (folder, whole))
    return all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.long
def test_other_files_of_a_run_may_be_anything(run: tuple[Any, Path, dict]) -> None:
    """Resumed as far as the checkpoint says, or refused in a sentence; a folder in place of a file included."""
    recipe, home, result = run
    chance = random.Random(1)
    for name in ("metrics.jsonl", "result.json", "recipe.yaml", "versions.json", "loss.png", "checkpoint.pt.partial"):
        for what in ("empty", "garbage", "number", "list", "cut", "flipped", "folder", "gone"):
            folder = home / "other"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(home / "whole", folder)
            spoil(folder / name, what, chance)
            if name != "result.json":
                (folder / "result.json").unlink(missing_ok=True)
            try:
                again = train(recipe, folder, resume=True, quiet=True)
            except UserError as error:
                check(error, name)
            else:
                assert again["validation_loss"] == result["validation_loss"]
                assert same_weights(folder, home / "whole")


def spoil(path: Path, what: str, chance: random.Random) -> None:
    good = path.read_bytes() if path.exists() else b"x"
    path.unlink(missing_ok=True)
    if what == "folder":
        path.mkdir()
    elif what != "gone":
        cut = chance.randrange(len(good))
        flipped = good[:cut] + bytes([good[cut] ^ 4]) + good[cut + 1 :]
        contents = {"empty": b"", "garbage": b"\xff\x00\xfe", "number": b"3\n", "list": b"[1]\n"}
        path.write_bytes(contents.get(what) or {"cut": good[:cut], "flipped": flipped}.get(what, b""))


# Recipes.

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
HOSTILE = {
    **{"empty": "", "a comment": "# nothing", "a scalar": "3", "null": "null", "two documents": "a: 1\n---\nb: 2\n"},
    **{"billion laughs": LAUGHS, "a value in itself": "a: &a [*a]", "a key in itself": "&a {*a : 1}"},
    **{
        "deep list": "[" * 20_000,
        "deep mapping": "{a: " * 20_000,
        "deep dashes": "- " * 20_000,
        "deep keys": "? " * 9_000,
    },
    **{"long": "a: " + "x" * 2_000_000, "many": "a: [" + "1," * 200_000 + "]", "digits": "seed: " + "9" * 9_000},
    **{"python": "model: !!python/object/apply:os.system ['true']", "name": "model: !!python/name:os.system"},
    **{
        "set": "model: !!set {a, b}",
        "binary": "model: !!binary aGVsbG8=",
        "own": "model: !mine 3",
        "omap": "!!omap [a: 1]",
    },
    **{"twice": "seed: 1\nseed: 2\n", "numbers as keys": "1: 2", "null as key": "null: 1", "list as key": "? [a]\n: 1"},
    **{"half a character": 'a: "\\ud800"', "control": "a: \x07", "tab": "a:\n\t- b", "merge": "<<: 3", "value": "a: ="},
    **{"unknown alias": "a: *b", "directive": "%YAML 9.9\n---\na: 1", "hex": "seed: 0x" + "f" * 9_000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipes_are_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(HOSTILE[name])
    with pytest.raises(UserError) as caught:
        load(tmp_path / "r.yaml")
    check(caught.value, "r.yaml")


def test_a_recipe_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    for path in (tmp_path / "pipe.yaml", tmp_path / "bytes.yaml", tmp_path, tmp_path / "none.yaml", Path("/dev/null")):
        with pytest.raises(UserError) as caught:
            load(path)
        check(caught.value)


def test_a_recipe_cut_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    for end in range(0, len(RECIPE), 3):
        (tmp_path / "r.yaml").write_text(RECIPE[:end])
        try:
            load(tmp_path / "r.yaml")
        except UserError as error:
            check(error)


def wrong(seeds: range) -> None:
    good = parse(RECIPE, "good")
    good |= {"compare": [{"label": "A"}], "sweep": {}, "seeds": [0, 1], "modules": [{"kind": "sampled"}]}
    junk = (None, "x" * 300, "\n", -1, 10**400, 1e308, True, [], {}, [[1]], {"a": {"b": 1}}, {"name": 3}, {1: 2})
    for seed in seeds:
        chance = random.Random(seed)
        values = damage(damage(good, chance), chance)
        values = plain_data(values, chance, junk)
        try:
            recipe = validate(values, "r.yaml")
            recipe.entries()
            assert recipe.key
        except UserError as error:
            check(error)


def plain_data(value: Any, chance: random.Random, junk: tuple) -> Any:
    """Tensors and bytes come out of no YAML: something else in their place."""
    if isinstance(value, dict):
        return {key: plain_data(part, chance, junk) for key, part in value.items()}
    if isinstance(value, list):
        return [plain_data(part, chance, junk) for part in value]
    return chance.choice(junk) if isinstance(value, torch.Tensor | bytes | tuple) else value


def test_wrong_types_in_recipes_are_refused_in_a_sentence() -> None:
    wrong(range(400))


@pytest.mark.long
def test_wrong_types_in_recipes_are_refused_in_a_sentence_often() -> None:
    wrong(range(400, 20_000))
