"""Create or refresh .venv so that it holds exactly what `make lab` and `make test` need.

Run by `make setup` with whatever Python there is. Standard library only, and syntax that Python 3.8 understands, so
that an old interpreter can still say which one is needed.

A stamp says what .venv was made from. No stamp means that a set-up was interrupted, perhaps in the middle of a file,
so .venv is built from nothing; a stamp of another folder or another Python means that the paths inside are wrong, so
too; any other difference is installed on top. While nothing changed, this costs a fraction of a second.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

# Through realpath, or a clone reached by a symbolic link would look moved and be built twice.
ROOT = Path(os.path.realpath(__file__)).parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "parakit-setup.json"
LOG = VENV / "parakit-setup.log"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 5
RUNNING: set[subprocess.Popen[bytes]] = set()  # started here
INTERRUPTED = threading.Event()
PIECES = 4  # of the pinned packages, installed side by side: pip unpacks and compiles on one core

MINIMUM = (3, 11)
# The first one that works is taken: the user's own python3, then the tested ones, then newer ones.
CANDIDATES = ["python3", "python", "python3.13", "python3.12", "python3.11", "python3.14"]
# Each of these would make pip install somewhere else, or look like it had.
MISLEADING = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
# The base interpreter: a python3 on PATH may be that of an activated .venv, which is about to be removed.
DESCRIBE = (
    "import importlib.util as u, json, sys; path = getattr(sys, '_base_executable', None) or sys.executable; "
    "print(json.dumps([list(sys.version_info[:3]), path, u.find_spec('ensurepip') is not None]))"
)


class SetupError(Exception):
    """A command ended with an error."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="", help="interpreter to build .venv with (default: the first that fits)")
    asked_for = parser.parse_args().python
    stamp = read_stamp()
    usable = stamp.get("venv") == str(VENV) and runs(stamp)
    if usable and not asked_for:
        python, version = str(VENV_PYTHON), stamp["python"]
    else:
        python, version = find_python(asked_for)
    want = wanted(version)
    if usable and stamp == want:
        return
    started = time.monotonic()
    reusable = usable and stamp["python"] == version
    # From here until the new stamp is written, an interruption must lead to a build from nothing.
    STAMP.unlink(missing_ok=True)
    if not reusable:
        create(python, version)
    try:
        install(reusable)
    except SetupError:
        # What pip refused by itself leaves no half-written files: the next try may build on what is there.
        write_stamp(dict(want, files="set-up failed"))
        raise
    write_stamp(want)
    say(f"ready after {time.monotonic() - started:.0f} s")


