"""Workers in this very process: deterministic, one after the other, for tests, teaching and debugging.

The virtual workers share one engine, because replicas that stay equal need not be many. A verb does what all of
them would do at once, rank by rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from parakit.checkpoints.state import State, copy_state
from parakit.collectives.base import ExchangeMethod
from parakit.data.chunks import DEFAULT_CHUNKS
from parakit.data.local_chunks import LocalChunks
from parakit.engines.account import BACKWARD, EXCHANGE, UPDATE, StepRecord
from parakit.engines.base import Engine
from parakit.engines.evaluation import Tally
from parakit.engines.make import make_engine
from parakit.errors import RunFailed
from parakit.failures.run_failed import code_failure
from parakit.gradients.gradient_sum import GradientSum
from parakit.system.cores import usable_cores
from parakit.system.devices import CPU, device_here, give_back, use
from parakit.system.process_settings import undisturbed
from parakit.workers.assignment import GroupAssignment, Survivors
from parakit.workers.commands import Failure
from parakit.workers.pool import Workers
from parakit.workers.session import Job, Report

__all__ = ["InlineWorkers"]


class InlineWorkers(Workers):
    """Virtual workers in this process; as many as a run has chunks, at no cost."""

    kind = "inline, in this process"
    in_turns = True
    maps_memory = True

    def __init__(self, threads: int | None = None, device: str = "cpu") -> None:
        super().__init__()
        device_here(device)  # is there one?
        self.device = device
        self.threads = threads or (torch.get_num_threads() if device == "cpu" else 1)
        self.cores = usable_cores() if device == "cpu" else 1
        self._size = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The virtual workers asked for so far."""
        return tuple(f"inline {number}" for number in range(self._size))

    @property
    def most(self) -> int:
        """As many as there are chunks by default."""
        return DEFAULT_CHUNKS

    @property
    def one_host(self) -> bool:
        """All are in this process."""
        return True

    def check_count(self, count: Any, *, most: int | None = None) -> int:
        """As for any pool; but virtual workers come into being when a run asks for more than there are."""
        checked = super().check_count(count, most=max(self.most, most or 0))
        if most is not None:  # a run that goes on: one that is only being planned may still be refused
            self.grow(checked)
        return checked

    def grow(self, count: int) -> None:
        """Have more virtual workers."""
        self._size = max(self._size, count)

    def open(self, job: Job) -> InlineSession:
        """Begin a run."""
        return InlineSession(job, job.threads or self.threads, device_here(self.device))


