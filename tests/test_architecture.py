"""The shape of the package: which way imports point, who may import what, and what names a module offers."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import parakit as pk

ROOT = Path(__file__).resolve().parents[1]

# A module may import those of the lines above its own. A new one fails the tests until it has a place here, as low
# as it can be: what few things depend on is easy to change.
ROOMS = (
    (
        "parakit.commits", "parakit.control_room.controls", "parakit.control_room.place", "parakit.datasets",
        "parakit.errors", "parakit.exactness", "parakit.exactness.containers", "parakit.exactness.loss_calls",
        "parakit.exactness.peers", "parakit.exactness.turns", "parakit.layout", "parakit.machine",
        "parakit.pacing", "parakit.rates", "parakit.scaling", "parakit.scaling.least_squares",
        "parakit.serialization.arrays", "parakit.serialization.code_names", "parakit.serialization.local_code",
        "parakit.wishes", "parakit.workers.dask", "parakit.workers.dask.addresses",
        "parakit.workers.dask.janitor", "parakit.workers.layout", "parakit.workers.shared.waiting",
    ),
    (
        "parakit.checkpoints.fitting", "parakit.checkpoints.format", "parakit.checkpoints.places",
        "parakit.chunks", "parakit.devices", "parakit.exactness.hooks", "parakit.exactness.marks",
        "parakit.exactness.outputs", "parakit.exactness.rewrites", "parakit.exactness.sync_norm",
        "parakit.export", "parakit.fusing", "parakit.memory_needs", "parakit.places",
        "parakit.scaling.breakdown", "parakit.scaling.exchange", "parakit.scaling.hosts",
        "parakit.scaling.laws", "parakit.scaling.noise", "parakit.scaling.points",
        "parakit.serialization.wrappers", "parakit.shards", "parakit.shared_memory", "parakit.validation",
        "parakit.vault", "parakit.workers.dask.nursery", "parakit.workers.group",
    ),
    (
        "parakit.checkpoints.folder", "parakit.events", "parakit.exactness.buffers",
        "parakit.exactness.variables", "parakit.failures", "parakit.preflight.reach",
        "parakit.scaling.networks", "parakit.scaling.solving", "parakit.scaling.waiting",
        "parakit.serialization.ties", "parakit.settings", "parakit.workers.dask.local",
        "parakit.workers.shared.barrier", "parakit.workers.shared.joining", "parakit.workers.slicing",
    ),
    (
        "parakit.checkpoints.saver", "parakit.exactness.generators", "parakit.exactness.structure",
        "parakit.plots.style", "parakit.progress", "parakit.scaling.fit_bands", "parakit.scaling.groups",
        "parakit.scaling.terms", "parakit.serialization.frozen", "parakit.stragglers",
        "parakit.workers.shared.arena",
    ),
    (
        "parakit.checkpoints", "parakit.course", "parakit.data", "parakit.plots.labels",
        "parakit.scaling.calibration", "parakit.scaling.fitting", "parakit.scaling.order",
        "parakit.scaling.records", "parakit.scaling.ticker", "parakit.serialization",
        "parakit.workers.shared.exchange",
    ),
    (
        "parakit.exactness.attributes", "parakit.holding", "parakit.losses", "parakit.plots.curves",
        "parakit.plots.phases", "parakit.plots.speedups", "parakit.scaling.archive", "parakit.scaling.costs",
        "parakit.scaling.evidence", "parakit.scaling.predictions", "parakit.scaling.tables",
        "parakit.workers.shared",
    ),
    (
        "parakit.exactness.agreement", "parakit.exactness.late", "parakit.exactness.still", "parakit.gradients",
        "parakit.loss_forms", "parakit.plots.costs", "parakit.plots.live", "parakit.preflight.labels",
        "parakit.recipe", "parakit.scaling.advice", "parakit.scaling.choosing", "parakit.scaling.remarks",
        "parakit.workers.hosts",
    ),
    (
        "parakit.control_room.what_if", "parakit.evaluation", "parakit.exactness.separation",
        "parakit.identity", "parakit.preflight.copies", "parakit.scaling.study",
    ),
    (
        "parakit.exactness.check", "parakit.plots.scaling", "parakit.preflight.trial",
    ),
    (
        "parakit.plots", "parakit.preflight.changes", "parakit.preflight.evaluating",
        "parakit.preflight.optimizers", "parakit.share_gradient",
    ),
    (
        "parakit.preflight.shares", "parakit.replica",
    ),
    (
        "parakit.preflight.behaviour", "parakit.scaling.plain", "parakit.workers.base",
        "parakit.workers.messages",
    ),
    (
        "parakit.accounts", "parakit.checking", "parakit.keeping", "parakit.plans", "parakit.preflight",
        "parakit.scaling.extent", "parakit.scaling.measuring", "parakit.strategies.all_reduce",
        "parakit.strategies.map_reduce", "parakit.workers.dask.watching", "parakit.workers.inline",
        "parakit.workers.meeting",
    ),
    (
        "parakit.membership", "parakit.strategies", "parakit.workers.dask.sending", "parakit.workers.resident",
        "parakit.workers.virtual_team",
    ),
    (
        "parakit.conducting", "parakit.workers.dask.driver", "parakit.workers.dask.mapping",
        "parakit.workers.dask.rendezvous", "parakit.workers.simulated", "parakit.workers.warm",
    ),
    (
        "parakit.run", "parakit.workers.dask.crew",
    ),
    (
        "parakit.control_room.report", "parakit.control_room.steering", "parakit.scaling.visits",
        "parakit.training", "parakit.workers.dask.pool",
    ),
    (
        "parakit.control_room.draft", "parakit.scaling.advising", "parakit.scaling.probing",
        "parakit.scaling.sweep", "parakit.workers.dask.reaching",
    ),
    (
        "parakit.control_room.panel", "parakit.workers.connect",
    ),
    (
        "parakit.control_room.opening", "parakit.workers",
    ),
    (
        "parakit", "parakit.control_room",
    ),
)  # fmt: skip
FLOOR = {module: floor for floor, room in enumerate(ROOMS) for module in room}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((ROOT / "parakit").rglob("*.py"))}


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads: an annotation needs no module to run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from runtime_nodes(node)


def imports(module: str) -> set[str]:
    """What a module imports, anywhere in its text; of a package's part, the part."""
    found = set()
    for node in runtime_nodes(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} has a relative import"
            for alias in node.names:
                part = f"{node.module}.{alias.name}"
                found.add(part if part in FILES or node.module == "torch" else node.module)
    return found


