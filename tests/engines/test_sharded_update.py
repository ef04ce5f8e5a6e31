"""Divided updates: for every optimizer that may be divided, what the whole update gives, at any number of members."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from parakit.engines.fused_updates import prefer_fused
from parakit.engines.sharded_update import Shard, can_shard, common_nbytes
from parakit.gradients.gradient_sum import GradientSlice

SHAPES = [(7, 5), (5,), (3, 5), (1,), (2, 2, 2)]
STEPS = 7
LIMIT_SECONDS = 20.0

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": partial(optim.SGD, lr=0.1),
    "sgd with momentum": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "sgd of nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "sgd, fused": partial(optim.SGD, lr=0.1, fused=True),  # with momentum, torch's own fails on parameters reached late
    "sgd, foreach": partial(optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "adam": partial(optim.Adam, lr=0.01, weight_decay=1e-2),
    "adam with amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True),
    "adam, fused": partial(optim.Adam, lr=0.01, fused=True),
    "adam, foreach": partial(optim.Adam, lr=0.01, foreach=True),
    "adamw": partial(optim.AdamW, lr=0.01),
    "adamw, fused": partial(optim.AdamW, lr=0.01, amsgrad=True, fused=True),
    "nadam": partial(optim.NAdam, lr=0.01),
    "radam": partial(optim.RAdam, lr=0.01),
    "adamax": partial(optim.Adamax, lr=0.01),
    "rmsprop": partial(optim.RMSprop, lr=0.01),
    "rmsprop, centred": partial(optim.RMSprop, lr=0.01, centered=True, momentum=0.9),
    "rprop": partial(optim.Rprop, lr=0.01),
    "adagrad": partial(optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "adagrad, fused": partial(optim.Adagrad, lr=0.1, fused=True),
    "adadelta": partial(optim.Adadelta, lr=1.0),
    "asgd": partial(optim.ASGD, lr=0.1, t0=2),
}


class Fellows:
    """Members that are threads, and memory that they have in common because all threads do."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.wall = threading.Barrier(size, timeout=LIMIT_SECONDS)
        self.memories: list[Tensor] = []
        self.lock = threading.Lock()
        self.sums: list[Tensor] = [torch.zeros(0)] * size


class FellowsCommon:
    """What one of them sees."""

    def __init__(self, fellows: Fellows, rank: int) -> None:
        self._all, self.rank = fellows, rank
        self._asked = 0
        self.nbytes = 0

    def memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        self.nbytes += numel * dtype.itemsize
        with self._all.lock:
            if self._asked == len(self._all.memories):
                self._all.memories.append(torch.full((numel,), float("nan"), dtype=dtype))
            self._asked += 1
            return self._all.memories[self._asked - 1][:]

    def slice_of(self, numel: int) -> slice:
        edges = [numel * rank // self._all.size for rank in range(self._all.size + 1)]
        return slice(edges[self.rank], edges[self.rank + 1])

    def barrier(self) -> None:
        self._all.wall.wait()

    def add(self, values: Tensor) -> None:
        self._all.sums[self.rank] = values.clone()
        self.barrier()
        values.copy_(torch.stack(self._all.sums).sum(0))
        self.barrier()


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def gradients(step: int) -> tuple[list[Tensor], Tensor]:
    """Of one step, and which parameters it reaches: the third only from the third step on, the fourth never."""
    generator = torch.Generator().manual_seed(100 + step)
    reached = torch.tensor([1.0, 2.0, float(step >= 2), 0.0, float(step % 2 == 0)])
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES], reached


def update_whole(optimizer: optim.Optimizer, given: list[nn.Parameter], step: int) -> None:
    values, reached = gradients(step)
    for parameter, value, by in zip(given, values, reached.tolist(), strict=True):
        parameter.grad = value if by else None
    optimizer.step()


