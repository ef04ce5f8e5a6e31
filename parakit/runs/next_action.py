"""What a run does next: a pure function of where it stands, what is wanted of it, who is in its group, and the time.

Owns every decision of a run, and the limits that one goes by; refuses to do anything. `RunLoop` carries out one action
after another and looks anew after each, so what is decided here can be tested without workers. Requests take effect
only while no segment is without a report; until then, they keep the next segment from being ordered ahead.

Reference: the state machine of workers in Dask's `distributed.worker_state_machine`, which answers events with
instructions.
"""

from __future__ import annotations

from parakit.runs.actions import (
    Action,
    AskForWorkers,
    AwaitReport,
    AwaitStaged,
    CheckMembers,
    CloseEpoch,
    DropChange,
    EndGrowth,
    Fail,
    Finish,
    Form,
    GiveUp,
    GoOn,
    Keep,
    Lose,
    Measure,
    OrderSegment,
    Recover,
    SetLearningRate,
    Stage,
    StageFirst,
    StandStill,
    Wait,
)
from parakit.runs.state import Goals, GroupState, RunState, Segment, Staged

__all__ = ["FRUITLESS", "GROW_SECONDS", "POLL_SECONDS", "next_action"]

#: So many losses in a row without a segment between them end a run, and so many changes staged in vain a resize.
FRUITLESS = 6
#: How long newcomers that a cluster was asked for may take.
GROW_SECONDS = 60.0
#: How often to look while nothing goes on, and until newcomers are tried again after some were lost.
POLL_SECONDS = 0.25
_LOOK_ROUND_SECONDS = 1.0  # how often a paused run looks whether everybody is there
_AGAIN_SECONDS = 0.05  # until another try after a loss in vain, doubled each time


def next_action(run: RunState, goals: Goals, group: GroupState, now: float) -> Action:
    """What to do next.

    Parameters
    ----------
    run : RunState
    goals : Goals
    group : GroupState
    now : float
        Seconds since the start of the run.
    """
    if not group.formed:
        return _toward_a_group(goals, group, now)
    return (
        _keep(run, now)
        or _close_epoch(run)
        or _segment_going_on(run, goals, group, now)
        or _finish(run, goals)
        or _set_learning_rate(goals)
        or _toward_target(goals, group, now)
        or _turn(run, goals)
        or (Measure() if goals.measuring else None)
        or _stand_by_or_train(run, goals, group, now)
    )


def _toward_a_group(goals: Goals, group: GroupState, now: float) -> Action:
    """Before the first group, and after a loss; only before the first can a stop be granted."""
    staged = group.staged
    if staged is None:
        return _after_loss(group.fruitless) if group.recovering else StageFirst()
    if staged.ready:
        return Form()
    if goals.stopping and not group.recovering:
        return Finish(keep=False)
    return _missing(staged, group, now) or AwaitStaged(POLL_SECONDS)


def _after_loss(fruitless: int) -> Action:
    if fruitless > FRUITLESS:
        return Fail()
    # The scheduler may still have somebody on its list who is gone.
    return Recover(0.0 if fruitless < 2 else _AGAIN_SECONDS * 2 ** (fruitless - 2))


def _missing(staged: Staged, group: GroupState, now: float) -> Lose | None:
    """Members of a first group that take too long, or are gone."""
    if now - staged.since > group.patience:
        return Lose(
            f"The workers were not ready within {group.patience:g} s.",
            cause="a worker that hangs or is busy, or data that take long to send",
            remedy="look at the workers, or allow more: train(..., limit_seconds=...)",
        )
    gone = len(set(staged.members) - set(group.there))
    return Lose(f"{gone} of {len(staged.members)} workers died before the group was ready.") if gone else None


def _keep(run: RunState, now: float) -> Keep | None:
    """A newer copy, once after each report; a checkpoint is also due where the copy is new enough."""
    copied = run.copied
    save = now >= copied.save_at
    if not run.reported or not copied.due(now) or (copied.step == run.step and not save):
        return None
    return Keep(save, busy=bool(run.ordered))


