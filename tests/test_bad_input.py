"""Bad input: a clear error at the call, in words, with nothing started."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import parakit as pk
from parakit.errors import (
    ConnectError,
    DataError,
    InputError,
    LossError,
    ModelError,
    ParakitError,
    PoolError,
    WorkerCountError,
)

X, Y = torch.randn(40, 4), torch.arange(40) % 3


def net(outputs: int = 3) -> nn.Module:
    return nn.Linear(4, outputs)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = net()
        self.lock = threading.Lock()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


class LockedButCopies(Locked):
    def __deepcopy__(self, memo: Any) -> LockedButCopies:
        return LockedButCopies()


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [net()]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers[0](inputs)


class LossWithParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output * self.scale, target)


def pairwise(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output[:, None] - output[None]).square().mean()


def frozen() -> nn.Module:
    return net().requires_grad_(False)


OTHER = net()
LOCK = threading.Lock()
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "zero workers": ({"workers": 0}, WorkerCountError, "0; it must be a whole number of at least 1"),
    "negative workers": ({"workers": -1}, WorkerCountError, "-1; it must be"),
    "workers as text": ({"workers": "2"}, WorkerCountError, "'2'"),
    "too many workers": ({"workers": 99}, WorkerCountError, "99 workers were asked for"),
    "empty data": ({"data": (X[:0], Y[:0])}, DataError, "empty: 0 samples"),
    "unequal lengths": ({"data": (X, Y[:39])}, DataError, "40 rows of inputs but 39 rows of targets"),
    "unequal inputs": ({"data": ((X, X[:10]), Y)}, DataError, "10 and 40 rows of inputs"),
    "one tensor": ({"data": X}, DataError, "parakit cannot read"),
    "three parts": ({"data": (X, X, Y)}, DataError, "3 parts where 2 are needed"),
    "three tensors": ({"data": TensorDataset(X, X, Y)}, DataError, "3 tensors where 2 are needed"),
    "a loader": ({"data": DataLoader(TensorDataset(X, Y))}, DataError, "DataLoader"),
    "a stream": ({"data": Stream()}, DataError, "Stream"),
    "no data": ({"data": None}, DataError, "NoneType"),
    "text": ({"data": (np.array(["a"] * 40), Y)}, DataError, "cannot be a tensor"),
    "validation empty": ({"validation": (X[:0], Y[:0])}, DataError, "validation is empty"),
    "validation label": ({"validation": (X, Y + 1)}, DataError, "validation has the label 3"),
    "batch too large": ({"batch_size": 41}, DataError, "batch of 41 is larger than the data, which has 40"),
    "batch of zero": ({"batch_size": 0}, InputError, "batch_size is 0"),
    "half a batch": ({"batch_size": 2.5}, InputError, "batch_size is 2.5"),
    "no epochs": ({"epochs": 0}, InputError, "epochs is 0"),
    "negative steps": ({"steps": -3}, InputError, "steps is -3"),
    "epochs and steps": ({"epochs": 1, "steps": 1}, InputError, "both given"),
    "seed": ({"seed": "x"}, InputError, "seed is 'x'"),
    "no chunks": ({"chunks": 0}, InputError, "chunks is 0"),
    "clip norm": ({"clip_norm": -1.0}, InputError, "clip_norm is -1.0"),
    "limit": ({"limit_seconds": 0}, InputError, "limit_seconds is 0"),
    "schedule when": ({"scheduler_every": "week"}, InputError, "'week'"),
    "strategy class": ({"strategy": pk.strategies.AllReduce}, InputError, "give an instance"),
    "strategy text": ({"strategy": "all-reduce"}, InputError, "no step"),
    "pool": ({"on": 2}, InputError, "no pool of workers"),
    "no model": ({"model": None}, ModelError, "no torch.nn.Module"),
    "model class": ({"model": nn.Linear}, ModelError, "an instance, not a class"),
    "frozen model": ({"model": frozen()}, ModelError, "no trainable parameters"),
    "layers in a list": ({"model": InAList()}, ModelError, "no trainable parameters"),
    "complex model": ({"model": nn.Linear(4, 3, dtype=torch.complex64)}, ModelError, "complex parameters"),
    "model with a lock": ({"model": Locked()}, ModelError, "cannot be copied"),
    "model that cannot travel": ({"model": LockedButCopies()}, ModelError, "cannot be pickled"),
    "wrong width": ({"model": nn.Linear(5, 3)}, ModelError, "cannot compute a batch"),
    "float64 inputs": ({"data": (X.double(), Y)}, ModelError, "the inputs are float64"),
    "optimizer instance": ({"optimizer": torch.optim.SGD(OTHER.parameters())}, ModelError, "must be a function"),
    "optimizer text": ({"optimizer": "sgd"}, ModelError, "must be a function"),
    "optimizer returns": ({"optimizer": lambda p: p}, ModelError, "no torch.optim.Optimizer"),
    "optimizer raises": ({"optimizer": lambda p: 1 / 0}, ModelError, "ZeroDivisionError"),
    "foreign optimizer": ({"optimizer": lambda p: torch.optim.SGD(OTHER.parameters())}, ModelError, "other parameters"),
    "optimizer cannot travel": (
        {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1 if LOCK else 0.2)}, ModelError, "optimizer cannot be pickled",
    ),
    "scheduler on a metric": (
        {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, ModelError, "stepped without a metric",
    ),
    "loss class": ({"loss": nn.CrossEntropyLoss}, LossError, "cannot be called"),
    "loss per sample": ({"loss": nn.CrossEntropyLoss(reduction="none")}, LossError, "shape (8,)"),
    "loss that is a number": ({"loss": lambda o, t: 1.0}, LossError, "returned 1.0"),
    "loss without gradient": ({"loss": lambda o, t: o.detach().mean()}, LossError, "no gradient"),
    "loss with parameters": ({"loss": LossWithParameters()}, LossError, "trainable parameters of its own"),
    "loss that compares samples": ({"loss": pairwise}, LossError, "neither a mean nor a sum"),
    "hidden class weights": (
        {"loss": partial(F.cross_entropy, weight=torch.tensor([1.0, 5.0, 9.0]))}, LossError, "neither a mean nor a sum",
    ),
    "hidden ignored label": ({"loss": partial(F.cross_entropy, ignore_index=1)}, LossError, "neither a mean"),
    "loss does not fit": ({"loss": nn.CrossEntropyLoss(), "data": (X, X[:, :2])}, LossError, "cannot be computed"),
    "label too large": ({"data": (X, Y + 1)}, DataError, "label 3 at row 2, but the model's output has 3 classes"),
    "label negative": ({"data": (X, Y - 1)}, DataError, "label -1 at row 0"),
}  # fmt: skip


def call(on: Any, given: dict[str, Any]) -> Any:
    how = {"model": net(), "data": (X, Y), "on": on, "batch_size": 8, "workers": 1} | given
    return pk.train(how.pop("model"), how.pop("data"), **how)


@pytest.mark.parametrize("name", CALLS)
def test_train_refuses_at_the_call(inline: pk.Workers, name: str) -> None:
    given, kind, words = CALLS[name]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        call(inline, given)
    assert isinstance(caught.value, ParakitError)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value).splitlines()) <= 5
    assert call(inline, {"steps": 1}).wait(20, progress=False).status == "finished"


@pytest.mark.dask
def test_a_dask_pool_stays_usable_after_every_refusal(pool: pk.Workers) -> None:
    for given, kind, _ in CALLS.values():
        with pytest.raises(kind):
            call(pool, given)
    assert call(pool, {"steps": 2, "workers": 2}).wait(30, progress=False).status == "finished"


CONNECTIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "zero": (lambda: pk.connect(0), WorkerCountError, "0; it must be"),
    "negative": (lambda: pk.connect(-4), WorkerCountError, "-4"),
    "truth": (lambda: pk.connect(True), WorkerCountError, "True"),
    "a list": (lambda: pk.connect([2]), InputError, "cannot reach workers through"),
    "a fraction": (lambda: pk.connect(1.5), InputError, "1.5"),
    "threads": (lambda: pk.connect(1, threads=0), InputError, "threads is 0"),
    "most": (lambda: pk.connect(3, most=2), InputError, "start with 3 workers and grow to at most 2"),
    "timeout": (lambda: pk.connect(1, timeout=-1), InputError, "timeout is -1"),
    "nobody there": (lambda: pk.connect("tcp://127.0.0.1:9", timeout=2), ConnectError, "No Dask scheduler answers"),
    "no address": (lambda: pk.connect("nonsense://x", timeout=2), ConnectError, "nonsense://x"),
}


@pytest.mark.parametrize("name", CONNECTIONS)
def test_connect_refuses(nothing_left: None, name: str) -> None:
    make, kind, words = CONNECTIONS[name]
    with pytest.raises(kind, match=re.escape(words)):
        make()


def test_a_closed_pool_is_refused() -> None:
    with pk.connect("inline") as workers:
        pass
    with pytest.raises(PoolError, match="closed"):
        call(workers, {})
    with pytest.raises(PoolError, match="closed"):
        pk.evaluate(net(), (X, Y), on=workers)


@pytest.mark.parametrize(
    ("model", "data", "kind"),
    [
        (net(), (X[:0], Y[:0]), DataError),
        (net(2), (X, Y), DataError),
        (nn.Linear(5, 3), (X, Y), ModelError),
        ("net", (X, Y), ModelError),
    ],
)
def test_evaluate_refuses_at_the_call(inline: pk.Workers, model: Any, data: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        pk.evaluate(model, data, on=inline)
