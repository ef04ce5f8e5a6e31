"""What happened: events as frozen records with units in their names.

Plots, panels and analyses read events and nothing else. An event converts to a plain dict; `reader` has the way back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from parakit.formatting import many, unit_of

__all__ = [
    "EXCHANGE_WAYS",
    "KINDS",
    "PHASES",
    "PLAIN",
    "Baseline",
    "EpochEnded",
    "Event",
    "GradientNorms",
    "Recovered",
    "Requested",
    "Resized",
    "RunEnd",
    "RunStart",
    "Said",
    "SegmentDone",
    "SlowWorker",
    "StepDone",
    "WorkerStep",
    "WorkersLost",
    "baseline_name",
]

#: What a baseline of plain PyTorch is called.
PLAIN = "plain PyTorch"
#: Where a worker's time goes in a step, in the order of a step.
PHASES = ("data", "forward", "backward", "exchange", "update", "idle")
#: How gradients are added up: in memory that the workers of a host share; over gloo's connections; by both, within
#: hosts and between them; by tasks; or not at all, where workers take turns in one process.
EXCHANGE_WAYS = ("shared memory", "gloo", "hierarchical", "tasks", "in turns")


@dataclass(frozen=True, slots=True)
class WorkerStep:
    """One worker's part of one step, in seconds.

    ``exchange`` is the time in which gradients travel and are summed; ``idle`` the time spent waiting for a slower
    worker before they can. A worker sees only their sum; the wait is what its sum exceeds the smallest of all
    workers, because the last one to arrive waits for nobody.
    """

    worker: str
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    exchange_seconds: float
    update_seconds: float
    idle_seconds: float
    samples: int

    def seconds(self) -> tuple[float, ...]:
        """The six phases, in the order of `PHASES`."""
        return tuple(getattr(self, f"{phase}_seconds") for phase in PHASES)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes
    ----------
    at_seconds : float
        Since the start of the run.
    """

    at_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A plain dict; ``kind`` names the event."""
        return {"kind": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, slots=True)
class RunStart(Event):
    """The run began: what is trained, on what, and how.

    ``exchange`` is what older files say of how gradients are added up; since then, `Resized` says it of each group.
    ``simulated`` is true where all times are those of a virtual clock. ``device`` is where the workers compute: "cpu",
    or "cuda", in which case ``cores`` counts GPUs.
    """

    strategy: str
    workers: tuple[str, ...]
    pool: str
    cores: int
    threads_per_worker: int
    parameters: int
    samples: int
    chunks: int
    batch_size: int
    steps: int
    steps_per_epoch: int
    seed: int
    exchange: str = ""
    simulated: bool = False
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """One step over one global batch.

    Attributes
    ----------
    step, epoch : int
        Counted from zero.
    loss : float
        Of the global batch, before the update.
    samples : int
        Rows in the global batch.
    seconds : float
        Wall time of the step.
    learning_rate : float
        Of the optimizer's first parameter group, as used in this step.
    world_size, generation : int
        Active workers, and how many times their group has been formed before.
    workers : tuple of WorkerStep
        One record a worker, in the order of their ranks.
    """

    step: int
    epoch: int
    loss: float
    samples: int
    seconds: float
    learning_rate: float
    world_size: int
    generation: int
    workers: tuple[WorkerStep, ...]


@dataclass(frozen=True, slots=True)
class GradientNorms(Event):
    """How much the workers' gradients differ, measured in the first step of a segment with several workers.

    Attributes
    ----------
    step : int
    norms_squared : tuple of float
        Squared 2-norm of each worker's mean gradient over its own samples.
    samples : tuple of int
        Of each.
    global_norm_squared : float
        Of the mean gradient over all of them, before clipping.
    """

    step: int
    norms_squared: tuple[float, ...]
    samples: tuple[int, ...]
    global_norm_squared: float


@dataclass(frozen=True, slots=True)
class SegmentDone(Event):
    """A segment ended and its last step is committed.

    ``seconds`` is its wall time: from the end of the segment before, by the clocks of the workers, or from the order
    to the report where it was ordered later. ``control_seconds`` is what remains of it after the steps: orders, commit
    and report. ``commit_seconds`` is the part of that in which the slowest worker kept its state.
    ``samples`` counts the rows trained on; ``world_size`` and ``generation`` are those of its steps.
    """

    first_step: int
    steps: int
    seconds: float
    control_seconds: float
    commit_seconds: float
    samples: int
    world_size: int
    generation: int


@dataclass(frozen=True, slots=True)
class Requested(Event):
    """A request was submitted: "resize", "pause", "resume", "stop", "learning rate" or "measure".

    ``value`` is the number of workers, or the learning rate, and None for the other requests.
    """

    request: str
    value: int | float | None


@dataclass(frozen=True, slots=True)
class Resized(Event):
    """The group was formed: at the start, and whenever membership changed.

    ``seconds`` is the time the run stood still for it; ``chunks_moved`` counts chunks that a worker had to load;
    ``waited_seconds`` is the time from the request to the moment the new group was ready (0 without a request).
    ``exchange`` says how the group adds gradients up: one of `EXCHANGE_WAYS`, or the algorithm that a simulation
    prices; "" where nobody says, as in older files. ``divided_update`` says whether each worker updates a slice.
    """

    step: int
    generation: int
    workers: tuple[str, ...]
    chunks_moved: int
    seconds: float
    waited_seconds: float
    exchange: str = ""
    divided_update: bool = False


@dataclass(frozen=True, slots=True)
class WorkersLost(Event):
    """Active workers were lost, and the run goes back to its last commit.

    Attributes
    ----------
    workers : tuple of str
        Who is lost; empty where nobody is gone, but the group broke all the same.
    step : int
        Committed steps, from which the run goes on.
    reason : str
        What was seen, in words.
    """

    workers: tuple[str, ...]
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Recovered(Event):
    """The run goes on after a loss, on the workers named.

    ``seconds`` is the time from the moment the loss was noticed until the new group was ready; ``chunks_loaded`` counts
    chunks that were loaded again from their source; ``steps_again`` counts steps that were done before and are done
    once more, because the newest state that is left is older than the last commit (0 while any worker has that).
    """

    workers: tuple[str, ...]
    step: int
    seconds: float
    chunks_loaded: int
    steps_again: int


@dataclass(frozen=True, slots=True)
class SlowWorker(Event):
    """A worker computes slower than the others, per sample; ``times`` is relative to their median.

    ``recovered`` is true when it is as fast as the others again.
    """

    worker: str
    times: float
    recovered: bool


@dataclass(frozen=True, slots=True)
class EpochEnded(Event):
    """An epoch ended; the validation figures are None where no validation data was given."""

    epoch: int
    step: int
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Baseline(Event):
    """A rival was measured: how fast the same batches train without parakit.

    Attributes
    ----------
    name : str
        The rival, such as "plain PyTorch".
    cores : int
        Threads of its one process; 1 on a GPU.
    samples_per_second, low, high : float
        Median and quartiles of the rate over the timed steps.
    steps : int
        Timed steps; those of the warm-up are not among them.
    device : str
        Where it computed: "cpu" or "cuda".
    """

    name: str
    cores: int
    samples_per_second: float
    low: float
    high: float
    steps: int
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Said(Event):
    """A sentence for people, such as why a request could not be granted."""

    text: str


@dataclass(frozen=True, slots=True)
class RunEnd(Event):
    """The run ended: "finished" or "failed"; ``step`` is the number of committed steps."""

    status: str
    step: int
    reason: str


#: Every kind of event.
KINDS: tuple[type[Event], ...] = (
    RunStart, StepDone, GradientNorms, SegmentDone, Requested, Resized, WorkersLost, Recovered, SlowWorker, EpochEnded,
    Baseline, Said, RunEnd,
)  # fmt: skip


def baseline_name(cores: int, device: str = "cpu") -> str:
    """What plain PyTorch in one process with so many threads, or on one GPU, is called."""
    return f"{PLAIN}, {many(cores, unit_of(device))}"
