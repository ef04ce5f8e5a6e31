"""Bad input: a clear error at the call, in words, with nothing started; and the table of all that a user then sees.

A case is what a person would type, which is what is executed. `PARAKIT_UPDATE=1` writes `BAD_INPUT.md` anew.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterator
from functools import partial  # this and the like is typed in cases
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np  # noqa: F401
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset  # noqa: F401

import parakit as pk
from parakit.errors import (
    CheckpointError,
    ConnectError,
    DataError,
    Diverged,
    InputError,
    LossError,
    ModelError,
    ParakitError,
    PoolError,
    RunEnded,
    RunError,
    RunFailed,
    WaitTimeout,
    WorkerCountError,
)
from parakit.system.devices import CPU
from parakit.system.process_settings import undisturbed
from tests.runs.test_exact import wait_for

TABLE = Path(__file__).with_name("BAD_INPUT.md")
X, Y = torch.arange(160.0).reshape(40, 4) / 160, torch.arange(40) % 3


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


class Photos(Dataset):
    def __len__(self) -> int:
        return 40


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.lock = threading.Lock()


class LockedButCopies(Locked):
    def __deepcopy__(self, memo: Any) -> LockedButCopies:
        return LockedButCopies()


class Expanded(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.bias = nn.Parameter(torch.zeros(1).expand(3))


class CountsRows(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += len(inputs)
        return super().forward(inputs)


class Centred(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs - inputs.mean(0))


class Fixed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs + torch.zeros(32, 4))


class Mean(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.mean()


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 3)]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers[0](inputs)


class FailsLate(nn.Linear):
    """Fails on a worker only, after some steps."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 3:
            raise FloatingPointError("the seventh seal is broken")
        return super().forward(inputs)


class LossWithParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output * self.scale, target)


class WithASet(torch.optim.lr_scheduler.StepLR):
    """A schedule whose state is not plain."""

    def __init__(self, optimizer: Any) -> None:
        self.seen = {1, 2}
        super().__init__(optimizer, 10)


class OwnSchedule:
    """No schedule of torch's, though it steps, and has a state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.done = optimizer, 0

    def step(self) -> None:
        self.done += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 / self.done

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


class NotesChanges(nn.Module):
    """A loss that notes how much it has changed, from its second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last, self.change = 0, None, 0.0

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(output, target)
        if self.calls > 0:
            self.change = float(loss.detach()) - self.last
        self.last = float(loss.detach())
        self.calls += 1
        return loss


class RemembersAList(NotesChanges):
    """The same, of all losses so far: the second call looks for one that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[float] = []

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(output, target)
        self.change = self.all[self.calls - 1] if self.calls else 0.0
        self.calls += 1
        self.all.append(float(loss.detach()))
        return loss


class FailsOnceMore(nn.Linear):
    """A model that cannot be called twice, because of what it keeps."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.last: torch.Tensor | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.last is not None:
            inputs = inputs @ self.last
        self.last = inputs.detach()
        return super().forward(inputs)


def adversary(*, kept: str = "alone") -> Any:
    """A loss that trains an adversary within each step."""
    other = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    holder: Any = {"alone": optimizer, "dict": {"adversary": [optimizer]}, "object": partial(F.relu)}[kept]
    if kept == "object":
        holder.optimizer = optimizer

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        own = holder if kept == "alone" else holder["adversary"][0] if kept == "dict" else holder.optimizer
        own.zero_grad()
        F.cross_entropy(other(output.detach()), target % 2).backward()
        own.step()
        return F.cross_entropy(output, target) - 0.3 * F.cross_entropy(other(output), target % 2)

    return loss


class Adversary(nn.Module):
    """The same as a module, with its optimizer made in the first call, or in the beginning."""

    def __init__(self, *, late: bool = False) -> None:
        super().__init__()
        self.held = [nn.Parameter(torch.ones(3))]
        self.optimizer = None if late else torch.optim.Adam(self.held)

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(self.held)
        self.optimizer.zero_grad()
        (output.detach() * self.held[0]).square().mean().backward()
        self.optimizer.step()
        return F.cross_entropy(output, target)


