"""Progress in words: one line for people who wait in a script or a terminal, and a sentence for an event."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from parakit.devices import unit_of
from parakit.events import (
    PLAIN,
    Asked,
    Baseline,
    EpochEnded,
    Event,
    Recovered,
    Resized,
    RunEnd,
    RunStart,
    Said,
    SegmentDone,
    SlowWorker,
    StepDone,
    WorkersLost,
)

if TYPE_CHECKING:
    from parakit.run import Run

__all__ = [
    "clock",
    "in_a_notebook",
    "many",
    "progress_line",
    "rival_name",
    "samples_per_second",
    "sentence",
    "show_progress",
    "three_digits",
]

_EVERY_SECONDS = 0.25
_WINDOW_SECONDS = 2.0


def in_a_notebook() -> bool:
    """Whether this process is a Jupyter kernel, where a line written over and over only fills the page."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def samples_per_second(run: Run, window_seconds: float = _WINDOW_SECONDS) -> float:
    """Samples that the run trained on per second of wall time, over its last segments.

    Only segments at the present worker count are counted; NaN until there is one.
    """
    newest = run.history.latest(SegmentDone)
    if newest is None or newest.world_size != run.world_size:
        return float("nan")
    late = run.history.newer(SegmentDone, newest.at_seconds - window_seconds)
    recent = [segment for segment in late if segment.world_size == newest.world_size]
    return sum(segment.samples for segment in recent) / max(1e-9, sum(segment.seconds for segment in recent))


def progress_line(run: Run, efficiency: float | None = None, *, workers: bool = True) -> str:
    """Epoch, loss, samples per second, workers and time left, in one line.

    Parameters
    ----------
    run : Run
    efficiency : float, optional
        From 0 to 1, shown as per cent where it is known.
    workers : bool
        Whether to count the workers: not where that stands above, and the line has to fit into a narrow page.
    """
    latest = run.history.latest(StepDone)
    if latest is None:
        return "starting"
    rate = samples_per_second(run)
    left = (run.steps - run.step) * latest.samples / rate if rate > 0 else float("nan")
    speed = f"{three_digits(rate) if rate == rate else '?'} samples/s"
    share = "" if efficiency is None else f", efficiency {100 * efficiency:.0f} %"
    count = f", {many(run.world_size, 'worker')}" if workers else ""
    return (
        f"epoch {latest.epoch + 1:,}, step {run.step:,}/{run.steps:,}, loss {latest.loss:.4f}, "
        f"{speed}{share}{count}, {clock(left)} left"
    )


