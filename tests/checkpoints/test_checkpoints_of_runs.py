"""Checkpoints of real runs: saved while they train, loaded by others, and never lost with the process."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parakit as pk
from parakit.checkpoints import Checkpoints, load
from parakit.errors import CheckpointError, InputError
from parakit.events.records import EpochEnded, Said
from tests.runs.test_exact import wait_for

LIMIT = 60
DIGITS = pk.datasets.digits()
STEPS = 60


def net(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10)).double()


class Doubles(torch.utils.data.TensorDataset):
    """The digits in double precision, in which two ways of adding agree to many digits."""

    def __init__(self) -> None:
        super().__init__(DIGITS.train.pixels.double(), DIGITS.train.labels)


def train(on: pk.Workers, **how: Any) -> pk.Run:
    how = {
        "steps": STEPS, "batch_size": 200, "optimizer": partial(torch.optim.AdamW, lr=0.01),
        "scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4), "clip_norm": 1.0,
        "validation": (DIGITS.test.pixels.double(), DIGITS.test.labels), "model": net(),
    } | how  # fmt: skip
    return pk.train(how.pop("model"), how.pop("data", Doubles()), on=on, **how)


@pytest.fixture(scope="module")
def whole() -> pk.Run:
    """The run from its beginning to its end in one piece."""
    with pk.connect("inline") as workers:
        return train(workers).wait(LIMIT, progress=False)


def assert_continues(parts: list[pk.Run], whole: pk.Run) -> None:
    losses = [loss for part in parts for loss in part.history.losses]
    assert losses == pytest.approx(whole.history.losses.tolist(), abs=1e-9)
    for mine, other in zip(parts[-1].model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)
    ends = [(e.epoch, e.validation_accuracy) for part in parts for e in part.history.of(EpochEnded)]
    assert ends == [(e.epoch, e.validation_accuracy) for e in whole.history.of(EpochEnded)]
    rates = [step.learning_rate for part in parts for step in part.history.steps]
    assert rates == [step.learning_rate for step in whole.history.steps]


def test_a_run_in_three_pieces_equals_the_whole_also_over_other_workers(
    inline: pk.Workers, tmp_path: Path, whole: pk.Run
) -> None:
    first = train(inline, workers=2, steps=17, checkpoint=tmp_path).wait(LIMIT, progress=False)
    second = train(inline, workers=5, steps=41, checkpoint=tmp_path, resume=tmp_path).wait(LIMIT, progress=False)
    third = train(inline, strategy=pk.strategies.MapReduce(), resume=str(tmp_path)).wait(LIMIT, progress=False)
    assert [part.history.steps[0].step for part in (first, second, third)] == [0, 17, 41]
    assert_continues([first, second, third], whole)
    assert "Going on from step 41: step-000000000041.parakit" in [said.text for said in third.history.of(Said)]


@pytest.mark.dask
def test_another_kind_of_pool_goes_on(pool: pk.Workers, inline: pk.Workers, tmp_path: Path, whole: pk.Run) -> None:
    first = train(pool, workers=3, steps=25, checkpoint=tmp_path).wait(LIMIT, progress=False)
    second = train(pool, workers=2, steps=40, strategy=pk.strategies.MapReduce(), resume=tmp_path, checkpoint=tmp_path)
    second.wait(LIMIT, progress=False)
    third = train(inline, resume=tmp_path).wait(LIMIT, progress=False)
    assert_continues([first, second, third], whole)


def test_a_stopped_run_saves_where_it_stopped_and_a_few_are_kept(inline: pk.Workers, tmp_path: Path) -> None:
    run = train(inline, steps=1_000_000, checkpoint=tmp_path, checkpoint_seconds=0.1, checkpoint_keep=2)
    wait_for(run, lambda: len(Checkpoints(tmp_path).steps()) == 2)
    older = Checkpoints(tmp_path).steps()[-1]
    wait_for(run, lambda: Checkpoints(tmp_path).steps()[-1] > older)
    run.stop()
    run.wait(LIMIT, progress=False)
    assert load(tmp_path).step == run.step
    assert len(Checkpoints(tmp_path).steps()) == 2


def test_a_failed_run_saves_its_last_state(inline: pk.Workers, tmp_path: Path) -> None:
    def late(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and time.monotonic() > deadline:
            raise RuntimeError("no more")
        return nn.functional.cross_entropy(out, labels)

    deadline = time.monotonic() + 2
    run = train(inline, steps=1_000_000, loss=late, validation=None, checkpoint=tmp_path)
    with pytest.raises(pk.errors.RunFailed, match="no more"):
        run.wait(LIMIT, progress=False)
    assert load(tmp_path).step == run.step == run.model_step > 0


def test_a_folder_that_disappears_is_told_and_training_goes_on(inline: pk.Workers, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run = train(inline, steps=1_000_000, checkpoint=folder, checkpoint_seconds=0.1)
    wait_for(run, lambda: folder.exists() and any(folder.iterdir()))
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
    folder.rmdir()
    folder.write_text("in the way")
    wait_for(run, lambda: any("could not be written" in said.text for said in run.history.of(Said)))
    seen = run.step
    wait_for(run, lambda: run.step > seen)
    run.stop()
    run.wait(LIMIT, progress=False)
    assert run.status == "finished"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": net(48)}, r"parameter 0.weight is (48, 64) here, (32, 64) in the checkpoint"),
    "single": ({"model": net().float(), "data": DIGITS.train, "validation": None}, "float32 here, float64 in the"),
    "optimizer": ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "the optimizer is SGD here, AdamW in"),
    "scheduler": ({"scheduler": None}, "the scheduler is none here, CosineAnnealingLR in the checkpoint"),
    "batch": ({"batch_size": 100}, "batch_size is 100 here, 200 in the checkpoint"),
    "seed": ({"seed": 4}, "seed is 4 here, 0 in the checkpoint"),
    "data": ({"data": (DIGITS.train.pixels.double() + 1, DIGITS.train.labels)}, "data is"),
    "fewer": ({"data": (DIGITS.train.pixels[:400].double(), DIGITS.train.labels[:400])}, "samples is 400 here, 1437"),
    "clip": ({"clip_norm": None}, "clip_norm is none here, 1.0 in the checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(
    inline: pk.Workers, tmp_path_factory: pytest.TempPathFactory, what: str
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    train(inline, steps=3, checkpoint=folder).wait(LIMIT, progress=False)
    how, words = REFUSED[what]
    with pytest.raises(CheckpointError) as caught:
        train(inline, resume=folder, **how)
    assert words in str(caught.value)


def test_a_checkpoint_of_another_order_of_rows_is_refused(
    inline: pk.Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr("parakit.runs.identity.ORDER", 1)
        train(inline, steps=3, checkpoint=tmp_path).wait(LIMIT, progress=False)
    with pytest.raises(CheckpointError, match="order of rows is 2 here, 1 in the checkpoint"):
        train(inline, resume=tmp_path)


def test_a_state_that_is_not_plain_is_refused_at_the_call(inline: pk.Workers, tmp_path: Path) -> None:
    class Odd(torch.optim.lr_scheduler.StepLR):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "shapes": [lambda: 1]}

    with pytest.raises(CheckpointError, match=r"scheduler.shapes\[0\]"):
        train(inline, scheduler=lambda o: Odd(o, 3), checkpoint=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        train(inline, checkpoint=tmp_path / "file")


# --- the notebook's process is killed

# Forks a child a round, so that PyTorch is imported once; the child trains and saves, and says what it has done.
ROUNDS = """
import os, pathlib, sys, time, torch, signal
torch.set_num_threads(1)
import parakit as pk
import parakit.workers.dask.preload
from tests.checkpoints.test_checkpoints_of_runs import saved_in, train
folder, every = sys.argv[1], float(sys.argv[2])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        with pk.connect("inline", threads=1) as workers:
            run = train(workers, steps=10**6, validation=None, checkpoint=folder, checkpoint_seconds=every,
                        resume=folder if saved_in(pathlib.Path(folder)) else None)
            while True:
                os.write(1, f"{time.monotonic()} {run.step}\\n".encode())
                time.sleep(0.01)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.write(1, f"killed {time.monotonic()}\\n".encode())