class InlineSession:
    """A run's hold on the workers of this process."""

    orders_ahead = False
    snapshots = None

    def __init__(self, job: Job, threads: int, device: torch.device = CPU) -> None:
        self._job = job
        self._threads = threads
        self._device = device
        self._engine = make_engine(job.recipe, device)
        self._engine.own_memory()
        # A model's copy runs the notebook's own functions and classes: what they keep is given back in the end.
        self._give_back_variables = self._engine.lend()
        self._holdings: list[LocalChunks] = []
        self._by_name: dict[str, LocalChunks] = {}
        self._validation = LocalChunks(device=device)
        self._team = InlineTeam(self._engine, self._holdings, undivided=job.recipe.traits.undivided)
        self._halt = 0
        self._ordered: tuple[int, int, int] | None = None

    def stage(self, assignment: GroupAssignment) -> Future[None]:
        """Nothing needs to be brought anywhere."""
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def form(self, assignment: GroupAssignment, state: State | None) -> ExchangeMethod:
        """Make an assignment the active one; nothing has to travel in it."""
        job = self._job
        held = {
            name: self._by_name.get(name) or LocalChunks(job.recipe.order, self._device) for name in assignment.members
        }
        for name, holding in held.items():
            mine = assignment.training.chunks_of[name]
            holding.take_over(mine, {chunk: job.load(chunk) for chunk in mine if chunk not in holding.chunks})
        self._by_name = held
        self._holdings[:] = held.values()
        if assignment.validation is not None and not self._validation.chunks:
            every = range(len(assignment.validation.sizes))
            self._validation.change((), {chunk: job.load_validation(chunk) for chunk in every})
        if state is not None:
            self._engine.load(state)
        return ExchangeMethod("in turns")

    def order(self, first: int, count: int, request: int, expected_seconds: float) -> None:
        """Note what is to be done."""
        self._ordered = first, count, request

    def report(self) -> Report:
        """Do the segment that was ordered."""
        assert self._ordered is not None
        (first, count, request), self._ordered = self._ordered, None
        return self._advance(first, count, request)

    def _advance(self, first: int, count: int, request: int) -> Report:
        committed = self._engine.commit()
        used = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        use(self._device)
        try:
            with undisturbed(self._device), self._job.recipe.settings.in_force():
                self._engine.measure_norms()
                for step in range(first, first + count):
                    self._job.strategy.step(self._team, step)
                    if self._halt > request:
                        break
            self._engine.finish_segment(alone=len(self._holdings) == 1)
        except BaseException as error:
            failed = self._explained(error)
            self._engine.roll_back()
            self._team.take_records()
            if failed is None:
                raise
            raise failed from error
        finally:
            torch.set_num_threads(used)
        return Report(self._team.take_records(), committed)

    def _explained(self, error: BaseException) -> RunFailed | None:
        """What a user should read about an error of a step; None where somebody else knows better."""
        if isinstance(error, RunFailed) or not isinstance(error, Exception):
            return None
        step, at = self._engine.step, self._team.at
        rows = self._job.rows(step, at.chunks if at else None)
        return code_failure(
            f"Step {step} failed", Failure.of("code", step, error), rows,
            remedy="run.model holds the last state that was kept; parakit.train(..., resume=run) goes on from there",
        )  # fmt: skip

    def regroup(self, generation: int, step: int) -> Survivors:
        """Nobody is ever lost here."""
        self._engine.fall_back(step)
        names = tuple(self._by_name)
        held = {name: holding.chunks for name, holding in self._by_name.items()}
        return Survivors(held, {names[0]: self._validation.chunks} if names else {}, names)

    def check(self) -> None:
        """Nobody is ever lost here."""

    def halt(self, request: int) -> None:
        """End the segment after its present step."""
        self._halt = max(self._halt, request)

    def set_learning_rate(self, value: float) -> None:
        """Go on at another learning rate."""
        self._engine.set_learning_rate(value)

    def state(self, step: int) -> State:
        """The state after the last segment."""
        return dict(copy_state(self._engine.live_state(), device=CPU))

    def settle(self) -> None:
        """There are none."""

    def read_surviving_snapshot(self, step: int) -> State | None:
        """Nobody is ever lost here."""
        return None

    def evaluate(self) -> Tally:
        """Evaluate the present model on the validation chunks."""
        with undisturbed(self._device), self._job.recipe.settings.in_force():
            return self._engine.tally(self._validation)

    def label(self, worker: str) -> str:
        """The name itself."""
        return worker

    def release(self) -> None:
        """Let go of the chunks, and leave the notebook's variables as they were."""
        self._give_back_variables()
        self._by_name.clear()
        self._holdings.clear()
        self._validation = LocalChunks(device=self._device)
        give_back(self._device)


