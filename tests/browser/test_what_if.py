"""The sliders that ask "what if", moved in a browser: picture and words follow at once."""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
import pytest

from tests.browser.conftest import KeepScreenshot
from tests.browser.jupyter_lab import Notebook, Starter

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(180)]

CELL = """
import parakit as pk
from parakit.costs.model import CostModel

sliders = pk.what_if(CostModel(sample_seconds=1e-3, batch_size=256, nbytes=4e6, network="10GbE"), workers=64)
"""
SOON_SECONDS = 5.0


def picture(notebook: Notebook) -> str:
    found: str = notebook.outputs(0).locator("img").first.get_attribute("src") or ""
    return found


def test_a_slider_redraws_the_picture_and_the_words(
    start_lab: Starter, keep_screenshot: KeepScreenshot, tmp_path: Path
) -> None:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())])
    made.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(made, tmp_path / "what.ipynb")
    lab = start_lab(tmp_path, {})
    notebook = lab.open("what.ipynb")
    notebook.run_all()
    notebook.wait_for_text("Simulated, not measured", cell=0)
    before = picture(notebook)

    sliders = notebook.outputs(0).locator(".widget-slider")
    handle = sliders.filter(has_text="bandwidth").locator(".noUi-handle").first
    handle.focus()
    handle.press("PageDown")
    moved = time.monotonic()
    notebook.wait_for_text("times the samples/s of 64 workers as it is", cell=0, seconds=SOON_SECONDS)
    while picture(notebook) == before:
        assert time.monotonic() - moved < SOON_SECONDS
        lab.page.wait_for_timeout(50)
    keep_screenshot(lab, "what_if")

    notebook.click_button("As it is", cell=0)
    notebook.outputs(0).filter(has_text="of 64 workers as it is").first.wait_for(
        state="hidden", timeout=1000 * SOON_SECONDS
    )
    notebook.assert_no_errors()
