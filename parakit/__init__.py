"""Train PyTorch models in parallel from a notebook: resize the run while it trains, and see what that does to speed."""

from typing import TYPE_CHECKING, Any

from parakit import datasets, strategies
from parakit.display import show_pictures
from parakit.errors import ParakitError
from parakit.events.history import History
from parakit.runs.evaluate import evaluate
from parakit.runs.run import Run
from parakit.runs.train import train
from parakit.scaling.experiments.advise import advise
from parakit.scaling.experiments.sweep import sweep
from parakit.scaling.study.study import Scaling
from parakit.workers import Workers, connect, simulated

if TYPE_CHECKING:
    from parakit import plots
    from parakit.widgets import panel, what_if

show_pictures()

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
        return getattr(importlib.import_module("parakit.widgets"), name)
    except ModuleNotFoundError as error:
        raise ParakitError(
            f"parakit.{name} needs {error.name}, which is not installed here.",
            remedy='pip install "parakit[notebook]"',
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
