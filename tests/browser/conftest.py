"""Fixtures that start a Chromium and JupyterLabs, and leave nothing behind.

With PARAKIT_SCREENSHOTS=FOLDER, tests keep pictures there; a failing test adds one of each page that it had open.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.jupyter_lab import CHROMIUM_FLAGS, Lab, Starter, labs
from tools import browser

KeepScreenshot = Callable[[Lab, str], None]
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_FAILED] = report.failed or item.stash.get(_FAILED, False)
    return report


@pytest.fixture
def chromium() -> Iterator[Browser]:
    """A browser for one test: about a second, and no process outlives the test.

    Without a browser the test fails rather than skips: skipped everywhere, it would prove nothing anywhere.
    """
    path = browser.find()
    if path is None:
        pytest.fail(browser.ADVICE)
    with sync_playwright() as playwright:
        # With scrollbars, as people have them: a panel that is too wide shows one.
        chromium = playwright.chromium.launch(
            executable_path=path, args=CHROMIUM_FLAGS, ignore_default_args=["--hide-scrollbars"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def keep_screenshot() -> KeepScreenshot:
    """Keep a picture of the page under this name, if somebody asked for pictures."""

    def keep(lab: Lab, name: str) -> None:
        if folder := os.environ.get("PARAKIT_SCREENSHOTS"):
            lab.screenshot(Path(folder) / f"{name}.png")

    return keep


@pytest.fixture
def start_lab(
    chromium: Browser, keep_screenshot: KeepScreenshot, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Starter]:
    """`start_lab(folder)` serves a folder of notebooks and gives the page; any number of times."""
    with labs(chromium, tmp_path) as start:
        opened: list[Lab] = []

        def start_and_note(folder: Path, env: dict[str, str] | None = None) -> Lab:
            opened.append(start(folder, env))
            return opened[-1]

        yield start_and_note
        if request.node.stash.get(_FAILED, False):
            for number, lab in enumerate(opened):
                keep_screenshot(lab, f"failed-{request.node.name}-{number}")
