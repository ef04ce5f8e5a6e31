"""The shape of the package: which way imports point, who may import what, and what names a module offers."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import parakit as pk

ROOT = Path(__file__).resolve().parents[1]

# A room imports only rooms above it in this list, and inside a room nothing goes round in a circle. A module that lies
# beside the rooms is a room of its own.
ROOMS = (
    "errors", "trees", "tensor_layout", "formatting", "validation", "pacing", "datasets",
    "system", "serialization", "failures", "model_state", "data", "losses", "gradients", "exactness",
    "events", "checkpoints", "collectives", "engines", "preflight", "costs", "strategies", "workers",
    "baselines", "runs", "scaling", "plots", "display", "widgets", "",
)  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((ROOT / "parakit").rglob("*.py"))}


@functools.cache
def imports(module: str) -> set[str]:
    """What a module imports, anywhere in its text, for type checkers too; of a package's part, the part."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} has a relative import"
            for alias in node.names:
                part = f"{node.module}.{alias.name}"
                found.add(part if part in FILES or node.module == "torch" else node.module)
    return found


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "parakit"} - {module}


def room_of(module: str) -> str:
    return module.removeprefix("parakit").removeprefix(".").split(".")[0]


def imports_by_name(module: str) -> set[str]:
    """Modules of parakit that a module with `importlib` names in its text."""
    if "importlib" not in imports(module):
        return set()
    texts = {node.value for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8")))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    return {name for name in texts if name in FILES and "." in name}


def circle_among(modules: set[str]) -> list[str]:
    """Modules that import each other in a circle, in its order; none if there is no circle."""
    done: set[str] = set()

    def search(module: str, above: list[str]) -> list[str]:
        if module in above:
            return above[above.index(module) :]
        if module in done:
            return []
        for name in sorted(own_imports(module) & modules):
            if circle := search(name, [*above, module]):
                return circle
        done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in sorted(modules))), [])


def importers_of(library: str) -> set[str]:
    return {m for m in FILES if any(f"{name}.".startswith(f"{library}.") for name in imports(m))}


def test_every_room_is_lived_in() -> None:
    assert sorted(ROOMS) == sorted({room_of(module) for module in FILES})


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module: str) -> None:
    place = ROOMS.index(room_of(module))
    others = {name for name in own_imports(module) if room_of(name) != room_of(module)}
    assert not {name for name in others if ROOMS.index(room_of(name)) > place}, f"{module} imports a room above it"


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_in_a_room(room: str) -> None:
    assert circle_among({module for module in FILES if room_of(module) == room}) == []


def test_nothing_is_imported_by_its_name_but_what_is_optional_or_late() -> None:
    named = {module: imports_by_name(module) for module in FILES}
    assert {module: found for module, found in named.items() if found} == {
        "parakit": {"parakit.plots", "parakit.widgets"},
        "parakit.display": {"parakit.plots.study"},
    }


def test_imports_are_found_wherever_they_stand() -> None:
    assert "parakit.workers.dask.connect" in imports("parakit.workers.connect")  # inside a function
    assert "parakit.workers.remote" in imports("parakit.workers.dask.session")  # as a part of its package
    assert "parakit.plots" in imports("parakit")  # for annotations only


def test_circles_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "three"), ("three", "two")):
        (tmp_path / f"{name}.py").write_text(f"def later():\n    import parakit.{other}\n")
        monkeypatch.setitem(FILES, f"parakit.{name}", tmp_path / f"{name}.py")
    assert set(circle_among({"parakit.one", "parakit.two", "parakit.three"})) == {"parakit.two", "parakit.three"}


def test_a_strategy_knows_only_the_verbs_and_the_errors() -> None:
    algorithms = {m for m in FILES if room_of(m) == "strategies"} - {"parakit.strategies", "parakit.strategies.base"}
    assert algorithms
    for module in algorithms:
        assert own_imports(module) <= {"parakit.errors", "parakit.strategies.base", "parakit.collectives.base"}, module


def test_only_the_dask_workers_import_distributed() -> None:
    importers = importers_of("distributed")
    assert "parakit.workers.dask.pool" in importers
    assert {m for m in importers if not m.startswith("parakit.workers.dask.")} == set()


def test_only_the_group_imports_torch_distributed() -> None:
    assert importers_of("torch.distributed") == {"parakit.collectives.gloo"}


def test_only_the_plots_import_matplotlib() -> None:
    importers = importers_of("matplotlib")
    assert "parakit.plots.live" in importers
    assert {room_of(module) for module in importers} == {"plots"}


def test_only_the_controls_import_ipywidgets() -> None:
    assert importers_of("ipywidgets") == {"parakit.widgets.controls", "parakit.widgets.what_if"}


def test_importing_parakit_loads_nothing_that_training_inline_does_not_need() -> None:
    look = "import json, sys, parakit; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "parakit" in loaded
    unwanted = {"IPython", "bokeh", "distributed", "ipywidgets", "matplotlib", "pandas", "scipy", "sklearn"}
    assert not loaded & unwanted


@pytest.mark.parametrize("module", FILES)
def test_every_name_that_a_module_offers_exists(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__doc__, f"{module} does not say what it owns"
    offered = getattr(loaded, "__all__", [])
    assert len(set(offered)) == len(offered)
    assert [name for name in offered if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("name", pk.__all__)
def test_every_public_name_says_what_it_is(name: str) -> None:
    public = getattr(pk, name)
    assert inspect.getdoc(public)
    if inspect.isclass(public):
        methods = {key: value for key, value in vars(public).items() if not key.startswith("_")}
        documentable = {k: v for k, v in methods.items() if callable(v) or isinstance(v, property | classmethod)}
        assert [key for key in documentable if not inspect.getdoc(getattr(public, key))] == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a git checkout knows which files are its own")
def test_no_file_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(paths) > len(FILES)
    personal = re.compile(rb"(?<![\w.])/(?:home|work|Users|root)/\w")
    assert [str(path.relative_to(ROOT)) for path in paths if personal.search(path.read_bytes())] == []