class SearchesWithin(nn.Linear):
    """A model that trains something of its own in forward."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.shifts = [torch.zeros(4, requires_grad=True)]
        self.search = torch.optim.SGD(self.shifts, lr=0.1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.shifts[0].grad = torch.ones(4)
        self.search.step()
        return super().forward(inputs + self.shifts[0].detach())


class Seeded(nn.Linear):
    """Draws the same noise in each call."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return super().forward(inputs + torch.randn(inputs.shape))


class SeededCentred(Seeded):
    """The same, but what is wrong with it is something else."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs - inputs.mean(0))


class SeededForAll(Seeded):
    """Draws noise that is the same for each row."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return nn.Linear.forward(self, inputs + torch.randn(4))


class Noisy(Seeded):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, inputs + torch.randn(inputs.shape))


class FitsWithin(SearchesWithin):
    """A model that has an optimizer for one call, and keeps another that it does not step."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        shift = torch.zeros(4, requires_grad=True)
        inner = torch.optim.SGD([shift], lr=0.1 * len(self.search.param_groups))
        shift.grad = torch.ones(4)
        inner.step()
        return nn.Linear.forward(self, inputs + shift.detach())


def pairwise(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output[:, None] - output[None]).square().mean()


def net() -> nn.Linear:
    """The same on every machine."""
    made = nn.Linear(4, 3)
    nn.init.zeros_(made.bias)
    with torch.no_grad():
        made.weight.copy_(X[:3])
    return made


class Case(NamedTuple):
    done: str
    typed: str  # an expression
    kind: type[ParakitError]
    words: str


def train(more: str = "", *, model: str = "model", data: str = "data", on: str = "workers", end: str = "") -> str:
    """A call of `train` as a person would type it."""
    return f"pk.train({model}, {data}, on={on}{', ' * bool(more)}{more}){end}"


NUMBERS = [
    Case("zero workers", train("workers=0"), WorkerCountError, "0; it must be a whole number of at least 1"),
    Case("negative workers", train("workers=-1"), WorkerCountError, "-1; it must be"),
    Case("workers as text", train('workers="2"'), WorkerCountError, "'2'"),
    Case("more workers than there are", train("workers=99"), WorkerCountError, "99 workers were asked for"),
    Case("more workers than chunks", train("workers=9, batch_size=8"), WorkerCountError, "cannot share 8 chunks"),
    Case("a batch larger than the data", train("batch_size=41"), DataError, "batch of 41 is larger than the data, whi"),
    Case("a batch of nothing", train("batch_size=0"), InputError, "batch_size is 0"),
    Case("half a sample", train("batch_size=2.5"), InputError, "batch_size is 2.5"),
    Case("no epochs", train("epochs=0"), InputError, "epochs is 0"),
    Case("epochs as text", train('epochs="3"'), InputError, "epochs is '3'"),
    Case("negative steps", train("steps=-3"), InputError, "steps is -3"),
    Case("epochs and steps", train("epochs=1, steps=1"), InputError, "both given"),
    Case("no seed", train("seed=None"), InputError, "seed is None"),
    Case("an array as seed", train("seed=np.arange(99)"), InputError, "seed is array([ 0, 1"),
    Case("no chunks", train("chunks=0"), InputError, "chunks is 0"),
    Case("a negative norm", train("clip_norm=-1.0"), InputError, "clip_norm is -1.0"),
    Case("a number that is too large", train("clip_norm=10**400"), InputError, "clip_norm is 1000"),
    Case("a learning rate of 0", train("learning_rate=0"), InputError, "learning_rate is 0"),
    Case("a learning rate as text", train('learning_rate="0.1"'), InputError, "learning_rate is '0.1'"),
    Case("no patience", train("limit_seconds=0"), InputError, "limit_seconds is 0"),
    Case("a word that is none of two", train('on_nonfinite="maybe"'), InputError, "'maybe'"),
    Case("a rule that is none", train('buffers={"seen": "median"}'), InputError, "'median'; it must be one of 'mean'"),
    Case("a rule for nothing", train('buffers={"queue": "first"}'), InputError, "has no such buffer"),
    Case("rules in a list", train('buffers=["first"]'), InputError, "a dict from names of buffers"),
    Case("a check of twice the time", train("check=2"), InputError, "a share of the time from 0 to 1"),
    Case("a word for yes", train('gather="yes"'), InputError, "gather is 'yes'"),
    Case(
        "gathered in tasks",
        train("gather=True, strategy=pk.strategies.MapReduce()"),
        InputError,
        "tasks that cannot speak to each other",
    ),
    Case("a schedule by the week", train('scheduler_every="week"'), InputError, "'week'"),
]
DATA = [
    Case("no data", train(data="None"), DataError, "NoneType"),
    Case("data by name", train(data='"digits"'), DataError, "a str"),
    Case("data and model swapped", train(model="data", data="model"), DataError, "swapped"),
    Case("both parts of the data set", train(data="pk.datasets.digits()"), DataError, "Digits"),
    Case("a Dataset class", train(data="Photos"), DataError, "the class Photos"),
    Case("a run for data", train(data="finished"), DataError, "a Run"),
    Case("a DataLoader", train(data="DataLoader(TensorDataset(X, Y))"), DataError, "DataLoader"),
    Case("a stream", train(data="Stream()"), DataError, "Stream"),
    Case("inputs without targets", train(data="X"), DataError, "parakit cannot read"),
    Case("pairs in a list", train(data="list(zip(X, Y))"), DataError, "40 parts where 2 are needed"),
    Case("three parts", train(data="(X, X, Y)"), DataError, "3 parts where 2 are needed"),
    Case("three tensors", train(data="TensorDataset(X, X, Y)"), DataError, "3 tensors where 2 are needed"),
    Case("no samples", train(data="(X[:0], Y[:0])"), DataError, "empty: 0 samples"),
    Case("unequal lengths", train(data="(X, Y[:39])"), DataError, "40 rows of inputs but 39 rows of targets"),
    Case("unequal inputs", train(data="((X, X[:10]), Y)"), DataError, "10 and 40 rows of inputs"),
    Case("transposed inputs", train(data="(X.T, Y)"), DataError, "4 rows of inputs but 40 rows"),
    Case("lists of numbers", train(data="(X.tolist(), Y.tolist())"), DataError, "a list of 40"),
    Case("text for inputs", train(data='(np.array(["a"] * 40), Y)'), DataError, "cannot be a tensor"),
    Case("sparse inputs", train(data="(X.to_sparse(), Y)"), DataError, "sparse_coo"),
    Case("labels of a type without rows", train(data='(X, Y.numpy().astype("uint16"))'), DataError, "uint16"),
    Case("labels as floats", train(data="(X, Y.float())"), DataError, "class labels as float32"),
    Case("labels in 32 bits", train(data="(X, Y.int())"), DataError, "class labels as int32"),
    Case("labels that count from 1", train(data="(X, Y + 1)"), DataError, "label 3 at row 2, but the model's output"),
    Case("a negative label", train(data="(X, Y - 1)"), DataError, "label -1 at row 0"),
    Case("a share for validation", train("validation=0.2"), DataError, "validation is a float"),
    Case("an empty validation", train("validation=(X[:0], Y[:0])"), DataError, "validation is empty"),
    Case("a label that only validation has", train("validation=(X, Y + 1)"), DataError, "validation has the label 3"),
    Case("validation of another width", train("validation=(X[:, :3], Y)"), DataError, "validation does not go"),
    Case("float64 from numpy", train(data="(X.double().numpy(), Y)"), ModelError, "the inputs are float64"),
    Case("inputs and targets swapped", train(data="(Y, X)"), ModelError, "inputs of int64 of shape (8,)"),
]  # fmt: skip
MODELS = [
    Case("no model", train(model="None"), ModelError, "no torch.nn.Module"),
    Case("a model class", train(model="nn.Linear"), ModelError, "an instance, not a class"),
    Case("a function for a model", train(model="lambda x: x @ W"), ModelError, "whose forward does this"),
    Case("a run for a model", train(model="finished"), ModelError, "run.model"),
    Case("a frozen model", train(model="model.requires_grad_(False)"), ModelError, "no trainable parameters"),
    Case("layers in a plain list", train(model="InAList()"), ModelError, "no trainable parameters"),
    Case("complex parameters", train(model="nn.Linear(4, 3, dtype=torch.complex64)"), ModelError, "complex parameter"),
    Case("a model that holds a lock", train(model="nn.Sequential(nn.Flatten(), Locked())"), ModelError,
         "its attribute 1.lock, a lock"),
    Case("a model that cannot travel", train(model="LockedButCopies()"), ModelError, "cannot be pickled"),
    Case("a model without values", train(model='nn.Linear(4, 3, device="meta")'), ModelError, "on the device 'meta'"),
    Case("a parameter in one place of memory", train(model="Expanded()"), ModelError, "several elements in one place"),
    Case("a count of rows in a buffer", train(model="CountsRows()"), ModelError, "buffers={'seen': rule}"),
    Case("statistics of a batch by hand", train(model="Centred()"), ModelError, "at the rows of a batch together"),
    Case("a batch size in the model", train("batch_size=32", model="Fixed()"), ModelError, "batches of 32 rows alone"),
    Case("a layer of another width", train(model="nn.Linear(5, 3)"), ModelError, "cannot compute a batch"),
    Case("an optimizer, made", train("optimizer=torch.optim.SGD(model.parameters())"), ModelError, "must be a functio"),
    Case("an optimizer by name", train('optimizer="sgd"'), ModelError, "must be a function"),
    Case("no optimizer", train("optimizer=False"), ModelError, "must be a function"),
    Case("an optimizer that is none", train("optimizer=lambda p: p"), ModelError, "no torch.optim.Optimizer"),
    Case("an optimizer that raises", train("optimizer=lambda p: 1 / 0"), ModelError, "ZeroDivisionError"),
    Case("an optimizer without argument", train("optimizer=lambda: 0"), ModelError, "called with the list of"),
    Case("parameters of nobody", train("optimizer=lambda p: torch.optim.SGD([torch.zeros(3, requires_grad=True)])"),
         ModelError, "other parameters"),
    Case("two optimizers", train("optimizer=lambda p: (torch.optim.SGD(p[:1]), torch.optim.Adam(p[1:]))"),
         ModelError, "returned 2 optimizers"),
    Case("an optimizer for sparse gradients", train("optimizer=torch.optim.SparseAdam"), ModelError, "dense"),
    Case("a cycle that is too short",
         train("scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 2), epochs=9"), ModelError,
         "made for 2 steps of the schedule and cannot make more"),
    Case("an optimizer that cannot travel", train("optimizer=lambda p: torch.optim.SGD(p, lr=0.1 if lock else 1)"),
         ModelError, "optimizer cannot be pickled"),
    Case("a schedule by name", train('scheduler="cosine"'), ModelError, "must be a function"),
    Case("a schedule without its length", train("scheduler=torch.optim.lr_scheduler.StepLR"), ModelError, "step_size"),
    Case("a schedule on a metric", train("scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"),
         ModelError, "stepped without a metric"),
    Case("a schedule of one's own", train("scheduler=OwnSchedule"), ModelError, "which is no torch.optim.lr_scheduler"),
    Case("a function that returns no schedule", train("scheduler=lambda o: None"), ModelError, "returned None, which"),
    Case("a loss that looks back", train("loss=NotesChanges()"), ModelError, "loss.last changes in forward and goes"),
    Case("a loss that looks back in a list", train("loss=RemembersAList()"), ModelError, "loss.all changes in forward"),
    Case("an optimizer in the loss", train("loss=adversary()"), LossError, "in its attribute adversary.<locals>.loss"),
    Case("an optimizer in a loss that is a module", train("loss=Adversary()"), LossError, "in its attribute loss.opt"),
    Case("one that is made in the loss", train("loss=Adversary(late=True)"), LossError, "in its attribute loss.optim"),
    Case("an optimizer in the model", train(model="SearchesWithin()"), ModelError, "in its attribute search"),
    Case("a seed in the model", train(model="Seeded()"), ModelError, "sets the seed of torch's generator in each call"),
    Case("a seed, and statistics by hand", train(model="SeededCentred()"), ModelError, "at the rows of a batch"),
    Case("a loss by name", train('loss="mse"'), LossError, "cannot be called"),
    Case("a loss class", train("loss=nn.CrossEntropyLoss"), LossError, "cannot be called"),
    Case("no loss", train("loss=False"), LossError, "cannot be called"),
    Case("a loss per sample", train('loss=nn.CrossEntropyLoss(reduction="none")'), LossError, "shape (11,)"),
    Case("a loss that is a number", train("loss=lambda o, t: 1.0"), LossError, "returned 1.0"),
    Case("a loss without gradient", train("loss=lambda o, t: o.detach().mean()"), LossError, "no gradient"),
    Case("a loss with parameters", train("loss=LossWithParameters()"), LossError, "trainable parameters of its own"),
    Case("a loss that compares samples", train("loss=pairwise"), LossError, "neither a mean nor a sum"),
    Case("a mean over a mask", train("loss=lambda o, t: (o.square().sum(1) * (t > 0)).sum() / (t > 0).sum()"),
         LossError, "neither a mean nor a sum"),
    Case("a sum without its count", train("loss=lambda o, t: (o, len(t))"), LossError, "it may return (sum, count)"),
    Case("a mean, to be gathered", train("loss=lambda o, t: o, gather=True", model="nn.Sequential(model, Mean())"),
         LossError, "every tensor of a model's output has a row for each sample"),
    Case("targets that the loss does not take", train("loss=nn.CrossEntropyLoss()", data="(X, X[:, :2])"),
         LossError, "cannot be computed"),
    Case("a strategy class", train("strategy=pk.strategies.AllReduce"), InputError, "give an instance"),
    Case("a strategy by name", train('strategy="all-reduce"'), InputError, "no step"),
]  # fmt: skip
EVALUATION = [
    Case("nothing to evaluate on", "pk.evaluate(model, (X[:0], Y[:0]), on=workers)", DataError, "empty: 0 samples"),
    Case("too few classes", "pk.evaluate(nn.Linear(4, 2), data, on=workers)", DataError, "label 2 at row 2"),
    Case("another width", "pk.evaluate(nn.Linear(5, 3), data, on=workers)", ModelError, "cannot compute a batch"),
    Case("a run for its model", "pk.evaluate(finished, data, on=workers)", ModelError, "run.model"),
]
CONNECTIONS = [
    Case("zero workers", "pk.connect(0)", WorkerCountError, "0; it must be"),
    Case("negative workers", "pk.connect(-4)", WorkerCountError, "-4"),
    Case("a truth for a number", "pk.connect(True)", WorkerCountError, "True"),
    Case("a million processes", "pk.connect(1_000_000)", WorkerCountError, "1000000 local processes cannot run here"),
    Case("half a worker", "pk.connect(1.5)", InputError, "1.5"),
    Case("a list", "pk.connect([2])", InputError, "cannot reach workers through"),
    Case("an array", "pk.connect(np.array([1, 2]))", InputError, "array([1, 2])"),
    Case("a number as text", 'pk.connect("2")', InputError, "names no port"),
    Case("no threads", "pk.connect(1, threads=0)", InputError, "threads is 0"),
    Case("more than at most", "pk.connect(3, most=2)", InputError, "start with 3 workers and grow to at most 2"),
    Case("negative patience", "pk.connect(1, timeout=-1)", InputError, "timeout is -1"),
    Case("nobody there", 'pk.connect("tcp://127.0.0.1:9", timeout=1)', ConnectError, "No Dask scheduler answers"),
    Case("no such protocol", 'pk.connect("nonsense://x", timeout=1)', ConnectError, "nonsense://x"),
]
POOLS = [
    Case("a number for a pool", train(on="2"), InputError, "no pool of workers"),
    Case("a closed pool", train(on="closed"), PoolError, "closed"),
    Case("evaluation on a closed pool", "pk.evaluate(model, data, on=closed)", PoolError, "closed"),
    Case("a busy pool", train(on="busy"), PoolError, "busy"),
]
RUNS = [
    Case("no workers for a run", "paused.resize(0)", WorkerCountError, "at least 1"),
    Case("a run beyond its pool", "paused.resize(65)", WorkerCountError, "can grow to 64"),
    Case("a run beyond its chunks", "paused.resize(64)", WorkerCountError, "cannot share"),
    Case("a negative rate in mid-run", "paused.set_learning_rate(-1)", InputError, "the learning rate is -1"),
    Case("waiting for a paused run", "paused.wait()", RunError, "would never end"),
    Case("waiting for too short a time", "paused.wait(timeout=0.1)", WaitTimeout, "not ended within 0.1 s"),
    Case("waiting for a time that is none", 'paused.wait("a minute")', InputError, "timeout is 'a minute'"),
    Case("a resize after the end", "finished.resize(2)", RunEnded, "finished at step 4 of 4; resize"),
    Case("another rate after the end", "finished.set_learning_rate(0.1)", RunEnded, "no effect"),
    Case("a model that fails on a worker", train("batch_size=8, epochs=9", model="FailsLate()", end=".wait()"),
         RunFailed, "the seventh seal is broken"),
    Case("inputs that are not finite", train(data='(X * float("nan"), Y)', end=".wait()"), Diverged, "is nan, at"),
]  # fmt: skip
CHECKPOINTS = [
    Case("a file for a folder", train('checkpoint="notes.txt"'), InputError, "it is a file"),
    Case("a folder below a file", train('checkpoint="notes.txt/kept"'), InputError, "notes.txt/kept"),
    Case("no name for a folder", train('checkpoint=""'), InputError, "''; it must be a folder or a URL"),
    Case("a truth for a folder", train("checkpoint=True"), InputError, "True; it must be a folder"),
    Case("no such protocol", train('checkpoint="cloud://my/run"'), InputError, "no place that checkpoints can reach"),
    Case("two runs into one folder", train('checkpoint="kept"'), InputError, "saves its checkpoints to 'kept' too"),
    Case("all the time", train('checkpoint="new", checkpoint_seconds=0'), InputError, "checkpoint_seconds is 0"),
    Case("none to keep", train('checkpoint="new", checkpoint_keep=0'), InputError, "checkpoint_keep is 0"),
    Case("a schedule that holds a set", train('checkpoint="new", scheduler=WithASet'), CheckpointError, "seen cannot"),
    Case("no such folder", train('resume="nowhere"'), CheckpointError, "no checkpoint in 'nowhere'"),
    Case("no name to go on from", train('resume=""'), InputError, "''; it must be a folder or a URL"),
    Case("a name that cannot be", train('resume="x" * 5000'), CheckpointError, "cannot be read"),
    Case("a number to go on from", train("resume=3"), InputError, "which no run can go on from"),
    Case("a model to go on from", train("resume=finished.model"), InputError, "which no run can go on from"),
    Case("a run that is going on", train("resume=paused"), RunError, "nothing to go on from yet"),
    Case("another kind of file", train('resume="notes.txt"'), CheckpointError, "no whole parakit checkpoint"),
    Case("damaged checkpoints only", train('resume="damaged"'), CheckpointError, "no whole checkpoint in 'damaged'"),
    Case("the checkpoint of another model", train('batch_size=8, resume="saved"', model="nn.Linear(4, 5)"),
         CheckpointError, "parameter weight is (5, 4) here, (3, 4) in the checkpoint"),
    Case("of another optimizer", train('batch_size=8, resume="saved", optimizer=torch.optim.Adam'),
         CheckpointError, "the optimizer is Adam here, SGD"),
    Case("of another batch size", train('batch_size=10, resume="saved"'), CheckpointError, "batch_size is 10 here"),
    Case("of another seed", train('batch_size=8, seed=7, resume="saved"'), CheckpointError, "seed is 7 here, 0"),
    Case("of other data", train('batch_size=8, resume="saved"', data="(X + 1, Y)"), CheckpointError, "data is "),
    Case("past the end", train('batch_size=8, steps=4, resume="saved"'), InputError, "done 4 steps already, and 4"),
]  # fmt: skip
ROOMS = [
    Case("a model class", "pk.panel(nn.Linear, data, on=workers)", InputError, "pk.panel cannot show"),
    Case("model and data swapped", "pk.panel(data, model, on=workers)", InputError, "pk.panel cannot show tuple"),
    Case("a model without workers", "pk.panel(model, data)", InputError, "without workers"),
    Case("workers by name", 'pk.panel(model, data, on="inline")', InputError, "no pool of workers"),
    Case("no epochs", "pk.panel(model, data, on=workers, epochs=0)", InputError, "epochs is 0"),
    Case("a strategy by name", 'pk.panel(model, data, on=workers, strategy="AllReduce")', InputError, "no step"),
    Case("options for a run", "pk.panel(finished, epochs=3)", InputError, "epochs cannot be given"),
    Case("a picture of a number", "pk.plots.loss(3)", InputError, "no course of a run"),
    Case("an axis that is none", 'pk.plots.loss(finished, against="hours")', InputError, "against is 'hours'"),
]
SECTIONS = {
    "Training: numbers and words": NUMBERS,
    "Training: data": DATA,
    "Training: models, losses, optimizers": MODELS,
    "Evaluating": EVALUATION,
    "Connecting": CONNECTIONS,
    "Pools": POOLS,
    "Runs": RUNS,
    "Checkpoints": CHECKPOINTS,
    "Panels and pictures": ROOMS,
}
AT_THE_CALL = [*NUMBERS, *DATA, *MODELS]
CASES = [case for section in SECTIONS.values() for case in section]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A notebook in a folder of its own, with a finished run, a paused one, and a few files."""
    with pytest.MonkeyPatch.context() as patch, pk.connect("inline") as workers, pk.connect("inline") as busy:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        with pk.connect("inline") as closed:
            pass
        model, data, lock = net(), (X, Y), threading.Lock()
        how = {"batch_size": 8, "steps": 4, "checkpoint": "saved"}
        finished = pk.train(model, data, on=workers, **how).wait(progress=False)
        paused = pk.train(model, data, on=busy, steps=1_000_000, batch_size=8, checkpoint="kept")
        paused.pause()
        wait_for(paused, lambda: paused.status == "paused")
        Path("notes.txt").write_text("to do")
        Path("damaged").mkdir()
        Path("damaged/step-000000000004.parakit").write_bytes(b"parakit checkpoint 1\n")
        yield globals() | locals()


