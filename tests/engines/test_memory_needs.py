"""What a run needs of memory: figures for each way of running, and a refusal in words of what cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from parakit.engines.memory_needs import MemoryNeeds, check_fits_memory, needs_of, states_of
from parakit.errors import ModelError
from parakit.system.cores import free_memory

PARAMETERS = 1_000_000
BYTES = 4 * PARAMETERS


def model(buffers: int = 0) -> nn.Module:
    """A million parameters, and some elements in buffers."""
    made = nn.Linear(1000, 1000, bias=False)
    made.register_buffer("seen", torch.zeros(buffers))
    return made


def needs(states: float, workers: int, *, divided: bool = False, in_turns: bool = False) -> MemoryNeeds:
    return needs_of(model(), states, workers, divided=divided, in_turns=in_turns)


# --- figures, in copies of the parameters

SGD, ADAM = 0.0, 2.0


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("states", [SGD, 1.0, ADAM])
def test_workers_that_have_all_of_it_each(states: float, workers: int) -> None:
    found = needs(states, workers)
    kept = 1 + states  # parameters, and the optimizer's state
    assert found.notebook == 2 * BYTES
    assert found.each == pytest.approx((kept + 1.8 + 2 * kept) * BYTES)
    assert found.workers == pytest.approx((workers * (kept + 1.8) + 2 * kept) * BYTES)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("states", [SGD, 1.0, ADAM])
def test_workers_that_have_it_in_common(states: float, workers: int) -> None:
    found = needs(states, workers, divided=True)
    kept = 1 + states
    assert found.workers == pytest.approx((3 * kept + workers * 1.8) * BYTES)
    assert found.each == pytest.approx((3 * kept + 1.8) * BYTES)


@pytest.mark.parametrize("states", [SGD, ADAM])
def test_workers_that_take_turns_need_nothing_of_their_own(states: float) -> None:
    found = needs(states, 5, in_turns=True)
    assert (found.workers, found.each) == (0, 0)
    assert found.notebook == (2 + 2 * (1 + states) + 1) * BYTES


def test_one_worker_needs_as_much_divided_or_not() -> None:
    assert needs(ADAM, 1, divided=True) == needs(ADAM, 1)


def test_dividing_saves_what_each_would_have() -> None:
    saved = needs(ADAM, 4).workers - needs(ADAM, 4, divided=True).workers
    assert saved == pytest.approx(3 * (1 + ADAM) * BYTES)


def test_buffers_have_no_gradients_and_no_states() -> None:
    with_buffers = needs_of(model(PARAMETERS), ADAM, 1, divided=False, in_turns=False)
    assert with_buffers.each - needs(ADAM, 1).each == pytest.approx(3 * BYTES)


def test_neither_have_frozen_parameters() -> None:
    frozen = model().requires_grad_(False)
    found = needs_of(frozen, ADAM, 1, divided=False, in_turns=False)
    assert found.each == 3 * BYTES


def test_tied_parameters_count_once() -> None:
    tied = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    tied[1].weight = tied[0].weight
    assert needs_of(tied, ADAM, 2, divided=False, in_turns=False) == needs(ADAM, 2)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 2), (torch.bfloat16, 0.5)])
def test_needs_go_by_the_size_of_elements(dtype: torch.dtype, factor: float) -> None:
    other = needs_of(model().to(dtype), ADAM, 2, divided=False, in_turns=False)
    assert other.each == pytest.approx(factor * needs(ADAM, 2).each)


# --- states of an optimizer

Make = Callable[[list[nn.Parameter]], optim.Optimizer]

STATES: dict[str, tuple[Make, float]] = {
    "SGD": (lambda given: optim.SGD(given, lr=0.1), 0.0),
    "SGD with momentum": (lambda given: optim.SGD(given, lr=0.1, momentum=0.9), 1.0),
    "Adam": (optim.Adam, 2.0),
    "Adam, the largest kept": (lambda given: optim.Adam(given, amsgrad=True), 3.0),
    "AdamW": (optim.AdamW, 2.0),
    "Adagrad": (optim.Adagrad, 1.0),
    "another": (optim.RMSprop, 2.0),
}


@pytest.mark.parametrize("name", STATES)
def test_what_an_optimizer_keeps_is_known_before_its_first_step(name: str) -> None:
    make, states = STATES[name]
    assert states_of(make([nn.Parameter(torch.zeros(1000))])) == pytest.approx(states, rel=0.01)


@pytest.mark.parametrize("name", [name for name in STATES if name != "another"])
def test_and_is_what_it_keeps_then(name: str) -> None:
    make, states = STATES[name]
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = make([parameter])
    parameter.grad = torch.ones(1000)
    optimizer.step()
    assert states_of(optimizer) == pytest.approx(states, abs=0.01)


GROUPS: dict[str, tuple[type[optim.Optimizer], tuple[dict[str, Any], dict[str, Any]], float]] = {
    "momentum in the second alone": (optim.SGD, ({}, {"momentum": 0.9}), 0.75),
    "momentum in the first alone": (optim.SGD, ({"momentum": 0.9}, {}), 0.25),
    "momentum in none": (optim.SGD, ({}, {}), 0.0),
    "the largest kept in the second": (optim.Adam, ({}, {"amsgrad": True}), 2.75),
    "the largest kept in both": (optim.AdamW, ({"amsgrad": True}, {"amsgrad": True}), 3.0),
    "one that is told alike for all": (optim.Adagrad, ({}, {"lr": 0.1}), 1.0),
}


@pytest.mark.parametrize("name", GROUPS)
def test_all_groups_count_by_their_sizes(name: str) -> None:
    kind, options, states = GROUPS[name]
    parameters = [nn.Parameter(torch.zeros(size)) for size in (1000, 3000)]
    optimizer = kind([{"params": [p], **more} for p, more in zip(parameters, options, strict=True)], lr=0.1)  # type: ignore[call-arg]
    assert states_of(optimizer) == pytest.approx(states, abs=0.01)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert states_of(optimizer) == pytest.approx(states, abs=0.01)


def test_frozen_parameters_of_a_group_count_for_nothing() -> None:
    frozen, trained = nn.Parameter(torch.zeros(1000), requires_grad=False), nn.Parameter(torch.zeros(1000))
    groups = [{"params": [frozen], "momentum": 0.9}, {"params": [trained]}]
    assert states_of(optim.SGD(groups, lr=0.1)) == 0
    assert states_of(optim.SGD([frozen], lr=0.1, momentum=0.9)) == 0


def test_an_optimizer_that_has_begun_tells_itself() -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = optim.RMSprop([parameter])
    parameter.grad = torch.ones(1000)
    optimizer.step()
    assert states_of(optimizer) == pytest.approx(1.0, abs=0.01)


# --- what cannot fit


def refused(needs: MemoryNeeds, *, limits: Any = (), here: bool = True) -> str:
    with pytest.raises(ModelError) as caught:
        check_fits_memory(needs, PARAMETERS, limits, here=here)
    return str(caught.value)


FREE = 64 * 10**12  # more than any machine of ours has


def test_what_this_machine_has_not_is_refused_with_numbers() -> None:
    text = refused(MemoryNeeds(FREE, 2 * FREE, FREE))
    assert "1,000,000 parameters need about 192000.0 GB beside their activations" in text
    assert "64000.0 GB in this process and 128000.0 GB in the workers. This machine has " in text
    assert "Likely cause: gradients, the optimizer's state, and two commits of it all" in text
    assert "Remedy: fewer workers" in text


def test_what_the_machine_has_left_is_told() -> None:
    told = float(refused(MemoryNeeds(FREE, 0, 0)).partition("This machine has ")[2].split()[0])
    assert told == pytest.approx(free_memory() / 1e9, rel=0.5)


def test_workers_of_another_machine_do_not_count_here() -> None:
    check_fits_memory(MemoryNeeds(10**6, FREE, 10**6), PARAMETERS, [0, 0], here=False)


def test_a_run_that_fits_is_let_go() -> None:
    check_fits_memory(MemoryNeeds(10**6, 10**6, 10**6), PARAMETERS, [2 * 10**6, 0], here=True)


def test_a_worker_with_too_low_a_limit_is_refused_with_numbers() -> None:
    text = refused(MemoryNeeds(10**6, 10**6, 500 * 10**6), limits=[0, 400 * 10**6, 900 * 10**6, 90 * 10**6])
    assert "1,000,000 parameters need about 0.5 GB in one worker" in text
    assert "and 2 of 4 workers may use 90.0 MB" in text
    assert "Likely cause: a memory_limit of the cluster's workers" in text


def test_a_limit_that_is_just_enough_is_enough() -> None:
    check_fits_memory(MemoryNeeds(0, 0, 500), PARAMETERS, [500], here=True)


def test_needs_say_themselves_in_words() -> None:
    assert repr(MemoryNeeds(2_000_000, 1_500_000_000, 99_900_000)) == (
        "MemoryNeeds(notebook=2.0 MB, workers=1.5 GB, each=99.9 MB at most)"
    )
