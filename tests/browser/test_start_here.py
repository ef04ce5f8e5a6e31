"""The first notebook, run from top to bottom in a browser as a newcomer would."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.browser.conftest import KeepScreenshot
from tests.browser.jupyter_lab import Starter

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

NAME = "00_start_here.ipynb"
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / NAME


def test_all_cells_run_and_show_pictures(start_lab: Starter, keep_screenshot: KeepScreenshot, tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copy(NOTEBOOK, folder)
    lab = start_lab(folder, {"PARAKIT_SMALL": "1"})
    notebook = lab.open(NAME)

    notebook.run_all(seconds=180)

    keep_screenshot(lab, "start_here")
    assert notebook.images() >= 2
