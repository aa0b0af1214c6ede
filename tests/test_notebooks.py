"""Every notebook runs from top to bottom in a fresh kernel, says nothing on stderr, and is committed without outputs.

What a notebook claims it asserts itself, so running it is the test; a cell that raises fails here with its traceback.
One takes half a minute as it is written, as it plans for billions of weights: by default it runs with an eighth of
them on an eighth of the card, and as written in the long profile.
"""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

import optimzoo

FOLDER = Path(__file__).parent.parent / "notebooks"
PICTURES = {"one_optimizer_by_hand": 1, "where_the_bytes_go": 4, "compare_on_one_page": 1, "will_it_fit": 2}
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EIGHTH = {
    "num_hidden_layers=32,": "num_hidden_layers=4,",
    "vocab_size=32000,": "vocab_size=4000,",
    "CARD = 24 * GIB": "CARD = 3 * GIB",
}
LESS = {"will_it_fit": EIGHTH}


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.fixture
def kernel_environment(monkeypatch, tmp_path):
    """The kernel is a process of its own: one thread, this checkout, pictures, and nothing in the home folder."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a reader's kernel chooses its own, which shows pictures
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    here = str(Path(optimzoo.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))))


def run(notebook, folder):
    """Execute all cells in `folder`; the first one that raises ends it with nbclient's CellExecutionError."""
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_no_notebook_is_missing():
    assert PICTURES.keys() <= {path.stem for path in NOTEBOOKS}


def with_less(path):
    """The notebook, with other numbers in the lines that say how much there is of everything."""
    notebook = read(path)
    for line, less in LESS[path.stem].items():
        (cell,) = (cell for cell in notebook.cells if line in cell.source)
        cell.source = cell.source.replace(line, less)
    return notebook


@pytest.mark.parametrize(
    ("path", "whole"),
    [
        *(pytest.param(path, path.stem not in LESS, id=path.stem) for path in NOTEBOOKS),
        *(pytest.param(FOLDER / f"{name}.ipynb", True, id=f"{name}-whole", marks=pytest.mark.long) for name in LESS),
    ],
)
def test_runs_and_shows_its_pictures(path, whole, kernel_environment):
    outputs = run(read(path) if whole else with_less(path), FOLDER)
    said = [output["text"] for output in outputs if output.output_type == "stream" and output["name"] == "stderr"]
    assert not said, f"{path.name} warns its readers: {said}"
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= PICTURES.get(path.stem, 1)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_clean(path):
    """Outputs would be stale the day after, and pictures make every clone larger."""
    cells = read(path).cells
    assert cells[0].cell_type == "markdown", "a notebook begins by saying what it is for"
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert not any(cell.metadata for cell in cells)


def test_the_commands_that_will_it_fit_names_save_what_its_plans_do():
    """Without a release nothing fits, so a command without one would answer another question; it takes minutes."""
    (text,) = (cell.source for cell in read(FOLDER / "will_it_fit.ipynb").cells if "optimzoo fit" in cell.source)
    commands = [line for line in text.splitlines() if line.startswith("optimzoo ")]
    assert [line.split()[1] for line in commands] == ["plan", "fit"]
    assert all({"--checkpointing", "--release"} <= set(line.split()) for line in commands)


def test_a_failing_cell_and_a_warning_are_seen(kernel_environment):
    """The two things that the tests above look for, in a notebook that does both."""
    cells = ["import warnings\nwarnings.warn('careful')", "assert 1 == 2, 'on purpose'", "print('never reached')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="on purpose"):
        run(notebook, FOLDER)
    (said,) = notebook.cells[0].outputs
    assert said["name"] == "stderr"
    assert "careful" in said["text"]
    assert not notebook.cells[2].outputs
