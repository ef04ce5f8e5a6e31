"""Runs as their users steer them: requests, status, history, failures."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import parakit as pk
from parakit.data.local_chunks import LocalChunks
from parakit.data.samples import Samples
from parakit.errors import PoolError, RunEnded, RunError, RunFailed, WaitTimeout, WorkerCountError
from parakit.events.history import History
from parakit.events.records import PHASES, EpochEnded, GradientNorms, Requested, Resized, RunEnd, RunStart, SegmentDone
from parakit.workers import remote
from parakit.workers.inline import InlineSession
from tests.runs.test_exact import Slowed, problem, wait_for
from tests.waiting import until

LIMIT = 60


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def endless(on: pk.Workers, **how: Any) -> pk.Run:
    return pk.train(Slowed(small_net()), pk.datasets.digits().train, on=on, **{"steps": 100_000} | how)


@pytest.mark.dask
def test_digits_reach_97_percent_on_two_workers(pool: pk.Workers) -> None:
    digits = pk.datasets.digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    began = time.monotonic()
    run = pk.train(
        model, digits.train, on=pool, workers=2, loss=nn.CrossEntropyLoss(), batch_size=64, epochs=20,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), validation=digits.test,
    )  # fmt: skip
    run.wait(LIMIT, progress=False)
    assert time.monotonic() - began < 50
    result = pk.evaluate(run.model, digits.test, on=pool)
    assert result.accuracy is not None
    assert result.accuracy >= 0.97
    last = run.history.of(EpochEnded)[-1]
    assert last.validation_accuracy == pytest.approx(result.accuracy)
    assert last.validation_loss == pytest.approx(result.loss, rel=1e-5)
    assert len(run.history.of(EpochEnded)) == 20
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.dask
@pytest.mark.parametrize("strategy", [pk.strategies.AllReduce(), pk.strategies.MapReduce()], ids=repr)
def test_pause_resume_stop(pool: pk.Workers, strategy: Any) -> None:
    began = time.monotonic()
    run = endless(pool, workers=2, strategy=strategy)
    assert time.monotonic() - began < 5
    assert run.status == "running"
    wait_for(run, lambda: run.step > 0)
    run.pause()
    wait_for(run, lambda: run.status == "paused")
    held = run.step
    assert run.model_step == held
    time.sleep(0.3)
    assert run.step == held
    with pytest.raises(RunError, match="never end"):
        run.wait()
    run.resize(3)  # a paused run is resized while it stands
    wait_for(run, lambda: run.world_size == 3)
    assert run.status == "paused"
    run.resume()
    wait_for(run, lambda: run.step > held)
    assert run.status == "running"
    with pytest.raises(WaitTimeout, match=r"not ended within 0\.1 s"):
        run.wait(0.1, progress=False)
    run.stop()
    assert run.wait(LIMIT, progress=False) is run
    assert run.status == "finished"
    assert run.stopped_early
    assert run.model_step == run.step == len(run.history.steps)
    assert [event.request for event in run.history.of(Requested)] == ["pause", "resize", "resume", "stop"]
    assert "stopped early" in repr(run)
    run.stop()  # does nothing any more
    for request in (lambda: run.resize(1), run.pause, run.resume):
        with pytest.raises(RunEnded, match="finished at step"):
            request()


@pytest.mark.dask
def test_history_accounts_for_every_step_and_worker(pool: pk.Workers) -> None:
    digits = pk.datasets.digits()
    run = pk.train(Slowed(small_net()), digits.train, on=pool, workers=2, epochs=3).wait(LIMIT, progress=False)
    history = run.history
    start = history.of(RunStart)[0]
    assert (start.samples, start.batch_size, start.steps, start.steps_per_epoch) == (1437, 256, 18, 6)
    assert [step.step for step in history.steps] == list(range(18))
    assert [step.epoch for step in history.steps] == [t // 6 for t in range(18)]
    for step in history.steps:
        assert step.world_size == len(step.workers) == 2
        assert sum(worker.samples for worker in step.workers) == step.samples
        for worker in step.workers:
            assert all(seconds >= 0 for seconds in worker.seconds())
            assert worker.forward_seconds >= 0.005  # the model sleeps that long
        assert min(worker.idle_seconds for worker in step.workers) == 0
        # The slowest worker's phases make up the step: between them there is nothing but a few calls.
        slowest = max(sum(worker.seconds()) for worker in step.workers)
        assert slowest == pytest.approx(step.seconds, rel=0.2, abs=0.004)
    assert sum(segment.steps for segment in history.of(SegmentDone)) == 18
    times = [event.at_seconds for event in history.steps]
    assert times == sorted(times)
    assert history.of(RunEnd)[0].status == "finished"
    copy = History.from_json(history.to_json())
    assert copy.to_dicts() == history.to_dicts()
    frame = history.to_frame()
    assert len(frame) == 36
    assert {f"{phase}_seconds" for phase in PHASES} <= set(frame.columns)


@pytest.mark.dask
def test_a_resize_moves_only_what_must_move_and_is_quick(pool: pk.Workers) -> None:
    run = endless(pool, workers=1)
    latencies = []
    for size in [2, 4, 3, 1] * 2:
        generation = run.history.of(Resized)[-1].generation if run.history.of(Resized) else 0
        run.resize(size)
        wait_for(run, lambda generation=generation: run.history.steps[-1:] and
                 run.history.steps[-1].generation > generation)  # fmt: skip
        asked = run.history.of(Requested)[-1].at_seconds
        latencies.append(next(s for s in run.history.steps if s.generation > generation).at_seconds - asked)
    run.stop()
    run.wait(LIMIT, progress=False)
    moved = [event.chunks_moved for event in run.history.of(Resized)][1:]
    assert set(moved[::4]) <= {31, 32, 33}  # 1 to 2: about half of 64 chunks; sizes of 22 and 23 rows shift it by one
    assert set(moved[1::4]) <= {31, 32, 33}  # 2 to 4
    assert set(moved[2::4]) <= {15, 16, 17}  # 4 to 3: those of the worker that left
    assert set(moved[3::4]) <= {41, 42, 43}  # 3 to 1
    # Many times the half second that a resize takes at most on an idle machine: this is no benchmark.
    assert float(np.median(latencies)) < 2


@pytest.mark.parametrize("kind", ["inline", pytest.param("pool", marks=pytest.mark.dask)])
def test_a_pool_is_free_once_a_run_says_that_it_is_over(kind: str, request: pytest.FixtureRequest) -> None:
    workers = request.getfixturevalue(kind)
    data = pk.datasets.digits().train
    ends = {"finished": small_net(), "failed": FailsLate()}
    for _ in range(3):
        for end, model in ends.items():
            run = pk.train(model, data, on=workers, workers=2, steps=12)
            until(lambda run=run: run.status not in ("running", "paused"), LIMIT)
            assert run.status == end  # and the next one starts at once
            assert (run.error is not None) == (end == "failed")
            assert run.kept_state()["step"] == run.model_step  # and the next one may go on from it


def test_code_that_asks_for_the_end_of_the_process_fails_the_run(inline: pk.Workers) -> None:
    run = pk.train(FailsLate("3", SystemExit), pk.datasets.digits().train, on=inline, steps=50)
    with pytest.raises(RunFailed, match="SystemExit: 3"):
        run.wait(LIMIT, progress=False)
    assert run.status == "failed"
    assert run.history.of(RunEnd)[-1].status == "failed"


def test_a_run_ends_even_if_its_workers_cannot_be_let_go_of(
    inline: pk.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise OSError("nobody answers")

    monkeypatch.setattr(InlineSession, "release", fails)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    run = pk.train(FailsLate(), pk.datasets.digits().train, on=inline, steps=50)
    with pytest.raises(RunFailed, match="the seventh seal is broken"):
        run.wait(LIMIT, progress=False)
    assert run.status == "failed"
    monkeypatch.undo()
    assert pk.train(small_net(), pk.datasets.digits().train, on=inline, steps=5).wait(LIMIT, progress=False).step == 5


@pytest.mark.dask
def test_the_newest_of_many_requests_counts(pool: pk.Workers) -> None:
    run = endless(pool, workers=1)
    for size in (2, 4, 3, 1, 4, 2, 3):
        run.resize(size)
    wait_for(run, lambda: run.world_size == 3 and run.history.steps and run.history.steps[-1].world_size == 3)
    time.sleep(0.5)
    assert run.world_size == 3
    run.stop()
    run.wait(LIMIT, progress=False)


@pytest.mark.dask
def test_requests_from_many_threads_leave_a_run_that_ends(pool: pk.Workers) -> None:
    run = endless(pool, workers=2)

    def meddle(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(12):
            request = generator.integers(4)
            (lambda: run.resize(int(generator.integers(1, 5))), run.pause, run.resume, lambda: repr(run))[request]()
            time.sleep(0.02)

    threads = [threading.Thread(target=meddle, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    run.resume()
    held = run.step
    wait_for(run, lambda: run.step > held)
    run.stop()
    run.wait(LIMIT, progress=False)
    assert [step.step for step in run.history.steps] == list(range(run.step))


@pytest.mark.dask
def test_a_pool_serves_one_run_at_a_time(pool: pk.Workers) -> None:
    run = endless(pool, workers=1)
    with pytest.raises(PoolError, match="busy"):
        endless(pool, workers=1)
    wait_for(run, lambda: run.step > 0)
    assert pk.evaluate(run.model, pk.datasets.digits().test, on=pool).samples == 360  # evaluation goes in between
    run.stop()
    run.wait(LIMIT, progress=False)
    assert endless(pool, workers=1, steps=1).wait(LIMIT, progress=False).status == "finished"


@pytest.mark.dask
def test_the_model_can_be_had_while_it_trains(pool: pk.Workers) -> None:
    run = endless(pool, workers=2)
    wait_for(run, lambda: run.model_step > 0)
    early = run.model
    assert not any(torch.equal(p, q) for p, q in zip(early.parameters(), small_net().parameters(), strict=True))
    run.stop()
    run.wait(LIMIT, progress=False)
    assert run.model_step == run.step
    assert run.model.training  # as a plain loop leaves it


class FailsLate(nn.Module):
    """Fails on a worker only, after some steps."""

    def __init__(
        self, said: str = "the seventh seal is broken", error: type[BaseException] = FloatingPointError
    ) -> None:
        super().__init__()
        self.said, self.error = said, error
        self.layer = nn.Linear(64, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 7:
            raise self.error(self.said)
        return self.layer(pixels)


@pytest.mark.parametrize("strategy", [pk.strategies.AllReduce(), pk.strategies.MapReduce()], ids=repr)
@pytest.mark.parametrize("kind", ["inline", pytest.param("pool", marks=pytest.mark.dask)])
def test_code_that_fails_on_a_worker_fails_the_run_in_words(
    request: pytest.FixtureRequest, kind: str, strategy: Any
) -> None:
    workers = request.getfixturevalue(kind)
    data = pk.datasets.digits().train
    run = pk.train(FailsLate(), data, on=workers, workers=2, steps=50, strategy=strategy)
    with pytest.raises(RunFailed, match="the seventh seal is broken") as caught:
        run.wait(LIMIT, progress=False)
    text = str(caught.value)
    assert run.status == "failed"
    assert text in repr(run)
    assert "FloatingPointError" in text
    assert "Likely cause" in text
    assert "Remedy" in text
    assert len(text.splitlines()) <= 5
    assert run.step == run.model_step <= 7
    assert run.history.of(RunEnd)[0].status == "failed"
    assert [step.step for step in run.history.steps] == list(range(run.step))
    with pytest.raises(RunEnded):
        run.resize(1)
    # The pool is as good as before.
    again = pk.train(small_net(), data, on=workers, workers=2, steps=3, strategy=strategy)
    assert again.wait(LIMIT, progress=False).status == "finished"


@pytest.mark.dask
def test_resize_to_what_cannot_be_is_refused_at_the_call(pool: pk.Workers) -> None:
    run = endless(pool, workers=1)
    for count, words in ((0, "at least 1"), (-2, "at least 1"), (2.0, "whole number"), (True, "whole"), (999, "999")):
        with pytest.raises(WorkerCountError, match=words):
            run.resize(count)  # type: ignore[arg-type]
    assert run.status == "running"  # and goes on, untouched
    run.stop()
    run.wait(LIMIT, progress=False)


def test_more_workers_than_chunks_are_refused(inline: pk.Workers) -> None:
    _, inputs, targets = problem()
    model = nn.Linear(6, 3).double()
    with pytest.raises(WorkerCountError, match="5 workers cannot share 4 chunks"):
        pk.train(model, (inputs, targets), on=inline, workers=5, batch_size=4)


@pytest.mark.dask
def test_waiting_follows_the_newest_request(pool: pk.Workers) -> None:
    run = endless(pool, workers=1, steps=200)
    run.pause()
    with pytest.raises(RunError, match="never end"):
        run.wait()  # although the pause has not taken effect yet
    wait_for(run, lambda: run.status == "paused")
    run.resume()
    assert run.wait(progress=False).status == "finished"


@pytest.mark.dask
def test_a_resize_that_a_stop_overtakes_leaves_nothing_on_the_newcomer(pool: pk.Workers) -> None:
    for delay in (0.0, 0.02, 0.05, 0.1):
        run = endless(pool, workers=1)
        wait_for(run, lambda run=run: run.step > 0)
        run.resize(3)
        time.sleep(delay)
        run.stop()
        run.wait(LIMIT, progress=False)
    deadline = time.monotonic() + 10
    while any(held := [f["runs"] for f in pool.client.run(remote.survey).values()]):  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, held
        time.sleep(0.1)


@pytest.mark.dask
def test_a_hanging_newcomer_holds_up_nothing_and_another_one_comes(nothing_left: None) -> None:
    with pk.connect(3) as workers:
        hanging = workers.names[1]
        run = endless(workers, workers=1, limit_seconds=2)
        wait_for(run, lambda: run.step > 0)
        os.kill(workers.pids["worker 1"], signal.SIGSTOP)  # type: ignore[attr-defined]
        held = run.step
        run.resize(2)
        wait_for(run, lambda: run.world_size == 2, 30)
        assert hanging not in run.members
        sizes = [step.world_size for step in run.history.steps if step.step > held]
        assert sizes.count(1) > 20  # the run went on meanwhile


@pytest.mark.dask
def test_a_busy_notebook_cell_does_not_starve_the_run(pool: pk.Workers) -> None:
    usual = sys.getswitchinterval()
    run = endless(pool, workers=2)
    wait_for(run, lambda: run.step > 0)
    held, deadline = run.step, time.monotonic() + 3
    while time.monotonic() < deadline:  # computes in Python, and never sleeps
        pass
    assert run.status == "running"
    assert run.step > held + 20
    run.stop()
    run.wait(LIMIT, progress=False)
    assert sys.getswitchinterval() == usual


SCRIPT = """
import torch, parakit as pk

