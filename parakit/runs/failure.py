"""What a user reads about a run that failed."""

from __future__ import annotations

from parakit.errors import Diverged, RunFailed
from parakit.failures.run_failed import code_failure
from parakit.workers.commands import Failure

__all__ = ["failure_of"]


def failure_of(error: BaseException, done: int, kept: int) -> RunFailed:
    """What a user should read about an error that ended the run after some steps, with the state of a step kept."""
    if isinstance(error, Diverged):
        failed: RunFailed = Diverged(
            f"The run stopped: {error}",
            cause="a learning rate that is too high, or a sample that is not finite",
            remedy=f"run.model holds the last good state, of step {kept}; a lower learning rate goes on from there: "
            "parakit.train(..., resume=run, learning_rate=...); on_nonfinite='continue' lets a run go on all the same",
        )
    elif isinstance(error, RunFailed):  # it says it all
        return error
    else:
        failed = code_failure(
            f"The run failed after step {done}", Failure.of("code", done, error), (),
            remedy=f"run.model holds the state of step {kept}; parakit.train(..., resume=run) goes on from there",
        )  # fmt: skip
    failed.__cause__ = error
    return failed
