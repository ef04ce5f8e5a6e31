"""Checkpoints of a run on disk: one file a step, whole or not there, of which a few are kept.

Owns the file format, the folder, and the thread that writes while training goes on. Loading runs no code of anybody's.

- `format`: what a file holds: packing, unpacking, digest.
- `places`: where files are: a folder of this machine, or one that fsspec reaches.
- `fitting`: whether a checkpoint is of the run that would go on from it.
- `folder`: the checkpoints of a folder, saving and loading.
- `saver`: when to write, in a thread of its own.
"""

from parakit.checkpoints.compatibility import check_fits, differences
from parakit.checkpoints.folder import Checkpoints, load
from parakit.checkpoints.format import Checkpoint, check_plain
from parakit.checkpoints.writer import Saver
from parakit.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "Saver", "check_fits", "check_plain", "differences", "load"]
