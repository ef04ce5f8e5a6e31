"""The notebook about losses, as a reader uses it: start, kill a worker with the button, and read what became of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import KeepScreenshot
from tests.browser.jupyter_lab import Starter

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(240)]

NAME = "02_when_workers_die.ipynb"
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / NAME


def test_a_button_kills_a_worker_and_the_run_goes_on(
    start_lab: Starter, tmp_path: Path, keep_screenshot: KeepScreenshot
) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copy(NOTEBOOK, folder)
    lab = start_lab(folder, {"PARAKIT_SMALL": "0"})  # in its small form, the run would end too soon
    notebook = lab.open(NAME)
    cell = notebook.cell_with("room = pk.panel(model")
    for code in ("import os", "def kill_one", "recipe = dict", "room = pk.panel(model"):
        notebook.run_cell(notebook.cell_with(code))
    notebook.outputs(cell).first.scroll_into_view_if_needed()
    notebook.click_button("Start", cell=cell)
    notebook.wait_for_text("Training: 2 workers active", cell=cell)

    notebook.click_button("Kill a worker", cell=cell)
    notebook.wait_for_text("1 of 2 workers died: worker 0", cell=cell)
    notebook.wait_for_text("Going on from step", cell=cell)
    notebook.wait_for_text("2 workers again since step", cell=cell)  # the one that stood by has taken the place
    notebook.wait_for_text("Training: 2 workers active", cell=cell)
    keep_screenshot(lab, "when-workers-die")

    notebook.click_button("Stop", cell=cell)
    notebook.wait_for_text("Stopped after step", cell=cell)
    assert re.search(r"Worker 0 lost after step [\d,]+: 1 of 2 workers died: worker 0", notebook.text(cell))
    assert notebook.images(cell) == 1
    expect(notebook.outputs(cell).locator("button", has_text="Kill a worker")).to_have_count(1)  # the reader's own
    notebook.assert_no_errors()
