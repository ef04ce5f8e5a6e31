"""Execute notebooks in place, at full size, and keep only what follows from their source.

Run by `make notebooks` before a commit. Pictures and text stay, so that a notebook can be read on GitHub; live widgets
go, because their state is lost with the kernel and malformed leftovers make GitHub refuse the whole notebook; timings
and the names of this machine go too. Executed twice, a notebook differs only in what it measured.
"""

import argparse
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_SECONDS = 600


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run every cell in a fresh kernel of this Python, with `folder` as its working folder."""
    # Whatever kernel name somebody's editor saved, ours is the one whose packages are known.
    notebook.metadata["kernelspec"] = dict(KERNEL)
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
    ).execute()


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove what would differ on another machine or day, and what no reader can see."""
    notebook.metadata = nbformat.from_dict({"kernelspec": dict(KERNEL), "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"  # random ids would change with every new notebook
        for name in ("execution", "collapsed", "scrolled", "trusted", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_without_widget, cell.outputs) if output is not None]


def _without_widget(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Drop an output with a live widget in it: what else it holds is the widget's `repr`, which says nothing."""
    return None if WIDGET_VIEW in output.get("data", {}) else output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    paths = parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb"))
    if not paths:
        sys.exit(f"No notebook in {FOLDER}")
    os.environ.pop("PARAKIT_SMALL", None)  # what readers see is the full size
    os.environ["PARAKIT_HANDS_FREE"] = "1"  # nobody is here to press a panel's buttons
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this Python, not one of the user's
    for path in paths:
        print(f"executing {path.name}", flush=True)
        notebook = nbformat.read(path, as_version=4)
        try:
            execute(notebook, path.resolve().parent)
        except CellExecutionError as error:
            sys.exit(f"{path.name} was left as it was; a cell failed:\n{error}")
        clean(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