def wanted(version: str) -> dict[str, str]:
    """Everything that makes an environment out of date when it changes."""
    digest = hashlib.sha256()
    for name in ("requirements.txt", "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    return {"venv": str(VENV), "python": version, "torch": TORCH, "files": digest.hexdigest()}


def read_stamp() -> dict[str, str]:
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
        return stamp if {"venv", "python"} <= set(stamp) else {}
    except (OSError, ValueError, TypeError):
        return {}


def write_stamp(stamp: dict[str, str]) -> None:
    STAMP.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def runs(stamp: dict[str, str]) -> bool:
    """Whether .venv still works: its base interpreter may have been upgraded or removed under it."""
    described = describe(str(VENV_PYTHON))
    return described is not None and described[0] == stamp.get("python")


def describe(command: str) -> tuple[str, str, bool] | None:
    """Version, path and presence of ensurepip of an interpreter, or None if it does not run."""
    try:
        # -I: no PYTHONPATH or user site; the answer must be the interpreter's own.
        done = subprocess.run([command, "-I", "-c", DESCRIBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        version, path, ensurepip = json.loads(done.stdout.decode())
    except (OSError, ValueError):
        return None
    return ".".join(map(str, version)), path, ensurepip


def find_python(asked_for: str) -> tuple[str, str]:
    """Path and version of the interpreter to build with; ends the program if there is none."""
    found = []
    for name in [asked_for] if asked_for else CANDIDATES:
        described = describe(name)
        if described is None:
            continue
        version, path, ensurepip = described
        if tuple(map(int, version.split(".")[:2])) < MINIMUM:
            found.append(f"{path}: Python {version}, too old")
        elif not ensurepip:
            short = ".".join(version.split(".")[:2])
            found.append(f"{path}: Python {version} without ensurepip (apt-get install python{short}-venv)")
        else:
            return path, version
    lines = ["parakit needs Python {}.{} or newer, with the venv module.".format(*MINIMUM)]
    lines += ["Found: " + "; ".join(dict.fromkeys(found)) if found else "Found none."]
    lines += ["Name one: make setup PYTHON=/path/to/python3.12"]
    sys.exit("\n".join(lines))


def create(python: str, version: str) -> None:
    say(f"creating .venv with Python {version} ({python})")
    shutil.rmtree(str(VENV), ignore_errors=True)
    run([python, "-m", "venv", str(VENV)])


def install(reusable: bool) -> None:
    """Install all side by side, as every version is pinned; pip's check then finds whatever would be missing."""
    say("installing the pinned packages" + ("" if reusable else ": some 400 MB, a few minutes the first time"))
    with tempfile.TemporaryDirectory() as folder:
        pieces = pieces_of_requirements(Path(folder))
        side_by_side(install_torch, *(functools.partial(pip, "--no-deps", "-r", str(piece)) for piece in pieces))
    # hatchling is pinned in requirements.txt; without isolation nothing that is not pinned gets fetched.
    pip("--no-deps", "--no-build-isolation", "--editable", ".")
    check = [str(VENV_PYTHON), "-m", "pip", "check"]
    if not run(check, check=False):  # other systems, and builds of torch for GPUs, need more than what is pinned
        pip("--constraint", "requirements.txt", "-r", "requirements.txt", "torch==" + TORCH)
        run(check)
    silence_news()


def side_by_side(*tasks: Callable[[], object]) -> None:
    """Do all, some at once. After an error nothing more is begun; an interrupt also ends what is going on."""
    with ThreadPoolExecutor(max(2, min(os.cpu_count() or 1, PIECES))) as side:
        doing = [side.submit(task) for task in tasks]
        try:
            for one in as_completed(doing):
                one.result()
        except BaseException as error:
            for one in doing:
                one.cancel()
            if not isinstance(error, SetupError):
                INTERRUPTED.set()
                for process in list(RUNNING):
                    process.terminate()
            raise


def pieces_of_requirements(folder: Path) -> list[Path]:
    """Files that hold the pinned packages among them."""
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    files = [folder / f"requirements-{number}.txt" for number in range(PIECES)]
    for number, file in enumerate(files):
        file.write_text("\n".join(lines[number::PIECES]) + "\n", encoding="utf-8")
    return files


def install_torch() -> None:
    if installed_torch() == TORCH:
        return
    if wants_cpu_build() and answers(CPU_INDEX + "/torch/"):
        say(f"installing torch {TORCH} for the CPU, some 200 MB")
        if pip("--no-deps", "--index-url", CPU_INDEX, f"torch=={TORCH}+cpu", check=False):
            return
    say(f"installing torch {TORCH} from the default registry")
    pip("--no-deps", "torch==" + TORCH)


def installed_torch() -> str:
    code = "from importlib.metadata import version; print(version('torch').split('+')[0])"
    done = subprocess.run([str(VENV_PYTHON), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.decode().strip()


def wants_cpu_build() -> bool:
    """Only on x86-64 Linux does the default registry serve a build with gigabytes of CUDA."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists())


def answers(url: str) -> bool:
    """Whether a host answers soon. pip itself would retry an unreachable one for minutes.

    A process of its own, because looking up a name has no time limit of its own.
    """
    code = "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=float(sys.argv[2])).close()"
    command = [str(VENV_PYTHON), "-c", code, url, str(PROBE_SECONDS)]
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=PROBE_SECONDS + 1).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def silence_news() -> None:
    """No question about Jupyter news in front of a learner's first notebook. Of this .venv only."""
    config = VENV / "etc" / "jupyter" / "labconfig" / "page_config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    disabled = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    config.write_text(json.dumps(disabled, indent=2) + "\n", encoding="utf-8")


def pip(*arguments: str, check: bool = True) -> bool:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--log", str(LOG)]
    return run([str(VENV_PYTHON), "-m", "pip", "install", *quiet, *arguments], check=check)


def run(command: list[str], check: bool = True) -> bool:
    """Run silently; what it said is shown only if it fails and that matters."""
    environment = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    process = subprocess.Popen(
        command, cwd=str(ROOT), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )  # fmt: skip
    RUNNING.add(process)
    if INTERRUPTED.is_set():  # whoever was to end it may have come too early
        process.terminate()
    try:
        said = process.communicate()[0]
    except BaseException:
        process.kill()
        raise
    finally:
        RUNNING.discard(process)
    if process.returncode and (check or INTERRUPTED.is_set()):
        end = "\n".join(said.decode(errors="replace").splitlines()[-15:])
        raise SetupError("{}\nSet-up failed at: {}\nDetails: {}".format(end, " ".join(command), LOG))
    return process.returncode == 0


def say(text: str) -> None:
    print("setup: " + text, flush=True)


if __name__ == "__main__":
    try:
        main()
    except SetupError as failure:
        sys.exit(str(failure))
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; the next one starts again from nothing")
