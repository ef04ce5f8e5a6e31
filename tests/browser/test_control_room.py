"""The control room as a person uses it: press, drag, look, save, and misuse."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from playwright.sync_api import Browser, expect

from tests.browser.conftest import KeepScreenshot
from tests.browser.jupyter_lab import Lab, Notebook, Starter
from tools.execute_notebooks import WIDGET_VIEW

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SETUP = """
import torch, parakit as pk
from torch import nn
digits = pk.datasets.digits()
workers = pk.connect(2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
"""
PANEL = "room = pk.panel(model, digits.train, on=workers, workers=1, batch_size=256, epochs=20000)"
STEP = re.compile(r"step ([\d,]+)/")


def write(folder: Path, *cells: str) -> str:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    # Without a kernel's name, JupyterLab would ask for one.
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "room.ipynb")
    return "room.ipynb"


def step_of(notebook: Notebook, cell: int) -> int:
    found = STEP.search(notebook.text(cell))
    return int(found[1].replace(",", "")) if found else 0  # "starting"


def wait_for_steps(notebook: Notebook, cell: int, more: int = 1, seconds: float = 30) -> None:
    first, deadline = step_of(notebook, cell), time.monotonic() + seconds
    while step_of(notebook, cell) < first + more:
        assert time.monotonic() < deadline, f"still at step {first} after {seconds} s"
        notebook.page.wait_for_timeout(100)


def row_of(notebook: Notebook, cell: int, workers: str) -> list[str]:
    """The cells of the table's row for a worker count, or for plain PyTorch; none while there is no such row."""
    # From the start of the name: the row of plain PyTorch also has a number, that of its cores.
    name = re.compile(rf"^{re.escape(workers)}(?!\d)")
    row = notebook.outputs(cell).locator("tbody tr").filter(has=notebook.page.locator("td:first-child", has_text=name))
    return row.first.locator("td").all_inner_texts() if row.count() else []


def wait_for_speedup(notebook: Notebook, cell: int, workers: str, seconds: float = 40) -> float:
    """The speedup that the table shows for a worker count, once it does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        texts = row_of(notebook, cell, workers)
        if len(texts) > 2 and (found := re.match(r"([\d.]+)×", texts[2])):
            return float(found[1])
        notebook.page.wait_for_timeout(100)
    raise AssertionError(f"no speedup for {workers} after {seconds} s:\n{notebook.text(cell)}")


TOO_WIDE = """outputs => outputs.flatMap(output => [output, ...output.querySelectorAll("*")])
    .filter(e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth)
    .map(e => `${e.tagName}.${e.className}: ${e.scrollWidth} > ${e.clientWidth}`)"""


def assert_fits(notebook: Notebook, cell: int, *widths: int) -> None:
    """A panel needs no horizontal scrollbar in a window of any of these widths."""
    for width in widths:
        notebook.page.set_viewport_size({"width": width, "height": 1600})
        notebook.page.wait_for_timeout(300)
        found = notebook.outputs(cell).evaluate_all(TOO_WIDE)
        assert not found, (width, found)


@pytest.mark.parametrize(
    ("names", "asked", "found"),
    [(["1", "plain PyTorch, 2 cores"], "2", None), (["1", "2", "12"], "2", "2"), (["1", "2", "3*"], "3", "3*"),
     (["1", "plain PyTorch, 2 cores?"], "plain PyTorch", "plain PyTorch, 2 cores?")],
)  # fmt: skip
def test_a_row_is_found_by_its_own_count(chromium: Browser, names: list[str], asked: str, found: str | None) -> None:
    page = chromium.new_page()
    rows = "".join(f"<tr><td>{name}</td><td>7</td></tr>" for name in names)
    page.set_content(f"<div><table><tbody>{rows}</tbody></table></div>")
    shown = SimpleNamespace(page=page, outputs=lambda cell: page.locator("div"))
    assert row_of(shown, 0, asked) == ([found, "7"] if found else [])


def test_a_person_resizes_pauses_stops_and_keeps_the_picture(
    start_lab: Starter, tmp_path: Path, keep_screenshot: KeepScreenshot
) -> None:
    folder = tmp_path / "notebooks"
    shutil.copytree(NOTEBOOKS, folder)
    lab = start_lab(folder, {"PARAKIT_SMALL": "0"})  # in its small form, the run would end too soon
    notebook = lab.open("01_control_room.ipynb")
    notebook.run_all()
    cell = notebook.cell_with("room = pk.panel(small_model")
    notebook.outputs(cell).first.scroll_into_view_if_needed()

    assert_fits(notebook, cell, 1100)
    before = height(notebook, cell)
    notebook.click_button("Start", cell=cell)
    notebook.wait_for_text("Timing plain PyTorch; training waits: 2 workers asked for, 1 active", cell=cell)
    assert wait_for_speedup(notebook, cell, "1") == 1.0  # relative to itself
    assert wait_for_speedup(notebook, cell, "plain PyTorch") > 0
    notebook.wait_for_text("Training: 2 workers active", cell=cell)
    assert wait_for_speedup(notebook, cell, "2") > 0
    assert notebook.images(cell) == 1
    keep_screenshot(lab, "control-room-two")
    assert abs(height(notebook, cell) - before) < 3  # nothing jumped
    assert_fits(notebook, cell, 1000, 1100, 1280)

    notebook.move_slider("Workers", 1, cell=cell)
    notebook.wait_for_text("Training: 1 worker active", cell=cell)
    notebook.wait_for_text("1 worker since step", cell=cell)
    keep_screenshot(lab, "control-room-one")
    notebook.move_slider("Workers", 2, cell=cell)
    notebook.wait_for_text("Training: 2 workers active", cell=cell)

    notebook.click_button("Pause", cell=cell)
    notebook.wait_for_text("Paused: 2 workers active", cell=cell)
    lab.page.wait_for_timeout(600)
    stood = step_of(notebook, cell)
    lab.page.wait_for_timeout(1500)
    assert step_of(notebook, cell) == stood
    notebook.click_button("Resume", cell=cell)
    notebook.wait_for_text("Training: 2 workers active", cell=cell)
    wait_for_steps(notebook, cell)

    notebook.click_button("Stop", cell=cell)
    notebook.wait_for_text("Stopped after step", cell=cell)
    expect(notebook.outputs(cell).locator("button")).to_have_count(0)
    assert notebook.images(cell) == 1
    keep_screenshot(lab, "control-room-ended")

    # The other panel was never started; closed, it leaves nothing that a reader's Jupyter could not show.
    heavy = notebook.cell_with("heavy_room = pk.panel(")
    notebook.click_button("Close", cell=heavy)
    notebook.wait_for_text("closed before a run was started", cell=heavy)
    notebook.save()
    saved = nbformat.read(folder / "01_control_room.ipynb", as_version=4)
    kinds = {kind for output in saved.cells[cell].outputs for kind in output.get("data", {})}
    assert "image/png" in kinds
    assert WIDGET_VIEW not in {k for c in saved.cells for o in c.get("outputs", []) for k in o.get("data", {})}
    lab.page.reload()
    notebook.wait_until_idle()
    assert notebook.images(cell) == 1
    notebook.wait_for_text("speedup: over 1 worker of this run", cell=cell)
    notebook.assert_no_errors()


def test_the_keyboard_alone_is_enough(start_lab: Starter, tmp_path: Path) -> None:
    lab = start_lab(tmp_path)
    notebook = lab.open(write(tmp_path, SETUP, PANEL))
    notebook.run_all()
    lab.page.keyboard.press("Escape")
    notebook.outputs(1).locator(".noUi-handle").first.focus()
    visited = press_tab_until(lab, "Start")
    # Every control that can be used has a name and is on the way.
    for name in ("number of workers", "Learning rate", "Strategy", "Batch size", "Epochs"):
        assert any(name in there for there in visited), (name, visited)
    lab.page.keyboard.press("Enter")
    notebook.wait_for_text("Training: 1 worker active", cell=1)
    press_tab_until(lab, "Visit every worker count")
    lab.page.keyboard.press("Space")
    notebook.wait_for_text("Visiting every worker count: ", cell=1)
    assert wait_for_speedup(notebook, 1, "2") > 0
    notebook.outputs(1).locator(".noUi-handle").first.focus()
    press_tab_until(lab, "Close")
    lab.page.keyboard.press("Enter")
    notebook.wait_for_text("so its run was stopped", cell=1)


def height(notebook: Notebook, cell: int) -> float:
    """How much of the page a panel takes."""
    box = notebook.outputs(cell).first.bounding_box()
    assert box is not None
    return box["height"]


def press_tab_until(lab: Lab, name: str, most: int = 20) -> list[str]:
    """Press Tab until a control with this name has the focus; returns the names on the way."""
    asked = (
        "() => { const e = document.activeElement; return (e.labels?.[0] ?? e).innerText || e.title || e.className; }"
    )
    names = []
    for _ in range(most):
        lab.page.keyboard.press("Tab")
        names.append(str(lab.page.evaluate(asked)))
        if names[-1].strip() == name:
            return names
    raise AssertionError(f"Tab does not reach {name!r}: {names}")


def test_the_cell_again_an_interrupt_and_a_restart(start_lab: Starter, tmp_path: Path) -> None:
    lab = start_lab(tmp_path)
    notebook = lab.open(write(tmp_path, SETUP, PANEL, "first = room.run; print('first', first.status)", "1 + 1"))
    notebook.run_cell(0)
    notebook.run_cell(1)
    notebook.click_button("Start", cell=1)
    notebook.wait_for_text("Training: 1 worker active", cell=1)
    notebook.run_cell(2)

    # Executed again, the cell loses its panel, and so its run: nobody could reach it any more.
    notebook.run_cell(1)
    notebook.run_cell(2)
    notebook.wait_for_text("its run stopped at step", cell=1)
    notebook.click_button("Start", cell=1)
    notebook.wait_for_text("Training: 1 worker active", cell=1)

    # An interrupt is meant for a cell; the run is in no cell, and goes on.
    notebook.interrupt()
    lab.page.wait_for_timeout(1000)
    wait_for_steps(notebook, 1, more=100)
    notebook.move_slider("Workers", 2, cell=1)
    notebook.wait_for_text("Training: 2 workers active", cell=1)

    before = {process.pid for process in lab.server.living()}
    notebook.restart()
    notebook.wait_until_idle()
    deadline = time.monotonic() + 20
    while len(left := before & {process.pid for process in lab.server.living()}) > 1:
        assert time.monotonic() < deadline, f"{len(left)} processes outlive their kernel"
        time.sleep(0.2)
    notebook.run_cell(0)
    notebook.run_cell(1)
    notebook.click_button("Start", cell=1)
    notebook.wait_for_text("Training: 1 worker active", cell=1)
    notebook.click_button("Close", cell=1)
    notebook.wait_for_text("so its run was stopped", cell=1)


def test_two_panels_on_one_run_and_a_pool_that_closes(start_lab: Starter, tmp_path: Path) -> None:
    lab = start_lab(tmp_path)
    notebook = lab.open(
        write(
            tmp_path, SETUP, "run = pk.train(model, digits.train, on=workers, epochs=20000)", "one = pk.panel(run)",
            "two = pk.panel(run)", "other = pk.panel(model, digits.train, on=workers)", "workers.close()",
            "pk.panel(run)",
        )
    )  # fmt: skip
    for cell in range(5):
        notebook.run_cell(cell)
    notebook.wait_for_text("A newer panel took its place; the run goes on", cell=2)
    notebook.wait_for_text("Training: 2 workers active", cell=3)

    notebook.click_button("Start", cell=4)
    notebook.wait_for_text("This pool is busy", cell=4)

    notebook.run_cell(5)
    notebook.wait_for_text("Stopped after step", cell=3)
    expect(notebook.outputs(3).locator("button")).to_have_count(0)
    notebook.click_button("Start", cell=4)
    notebook.wait_for_text("This pool is closed", cell=4)
    notebook.run_cell(6)
    notebook.wait_for_text("Stopped after step", cell=6)
    assert notebook.images(6) == 1
    notebook.click_button("Close", cell=4)
