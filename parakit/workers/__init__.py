"""The kinds of workers, and `connect`, which finds the right kind for what a user has."""

from parakit.workers.base import Workers
from parakit.workers.connect import connect

__all__ = ["Workers", "connect"]
