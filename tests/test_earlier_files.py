"""Files that earlier versions wrote are still read: checkpoints, histories and studies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import parakit as pk
from parakit.checkpoints import load

EARLIER = Path(__file__).parent / "data" / "earlier"
STEPS, MORE = 5, 4


@pytest.fixture(scope="module")
def inline() -> Iterator[pk.Workers]:
    with pk.connect("inline") as workers:
        yield workers


def trained(workers: pk.Workers, steps: int, resume: Path | None = None) -> pk.Run:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    inputs = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = pk.train(
        model, (inputs, (inputs.sum(1) > 0).long()), on=workers, workers=1, batch_size=8, steps=steps, seed=0, chunks=4,
        learning_rate=None if resume else 0.1, resume=resume, optimizer=rate_of_then if resume else None,
    )  # fmt: skip
    return run.wait(30, progress=False)


def rate_of_then(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def test_a_run_goes_on_from_an_earlier_checkpoint(inline: pk.Workers) -> None:
    assert load(EARLIER / "step-000000000005.parakit").step == STEPS
    run = trained(inline, STEPS + MORE, EARLIER / "step-000000000005.parakit")
    whole = trained(inline, STEPS + MORE)
    assert [step.step for step in run.history.steps] == list(range(STEPS, STEPS + MORE))
    for mine, other in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_an_earlier_history_is_read_and_told() -> None:
    records = json.loads((EARLIER / "history.json").read_text(encoding="utf-8"))
    history = pk.History.from_dicts(records)
    assert len(list(history)) == len(records)
    requests = history.of(pk.events.Requested)
    assert {"resize", "learning rate", "measure", "pause", "resume", "stop"} == {r.request for r in requests}
    assert [event.to_dict()["kind"] for event in requests] == ["Requested"] * len(requests)
    told = [pk.events.sentence(event) for event in history]
    assert any("2 workers asked for" in (sentence or "") for sentence in told)


def test_an_earlier_study_is_read_fitted_and_priced() -> None:
    study = pk.Scaling.load(EARLIER / "study.json")
    assert study.workers == (1, 2)
    assert len(study.measurements) > 0
    assert "strong scaling, batch of 256" in repr(study)
    assert study.costs.step_seconds(1) > 0
    assert study.fit("amdahl", crowded=True).predict(2) > 0