class InlineTeam:
    """All workers of a session at once; a part is the list of every worker's sum, or the sum of all."""

    def __init__(self, engine: Engine, holdings: list[LocalChunks], *, undivided: bool = False) -> None:
        self._engine = engine
        self._account = engine.account
        self._holdings = holdings
        self._undivided = undivided
        self._records: list[list[StepRecord]] = []
        self._own: list[tuple[list[float], int, float | None]] = []
        self._own_buffers: dict[int, dict[str, Tensor]] = {}  # by rank, of the rule "own"
        self._whole: LocalChunks | None = None
        self.at: LocalChunks | None = None  # whose share is being computed

    def gradient(self, step: int) -> list[GradientSum]:
        """Every worker's gradient sum."""
        return list(self.map_gradients(step))

    def map_gradients(self, step: int) -> Sequence[GradientSum]:
        """Every worker's gradient sum, rank by rank."""
        own = self._own or [([0.0] * (BACKWARD + 1), 0, None) for _ in self._holdings]
        self._own = []
        if self._undivided and len(self._holdings) > 1:
            return self._all_at_once(step, own)
        parts = []
        turns = self._engine.turns(self._own_buffers)
        for rank, (holding, account) in enumerate(zip(self._holdings, own, strict=True)):
            turns.begin(rank)
            parts.append(self._timed(step, holding, rank, account).clone())
            turns.end(rank)
        turns.settle()
        return parts

    def _timed(self, step: int, holding: LocalChunks, rank: int, account: tuple[list[float], int, Any]) -> GradientSum:
        """A share's gradient sum; what it took is added to its worker's account."""
        seconds, _, norm = account
        before = list(self._account.seconds)
        self.at = holding
        total = self._engine.gradient(step, holding, rank)
        self.at = None
        grown = [s + now - then for s, now, then in zip(seconds, self._account.seconds, before, strict=False)]
        measured = self._account.share_norm if self._account.measuring else None
        self._own.append((grown, self._account.rows, measured if norm is None else norm))
        return total

    def _all_at_once(self, step: int, own: list[tuple[list[float], int, Any]]) -> list[GradientSum]:
        """The gradient of the whole batch, where workers that take turns could not meet in the middle of their shares.

        It counts as the first worker's; each is booked the part of the time that its rows are of the batch.
        """
        together = self._together()
        shares = [holding.share(step) for holding in self._holdings]
        total = self._timed(step, together, 0, ([0.0] * (BACKWARD + 1), 0, None)).clone()
        ((took, rows, _),) = self._own
        sizes = [0 if share is None else len(share) for share in shares]
        self._own = [
            ([s + t * size / max(1, rows) for s, t in zip(seconds, took, strict=True)], size, None)
            for size, (seconds, _, _) in zip(sizes, own, strict=True)
        ]
        nothing = total.clone()
        nothing.vector.zero_()
        return [total, *(nothing.clone() for _ in shares[1:])]

    def _together(self) -> LocalChunks:
        """The chunks of all workers in one holding."""
        chunks = {number: samples for holding in self._holdings for number, samples in holding.each.items()}
        if self._whole is None or self._whole.chunks != tuple(sorted(chunks)):
            self._whole = self._holdings[0].another()
            self._whole.change((), chunks)
        return self._whole

    def add(self, parts: Sequence[GradientSum]) -> GradientSum:
        """The sum of some parts."""
        start = perf_counter()
        total = GradientSum.of_all(parts)
        self._account.seconds[EXCHANGE] += perf_counter() - start
        return total

    def all_reduce(self, part: list[GradientSum]) -> GradientSum:
        """The sum of every worker's part, added in the order of ranks."""
        return self.add(part)

    def sum_for_update(self, part: list[GradientSum]) -> GradientSum:
        """The same: there is one optimizer for all."""
        return self.add(part)

    def update(self, summed: Callable[[], GradientSum]) -> None:
        """One step of the shared optimizer."""
        self._engine.update(summed)
        self._book(self._account.take_records()[0])
        self._own = []

    def _book(self, together: StepRecord) -> None:
        """Split the account of a step among the workers: what each computed is its own, the rest they shared."""
        if len(self._records) != len(self._own):
            self._records = [[] for _ in self._own]
        shared = together.seconds[EXCHANGE], together.seconds[UPDATE]
        for records, (seconds, rows, norm) in zip(self._records, self._own, strict=True):
            records.append(
                StepRecord(
                    together.step,
                    together.loss,
                    together.learning_rate,
                    [*seconds, *shared],
                    together.wall_seconds,
                    rows,
                    None if norm is None or together.norms is None else (norm, together.norms[1]),
                )
            )

    def take_records(self) -> tuple[list[StepRecord], ...]:
        """Every worker's accounts since the last call."""
        taken, self._records = tuple(self._records), []
        self._own = []
        return taken
