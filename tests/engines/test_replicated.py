"""A worker's replica: what it holds, what it commits, and that a roll-back changes nothing but the time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

from parakit.checkpoints.in_memory import InMemorySnapshots
from parakit.checkpoints.state import copy_state
from parakit.data.chunks import EpochOrder
from parakit.data.local_chunks import LocalChunks
from parakit.data.samples import Samples
from parakit.engines.optimizers import learning_rate
from parakit.engines.recipe import Parts, Recipe, Traits
from parakit.engines.replicated import Replica
from parakit.gradients.gradient_sum import GradientSum
from parakit.losses.forms import summing_form
from parakit.trees import leaves

SIZES = (5, 3, 7, 4)
ORDER = EpochOrder(SIZES, batch_size=6, seed=3)  # 4 steps an epoch, the last of one row
ENDS = np.cumsum([0, *SIZES])
ROWS = Samples(
    {"x": torch.randn(sum(SIZES), 4, generator=torch.Generator().manual_seed(0))}, torch.arange(sum(SIZES)) % 3
)


def chunk(number: int) -> Samples:
    return ROWS.take(range(ENDS[number], ENDS[number + 1]))


def holding(*numbers: int) -> LocalChunks:
    held = LocalChunks(ORDER)
    held.change([], {number: chunk(number) for number in numbers})
    return held


class Net(nn.Module):
    """Everything that has a state: dropout, running statistics, a counter, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.unused = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.body(x.repeat(2, 1))[: len(x)]  # twice, because one row has no statistics


def recipe(optimizer: Callable[..., Any], scheduler: Any = None, every: str = "step", strategy: Any = None) -> Recipe:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Net()
    return recipe_of(model, nn.CrossEntropyLoss(), optimizer, scheduler, every, strategy)


RULES = {"body.1.running_mean": "statistics", "body.1.running_var": "statistics", "body.1.num_batches_tracked": "alike",
         "seen": "alike"}  # fmt: skip


def recipe_of(
    model: nn.Module, loss: Any, optimizer: Any, scheduler: Any = None, every: str = "step", strategy: Any = None
) -> Recipe:
    form = summing_form(loss, torch.zeros(len(ROWS), 3), ROWS.targets).knowing(ROWS.targets).form
    traits = Traits(form=form, closure=optimizer is OPTIMIZERS["lbfgs"], rules=RULES)  # type: ignore[arg-type]
    return Recipe.of(
        Parts(model, loss, optimizer, scheduler, strategy), traits,
        scheduler_every=every, clip_norm=None, seed=5, order=ORDER,
    )  # fmt: skip


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": SGD,
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "adam, amsgrad": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
    "rate as a tensor": partial(torch.optim.Adam, lr=torch.tensor(0.01)),
}
SCHEDULES: dict[str, Callable[..., Any]] = {
    "step": partial(schedules.StepLR, step_size=2),
    "milestones": partial(schedules.MultiStepLR, milestones=[2, 5, 5], gamma=0.5),
    "one cycle": partial(schedules.OneCycleLR, max_lr=0.2, total_steps=20),
    "cosine": partial(schedules.CosineAnnealingWarmRestarts, T_0=3),
    "lambda": partial(schedules.LambdaLR, lr_lambda=lambda step: 0.8**step),
    "one after another": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.1, 3), schedules.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


def test_a_state_in_the_middle_of_an_update_is_of_no_step() -> None:
    replica, held = Replica(recipe(SGD)), holding(0, 1)
    replica.commit_to(InMemorySnapshots())  # as where another member keeps the commits
    assert replica.state_of(0) is not None
    assert replica.fall_back(0)
    replica.commit_to(InMemorySnapshots())

    def broken() -> GradientSum:
        raise OSError("a member was lost")

    with pytest.raises(OSError, match="lost"):
        replica.update(broken)
    assert replica.step == 0
    assert replica.state_of(0) is None
    assert not replica.fall_back(0)
    replica.load(copy_state(replica.live_state()))
    assert replica.fall_back(0)
    train(replica, held, 1)
    assert replica.fall_back(1)


def train(replica: Replica, held: LocalChunks, steps: int) -> list[float]:
    """The losses of some steps."""
    for _ in range(steps):
        replica.update(lambda: replica.gradient(replica.step, held, 0))
    return [record.loss for record in replica.account.take_records()[-steps:]]


def flat(state: Any) -> list[Any]:
    return [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in leaves(state)]


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(state) if isinstance(leaf, Tensor)]


def assert_a_roll_back_changes_nothing(replica: Replica, before: int) -> None:
    held = holding(0, 1, 2, 3)
    train(replica, held, before)
    replica.commit()
    committed = flat(copy_state(replica.live_state()))
    ahead = train(replica, held, 5)
    final = flat(copy_state(replica.live_state()))
    for _ in range(2):
        replica.roll_back()
        assert replica.step == replica.committed_step == before
        assert flat(replica.live_state()) == committed
        assert train(replica, held, 5) == ahead
        assert flat(replica.live_state()) == final


