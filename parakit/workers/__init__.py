"""The kinds of workers; `connect` finds the right kind for what a user has, `simulated` makes what nobody has."""

from parakit.workers.base import Workers
from parakit.workers.connect import connect
from parakit.workers.simulated import simulated

__all__ = ["Workers", "connect", "simulated"]
