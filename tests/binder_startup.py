"""Do by hand what Binder does: a clean environment from binder/, postBuild, and every notebook through `start`.

Run with ``make binder``. Needs a package registry and a few minutes; prints how long each part took, and leaves nothing
behind. What it cannot show: Binder's operating system, its conda packages and its Docker image. Of the latter,
repo2docker says what it would build, which needs no Docker.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from setup_environment import CPU_INDEX, MISLEADING, answers  # noqa: E402

INSTALL_SECONDS = 900
NOTEBOOK_SECONDS = 300


class Trial:
    """A copy of the repository, an environment to install into, and a home for what programs keep."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.environment, self.home = (folder / name for name in ("repository", "venv", "home"))
        self.home.mkdir()
        foreign = (*MISLEADING, "JUPYTER", "PYTEST", "MAKE", "MFLAGS", "DASK_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.env = {
            **kept,
            "PATH": f"{self.environment / 'bin'}:{kept['PATH']}",
            "PARAKIT_SMALL": "1",
            "PARAKIT_HANDS_FREE": "1",  # nobody is there to press a button
            "JUPYTER_PREFER_ENV_PATH": "1",
        }

    def at_home(self) -> dict[str, str]:
        """The environment, with a home of its own; pip is better off with the user's, where its cache is."""
        places = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "IPYTHONDIR", "MPLCONFIGDIR")
        return {**{n: v for n, v in self.env.items() if n not in places}, "HOME": str(self.home)}

    def run(self, *command: str | Path, seconds: float, env: dict[str, str] | None = None) -> str:
        """Run in the copy, silently; what was said is shown if it fails."""
        done = subprocess.run(
            command,
            cwd=self.repository,
            env=env or self.env,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{done.stdout[-4000:]}\nFailed: {' '.join(map(str, command))}")
        return done.stdout

    def copy(self) -> None:
        """Copy what a commit of everything would hold."""
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # not what was deleted and not yet committed
                (self.repository / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.repository / name)

    def create(self) -> None:
        """Make an environment with the Python of runtime.txt."""
        name = (self.repository / "binder" / "runtime.txt").read_text(encoding="utf-8").strip().replace("-", "")
        if shutil.which(name) is None:
            sys.exit(f"Binder would run {name}; there is none on PATH.")
        self.run(name, "-m", "venv", self.environment, seconds=INSTALL_SECONDS)

    def install(self) -> None:
        """Install what Binder installs, or as near to it as the registries that answer allow."""
        requirements = self.repository / "binder" / "requirements.txt"
        if not answers(f"{CPU_INDEX}/torch/"):
            print(f"{CPU_INDEX} does not answer: torch comes from the default registry, in the same version.")
            lines = requirements.read_text(encoding="utf-8").replace("+cpu", "").splitlines(keepends=True)
            requirements = self.home / "requirements.txt"
            requirements.write_text("".join(line for line in lines if "index-url" not in line), encoding="utf-8")
        self.run("python", "-m", "pip", "install", "--quiet", "-r", requirements, seconds=INSTALL_SECONDS)
        self.run("python", "-m", "pip", "check", seconds=60)

    def after_build(self) -> None:
        """Run postBuild, and see that the notebooks will find the package that it installed."""
        self.run("binder/postBuild", seconds=INSTALL_SECONDS, env=self.at_home())
        where = "import parakit, sys; sys.exit(not parakit.__file__.startswith(sys.prefix))"
        self.run("python", "-I", "-c", where, seconds=60)

    def execute(self, notebook: Path) -> None:
        """Execute a notebook from top to bottom, through `start`; it is not written."""
        # The environment's own jupyter, in Binder's way: found on PATH.
        command = ("binder/start", "jupyter", "execute", f"--timeout={NOTEBOOK_SECONDS}", notebook)
        self.run(*command, seconds=2 * NOTEBOOK_SECONDS, env=self.at_home())

    def dockerfile(self) -> None:
        """Ask repo2docker what it would build; its packages go to an environment of their own."""
        tool = self.home / "repo2docker"
        self.run(sys.executable, "-m", "venv", tool, seconds=INSTALL_SECONDS)
        self.run(tool / "bin" / "pip", "install", "--quiet", "jupyter-repo2docker", seconds=INSTALL_SECONDS)
        # The user must be named: repo2docker refuses some that run it.
        arguments = ("--no-build", "--user-id", "1000", "--user-name", "jovyan", ".")
        said = self.run(tool / "bin" / "jupyter-repo2docker", *arguments, seconds=120)
        _, found, after = said.partition('install --no-cache-dir -r "binder/requirements.txt"')
        # In this order, or every edit of a notebook installs everything again.
        if not found or "COPY --chown=1000:1000 src/ " not in after or "RUN ./binder/postBuild" not in after:
            sys.exit(f"{said}\nrepo2docker would not build this as meant.")


def timed(name: str, action: Callable[[], None]) -> None:
    start = time.monotonic()
    action()
    print(f"{name:<40} {time.monotonic() - start:6.1f} s", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="parakit-binder-") as folder:
        trial = Trial(Path(folder))
        trial.copy()
        timed("environment", trial.create)
        timed("install", trial.install)
        timed("postBuild", trial.after_build)
        for notebook in sorted((trial.repository / "notebooks").glob("*.ipynb")):
            timed(notebook.name, lambda notebook=notebook: trial.execute(notebook))
        timed("repo2docker: what it would build", trial.dockerfile)


if __name__ == "__main__":
    main()
