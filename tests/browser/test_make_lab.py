"""`make lab`, the command of the README: it opens the first notebook, and ends without leftovers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.conftest import KeepScreenshot
from tests.browser.jupyter_lab import Lab, LabServer, Notebook, isolated

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[LabServer]:
    """The very command, but on a free port and without the user's own Jupyter settings."""
    # The page's inner state is exposed so that the test can ask which document is open.
    command = ["make", "lab", "ARGS=--no-browser --port=0 --expose-app-in-browser"]
    server = LabServer(command, cwd=ROOT, env=isolated(tmp_path), log=tmp_path / "make-lab.log")
    yield server
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_opens_the_first_notebook_and_ends_on_a_signal(
    make_lab: LabServer, chromium: Browser, keep_screenshot: KeepScreenshot, number: signal.Signals
) -> None:
    assert make_lab.url.startswith("http://127.0.0.1:")  # nobody else on the network may run code here
    lab = Lab(make_lab, chromium)
    lab.page.goto(make_lab.url)
    Notebook(lab, "notebooks/00_start_here.ipynb").wait_until_idle()
    keep_screenshot(lab, "make_lab")

    make_lab.interrupt(number)
    # Python loses an interrupt that comes in the callback of a weak reference; a person would press the keys again.
    if make_lab.wait_until_gone(5):
        make_lab.interrupt(number)

    assert make_lab.wait_until_gone() == []
