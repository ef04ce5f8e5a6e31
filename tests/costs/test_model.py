"""The mechanistic cost model: its terms, what it says, and its calibration from the events of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import parakit as pk
from parakit.collectives.base import ExchangeMethod
from parakit.costs import collectives
from parakit.costs.breakdown import TERMS
from parakit.costs.model import CostModel
from parakit.costs.networks import MACHINES, NETWORKS, Network, find_machine, find_network
from parakit.costs.order_statistics import maximum_normal
from parakit.errors import InputError
from parakit.events.history import History
from parakit.events.records import Resized, RunStart, SegmentDone, StepDone, WorkerStep
from parakit.pacing import segment_seconds

QUIET = CostModel(sample_seconds=1e-3, batch_size=240, nbytes=4e6, network=Network("test", 1e-4, 1e9, "made up"))


def test_a_step_is_its_terms_in_order() -> None:
    costs = QUIET.with_(fixed_seconds=2e-3, update_seconds=1e-3, control_seconds=0.01, spread=0.1)
    parts = costs.breakdown(8)
    assert parts.compute_seconds == pytest.approx(0.002 + 30 * 1e-3)
    assert parts.waiting_seconds == pytest.approx(0.032 * 0.1 * maximum_normal(8))
    assert parts.exchange_seconds == pytest.approx(collectives.ring(8, 4e6, costs.network.link))
    assert parts.update_seconds == 1e-3
    assert parts.step_seconds == pytest.approx(sum(parts.seconds().values())) == costs.step_seconds(8)
    steps = round(segment_seconds(0.01) / (parts.step_seconds - parts.control_seconds))
    assert parts.control_seconds == pytest.approx(0.01 / steps)
    assert sum(parts.share(term) for term in TERMS) == pytest.approx(1)
    assert costs.throughput(8) == costs.predict(8) == pytest.approx(240 / parts.step_seconds)


def test_workers_that_shared_memory_use_a_ring_on_a_network_that_is_named() -> None:
    shared = QUIET.with_(algorithm="shared memory", divided_update=True, network="shared memory")
    apart = shared.with_(network="10GbE")
    assert (apart.algorithm, apart.divided_update) == ("ring", False)
    assert shared.with_(network="shared memory") == shared
    assert shared.with_(network="10GbE", algorithm="shared memory").algorithm == "shared memory"
    nodes = shared.with_(machine="server, 16 cores", network="10GbE")
    assert nodes.algorithm == "shared memory"  # within a node


def test_arrays_hold_what_single_counts_give() -> None:
    costs = QUIET.with_(spread=0.1, stragglers=0.02, cores=4, control_seconds=0.01)
    counts = [1, 2, 3, 7, 64, 1024]
    assert costs.throughput(counts).tolist() == pytest.approx([costs.throughput(n) for n in counts])
    assert costs.speedup(counts)[0] == 1
    assert isinstance(costs.speedup(4), float)


def test_perfect_workers_scale_linearly_as_long_as_shares_are_even() -> None:
    ideal = QUIET.with_(nbytes=0, network=Network("none", 0.0, 1e12, "made up"))
    assert ideal.speedup([1, 2, 8, 240]).tolist() == pytest.approx([1, 2, 8, 240])
    assert ideal.speedup(7) == pytest.approx(240 / 35)  # the largest share is 35 rows
    assert ideal.breakdown(7).waiting_seconds > 0


def test_workers_beyond_the_cores_take_turns() -> None:
    ideal = QUIET.with_(nbytes=0, cores=4, network=Network("none", 0.0, 1e12, "made up"))
    assert ideal.speedup([1, 2, 4, 8, 16]).tolist() == pytest.approx([1, 2, 4, 4, 4])
    nodes = ideal.with_(workers_per_node=4)
    assert nodes.speedup(16) == pytest.approx(16)
    assert ideal.with_(threads=2).crowding(4) == 2
    assert "4 threads to a core" in ideal.explain(16)


def test_busy_cores_slow_each_other_down() -> None:
    costs = QUIET.with_(contention=0.1, cores=4, fixed_seconds=1e-3)
    assert costs.breakdown(1).compute_seconds == pytest.approx(1e-3 + 240e-3)
    assert costs.breakdown(4).compute_seconds == pytest.approx(61e-3 * 1.3)
    assert costs.with_(update_seconds=2e-3).breakdown(4).update_seconds == pytest.approx(2e-3 * 1.3)
    assert costs.with_(workers_per_node=2).breakdown(4).compute_seconds == pytest.approx(61e-3 * 1.1)
    assert costs.with_(cores=None).breakdown(4).compute_seconds == pytest.approx(1e-3 + 60e-3)


def test_buckets_hide_an_exchange_behind_the_backward_pass() -> None:
    link = Network("test", 0.0, 1e9, "made up")
    costs = QUIET.with_(network=link, phases=(0.0, 0.4, 0.6), buckets=10)
    whole = collectives.ring(8, 4e6, link.link)  # 7 ms, less than the 16 ms of 9/10 of the backward pass
    assert costs.breakdown(8).exchange_seconds == pytest.approx(whole / 10)
    late = costs.with_(batch_size=24)  # the backward pass hides 0.9 * 0.6 * 3 ms
    assert late.breakdown(8).exchange_seconds == pytest.approx(whole - 1.62e-3)
    # An overlap never more than halves a step.
    for n in (2, 8, 64):
        assert 1 < costs.with_(buckets=1).step_seconds(n) / costs.step_seconds(n) <= 2
    # Each bucket pays its own latency.
    assert QUIET.with_(buckets=100).step_seconds(64) > QUIET.step_seconds(64)


def test_nodes_whose_workers_share_memory_exchange_within_as_one_node_does() -> None:
    memory = QUIET.with_(algorithm="shared memory", workers_per_node=4, network=Network("fast", 0.0, 1e15, "made up"),
                         within=QUIET.network)  # fmt: skip
    assert memory.exchange_seconds(8) == pytest.approx(memory.exchange_seconds(4), rel=1e-4)
    assert memory.exchange_seconds(4) == pytest.approx(collectives.shared_memory(4, 4e6, QUIET.network.link))


def test_strategies() -> None:
    local = QUIET.with_(strategy="local SGD", local_steps=16, spread=0.2)
    each = QUIET.with_(spread=0.2)
    assert local.breakdown(8).exchange_seconds == pytest.approx(each.breakdown(8).exchange_seconds / 16)
    assert local.breakdown(8).waiting_seconds == pytest.approx(each.breakdown(8).waiting_seconds / 4)
    server = QUIET.with_(strategy="parameter server", servers=2)
    expected = collectives.parameter_server(8, 4e6, QUIET.network.link, servers=2)
    assert server.breakdown(8).exchange_seconds == pytest.approx(expected)
    weak = QUIET.with_(weak=True)
    assert weak.breakdown(8).compute_seconds == QUIET.breakdown(1).compute_seconds
    assert weak.throughput(8) > QUIET.throughput(8)


def test_local_steps_average_stragglers_too() -> None:
    generator = np.random.default_rng(0)
    luck = (1 + 0.1 * generator.standard_normal((4000, 8, 50))) * np.where(
        generator.random((4000, 8, 50)) < 0.05, 3.0, 1.0
    )
    drawn = luck.mean(axis=2).max(axis=1).mean()
    model = QUIET.with_(strategy="local SGD", local_steps=50, spread=0.1, stragglers=0.05).breakdown(8)
    assert (model.compute_seconds + model.waiting_seconds) / model.compute_seconds == pytest.approx(drawn, rel=0.02)


def test_advice_is_what_the_changes_do() -> None:
    bound_by_exchange = QUIET.with_(nbytes=400e6)
    gains = bound_by_exchange.gains(16)
    assert list(gains.values()) == sorted(gains.values(), reverse=True)
    half = bound_by_exchange.with_(nbytes=200e6).throughput(16) / bound_by_exchange.throughput(16)
    assert gains["half the bytes (compression)"] == pytest.approx(half)
    words = bound_by_exchange.explain(16)
    assert words.startswith("Exchange is 98 % of a step at 16 workers")
    best = max(gains, key=gains.__getitem__)
    assert f"Most would help: {best} ({gains[best]:.2f} times" in words
    useless = words[words.index("No help") :]
    assert "cores twice as fast" in useless
    assert "twice as many workers" in useless
    assert "Waiting for the slowest worker" in QUIET.with_(nbytes=0, stragglers=0.05, straggler_times=9.0).explain(64)
    assert "Computing is" in QUIET.explain(1)


def test_what_if_by_name() -> None:
    far = QUIET.with_(network="infiniband hdr", batch_size=480)
    assert far.network is NETWORKS["InfiniBand HDR"]
    assert QUIET.batch_size == 240
    node = QUIET.with_(machine="dgx h100")
    assert (node.workers_per_node, node.ports, node.network.name) == (8, 8, "InfiniBand NDR")
    assert node.within is NETWORKS["NVLink 4"]
    assert QUIET.with_(machine="DGX H100", network="1GbE").network is NETWORKS["1GbE"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": "1GbE"}, "has no networks"),
        ({"network": "carrier pigeon"}, "'loopback', 'shared memory'"),
        ({"machine": "abacus"}, "'DGX A100', 'DGX H100'"),
        ({"algorithm": "gossip"}, "no exchange algorithm"),
        ({"strategy": "hope"}, "no strategy 'hope'"),
        ({"stragglers": 1.0}, "stragglers is 1.0"),
        ({"straggler_times": 0.5}, "straggler_times"),
        ({"batch_size": 0}, "batch_size"),
        ({"sample_seconds": -1.0}, "sample_seconds"),
        ({"sample_seconds": 0.0}, "no time"),
        ({"relative_speed": 0.0}, "above 0"),
        ({"workers_per_node": 1.5}, "workers_per_node"),
        ({"phases": (1.0, 1.0, 1.0)}, "add up to 1"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QUIET.with_(**change)


def test_every_preset_has_a_source_and_is_found_by_its_name_in_any_case() -> None:
    for name, network in NETWORKS.items():
        assert find_network(name.upper()) is network
        assert network.source
        assert network.sped_up(2).link.message_seconds(1e6) == pytest.approx(network.link.message_seconds(1e6) / 2)
    for name, machine in MACHINES.items():
        assert find_machine(name.lower()) is machine
        assert find_network(machine.between).name == machine.between
        assert find_network(machine.within).name == machine.within
    own = Network("mine", 1e-6, 1e9, "measured")
    assert find_network(own) is own
    with pytest.raises(InputError, match="bandwidth"):
        Network("broken", 1e-6, 0.0, "made up")


def test_it_shows_itself() -> None:
    assert repr(QUIET) == "<CostModel: 1 ms a sample, batch 240, 4 MB by ring over test (100 µs, 1 GB/s)>"
    page = QUIET.with_(remarks=("a < b",))._repr_html_()
    assert "a &lt; b" in page
    assert page.count("<tr>") == 8


# --- calibration

TRUTH = {"sample": 2e-3, "fixed": 3e-3, "update": 1e-3, "latency": 2e-4, "rate": 5e8, "spread": 0.08}
PARAMETERS = 500_000


def history(
    counts: Sequence[int],
    *,
    cores: int = 8,
    exchanged: str = "gloo",
    simulated: bool = False,
    stragglers: float = 0.0,
    steps: int = 60,
    contention: float = 0.0,
    partial: bool = False,
    slow_half: float = 1.0,
    told_by_groups: bool = False,
) -> History:
    """Events of a run whose cost is known, as a group of real workers would have told it; or as older files do."""
    generator = np.random.default_rng(5)
    found = History()
    found.append(
        RunStart(
            0.0, "AllReduce()", ("a",), "inline? no: a name says nothing", cores, 1, PARAMETERS, 9600, 64, 240, 999, 40,
            0, "" if told_by_groups else exchanged, simulated,
        )
    )  # fmt: skip
    at, method = 0.0, ExchangeMethod.of(exchanged)
    for generation, n in enumerate(counts):
        if told_by_groups:
            found.append(Resized(at, 0, generation, ("a",) * n, 0, 0.1, 0.0, method.way, method.divided))
        crowding = max(1.0, n / cores)
        slowdown = 1 + contention * (min(n, cores) - 1)
        for step in range(steps):
            share = (240 if step % 3 or not partial else 80) // n
            luck = 1 + TRUTH["spread"] * generator.standard_normal(n)
            luck *= np.where(generator.random(n) < stragglers, 4.0, 1.0)
            luck *= 1.0 if step < steps / 2 else slow_half
            took = (TRUTH["fixed"] + share * TRUTH["sample"]) * slowdown * luck * crowding * (1 + 0.5 * (step < 2))
            update = TRUTH["update"] * crowding * slowdown / (n if "divided" in exchanged else 1)
            swap = collectives.ring(n, 4 * PARAMETERS, collectives.Link(TRUTH["latency"], 1 / TRUTH["rate"]))
            parts = tuple(
                WorkerStep(f"w{rank}", 0.1 * t, 0.3 * t, 0.6 * t, swap, update, took.max() - t, share)
                for rank, t in enumerate(took.tolist())
            )
            seconds = float(took.max()) + swap + update
            at += seconds
            found.append(StepDone(at, step, 0, 1.0, 240, seconds, 0.1, n, generation, parts))
        found.append(SegmentDone(at, 0, steps, at, 0.02, 0.0, 240 * steps, n, generation))
    return found


def test_a_history_of_several_worker_counts_gives_every_term() -> None:
    costs = CostModel.from_history(history([1, 2, 4, 8]))
    assert costs.sample_seconds == pytest.approx(TRUTH["sample"], rel=0.03)
    assert costs.fixed_seconds == pytest.approx(TRUTH["fixed"], rel=0.35)
    assert costs.update_seconds == pytest.approx(TRUTH["update"])
    assert costs.control_seconds == pytest.approx(0.02)
    assert costs.spread == pytest.approx(TRUTH["spread"], rel=0.1)
    assert costs.network.latency_seconds == pytest.approx(TRUTH["latency"])
    assert costs.network.bytes_per_second == pytest.approx(TRUTH["rate"])
    assert costs.phases == pytest.approx((0.1, 0.3, 0.6))
    assert (costs.nbytes, costs.batch_size, costs.cores, costs.stragglers) == (4 * PARAMETERS, 240, 8, 0.0)
    assert len(costs.remarks) == 1


def test_inside_and_beyond_what_was_measured_it_predicts_a_step() -> None:
    costs = CostModel.from_history(history([1, 2, 4, 8]), cores=None)
    for n, tolerance in ((2, 0.03), (8, 0.03), (16, 0.05), (30, 0.1)):
        measured = history([n], cores=64, steps=200)
        seconds = np.mean([step.seconds for step in measured.steps[3:]])
        parts = costs.breakdown(n)
        assert parts.step_seconds - parts.control_seconds == pytest.approx(seconds, rel=tolerance)


def test_stragglers_and_crowding_are_told_from_the_rest() -> None:
    costs = CostModel.from_history(history([4, 8], stragglers=0.03, steps=300))
    assert costs.stragglers == pytest.approx(0.03, rel=0.25)
    assert costs.straggler_times == pytest.approx(4, rel=0.1)
    assert costs.spread == pytest.approx(TRUTH["spread"], rel=0.15)
    crowded = CostModel.from_history(history([1, 2, 4, 8], cores=2))
    assert crowded.sample_seconds == pytest.approx(TRUTH["sample"], rel=0.03)
    assert crowded.crowding(8) == 4


def test_what_one_worker_count_cannot_tell_is_assumed_and_said() -> None:
    one = CostModel.from_history(history([4]))
    assert one.fixed_seconds == 0
    swap = collectives.ring(4, 4 * PARAMETERS, collectives.Link(TRUTH["latency"], 1 / TRUTH["rate"]))
    assert one.exchange_seconds(4) == pytest.approx(swap)
    assert "fixed cost" in one.remarks[0]
    assert "4 workers only" in one.remarks[1]
    alone = CostModel.from_history(history([1]))
    assert alone.network is NETWORKS["loopback"]
    assert any("spread" in remark for remark in alone.remarks)
    assert any("that of loopback" in remark for remark in alone.remarks)
    assert CostModel.from_history(history([2, 4], exchanged="in turns")).network is NETWORKS["loopback"]


@pytest.mark.parametrize(
    ("said", "priced"),
    [
        ("shared memory", "shared memory"), ("shared memory, divided update", "shared memory"),
        ("gloo", "ring"), ("tasks", "ring"), ("in turns", "ring"), ("", "ring"),
        ("recursive doubling", "recursive doubling"),
    ],
)  # fmt: skip
def test_a_run_says_itself_how_it_exchanges(said: str, priced: str) -> None:
    found = CostModel.from_history(history([2, 4], exchanged=said))
    assert found.algorithm == priced
    assert any("tasks" in remark for remark in found.remarks) == (said == "tasks")
    assert CostModel.from_history(history([2, 4], exchanged=said), algorithm="binomial tree").algorithm == (
        "binomial tree"
    )
    assert CostModel.from_history(history([1], exchanged="shared memory")).network is NETWORKS["shared memory"]


def test_what_was_calibrated_from_simulated_runs_says_so() -> None:
    found = CostModel.from_history([history([2, 4]), history([8], simulated=True)])
    assert found.simulated
    assert repr(found).startswith("<CostModel (simulated): ")
    assert "simulated" in found._repr_html_()
    assert not CostModel.from_history(history([2, 4])).simulated


def how_it_exchanges(run: pk.Run) -> tuple[str, bool]:
    """What the newest group of a run says, and whether it is simulated."""
    start, formed = run.history.latest(RunStart), run.history.latest(Resized)
    assert start is not None
    assert formed is not None
    return str(ExchangeMethod(formed.exchange, formed.divided_update)), start.simulated


def test_each_group_says_how_it_exchanges_whatever_the_start_says() -> None:
    found = history([1, 2, 4, 8], exchanged="shared memory, divided update", told_by_groups=True)
    start = found.latest(RunStart)
    assert start is not None
    assert start.exchange == ""
    costs = CostModel.from_history(found)
    assert (costs.algorithm, costs.divided_update) == ("shared memory", True)
    assert costs == CostModel.from_history(history([1, 2, 4, 8], exchanged="shared memory, divided update"))
    read = CostModel.from_history(History.from_json(found.to_json()))
    assert read == costs


def test_what_is_said_of_groups_that_exchange_counts_more_than_of_a_worker_alone() -> None:
    found = history([1, 2, 4], exchanged="gloo", told_by_groups=True)
    found.append(Resized(0.0, 0, 0, ("a",), 0, 0.1, 0.0, "shared memory", divided_update=True))
    assert CostModel.from_history(found).algorithm == "ring"
    alone = history([1], exchanged="shared memory, divided update", told_by_groups=True)
    costs = CostModel.from_history(alone)
    assert (costs.algorithm, costs.divided_update) == ("shared memory", True)


@pytest.mark.dask
@pytest.mark.parametrize(
    ("strategy", "exchanged", "algorithm"),
    [
        (pk.strategies.AllReduce(), "shared memory, divided update", "shared memory"),
        (pk.strategies.AllReduce(shard=False), "shared memory", "shared memory"),
        (pk.strategies.AllReduce(exchange="gloo"), "gloo", "ring"),
    ],
)
def test_local_workers_are_calibrated_by_the_exchange_that_they_use(
    pool: pk.Workers, strategy: Any, exchanged: str, algorithm: str
) -> None:
    assert pool.one_host
    data = pk.datasets.digits().train
    run = pk.train(torch.nn.Linear(64, 10), data, on=pool, workers=2, steps=60, strategy=strategy)
    run.wait(60, progress=False)
    assert how_it_exchanges(run) == (exchanged, False)
    assert CostModel.from_history(run.history).algorithm == algorithm


@pytest.mark.parametrize(
    ("on", "strategy", "exchanged"),
    [
        ("inline", pk.strategies.AllReduce(), "in turns"),
        ("inline", pk.strategies.MapReduce(), "in turns"),
        ("simulated", pk.strategies.AllReduce(), "ring"),
        ("simulated", pk.strategies.MapReduce(), "tasks"),
    ],
)
def test_pools_in_this_process_say_how_they_exchange(on: str, strategy: Any, exchanged: str) -> None:
    with pk.connect("inline") if on == "inline" else pk.simulated(4) as workers:
        run = pk.train(torch.nn.Linear(64, 10), pk.datasets.digits().train, on=workers, steps=2, strategy=strategy)
        assert how_it_exchanges(run.wait(60, progress=False)) == (exchanged, on == "simulated")


@pytest.mark.parametrize("counts", [[1], [4]])
def test_what_slows_many_steps_in_a_row_is_no_spread_between_workers(counts: list[int]) -> None:
    steady, shaken = (CostModel.from_history(history(counts, steps=400, slow_half=times)) for times in (1.0, 1.5))
    assert steady.spread == pytest.approx(TRUTH["spread"], rel=0.1)
    assert shaken.spread == pytest.approx(TRUTH["spread"], rel=0.15)


def test_busy_cores_are_told_from_fixed_costs_where_batches_have_several_sizes() -> None:
    costs = CostModel.from_history(history([1, 2, 4, 8], contention=0.1, partial=True, steps=300))
    assert costs.contention == pytest.approx(0.1, rel=0.15)
    assert costs.fixed_seconds == pytest.approx(TRUTH["fixed"], rel=0.2)
    assert costs.update_seconds == pytest.approx(TRUTH["update"], rel=0.1)
    assert costs.sample_seconds == pytest.approx(TRUTH["sample"], rel=0.03)
    alike = CostModel.from_history(history([1, 2, 4, 8], contention=0.1, steps=300))
    assert alike.contention == 0
    assert any("busy cores" in remark for remark in alike.remarks)
    # Which of the two is blamed makes no difference to the batch that was measured.
    assert alike.computing_seconds(8, 30) == pytest.approx(costs.computing_seconds(8, 30), rel=0.03)


def test_an_update_that_is_divided_is_told_from_a_whole_one() -> None:
    whole = QUIET.with_(update_seconds=8e-3, contention=0.1, cores=4)
    divided = whole.with_(divided_update=True)
    assert whole.updating_seconds([1, 2, 4]).tolist() == pytest.approx([8e-3, 8.8e-3, 10.4e-3])
    assert divided.updating_seconds([1, 2, 4, 8]).tolist() == pytest.approx([8e-3, 4.4e-3, 2.6e-3, 2.6e-3])
    # Over nodes, nothing is in common.
    nodes = divided.with_(workers_per_node=4)
    assert nodes.updating_seconds([4, 8]).tolist() == pytest.approx([2.6e-3, 10.4e-3])
    found = CostModel.from_history(history([1, 2, 4, 8], exchanged="shared memory, divided update"))
    assert found.divided_update
    assert found.update_seconds == pytest.approx(TRUTH["update"])
    assert found.updating_seconds(8) == pytest.approx(TRUTH["update"] / 8)
    assert not CostModel.from_history(history([1, 2])).divided_update


def test_several_histories_are_one_calibration() -> None:
    together = CostModel.from_history([history([n]) for n in (1, 2, 4, 8)], algorithm="Ring", network="1GbE")
    assert together.sample_seconds == pytest.approx(TRUTH["sample"], rel=0.03)
    assert together.network is NETWORKS["1GbE"]


def test_a_history_that_cannot_calibrate_is_refused() -> None:
    with pytest.raises(InputError, match="no start"):
        CostModel.from_history(History())
    with pytest.raises(InputError, match="no 8 steps"):
        CostModel.from_history(history([2], steps=7))
    with pytest.raises(InputError, match="not from str"):
        CostModel.from_history(["run"])  # type: ignore[list-item]