def clock(seconds: float) -> str:
    """Minutes and seconds; "?" for NaN."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def show_progress(run: Run, ended: threading.Event, timeout: float | None) -> None:
    """Show the line until the run ends or the time is up: rewritten in place on a terminal, else once at the end."""
    live = sys.stderr.isatty()
    deadline = None if timeout is None else time.monotonic() + timeout
    width = 0
    while not ended.is_set() and (deadline is None or time.monotonic() < deadline):
        left = _EVERY_SECONDS if deadline is None else min(_EVERY_SECONDS, max(0.0, deadline - time.monotonic()))
        ended.wait(left)
        if live:
            line = progress_line(run)
            sys.stderr.write("\r" + line.ljust(width))
            sys.stderr.flush()
            width = len(line)
    sys.stderr.write(("\r" if live else "") + f"{run.status}: {progress_line(run)}".ljust(width) + "\n")
    sys.stderr.flush()


def sentence(event: Event, *, steps: int | None = None) -> str:
    """One short sentence about an event, for people who read a log; "" for an event that is not worth a line.

    Parameters
    ----------
    event : Event
    steps : int, optional
        Steps of the whole run: an end that came early is told against them where they are known.
    """
    match event:
        case RunStart():
            active = many(len(event.workers), "worker")
            return f"Started with {active}: {event.strategy}, batch of {event.batch_size}, {many(event.steps, 'step')}"
        case Asked():
            return _about_a_wish(event)
        case Resized():
            return _about_a_resize(event)
        case WorkersLost():
            return _about_a_loss(event)
        case Recovered():
            return _about_a_recovery(event)
        case SlowWorker():
            return _about_slowness(event)
        case EpochEnded():
            return _about_an_epoch(event)
        case Baseline():
            return _about_a_baseline(event)
        case Said():
            return event.text
        case RunEnd():
            return _about_the_end(event, steps)
    return ""


def many(count: int, noun: str) -> str:
    """A number of things in words."""
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}s"


def rival_name(cores: int, device: str = "cpu") -> str:
    """What plain PyTorch in one process with so many threads, or on one GPU, is called."""
    return f"{PLAIN}, {many(cores, unit_of(device))}"


def _about_a_wish(event: Asked) -> str:
    if event.wish == "resize" and isinstance(event.value, int):
        return f"{many(event.value, 'worker')} asked for"
    if event.wish == "measure":
        return "A measurement of plain PyTorch asked for"
    value = "" if event.value is None else f" {event.value:g}"
    return f"{event.wish.capitalize()}{value} asked for"


def _about_a_loss(event: WorkersLost) -> str:
    who = f"{', '.join(event.workers)} lost" if event.workers else "The group broke"
    return f"{who[0].upper()}{who[1:]} after step {event.step}: {event.reason}"


def _about_a_recovery(event: Recovered) -> str:
    loaded = f", {many(event.chunks_loaded, 'chunk')} loaded again" if event.chunks_loaded else ""
    again = f", {many(event.steps_again, 'step')} to be done again" if event.steps_again else ""
    left = many(len(event.workers), "worker")
    return f"Going on from step {event.step} with {left} after {event.seconds:.2f} s{loaded}{again}"


def _about_slowness(event: SlowWorker) -> str:
    if event.recovered:
        return f"{event.worker} is as fast as the others again"
    return f"{event.worker} is slow: it takes {event.times:.1f} times as long as the median of the others"


def _about_a_resize(event: Resized) -> str:
    active = many(len(event.workers), "worker")
    if event.generation == 0:
        return f"{active} ready"
    moved = f"{many(event.chunks_moved, 'chunk')} moved"
    if not event.waited_seconds:  # nobody wished for it: a worker came back, or was lost, which has its own sentence
        return f"{active} again since step {event.step:,} ({moved})" if event.chunks_moved else ""
    return f"{active} since step {event.step:,} ({event.waited_seconds:.2f} s after the wish, {moved})"


def _about_an_epoch(event: EpochEnded) -> str:
    if event.validation_loss is None:
        return ""
    accuracy = event.validation_accuracy
    share = "" if accuracy is None else f", accuracy {100 * accuracy:.1f} %"
    return f"Epoch {event.epoch + 1}: validation loss {event.validation_loss:.4g}{share}"


def _about_a_baseline(event: Baseline) -> str:
    cores = f"1 {unit_of(event.device)}" if event.cores == 1 else f"all {event.cores} cores"
    median, low, high = map(three_digits, (event.samples_per_second, event.low, event.high))
    return f"{event.name} with {cores}: {median} samples/s ({low} to {high})"


def three_digits(samples_per_second: float) -> str:
    """Three digits: a measurement is not better than that."""
    rounded = float(f"{samples_per_second:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def _about_the_end(event: RunEnd, steps: int | None) -> str:
    if event.status == "failed":
        return f"Failed after step {event.step:,}: {_fact(event)}"
    if event.reason != "stopped":
        return f"Finished after step {event.step:,}"
    return f"Stopped after step {event.step:,}" + ("" if steps is None else f" of {steps:,}")


def _fact(event: RunEnd) -> str:
    """Why a run failed, without what the sentence says anyhow, and without cause and remedy on lines of their own."""
    lines = event.reason.splitlines() or ["no reason is known"]
    return lines[0].removeprefix(f"The run failed after step {event.step}: ")
