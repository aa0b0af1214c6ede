"""The rules that hold the tree together: who may import whom, what the top level holds, what a reader is told."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optimzoo
from optimzoo.registry import optimizers

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "optimzoo").rglob("*.py"))
MAY_IMPORT = {
    "functional": {"functional"},
    "memory": {"memory"},
    "core": {"core", "functional", "memory"},
    "optimizers": {"core", "functional"},
    "modules": {"modules", "functional", "memory", "core.layers", "core.hyper"},
    "training": {"training", "planning", "registry", "core", "modules", "memory"},
    "planning": {"registry", "core", "memory"},
    "integrations": {"integrations", "registry", "core", "memory"},
    "registry": {"core", "optimizers"},
    "bench": {"bench", "training", "core", "functional", "memory"},
    "cli": {"training", "registry", "modules", "memory", "core", "bench"},
    "__init__": {"core", "functional", "memory", "modules", "optimizers", "planning", "registry"},
    "__main__": {"cli"},
}
CORE_NEEDS = {"torch", "numpy", "einops"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether importing the file imports it) of every import, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name, id(node) in top) for name in (names if node.module == "optimzoo" else [node.module])]
    return found


def part(path: Path) -> str:
    return path.relative_to(ROOT / "optimzoo").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_law(path):
    allowed = MAY_IMPORT[part(path)]
    for name, _ in imports(path):
        if name.startswith("optimzoo."):
            inner = name.removeprefix("optimzoo.")
            if part(path) == "optimizers" and inner.startswith("optimizers."):
                pytest.fail(f"{path.name} imports another optimizer")
            assert any(inner == a or inner.startswith(f"{a}.") for a in allowed), f"{path.name} may not import {name}"
        if part(path) == "optimizers":
            assert not name.startswith(("torch.distributed", "torch._dynamo")), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_and_public_name_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "no module docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 6
            assert ast.get_docstring(node) or short or part(path) in ("training", "cli"), (
                f"{node.name} has no docstring"
            )


def test_the_core_needs_three_packages_only():
    """In a process of its own: everything else is imported when it is used."""
    code = (
        "import sys, optimzoo\n"
        "heavy = {'transformers', 'datasets', 'pydantic', 'yaml', 'typer', 'rich', 'matplotlib', 'wandb', 'scipy'}\n"
        "heavy |= {'safetensors', 'peft', 'accelerate', 'lightning'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for path in SOURCES:
        if part(path) not in ("training", "bench", "cli", "__main__", "integrations"):
            for name, on_import in imports(path):
                package = name.split(".")[0]
                known = package in CORE_NEEDS | {"optimzoo"} or package in sys.stdlib_module_names
                kernel = package == "triton" and path.name.startswith("triton_")  # imported where it runs
                assert known or kernel or not on_import, f"{path.name} imports {name} at the top"


def test_the_top_level_is_what_it_should_be():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listing.stdout.splitlines()
    folders = {"optimzoo", "recipes", "tests", "notebooks", ".ci"}
    files = {"setup.cfg", "CHANGELOG.md", "README.md", "LICENSE", "pyproject.toml", "constraints.txt", ".gitignore"}
    assert {name.split("/")[0] for name in tracked} <= folders | files


def test_public_names_exist_and_are_described():
    for name in optimzoo.__all__:
        assert getattr(optimzoo, name).__doc__, name
    for name, cls in optimizers().items():
        assert getattr(optimzoo, cls.__name__) is cls, f"{name} is not public"


def test_readme_lists_every_optimizer():
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    for cls in optimizers().values():
        line = next((line for line in table if line.startswith(f"| `{cls.__name__}`")), None)
        assert line, f"README's table lacks {cls.__name__}"
        assert re.search(r"\d{4}\.\d{5}", cls.paper).group() in line


def test_optimizer_files_stay_short():
    for path in (ROOT / "optimzoo" / "optimizers").glob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 200, f"{path.name} has {lines} lines: maths belongs in functional/, mechanics in core/"
