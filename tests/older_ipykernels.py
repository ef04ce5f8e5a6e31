"""The browser tests of the control room on older versions of ipykernel; not collected by pytest.

    python -m tests.older_ipykernels [version ...]

Makes a virtual environment for each version, which sees this one's packages but for ipykernel, and lets the notebooks
of the tests run in it. Versions differ in how they treat comm messages while a cell runs, and in where output of a
thread lands.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

VERSIONS = ("6.31.0", "7.3.0")
TESTS = "tests/browser/test_control_room.py"


def environment(folder: Path, version: str) -> Path:
    """A Python that has this ipykernel, and everything else from here."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", f"ipykernel=={version}"], check=True)
    # Behind its own packages, so that its own ipykernel comes first. addsitedir: editable installs are .pth files too.
    (packages / "rest.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    code = "import ipykernel, parakit; print(ipykernel.__version__)"
    seen = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert seen == version, f"ipykernel {seen} came first, not {version}"
    return python


def main(versions: list[str]) -> int:
    failed = 0
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "PARAKIT_KERNEL_PYTHON": str(environment(Path(folder) / "env", version))}
            began = time.perf_counter()
            command = [sys.executable, "-m", "pytest", TESTS, "-q", "-p", "no:logging"]
            done = subprocess.run(command, env=env, timeout=900)
        print(f"ipykernel {version}: {'passed' if done.returncode == 0 else 'FAILED'} "
              f"in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(VERSIONS)))
