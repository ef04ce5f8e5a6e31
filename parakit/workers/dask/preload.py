"""Imported by a local worker as it starts: what the first run would otherwise wait for.

The first optimizer of a process makes torch import its compiler, which takes seconds; a resize to a fresh worker
would pay for it.

An interrupt is meant for the notebook's cell or the script, but reaches every process of its group. The worker ignores
it: it ends when its owner ends, or says so. It works for nobody else, so it keeps the memory that it frees.
"""

import gc
import logging
import signal
import threading

import numpy as np
import torch

import parakit.workers.remote  # noqa: F401  # what orders call
from parakit.system.malloc import keep_freed_memory

torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


_FAREWELL = "Failed to communicate with scheduler during heartbeat"  # as pools close, and a sign of nothing else


def _of_concern(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_FAREWELL)


def dask_setup(_: object) -> None:
    """Called by Dask in the worker, and only there: whoever merely imports this module keeps its interrupts."""
    if threading.current_thread() is threading.main_thread():  # only there may a process say what a signal does
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory(for_good=True)
    logging.getLogger("distributed.worker").addFilter(_of_concern)
    np.random.seed()  # noqa: NPY002  # the global one, for code of users' that draws from it: forks begin alike
    gc.freeze()  # what is here stays: to look through it whenever a run has ended takes a tenth of a second
