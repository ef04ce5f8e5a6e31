"""Errors that a user's own code raises on a worker: where, in which step, over which rows, and no untrue cause."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import parakit as pk
from parakit.errors import ModelError, RunFailed
from tests.serial import batches

ROWS, BATCH, SEED, STEPS, LIMIT = 120, 20, 5, 12, 60
BAD_STEP = 4
BAD_ROW = int(batches(ROWS, 10, BATCH, SEED, 5)[BAD_STEP][-3])  # which is none of those that the call looks at

pytestmark = pytest.mark.dask


def look_up(x: Tensor) -> Tensor:
    if bool((x[:, 0] > 2).any()):
        raise KeyError("unknown category")
    return x


class InForward(nn.Module):
    """Meets a row that it does not take, two calls deep."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(look_up(x))


class InTorch(InForward):
    """The same, with torch's own code as the last that is called."""

    def forward(self, x: Tensor) -> Tensor:
        table = x.new_ones(3, 6)
        return self.layer(F.embedding((x[:, 0] > 2).long() * 7, table) * x)


class InBackward(InForward):
    """Fails when its gradient is taken."""

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        if bool((x[:, 0] > 2).any()):
            output.register_hook(refuse)
        return output


def refuse(grad: Tensor) -> Tensor:
    raise ArithmeticError(f"a gradient of {len(grad)} rows")


class InTheLoss(nn.Module):
    """Fails at the fifth of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > BAD_STEP:
            raise ValueError("a loss that is tired")
        return F.cross_entropy(output, target)


class InTheOptimizer(torch.optim.SGD):
    """Fails in its fifth step."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps > BAD_STEP:
            raise OverflowError("the fifth step")
        return super().step(closure)


def late_scheduler(optimizer: torch.optim.Optimizer) -> Any:
    def factor(step: int) -> float:
        if step > BAD_STEP:
            raise LookupError("no rate for this step")
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def plain_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def made(model: nn.Module, **how: Any) -> dict[str, Any]:
    return {"model": model, "optimizer": plain_adam, "loss": nn.CrossEntropyLoss()} | how


# What fails, the frames that are shown, the error, and whether it is a matter of the row.
CASES: dict[str, tuple[Callable[[], dict[str, Any]], list[str], str, bool]] = {
    "in forward": (lambda: made(InForward()), ["forward", "look_up"], "KeyError: 'unknown category'", True),
    "in torch": (lambda: made(InTorch()), ["forward"], "IndexError: index out of range", True),
    "in backward": (lambda: made(InBackward()), ["refuse"], "ArithmeticError: a gradient of", True),
    "in the loss": (lambda: made(nn.Linear(6, 3), loss=InTheLoss()), ["forward"], "ValueError: a loss that is", False),
    "in the optimizer": (
        lambda: made(nn.Linear(6, 3), optimizer=lambda p: InTheOptimizer(p, lr=0.01)), ["step"],
        "OverflowError: the fifth step", False,
    ),
    "in the schedule": (
        lambda: made(nn.Linear(6, 3), scheduler=late_scheduler, scheduler_every="step"), ["factor"],
        "LookupError: no rate for this step", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("strategy", [pk.strategies.AllReduce(), pk.strategies.MapReduce()], ids=["all", "map"])
@pytest.mark.parametrize("kind", ["inline", "pool"])
@pytest.mark.parametrize("name", CASES)
def test_an_error_is_told_with_its_place_its_step_and_its_rows(
    request: pytest.FixtureRequest, name: str, kind: str, strategy: Any
) -> None:
    make, frames, error, by_row = CASES[name]
    inputs, targets = torch.linspace(-1, 1, ROWS * 6).view(ROWS, 6).clone(), torch.arange(ROWS) % 3
    if by_row:
        inputs[BAD_ROW, 0] = 2.5
    how = make()
    run = pk.train(
        how.pop("model"), (inputs, targets), on=request.getfixturevalue(kind), workers=2, batch_size=BATCH, chunks=10,
        seed=SEED, steps=STEPS, strategy=strategy, **how,
    )  # fmt: skip
    with pytest.raises(RunFailed, match=re.escape(error)) as failed:
        run.wait(LIMIT, progress=False)
    text = str(failed.value)
    assert re.findall(r'File "test_errors_of_code.py", line \d+, in (\w+)', text) == frames
    assert "parakit/" not in text
    assert "site-packages" not in text
    assert text.startswith(f"Step {BAD_STEP} failed")
    shown = [int(row) for row in re.search(r"\(rows ([\d, ]+)", text)[1].split(", ")]  # type: ignore[index]
    assert list(failed.value.rows[:6]) == shown
    assert set(failed.value.rows) <= set(batches(ROWS, 10, BATCH, SEED, STEPS)[BAD_STEP].tolist())
    if by_row:
        assert BAD_ROW in failed.value.rows
        assert len(failed.value.rows) == BATCH // 2
    assert "raised this error in its own code" in text
    assert run.step == run.model_step <= BAD_STEP + 1


def test_rows_are_those_of_the_share_that_failed(inline: pk.Workers) -> None:
    inputs, targets = torch.zeros(ROWS, 6), torch.arange(ROWS) % 3
    inputs[BAD_ROW, 0] = 2.5
    run = pk.train(
        InForward(), (inputs, targets), on=inline, workers=4, batch_size=BATCH, chunks=10, seed=SEED, steps=STEPS
    )
    with pytest.raises(RunFailed) as failed:
        run.wait(LIMIT, progress=False)
    assert BAD_ROW in failed.value.rows
    assert len(failed.value.rows) == 6  # three of the ten chunks are its
    shown = ", ".join(str(row) for row in failed.value.rows)
    assert f"(rows {shown} of the data)" in str(failed.value)
    assert run.step <= BAD_STEP


def test_a_mistake_of_parakits_own_is_not_blamed_on_the_user(
    inline: pk.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pk.train(
        nn.Linear(6, 3), (torch.zeros(ROWS, 6), torch.arange(ROWS) % 3), on=inline, workers=2, steps=2000, batch_size=20
    )
    monkeypatch.setattr("parakit.engines.account.perf_counter", None)
    with pytest.raises(RunFailed, match="'NoneType' object is not callable") as failed:
        run.wait(LIMIT, progress=False)
    assert "a mistake in parakit itself" in str(failed.value)
    assert "its own code" not in str(failed.value)


# --- remedies that are true


class ForOneBatch(nn.Module):
    """Holds a state for batches of one size, and everything is double."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)
        self.start = torch.zeros(1, BATCH, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, None], self.start)[0][:, -1])


@pytest.mark.parametrize(
    ("model", "dtype", "cause", "not_told"),
    [
        (ForOneBatch().double(), torch.float64, "instead of writing 20 into the model", "astype"),
        (nn.Linear(6, 3), torch.float64, "float64", "writing 20 into"),
        (nn.Linear(6, 3).double(), torch.float32, "float32", "writing 20 into"),
        (nn.Linear(5, 3).double(), torch.float64, "(10, 6)", "astype"),
    ],
    ids=["a batch size", "double data", "a double model", "another width"],
)
def test_a_refusal_names_its_own_cause(
    inline: pk.Workers, model: nn.Module, dtype: torch.dtype, cause: str, not_told: str
) -> None:
    data = (torch.zeros(ROWS, 6, dtype=dtype), torch.arange(ROWS) % 3)
    with pytest.raises(ModelError) as refused:
        pk.train(model, data, on=inline, steps=2, batch_size=BATCH)
    assert cause in str(refused.value)
    assert not_told not in str(refused.value)
