"""A source that workers load from disk by themselves: one class in this file, and nothing of parakit knows it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parakit as pk
from parakit.data.samples import Samples
from parakit.data.source import Source, probed_rows
from parakit.errors import CheckpointError, DataError, RunFailed
from parakit.events import EpochEnded, Resized
from tests.runs.test_exact import wait_for

ROWS, WIDTH, CLASSES, PART = 2400, 6, 3, 100
STEPS, BATCH = 12, 48
EXACT = 1e-9


@dataclass(frozen=True)
class Parts:
    """Files of a hundred rows each; rows are read where they lie, and who read them is noted beside them."""

    folder: str
    loaded_by: Literal["notebook", "worker"] = "worker"

    def fingerprint(self) -> str:
        return "-".join(f"{path.name}:{path.stat().st_size}" for path in sorted(Path(self.folder).glob("*.npz")))

    def __len__(self) -> int:
        return ROWS

    def take(self, rows: Any) -> Samples:
        wanted = np.asarray(rows)
        inputs, targets = np.empty((len(wanted), WIDTH)), np.empty(len(wanted), np.int64)
        for part in np.unique(wanted // PART):
            with np.load(Path(self.folder) / f"{part:03}.npz") as file:
                here = wanted // PART == part
                inputs[here], targets[here] = file["x"][wanted[here] % PART], file["y"][wanted[here] % PART]
        with (Path(self.folder) / "readers").open("a") as log:
            log.write(json.dumps([os.getpid(), len(wanted)]) + "\n")
        return Samples(torch.from_numpy(inputs), torch.from_numpy(targets))

    def rows_read(self) -> Counter[int]:
        """Rows that each process has read."""
        log = Path(self.folder) / "readers"
        read: Counter[int] = Counter()
        for line in log.read_text().splitlines() if log.exists() else ():
            pid, rows = json.loads(line)
            read[pid] += rows
        return read


def everything() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return inputs, inputs[:, :CLASSES].argmax(1)


def written(folder: Path, targets: Tensor | None = None, loaded_by: Literal["notebook", "worker"] = "worker") -> Parts:
    inputs, right = everything()
    for first in range(0, ROWS, PART):
        rows = slice(first, first + PART)
        np.savez(folder / f"{first // PART:03}", x=inputs[rows], y=(right if targets is None else targets)[rows])
    return Parts(str(folder), loaded_by)


def trained(pool: pk.Workers, data: Any, **options: Any) -> pk.Run:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    options = {"batch_size": BATCH, "steps": STEPS, "seed": 1, "learning_rate": 0.2} | options
    return pk.train(model, data, on=pool, **options)


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """What comes of the same rows in memory."""
    with pk.connect("inline") as workers:
        return trained(workers, everything()).wait(30, progress=False).model


@pytest.fixture(scope="module")
def processes() -> Iterator[pk.Workers]:
    with pk.connect(3) as workers:
        yield workers


def test_it_is_a_source_and_tensors_are_none(tmp_path: Path) -> None:
    assert isinstance(written(tmp_path), Source)
    assert not isinstance(everything(), Source)


def test_inline_workers_train_as_with_rows_in_memory(tmp_path: Path, plain: nn.Module) -> None:
    with pk.connect("inline") as workers:
        run = trained(workers, written(tmp_path), workers=3).wait(30, progress=False)
    assert largest_difference(run.model, plain) < EXACT


@pytest.mark.parametrize("loaded_by", ["notebook", "worker"])
def test_labels_out_of_range_are_found_where_rows_are_read(
    tmp_path: Path, loaded_by: Literal["notebook", "worker"]
) -> None:
    targets = everything()[1]
    source = written(tmp_path)
    tried = set(probed_rows(source).tolist())
    row = max(set(range(ROWS)) - tried)
    targets[row] = CLASSES + 4
    with pk.connect("inline") as workers, pytest.raises(RunFailed, match=f"label {CLASSES + 4} at row {row}, but"):
        trained(workers, written(tmp_path, targets, loaded_by)).wait(30, progress=False)
    targets[row], targets[max(tried)] = 0, -3
    with pk.connect("inline") as workers, pytest.raises(DataError, match=f"label -3 at row {max(tried)}, but"):
        trained(workers, written(tmp_path, targets, loaded_by))


@pytest.mark.dask
def test_each_worker_reads_its_own_chunks_and_the_notebook_only_some_rows(
    tmp_path: Path, processes: pk.Workers, plain: nn.Module
) -> None:
    source = written(tmp_path)
    run = trained(processes, source, workers=2).wait(60, progress=False)
    read = source.rows_read()
    assert sum(rows for pid, rows in read.items() if pid != os.getpid()) == ROWS
    assert len(read) == 3
    assert read[os.getpid()] < ROWS / 2
    assert largest_difference(run.model, plain) < EXACT


@pytest.mark.dask
def test_held_out_rows_are_read_by_workers_too(tmp_path: Path, processes: pk.Workers) -> None:
    for name in ("train", "held out"):
        (tmp_path / name).mkdir()
    held_out = written(tmp_path / "held out")
    run = trained(processes, everything(), workers=2, validation=held_out, steps=ROWS // BATCH).wait(60, progress=False)
    (epoch,) = run.history.of(EpochEnded)
    known = nn.functional.cross_entropy(run.model(everything()[0]), everything()[1])
    assert epoch.validation_loss == pytest.approx(float(known.detach()), abs=EXACT)
    read = held_out.rows_read()
    assert sum(rows for pid, rows in read.items() if pid != os.getpid()) == ROWS


@pytest.mark.dask
def test_newcomers_read_what_they_take_over(tmp_path: Path, processes: pk.Workers) -> None:
    source = written(tmp_path)
    with pk.connect("inline") as inline:
        known = trained(inline, everything(), steps=400).wait(60, progress=False).model
    run = trained(processes, source, workers=1, steps=400)
    wait_for(run, lambda: run.step > 20)
    run.resize(3)
    run.wait(60, progress=False)
    assert any(len(event.workers) == 3 for event in run.history.of(Resized))
    assert largest_difference(run.model, known) < EXACT


def test_a_checkpoint_is_of_the_files_that_it_was_trained_on(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = written(tmp_path / "one"), written(tmp_path / "other")
    with (tmp_path / "other" / "000.npz").open("ab") as file:
        file.write(b" ")  # as large as no file of the other
    with pk.connect("inline") as workers:
        trained(workers, one, checkpoint=tmp_path / "saved").wait(30, progress=False)
        with pytest.raises(CheckpointError, match="data"):
            trained(workers, other, steps=STEPS + 2, resume=tmp_path / "saved")
        run = trained(workers, one, steps=STEPS + 2, resume=tmp_path / "saved").wait(30, progress=False)
    assert [step.step for step in run.history.steps] == [STEPS, STEPS + 1]