def _close_epoch(run: RunState) -> CloseEpoch | None:
    return CloseEpoch(run.epochs, run.validates) if run.epochs < run.step // run.steps_per_epoch else None


def _segment_going_on(run: RunState, goals: Goals, group: GroupState, now: float) -> OrderSegment | AwaitReport | None:
    if not run.ordered:
        return None
    segment = run.ordered[-1]
    if len(run.ordered) == 1 and _may_order_ahead(segment, run, goals, group, now):
        return _order(segment.end, run, goals)
    return AwaitReport()


def _may_order_ahead(segment: Segment, run: RunState, goals: Goals, group: GroupState, now: float) -> bool:
    """Whether nothing is to happen between the segment going on and the next."""
    return (
        group.orders_ahead
        and segment.end < run.steps
        and not (run.validates and segment.end % run.steps_per_epoch == 0)
        and segment.number == goals.number
        and group.staged is None
        and goals.target == len(group.members)
        and not run.copied.due(now)
    )


def _order(first: int, run: RunState, goals: Goals) -> OrderSegment:
    count = min(run.segment_steps, run.steps - first)
    if run.validates:
        count = min(count, run.steps_per_epoch - first % run.steps_per_epoch)
    return OrderSegment(first, count, goals.number)


def _finish(run: RunState, goals: Goals) -> Finish | None:
    return Finish() if goals.stopping or run.step >= run.steps else None


def _set_learning_rate(goals: Goals) -> SetLearningRate | None:
    return None if goals.rate is None else SetLearningRate(goals.rate)


def _toward_target(goals: Goals, group: GroupState, now: float) -> Action | None:
    """Nearer to the worker count that is wanted, without waiting for anything."""
    reached = goals.target == len(group.members)
    if reached and group.growth is not None:
        return EndGrowth()
    if group.staged is not None:
        return _take_place(group.staged, group, now)
    return None if reached else _grow(goals, group, now) or _stage(goals.target, group, now)


def _take_place(staged: Staged, group: GroupState, now: float) -> Action | None:
    """What becomes of a change that was staged."""
    if not staged.ready:
        late = now - staged.since > group.patience
        why = "the workers were not ready in time; one of them may hang."
        return GiveUp(staged.target, why) if late else None
    if staged.lost and group.in_vain < FRUITLESS:
        return DropChange()
    return GiveUp(staged.target, staged.error) if staged.error else Form()


def _grow(goals: Goals, group: GroupState, now: float) -> AskForWorkers | EndGrowth | GiveUp | None:
    """Ask the cluster for more workers, once for each target."""
    there, growth = len(group.there), group.growth
    if goals.target <= there:
        return None if growth is None else EndGrowth()
    if group.lost_at > goals.asked_at:
        return None  # whoever comes in place of the lost is welcome, but nobody requested a larger cluster
    if growth is None or growth.target != goals.target:
        return AskForWorkers(goals.target, there)
    if now - growth.since > GROW_SECONDS:
        return GiveUp(goals.target, f"only {there} of {goals.target} came within {GROW_SECONDS:g} s.")
    return None


def _stage(target: int, group: GroupState, now: float) -> Stage | None:
    """A group of those who are there, members first."""
    if now - group.vain_at < POLL_SECONDS:
        return None
    staying = [member for member in group.members if member in group.there]
    members = (*staying, *(name for name in group.there if name not in staying))[:target]
    return Stage(target, members) if members and len(members) != len(group.members) else None


def _turn(run: RunState, goals: Goals) -> StandStill | GoOn | None:
    if run.paused == goals.paused:
        return None
    return StandStill() if goals.paused else GoOn()


def _stand_by_or_train(run: RunState, goals: Goals, group: GroupState, now: float) -> Action:
    if not run.paused:
        return _order(run.step, run, goals)
    return CheckMembers() if now - group.looked_at > _LOOK_ROUND_SECONDS else Wait(goals.number, POLL_SECONDS)
