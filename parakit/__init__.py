"""Train PyTorch models in parallel from a notebook: resize the run while it trains, and see what that does to speed."""

from parakit import datasets, strategies
from parakit.errors import ParakitError
from parakit.events import History
from parakit.run import Run
from parakit.training import evaluate, train
from parakit.workers import Workers, connect

__version__ = "0.1.0"

__all__ = [
    "History",
    "ParakitError",
    "Run",
    "Workers",
    "connect",
    "datasets",
    "evaluate",
    "strategies",
    "train",
]