_seen: dict[str, tuple[type[Exception], str]] = {}


def raised(case: Case, scene: dict[str, Any]) -> tuple[type[Exception], str]:
    """The error that a person sees who types it, and its message; typed once, and the pool is good for another run."""
    if case.typed not in _seen:
        with warnings.catch_warnings(), pk.connect("inline") as workers:
            warnings.simplefilter("ignore", RuntimeWarning)  # of damaged checkpoints that are passed over
            with pytest.raises(ParakitError) as caught:
                eval(case.typed, scene | {"model": net(), "workers": workers})
            again = pk.train(net(), (X, Y), on=workers, steps=1)
            assert again.wait(20, progress=False).status == "finished"
        _seen[case.typed] = type(caught.value), str(caught.value)
    return _seen[case.typed]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.done)
def test_a_mistake_is_told_in_words_and_changes_nothing(scene: dict[str, Any], case: Case) -> None:
    error, told = raised(case, scene)
    assert issubclass(error, case.kind)
    assert case.words in told
    assert len(told.splitlines()) <= 5
    assert max(map(len, told.splitlines())) <= 400
    assert re.search("Remedy: .|it must be ", told), "what is one to do?"
    assert issubclass(error, ValueError | RuntimeError | TimeoutError)
    assert scene["paused"].status == "paused"
    assert not list(Path().glob("new/*"))