"""


def saved_in(folder: Path) -> bool:
    """Whether there is a checkpoint: a writer that was killed during its first one leaves only a temporary file."""
    return any(folder.glob("step-*.parakit"))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(240)
def test_after_50_kills_there_is_always_a_checkpoint_as_young_as_promised(tmp_path: Path, inline: pk.Workers) -> None:
    every, slack = 0.1, 0.75  # seconds; a segment, and what a machine with other work to do may take to write
    folder, chance = tmp_path / "saved", random.Random(0)
    folder.mkdir()
    loaded = []
    with subprocess.Popen(
        [sys.executable, "-c", ROUNDS, str(folder), str(every)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, bufsize=1, cwd=Path(__file__).parents[2],
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(50):
            process.stdin.write(f"{chance.uniform(0.1, 0.45)}\n")
            seen: list[tuple[float, int]] = []
            while not (line := process.stdout.readline()).startswith("killed"):
                at, step = line.split()
                seen.append((float(at), int(step)))
            killed = float(line.split()[1])
            found = load(folder).step if saved_in(folder) else 0
            promised = max((step for at, step in seen if at < killed - every - slack), default=0)
            assert found >= promised, (found, promised)
            loaded.append(found)
        process.stdin.close()
        assert process.wait(30) == 0
    assert loaded == sorted(loaded)
    assert loaded[-1] > 50
    rest = train(inline, steps=loaded[-1] + 3, validation=None, resume=folder).wait(LIMIT, progress=False)
    assert [step.step for step in rest.history.steps] == [loaded[-1] + n for n in range(3)]
    assert json.dumps(rest.plan.identity)
