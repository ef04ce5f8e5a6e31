"""Events as sentences, for logs."""

from __future__ import annotations

from parakit.events.records import (
    Baseline,
    EpochEnded,
    Event,
    Recovered,
    Requested,
    Resized,
    RunEnd,
    RunStart,
    Said,
    SlowWorker,
    WorkersLost,
)
from parakit.formatting import many, three_digits, unit_of

__all__ = ["sentence"]


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
        case Requested():
            return _about_a_request(event)
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


def _about_a_request(event: Requested) -> str:
    if event.request == "resize" and isinstance(event.value, int):
        return f"{many(event.value, 'worker')} asked for"
    if event.request == "measure":
        return "A measurement of plain PyTorch asked for"
    value = "" if event.value is None else f" {event.value:g}"
    return f"{event.request.capitalize()}{value} asked for"


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
    if not event.waited_seconds:  # nobody requested for it: a worker came back, or was lost, which has its own sentence
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
