"""Buffers: what workers' buffers come to by each rule, and which rule one has; nothing is guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parakit as pk
from parakit.errors import InputError, ModelError
from parakit.model_state.buffers import RULES, Buffers, Rule, buffers_of, check_rules, merge, rules_for

BEFORE = (1.0, 10.0)
VALUES = ((4.0, 10.0), (2.0, 11.0), (3.0, 6.0))  # of three workers
EXPECTED: dict[str, list[float]] = {
    "mean": [3.0, 9.0],
    "statistics": [3.0, 9.0],
    "sum": [1.0 + 3 + 1 + 2, 10.0 + 0 + 1 - 4],
    "max": [4.0, 11.0],
    "min": [2.0, 6.0],
    "first": [4.0, 10.0],
}


def holder(**buffers: Tensor) -> Any:
    model = nn.Module()
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


class Fellow:
    """One worker of three, the values of the others being known."""

    size = 3

    def __init__(self, rank: int, others: dict[int, Any]) -> None:
        self.rank, self._others, self.calls = rank, others, 0

    def sum(self, values: Tensor) -> None:
        self.calls += 1
        table = values.view(self.size, -1)
        for rank, row in self._others.items():
            table[rank] += torch.tensor(row, dtype=table.dtype)


def fellow(rank: int) -> Fellow:
    return Fellow(rank, {other: list(row) for other, row in enumerate(VALUES) if other != rank})


def after_a_step(rank: int, rule: Rule, dtype: torch.dtype = torch.float32) -> tuple[Any, Fellow]:
    model = holder(seen=torch.tensor(BEFORE, dtype=dtype))
    buffers, peers = Buffers(model, None, {"seen": rule}), fellow(rank)
    buffers.begin()
    model.seen.copy_(torch.tensor(VALUES[rank], dtype=dtype))
    buffers.settle(peers)
    return model, peers


# --- what several come to


@pytest.mark.parametrize("rule", EXPECTED)
def test_values_of_several_come_to_one(rule: str) -> None:
    values = [torch.tensor(row) for row in VALUES]
    assert merge(rule, torch.tensor(BEFORE), values).tolist() == EXPECTED[rule]


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("rule", ["mean", "sum", "max", "min", "first"])
def test_every_worker_has_that_after_a_step(rank: int, rule: Rule) -> None:
    model, _ = after_a_step(rank, rule)
    assert model.seen.tolist() == EXPECTED[rule]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float64])
def test_types_stay(dtype: torch.dtype) -> None:
    model, _ = after_a_step(1, "sum", dtype)
    assert model.seen.dtype == dtype
    assert model.seen.tolist() == EXPECTED["sum"]


@pytest.mark.parametrize("rule", ["own", "alike", "statistics"])
@pytest.mark.parametrize("rank", [0, 2])
def test_others_stay_each_workers_own_for_the_time_being(rank: int, rule: Rule) -> None:
    model, peers = after_a_step(rank, rule)
    assert model.seen.tolist() == list(VALUES[rank])
    assert peers.calls == 0


def test_a_worker_alone_asks_nobody() -> None:
    model = holder(seen=torch.tensor(BEFORE))
    buffers, peers = Buffers(model, None, {"seen": "sum"}), fellow(0)
    peers.size = 1
    buffers.begin()
    model.seen += 1
    buffers.settle(peers)
    assert model.seen.tolist() == [2.0, 11.0]
    assert peers.calls == 0


def test_several_buffers_of_several_shapes_are_brought_together_at_once() -> None:
    model = holder(total=torch.tensor(0.0), unruled=torch.ones(2), largest=torch.zeros(2, 2))
    buffers = Buffers(model, None, {"total": "sum", "largest": "max"})
    buffers.begin()
    model.total += 5
    model.largest[0, 1] = 7.0
    peers = Fellow(1, {0: [2, 1, 1, 1, 1], 2: [3, 0, 9, 0, 0]})
    buffers.settle(peers)
    assert (int(model.total), model.largest.tolist()) == (10, [[1.0, 9.0], [1.0, 1.0]])
    assert peers.calls == 1


def test_those_of_several_kinds_at_once_for_each_kind() -> None:
    buffers = {"count": torch.tensor(0), "turn": torch.zeros(1, dtype=torch.complex64), "largest": torch.zeros(1)}
    model = holder(**buffers, seen=torch.zeros(2, dtype=torch.int32))
    together = Buffers(model, None, {"count": "sum", "turn": "first", "largest": "max", "seen": "sum"})
    together.begin()
    peers = Fellow(0, {1: [3.0], 2: [4.0]})  # the same numbers of each kind, in every place
    model.turn += 1j
    model.largest += 2
    together.settle(peers)
    assert (model.count.item(), model.turn.item(), model.largest.item()) == (7, 1j, 4.0)
    assert model.seen.tolist() == [7, 7]
    assert peers.calls == 3


# --- values that doubles do not hold

COMPLEX = torch.tensor([[1 + 2j, 3j], [2 - 4j, 0j], [3 + 2j, 3 + 3j]], dtype=torch.complex64)
LARGE = torch.tensor([[2**53 + 1, -(2**62)], [2**53 + 3, 2**62 + 1], [2**53 + 5, 0]])
INF, NAN = float("inf"), float("nan")


def together(rule: Rule, before: Tensor, values: Tensor, *, in_a_state: bool = False) -> Tensor:
    """What values of several workers come to: after a step of the first, or in a state of all."""
    model = holder(seen=before.clone())
    buffers = Buffers(model, None, {"seen": rule})
    if in_a_state:
        buffers.take([{"seen": row} for row in values])
        return model.seen
    buffers.begin()
    model.seen.copy_(values[0])
    others = torch.view_as_real(values).flatten(1) if values.is_complex() else values
    buffers.settle(Fellow(0, {1: others[1].tolist(), 2: others[2].tolist()}))
    return model.seen


@pytest.mark.parametrize("in_a_state", [False, True])
@pytest.mark.parametrize(("rule", "value"), [("first", COMPLEX[0]), ("sum", COMPLEX.sum(0)), ("mean", COMPLEX.mean(0))])
def test_complex_numbers_stay_whole(rule: Rule, value: Tensor, in_a_state: bool) -> None:
    found = together(rule, torch.zeros(2, dtype=torch.complex64), COMPLEX, in_a_state=in_a_state)
    torch.testing.assert_close(found, value)


@pytest.mark.parametrize("in_a_state", [False, True])
@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("first", LARGE[0]), ("max", LARGE.amax(0)), ("min", LARGE.amin(0)), ("sum", LARGE.sum(0)),
        ("mean", torch.tensor([2**53 + 3, 0])),
    ],
)  # fmt: skip
def test_whole_numbers_of_any_size_are_exact(rule: Rule, value: Tensor, in_a_state: bool) -> None:
    found = together(rule, torch.zeros(2, dtype=torch.int64), LARGE, in_a_state=in_a_state)
    assert found.tolist() == value.tolist()


@pytest.mark.parametrize("values", [[[1], [2], [3]], [[-1], [-2], [-2]], [[0], [0], [1]]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_means_of_whole_numbers_are_cut_off(values: list[list[int]], dtype: torch.dtype) -> None:
    given = torch.tensor(values).abs().to(dtype) if dtype is not torch.int64 else torch.tensor(values)
    assert together("mean", given[0], given).item() == given.double().mean().to(dtype).item()


@pytest.mark.parametrize("in_a_state", [False, True])
def test_what_is_infinite_and_stays_so_adds_nothing(in_a_state: bool) -> None:
    before = torch.tensor([-INF, INF, INF, 1.0, 0.0])
    values = torch.tensor([[-INF, INF, INF, 2.0, 0.0], [-INF, INF, INF, 1.0, INF], [-INF, INF, INF, 3.0, 0.0]])
    assert together("sum", before, values, in_a_state=in_a_state).tolist() == [-INF, INF, INF, 4.0, INF]


@pytest.mark.parametrize("rule", ["max", "min"])
def test_of_complex_numbers_none_is_the_largest(rule: str) -> None:
    model = holder(turn=torch.zeros(1, dtype=torch.complex64), seen=torch.zeros(1))
    with pytest.raises(InputError, match=f"the rule '{rule}' for turn, whose numbers are complex"):
        rules_for(model, None, ["turn"], ["turn"], {"*": rule})
    assert rules_for(model, None, ["seen"], ["seen"], {"seen": rule}) == {"seen": rule}


def test_whether_any_need_every_step() -> None:
    model = holder(seen=torch.zeros(2))
    assert [rule for rule in RULES if Buffers(model, None, {"seen": rule}).each_step] == [  # type: ignore[dict-item]
        "mean", "sum", "max", "min", "first",
    ]  # fmt: skip


# --- states of several workers


@pytest.mark.parametrize("rule", ["mean", "statistics", "max", "min", "first", "own", "alike"])
def test_a_state_of_several_is_taken_by_the_same_rules(rule: Rule) -> None:
    model = holder(seen=torch.zeros(2))
    Buffers(model, None, {"seen": rule}).take([{"seen": torch.tensor(row)} for row in VALUES])
    assert model.seen.tolist() == EXPECTED.get(rule, list(VALUES[0]))


def test_means_at_the_edge_of_a_types_range_stay_within_it() -> None:
    most = torch.finfo(torch.float16).max
    model = holder(seen=torch.zeros(1, dtype=torch.float16))
    Buffers(model, None, {"seen": "mean"}).take([{"seen": torch.full((1,), most, dtype=torch.float16)}] * 4)
    assert model.seen.item() == most


def test_running_statistics_are_told() -> None:
    model = nn.BatchNorm1d(2)
    buffers = Buffers(model, None, {"running_mean": "statistics", "num_batches_tracked": "alike"})
    (found,) = buffers.statistics()
    assert found is model.running_mean


# --- rows that are no part of a batch


def test_what_a_stand_in_does_is_undone_but_for_what_is_alike() -> None:
    rules: dict[str, Rule] = {"seen": "sum", "mean": "statistics", "calls": "alike", "mine": "own"}
    model = holder(**{name: torch.zeros(1) for name in rules})
    buffers = Buffers(model, None, rules)
    buffers.begin(standing_in=True)
    for buffer in model.buffers():
        buffer += 1
    buffers.stood_in()
    assert {name: buffer.item() for name, buffer in model.named_buffers()} == {
        "seen": 0, "mean": 0, "calls": 1, "mine": 0,
    }  # fmt: skip


# --- which are there


def test_buffers_of_a_loss_have_a_name_of_their_own() -> None:
    model, loss = nn.Sequential(holder(seen=torch.zeros(2))), holder(weight=torch.ones(2))
    assert list(buffers_of(model, loss)) == ["0.seen", "loss.weight"]


def test_a_buffer_of_both_is_the_models() -> None:
    shared = torch.zeros(2)
    assert list(buffers_of(holder(seen=shared), holder(seen=shared))) == ["seen"]


def test_a_loss_that_is_no_module_has_none() -> None:
    assert list(buffers_of(holder(seen=torch.zeros(2)), nn.functional.mse_loss)) == ["seen"]


def test_sparse_buffers_are_left_alone() -> None:
    assert buffers_of(holder(table=torch.eye(2).to_sparse())) == {}


# --- rules


class Norm(nn.BatchNorm1d):
    """A heir of one of torch's layers."""