@pytest.mark.dask
def test_a_dask_pool_stays_usable_after_every_refusal(pool: pk.Workers, scene: dict[str, Any]) -> None:
    for case in AT_THE_CALL:
        with pytest.raises(case.kind):
            eval(case.typed, scene | {"workers": pool, "model": net()})
    assert pk.train(net(), (X, Y), on=pool, steps=2).wait(30, progress=False).status == "finished"


@pytest.mark.parametrize("kept", ["dict", "object"])
@pytest.mark.parametrize("more", ["workers=1", "workers=3, batch_size=24", "workers=2, check=False", "gather=True"])
def test_an_optimizer_of_the_losss_own_is_found_in_what_it_keeps(kept: str, more: str, scene: dict[str, Any]) -> None:
    with pytest.raises(
        LossError, match=r"The loss steps an optimizer .* in its attribute adversary.<locals>.loss: hol"
    ):
        eval(train(f"loss=adversary(kept={kept!r}), {more}"), scene)


def test_what_cannot_be_called_twice_is_told_with_its_line(scene: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="The model and its loss cannot be called twice: RuntimeError: ") as caught:
        eval(train(model="FailsOnceMore()"), scene)
    assert "inputs = inputs @ self.last" in str(caught.value)
    assert "Likely cause: what the first call leaves in last" in str(caught.value)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_what_draws_is_no_seed_whatever_the_notebooks_own(seed: int, scene: dict[str, Any]) -> None:
    noisy = Noisy()
    with undisturbed(CPU):
        torch.manual_seed(seed)
        typed = train("steps=2, workers=2, batch_size=16", model="noisy", end=".wait(20, progress=False)")
        eval(typed, scene | {"noisy": noisy})


