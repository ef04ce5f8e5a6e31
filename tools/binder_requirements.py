"""Write binder/requirements.txt: what Binder installs, in the versions of requirements.txt.

Run by `make pins`; by itself it renews the file from the pins and the metadata that are here already. Binder gets what
the package and the build of it need, with the extras a learner uses, and not what only tests need. Every version is
exact and nothing refers to this folder, so that repo2docker can install before it copies the repository: an edit of a
notebook then does not install PyTorch again.
"""

import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setup_environment import CPU_INDEX, ROOT, TORCH

PINS = ROOT / "requirements.txt"
TARGET = ROOT / "binder" / "requirements.txt"
EXTRAS = ("notebook",)
# Binder's machines, whatever this one is; the Python is that of binder/runtime.txt.
MACHINE = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.14",
    "python_version": "3.11",
    "sys_platform": "linux",
}
HEADER = f"""\
# What Binder installs: PyTorch's small CPU build, and what parakit needs of the root's requirements.txt, in the same
# versions. Written by `make pins`.
--extra-index-url {CPU_INDEX}
torch=={TORCH}+cpu
"""


def wanted() -> list[Requirement]:
    """What pyproject.toml asks for, the builder included: postBuild installs without fetching one."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, optional = settings["project"], settings["project"]["optional-dependencies"]
    asked = [*project["dependencies"], *settings["build-system"]["requires"]]
    return [Requirement(text) for text in [*asked, *(text for extra in EXTRAS for text in optional[extra])]]


def needed(requirement: Requirement, metadata: Mapping[str, list[str]]) -> Iterator[Requirement]:
    """What a requirement's package needs on Binder's machines, for itself and for the extras asked of it."""
    for text in metadata[canonicalize_name(requirement.name)]:
        found = Requirement(text)
        extras = ("", *requirement.extras)
        if found.marker is None or any(found.marker.evaluate({**MACHINE, "extra": extra}) for extra in extras):
            yield found


def closure(metadata: Mapping[str, list[str]]) -> set[str]:
    """Names of everything that what is wanted needs, as far as there is metadata."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = wanted()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in metadata and (key := (name, frozenset(requirement.extras))) not in seen:
            seen.add(key)
            waiting.extend(needed(requirement, metadata))
    return {name for name, _ in seen}


def installed(folder: Path) -> dict[str, list[str]]:
    """What each package in a site-packages folder says that it needs."""
    return {canonicalize_name(found.name): found.requires or [] for found in distributions(path=[str(folder)])}


def render(pins: list[str], folder: Path) -> str:
    """The file: those of the pins that Binder needs, by the metadata in a site-packages folder."""
    names = closure(installed(folder))
    return HEADER + "".join(f"{pin}\n" for pin in pins if canonicalize_name(pin.split("==")[0]) in names)


def write(pins: list[str], folder: Path) -> None:
    TARGET.write_text(render(pins, folder), encoding="utf-8")


def main() -> None:
    pins = [line for line in PINS.read_text(encoding="utf-8").splitlines() if "==" in line]
    write(pins, Path(sysconfig.get_path("purelib")))


if __name__ == "__main__":
    main()
