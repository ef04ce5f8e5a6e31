"""Losses: whatever is killed, stopped or taken away, and whenever, the run ends as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster

import parakit as pk
from parakit.errors import Diverged, InputError, RunError, RunFailed
from parakit.events.records import EpochEnded, Recovered, RunEnd, Said, SegmentDone, WorkersLost
from parakit.workers import remote
from parakit.workers.dask import map as mapping
from parakit.workers.dask.staging import Staging
from parakit.workers.dask.worker_ids import address_of
from tests.mortal import MortalAllReduce, MortalNet, MortalSGD, RankedAllReduce, arm, sgd
from tests.runs.test_exact import wait_for
from tests.waiting import until

pytestmark = [pytest.mark.dask, pytest.mark.timeout(180)]
LIMIT = 90
STEPS = 160
DIGITS = pk.datasets.digits()


def train(on: pk.Workers, folder: Path, **how: Any) -> pk.Run:
    how = {"workers": 2, "steps": STEPS, "strategy": MortalAllReduce(folder), "limit_seconds": 3} | how
    place = str(folder)
    how.setdefault("optimizer", lambda p: MortalSGD(p, place))
    pause = how.pop("pause_seconds", 0.004)
    return pk.train(MortalNet(folder, pause), DIGITS.train, on=on, batch_size=256, **how)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pk.Run:
    """The same run, to which nothing happens."""
    with pk.connect("inline") as workers:
        folder = tmp_path_factory.mktemp("undisturbed")
        return train(workers, folder, pause_seconds=0.0, validation=DIGITS.test).wait(LIMIT, progress=False)


@pytest.fixture(scope="module")
def mortals() -> Iterator[pk.Workers]:
    """Four local processes that may die."""
    with pk.connect(4) as workers:
        yield workers


@pytest.fixture
def three(mortals: pk.Workers) -> pk.Workers:
    """A pool with three local processes at least; another may still be coming back from the test before."""
    until(lambda: mortals.size >= 3, 60)
    return mortals


def pid_of(on: pk.Workers, name: str) -> int:
    place = address_of(name)
    found: dict[str, Any] = on.client.run(remote.survey, workers=[place])  # type: ignore[attr-defined]
    return int(found[place]["pid"])


def members(run: pk.Run) -> tuple[str, ...]:
    return run.members


def the_only_loss(run: pk.Run) -> WorkersLost:
    losses = run.history.of(WorkersLost)
    assert len(losses) == 1, losses
    return losses[0]


def assert_as_if_nothing_had_happened(run: pk.Run, undisturbed: pk.Run) -> None:
    assert run.status == "finished"
    assert [step.step for step in run.history.steps] == list(range(STEPS))
    torch.testing.assert_close(
        torch.from_numpy(run.history.losses), torch.from_numpy(undisturbed.history.losses), rtol=0, atol=1e-5
    )
    for mine, other in zip(run.model.parameters(), undisturbed.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


# --- a worker dies


@pytest.mark.parametrize("place", ["forward", "backward", "exchange", "update", "commit"])
def test_a_worker_that_is_killed_in_a_step_costs_nothing_but_time(
    three: pk.Workers, tmp_path: Path, undisturbed: pk.Run, place: str
) -> None:
    run = train(three, tmp_path)
    wait_for(run, lambda: run.step > 20)
    armed = arm(tmp_path, place)
    run.wait(LIMIT, progress=False)
    assert not armed.exists()
    lost = the_only_loss(run)
    (recovered,) = run.history.of(Recovered)
    assert len(lost.workers) == 1
    assert 20 < lost.step == recovered.step < STEPS
    assert recovered.chunks_loaded == 32  # of 64: those of one of two
    assert recovered.steps_again == 0
    assert_as_if_nothing_had_happened(run, undisturbed)


@pytest.mark.parametrize("kind", ["kill", "stop"])
@pytest.mark.parametrize("place", ["exchange", "slice"])
def test_a_worker_that_is_lost_with_an_update_half_done_harms_no_state(
    three: pk.Workers, tmp_path: Path, undisturbed: pk.Run, place: str, kind: str
) -> None:
    run = train(three, tmp_path, optimizer=sgd, workers=3)
    wait_for(run, lambda: run.step > 20)
    armed = arm(tmp_path, place, kind)
    run.wait(LIMIT, progress=False)
    assert not armed.exists()
    lost = the_only_loss(run)
    (recovered,) = run.history.of(Recovered)
    assert 20 < lost.step == recovered.step < STEPS
    assert recovered.steps_again == 0
    assert_as_if_nothing_had_happened(run, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_update_of_a_segment_half_done_harms_no_state(
    three: pk.Workers, tmp_path: Path, undisturbed: pk.Run, rank: int
) -> None:
    # Whoever is left then is at the step that the run goes on from, but in the memory in common a slice is not.
    run = train(three, tmp_path, optimizer=sgd, strategy=RankedAllReduce(), steps=7, pause_seconds=0.6)
    wait_for(run, lambda: run.step > 2)
    armed = arm(tmp_path, f"slice of rank {rank}")
    run.wait(LIMIT, progress=False)
    assert not armed.exists()
    assert {segment.steps for segment in run.history.of(SegmentDone)} == {1}
    the_only_loss(run)
    torch.testing.assert_close(
        torch.from_numpy(run.history.losses), torch.from_numpy(undisturbed.history.losses[:7]), rtol=0, atol=1e-5
    )


def test_a_worker_that_is_killed_while_it_evaluates(three: pk.Workers, tmp_path: Path, undisturbed: pk.Run) -> None:
    run = train(three, tmp_path, validation=DIGITS.test)
    wait_for(run, lambda: run.step > 20)
    arm(tmp_path, "evaluate")
    run.wait(LIMIT, progress=False)
    assert len(run.history.of(WorkersLost)) == 1
    assert_as_if_nothing_had_happened(run, undisturbed)
    mine, other = (
        [(end.epoch, end.step, end.validation_accuracy) for end in r.history.of(EpochEnded)] for r in (run, undisturbed)
    )
    assert mine == other


@pytest.mark.parametrize("who", ["newcomer", "member"])
def test_a_worker_that_is_killed_in_a_resize(three: pk.Workers, tmp_path: Path, undisturbed: pk.Run, who: str) -> None:
    run = train(three, tmp_path, workers=1 if who == "newcomer" else 3)
    wait_for(run, lambda: run.step > 20)
    # A newcomer takes over the state; of those who stay, the last to commit before the group changes is struck.
    arm(tmp_path, "load" if who == "newcomer" else "commit")
    run.resize(3 if who == "newcomer" else 2)
    run.wait(LIMIT, progress=False)
    assert run.history.of(WorkersLost)
    assert_as_if_nothing_had_happened(run, undisturbed)


def strike_as_chunks_travel(
    on: pk.Workers, victim: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Send a signal to a worker at the moment when chunks are about to be sent to it; the list then names it."""
    pid = pid_of(on, victim)
    place, struck = Staging.place, list[str]()

    def deadly(staging: Staging, member: str, chunks: Any, load: Any) -> Any:
        if chunks and member == victim and not struck:
            struck.append(member)
            os.kill(pid, number)
        return place(staging, member, chunks, load)

    monkeypatch.setattr(Staging, "place", deadly)
    return struck


