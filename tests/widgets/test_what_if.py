"""What if: sliders and pictures over a cost model, which say that nothing in them is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import parakit as pk
from parakit.costs.model import CostModel
from parakit.errors import InputError

COSTS = CostModel(sample_seconds=1e-3, batch_size=256, nbytes=4e6, network="1GbE", update_seconds=1e-3)


def test_it_begins_as_it_is_and_says_that_it_is_simulated() -> None:
    shown = pk.what_if(COSTS, workers=8)
    assert shown.model is COSTS
    assert shown.text.startswith("Simulated, not measured")
    assert COSTS.explain(8) in shown.text
    assert "simulated" in repr(shown)
    assert bytes(shown.picture.value).startswith(b"\x89PNG")


def test_sliders_change_the_model_and_the_picture_at_once() -> None:
    shown = pk.what_if(COSTS, workers=16)
    before = shown.picture.value
    shown.bandwidth.value = 10.0
    assert shown.picture.value != before
    assert shown.model.network.bytes_per_second == pytest.approx(1.25e9)
    shown.size.value, shown.batch.value, shown.stragglers.value = 40.0, 512.0, 0.05
    assert (shown.model.nbytes, shown.model.batch_size, shown.model.stragglers) == (40e6, 512, 0.05)
    shown.latency.value = 1000.0
    assert shown.model.network.latency_seconds == pytest.approx(1e-3)
    times = shown.model.throughput(16) / COSTS.throughput(16)
    assert f"That is {times:.2f} times the samples/s of 16 workers as it is." in shown.text
    shown.workers.value = 64
    assert "at 64 workers" in shown.text
    shown.reset.click()
    assert shown.model is COSTS
    assert shown.workers.value == 16


def test_the_most_need_not_be_a_power_of_two() -> None:
    shown = pk.what_if(COSTS, workers=3, most=100)
    assert shown.workers.options == (1, 2, 3, 4, 8, 16, 32, 64, 100)


def test_a_run_or_its_history_will_do(inline: pk.Workers) -> None:
    import torch

    run = pk.train(torch.nn.Linear(64, 10), pk.datasets.digits().train, on=inline, workers=2, steps=60)
    run.wait(30, progress=False)
    expected = CostModel.from_history(run.history)
    assert pk.what_if(run).model == pk.what_if(run.history).model == expected


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("10GbE", {}, "str is nothing that costs can be told from"),
        (pk.History(), {}, "has no start of a run"),
        (COSTS, {"workers": 0}, "cannot begin with 0"),
        (COSTS, {"workers": 9, "most": 8}, "9 of at most 8"),
        (COSTS, {"workers": 2.5}, "2.5"),
    ],
)
def test_what_cannot_be_asked_is_refused(given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pk.what_if(given, **options)


def test_the_plot_of_costs_stacks_to_the_whole_step() -> None:
    ax = pk.plots.costs(COSTS, Figure().subplots(), workers=[64, 1, 8])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "8", "64"]
    tops = [max(bar.get_y() + bar.get_height() for bar in ax.patches[place::3]) for place in range(3)]
    assert tops == pytest.approx([100, 100, 100])
    labels = [text.get_text() for text in ax.texts]
    assert labels[1:] == [f"{1e3 * COSTS.step_seconds(n):.3g}" for n in (8, 64)]


def test_the_plot_of_what_ifs_draws_each_model() -> None:
    fast = COSTS.with_(network="100GbE")
    ax = pk.plots.what_if({"now": COSTS, "fast": fast}, Figure().subplots(), workers=64)
    lines = {str(line.get_label()): line for line in ax.lines}
    assert set(lines) == {"ideal", "now", "fast"}
    for name, model in (("now", COSTS), ("fast", fast)):
        counts, speedups = lines[name].get_data()
        np.testing.assert_allclose(speedups, model.speedup(counts))


def test_pictures_of_costs_from_simulated_runs_say_so() -> None:
    far = COSTS.with_(simulated=True)
    assert pk.plots.costs(far, Figure().subplots()).get_ylabel().endswith("(simulated)")
    assert pk.plots.what_if({"far": far}, Figure().subplots()).get_ylabel().endswith("(simulated)")
    assert far.explain(8).startswith("Simulated: ")
    for ax in (pk.plots.costs(COSTS, Figure().subplots()), pk.plots.what_if({"now": COSTS}, Figure().subplots())):
        assert "simulated" not in ax.get_ylabel()


def test_plots_refuse_what_is_no_cost_model() -> None:
    with pytest.raises(InputError, match="no cost model"):
        pk.plots.costs("1GbE")
    with pytest.raises(InputError, match="by their names"):
        pk.plots.what_if({})
    with pytest.raises(InputError, match="no worker counts"):
        pk.plots.costs(COSTS, workers=[])
