"""The check of a run: what looks across the rows of a batch, and is not seen when it is tried, stops the run in words.

Each of these gets past the call: what it does is rare, or begins later, or is in gradients alone. And what draws random
numbers, normalises or counts is not accused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import parakit as pk
from parakit.errors import BatchDependent, ParakitError, RunFailed

ROWS, FEATURES, CLASSES, BATCH = 2048, 6, 3, 64
RARE = 100  # of how many rows one is of the rare kind
WITHIN = 50  # steps

pytestmark = pytest.mark.dask


def data() -> tuple[Tensor, Tensor]:
    """Rows of which one in a hundred is rare: its first feature is 9. The few that are tried do not show it."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, FEATURES, generator=generator)
    inputs[RARE // 2 :: RARE, 0] = 9.0
    return inputs, inputs[:, -CLASSES:].argmax(1)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


class Keeping(nn.Module):
    """A network that hands its inputs on to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), x


# --- in the loss: for rare rows only


def masked(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """A mean over rows that are not masked."""
    kept = output[1][:, 0] < 8
    return (F.cross_entropy(output[0], target, reduction="none") * kept).sum() / kept.sum()


def neighbours(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Rare rows are compared with the mean of the batch."""
    rare = output[1][:, 0] > 8
    apart = (output[0] - output[0].mean(0)).square().sum(1) * rare
    return F.cross_entropy(output[0], target) + apart.mean()


def largest(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """The mean of the larger half, where there are rare rows."""
    each = F.cross_entropy(output[0], target, reduction="none")
    return each.topk(len(each) // 2).values.mean() if bool((output[1][:, 0] > 8).any()) else each.mean()


def gradient_alone(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Its value is a mean over rows; its gradient goes by the mean of the batch, where there are rare rows."""
    scale = output[0].mean()
    factor = scale / scale.detach() if bool((output[1][:, 0] > 8).any()) else 1.0
    return F.cross_entropy(output[0], target) * factor


# --- in the model


class MeetsRarely(nn.Module):
    """Centres the batch if there is a rare row in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden - hidden.mean(0) if bool((x[:, 0] > 8).any()) else hidden)


class MeetsLater(MeetsRarely):
    """Centres the batch once its weights have moved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", self.last.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        moved = float((self.last.weight.detach() - self.start).norm()) > 0.5
        return self.last(hidden - hidden.mean(0) if moved else hidden)


class MeetsAfterWarmUp(MeetsRarely):
    """Centres the batch after some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = torch.tanh(self.first(x))
        return self.last(hidden - hidden.mean(0) if self.calls > 12 else hidden)


class MeetsWithDropout(MeetsLater):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


class MeetsBehindNormalisation(MeetsLater):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class OwnLoss(nn.Module):
    """Returns a mean over what is not masked, of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        kept = x[:, 0] < 8
        return (F.cross_entropy(self.body(x), labels, reduction="none") * kept).sum() / kept.sum()


SLIPPING: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "a mean over what is not masked, where few rows are": lambda: (Keeping(), masked),
    "a comparison with the batch for rare rows": lambda: (Keeping(), neighbours),
    "the larger half of the losses, now and then": lambda: (Keeping(), largest),
    "a gradient that goes by the batch, and a value that does not": lambda: (Keeping(), gradient_alone),
    "a model that centres batches with a rare row": lambda: (MeetsRarely(), nn.CrossEntropyLoss()),
    "a model that centres batches from some step on": lambda: (MeetsLater(), nn.CrossEntropyLoss()),
    "a model that centres batches after a warm-up": lambda: (MeetsAfterWarmUp(), nn.CrossEntropyLoss()),
    "one that centres them from some step on, with dropout": lambda: (MeetsWithDropout(), nn.CrossEntropyLoss()),
    "one that centres them from some step on, behind batch normalisation": lambda: (
        MeetsBehindNormalisation(),
        nn.CrossEntropyLoss(),
    ),
    "a masked mean of the model's own": lambda: (OwnLoss(), lambda output, target: output),
}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, pk.Workers]]:
    with pk.connect(2) as processes, pk.connect("inline") as inline:
        yield {"processes": processes, "inline": inline}


def trained(on: pk.Workers, made: tuple[nn.Module, Any], workers: int = 2, **options: Any) -> pk.Run:
    model, loss = made
    inputs, targets = data()
    given = {"x": inputs, "labels": targets} if isinstance(model, OwnLoss) else inputs
    return pk.train(
        model, (given, targets), on=on, workers=workers, loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        batch_size=BATCH, steps=4 * WITHIN, **options,
    )  # fmt: skip


@pytest.mark.parametrize("where", ["processes", "inline"])
@pytest.mark.parametrize("name", SLIPPING)
def test_what_slips_through_the_trial_stops_the_run_in_words(
    pools: dict[str, pk.Workers], name: str, where: str
) -> None:
    torch.manual_seed(1)
    run = trained(pools[where], SLIPPING[name]())  # it is not refused here
    with pytest.raises(BatchDependent, match="would depend on the number of workers") as told:
        run.wait(timeout=60, progress=False)
    assert len(run.history.losses) <= WITHIN
    assert "Remedy: return (sum, count)" in str(told.value)
    assert all(torch.isfinite(p).all() for p in run.model.parameters()), "the last committed state is kept"


GATHERED = [
    "a model that centres batches with a rare row", "a model that centres batches from some step on",
    "a model that centres batches after a warm-up", "one that centres them from some step on, with dropout",
]  # fmt: skip


@pytest.mark.parametrize("where", ["processes", "inline"])
@pytest.mark.parametrize("name", GATHERED)
def test_a_model_whose_outputs_are_gathered_is_looked_at_too(
    pools: dict[str, pk.Workers], name: str, where: str
) -> None:
    torch.manual_seed(1)
    run = trained(pools[where], SLIPPING[name](), gather=True)
    with pytest.raises(BatchDependent, match="rows of a batch meet in the model") as told:
        run.wait(timeout=60, progress=False)
    assert len(run.history.losses) <= WITHIN
    assert "compare it in the loss" in str(told.value)


def test_what_a_gathered_loss_compares_is_nobodys_fault(pools: dict[str, pk.Workers]) -> None:
    torch.manual_seed(1)
    run = trained(pools["inline"], (Keeping(), neighbours), gather=True, check=1.0)
    assert run.wait(timeout=60, progress=False).status == "finished"


class Slow(MeetsAfterWarmUp):
    """Takes some thirty milliseconds for each call."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.03)
        return super().forward(x)


@pytest.mark.parametrize("where", ["processes", "inline"])
def test_a_slow_model_is_stopped_within_as_many_steps(pools: dict[str, pk.Workers], where: str) -> None:
    torch.manual_seed(1)
    run = trained(pools[where], (Slow(), nn.CrossEntropyLoss()))
    with pytest.raises(BatchDependent):
        run.wait(timeout=60, progress=False)
    assert len(run.history.losses) <= WITHIN


class Plateau(nn.Module):
    """Halves a penalty where the loss gets no better: what it keeps goes by the rows it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.best, self.weight, self.bad = float("inf"), 1.0, 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        if float(loss.detach()) < self.best - 1e-4:
            self.best, self.bad = float(loss.detach()), 0
        else:
            self.bad += 1
            if self.bad >= 3:
                self.weight, self.bad = self.weight / 2, 0
        return loss + self.weight * 0.1 * output.square().mean()


class Ratio(nn.Module):
    """Weighs by the last two values of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.last = self.before = float("nan")

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        one, other = F.cross_entropy(output, target), output.square().mean()
        weight = self.last / self.before
        self.before, self.last = self.last, float(other.detach())
        return one + (weight if weight == weight else 1.0) * other


@pytest.mark.parametrize("kind", [Plateau, Ratio])
def test_to_look_changes_nothing_where_a_loss_keeps_what_it_saw(pools: dict[str, pk.Workers], kind: Any) -> None:
    losses = []
    for check in (False, True, 1.0):
        torch.manual_seed(1)
        run = trained(pools["inline"], (network(), kind()), workers=1, check=check)
        losses.append(run.wait(timeout=60, progress=False).history.losses.tolist())
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("kind", [Plateau, Ratio])
def test_and_several_workers_stop_in_words(pools: dict[str, pk.Workers], kind: Any) -> None:
    torch.manual_seed(1)
    with pytest.raises(RunFailed, match="come to different values"):
        trained(pools["inline"], (network(), kind())).wait(timeout=60, progress=False)


def test_one_worker_is_told_too_because_its_run_may_be_resized(pools: dict[str, pk.Workers]) -> None:
    torch.manual_seed(1)
    run = trained(pools["processes"], SLIPPING["a model that centres batches from some step on"](), workers=1)
    with pytest.raises(BatchDependent):
        run.wait(timeout=60, progress=False)


def test_without_the_check_each_share_is_a_batch_of_its_own(pools: dict[str, pk.Workers]) -> None:
    torch.manual_seed(1)
    run = trained(pools["processes"], SLIPPING["a model that centres batches from some step on"](), check=False)
    run.wait(timeout=60, progress=False)
    assert len(run.history.losses) == 4 * WITHIN


# --- nobody is accused who did nothing


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + 0.1 * torch.randn_like(x)) if self.training else self.body(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = network(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x) * min(1.0, self.calls / 30)


def steep(output: Tensor, target: Tensor) -> Tensor:
    """A loss of kinks: rounding decides on which side of one a row is."""
    return (output.gather(1, target[:, None]) * 50).floor().mul(0.02).mean() + F.cross_entropy(output, target)


HONEST: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "a network": lambda: (network(), F.cross_entropy),
    "its rare rows weighted": lambda: (
        Keeping(),
        lambda o, t: (F.cross_entropy(o[0], t, reduction="none") * (1 + (o[1][:, 0] > 8))).mean(),
    ),
    "dropout": lambda: (nn.Sequential(nn.Dropout(0.3), network()), F.cross_entropy),
    "batch normalisation": lambda: (nn.Sequential(nn.BatchNorm1d(FEATURES), network()), F.cross_entropy),
    "noise": lambda: (Noise(), lambda o, t: F.cross_entropy(o, t)),
    "a count of calls": lambda: (Counting(), lambda o, t: F.cross_entropy(o, t)),
    "kinks": lambda: (network(), steep),
    "half precision": lambda: (network().bfloat16(), lambda o, t: F.cross_entropy(o.float(), t)),
    "a sum and a count": lambda: (
        Keeping(),
        lambda o, t: (
            (F.cross_entropy(o[0], t, reduction="none") * (o[1][:, 0] < 8)).sum(), (o[1][:, 0] < 8).sum(),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["processes", "inline"])
@pytest.mark.parametrize("name", HONEST)
def test_what_goes_row_by_row_is_not_accused(pools: dict[str, pk.Workers], name: str, where: str) -> None:
    torch.manual_seed(1)
    model, loss = HONEST[name]()
    inputs, targets = data()
    if next(model.parameters()).dtype == torch.bfloat16:
        inputs = inputs.bfloat16()
    run = pk.train(
        model, (inputs, targets), on=pools[where], workers=2, loss=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=BATCH, steps=2 * WITHIN, check=1.0,
    )  # fmt: skip
    run.wait(timeout=120, progress=False)
    assert len(run.history.losses) == 2 * WITHIN


def test_looking_changes_nothing(pools: dict[str, pk.Workers]) -> None:
    """Whether a run is looked at never, now and then, or at each step: it draws and computes the same numbers."""
    curves = []
    for check in (False, True, 1.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Dropout(0.3), Noise(), nn.BatchNorm1d(CLASSES), Counting2()).double()
        inputs, targets = data()
        run = pk.train(
            model, (inputs.double(), targets), on=pools["inline"], workers=2, batch_size=BATCH, steps=40, check=check,
            loss=lambda o, t: F.cross_entropy(o, t), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )  # fmt: skip
        run.wait(timeout=60, progress=False)
        curves.append((run.history.losses.tolist(), [p.tolist() for p in run.model.state_dict().values()]))
    assert curves[0] == curves[1] == curves[2]


class Counting2(nn.Module):
    """Counts in an attribute, and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.steps += 1
        return x * (1 + 0.01 * self.calls + 0.01 * self.steps)


def test_a_share_of_the_time_is_a_number_from_0_to_1(pools: dict[str, pk.Workers]) -> None:
    for wrong in (-0.1, 1.5, "often"):
        with pytest.raises(ParakitError, match="a share of the time from 0 to 1"):
            trained(pools["inline"], (network(), F.cross_entropy), check=wrong)