NORMS = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.InstanceNorm1d(2, track_running_stats=True), Norm(2)]


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_torchs_layers_have_rules_of_their_own(norm: nn.Module) -> None:
    model = nn.Sequential(norm)
    names = list(buffers_of(model))
    assert rules_for(model, None, names, names, {}) == {
        "0.running_mean": "statistics", "0.running_var": "statistics", "0.num_batches_tracked": "alike",
    }  # fmt: skip


def test_statistics_that_are_synchronised_are_alike() -> None:
    model = nn.SyncBatchNorm(2)
    names = list(buffers_of(model))
    assert set(rules_for(model, None, names, names, {}).values()) == {"alike"}


def test_a_name_alone_says_nothing() -> None:
    model = holder(running_mean=torch.zeros(2))
    with pytest.raises(ModelError, match=r"changes a buffer in forward by the rows it sees.*: running_mean"):
        rules_for(model, None, ["running_mean"], ["running_mean"], {})


def test_what_changes_alike_needs_no_rule_and_what_stays_has_none() -> None:
    model = holder(calls=torch.zeros(1), table=torch.ones(2))
    assert rules_for(model, None, ["calls"], [], {}) == {"calls": "alike"}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_was_chosen_holds(rule: str) -> None:
    model = holder(seen=torch.zeros(1))
    assert rules_for(model, None, ["seen"], ["seen"], {"seen": rule}) == {"seen": rule}


