"""An experiment with an arm that only pretends to train: order, clock, and every way to end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from parakit.errors import RunError, Unreachable
from parakit.scaling.experiments.arms import Arm
from parakit.scaling.experiments.experiment import Clock, Experiment
from parakit.scaling.experiments.progress_bar import Ticker
from parakit.scaling.experiments.schedule import Count

POOL: Any = SimpleNamespace(simulated=False)
PLACES = [Count(1, 1), Count(2, 1)]


class Pretended(Arm):
    """Each visit takes a second, and may do something else."""

    def __init__(self, **surprises: Any) -> None:
        super().__init__(POOL)
        self.now, self.visited, self.closed = 0.0, [], 0
        self.surprises = surprises

    def visit(self, count: int, seconds: float, threads: int = 0) -> Any:  # noqa: ARG002 - as any arm
        self.now += 1.0
        self.visited.append(count)
        surprise = self.surprises.get(f"visit_{len(self.visited)}", self.surprises.get(f"count_{count}"))
        if surprise is not None:
            raise surprise
        return SimpleNamespace(
            rate=100.0 * count, step_seconds=0.1, steps=[None] * 5, seconds=seconds, breakdown=lambda: (0.0,) * 6
        )

    def close(self) -> None:
        self.closed += 1


def experiment(arm: Pretended, clock: Clock | None = None, *, named: bool = False) -> Experiment[Count]:
    clock = clock or Clock(lambda: arm.now)
    return Experiment(arm, None, POOL, 0.5, 32, 4, clock, Ticker(4, 1.0, shown=False), named=named)


def test_everything_is_visited_once_a_block() -> None:
    arm = Pretended()
    made = experiment(arm)
    made.run(PLACES, 3, seed=0)
    assert [(m.block, m.repeat) for m in made.found] == [(block, block) for block in range(3) for _ in PLACES]
    assert [sorted(arm.visited[i : i + 2]) for i in (0, 2, 4)] == [[1, 2]] * 3
    assert [m.at_seconds for m in made.found] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert (made.stopped, made.unreachable, made.summary, arm.closed) == ("", {}, "6 measurements made", 1)


def test_when_time_is_over_a_block_is_not_completed() -> None:
    arm = Pretended()
    made = experiment(arm, Clock(lambda: arm.now, seconds=2.5, first_seconds=9.0))
    made.run(PLACES, 100, seed=0)
    assert len(made.found) == 3
    assert made.stopped == ""  # everything was visited


def test_what_there_was_no_time_for_is_named() -> None:
    arm = Pretended()
    made = experiment(arm, Clock(lambda: arm.now, seconds=0.1, first_seconds=0.5))
    made.run(PLACES, 100, seed=0)
    (found,) = made.found
    assert made.stopped == f"there was no time for {next(p for p in PLACES if p.workers != found.workers)}."


@pytest.mark.parametrize(("named", "told"), [(False, "it is full."), (True, "2 workers: it is full.")])
def test_a_place_that_cannot_be_reached_is_not_visited_again(named: bool, told: str) -> None:
    arm = Pretended(count_2=Unreachable("it is full."))
    made = experiment(arm, named=named)
    made.run(PLACES, 3, seed=0)
    assert made.unreachable == {PLACES[1]: told}
    assert (arm.visited.count(1), arm.visited.count(2), made.stopped) == (3, 1, "")


def test_where_nothing_can_be_reached_that_is_an_error() -> None:
    arm = Pretended(count_1=Unreachable("gone."), count_2=Unreachable("full."))
    with pytest.raises(RunError, match="Nothing could be measured") as caught:
        experiment(arm).run(PLACES, 3, seed=0)
    assert {"gone.", "full."} <= set(str(caught.value).split())
    assert arm.closed == 1


@pytest.mark.parametrize(
    ("surprise", "why"), [(KeyboardInterrupt(), "interrupted."), (RunError("The run failed."), "The run failed.")]
)
def test_what_was_measured_before_an_end_is_kept_and_an_error_goes_on_only_without_it(
    surprise: BaseException, why: str
) -> None:
    arm = Pretended(visit_3=surprise)
    made = experiment(arm)
    made.run(PLACES, 3, seed=0)
    assert (len(made.found), made.stopped, arm.closed) == (2, why, 1)
    arm = Pretended(visit_1=surprise)
    with pytest.raises(type(surprise)):
        experiment(arm).run(PLACES, 3, seed=0)
    assert arm.closed == 1