@pytest.mark.parametrize("before", [0, 3], ids=["from the start", "underway"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_on_after_a_roll_back_repeats_itself_exactly(name: str, before: int) -> None:
    assert_a_roll_back_changes_nothing(Replica(recipe(OPTIMIZERS[name])), before)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_roll_back_takes_the_schedule_along(name: str) -> None:
    assert_a_roll_back_changes_nothing(Replica(recipe(SGD, SCHEDULES[name])), 3)


def test_a_roll_back_works_within_an_epoch_of_a_schedule_by_epochs() -> None:
    replica = Replica(recipe(SGD, SCHEDULES["step"], every="epoch"))
    assert_a_roll_back_changes_nothing(replica, 6)
    assert learning_rate(replica.optimizer) == pytest.approx(0.01)  # 11 steps are 2 epochs, after which the rate drops


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_replica_goes_on_from_a_state_as_the_first_would(name: str) -> None:
    held = holding(0, 1, 2, 3)
    first, second = (Replica(recipe(OPTIMIZERS[name], SCHEDULES["step"])) for _ in range(2))
    train(first, held, 3)
    second.load(copy_state(first.live_state()))
    assert second.committed_step == 3
    assert train(first, held, 4) == train(second, held, 4)
    assert flat(first.live_state()) == flat(second.live_state())


def test_a_loaded_state_stays_as_it_is() -> None:
    held = holding(0, 1, 2, 3)
    source, replica = Replica(recipe(SGD)), Replica(recipe(SGD))
    train(source, held, 3)
    state = copy_state(source.live_state())
    before = flat(copy_state(state))
    replica.load(state)
    train(replica, held, 3)
    replica.commit()
    assert flat(state) == before


def test_committing_again_reuses_the_memory() -> None:
    replica, held = Replica(recipe(SGD)), holding(0, 1, 2, 3)
    train(replica, held, 1)
    replica.commit()
    kept = [tensor.data_ptr() for tensor in tensors(replica._commits.of_step(replica.committed_step))]
    live = {tensor.data_ptr() for tensor in tensors(replica.live_state())}
    assert not live & set(kept)
    train(replica, held, 2)
    replica.commit()
    assert [tensor.data_ptr() for tensor in tensors(replica._commits.of_step(replica.committed_step))] == kept
    replica.roll_back()
    assert [tensor.data_ptr() for tensor in tensors(replica._commits.of_step(replica.committed_step))] == kept


def test_a_roll_back_forgets_the_accounts_of_the_steps_undone() -> None:
    replica, held = Replica(recipe(SGD)), holding(0, 1, 2, 3)
    train(replica, held, 2)
    replica.commit()
    replica.update(lambda: replica.gradient(replica.step, held, 0))
    replica.gradient(replica.step, held, 0)
    replica.roll_back()
    assert replica.account.take_records() == []
    assert sum(replica.account.seconds) == 0


def test_the_account_of_a_step_says_what_was_done() -> None:
    replica, held = Replica(recipe(SGD, SCHEDULES["step"])), holding(1, 2)
    for _ in range(3):
        replica.update(lambda: replica.gradient(replica.step, held, 0))
    records = replica.account.take_records()
    assert [record.step for record in records] == [0, 1, 2]
    assert [record.learning_rate for record in records] == pytest.approx([0.1, 0.1, 0.01])
    assert [record.samples for record in records] == [sum(len(ORDER.rows(s, c)) for c in (1, 2)) for s in range(3)]
    assert all(0 < sum(record.seconds) <= record.wall_seconds * 1.001 for record in records)
    assert replica.account.take_records() == []


def test_dropout_masks_depend_on_seed_step_and_rank_alone() -> None:
    replica, held = Replica(recipe(SGD)), holding(0, 1, 2, 3)

    def total(step: int, rank: int) -> Tensor:
        torch.rand(3)  # whatever else drew random numbers
        return replica.gradient(step, held, rank).total.clone()

    assert torch.equal(total(1, 0), total(1, 0))
    assert not torch.equal(total(1, 0), total(1, 1))
    assert not torch.equal(total(1, 0), total(5, 0))


def test_the_model_of_the_recipe_is_not_trained() -> None:
    made = recipe(SGD)
    before = flat(dict(made.parts().model.named_parameters()))
    train(Replica(made), holding(0, 1, 2, 3), 2)
    assert flat(dict(made.parts().model.named_parameters())) == before


def test_parameters_that_the_loss_does_not_reach_keep_no_gradient_and_do_not_decay() -> None:
    replica = Replica(recipe(SGD))
    before = replica.model.unused.weight.detach().clone()
    train(replica, holding(0, 1, 2, 3), 3)
    assert all(p.grad is None for p in replica.model.unused.parameters())
    assert torch.equal(replica.model.unused.weight, before)


def test_a_worker_without_rows_contributes_nothing() -> None:
    replica = Replica(recipe(SGD))
    train(replica, holding(0, 1, 2, 3), 1)
    last = ORDER.steps_per_epoch - 1
    without = next(c for c in range(4) if len(ORDER.rows(last, c)) == 0)
    for held in (holding(without), LocalChunks(ORDER)):
        assert held.share(last) is None
        nothing = replica.gradient(last, held, 0)
        assert nothing.vector.abs().sum() == 0
        assert replica.account.rows == 0


def test_a_worker_without_rows_keeps_up_with_what_counts_calls() -> None:
    replica = Replica(recipe(SGD))
    last = ORDER.steps_per_epoch - 1
    without = next(c for c in range(4) if len(ORDER.rows(last, c)) == 0)
    statistics = [buffer.clone() for buffer in replica.averaged_buffers]
    replica.gradient(last, holding(without), 0)
    assert int(replica.model.seen) == int(replica.model.body[1].num_batches_tracked) == 1
    assert all(torch.equal(a, b) for a, b in zip(statistics, replica.averaged_buffers, strict=True))


def test_a_gradient_comes_as_a_mean_of_the_batch_if_the_loss_is_one_of_its_rows() -> None:
    replica = Replica(recipe(SGD))
    shares = [holding(0, 1), holding(2), holding(3)]  # of different sizes, and the batches of an epoch too
    for step in range(ORDER.steps_per_epoch):
        total = GradientSum.of_all(replica.gradient(step, share, rank).clone() for rank, share in enumerate(shares))
        assert total.count == ORDER.batch_rows(step)
        assert total.divisor == 1.0
    made = recipe_of(recipe(SGD).parts().model, nn.CrossEntropyLoss(reduction="sum"), SGD)
    of_a_sum = Replica(made).gradient(0, shares[0], 0)
    assert (of_a_sum.unit, of_a_sum.divisor) == (1.0, 1.0)


def test_only_running_statistics_are_averaged() -> None:
    replica = Replica(recipe(SGD))
    assert [tuple(buffer.shape) for buffer in replica.averaged_buffers] == [(8,), (8,)]


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (2,), (3, 1)], ids=str)
def test_the_share_of_a_step_is_what_the_order_of_the_epoch_says(numbers: tuple[int, ...]) -> None:
    held = holding(*numbers)
    for step in (0, 1, 2, 3, 4, 9, 2):  # three epochs, and back
        rows = np.concatenate([ENDS[c] + ORDER.rows(step, c) for c in sorted(numbers)])
        share = held.share(step)
        if len(rows) == 0:
            assert share is None
            continue
        assert share is not None
        assert torch.equal(share.inputs["x"], ROWS.inputs["x"][rows])
        assert torch.equal(share.targets, ROWS.targets[rows])


