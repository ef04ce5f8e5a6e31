"""Where workers compute: who gets which GPU, and what is said where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Text

import parakit as pk
from parakit.collectives.base import ExchangeMethod
from parakit.collectives.form import form_group
from parakit.errors import ConnectError, InputError
from parakit.events.history import History
from parakit.events.log import sentence
from parakit.events.records import Baseline, baseline_name
from parakit.events.summary import RunSummary
from parakit.losses.forms import summing_form
from parakit.system import devices
from parakit.system.devices import CPU, share_out
from parakit.widgets import report
from tests.events.test_summary import segments, started
from tests.members import FolderStore

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: tests/test_gpu.py is for it")


def test_each_worker_gets_the_gpu_that_the_fewest_have() -> None:
    two = ("A", "B")
    assert share_out({"one": two, "two": two, "three": two}, {}) == {"one": "A", "two": "B", "three": "A"}
    assert share_out({"four": two}, {"one": "A", "two": "B", "three": "A"}) == {"four": "B"}


def test_workers_that_see_one_gpu_each_keep_it() -> None:
    # As clusters give them out that set CUDA_VISIBLE_DEVICES; and the same GPUs in another order, as dask-cuda does.
    assert share_out({"one": ("A",), "two": ("B",)}, {}) == {"one": "A", "two": "B"}
    assert share_out({"one": ("A", "B"), "two": ("B", "A")}, {}) == {"one": "A", "two": "B"}


def test_gpus_of_several_hosts_are_shared_out_within_each() -> None:
    seen = {"one": ("A", "B"), "two": ("C",), "three": ("A", "B"), "four": ("C",)}
    assert share_out(seen, {}) == {"one": "A", "two": "C", "three": "B", "four": "C"}


def test_a_worker_that_comes_again_does_not_count_twice() -> None:
    assert share_out({"one": ("A", "B")}, {"one": "A"}) == {"one": "A"}


@NO_GPU
def test_without_a_gpu_inline_workers_say_so_at_the_call() -> None:
    with pytest.raises(InputError, match="sees no GPU") as raised:
        pk.connect("inline", device="cuda")
    assert 'device="cpu"' in str(raised.value)


@NO_GPU
@pytest.mark.dask
def test_without_a_gpu_a_pool_says_so_at_the_call_and_leaves_nothing(nothing_left: None) -> None:
    with pytest.raises(ConnectError, match="1 of 1 workers see no GPU; worker 0 is one") as raised:
        pk.connect(1, device="cuda")
    assert 'device="cpu"' in str(raised.value)


@pytest.mark.parametrize("wrong", ["gpu", "cuda:0", None, 1])
def test_what_is_no_device_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match="it must be one of 'cpu', 'cuda'"):
        pk.connect(1, device=wrong)


def test_threads_are_not_for_gpus() -> None:
    with pytest.raises(InputError, match="threads is 2, but workers on GPUs have one thread each"):
        pk.connect(1, device="cuda", threads=2)


def test_a_loss_stays_itself_on_the_cpu() -> None:
    loss = summing_form(torch.nn.CrossEntropyLoss(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert loss.on(torch.device("cpu")) is loss


@pytest.fixture
def on_gpu(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> pk.Workers:
    """A pool that says that its workers compute on a GPU: for what is refused before anything is computed."""
    monkeypatch.setattr(inline, "device", "cuda")
    return inline


def test_shared_memory_is_refused_on_gpus(on_gpu: pk.Workers) -> None:
    digits = pk.datasets.digits()
    strategy = pk.strategies.AllReduce(exchange="shared memory")
    with pytest.raises(InputError, match="these workers compute on GPUs"):
        pk.train(torch.nn.Linear(64, 10), digits.train, on=on_gpu, strategy=strategy)
    with pytest.raises(InputError, match="threads is 3, but these workers compute on GPUs"):
        pk.train(torch.nn.Linear(64, 10), digits.train, on=on_gpu, threads=3)


@pytest.mark.parametrize("measure", [pk.sweep, pk.advise])
def test_what_measures_cores_is_refused_on_gpus(on_gpu: pk.Workers, measure: object) -> None:
    digits = pk.datasets.digits()
    with pytest.raises(InputError, match="measures what the cores of a machine do"):
        measure(torch.nn.Linear(64, 10), digits.train, on=on_gpu)


def test_pools_on_gpus_count_gpus(on_gpu: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "cores", 1)
    monkeypatch.setattr(on_gpu, "threads", 1)
    assert repr(on_gpu) == "<Workers: inline, in this process, 1 worker of 1 thread each, 1 GPU>"
    on_gpu.grow(2)
    assert repr(on_gpu).endswith("1 GPU; more workers than GPUs>")


def test_what_lies_on_gpus_is_added_by_connections(tmp_path: Path) -> None:
    store, gpu = FolderStore(str(tmp_path)), torch.device("cuda")
    vector: dict[str, Any] = {"numel": 8, "dtype": torch.float32, "common": 64}
    for device, method in ((gpu, ExchangeMethod("gloo")), (CPU, ExchangeMethod("shared memory", divided=True))):
        group, _ = form_group(store, 0, ("127.0.0.1",), 5.0, exchange="auto", device=device, **vector)
        assert group.method == method
        group.close()


def test_plain_pytorch_on_a_gpu_is_called_that() -> None:
    event = Baseline(1.0, "plain PyTorch", 1, 2000.0, 1900.0, 2100.0, 50, "cuda")
    assert sentence(event) == "plain PyTorch with 1 GPU: 2,000 samples/s (1,900 to 2,100)"
    assert baseline_name(1, "cuda") == "plain PyTorch, 1 GPU"
    assert baseline_name(2) == "plain PyTorch, 2 cores"


def test_a_picture_and_a_table_of_a_run_on_gpus_speak_of_gpus() -> None:
    history, summary = History(), RunSummary()
    history.append(replace(started(cores=1), device="cuda"), *segments([1] * 5 + [2] * 5))
    summary.follow(history)
    words = [text.get_text() for text in pk.plots.speedup(history).figure.findobj(Text)]
    assert "more than GPUs" in words
    assert "more workers than GPUs" in report.summary_text(summary, [])


def test_cpu_needs_nothing_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("nobody need ask"))
    cpu = devices.device_here("cpu")
    devices.use(cpu)
    devices.seed(cpu, 5)
    devices.finish(cpu)
    devices.give_back(cpu)
    assert devices.generators_of(cpu) == []