def test_connecting_in_vain_leaves_nothing_behind(nothing_left: None) -> None:
    for case in CONNECTIONS:
        with pytest.raises(case.kind):
            eval(case.typed, globals())


@pytest.mark.parametrize(
    "typed",
    [
        train("workers=np.int64(2), batch_size=np.int32(8), steps=np.int64(3), seed=np.uint8(1)", end=".wait()"),
        train("learning_rate=np.float32(0.1), clip_norm=torch.tensor(1.0), limit_seconds=10**300", end=".wait()"),
        train("seed=2**64, chunks=10**30, limit_seconds=float('inf')", end=".wait()"),
        train("checkpoint=Path('path'), checkpoint_keep=np.int64(1), checkpoint_seconds=np.float64(1)", end=".wait()"),
        train("resume=Path('saved'), batch_size=8, steps=np.int64(6)", end=".wait()"),
        train("workers=2, batch_size=16", model="SeededForAll()", end=".wait()"),
        train("workers=2, batch_size=16", model="FitsWithin()", end=".wait()"),
        train(
            "steps=2, scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1))", end=".wait()"
        ),
        train("optimizer=torch.optim.SGD, strategy=None", data="(X.numpy(), Y.numpy().astype('uint8'))", end=".wait()"),
        "pk.panel(model, data, on=workers, epochs=np.int64(2), batch_size=np.int64(8), baselines=False).close()",
    ],
)
def test_what_is_only_unusual_works(scene: dict[str, Any], typed: str) -> None:
    eval(typed, scene)