def test_it_holds_for_a_buffer_that_did_not_change_yet() -> None:
    assert rules_for(holder(queue=torch.zeros(1)), None, [], [], {"queue": "first"}) == {"queue": "first"}


def test_it_holds_against_what_a_layer_is_known_for() -> None:
    model = nn.BatchNorm1d(2)
    names = list(buffers_of(model))
    assert rules_for(model, None, names, names, {"running_*": "first"})["running_mean"] == "first"


def test_patterns_name_several_and_the_first_that_fits_counts() -> None:
    model = nn.Sequential(holder(seen=torch.zeros(1)), holder(seen=torch.zeros(1)))
    names = list(buffers_of(model))
    assert rules_for(model, None, names, names, {"1.*": "max", "*.seen": "sum"}) == {"0.seen": "sum", "1.seen": "max"}


def test_buffers_of_a_loss_can_have_rules() -> None:
    loss = holder(seen=torch.zeros(1))
    assert rules_for(nn.Linear(1, 1), loss, ["loss.seen"], ["loss.seen"], {"loss.seen": "sum"}) == {"loss.seen": "sum"}


def test_a_rule_for_no_buffer_is_refused() -> None:
    with pytest.raises(InputError, match="a rule for 'sene', but the model has no such buffer; it has seen"):
        rules_for(holder(seen=torch.zeros(1)), None, [], [], {"sene": "sum"})