def test_a_worker_that_is_killed_while_its_chunks_travel(
    three: pk.Workers, tmp_path: Path, undisturbed: pk.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(three, tmp_path, workers=2)
    wait_for(run, lambda: run.step > 20)
    victim = next(name for name in three.names if name not in members(run))  # the next one to be taken in
    struck = strike_as_chunks_travel(three, victim, signal.SIGKILL, monkeypatch)
    run.resize(3)
    run.wait(LIMIT, progress=False)
    assert struck
    assert_as_if_nothing_had_happened(run, undisturbed)


@pytest.mark.parametrize("when", ["recipe", "chunks"])
def test_a_worker_that_is_killed_before_there_is_a_group(
    three: pk.Workers, tmp_path: Path, undisturbed: pk.Run, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    victim = three.names[0]
    if when == "chunks":
        struck = strike_as_chunks_travel(three, victim, signal.SIGKILL, monkeypatch)
    else:
        struck, bring, pid = list[str](), Staging.bring, pid_of(three, victim)

        def deadly(staging: Staging, assignment: Any) -> None:
            if not struck:
                struck.append(victim)
                os.kill(pid, signal.SIGKILL)
            bring(staging, assignment)

        monkeypatch.setattr(Staging, "bring", deadly)
    run = train(three, tmp_path, workers=2)
    run.wait(LIMIT, progress=False)
    assert struck == [victim]
    assert_as_if_nothing_had_happened(run, undisturbed)


def test_a_newcomer_that_is_stopped_while_its_chunks_travel_is_replaced_within_the_limit(
    three: pk.Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    until(lambda: three.size == 4, 60)
    run = train(three, tmp_path, workers=2, steps=100_000)
    wait_for(run, lambda: run.step > 20)
    victim = next(name for name in three.names if name not in members(run))
    struck = strike_as_chunks_travel(three, victim, signal.SIGSTOP, monkeypatch)
    run.resize(3)
    began = time.monotonic()
    wait_for(run, lambda: run.world_size == 3, 30)
    assert struck
    assert victim not in members(run)
    assert time.monotonic() - began < 3 + 5
    run.stop()
    run.wait(LIMIT, progress=False)


def test_a_strategy_beside_the_notebook_goes_on_too(three: pk.Workers, tmp_path: Path, undisturbed: pk.Run) -> None:
    run = train(three, tmp_path, strategy=pk.strategies.MapReduce())
    wait_for(run, lambda: run.step > 20)
    arm(tmp_path, "backward")
    run.wait(LIMIT, progress=False)
    assert len(run.history.of(WorkersLost)) == 1
    assert_as_if_nothing_had_happened(run, undisturbed)


@pytest.mark.parametrize("place", ["forward", "update", "commit"])
def test_the_only_active_worker_dies_and_an_idle_one_goes_on_from_its_last_commit(
    three: pk.Workers, tmp_path: Path, undisturbed: pk.Run, place: str
) -> None:
    run = train(three, tmp_path, workers=1)
    wait_for(run, lambda: run.step > 20)
    armed = arm(tmp_path, place)
    run.wait(LIMIT, progress=False)
    assert not armed.exists()
    (recovered,) = run.history.of(Recovered)
    assert 20 < recovered.step < STEPS
    assert recovered.steps_again == 0
    assert recovered.chunks_loaded == 64
    assert_as_if_nothing_had_happened(run, undisturbed)


def test_whoever_comes_in_place_of_the_lost_is_taken_in(three: pk.Workers, tmp_path: Path) -> None:
    run = train(three, tmp_path, workers=3, steps=100_000)
    wait_for(run, lambda: run.step > 5)
    arm(tmp_path, "forward")
    wait_for(run, lambda: run.history.of(Recovered), 20)
    assert run.target == 3
    assert len(run.history.of(Recovered)[0].workers) == 2
    wait_for(run, lambda: run.world_size == 3, 60)
    seen = run.step
    wait_for(run, lambda: run.step > seen + 5)
    run.stop()
    run.wait(LIMIT, progress=False)


def test_a_request_for_more_while_some_are_away_does_not_shrink_the_pool(three: pk.Workers, tmp_path: Path) -> None:
    run = train(three, tmp_path, workers=1, steps=100_000)
    wait_for(run, lambda: run.step > 5)
    there = three.size
    idle = [pid_of(three, name) for name in three.names if name not in members(run)]
    for pid in idle:  # all at once, for the first may be back in a tenth of a second
        os.kill(pid, signal.SIGKILL)
    until(lambda: three.size < there, 30)
    run.resize(2)
    wait_for(run, lambda: run.world_size == 2, 60)
    until(lambda: three.size == 4, 60)
    run.stop()
    run.wait(LIMIT, progress=False)


def test_a_paused_run_notices_a_death_and_stays_paused(three: pk.Workers, tmp_path: Path) -> None:
    run = train(three, tmp_path, steps=100_000)
    wait_for(run, lambda: run.step > 5)
    run.pause()
    wait_for(run, lambda: run.status == "paused")
    os.kill(pid_of(three, members(run)[0]), signal.SIGKILL)
    wait_for(run, lambda: run.history.of(Recovered), 20)
    assert run.status == "paused"
    held = run.step
    run.resume()
    wait_for(run, lambda: run.step > held)
    run.stop()
    run.wait(LIMIT, progress=False)


def test_recovery_takes_less_than_a_second(three: pk.Workers, tmp_path: Path) -> None:
    run = train(three, tmp_path, steps=100_000)
    delays = []
    for _ in range(3):
        until(lambda: three.size >= 3, 60)
        wait_for(run, lambda: run.world_size == 2, 60)
        seen = run.step
        wait_for(run, lambda seen=seen: run.step > seen + 20)
        before = len(run.history.of(Recovered))
        victim = pid_of(three, members(run)[0])
        struck = run.elapsed_seconds
        os.kill(victim, signal.SIGKILL)
        wait_for(run, lambda before=before: len(run.history.of(Recovered)) > before, 20)
        ready = run.history.of(Recovered)[-1].at_seconds
        wait_for(run, lambda ready=ready: run.history.steps[-1].at_seconds > ready)
        delays.append(next(s.at_seconds for s in run.history.steps if s.at_seconds > ready) - struck)
    run.stop()
    run.wait(LIMIT, progress=False)
    print(f"from SIGKILL to the next step: {[round(d, 2) for d in delays]} s")
    assert statistics.median(delays) < 1.0


@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_pk_evaluate_survives_the_loss_of_a_worker(
    three: pk.Workers, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "_SILENT_SECONDS", 3.0)
    model = MortalNet(tmp_path, 0.1)
    expected = pk.evaluate(model, DIGITS.test, on=three)
    armed = arm(tmp_path, "evaluate", kind)
    began = time.monotonic()
    found = pk.evaluate(model, DIGITS.test, on=three)
    assert not armed.exists()
    assert (found.samples, found.accuracy) == (expected.samples, expected.accuracy)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert time.monotonic() - began < 15


# --- a worker is taken away, or hangs


@pytest.fixture(scope="module")
def lent() -> Iterator[LocalCluster]:
    """A cluster that parakit did not start."""
    with LocalCluster(
        n_workers=3, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50
    ) as cluster:
        yield cluster


@pytest.fixture
def borrowed(lent: LocalCluster) -> LocalCluster:
    """That cluster, with three workers. Whoever lets one retire has to be the last: it does not come again."""
    lent.scale(3)
    until(lambda: len(lent.scheduler.workers) == 3, 60)
    return lent


def test_a_worker_that_wakes_up_later_does_not_disturb(
    borrowed: LocalCluster, tmp_path: Path, undisturbed: pk.Run
) -> None:
    with pk.connect(borrowed) as workers:
        run = train(workers, tmp_path, limit_seconds=2)
        wait_for(run, lambda: run.step > 20)
        sleeper = members(run)[0]
        pid, before = pid_of(workers, sleeper), len(run.history.of(Recovered))
        os.kill(pid, signal.SIGSTOP)  # on somebody else's cluster nobody is killed
        try:
            wait_for(run, lambda: len(run.history.of(Recovered)) > before, 40)
        finally:
            os.kill(pid, signal.SIGCONT)
        run.wait(LIMIT, progress=False)
        assert sleeper not in members(run)
        assert_as_if_nothing_had_happened(run, undisturbed)
        again = train(workers, tmp_path, workers=1, steps=4)
        again.wait(LIMIT, progress=False)
        assert sleeper in workers.names  # awake, it serves the next run


@pytest.mark.parametrize("how", ["scaled", "retired"])
def test_a_cluster_that_takes_its_machines_back(
    borrowed: LocalCluster, tmp_path: Path, undisturbed: pk.Run, how: str
) -> None:
    with pk.connect(borrowed) as workers:
        run = train(workers, tmp_path, workers=3, pause_seconds=0.01)
        wait_for(run, lambda: run.step > 20)
        if how == "scaled":
            borrowed.scale(1)
        else:
            with Client(borrowed, set_as_default=False) as other:
                other.retire_workers([members(run)[0]])
        run.wait(LIMIT, progress=False)
        assert run.history.of(WorkersLost)
        assert run.world_size == (1 if how == "scaled" else 2)  # nobody asked for the machines back
        assert_as_if_nothing_had_happened(run, undisturbed)


@pytest.mark.parametrize("place", ["exchange", "commit"])
def test_a_stopped_process_is_treated_as_dead(
    three: pk.Workers, tmp_path: Path, undisturbed: pk.Run, place: str
) -> None:
    run = train(three, tmp_path)
    wait_for(run, lambda: run.step > 20)
    arm(tmp_path, place, "stop")
    began = time.monotonic()
    wait_for(run, lambda: run.history.of(Recovered), 30)
    assert time.monotonic() - began < 3 + 5
    run.wait(LIMIT, progress=False)
    lost = the_only_loss(run)
    assert "gave no sign of life for 3." in lost.reason
    assert_as_if_nothing_had_happened(run, undisturbed)


def test_code_that_makes_no_progress_is_found_although_its_process_answers(
    three: pk.Workers, tmp_path: Path, undisturbed: pk.Run
) -> None:
    run = train(three, tmp_path)
    wait_for(run, lambda: run.step > 20)
    arm(tmp_path, "forward", "sleep")
    run.wait(LIMIT, progress=False)
    lost = the_only_loss(run)
    assert re.search(r"made no progress in \d+\.\d s", lost.reason)  # 3 s, or ten steps on a busy machine
    assert_as_if_nothing_had_happened(run, undisturbed)


# --- nobody is left


def test_when_all_die_the_run_fails_in_words_and_another_pool_goes_on(
    tmp_path: Path, undisturbed: pk.Run, nothing_left: None
) -> None:
    with pk.connect(2) as workers:
        run = train(workers, tmp_path)
        wait_for(run, lambda: run.step > 20)
        time.sleep(0.1)  # until the next segment has begun, with a commit
        for pid in workers.pids.values():  # type: ignore[attr-defined]
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match="workers died") as caught:
            run.wait(30, progress=False)
        assert "resume=run" in str(caught.value)
    assert run.status == "failed"
    assert 20 < run.step == run.model_step == len(run.history.steps)
    with pk.connect("inline") as inline:
        rest = train(inline, tmp_path, workers=3, resume=run).wait(LIMIT, progress=False)
    assert rest.history.steps[0].step == run.step
    joined = [*run.history.losses, *rest.history.losses]
    assert joined == pytest.approx(undisturbed.history.losses.tolist(), abs=1e-5)
    assert any(f"Going on from step {run.step}: failed run" in said.text for said in rest.history.of(Said))


def test_when_the_scheduler_goes_the_run_fails_in_words(tmp_path: Path, nothing_left: None) -> None:
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0",
                           silence_logs=60)  # fmt: skip
    with cluster, pk.connect(cluster) as workers:
        run = train(workers, tmp_path, steps=100_000)
        wait_for(run, lambda: run.model_step > 20)
        cluster.close()
        with pytest.raises(RunFailed):
            run.wait(60, progress=False)
    assert run.step == run.model_step > 20


# --- numbers that are none


def explosive(on: pk.Workers, rate: float, **how: Any) -> pk.Run:
    torch.manual_seed(0)
    return pk.train(
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)), DIGITS.train, on=on,
        loss=torch.nn.MSELoss() if how.pop("regression", False) else None,
        optimizer=partial(torch.optim.SGD, lr=rate), **{"steps": 400, "batch_size": 256} | how,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["inline", "AllReduce", "MapReduce"])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(
    pool: pk.Workers, inline: pk.Workers, kind: str
) -> None:
    strategy = pk.strategies.MapReduce() if kind == "MapReduce" else pk.strategies.AllReduce()
    run = explosive(inline if kind == "inline" else pool, 1e4, workers=2, strategy=strategy)
    with pytest.raises(Diverged, match=r"not finite|is (nan|inf)") as caught:
        run.wait(LIMIT, progress=False)
    told = str(caught.value)
    assert "at learning rate 10000" in told
    assert f"of step {run.model_step}" in told
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert run.status == "failed"
    assert run.history.of(RunEnd)[0].reason == told


