"""The errors parakit raises, and nothing else.

Every message states the fact with its numbers, then the likely cause, then the remedy. What a user did wrong is
also a `ValueError`; what went wrong while running is also a `RuntimeError`, so ordinary handlers catch both.

::

    ParakitError
    ├── InputError (ValueError)          an argument that cannot be right
    │   ├── DataError                    samples, targets, batches
    │   ├── ModelError                   the model or its optimizer
    │   ├── LossError                    a loss whose value is not a sum over samples
    │   └── WorkerCountError             zero, negative or too many workers
    ├── ConnectError (RuntimeError)      the workers cannot be reached or used
    ├── PoolError (RuntimeError)         the pool is busy or closed
    ├── RunError (RuntimeError)
    │   ├── CheckpointError          a checkpoint that is missing or damaged, does not fit, or cannot be written
    │   ├── RunFailed                    the run stopped by itself; its last committed state is kept
    │   │   ├── Diverged                 the loss or a parameter is no finite number any more
    │   │   └── BatchDependent           what a share comes to depends on the rest of its batch
    │   ├── RunEnded                     a request came after the run's end
    │   ├── WorkerLost                   a worker died, or was silent for too long
    │   └── StaleGeneration              an order of an older process group was refused
    └── WaitTimeout (TimeoutError)       a wait reached its limit; what was waited for goes on
"""

from __future__ import annotations

__all__ = [
    "BatchDependent",
    "CheckpointError",
    "ConnectError",
    "DataError",
    "Diverged",
    "InputError",
    "LossError",
    "ModelError",
    "ParakitError",
    "PoolError",
    "RunEnded",
    "RunError",
    "RunFailed",
    "StaleGeneration",
    "Unreachable",
    "WaitTimeout",
    "WorkerCountError",
    "WorkerLost",
]


class ParakitError(Exception):
    """The root of all parakit errors.

    Parameters
    ----------
    fact : str
        What is the case, with the numbers.
    where : str, optional
        Lines of code, as a traceback shows them, indented.
    cause : str, optional
        The likely cause.
    remedy : str, optional
        What to do about it.
    """

    def __init__(self, fact: str, *, where: str = "", cause: str = "", remedy: str = "") -> None:
        lines = [fact]
        if where:
            lines.append(where)
        if cause:
            lines.append(f"Likely cause: {cause}")
        if remedy:
            lines.append(f"Remedy: {remedy}")
        # One positional argument, so that the error survives pickling between processes.
        super().__init__("\n".join(lines))


class InputError(ParakitError, ValueError):
    """An argument that cannot be right."""


class DataError(InputError):
    """Samples, targets or batches that do not fit together."""


class ModelError(InputError):
    """A model or an optimizer that cannot be trained."""


class LossError(InputError):
    """A loss that is no sum over samples, no mean over them, or no scalar."""


class WorkerCountError(InputError):
    """A number of workers that the pool or the data cannot serve."""


class ConnectError(ParakitError, RuntimeError):
    """The workers cannot be reached, or lack what training needs."""


class PoolError(ParakitError, RuntimeError):
    """The pool is busy with another run, or closed."""


class RunError(ParakitError, RuntimeError):
    """Something about a run."""


class CheckpointError(RunError):
    """A checkpoint that is not there, is damaged, does not fit, or could not be written."""


class RunFailed(RunError):
    """The run stopped by itself; the last committed state is kept.

    Attributes
    ----------
    rows : tuple of int
        Rows of the data that the failed step was about on its worker, where code failed over them; else empty.
    """

    rows: tuple[int, ...] = ()


class Diverged(RunFailed):
    """The loss, or a parameter, is no finite number any more.

    Attributes
    ----------
    step : int
        Steps that were done; the states of earlier ones are good.
    """

    def __init__(self, fact: str, *, step: int = 0, where: str = "", cause: str = "", remedy: str = "") -> None:
        super().__init__(fact, where=where, cause=cause, remedy=remedy)
        self.step = step


class BatchDependent(RunFailed):
    """The loss of some samples is not what parts of them come to, so several workers would train otherwise than one."""


class RunEnded(RunError):
    """The run has ended, so the request cannot take effect."""


class WorkerLost(RunError):
    """A worker died, or said nothing for longer than the limit."""


class StaleGeneration(RunError):
    """An order of an older process group, refused by a worker that has moved on."""


class WaitTimeout(ParakitError, TimeoutError):
    """A wait reached its limit. What was waited for is still going on."""


class Unreachable(ParakitError):
    """A worker count that did not come about, in words."""
