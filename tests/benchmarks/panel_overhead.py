"""What an open panel costs a run: throughput with and without it, turn by turn in one kernel.

Runs in a real Jupyter kernel, so that frames and texts are sent as they are to a browser; there is no browser to draw
them, whose work on the same machine would come on top.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from jupyter_client.manager import start_new_kernel

from tests.benchmarks.reports import Pace, Report, run, spread

SETUP = """
import json, time, torch, warnings, parakit as pk
warnings.simplefilter("ignore")
from torch import nn
from parakit.events.records import SegmentDone

def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, 10))

def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))

inputs, labels = torch.randn(2048, 3, 32, 32), torch.randint(0, 10, (2048,))
works = {
    "CNN 0.55 M, batch 64": (convolutional(), inputs, 64),
    "MLP 4.2 M, batch 256": (perceptron(), inputs.flatten(1), 256),
}
workers = pk.connect(2)

def rate(run, seconds):
    before = run.history.latest(SegmentDone).at_seconds
    time.sleep(seconds)
    news = run.history.newer(SegmentDone, before)
    return sum(s.samples for s in news) / (news[-1].at_seconds - before)

def measure(name, rounds, seconds):
    model, data, batch = works[name]
    run = pk.train(model, (data, labels), on=workers, batch_size=batch, learning_rate=0.001, steps=10**9)
    time.sleep(4)
    ratios, frames = [], []
    for turn in range(2 * rounds):
        room = pk.panel(run, baselines=False) if turn % 2 else None
        if room: time.sleep(0.7)
        drawn = room.frames if room else 0
        speed = rate(run, seconds)
        if room:
            frames.append((room.frames - drawn) / seconds)
            ratios.append(speed / plain)
            room.close()
            time.sleep(0.5)
        else:
            plain = speed
    run.stop(); run.wait(30)
    print("found", json.dumps([name, ratios, frames]))
"""


WORKS = ("CNN 0.55 M, batch 64", "MLP 4.2 M, batch 256")


def overheads(rounds: int, seconds: float, works: tuple[str, ...]) -> Iterator[tuple[str, list[float], list[float]]]:
    """Of each work, throughput with a panel over that without, turn by turn, and frames per second."""
    manager, client = start_new_kernel()
    said: list[str] = []

    def hear(message: dict) -> None:
        content = message["content"]
        if message["msg_type"] == "stream" and content["name"] == "stdout":
            said.append(content["text"])
        if message["msg_type"] == "error":
            raise RuntimeError("\n".join(content["traceback"]))

    try:
        client.execute_interactive(SETUP, timeout=120, output_hook=hear)
        for name in works:
            code = f"measure({name!r}, {rounds}, {seconds})"
            client.execute_interactive(code, timeout=rounds * 4 * seconds + 60, output_hook=hear)
            (line,) = [line for line in "".join(said).splitlines() if line.startswith("found ")]
            said.clear()
            found, ratios, frames = json.loads(line.removeprefix("found "))
            yield found, ratios, frames
        client.execute_interactive("workers.close()", timeout=60, output_hook=hear)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=False)


def measure(pace: Pace) -> Iterator[Report]:
    rounds, seconds = 2 * pace.repeats, pace.choose(6.0, 3.0)
    rows = [[name, spread(ratios), spread(frames, 2)] for name, ratios, frames in overheads(rounds, seconds, WORKS)]
    heads = ["workload, 2 workers", "throughput with over without", "frames/s"]
    yield Report("panel_overhead", "What an open panel costs", heads, rows, [f"{rounds} turns of {seconds:g} s."])


if __name__ == "__main__":
    run(__doc__, measure)
