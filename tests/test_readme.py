"""What the README shows runs as it stands, and its numbers are those of the package."""

import re
from pathlib import Path

import torch
from torch import nn

import optimzoo
from tests.cases import bare

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(capsys):
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 32))
    for block in blocks("python"):
        opt = optimzoo.SWAN(model, lr=1e-3)
        model(torch.arange(4)).sum().backward()
        opt.step()
        with bare():
            exec(block, {"model": model, "optimzoo": optimzoo, "torch": torch, "opt": opt})
    assert "total" in capsys.readouterr().out


def test_both_commands_make_their_own_environment():
    run, check = (block.strip() for block in blocks("bash"))
    for command in (run, check):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert "\n" not in command
    assert "optimzoo compare recipes/quickstart.yaml" in run
    assert "pytest" in check


def test_bytes_a_weight_are_those_of_the_ledger():
    """The table's third column, for one 4096 x 4096 matrix in float32 and the classes' own defaults."""
    weight = 4096 * 4096
    with torch.device("meta"):
        p = nn.Parameter(torch.empty(4096, 4096))
    for name, said in re.findall(r"^\| `(\w+)` \| .*? \| ([\d.]+)", README, re.MULTILINE):
        cls = getattr(optimzoo, name)
        if not cls.needs_model:
            held = cls([("weight", p)]).memory().total / weight
            assert abs(held - float(said)) < 0.006, f"{name} holds {held:.3f} bytes a weight, README says {said}"
