"""Every notebook runs, and what is committed is what a reader on GitHub should see."""

from __future__ import annotations

import os
import re
import shutil
from itertools import chain
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tools.execute_notebooks import WIDGET_VIEW

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# A place that exists on one machine only: where someone's files or a virtual environment lie.
A_MACHINES_PATH = re.compile(
    r"(?<![\w/.])(?:/(?:home|Users|mnt|private|tmp|var/folders|workspaces?)/\w|~/\w|[A-Z]:\\\\?\w)"
    r"|site-packages|\.venv"
)

# These are run from top to bottom in a real browser: tests/browser.
RUN_IN_A_BROWSER = {"00_start_here", "01_control_room"}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    # Without any, the tests below would be collected as skipped and prove nothing.
    assert NOTEBOOKS, f"no notebook in {FOLDER}"


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem not in RUN_IN_A_BROWSER], ids=lambda path: path.stem
)
def test_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAKIT_SMALL", "1")
    monkeypatch.setenv("PARAKIT_HANDS_FREE", "1")  # nobody presses a panel's buttons
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this Python, not one of the user's
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    folder = tmp_path / "notebooks"
    shutil.copytree(FOLDER, folder)
    notebook = nbformat.read(folder / path.name, as_version=4)

    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()

    assert not [output for output in _outputs(notebook) if output.output_type == "error"]


@each_notebook
def test_is_committed_executed_from_top_to_bottom(path: Path) -> None:
    cells = [cell for cell in _read(path).cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@each_notebook
def test_is_committed_with_a_picture(path: Path) -> None:
    assert any("image/png" in output.get("data", {}) for output in _outputs(_read(path)))


@each_notebook
def test_is_committed_without_live_widgets(path: Path) -> None:
    notebook = _read(path)
    assert "widgets" not in notebook.metadata
    assert not [output for output in _outputs(notebook) if WIDGET_VIEW in output.get("data", {})]


@each_notebook
def test_is_committed_without_errors_and_warnings(path: Path) -> None:
    noise = [o for o in _outputs(_read(path)) if o.output_type == "error" or o.get("name") == "stderr"]
    assert noise == []


@each_notebook
def test_is_committed_without_paths_of_a_machine(path: Path) -> None:
    texts = list(chain.from_iterable(_texts(output) for output in _outputs(_read(path))))
    assert [text for text in texts if A_MACHINES_PATH.search(text) or str(Path.home()) in text] == []
    assert [text for text in texts if os.fspath(FOLDER.parent) in text] == []


def _read(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def _outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def _texts(output: NotebookNode) -> list[str]:
    """All that a reader could read in an output; pictures are left out, base64 may look like anything."""
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/p")}
    return [str(value) for value in data.values()] + [output.get("text", "")]