def test_the_shares_follow_a_change_of_chunks() -> None:
    held = holding(0, 1)
    held.share(0)
    held.change([1], {3: chunk(3)})
    assert held.chunks == (1, 3)
    share, expected = held.share(0), holding(1, 3).share(0)
    assert share is not None
    assert expected is not None
    assert torch.equal(share.targets, expected.targets)
    held.change([], {})
    assert (held.chunks, held.samples, held.share(0)) == ((), None, None)


def bytes_alive() -> int:
    """Memory of all tensors of the width of these tests' chunks."""
    found = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.shape[1:] == (1031,)]
    return sum({o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in found}.values())


@pytest.mark.parametrize("keep", [(0, 1, 2, 3, 4, 5), (1, 4), (3,), ()], ids=str)
def test_a_chunk_is_held_once_and_let_go_of_entirely(keep: tuple[int, ...]) -> None:
    one = torch.zeros(10, 1031)
    before, held = bytes_alive(), LocalChunks()
    held.change([], {n: Samples(one + n, torch.full((10,), n)) for n in range(6)})
    assert held.samples is not None
    assert bytes_alive() - before == 6 * one.nbytes
    held.change(keep, {})
    assert bytes_alive() - before == len(keep) * one.nbytes
    kept = [] if held.samples is None else held.samples.inputs[:, 0].tolist()
    assert kept == [float(n) for n in keep for _ in range(10)]


def test_adopting_one_chunk_keeps_no_hold_on_what_it_was_cut_from() -> None:
    whole = Samples(torch.zeros(1000, 4), torch.zeros(1000))
    held = LocalChunks()
    held.change([], {0: whole.slice(0, 10)})
    assert held.samples is not None
    assert held.samples.inputs.untyped_storage().nbytes() == 10 * 4 * 4