# --- the table

HEAD = """# What one sees after a mistake

Every row was typed, and what was raised then is shown. The first sentence of a message is the fact; below it come a
likely cause and a remedy. All errors derive from `parakit.ParakitError`, and also from `ValueError`, `RuntimeError` or
`TimeoutError`. A mistake in a call starts nothing: the pool is free for the next one.

Below, `model` is `nn.Linear(4, 3)` and `data` is `(X, Y)`, 40 rows of 4 numbers with labels 0 to 2; `workers` is
`pk.connect("inline")`; `finished` and `paused` are runs. Numbers that depend on the machine or the moment are examples.

`PARAKIT_UPDATE=1 python -m pytest tests/test_bad_input.py` writes this file.
"""
EXAMPLES = (  # for what differs between machines and moments
    (r"0x[0-9a-f]{6,}", "0x7f0000000000"),
    (r"\brun [0-9a-f]{8}\b", "run 1a2b3c4d"),
    (r"at step [\d,]+ of 1000000", "at step 12 of 1000000"),
    (r"at step \d+; there", "at step 12; there"),
    (r"has \d+ MB of memory", "has 16000 MB of memory"),
    (r"this machine has \d+$", "this machine has 4"),
    (r"(after step|state of step) \d+", r"\1 3"),
)
# What other libraries and Python say in their next version is theirs to choose, and so is the last digit of a number.
THEIRS = re.compile(
    r"(?<=Error: )[^|]*?(?=<br>| \|)|(?<=answers at )[^|]*?(?=<br>)|(?<=a tensor: )[^|]*?(?=<br>)|-?\d+\.\d\d+"
)