def in_groups(make: Callable[..., optim.Optimizer], given: list[nn.Parameter]) -> optim.Optimizer:
    """Of two groups, in another order than the parameters', one of which has half the rate."""
    optimizer = make([{"params": given[3:]}, {"params": given[:3]}])
    optimizer.param_groups[1]["lr"] /= 2
    return optimizer


def flat(values: list[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def pieces_of(values: list[Tensor], where: slice) -> list[Tensor]:
    """What lies in a slice of each, where there is something."""
    whole, pieces = torch.arange(sum(value.numel() for value in values))[where], []
    for value, places in zip(values, torch.arange(len(flat(values))).split([v.numel() for v in values]), strict=True):
        inside = torch.isin(places, whole)
        if inside.any():
            pieces.append(value.reshape(-1)[inside])
    return pieces


def load(shard: Shard, pieces: list[Tensor], reached: Tensor, divisor: float = 1.0) -> float:
    """Let a slice of a sum be the gradient; what its loss is does not matter here."""
    shard.load(GradientSlice(pieces, torch.cat([reached.double(), torch.tensor([divisor, 0.0, 0.0])]), 1.0))
    return 0.0


def divided(fellows: Fellows, rank: int, make: Callable[..., optim.Optimizer], before: int, after: int) -> Any:
    """Parameters and state of a member that does some steps as a whole, then divided, then as a whole again."""
    torch.set_num_threads(1)
    given = parameters()
    optimizer = in_groups(make, given)
    for step in range(before):
        update_whole(optimizer, given, step)
    common = FellowsCommon(fellows, rank)
    shard = Shard(optimizer, given, common)
    for step in range(before, after):
        values, reached = gradients(step)
        pieces = pieces_of(values, shard.where) if step % 2 else [flat(values)[shard.where] * 4]
        if step == 4:
            optimizer.param_groups[1]["lr"] *= 0.1
        shard.step(partial(load, shard, pieces, reached, 1.0 if step % 2 else 4.0))
    shared = copy.deepcopy((given, optimizer.state_dict()))
    fellows.wall.wait()
    shard.leave()
    fellows.wall.wait()
    for memory in fellows.memories:
        memory.fill_(float("nan"))
    for step in range(after, STEPS):
        update_whole(optimizer, given, step)
    return (given, optimizer.state_dict()), shared, common.nbytes


def alone(make: Callable[..., optim.Optimizer], steps: int) -> Any:
    given = parameters()
    optimizer = in_groups(make, given)
    for step in range(steps):
        if step == 4:
            optimizer.param_groups[1]["lr"] *= 0.1
        update_whole(optimizer, given, step)
    return given, optimizer.state_dict()


def by_all(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    fellows = Fellows(size)
    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(function, fellows, rank, *args) for rank in range(size)]]


def assert_same(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert ours[1]["param_groups"] == theirs[1]["param_groups"]
    assert ours[1]["state"].keys() == theirs[1]["state"].keys()
    for place, state in theirs[1]["state"].items():
        assert ours[1]["state"][place].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(ours[1]["state"][place][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 90])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_divided_update_is_the_whole_one_from_the_first_step(name: str, size: int) -> None:
    if size > 3 and name not in ("sgd with momentum", "adam", "adam, fused"):
        size = 4
    ours = by_all(size, divided, OPTIMIZERS[name], 0, 6)
    for whole_again, shared, nbytes in ours:
        assert_same(shared, alone(OPTIMIZERS[name], 6))
        assert_same(whole_again, alone(OPTIMIZERS[name], STEPS))
        assert nbytes <= common_nbytes(sum(p.numel() for p in parameters()), torch.float64)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_is_there_is_taken_over(name: str) -> None:
    for whole_again, shared, _ in by_all(2, divided, OPTIMIZERS[name], 3, 6):
        assert_same(shared, alone(OPTIMIZERS[name], 6))
        assert_same(whole_again, alone(OPTIMIZERS[name], STEPS))


def test_a_member_that_never_comes_leaves_the_others_what_they_had() -> None:
    fellows = Fellows(2)
    fellows.wall = threading.Barrier(2, timeout=0.1)
    given = parameters()
    optimizer = in_groups(OPTIMIZERS["adam"], given)
    update_whole(optimizer, given, 0)
    before = copy.deepcopy((given, optimizer.state_dict()))
    with pytest.raises(threading.BrokenBarrierError):
        Shard(optimizer, given, FellowsCommon(fellows, 0))
    for memory in fellows.memories:
        memory.fill_(7.0)
    assert_same((given, optimizer.state_dict()), before)


def norm(fellows: Fellows, rank: int) -> float:
    given = parameters()
    shard = Shard(optim.SGD(given, lr=0.1), given, FellowsCommon(fellows, rank))
    load(shard, pieces_of(gradients(0)[0], shard.where), torch.ones(len(given)))
    return shard.squared_norm()


@pytest.mark.parametrize("size", [1, 3, 60])
def test_the_norm_is_that_of_the_whole_gradient(size: int) -> None:
    for found in by_all(size, norm):
        assert found == pytest.approx(float(flat(gradients(0)[0]).square().sum()), rel=1e-12)


class OwnSGD(optim.SGD):
    """A class of a user's, which may do anything."""


def hooked(given: list[nn.Parameter]) -> optim.Optimizer:
    optimizer = optim.SGD(given, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize("make", [OwnSGD, optim.LBFGS, hooked, partial(optim.Adam, differentiable=True)])
def test_what_may_look_beyond_single_elements_is_not_divided(make: Any) -> None:
    given = parameters()
    assert not can_shard(make(given), given)


def test_parameters_that_cannot_lie_end_to_end_are_not_divided() -> None:
    tied, number, mixed = parameters(), parameters(), parameters()
    tied[4].data = tied[0].data[0, :4].view(2, 2)
    number.append(nn.Parameter(torch.tensor(1.0, dtype=torch.float64)))
    mixed[0] = nn.Parameter(mixed[0].detach().float())
    gaps = [nn.Parameter(parameters()[0].detach()[:, ::2])]
    for given in (tied, number, mixed, gaps):
        assert not can_shard(optim.SGD(given, lr=0.1), given)
    turned = [nn.Parameter(parameters()[0].detach().t())]  # its elements lie end to end, in another order
    for given in (parameters(), turned):
        assert can_shard(optim.SGD(given, lr=0.1), given)


def first_step(optimizer: optim.Optimizer, given: list[nn.Parameter], reached: int) -> None:
    for place, parameter in enumerate(given):
        parameter.grad = torch.ones_like(parameter) if place < reached else None
    optimizer.step()


@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW, optim.Adagrad, optim.SGD])
def test_torch_is_asked_for_its_fused_update_where_the_choice_was_left_to_it(make: Any) -> None:
    given = parameters()
    optimizer = make(given, lr=0.1)
    prefer_fused(optimizer)
    assert optimizer.param_groups[0]["fused"] is True
    chosen = make(given, lr=0.1, foreach=True)
    prefer_fused(chosen)
    assert chosen.param_groups[0]["fused"] is None


def test_fused_momentum_waits_until_every_parameter_has_one() -> None:
    given = parameters()
    optimizer = optim.SGD(given, lr=0.1, momentum=0.9)
    for reached, fused in ((0, None), (3, None), (5, True)):
        first_step(optimizer, given, reached)
        prefer_fused(optimizer)
        assert optimizer.param_groups[0]["fused"] is fused
        first_step(optimizer, given, reached)


def test_classes_of_ones_own_and_other_optimizers_are_left_alone() -> None:
    for optimizer in (OwnSGD(parameters(), lr=0.1), optim.RMSprop(parameters(), lr=0.1)):
        before = copy.deepcopy(optimizer.state_dict())
        prefer_fused(optimizer)
        assert optimizer.state_dict() == before