if __name__ == "__main__":
    digits = pk.datasets.digits()
    with pk.connect("inline") as workers:
        pk.train(torch.nn.Linear(64, 10), digits.train, on=workers, epochs=40, batch_size=32).wait(60)
"""


def test_a_script_prints_one_line_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("finished: epoch 40, step 1,800/1,800, loss ")
    assert "samples/s" in lines[0]


def test_a_terminal_shows_a_line_that_is_rewritten(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, tmp_path / "script.py"], stderr=theirs, stdout=subprocess.PIPE) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            seen += piece
        os.close(ours)
        assert process.wait(60) == 0
    text = seen.decode()
    assert text.count("\n") == 1
    assert text.count("\r") >= 3
    assert "left" in text


@pytest.mark.dask
def test_the_wait_for_tasks_is_exchange_and_no_update(pool: pk.Workers) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    data = pk.datasets.digits().train
    run = pk.train(model, data, on=pool, workers=2, steps=20, strategy=pk.strategies.MapReduce())
    steps = run.wait(LIMIT, progress=False).history.steps[5:]
    update, exchange, wall = (sum(seconds) for seconds in zip(*(
        (part.update_seconds, part.exchange_seconds + part.idle_seconds, step.seconds)
        for step in steps for part in step.workers
    ), strict=True))  # fmt: skip
    assert update < 0.25 * wall
    assert exchange > 0.5 * wall


@pytest.mark.dask
@pytest.mark.parametrize("strategy", [pk.strategies.AllReduce(), pk.strategies.MapReduce()], ids=repr)
@pytest.mark.parametrize("kind", ["inline", "dask"])
def test_the_first_step_of_a_segment_tells_how_much_gradients_differ(
    pool: pk.Workers, inline: pk.Workers, kind: str, strategy: Any
) -> None:
    on, model = (inline if kind == "inline" else pool), small_net().double()
    digits = pk.datasets.digits().train
    data = digits.tensors[0].double(), digits.tensors[1]
    run = pk.train(model, data, on=on, workers=2, steps=40, clip_norm=1e-3, strategy=strategy)
    run.wait(LIMIT, progress=False)
    norms = run.history.of(GradientNorms)
    assert [found.step for found in norms] == [segment.first_step for segment in run.history.of(SegmentDone)]

    def gradient(rows: Samples) -> torch.Tensor:
        model.zero_grad()
        nn.functional.cross_entropy(model(rows.inputs), rows.targets).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]

    job, ownership = run.plan.job, run.plan.assignment.training
    shares = []
    for member in ownership.workers:
        holding = LocalChunks(job.recipe.order)
        holding.change([], {chunk: job.load(chunk) for chunk in ownership.chunks_of[member]})
        share = holding.share(0)
        assert share is not None
        shares.append(share)
    assert norms[0].samples == tuple(len(share) for share in shares)
    assert norms[0].norms_squared == pytest.approx([float(gradient(share).square().sum()) for share in shares])
    everything = Samples.join(shares)
    assert norms[0].global_norm_squared == pytest.approx(float(gradient(everything).square().sum()))
    alone = pk.train(model, data, on=on, workers=1, steps=4, strategy=strategy).wait(LIMIT, progress=False)
    assert alone.history.of(GradientNorms) == ()


def test_the_noise_scale_is_told_in_words_until_it_is_known(inline: pk.Workers) -> None:
    alone = pk.train(small_net(), pk.datasets.digits().train, on=inline, workers=1, steps=5).wait(LIMIT, progress=False)
    assert alone.noise.noise_scale is None
    assert "at least two workers" in alone.noise.words
    run = pk.train(
        small_net(), pk.datasets.digits().train, on=inline, workers=8, steps=1500, batch_size=256,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-4),
    ).wait(LIMIT, progress=False)  # fmt: skip
    norms = run.history.of(GradientNorms)
    assert run.noise.steps == len(norms) > 3
    # By the definition: the spread of the workers' gradients, per sample, over the squared length of their mean.
    traces, squares = [], []
    for found in norms:
        rows, mine = np.array(found.samples), np.array(found.norms_squared)
        traces.append((rows @ mine - rows.sum() * found.global_norm_squared) / (len(rows) - 1))
        squares.append(found.global_norm_squared - traces[-1] / rows.sum())
    assert run.noise.trace == pytest.approx(np.mean(traces), rel=0.3)
    assert run.noise.gradient_squared == pytest.approx(np.mean(squares), rel=0.5)
