"""Checkpoints: bit for bit what was saved, whole whenever the writer dies, and nothing run in loading one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

from parakit.checkpoints import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    Saver,
    check_fits,
    check_plain,
    differences,
    folder,
    load,
)
from parakit.errors import InputError

IDENTITY = {
    "seed": 0,
    "batch_size": 128,
    "parameters": {"0.weight": [[10, 64], "float32"], "0.bias": [[10], "float32"]},
    "optimizer": "SGD",
    "scheduler": None,
    "torch": "2.13",
}


def state(step: int = 3, **others: Any) -> dict[str, Any]:
    weight = torch.full((3, 2), float(step))
    return {"step": step, "parameters": {"w": weight}, "buffers": {}, "optimizer": {}, "scheduler": None} | others


def same(one: Any, other: Any) -> bool:
    """Bit for bit, types included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def through(place: Any, **others: Any) -> dict[str, Any]:
    """A state that was saved and loaded."""
    Checkpoints(place).save(state(**others), IDENTITY)
    return load(place).state


@pytest.fixture(params=["folder", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        import fsspec

        url = f"memory://{uuid.uuid4().hex}/run"
        yield url
        fsspec.filesystem("memory").store.clear()
    else:
        yield f"file://{tmp_path / 'run'}" if request.param == "file" else str(tmp_path / "run")


# --- what is in a file


class Warmth:
    """A schedule that is an object with a state, as LambdaLR keeps it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 0.9**epoch


def sequential(o: Any) -> schedules.LRScheduler:
    parts = [schedules.LinearLR(o, total_iters=2), schedules.LambdaLR(o, lambda epoch: 0.5**epoch)]
    return schedules.SequentialLR(o, parts, milestones=[2])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-numpy-rate": lambda p: torch.optim.SGD(p, lr=np.float64(0.1), momentum=0.9),
    "sgd-tensor-rate": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
SCHEDULES: dict[str, Callable[[Any], schedules.LRScheduler]] = {
    "step": lambda o: schedules.StepLR(o, 2),
    "multistep": lambda o: schedules.MultiStepLR(o, [2, 3, 3]),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 10),
    "one-cycle": lambda o: schedules.OneCycleLR(o, 0.2, total_steps=20, cycle_momentum=False),
    "lambda": lambda o: schedules.LambdaLR(o, lambda epoch: 0.9**epoch),
    "lambda-object": lambda o: schedules.LambdaLR(o, Warmth()),
    "sequential": sequential,
    "linear": lambda o: schedules.LinearLR(o, total_iters=4),
    "chained": lambda o: schedules.ChainedScheduler([schedules.LinearLR(o), schedules.StepLR(o, 3)]),
}


class Trainee:
    """A model in training, whose state is as a worker's."""

    def __init__(self, optimizer: Callable[..., Any], schedule: Callable[..., Any]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.optimizer = optimizer(list(self.model.parameters()))
        self.schedule = schedule(self.optimizer)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(self.step))

            def loss(rows: Tensor = rows) -> Tensor:
                self.optimizer.zero_grad()
                value = (self.model(rows) - rows.sum(1, keepdim=True)).square().mean()
                value.backward()
                return value

            self.optimizer.step(loss)
            self.schedule.step()
            self.step += 1

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "parameters": dict(self.model.named_parameters()),
            "buffers": dict(self.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
        }

    def load(self, found: dict[str, Any]) -> None:
        self.model.load_state_dict(found["parameters"] | found["buffers"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.schedule.load_state_dict(found["scheduler"])
        self.step = found["step"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
# SequentialLR itself passes an epoch to the schedulers that it holds, which torch calls out of fashion.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_a_training_goes_on_bit_for_bit_from_its_checkpoint(tmp_path: Path, optimizer: str, schedule: str) -> None:
    kinds = OPTIMIZERS[optimizer], SCHEDULES[schedule]
    first = Trainee(*kinds)
    first.train(3)
    Checkpoints(tmp_path).save(first.state(), IDENTITY)
    found = load(tmp_path).state
    as_saved = {n: p.detach() for n, p in first.state()["parameters"].items()}
    assert same(found, first.state() | {"parameters": as_saved})

    second = Trainee(*kinds)
    second.load(found)
    first.train(3)
    second.train(3)
    assert same(second.state(), first.state())
    assert second.step == 6


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.bool,
     torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16],
    ids=str,
)  # fmt: skip
def test_tensors_of_every_dtype_and_layout_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (5 * 6 * dtype.itemsize,), dtype=torch.uint8)
    base = bits.view(dtype).reshape(5, 6)
    given = {"all": base, "turned": base.T, "some": base[1:4:2, ::3], "one": base[2, 3], "none": base[:0]}
    found = through(tmp_path, parameters=given)["parameters"]
    assert list(found) == list(given)
    for name, tensor in given.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*as_bytes)


def test_views_that_torch_negates_or_conjugates_lazily_are_saved_as_they_look(tmp_path: Path) -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    found = through(tmp_path, parameters={"conj": numbers.conj(), "neg": numbers.conj().imag})["parameters"]
    assert found["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert found["neg"].tolist() == [-2.0, 4.0]


def test_loaded_tensors_are_owned_and_can_be_written(tmp_path: Path) -> None:
    found = through(tmp_path, parameters={"a": torch.zeros(2), "b": torch.zeros(2)})["parameters"]
    found["a"] += 1
    assert found["b"].tolist() == [0, 0]
    assert found["a"].untyped_storage().nbytes() == 8


def test_plain_values_keep_their_types(tmp_path: Path) -> None:
    values = {
        "numbers": [0, -1, 2**70, 0.1, -0.0, math.inf, math.nan, True, None],
        "texts": ["", "für", "\ud800", "a\nb"],
        "tuple": (0.9, (1, [2])),
        "size": torch.Size([2, 3]),
        "counter": Counter({2: 1, 5: 2}),
        "ordered": OrderedDict(b=1, a=2),
        "numpy": [np.float64(0.1), np.float32(0.1), np.int64(3)],
        0: {(1, "x"): 1, 2.5: 2, None: 3, "tensor": 4, "dict": {}},
    }
    found = through(tmp_path, scheduler=values)["scheduler"]
    assert same(found, values)
    assert math.copysign(1, found["numbers"][4]) == -1


class Custom(schedules.LRScheduler):
    """A schedule whose state_dict, torch's own, holds a function."""

    def __init__(self, optimizer: Any) -> None:
        self.shapes = [lambda step: 1 / (1 + step)]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [rate * self.shapes[0](self.last_epoch) for rate in self.base_lrs]


def test_what_is_not_plain_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    custom = Custom(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)).state_dict()
    for wrong, where in (
        ({"scheduler": custom}, "scheduler.shapes[0] cannot be kept in a checkpoint: it is function"),
        ({"optimizer": {"state": {0: {"seen": {1, 2}}}}}, "optimizer.state[0].seen cannot"),
        ({"parameters": {"2.weight": np.zeros(3)}}, "parameters['2.weight'] cannot"),
        ({"buffers": {"mask": torch.eye(3).to_sparse()}}, "buffers.mask cannot"),
    ):
        with pytest.raises(CheckpointError) as caught:
            kept.save(state(**wrong), IDENTITY)
        assert str(caught.value).startswith(where)
        assert "Remedy:" in str(caught.value)
        with pytest.raises(CheckpointError, match="cannot be kept"):
            check_plain(state(**wrong))
    assert list(tmp_path.iterdir()) == []
    check_plain(state())


def test_an_identity_comes_back_and_fits_itself(tmp_path: Path) -> None:
    identity = IDENTITY | {"betas": (0.9, 0.99), "clip_norm": math.nan}
    Checkpoints(tmp_path).save(state(), identity)
    found = load(tmp_path)
    assert found.identity["parameters"] == IDENTITY["parameters"]
    assert found.identity["betas"] == [0.9, 0.99]
    check_fits(found.identity, identity)


# --- the folder


def test_the_newest_few_are_kept_and_read(place: str) -> None:
    kept = Checkpoints(place, keep=2)
    assert kept.newest() is None
    assert kept.steps() == []
    names = [kept.save(state(step), IDENTITY) for step in (5, 40, 300)]
    assert names[-1] == "step-000000000300.parakit"
    assert kept.steps() == [40, 300]
    newest = kept.newest()
    assert isinstance(newest, Checkpoint)
    assert (newest.step, newest.name, newest.damaged) == (300, names[-1], ())
    assert newest.state["parameters"]["w"].tolist() == [[300.0] * 2] * 3
    assert load(place).step == 300
    assert load(f"{place}/{names[1]}").step == 40
    assert load(f"{place}/{names[1]}").name == names[1]


def test_saving_a_step_again_replaces_it(place: str) -> None:
    kept = Checkpoints(place)
    kept.save(state(7), IDENTITY)
    kept.save(state(7, parameters={"w": torch.ones(1)}), IDENTITY)
    assert kept.steps() == [7]
    assert load(place).state["parameters"]["w"].tolist() == [1.0]


def test_what_is_saved_supersedes_later_steps_of_an_abandoned_run(place: str) -> None:
    for step in (100, 200, 300):
        Checkpoints(place).save(state(step), IDENTITY)
    new = Checkpoints(place)
    assert new.steps() == [100, 200, 300]  # nothing goes before there is something better
    new.save(state(150), IDENTITY | {"seed": 1})
    assert new.steps() == [100, 150]
    found = load(place)
    assert (found.step, found.identity["seed"]) == (150, 1)
    new.save(state(5), IDENTITY)
    assert new.steps() == [5]


def test_a_damaged_file_of_a_later_step_is_superseded_too(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    (tmp_path / "step-000000000009.parakit").write_bytes(b"")
    kept.save(state(4), IDENTITY)
    assert kept.steps() == [4]
    assert load(tmp_path).damaged == ()


def test_later_steps_stay_until_what_supersedes_them_is_in_place(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(place)
    kept.save(state(100), IDENTITY)

    def full(name: str, beside: str, parts: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kept._store, "write", full)
        with pytest.raises(CheckpointError, match="step 50 could not be written"):
            kept.save(state(50), IDENTITY)
    assert kept.steps() == [100]
    kept.save(state(50), IDENTITY)
    assert kept.steps() == [50]


def test_a_later_step_that_cannot_be_removed_is_told_by_its_name(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    (tmp_path / "step-000000000100.parakit").mkdir()
    with pytest.raises(CheckpointError, match=r"step-0+50\.parakit is in place, but step-0+100\.parakit cannot"):
        kept.save(state(50), IDENTITY)
    assert kept.steps() == [50, 100]


def test_steps_beyond_the_width_of_a_name_sort_by_number(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for step in (999_999_999_999, 1_000_000_000_000, 1_000_000_000_001):
        kept.save(state(step), IDENTITY)
    assert kept.steps() == [1_000_000_000_000, 1_000_000_000_001]


def test_other_files_of_the_folder_are_left_alone(place: str) -> None:
    kept = Checkpoints(place, keep=1)
    others = ["notes.txt", "step-1.parakit", "step-000000000001.parakit.bak", ".parakit-notes.tmp"]
    for name in others:
        kept._store.write(name, f"{name}.new", [b"mine"])
    kept.save(state(1), IDENTITY)
    kept.save(state(2), IDENTITY)
    assert sorted(kept._store.names()) == sorted([*others, "step-000000000002.parakit"])


def temporary(machine: str = folder._HERE, process: int | None = None, age_seconds: float = 0) -> str:
    began = int(time.time() - age_seconds)
    return f".parakit-{machine}-{os.getpid() if process is None else process}-{began}-{uuid.uuid4().hex[:8]}.tmp"


def test_what_dead_writers_left_goes_with_the_next_save(place: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = Checkpoints(place)
    dead = [temporary(process=gone.pid), temporary(), temporary("0" * 8, 1, age_seconds=90_000)]
    alive = [temporary(process=psutil.Process().ppid()), temporary("0" * 8, 1)]
    for name in dead + alive:
        kept._store.write(name, f"{name}.new", [b"half"])
    kept.save(state(1), IDENTITY)
    assert sorted(kept._store.names()) == sorted([*alive, "step-000000000001.parakit"])


def test_a_write_in_progress_in_this_process_is_no_left_over(tmp_path: Path) -> None:
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(write: Callable[..., None] = first._store.write) -> Callable[..., None]:
        def parts(given: list[Any]) -> Iterator[Any]:
            yield given[0]
            begun.set()
            assert go_on.wait(30)
            yield from given[1:]

        return lambda name, beside, given: write(name, beside, parts(given))

    first._store.write = slowly()  # type: ignore[method-assign]
    thread = threading.Thread(target=first.save, args=(state(2), IDENTITY))
    thread.start()
    assert begun.wait(30)
    second.save(state(1), IDENTITY)
    assert second.steps() == [1]
    go_on.set()
    thread.join()
    assert second.steps() == [1, 2]


@pytest.mark.parametrize("harm", ["empty", "cut", "flipped", "longer", "folder"])
def test_a_damaged_file_is_named_and_passed_over(tmp_path: Path, harm: str) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(state(1), IDENTITY)
    newest = tmp_path / kept.save(state(2), IDENTITY)
    whole = newest.read_bytes()
    middle = len(whole) // 2
    if harm == "folder":
        newest.unlink()
        newest.mkdir()
    else:
        flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
        newest.write_bytes({"empty": b"", "cut": whole[:-40], "flipped": flipped, "longer": whole + b"\0"}[harm])
        with pytest.raises(CheckpointError, match=newest.name):
            load(newest)
    with pytest.warns(RuntimeWarning, match=newest.name):
        found = kept.newest()
    assert found is not None
    assert (found.step, found.damaged) == (1, (newest.name,))
    assert found.state["parameters"]["w"].tolist() == [[1.0] * 2] * 3


def test_a_single_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / Checkpoints(tmp_path).save(state(1), {})
    whole = file.read_bytes()
    believed = []
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            load(file)
        except CheckpointError:
            continue
        believed.append(place)
    assert believed == []


def test_nothing_but_damaged_files_is_no_checkpoint(place: str) -> None:
    kept = Checkpoints(place)
    kept._store.write("step-000000000001.parakit", "x", [b"parakit checkpoint 1\n"])
    with pytest.warns(RuntimeWarning, match="passed over"):
        assert kept.newest() is None
    with (
        pytest.warns(RuntimeWarning, match="passed over"),
        pytest.raises(CheckpointError, match=r"no whole checkpoint(?s:.*)damaged: step-000000000001\.parakit"),
    ):
        load(place)


def test_a_file_that_is_pruned_while_one_looks_is_no_loss(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(state(1), IDENTITY)
    read = kept._store.read

    def read_late(name: str) -> bytes:
        if name == "step-000000000001.parakit":
            Checkpoints(tmp_path, keep=1).save(state(2), IDENTITY)
        return read(name)

    kept._store.read = read_late  # type: ignore[method-assign]
    found = kept.newest()
    assert found is not None
    assert (found.step, found.damaged) == (2, ())


def signed(header: Any, payload: bytes = b"", version: int = 1) -> bytes:
    """A file that is what it says, made by somebody else."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = b"parakit checkpoint %d\n" % version + struct.pack("<Q", len(text)) + text + payload
    return body + hashlib.sha256(body).digest()


def test_a_later_version_is_named_and_not_passed_over(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(state(1), IDENTITY)
    later = tmp_path / "step-000000000002.parakit"
    later.write_bytes(signed(b"who knows", version=2))
    for look in (kept.newest, lambda: load(tmp_path), lambda: load(later)):
        with pytest.raises(CheckpointError, match=r"version 2 of the format(?s:.*)Remedy: pip install --upgrade"):
            look()


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_pickle_in_place_of_a_checkpoint_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "step-000000000001.parakit"
    torch.save({"step": 1, "state": Evil(mark)}, tmp_path / "torch.pt")
    evil = pickle.dumps(Evil(mark))
    for content in (evil, (tmp_path / "torch.pt").read_bytes(), signed(evil), signed({"state": evil.hex()}, evil)):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="no whole parakit checkpoint"):
            load(file)
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists()  # it would have


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        {"identity": {}, "tensors": [], "state": {"dict": []}},
        {"identity": {}, "tensors": [], "state": {"object": []}},
        {"identity": {}, "tensors": [["load", [1]]], "state": {"dict": [["step", 1]]}},
        {"identity": {}, "tensors": [["float32", [10**12]]], "state": {"dict": [["step", 1]]}},
        {"identity": {}, "tensors": [["float32", [-1]]], "state": {"dict": [["step", 1]]}},
        {"identity": {}, "tensors": [], "state": {"dict": [["step", {"tensor": 0}]]}},
        {"identity": {}, "tensors": [], "state": {"dict": [[{"dict": []}, 1]]}},
        b"[" * 100_000,
    ],
    ids=lambda header: str(header)[:60],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: Any) -> None:
    file = tmp_path / "some.parakit"
    file.write_bytes(signed(header))
    with pytest.raises(CheckpointError, match=r"some\.parakit is no whole parakit checkpoint"):
        load(file)


_KILLING = """
import json, os, random, signal, sys, time, warnings
import torch
from parakit.checkpoints import Checkpoints, load

warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: this process has none of its own
torch.set_num_threads(1)
place, rounds = sys.argv[1], int(sys.argv[2])
chance = random.Random(0)
step, told = 0, []
for _ in range(rounds):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        kept = Checkpoints(place, keep=2)
        while True:
            step += 1
            kept.save({"step": step, "parameters": {"w": torch.full((100_000,), float(step))}}, {})
            os.write(writing, b"%d\\n" % step)
    os.close(writing)
    first = os.read(reading, 100)
    time.sleep(chance.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    text = first
    while more := os.read(reading, 65536):
        text += more
    os.close(reading)
    step = int(text.split()[-1])
    found = load(place)
    whole = bool((found.state["parameters"]["w"] == found.step).all())
    halves = sum(name.endswith(".tmp") for name in os.listdir(place))
    told.append([step, found.step, whole, list(found.damaged), halves])
    step = found.step
print(json.dumps(told))
"""


@pytest.mark.processes
def test_a_writer_killed_at_any_moment_leaves_its_last_checkpoint_whole(tmp_path: Path, nothing_left: None) -> None:
    rounds = 50
    done = subprocess.run(
        [sys.executable, "-c", _KILLING, str(tmp_path), str(rounds)], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert len(told) == rounds
    for returned, found, whole, damaged, _ in told:
        assert found in (returned, returned + 1)  # the next may be in place before its save returned
        assert whole
        assert damaged == []
    assert sum(halves for *_, halves in told) >= 5  # else no kill came in the middle of a write
    kept = Checkpoints(tmp_path, keep=2)
    kept.save(state(10**6), IDENTITY)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_write_that_fails_leaves_no_half_and_the_older_ones(place: str) -> None:
    kept = Checkpoints(place)
    kept.save(state(1), IDENTITY)
    write = kept._store.write

    def full(name: str, beside: str, parts: Any) -> None:
        def some() -> Iterator[Any]:
            yield parts[0]
            raise OSError(28, "No space left on device")

        write(name, beside, some())

    kept._store.write = full  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"step 2 could not be written(?s:.*)No space left") as caught:
        kept.save(state(2), IDENTITY)
    assert isinstance(caught.value.__cause__, OSError)
    assert kept._store.names() == ["step-000000000001.parakit"]
    assert load(place).step == 1


# --- mistakes at the call


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None])
def test_a_number_to_keep_that_cannot_be_is_refused(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(InputError, match=r"keep is .* at least 1"):
        Checkpoints(tmp_path / "new", keep=keep)
    assert not (tmp_path / "new").exists()


def test_places_that_cannot_be_written_are_refused_with_a_remedy(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    read_only = [Path("/proc/self")] if sys.platform == "linux" else []
    for wrong in (file, file / "below", tmp_path / ("x" * 300), *read_only):
        with pytest.raises(InputError, match=r"cannot be written to(?s:.*)Likely cause(?s:.*)Remedy"):
            Checkpoints(wrong)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("wrong", ["nope://bucket/run", "", None, 3, b"folder"])
def test_places_that_are_none_are_refused(wrong: Any) -> None:
    for use in (Checkpoints, load):
        with pytest.raises(InputError, match=r"place(?s:.*)Remedy"):
            use(wrong)


def test_a_protocol_whose_package_is_missing_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"(?i)install s3fs"):
        Checkpoints("s3://bucket/run")


def test_a_place_without_checkpoints_is_named(place: str) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*(?s:.*)Remedy"):
        load(place)
    Checkpoints(place)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load(place)


def test_loading_makes_no_folder_and_a_plain_folder_needs_no_fsspec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
    assert through(tmp_path)["step"] == 3


# --- what fits


def test_nothing_differs_from_itself_nor_by_versions_or_numbers_of_one_value() -> None:
    assert differences(IDENTITY, IDENTITY) == []
    assert differences(IDENTITY, IDENTITY | {"torch": "3.0", "parakit": "9"}) == []
    assert differences({"a": (1, 2), "b": math.nan, "c": 1}, {"a": [1, 2], "b": math.nan, "c": 1.0}) == []


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"batch_size": 64}, "batch_size is 64 here, 128 in the checkpoint"),
        ({"optimizer": "AdamW"}, "the optimizer is AdamW here, SGD in the checkpoint"),
        ({"scheduler": "StepLR"}, "the scheduler is StepLR here, none in the checkpoint"),
        ({"clip_norm": 1.0}, "clip_norm is missing in the checkpoint"),
        ({"parameters": {"0.weight": [(10, 128), "float32"], "0.bias": [(10,), "float32"]}},
         "parameter 0.weight is (10, 128) here, (10, 64) in the checkpoint"),
        ({"parameters": {"0.weight": [(10, 64), "float64"], "0.bias": [(10,), "float32"]}},
         "parameter 0.weight is float64 here, float32 in the checkpoint"),
        ({"parameters": {"0.weight": [(10, 64), "float32"], "0.bias": [(1,), "float64"]}},
         "parameter 0.bias is (1,) float64 here, (10,) float32 in the checkpoint"),
        ({"parameters": IDENTITY["parameters"] | {"4.bias": [(1,), "float32"]}},
         "parameter 4.bias is missing in the checkpoint"),
        ({"parameters": {"0.weight": [(10, 64), "float32"]}}, "parameter 0.bias is missing here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_difference_is_a_sentence_with_both_values(wanted: dict[str, Any], sentence: str) -> None:
    assert differences(IDENTITY, IDENTITY | wanted) == [sentence]


def test_parameters_in_another_order_differ() -> None:
    turned = dict(reversed(IDENTITY["parameters"].items()))
    assert differences(IDENTITY, IDENTITY | {"parameters": turned}) == [
        "parameter 0 is 0.bias here, 0.weight in the checkpoint",
        "parameter 1 is 0.weight here, 0.bias in the checkpoint",
    ]


def test_a_misfit_is_refused_with_the_first_few_differences() -> None:
    check_fits(IDENTITY, dict(IDENTITY))
    with pytest.raises(CheckpointError, match=r"does not fit this run: seed is 1 here, 0 in the checkpoint\.\n"):
        check_fits(IDENTITY, IDENTITY | {"seed": 1})
    with pytest.raises(CheckpointError, match=r"a0 is missing .*; a4 is missing in the checkpoint; and 3 more\.\n"):
        check_fits({}, {f"a{number}": number for number in range(8)})


# --- when to write


class Slow(Checkpoints):
    """Saves when it is let."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, keep=9)
        self.begun, self.let = threading.Event(), threading.Event()

    def save(self, state: Any, identity: Any) -> str:
        self.begun.set()
        assert self.let.wait(30)
        return super().save(state, identity)


def test_a_checkpoint_is_due_every_so_many_seconds(tmp_path: Path, nothing_left: None) -> None:
    saver = Saver(Checkpoints(tmp_path), 10, IDENTITY)
    assert saver.due_at == 10.0
    saver.offer(state(1), 12.0)
    assert saver.due_at == 22.0
    saver.close(30)
    assert saver.errors() == []
    found = load(tmp_path)
    assert (found.step, found.identity) == (1, IDENTITY)


def test_a_saver_does_not_wait_and_writes_the_newest_that_waits(tmp_path: Path, nothing_left: None) -> None:
    slow = Slow(tmp_path)
    saver = Saver(slow, 1, IDENTITY)
    saver.offer(state(1), 1.0)
    assert slow.begun.wait(30)
    names = [thread.name for thread in threading.enumerate() if thread.daemon]
    assert names.count("parakit-checkpoints") == 1
    for step in (2, 3, 4):
        saver.offer(state(step), float(step))
    assert slow.steps() == []
    slow.let.set()
    saver.close(30)
    assert slow.steps() == [1, 4]
    assert saver.errors() == []


def test_a_saver_tells_what_went_wrong_and_goes_on(tmp_path: Path, nothing_left: None) -> None:
    folder = tmp_path / "run"
    saver = Saver(Checkpoints(folder), 1, IDENTITY)
    folder.rmdir()
    saver.offer(state(1), 1.0)
    deadline = time.monotonic() + 30
    while not (told := saver.errors()) and time.monotonic() < deadline:
        time.sleep(0.01)
    (sentence,) = told
    assert sentence.startswith("The checkpoint of step 1 could not be written to")
    assert "FileNotFoundError" in sentence
    assert "\n" not in sentence
    assert saver.errors() == []
    folder.mkdir()
    saver.offer(state(2), 2.0)
    saver.close(30)
    assert saver.errors() == []
    assert load(folder).step == 2


def test_a_saver_that_is_closed_too_early_says_so(tmp_path: Path, nothing_left: None) -> None:
    slow = Slow(tmp_path)
    saver = Saver(slow, 1, IDENTITY)
    saver.offer(state(1), 1.0)
    assert slow.begun.wait(30)
    saver.close(0.01)
    (sentence,) = saver.errors()
    assert "not written within 0.01 s" in sentence
    slow.let.set()
    saver.close(30)
    assert saver.errors() == []
    assert slow.steps() == [1]


def test_a_saver_without_anything_to_save_has_no_thread(tmp_path: Path, nothing_left: None) -> None:
    before = threading.active_count()
    saver = Saver(Checkpoints(tmp_path), 1, IDENTITY)
    assert threading.active_count() == before
    saver.close(1)
    assert saver.errors() == []


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, "10", True])
def test_an_interval_that_cannot_be_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"every_seconds is .* above 0"):
        Saver(Checkpoints(tmp_path), wrong, IDENTITY)
