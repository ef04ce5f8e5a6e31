"""The kinds of workers; `connect` finds the right kind for what a user has, `simulated` makes what nobody has."""

from parakit.workers.connect import connect
from parakit.workers.pool import Workers
from parakit.workers.virtual.pool import simulated

__all__ = ["Workers", "connect", "simulated"]
