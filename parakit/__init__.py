"""Train PyTorch models in parallel from a notebook: resize the run while it trains, and see what that does to speed."""

from typing import TYPE_CHECKING, Any

from parakit import datasets, strategies
from parakit.errors import ParakitError
from parakit.events import History
from parakit.run import Run
from parakit.scaling.advising import advise
from parakit.scaling.study import Scaling
from parakit.scaling.sweep import sweep
from parakit.training import evaluate, train
from parakit.workers import Workers, connect, simulated

if TYPE_CHECKING:
    from parakit import plots
    from parakit.control_room import panel, what_if

__version__ = "0.1.0"

__all__ = [
    "History",
    "ParakitError",
    "Run",
    "Scaling",
    "Workers",
    "advise",
    "connect",
    "datasets",
    "evaluate",
    "panel",
    "plots",
    "simulated",
    "strategies",
    "sweep",
    "train",
    "what_if",
]


def __getattr__(name: str) -> Any:
    """Pictures and panels are loaded when they are first asked for: matplotlib and ipywidgets take their time."""
    if name not in ("panel", "plots", "what_if"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from parakit.errors import ParakitError

    try:
        if name == "plots":
            return importlib.import_module("parakit.plots")
        return getattr(importlib.import_module("parakit.control_room"), name)
    except ModuleNotFoundError as error:
        raise ParakitError(
            f"parakit.{name} needs {error.name}, which is not installed here.",
            remedy='pip install "parakit[notebook]"',
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
