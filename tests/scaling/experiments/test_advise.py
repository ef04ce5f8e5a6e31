"""Advice: what is tried, what is said about it, and what becomes of trials that do not come to their end."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

import parakit as pk
from parakit.errors import DataError, InputError, ModelError, PoolError, RunError
from parakit.events.records import SegmentDone
from parakit.runs.planning import plan
from parakit.scaling.experiments import advise, arms, visits
from parakit.scaling.experiments.advise import layouts
from parakit.scaling.study.advice import Advice, Layout
from parakit.scaling.study.records import Measurement
from tests.runs.test_exact import LIMIT
from tests.scaling.experiments.test_sweep import BATCH, Net, data, is_free


def advised(on: pk.Workers, model: nn.Module | None = None, **how: Any) -> Advice:
    return pk.advise(model or Net(), data(), on=on, **{"seconds": 0.1, "batch_size": BATCH, "progress": False} | how)


# --- what is tried


def test_layouts_fill_the_cores() -> None:
    assert layouts(1, 8) == (Layout(1, 1),)
    assert layouts(2, 2) == (Layout(2, 1), Layout(1, 2))
    assert layouts(16, 16) == (Layout(16, 1), Layout(8, 2), Layout(4, 4), Layout(2, 8), Layout(1, 16))
    assert layouts(16, 3) == (Layout(3, 5), Layout(2, 8), Layout(1, 16))
    assert layouts(2, 4) == (Layout(2, 1), Layout(1, 2))


@pytest.mark.parametrize("cores", [7, 24, 96, 120])
def test_of_many_layouts_some_are_chosen(cores: int) -> None:
    chosen = layouts(cores, cores)
    assert len(chosen) <= 5
    assert chosen[0] == Layout(cores, 1)
    assert chosen[-1] == Layout(1, cores)
    assert list(chosen) == sorted(set(chosen), reverse=True)
    assert all(layout.workers * layout.threads == cores for layout in chosen)


@pytest.mark.dask
def test_advice_on_processes_can_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("scaling.experiments.advise", "system.this_host"):
        monkeypatch.setattr(f"parakit.{module}.cores_here", two)
    model = Net()
    before = [p.clone() for p in model.parameters()]
    with pk.connect(2) as workers:
        began = time.monotonic()
        advice = advised(workers, model, seconds=3.0)
        assert time.monotonic() - began < 30
        expected = {Layout(0, 1), Layout(0, 2), Layout(2, 1), Layout(1, 2)}
        assert {row.layout for row in advice.rows} == expected
        assert not advice.stopped
        run = pk.train(Net(), data(), on=workers, steps=3, **advice.options).wait(LIMIT, progress=False)
        assert run.status == "finished"
        assert run.history.to_dicts()[0]["threads_per_worker"] == advice.options["threads"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert advice.best == advice.rows[0].layout
    assert advice.sentence in " ".join(repr(advice).split())
    assert advice.sentence in advice._repr_html_()
    for row in advice.rows:
        assert row.rate.median > 0
        assert 0 <= row.exchange + row.waiting + row.control <= 1 + 1e-9
        assert str(row.layout) in repr(advice)


def two(_: None = None) -> int:
    return 2


def test_inline_workers_are_one_process(inline: pk.Workers) -> None:
    advice = advised(inline)
    assert {row.layout.workers for row in advice.rows} == {0, 1}
    assert "take turns in one process" in repr(advice)
    assert is_free(inline)


def test_workers_of_another_machine_keep_their_layout(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["node 7", "this one"])
    monkeypatch.setattr(advise, "host_here", lambda _=None: next(names))
    advice = advised(inline)
    assert [row.layout for row in advice.rows if row.layout.workers] == [Layout(1, inline.threads)]
    assert "on other machines: only their own layout was tried" in repr(advice)


def test_few_rows_of_large_data_are_trained(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    made = arms.start_run
    monkeypatch.setattr(arms, "start_run", lambda plan, pool: (seen.append(plan.start.samples), made(plan, pool))[1])
    advised(inline, batch_size=10)
    assert set(seen) == {80}


@pytest.mark.dask
def test_a_run_may_have_threads_of_its_own(pool: pk.Workers) -> None:
    run = pk.train(Net(), data(), on=pool, workers=2, threads=2, steps=3).wait(LIMIT, progress=False)
    assert run.history.to_dicts()[0]["threads_per_worker"] == 2
    assert pool.threads == 1


# --- what is said


def measured(workers: int, threads: int, rates: list[float], idle: float = 0.0, steps: int = 10) -> list[Measurement]:
    """Repeats of one second, of which a twentieth goes into exchange, and a part into waiting."""
    step = 1 / steps
    busy = (0.0, (0.9 - idle) * step, 0.0, 0.05 * step, 0.0, idle * step) if workers else ()
    return [
        Measurement(workers, block, block, rate, step, steps, 1.0, busy, float(block + 1),
                    "workers" if workers else "plain", threads, 4)
        for block, rate in enumerate(rates)
    ]  # fmt: skip


PLAIN = [*measured(0, 1, [50.0, 55.0]), *measured(0, 4, [100.0, 110.0])]


def test_the_fastest_layout_is_named_with_its_cost() -> None:
    advice = Advice([*PLAIN, *measured(4, 1, [150.0, 180.0]), *measured(2, 2, [120.0, 121.0])], cores=4)
    assert advice.best == Layout(4, 1)
    assert advice.options == {"workers": 4, "threads": 1}
    assert advice.sentence == (
        "4 processes of 1 thread: 1.57 times plain PyTorch, whose best is 4 threads; "
        "exchange costs 5 % of a step, waiting 0 %."
    )


@pytest.mark.parametrize(
    ("slow", "cores", "reason"),
    [
        ({}, 1, "there is one core"),
        ({}, 4, "one process does this work better"),
        ({"idle": 0.3}, 4, "processes wait for each other for 30 % of a step"),
        ({"idle": 0.3, "steps": 1000}, 4, "so small that a step takes 1 ms, of which 40 % go into exchange"),
    ],
)
def test_why_plain_pytorch_is_faster(slow: dict[str, Any], cores: int, reason: str) -> None:
    advice = Advice([*PLAIN, *measured(4, 1, [50.0, 55.0], **slow)], cores=cores)
    assert advice.best == Layout(0, 4)
    assert advice.options == {"workers": 4, "threads": 1}  # the best there is for pk.train
    assert advice.sentence.startswith("plain PyTorch, 4 threads: 2.00 times 4 processes of 1 thread; ")
    assert reason in advice.sentence


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (10, "one process does this work better than several, and that of parakit needs 5 % of the time for control "
             "between segments"),
        (1000, "the model and batch are so small that a step takes 1 ms, and what parakit does beside torch shows"),
    ],
)  # fmt: skip
def test_why_one_process_of_parakit_is_slower(steps: int, reason: str) -> None:
    advice = Advice([*PLAIN, *measured(1, 4, [90.0, 99.0], steps=steps), *measured(4, 1, [50.0, 55.0])], cores=4)
    assert advice.sentence == f"plain PyTorch, 4 threads: 1.11 times 1 process of 4 threads; {reason}."


def test_what_cannot_be_told_apart_is_said_to_be() -> None:
    advice = Advice([*PLAIN, *measured(2, 2, [90.0, 120.0])], cores=4)
    assert "as fast as each other" in advice.sentence


def test_without_a_rival_no_ratio_is_told() -> None:
    assert "plain PyTorch could not be measured" in Advice(measured(2, 1, [90.0])).sentence
    alone = Advice(PLAIN)
    assert "parakit could not be measured" in alone.sentence
    assert alone.options == {}
    with pytest.raises(InputError, match="without a measurement"):
        Advice([])


def test_the_first_segments_of_a_run_are_not_timed_for_its_memory_is_new(inline: pk.Workers) -> None:
    made = plan(Net(), data(), on=inline, workers=2, batch_size=BATCH, steps=visits.ENDLESS)
    run = visits.start_run(made, inline)
    try:
        found = visits.time_run(run, 2, 0.01)
        assert found.segments[0].first_step >= sum(s.steps for s in run.history.of(SegmentDone)[:3])
        again = visits.time_run(run, 2, 0.01)
        assert len(run.history.newer(SegmentDone, found.segments[-1].at_seconds)) > len(again.segments)
    finally:
        visits.end(run)


# --- what does not come to its end


@pytest.mark.dask
def test_an_interrupt_keeps_what_was_measured_and_leaves_the_pool_free(
    pool: pk.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, made = arms.time_run, []

    def once(*args: Any) -> Any:
        if made:
            raise KeyboardInterrupt  # a signal may come while Python clears up, which then keeps it to itself
        made.append(timed(*args))
        return made[-1]

    monkeypatch.setattr(arms, "time_run", once)
    advice = advised(pool, seconds=60.0)
    assert advice.stopped == "interrupted."
    assert "Incomplete: interrupted." in repr(advice)
    assert is_free(pool)


def test_an_interrupt_before_anything_was_measured_goes_on(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(arms, "time_run", interrupted)
    monkeypatch.setattr(advise, "PlainArm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        advised(inline)
    assert is_free(inline)


def test_steps_that_take_too_long_are_given_up(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Net):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            time.sleep(1.0 if len(inputs) == BATCH else 0)
            return super().forward(inputs)

    monkeypatch.setattr(advise, "_LEAST_SECONDS", 1.0)
    began = time.monotonic()
    try:
        told = repr(advised(inline, Slow()))
    except RunError as error:  # what was tried first was too slow, and there is no time for anything else
        told = str(error)
    assert time.monotonic() - began < 20
    assert "did too few steps within 1 s" in told or "there was no time for" in told
    assert is_free(inline)


def test_a_model_that_fails_is_an_error(inline: pk.Workers) -> None:
    with pytest.raises((pk.ParakitError, ModelError)):
        advised(inline, Net(fails_after=0))
    assert is_free(inline)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("seconds", 0), ("seconds", True), ("seconds", float("nan")), ("seed", -1), ("progress", 3), ("batch_size", 0),
        ("limit_seconds", 0), ("strategy", 3),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(inline: pk.Workers, name: str, wrong: Any) -> None:
    with pytest.raises(InputError, match=name):
        advised(inline, **{name: wrong})
    inline.hold("free", lambda: None)  # nothing was started


def test_what_cannot_be_advised_on_is_refused(inline: pk.Workers) -> None:
    with pytest.raises(InputError, match="no pool of workers"):
        advised(2)  # type: ignore[arg-type]
    with pk.simulated(4) as far, pytest.raises(InputError, match="simulated"):
        advised(far)
    with pytest.raises(DataError, match="larger than the data"):
        advised(inline, batch_size=10**6)
    run = pk.train(Net(), data(), on=inline, steps=10**6)
    with pytest.raises(PoolError, match="busy"):
        advised(inline)
    run.stop()
    run.wait(LIMIT, progress=False)
    inline.close()
    with pytest.raises(PoolError, match="closed"):
        advised(inline)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_wrong_threads_of_a_run_are_refused(inline: pk.Workers, threads: Any) -> None:
    with pytest.raises(InputError, match="threads is"):
        pk.train(Net(), data(), on=inline, threads=threads)


def test_threads_of_simulated_workers_are_those_of_their_costs() -> None:
    with pk.simulated(4) as far:
        pk.train(Net(), data(), on=far, threads=far.threads, steps=2).wait(LIMIT, progress=False)
        with pytest.raises(InputError, match="simulated with 1 each"):
            pk.train(Net(), data(), on=far, threads=3)