def test_told_so_a_run_goes_on_without_numbers(inline: pk.Workers) -> None:
    run = explosive(inline, 1e4, on_nonfinite="continue", steps=60).wait(LIMIT, progress=False)
    assert run.status == "finished"
    assert not torch.isfinite(torch.from_numpy(run.history.losses)).all()


def test_after_a_divergence_a_lower_rate_goes_on(inline: pk.Workers) -> None:
    run = explosive(inline, 1e4)
    with pytest.raises(Diverged):
        run.wait(LIMIT, progress=False)
    rest = explosive(inline, 1e4, resume=run, learning_rate=1e-4, steps=run.step + 5)
    rest.wait(LIMIT, progress=False)
    assert [step.learning_rate for step in rest.history.steps] == [1e-4] * 5


# --- going on


def test_a_run_that_goes_on_cannot_be_resumed_and_neither_can_a_finished_one(inline: pk.Workers) -> None:
    run = pk.train(torch.nn.Linear(64, 10), DIGITS.train, on=inline, steps=100_000)
    with pytest.raises(RunError, match="nothing to go on from yet"):
        run.kept_state()
    wait_for(run, lambda: run.step > 0)
    run.stop()
    run.wait(LIMIT, progress=False)
    with pytest.raises(InputError, match="steps already"):
        pk.train(torch.nn.Linear(64, 10), DIGITS.train, on=inline, steps=run.step, resume=run)
    with pytest.raises(InputError, match="which no run can go on from"):
        pk.train(torch.nn.Linear(64, 10), DIGITS.train, on=inline, resume=3)
