"""A JupyterLab of its own, driven through a real Chromium like a person would.

`LabServer` owns one server process in a folder of its own: none of the user's settings are read or written, and when
it stops, every process that came from it must be gone. `Lab` owns the browser page, `Notebook` the open document.
What a person would do with the mouse or the keyboard inside a widget is done so here; what only prepares the ground
(run all cells, wait) goes through JupyterLab's own commands, which do not get lost as a key press may.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from playwright.sync_api import Browser, Locator, Page, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeout

CHROMIUM_FLAGS = [
    "--no-sandbox",  # the sandbox needs privileges that containers and root do not have
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    # No traffic but the page's own: these would look for updates and accounts.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_SECONDS = 60
STOP_SECONDS = 20
_URL = re.compile(r"http://127\.0\.0\.1:\d+/lab\S*\?token=\w+")
_TOKEN = "PARAKIT_TEST_PROCESS"


def isolated(folder: Path) -> dict[str, str]:
    """Environment of a Jupyter that knows nothing about the user's own; all its state lies in `folder`."""
    places = {
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_DATA_DIR": folder / "data",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        "IPYTHONDIR": folder / "ipython",
        "MPLCONFIGDIR": folder / "matplotlib",
    }
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    _settings(
        folder / "settings",
        "apputils-extension/notification",
        {"fetchNews": "false", "checkForUpdates": False},
    )
    if python := os.environ.get("PARAKIT_KERNEL_PYTHON"):
        _kernel(folder / "data", python)
    # Opened notebooks may be the committed ones: nothing is written unless a test says so.
    _settings(folder / "settings", "docmanager-extension/plugin", {"autosave": False})
    # Virtual scrolling takes cells out of the page; tests want to see all of them.
    _settings(folder / "settings", "notebook-extension/tracker", {"windowingMode": "none"})
    # The outer make's flags would reach an inner make.
    foreign = ("JUPYTER", "PYTEST", "MAKE", "MFLAGS")
    keep = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    prefer = "0" if "PARAKIT_KERNEL_PYTHON" in os.environ else "1"
    return {**keep, **{name: str(place) for name, place in places.items()}, "JUPYTER_PREFER_ENV_PATH": prefer}


def _kernel(data: Path, python: str) -> None:
    """Let notebooks run in another Python than the server's."""
    path = data / "kernels" / "python3" / "kernel.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    path.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}), encoding="utf-8")


def _settings(folder: Path, plugin: str, values: Mapping[str, object]) -> None:
    path = folder / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


