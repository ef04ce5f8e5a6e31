"""What an open panel costs a run: throughput with and without it, turn by turn in one kernel.

    python -m tests.benchmarks.panel_overhead [rounds]

Runs in a real Jupyter kernel, so that frames and texts are sent as they are to a browser; there is no browser to draw
them, whose work on the same machine would come on top. Prints a table.
"""

from __future__ import annotations

import platform
import sys

from jupyter_client.manager import start_new_kernel

SETUP = """
import statistics, time, torch, warnings, parakit as pk
warnings.simplefilter("ignore")
from torch import nn
from parakit.events import SegmentDone

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
    low, mid, high = statistics.quantiles(ratios, n=4)
    print(f"{name:22} {mid:8.3f}   {low:.3f} to {high:.3f}   {statistics.median(frames):6.1f}   {len(ratios):5}")
"""


def main(rounds: int, seconds: float = 6.0) -> None:
    manager, client = start_new_kernel()
    try:
        client.execute_interactive(SETUP, timeout=120)
        print(f"{platform.machine()}, Python {platform.python_version()}; throughput with the panel over without")
        print(f"{'workload, 2 workers':22} {'median':>8}   {'quartiles':14}   {'frames/s':>6}   {'turns':>5}")
        for name in ("CNN 0.55 M, batch 64", "MLP 4.2 M, batch 256"):
            code = f"measure({name!r}, {rounds}, {seconds})"
            client.execute_interactive(code, timeout=rounds * 4 * seconds + 60, output_hook=show)
        client.execute_interactive("workers.close()", timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=False)


def show(message: dict) -> None:
    content = message["content"]
    if message["msg_type"] == "stream":
        print(content["text"], end="", flush=True)
    if message["msg_type"] == "error":
        print("\n".join(content["traceback"]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
