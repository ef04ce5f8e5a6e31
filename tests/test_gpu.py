"""Workers on GPUs: what differs from cores. What does not is `tests/runs/test_exact.py`, which runs there too.

python -m pytest --device cuda tests/runs/test_exact.py tests/test_gpu.py
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import parakit as pk
from parakit.events.records import Baseline, Recovered, Resized, RunStart
from parakit.system.devices import gpus_here
from tests.runs.test_exact import (
    BATCH,
    CHUNKS,
    LIMIT,
    OPTIMIZERS,
    SEED,
    Slowed,
    assert_same,
    expected,
    problem,
    trained,
    wait_for,
)
from tests.serial import batches, train_serially

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
STRATEGIES = [pk.strategies.AllReduce(), pk.strategies.MapReduce()]


@pytest.fixture(scope="module")
def gpu_pool() -> Iterator[pk.Workers]:
    with pk.connect(2, device="cuda", most=3) as workers:
        yield workers


class Watched(nn.Module):
    """Refuses to compute on cores, but for the trial in the notebook's process."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.here = os.getpid()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert inputs.is_cuda or os.getpid() == self.here, "rows are on cores"
        assert next(self.parameters()).is_cuda or os.getpid() == self.here, "parameters are on cores"
        return self.model(inputs)


@pytest.mark.dask
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_workers_compute_on_the_gpu(gpu_pool: pk.Workers, strategy: Any) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double()), "optimizer": OPTIMIZERS["adamw"]}
    run = trained(Watched(model), (inputs, targets), gpu_pool, strategy=strategy, validation=(inputs, targets), **how)
    losses, final = expected(model, inputs, targets, **how)
    assert_same(run, losses, final)
    assert not any(p.is_cuda for p in run.model.parameters())
    start, formed = run.history.latest(RunStart), run.history.latest(Resized)
    assert start is not None
    assert formed is not None
    assert (start.device, start.cores) == ("cuda", len(gpus_here()))
    assert formed.exchange == ("gloo" if strategy.runs_on == "workers" else "tasks")


@pytest.mark.dask
def test_a_model_that_is_on_the_gpu_already_is_trained_there_or_on_cores(
    gpu_pool: pk.Workers, inline: pk.Workers
) -> None:
    model, inputs, targets = problem()
    there = nn.Sequential(*model).cuda()
    how = {"optimizer": OPTIMIZERS["sgd"]}
    first = trained(there, (inputs.cuda(), targets.cuda()), gpu_pool, **how)
    second = trained(there, (inputs, targets), inline, **how)
    assert np.abs(first.history.losses - second.history.losses).max() <= 1e-9


@pytest.mark.dask
def test_a_killed_worker_costs_nothing_that_was_committed(gpu_pool: pk.Workers) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS["sgd"]}
    slow = Slowed(model)
    run = pk.train(slow, (inputs, targets), on=gpu_pool, batch_size=BATCH, chunks=CHUNKS, seed=SEED, steps=400, **how)
    wait_for(run, lambda: run.step > 60)
    os.kill(list(gpu_pool.pids.values())[1], signal.SIGKILL)
    run.wait(LIMIT, progress=False)
    assert run.status == "finished", run.error
    assert run.history.of(Recovered)
    order = batches(len(inputs), CHUNKS, BATCH, SEED, 400)
    losses, final = train_serially(model, inputs, targets, order, **how)
    assert [s.step for s in run.history.steps] == list(range(400))
    assert_same(run, losses, nn.Sequential(final))


@pytest.mark.dask
def test_a_pool_on_gpus_grows(gpu_pool: pk.Workers) -> None:
    model, inputs, targets = problem()
    run = pk.train(
        Slowed(model), (inputs, targets), on=gpu_pool, workers=1, batch_size=BATCH, chunks=CHUNKS, steps=10**6
    )
    try:
        wait_for(run, lambda: run.step > 5)
        run.resize(3)
        wait_for(run, lambda: run.world_size == 3)
    finally:
        run.stop()
    run.wait(LIMIT, progress=False)
    assert run.status == "finished", run.error


@pytest.mark.dask
def test_a_checkpoint_of_a_gpu_goes_on_on_cores(gpu_pool: pk.Workers, tmp_path: Path) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS["adamw"]}
    trained(model, (inputs, targets), gpu_pool, steps=7, checkpoint=tmp_path, **how)
    with pk.connect("inline") as cores:
        run = trained(model, (inputs, targets), cores, resume=tmp_path, **how)
    losses, final = expected(model, inputs, targets, **how)
    assert np.abs(run.history.losses[-5:] - losses[-5:]).max() <= 1e-9
    for ours, theirs in zip(run.model.parameters(), final.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.dask
def test_an_evaluation_and_the_rival_are_on_the_gpu_too(gpu_pool: pk.Workers) -> None:
    model, inputs, targets = problem()
    found = pk.evaluate(Watched(model), (inputs, targets), on=gpu_pool)
    loss = nn.functional.cross_entropy(model(inputs), targets).item()
    assert abs(found.loss - loss) < 1e-9
    run = pk.train(Watched(Slowed(model)), (inputs, targets), on=gpu_pool, batch_size=BATCH, steps=10**6)
    try:
        wait_for(run, lambda: run.step > 5)
        run.measure_baseline()
        wait_for(run, lambda: run.history.latest(Baseline) is not None)
    finally:
        run.stop()
    run.wait(LIMIT, progress=False)
    baseline = run.history.latest(Baseline)
    assert baseline is not None
    assert (baseline.device, baseline.cores) == ("cuda", 1)


@pytest.mark.dask
def test_dropout_draws_the_same_again(gpu_pool: pk.Workers) -> None:
    model, inputs, targets = problem()
    dropping = nn.Sequential(nn.Dropout(0.3), model)
    first, again = (trained(dropping, (inputs, targets), gpu_pool) for _ in range(2))
    assert first.history.losses.tolist() == again.history.losses.tolist()
    other = trained(dropping, (inputs, targets), gpu_pool, seed=SEED + 1)
    assert first.history.losses.tolist() != other.history.losses.tolist()


def test_inline_workers_leave_the_random_numbers_of_the_gpu_alone() -> None:
    model, inputs, targets = problem()
    with pk.connect("inline", device="cuda") as workers:
        torch.cuda.manual_seed(3)
        before = torch.cuda.get_rng_state()
        trained(nn.Sequential(nn.Dropout(0.3), Watched(model)), (inputs, targets), workers, workers=2)
        assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.dask
def test_memory_of_a_run_is_given_back(gpu_pool: pk.Workers) -> None:
    wide = nn.Linear(6, 4_000_000).double()  # 224 MB, and as much for the gradient
    _, inputs, _ = problem()
    free = torch.cuda.mem_get_info()[0]
    run = pk.train(
        wide, (inputs[:4], torch.zeros(4).double()), on=gpu_pool, workers=2, batch_size=4, steps=4,
        loss=mean_of, optimizer=partial(torch.optim.SGD, lr=0.0),
    )  # fmt: skip
    run.wait(LIMIT, progress=False)
    assert run.status == "finished", run.error
    deadline = time.monotonic() + 20
    while torch.cuda.mem_get_info()[0] < free - (200 << 20):
        assert time.monotonic() < deadline, "the GPU's memory is still held"
        time.sleep(0.1)


def mean_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.view(len(target), -1).mean(1).square().mean()