class LabServer:
    """A command that serves JupyterLab, and all processes that come from it.

    Every descendant inherits a random variable in its environment, which finds it even when it has left the process
    group and its parents are gone: kernels and Dask workers do both.
    """

    def __init__(self, command: list[str], *, cwd: Path, env: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._mark = uuid.uuid4().hex
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**env, _TOKEN: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a signal can reach the whole group, as Ctrl-C in a terminal does
            )

    @classmethod
    def in_folder(cls, folder: Path, state: Path, env: Mapping[str, str] | None = None) -> LabServer:
        """Serve the notebooks of a folder, keeping Jupyter's own state in another one."""
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0"]
        command += ["--expose-app-in-browser", f"--ServerApp.root_dir={folder}"]
        command += ["--allow-root"] if os.getuid() == 0 else []
        return cls(command, cwd=folder, env={**isolated(state), **(env or {})}, log=state / "server.log")

    @property
    def url(self) -> str:
        """The URL with its token that the server printed; waits until it did."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if match := _URL.search(self.log.read_text(encoding="utf-8", errors="replace")):
                return match.group()
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        state = self.process.poll()
        raise AssertionError(f"no server after {START_SECONDS} s, exit code {state}:\n{self.log_end()}")

    def log_end(self, characters: int = 3000) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-characters:]

    def living(self) -> list[psutil.Process]:
        """All processes that came from the command and still run."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_TOKEN) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Send a signal to the whole group, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait_until_gone(self, seconds: float = STOP_SECONDS) -> list[psutil.Process]:
        """Wait for the command and all its descendants; return those that are still there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (self.process.poll() is None or self.living()):
            time.sleep(0.1)
        return self.living()

    def stop(self) -> None:
        """Ask politely, then make sure; that force was needed for anything is an error."""
        if self.process.poll() is None:
            self.interrupt(signal.SIGTERM)
        described = []
        for process in self.wait_until_gone():
            with suppress(psutil.NoSuchProcess):
                described.append(" ".join(process.cmdline())[:200])
                process.kill()
        self.process.wait()
        assert not described, f"still running {STOP_SECONDS} s after SIGTERM: {described}\n{self.log_end()}"


class Lab:
    """JupyterLab in a browser page."""

    def __init__(self, server: LabServer, browser: Browser) -> None:
        self.server = server
        self.context = browser.new_context(viewport={"width": 1280, "height": 1600})
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.problems: list[str] = []  # JavaScript exceptions nobody caught
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))

    def open(self, name: str, *, seconds: float = 60) -> Notebook:
        """Open a notebook of the served folder and wait until its kernel is idle."""
        self.page.goto(self.server.url.replace("/lab?", f"/lab/tree/{name}?"))
        notebook = Notebook(self, name)
        notebook.wait_until_idle(seconds)
        return notebook

    def screenshot(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)
        return path

    def close(self) -> None:
        self.context.close()


class Notebook:
    """The open notebook; cells are numbered from 0, markdown cells included."""

    # The document as JupyterLab sees it, or undefined while it is still loading.
    _PANEL = "window.jupyterapp?.shell.currentWidget"

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.page: Page = lab.page
        self.name = name

    # Waiting -----------------------------------------------------------------------------------------------------

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Wait until this notebook is in front, all its cells are there and its kernel is idle."""
        ready = f"""name => {{
            const panel = {self._PANEL};
            return panel?.context?.path === name && panel.context.isReady && panel.content?.widgets.length > 0
                && panel.sessionContext.isReady && panel.sessionContext.session?.kernel?.status === "idle";
        }}"""
        try:
            self.page.wait_for_function(ready, arg=self.name, timeout=seconds * 1000)
        except PlaywrightTimeout:
            raise AssertionError(
                f"{self.name} has no idle kernel after {seconds} s; the server says:\n{self.lab.server.log_end()}"
            ) from None

    def run_all(self, seconds: float = 120) -> None:
        """Run all cells and wait for the last; an error in one stops the rest and fails here."""
        self._run("notebook:run-all-cells", seconds)
        self.assert_no_errors()
        waiting = self._evaluate("panel.content.widgets.filter(c => c.promptNode?.innerText.includes('*')).length")
        assert waiting == 0, f"{waiting} cells were never run"

    def run_cell(self, index: int, seconds: float = 60) -> None:
        """Run one cell and wait for its end; a background thread that it started may go on."""
        self._evaluate(f"panel.content.activeCellIndex = {index}")
        self._run("notebook:run-cell", seconds)

    def _run(self, command: str, seconds: float) -> None:
        self._evaluate(
            f"window.parakitDone = false, jupyterapp.commands.execute('{command}')"
            ".finally(() => { window.parakitDone = true; }), null"
        )
        try:
            self.page.wait_for_function("() => window.parakitDone", timeout=seconds * 1000)
        except PlaywrightTimeout:
            raise AssertionError(f"{self.name} after {seconds} s: {self._stuck_cell()}") from None

    def _stuck_cell(self) -> str:
        """Which cell is running: the first of those with a star, the others are waiting for it."""
        found = self._evaluate(
            "panel.content.widgets.map((cell, i) => [i, cell.promptNode?.innerText ?? '',"
            " cell.model.sharedModel.getSource()]).filter(x => x[1].includes('*'))[0] ?? null"
        )
        if found is None:
            return "no cell is running, but the command did not end"
        index, _, source = found
        return f"cell {index} is still running:\n{source}"

    # Reading -----------------------------------------------------------------------------------------------------

    def outputs(self, cell: int | None = None) -> Locator:
        """The output areas of one cell or of all."""
        scope = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook")
        if cell is not None:
            scope = scope.locator(".jp-Cell").nth(cell)
        return scope.locator(".jp-OutputArea-output")

    def text(self, cell: int | None = None) -> str:
        """What a person can read in the outputs, live widgets included."""
        return "\n".join(self.outputs(cell).all_inner_texts())

    def wait_for_text(self, text: str, *, cell: int | None = None, seconds: float = 60) -> None:
        """Wait until some output says this."""
        expect(self.outputs(cell).filter(has_text=text).first).to_be_visible(timeout=seconds * 1000)

    def images(self, cell: int | None = None) -> int:
        """Number of pictures in the outputs that the browser could draw."""
        count = "images => images.filter(image => image.complete && image.naturalWidth > 1).length"
        found: int = self.outputs(cell).locator("img").evaluate_all(count)
        return found

    def assert_no_errors(self) -> None:
        errors = self._evaluate(
            "panel.content.widgets.flatMap((cell, i) => (cell.model.outputs?.toJSON() ?? [])"
            ".filter(o => o.output_type === 'error')"
            ".map(o => `cell ${i}: ${o.ename}: ${o.evalue}`))"
        )
        assert not errors, "\n".join(errors)
        # What JupyterLab shows in place of a widget that it cannot find or draw.
        text = self.text()
        for sentence in ("Error displaying widget", "Error creating widget", "Loading widget..."):
            assert sentence not in text, f"{sentence!r} in the outputs of {self.name}"
        assert not self.lab.problems, self.lab.problems

    # Acting ------------------------------------------------------------------------------------------------------

    def click_button(self, label: str, *, cell: int | None = None) -> None:
        """Click the ipywidgets button that says this."""
        self.outputs(cell).get_by_role("button", name=label, exact=True).first.click()

    def move_slider(self, label: str, value: int, *, cell: int | None = None) -> None:
        """Move the IntSlider with this description by arrow keys, one step a key, until it shows the value."""
        slider = self.outputs(cell).locator(".widget-slider").filter(has_text=label).first
        handle = slider.locator(".noUi-handle").first
        readout = slider.locator(".widget-readout")
        handle.focus()
        for _ in range(200):
            shown = int(readout.inner_text())
            if shown == value:
                return
            handle.press("ArrowRight" if shown < value else "ArrowLeft")
        raise AssertionError(f"slider {label!r} does not reach {value}; it shows {readout.inner_text()}")

    def save(self) -> None:
        """Write the notebook, outputs included, to its file."""
        self._evaluate("panel.context.save()")

    def interrupt(self) -> None:
        """Interrupt the kernel, as its button does."""
        self._evaluate("panel.sessionContext.session.kernel.interrupt()")

    def restart(self) -> None:
        """Restart the kernel, as its button does after the question."""
        self._evaluate("panel.sessionContext.session.kernel.restart()")

    def cell_with(self, code: str) -> int:
        """The number of the first cell that contains this text."""
        found = self._evaluate(
            f"panel.content.widgets.findIndex(c => c.model.sharedModel.getSource().includes({json.dumps(code)}))"
        )
        assert isinstance(found, int)
        assert found >= 0, f"no cell of {self.name} contains {code!r}"
        return found

    def _evaluate(self, expression: str) -> object:
        """Evaluate JavaScript in which `panel` is this notebook's panel; promises are awaited."""
        return self.page.evaluate(f"() => {{ const panel = {self._PANEL}; return ({expression}); }}")


Starter = Callable[..., Lab]


@contextmanager
def labs(browser: Browser, state: Path) -> Iterator[Starter]:
    """Start any number of JupyterLabs; at the end each is closed, whatever happened to the others."""
    started: list[tuple[LabServer, Lab]] = []

    def start(folder: Path, env: Mapping[str, str] | None = None) -> Lab:
        place = state / f"jupyter-{len(started)}"
        place.mkdir()
        server = LabServer.in_folder(folder, place, env)
        lab = Lab(server, browser)
        started.append((server, lab))
        return lab

    try:
        yield start
    finally:
        failures: list[Exception] = []
        for server, lab in started:
            for end in (lab.close, server.stop):
                try:
                    end()
                except Exception as failure:
                    failures.append(failure)
        if failures:
            raise ExceptionGroup("JupyterLab did not end cleanly", failures)