def test_all_that_lack_a_rule_are_named() -> None:
    model = holder(one=torch.zeros(1), two=torch.zeros(1))
    with pytest.raises(ModelError, match=r"2 buffers .*: one, two\.(.|\n)*buffers=\{'one': rule\}"):
        rules_for(model, None, ["one", "two"], ["one", "two"], {})


@pytest.mark.parametrize("given", [["seen"], {1: "sum"}, "sum"])
def test_what_is_no_table_of_rules_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="must be a dict from names of buffers to rules"):
        check_rules(given)


@pytest.mark.parametrize("given", ["average", "alike", "statistics", None])
def test_a_rule_that_there_is_not_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="must be one of 'mean', 'sum', 'max', 'min', 'first', 'own'"):
        check_rules({"seen": given})


def test_no_rules_are_none() -> None:
    assert check_rules(None) == check_rules({}) == {}
    assert check_rules({"*.seen": "sum"}) == {"*.seen": "sum"}


# --- what changes without a rule


def test_a_buffer_that_changes_without_a_rule_is_told_once() -> None:
    model = holder(seen=torch.zeros(2), ruled=torch.zeros(2))
    buffers = Buffers(model, None, {"ruled": "sum"})
    assert buffers.surprises() == []
    model.seen += 1
    model.ruled += 1
    assert buffers.surprises() == ["seen"]
    assert buffers.surprises() == []


def test_another_tensor_in_its_place_is_a_change_too() -> None:
    model = holder(seen=torch.zeros(2))
    buffers = Buffers(model, None, {})
    model.seen = torch.ones(2)
    assert buffers.surprises() == ["seen"]


def test_the_same_values_once_more_are_no_change() -> None:
    model = holder(seen=torch.ones(2))
    buffers = Buffers(model, None, {})
    model.seen.fill_(1.0)
    model.seen = torch.ones(2)
    assert buffers.surprises() == []


def test_what_somebody_else_has_set_is_taken_for_known() -> None:
    model = holder(seen=torch.zeros(2))
    buffers = Buffers(model, None, {})
    model.seen += 1
    buffers.forget()
    assert buffers.surprises() == []


def test_one_element_of_a_large_one_is_noticed() -> None:
    model = holder(mask=torch.zeros(1 << 17, dtype=torch.bool))
    buffers = Buffers(model, None, {})
    model.mask[12_345] = True
    assert buffers.surprises() == ["mask"]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [([1.0, 2.0], [1.0, 2.0], True), ([1.0, 2.0], [2.0, 1.0], False), ([1.0, 2.0], [1.0, 2.5], False)],
)
def test_marks_are_the_same_for_the_same_values_alone(one: list[float], other: list[float], equal: bool) -> None:
    marks = [Buffers(holder(seen=torch.tensor(row)), None, {"seen": "alike"}).alike() for row in (one, other)]
    assert (marks[0] == marks[1]) is equal


# --- marks of values that cannot be added up

