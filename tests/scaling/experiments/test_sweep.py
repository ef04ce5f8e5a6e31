"""Sweeps: what is visited, in which order, and what becomes of one that does not come to its end."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import parakit as pk
from parakit.baselines.plain_loop import PlainRates
from parakit.errors import DataError, InputError, ModelError, PoolError, RunFailed, Unreachable, WorkerCountError
from parakit.events.records import PHASES, RunStart
from parakit.scaling.experiments import arms
from parakit.scaling.experiments.progress_bar import Ticker
from parakit.scaling.experiments.schedule import Count, blocks, usual_counts
from parakit.scaling.experiments.sweep import sweep
from parakit.scaling.study.study import Scaling
from parakit.workers.virtual.pool import simulated
from tests.runs.test_exact import LIMIT

ROWS, BATCH = 2000, 200


class Net(nn.Module):
    """Fails once it has computed so many batches."""

    def __init__(self, fails_after: int | None = None) -> None:
        super().__init__()
        self.layers = nn.Linear(20, 3)
        self.fails_after, self.batches = fails_after, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        if self.fails_after is not None and self.batches > self.fails_after:
            raise ArithmeticError("out of order")
        return self.layers(inputs)


def data(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(rows, 20, generator=torch.Generator().manual_seed(3))
    return inputs, inputs[:, :3].argmax(1)


def swept(on: pk.Workers, model: nn.Module | None = None, **how: Any) -> Scaling:
    given = {"workers": [2], "repeats": 2, "seconds": 0.05, "batch_size": BATCH, "progress": False} | how
    return sweep(model or Net(), data(), on=on, **given)


def is_free(on: pk.Workers) -> bool:
    return pk.train(Net(), data(), on=on, workers=1, steps=1).wait(LIMIT, progress=False).status == "finished"


# --- the order


@pytest.mark.parametrize("seed", range(5))
def test_every_block_visits_everything_once_in_an_order_of_its_own(seed: int) -> None:
    places = [*(Count(n, 1) for n in (1, 2, 4, 8)), Count(0, 1), Count(0, 2)]
    order = list(blocks(places, 6, seed))
    found = [[place for each, place in order if each == block] for block in range(6)]
    assert [block for block, _ in order] == sorted(block for block, _ in order)
    for block in found:
        assert len(block) == len(places)
        assert set(block) == set(places)
    assert len({tuple(block) for block in found}) > 1
    assert order == list(blocks(places, 6, seed))
    assert order != list(blocks(places, 6, seed + 1))


def test_every_place_of_a_block_has_everything_about_as_often() -> None:
    order = list(blocks("abc", 300, 0))
    assert min(Counter(place for _, place in order[::3]).values()) > 70


# --- what comes of one


def check_visits(study: Scaling, counts: tuple[int, ...], repeats: int) -> None:
    """Every block holds every count and every rival once, in the order in which they were made."""
    rivals = sorted({m.threads for m in study.measurements if m.kind == "plain"})
    assert study.complete
    assert study.workers == counts
    expected = sorted([*((n, 0) for n in counts), *((0, threads) for threads in rivals)])
    for block in range(repeats):
        found = [m for m in study.measurements if m.block == block]
        assert sorted((m.workers, 0 if m.workers else m.threads) for m in found) == expected
        assert {m.repeat for m in found} == {block}
    moments = [m.at_seconds for m in study.measurements]
    assert moments == sorted(moments)
    assert moments[0] > 0


def test_a_sweep_on_inline_workers(inline: pk.Workers) -> None:
    study = swept(inline, workers=[3, 1])
    check_visits(study, (1, 3), 2)
    assert next(iter(study.baselines)) == "plain PyTorch, 1 core"
    assert study.about.batch_size == BATCH
    assert study.about.parameters == 63
    assert {m.threads for m in study.measurements if m.workers} == {inline.threads}
    for m in study.measurements:
        assert m.rate == pytest.approx(BATCH * m.steps / m.seconds)
        assert len(m.breakdown) == (len(PHASES) if m.workers else 0)
        assert sum(m.breakdown) < 3 * m.seconds / m.steps
        assert m.seconds >= 0.9 * 0.05
    assert "take turns" in repr(study)
    assert (study.about.in_turns, study.about.simulated) == (True, False)
    assert is_free(inline)
    # The steps that were timed are kept, some of each visit.
    (history,) = study.histories
    assert {step.world_size for step in history.steps} == {1, 3}
    assert len(history.steps) <= 4 * 64
    assert study.costs.batch_size == BATCH


@pytest.mark.dask
@pytest.mark.parametrize("scaling", ["strong", "weak"])
def test_a_sweep_on_processes(pool: pk.Workers, scaling: str) -> None:
    study = swept(pool, scaling=scaling, repeats=1)
    check_visits(study, (1, 2), 1)
    assert study.about.machine
    assert study.about.pool == pool.kind
    assert {m.threads for m in study.measurements if m.workers} == {1}
    assert {m.cores for m in study.measurements} == {pool.cores}
    rows = {step.world_size: step.samples for history in study.histories for step in history.steps}
    assert rows == {1: BATCH, 2: BATCH if scaling == "strong" else 2 * BATCH}
    assert is_free(pool)


def test_in_weak_scaling_the_batch_grows_with_the_workers(inline: pk.Workers) -> None:
    study = swept(inline, workers=[4], scaling="weak", repeats=1, batch_size=100)
    check_visits(study, (1, 4), 1)
    starts = [history.latest(RunStart) for history in study.histories]
    assert [start.batch_size for start in starts if start is not None] == [100, 400]
    assert study.costs.weak
    assert study.costs.batch_size == 100
    assert "batch of 100 for each worker" in repr(study)


def test_a_default_batch_has_rows_for_every_worker(inline: pk.Workers) -> None:
    study = swept(inline, workers=[10], scaling="weak", repeats=1, batch_size=None, seconds=0.01)
    assert study.about.batch_size == ROWS // 10


@pytest.mark.parametrize("arithmetic", [True, False])
def test_a_sweep_on_simulated_workers_has_the_speedups_of_their_costs(arithmetic: bool) -> None:
    with simulated(64, arithmetic=arithmetic, cores_per_node=64) as far:
        study = swept(far, workers=[2, 8, 64], repeats=2, seconds=0.3, chunks=64)
        check_visits(study, (1, 2, 8, 64), 2)
        assert study.simulated
        assert study.about.simulated
        assert study.costs.simulated
        assert "imulated" in repr(study.compare())
        assert "imulated" in repr(study.fit("amdahl"))
        assert "imulated" in str(study.predict(128))
        assert study.baselines == {}
        assert all(m.simulated for m in study.measurements)
        assert "imulated" in repr(study)
        costs = far.costs.with_(nbytes=4 * 63, batch_size=BATCH)
        for workers in (2, 8, 64):
            assert study.speedup(workers).median == pytest.approx(costs.speedup(workers), rel=0.15)


def test_a_baseline_that_fails_is_told_and_the_rest_is_measured(
    inline: pk.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = PlainRates(1, (), "MemoryError: 200 rows are too many")
    monkeypatch.setattr("parakit.baselines.plain_loop.measure", lambda trial: failing)
    study = swept(inline, repeats=1)
    assert study.workers == (1, 2)
    assert study.baselines == {}
    assert study.notes[0].startswith("plain PyTorch, ")
    assert study.notes[0].endswith("could not be measured: MemoryError: 200 rows are too many")
    assert "Not measured: plain PyTorch." in repr(study)


# --- what does not come to its end


def test_an_interrupt_keeps_what_was_measured(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, made = arms.time_run, []

    def once(*args: Any) -> Any:
        made.append(timed(*args))
        if len(made) == 2:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return made[-1]

    monkeypatch.setattr(arms, "time_run", once)
    study = swept(inline, repeats=1000)
    assert 2 <= len(study.measurements) < 12
    assert not study.complete
    assert "Incomplete: interrupted." in repr(study)
    assert is_free(inline)


@pytest.mark.dask
def test_an_interrupt_leaves_processes_free(pool: pk.Workers) -> None:
    timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    study = swept(pool, repeats=1000)
    timer.join(5)
    assert study.measurements
    assert study.stopped == "interrupted."
    assert is_free(pool)


def test_an_interrupt_before_anything_was_measured_goes_on(inline: pk.Workers) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        swept(inline, seconds=100.0)
    timer.join(5)
    assert is_free(inline)


def test_a_run_that_fails_half_way_keeps_what_was_measured(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, made = arms.time_run, []

    class Breaks(Net):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.fails_after = 0 if len(made) == 2 else None  # from here on the third visit cannot succeed
            return super().forward(inputs)

    def counted(*args: Any) -> Any:
        made.append(timed(*args))
        return made[-1]

    monkeypatch.setattr(arms, "time_run", counted)
    study = swept(inline, Breaks(), repeats=50)
    assert not study.complete
    assert len([m for m in study.measurements if m.workers]) == 2
    assert "ArithmeticError: out of order" in study.stopped
    assert "ArithmeticError: out of order" in repr(study)
    assert is_free(inline)


def test_a_run_that_fails_at_once_is_an_error(inline: pk.Workers) -> None:
    with pytest.raises((RunFailed, ModelError), match="out of order"):
        swept(inline, Net(fails_after=12), repeats=1)
    assert is_free(inline)


def test_a_pool_that_closes_ends_the_sweep() -> None:
    with pk.connect("inline") as workers:
        timer = threading.Timer(1.2, workers.close)
        timer.start()
        study = swept(workers, repeats=1000)
        timer.join(5)
    assert study.measurements
    assert "closed" in study.stopped


def test_a_count_that_cannot_be_had_is_told_and_the_others_are_measured(
    inline: pk.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = arms.time_run

    def refused(run: pk.Run, count: int, *args: Any) -> Any:
        if count == 3:
            raise Unreachable("3 workers could not be measured: the cluster is full.")
        return timed(run, count, *args)

    monkeypatch.setattr(arms, "time_run", refused)
    study = swept(inline, workers=[2, 3], repeats=1)
    assert study.workers == (1, 2)
    assert not study.complete
    assert study.notes == ("3 workers could not be measured: the cluster is full.",)


# --- what is refused


@pytest.mark.parametrize(
    "wrong",
    [
        [], [0], [-1], [True], [1.5], ["2"], "2", [2, 2], [float("nan")], [float("inf")], [10**9], [None], {2: 1},
        2.5,
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_counts_are_refused(inline: pk.Workers, wrong: Any) -> None:
    with pytest.raises(WorkerCountError, match="workers"):
        swept(inline, workers=wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("repeats", 0), ("repeats", True), ("repeats", 1.5), ("seconds", 0), ("seconds", -1.0),
        ("seconds", float("nan")),
        ("scaling", "medium"), ("scaling", None), ("seed", -1), ("batch_size", 0), ("progress", "yes"), ("chunks", 0),
        ("strategy", 3), ("learning_rate", -1.0), ("on_nonfinite", "ignore"), ("limit_seconds", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scaling", ["strong", "weak"])
def test_wrong_options_are_refused(inline: pk.Workers, name: str, wrong: Any, scaling: str) -> None:
    with pytest.raises(InputError, match=name):
        swept(inline, **{"scaling": scaling} | {name: wrong})
    inline.hold("free", lambda: None)  # nothing was started


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"seconds": float("inf")}, "inf hours"),
        ({"seconds": 1e308}, "hours; the most is 24"),
        ({"seconds": 40_000.0, "repeats": 2}, "2 worker counts, 2 repeats and 40000 seconds each .* 44.4[45] hours"),
        ({"repeats": 10**9}, "repeats is 1000000000; the most is 10,000"),
        ({"repeats": 10**400}, "repeats is 10+"),
        ({"repeats": 10_000, "workers": range(1, 60)}, "59 worker counts, 10,000 repeats and 0.05 seconds"),
        ({"workers": itertools.count(1)}, "workers has more than 1,000 counts"),
        ({"workers": itertools.repeat(2)}, "workers has 2 more than once"),
        ({"workers": range(1, 10**9)}, "workers has more than 1,000 counts"),
    ],
)  # fmt: skip
def test_a_sweep_without_end_is_refused_with_its_numbers(inline: pk.Workers, how: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        swept(inline, **how)
    inline.hold("free", lambda: None)  # nothing was started


@pytest.mark.parametrize("name", ["steps", "scheduler", "validation", "rate"])
def test_options_that_a_sweep_has_not_are_refused_as_python_does(inline: pk.Workers, name: str) -> None:
    with pytest.raises(TypeError, match=rf"sweep\(\) got an unexpected keyword argument '{name}'"):
        swept(inline, **{name: 1})
    with pytest.raises(TypeError, match=rf"advise\(\) got an unexpected keyword argument '{name}'"):
        pk.advise(Net(), data(), on=inline, **{name: 1})


def test_counts_may_come_from_a_generator(inline: pk.Workers) -> None:
    assert swept(inline, workers=(n for n in (2, 1)), repeats=1, seconds=0.01).workers == (1, 2)


def test_numbers_of_numpy_are_taken(inline: pk.Workers) -> None:
    import numpy as np

    study = swept(inline, workers=np.array([1]), repeats=np.int64(1), seconds=np.float32(0.01))
    assert study.workers == (1,)


def test_more_workers_than_chunks_or_than_the_pool_are_refused(inline: pk.Workers) -> None:
    with pytest.raises(WorkerCountError, match="cannot share"):
        swept(inline, workers=[4], chunks=3)
    with pytest.raises(WorkerCountError, match="65"):
        swept(inline, workers=[65])
    with pytest.raises(DataError, match="larger than the data"):
        swept(inline, workers=[11], scaling="weak", batch_size=BATCH)


@pytest.mark.dask
def test_more_workers_than_a_pool_can_grow_to_are_refused(pool: pk.Workers) -> None:
    with pytest.raises(WorkerCountError, match=f"{pool.most + 1} workers were asked for"):
        swept(pool, workers=[pool.most + 1], chunks=10**6)


def test_a_busy_pool_and_what_is_no_pool_are_refused(inline: pk.Workers) -> None:
    run = pk.train(Net(), data(), on=inline, steps=10**6)
    with pytest.raises(PoolError, match="busy"):
        swept(inline)
    run.stop()
    run.wait(LIMIT, progress=False)
    with pytest.raises(InputError, match="no pool of workers"):
        swept(3)  # type: ignore[arg-type]
    inline.close()
    with pytest.raises(PoolError, match="closed"):
        swept(inline)


def test_by_default_counts_go_up_to_what_the_pool_has(inline: pk.Workers) -> None:
    with simulated(12, arithmetic=False) as far:
        assert swept(far, workers=None, repeats=1).workers == (1, 2, 4, 8, 12)
    assert usual_counts(inline) == [1, 2, 4]


# --- the line


def test_the_line_says_what_is_measured_and_the_time_left(
    inline: pk.Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    ticker = Ticker(10, 1.5)
    assert ticker.line("2 workers") == "measuring 2 workers: 1 of 10, about 0:15 left"
    ticker.tick()
    assert ticker.line("2 workers").startswith("measuring 2 workers: 2 of 10, about 0:00")
    swept(inline, workers=1, repeats=1, seconds=0.01, progress=True)
    # No terminal: one line, when all is over.
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("3 measurements made in 0:0", "2 measurements made in 0:0"))


def test_a_notebook_has_one_output_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, said: dict[str, str], *, raw: bool) -> None:  # noqa: ARG002 - what IPython's takes
            shown.append(said["text/plain"])

    def display(said: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert not shown
        shown.append(said["text/plain"])
        return Handle()

    monkeypatch.setattr("parakit.scaling.experiments.progress_bar.in_a_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    ticker = Ticker(2, 1.0)
    ticker.show("1 worker")
    ticker.tick()
    ticker.show("2 workers")
    ticker.tick()
    ticker.end("2 measurements made")
    assert [line.split(":")[0] for line in shown] == [
        "measuring 1 worker",
        "measuring 2 workers",
        "2 measurements made in 0",
    ]
