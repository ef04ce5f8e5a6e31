"""Strategies of data-parallel training, one algorithm a file.

A strategy is a short plain text over the verbs of a team (`parakit.strategies.base.Team`). It does not know whether the
team is one process, Dask workers or a simulation.
"""

from parakit.strategies.all_reduce import AllReduce
from parakit.strategies.map_reduce import MapReduce

__all__ = ["AllReduce", "MapReduce"]
