"""Find a Chromium for the browser tests, or install one.

`find()` looks in $PARAKIT_BROWSER, on PATH, in the usual places of macOS and among playwright's own downloads.
As a script (`make browser`) it also installs one where that needs no question: through apt-get as root, else through
playwright.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
APPLICATIONS = ("Google Chrome", "Chromium")
ADVICE = (
    "No Chromium or Chrome that runs was found, and the browser tests need one.\n"
    "Install chromium with the system's package manager, or run `.venv/bin/playwright install chromium`,\n"
    "or say where one is: PARAKIT_BROWSER=/path/to/chrome"
)


def find() -> str | None:
    """Path of the first Chromium that runs; $PARAKIT_BROWSER, if set, is the only one asked."""
    named = os.environ.get("PARAKIT_BROWSER")
    candidates = [named] if named else _candidates()
    return next((path for path in candidates if _runs(path)), None)


def _candidates() -> Iterator[str]:
    yield from filter(None, map(shutil.which, NAMES))
    for name in APPLICATIONS:
        path = Path(f"/Applications/{name}.app/Contents/MacOS/{name}")
        if path.exists():
            yield str(path)
    # Requested in a process of its own: playwright's API may not be started twice in one.
    code = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0 and Path(done.stdout.strip()).exists():
        yield done.stdout.strip()


def _runs(path: str) -> bool:
    """Some `chromium` are stubs that only advise to install a snap; those fail here."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def install() -> None:
    """Install a Chromium by the first way that is open to us; whether one worked is for `find` to say."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        # The font: without any, headless Chromium draws boxes instead of letters.
        packages = ["chromium", "fonts-dejavu-core"]
        if _run(["apt-get", "update", "-qq"], environment):
            _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], environment)
        if find():
            return
    _run([sys.executable, "-m", "playwright", "install", "chromium"], dict(os.environ))


def _run(command: list[str], environment: dict[str, str]) -> bool:
    print("browser:", *command, flush=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    """Make sure that there is a browser; exit with advice if there cannot be."""
    if find() is None and not os.environ.get("PARAKIT_BROWSER"):
        install()
    if find() is None:
        sys.exit(ADVICE)


if __name__ == "__main__":
    main()
