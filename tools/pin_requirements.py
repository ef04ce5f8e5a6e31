"""Write requirements.txt: the newest versions that fit pyproject.toml, with everything they need.

Run by `make pins`, which puts what Binder needs of them into binder/requirements.txt too. Resolved in an environment of
its own for the oldest supported Python, because a version that installs there is expected on the newer ones too; torch
is left out, its build depends on the machine.
"""

import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from itertools import chain
from pathlib import Path

import binder_requirements
from setup_environment import MINIMUM, ROOT, TORCH, VENV_PYTHON

TARGET = ROOT / "requirements.txt"
# What torch's builds bring along by themselves: it must not be asked of a machine without a GPU.
NOT_PINNED = ("torch==", "triton==", "nvidia-", "cuda-", "pip==", "wheel==", "parakit")
# Newer ones want Python 3.11.5, which pip on a later 3.11 does not notice, and Debian 12 has 3.11.2.
CAPPED = ("soupsieve<4",)


def wanted() -> list[str]:
    """Everything the project or one of its extras asks for, torch in the version of the set-up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    return [f"torch=={TORCH}", *CAPPED, *(name for name in asked if not name.startswith(("torch", "parakit")))]


def resolve(folder: Path) -> list[str]:
    """The whole set, as pip resolves it in a new environment."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(folder / VENV_PYTHON.parent.name / VENV_PYTHON.name), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", *wanted()], check=True)
    # --all: setuptools, which torch needs, is left out otherwise.
    frozen = subprocess.run([*pip, "freeze", "--all"], check=True, capture_output=True, text=True).stdout
    return sorted((line for line in frozen.splitlines() if not line.startswith(NOT_PINNED)), key=str.lower)


def main() -> None:
    if sys.version_info[:2] != MINIMUM:
        sys.exit("Pin with the oldest supported Python: make pins PYTHON=python{}.{}".format(*MINIMUM))
    header = [line for line in TARGET.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    with tempfile.TemporaryDirectory() as folder:
        pins = resolve(Path(folder))
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": folder}))
        binder_requirements.write(pins, packages)
    TARGET.write_text("\n".join([*header, *pins]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