def importers_of(library: str) -> set[str]:
    return {m for m in FILES if any(f"{name}.".startswith(f"{library}.") for name in imports(m))}


def test_every_module_is_in_one_room_and_every_room_is_lived_in() -> None:
    placed = [module for room in ROOMS for module in room]
    assert sorted(placed) == sorted(FILES)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module: str) -> None:
    ours = {name for name in imports(module) if name.split(".")[0] == "parakit"}
    upwards = {name for name in ours if FLOOR[name] >= FLOOR[module]}
    assert not upwards, f"{module} imports what is not below it"


def test_imports_are_found_wherever_they_stand() -> None:
    assert "parakit.workers.dask.reaching" in imports("parakit.workers.connect")  # inside a function
    assert "parakit.workers.resident" in imports("parakit.workers.dask.crew")  # as a part of its package
    assert "parakit.workers.dask.pool" not in imports("parakit.workers.dask.crew")  # for annotations only


def test_a_strategy_knows_only_the_verbs_and_the_errors() -> None:
    algorithms = [module for module in FILES if module.startswith("parakit.strategies.")]
    assert algorithms
    for module in algorithms:
        ours = {name for name in imports(module) if name.split(".")[0] == "parakit"}
        assert ours <= {"parakit.errors", "parakit.workers.base"}, module


def test_only_the_dask_workers_import_distributed() -> None:
    importers = importers_of("distributed")
    assert "parakit.workers.dask.pool" in importers
    assert {m for m in importers if not m.startswith("parakit.workers.dask.")} == set()


def test_only_the_group_imports_torch_distributed() -> None:
    assert importers_of("torch.distributed") == {"parakit.workers.group"}


def test_only_the_plots_import_matplotlib() -> None:
    importers = importers_of("matplotlib")
    assert "parakit.plots.live" in importers
    assert {m for m in importers if not m.startswith("parakit.plots.")} == set()


def test_only_the_controls_import_ipywidgets() -> None:
    assert importers_of("ipywidgets") == {"parakit.control_room.controls", "parakit.control_room.what_if"}


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