def cell(text: str) -> str:
    for pattern, example in EXAMPLES:
        text = re.sub(pattern, example, text, flags=re.MULTILINE)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")
    return "<br>".join(text.splitlines())


def table(scene: dict[str, Any]) -> str:
    """The file, from what is raised."""
    lines = [HEAD]
    for title, cases in SECTIONS.items():
        lines += [f"## {title}", "", "| what is done | what is typed | what the user sees |", "|---|---|---|"]
        for case in cases:
            error, told = raised(case, scene)
            lines.append(f"| {case.done} | `{case.typed}` | `{error.__name__}`: {cell(told)} |")
        lines.append("")
    return "\n".join(lines)


def test_the_table_shows_what_is_raised(scene: dict[str, Any]) -> None:
    made = table(scene)
    assert str(Path.cwd()) not in made
    if os.environ.get("PARAKIT_UPDATE") == "1":
        TABLE.write_text(made, encoding="utf-8")
        pytest.fail(f"{TABLE.name} was written anew; look at what changed, and keep it")
    kept = TABLE.read_text(encoding="utf-8")
    for mine, theirs in zip(made.splitlines(), kept.splitlines(), strict=True):
        assert THEIRS.sub("...", mine) == THEIRS.sub("...", theirs), "PARAKIT_UPDATE=1 writes the table anew"