STRANGE: dict[str, Tensor] = {
    "a causal mask": torch.full((4, 4), -INF).triu(1),
    "a value that is unknown": torch.tensor([NAN, 1.0, INF, -INF]),
    "complex": torch.tensor([1 + 2j, NAN, 3j, INF]),
    "complex, conjugated": torch.tensor([1 + 2j, 1.0, 3j, 0]).conj(),
    "whole numbers": torch.tensor([2**62, 1, 2, 3]),
    "truths": torch.tensor([True, False, True, True]),
    "half": torch.tensor([NAN, 65504.0, 0.0, -0.0], dtype=torch.float16),
    "eight bits": torch.tensor([NAN, 1.0, 2.0, 3.0]).to(torch.float8_e4m3fn),
    "large": torch.cat([torch.full((2,), NAN), torch.zeros(1 << 21), torch.tensor([INF])]),
    "transposed": torch.tensor([[1.0, INF], [2.0, NAN]]).t(),
}


def alike(buffer: Tensor) -> list[float]:
    return Buffers(holder(seen=buffer), None, {"seen": "alike"}).alike()


@pytest.mark.parametrize("name", STRANGE)
def test_marks_are_finite_and_the_same_for_the_same_values(name: str) -> None:
    (mark,) = alike(STRANGE[name])
    assert mark == int(mark) < 2**32  # a mean of several equal ones is exact
    assert alike(STRANGE[name].clone()) == [mark]
    assert alike(STRANGE[name].contiguous().clone()) == [mark]


@pytest.mark.parametrize("name", STRANGE)
def test_each_change_of_an_element_changes_them(name: str) -> None:
    flat = STRANGE[name].resolve_conj().reshape(-1)
    for place in {0, 1, len(flat) // 2, len(flat) - 1}:
        for other in (-1.0, 0.0, NAN, INF):
            changed = flat.clone()
            changed[place] = True if flat.dtype is torch.bool else other if flat.is_floating_point() else 7
            equal = torch.equal(changed.view(torch.uint8), flat.view(torch.uint8))
            same_zero = bool(changed[place] == flat[place])
            unknown = bool((changed[place] != changed[place]) & (flat[place] != flat[place]))
            assert (alike(changed) == alike(flat)) is (equal or same_zero or unknown)


@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64)])
def test_another_shape_or_type_is_another_value(other: Tensor) -> None:
    assert alike(other) != alike(torch.zeros(1, 4))


def test_a_small_change_of_large_numbers_counts() -> None:
    large = torch.full((3,), 1e200, dtype=torch.float64)
    changed = large.clone()
    changed[1] = 1e200 * (1 + 2**-52)
    assert alike(changed) != alike(large)


@pytest.mark.parametrize("name", STRANGE)
def test_the_same_strange_values_once_more_are_no_change(name: str) -> None:
    model = holder(seen=STRANGE[name].clone())
    buffers = Buffers(model, None, {})
    model.seen.copy_(STRANGE[name])
    assert buffers.surprises() == []
    model.seen = torch.ones_like(model.seen)
    assert buffers.surprises() == ["seen"]


class Masked(nn.Module):
    """Writes its mask anew in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), -INF).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        self.mask.copy_(torch.full((4, 4), -INF).triu(1))
        return (self.mask.softmax(1) @ self.layer(x).unsqueeze(2)).squeeze(2)


class Adding(nn.Module):
    """Adds up a complex number by the rows it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("turn", torch.tensor([1.0 + 1j]))

    def forward(self, x: Tensor) -> Tensor:
        self.turn.add_(0.1j * len(x))
        return self.layer(x)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mask_that_is_written_anew_is_no_change(workers: int) -> None:
    data = torch.randn(32, 4), torch.randn(32, 4)
    with pk.connect("inline") as pool:
        run = pk.train(Masked(), data, on=pool, loss=nn.MSELoss(), batch_size=16, epochs=2, workers=workers)
        assert run.wait(30, progress=False).status == "finished"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_complex_sum_is_that_of_all_rows(workers: int) -> None:
    data = torch.randn(32, 4), torch.randn(32, 4)
    with pk.connect("inline") as pool:
        run = pk.train(
            Adding(), data, on=pool, loss=nn.MSELoss(), batch_size=16, epochs=2, workers=workers,
            buffers={"turn": "sum"},
        )  # fmt: skip
        run.wait(30, progress=False)
        assert run.model.turn.item() == pytest.approx(1 + 1j + 0.1j * 64)  # type: ignore[union-attr]
