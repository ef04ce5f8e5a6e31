"""Exchanges: each formula against a schedule that is played round by round, and against bounds that none can beat."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from parakit.costs import collectives
from parakit.costs.collectives import ALGORITHMS, Link, all_reduce_seconds
from parakit.errors import InputError, WorkerCountError

LINK = Link(20e-6, 1e-9, 0.2e-9)
BYTES = 4_000_000
COUNTS = np.array([1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 1000, 1024])
# A server takes all messages at once, and memory is read without any: neither is bound by what pairs can do.
PAIRWISE = [name for name in ALGORITHMS if name not in ("lower bound", "shared memory", "parameter server")]


def played_ring(n: int) -> float:
    """Slices go round: in each of 2 (N - 1) rounds everybody sends one, and in the first half adds what came."""
    piece = BYTES / n
    rounds = [LINK.message_seconds(piece) + (piece * LINK.reduce_seconds_per_byte if r < n - 1 else 0)
              for r in range(2 * (n - 1))]  # fmt: skip
    return sum(rounds)


def played_halving(n: int) -> float:
    """For a power of two: swap halves, quarters, ..., then the same back without adding."""
    size, total = BYTES / 2, 0.0
    for _ in range(int(math.log2(n))):
        total += 2 * LINK.message_seconds(size) + size * LINK.reduce_seconds_per_byte
        size /= 2
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 64])
def test_a_ring_takes_as_long_as_its_rounds(n: int) -> None:
    assert collectives.ring(n, BYTES, LINK) == pytest.approx(played_ring(n))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 256])
def test_powers_of_two_take_as_long_as_their_rounds(n: int) -> None:
    rounds = int(math.log2(n))
    whole = LINK.message_seconds(BYTES) + BYTES * LINK.reduce_seconds_per_byte
    assert collectives.halving_doubling(n, BYTES, LINK) == pytest.approx(played_halving(n))
    assert collectives.recursive_doubling(n, BYTES, LINK) == pytest.approx(rounds * whole)
    assert collectives.binomial_tree(n, BYTES, LINK) == pytest.approx(rounds * (whole + LINK.message_seconds(BYTES)))


def test_other_numbers_pay_for_two_more_rounds() -> None:
    extra = 2 * LINK.message_seconds(BYTES) + BYTES * LINK.reduce_seconds_per_byte
    for algorithm in (collectives.halving_doubling, collectives.recursive_doubling):
        assert algorithm(7, BYTES, LINK) == pytest.approx(algorithm(4, BYTES, LINK) + extra)


@pytest.mark.parametrize("algorithm", PAIRWISE)
def test_no_algorithm_beats_the_lower_bound(algorithm: str) -> None:
    for nbytes in (0.0, 100.0, BYTES, 1e9):
        bound = all_reduce_seconds("lower bound", COUNTS, nbytes, LINK)
        assert np.all(all_reduce_seconds(algorithm, COUNTS, nbytes, LINK) >= bound - 1e-15)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_arrays_hold_what_single_counts_give_and_one_worker_exchanges_nothing(algorithm: str) -> None:
    found = all_reduce_seconds(algorithm, COUNTS, BYTES, LINK)
    assert found.dtype == np.float64
    singles = [all_reduce_seconds(algorithm, int(n), BYTES, LINK) for n in COUNTS]
    assert all(isinstance(single, float) for single in singles)
    assert found.tolist() == singles
    assert (singles[0] == 0) == (algorithm != "parameter server")


def test_which_algorithm_is_best_depends_on_the_message() -> None:
    names = ("ring", "recursive doubling", "halving-doubling")
    small = {name: all_reduce_seconds(name, 64, 100, LINK) for name in names}
    large = {name: all_reduce_seconds(name, 64, 1e9, LINK) for name in names}
    assert min(small, key=small.__getitem__) == "recursive doubling"
    assert max(small, key=small.__getitem__) == "ring"
    assert max(large, key=large.__getitem__) == "recursive doubling"
    assert large["ring"] == pytest.approx(large["halving-doubling"], rel=2e-3)


def test_the_number_of_pieces_in_a_tree_is_the_best_one() -> None:
    chosen = collectives.pipelined_tree(64, BYTES, LINK)
    others = [collectives.pipelined_tree(64, BYTES, LINK, pieces=pieces) for pieces in range(1, 200)]
    assert chosen == pytest.approx(min(others), rel=1e-9)
    assert collectives.pipelined_tree(64, BYTES, LINK, pieces=1) == collectives.binomial_tree(64, BYTES, LINK)


def test_servers_share_the_load_until_the_workers_links_are_full() -> None:
    few, many, more = (collectives.parameter_server(16, BYTES, Link(0, 1e-9), servers=s) for s in (1, 16, 32))
    assert few == pytest.approx(16 * many)
    assert many == more == pytest.approx(2 * BYTES * 1e-9)


def test_shared_memory_is_limited_by_a_worker_or_by_the_memory() -> None:
    assert collectives.shared_memory([2, 4, 8], BYTES, Link(0, 1e-9)) == pytest.approx(3 * [4e-3])
    assert collectives.shared_memory([2, 4, 8], BYTES, Link(0, 1e-9, 0, 0.5e-9)) == pytest.approx([4e-3, 8e-3, 16e-3])


def test_nodes() -> None:
    inside = Link(1e-6, 1e-11)
    one_node = collectives.hierarchical(8, BYTES, LINK, within=inside, workers_per_node=8)
    assert one_node == pytest.approx(collectives.ring(8, BYTES, inside))
    in_memory = {"within": inside, "workers_per_node": 8, "algorithm": "shared memory"}
    assert collectives.hierarchical(8, BYTES, LINK, **in_memory) == pytest.approx(
        collectives.shared_memory(8, BYTES, inside)
    )
    assert collectives.hierarchical(16, BYTES, Link(0, 1e-9), **in_memory) == pytest.approx(
        collectives.shared_memory(8, BYTES, inside) + BYTES / 8 * 1e-9
    )
    flat = collectives.hierarchical(8, BYTES, LINK, within=inside, workers_per_node=1)
    assert flat == pytest.approx(collectives.ring(8, BYTES, LINK))
    # With a port a worker, each of 8 slices goes over its own; with a single port, they follow one another.
    eight = collectives.hierarchical(64, BYTES, Link(0, 1e-9), within=Link(0, 0), workers_per_node=8, ports=8)
    single = collectives.hierarchical(64, BYTES, Link(0, 1e-9), within=Link(0, 0), workers_per_node=8, ports=1)
    assert eight == pytest.approx(2 * 7 / 8 * BYTES / 8 * 1e-9)
    assert single == pytest.approx(8 * eight)
    assert collectives.hierarchical(64, BYTES, LINK, within=inside, workers_per_node=8) < collectives.ring(
        64, BYTES, LINK
    )


@pytest.mark.parametrize("n", [0, -1, 0.5, math.nan, "two", [1, 0]])
def test_a_number_of_workers_that_cannot_be_is_refused(n: Any) -> None:
    with pytest.raises(WorkerCountError):
        collectives.ring(n, BYTES, LINK)


def test_names_are_found_in_any_writing_and_unknown_ones_are_refused_with_the_list() -> None:
    assert collectives.find_algorithm("Halving_Doubling") == "halving-doubling"
    with pytest.raises(InputError, match="'ring', 'recursive doubling'"):
        all_reduce_seconds("rings", 2, BYTES, LINK)
    with pytest.raises(InputError, match="latency_seconds"):
        Link(-1.0, 0.0)
    with pytest.raises(InputError, match="servers is 0"):
        collectives.parameter_server(2, BYTES, LINK, servers=0)
