"""Evaluation: sums that add up over shares, and a model that is left as it was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from parakit.data.samples import Samples
from parakit.engines.evaluation import Evaluation, Tally, tally
from parakit.losses.forms import summing_form

ROWS, CLASSES = 23, 3


def problem(*shape: int) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(4, CLASSES).double(), torch.randn(ROWS, *shape, 4, dtype=torch.float64)


def judged(model: nn.Module, loss: Any, inputs: Any, targets: torch.Tensor, rows_at_once: int = 5) -> Tally:
    with torch.no_grad():
        made = summing_form(loss, model(inputs), targets)
    return tally(model, made, Samples(inputs, targets), rows_at_once)


LABELS = torch.arange(ROWS) % CLASSES


@pytest.mark.parametrize("rows_at_once", [1, 5, 22, 23, 1000])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda output, target: F.cross_entropy(output, target),
    ],
    ids=["mean", "weights", "sum", "function"],
)
def test_loss_and_accuracy_are_those_of_all_samples_at_once(loss: Any, rows_at_once: int) -> None:
    model, inputs = problem()
    found = judged(model, loss, inputs, LABELS, rows_at_once).result()
    output = model(inputs).detach()
    assert found.loss == pytest.approx(loss(output, LABELS).item(), rel=1e-12)
    assert found.accuracy == (output.argmax(1) == LABELS).double().mean().item()
    assert found.samples == ROWS


def test_ignored_labels_count_neither_for_nor_against() -> None:
    model, inputs = problem()
    loss = nn.CrossEntropyLoss(ignore_index=1)
    found = judged(model, loss, inputs, LABELS)
    output, kept = model(inputs).detach(), LABELS != 1
    assert found.judged == int(kept.sum())
    assert found.result().accuracy == (output.argmax(1) == LABELS)[kept].double().mean().item()
    assert found.result().loss == pytest.approx(loss(output, LABELS).item(), rel=1e-12)


def test_a_label_of_one_byte_is_not_mistaken_for_the_ignored_one() -> None:
    output = torch.zeros(ROWS, 200)
    output[:, 156] = 1  # -100 in eight bits
    targets = torch.full((ROWS,), 156, dtype=torch.uint8)
    assert judged(nn.Identity(), nn.CrossEntropyLoss(), output, targets).result().accuracy == 1


def test_every_place_of_an_image_is_judged() -> None:
    model, inputs = nn.Conv2d(2, CLASSES, 1).double(), torch.randn(ROWS, 2, 3, 2, dtype=torch.float64)
    targets = torch.randint(CLASSES, (ROWS, 3, 2), generator=torch.Generator().manual_seed(0))
    targets[::2, 0] = -100
    found = judged(model, nn.CrossEntropyLoss(), inputs, targets)
    kept = targets != -100
    assert (found.judged, found.samples) == (int(kept.sum()), ROWS)
    right = (model(inputs).argmax(1) == targets)[kept]
    assert found.result().accuracy == right.double().mean().item()


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_yes_or_no_is_judged_place_by_place(kind: str) -> None:
    model, inputs = problem()
    loss: nn.Module = nn.BCEWithLogitsLoss()
    if kind == "probabilities":
        model, loss = nn.Sequential(model, nn.Sigmoid()), nn.BCELoss()
    targets = F.one_hot(LABELS, CLASSES).double()
    found = judged(model, loss, inputs, targets).result()
    output = model(inputs).detach()
    yes = output > (0.0 if kind == "logits" else 0.5)
    assert found.accuracy == (yes == targets.bool()).double().mean().item()
    assert found.loss == pytest.approx(loss(output, targets).item(), rel=1e-12)


def test_a_regression_has_no_accuracy() -> None:
    model, inputs = problem()
    targets = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    found = judged(model, nn.MSELoss(), inputs, targets).result()
    assert found.accuracy is None
    assert found.loss == pytest.approx(F.mse_loss(model(inputs), targets).item(), rel=1e-12)
    assert "accuracy" not in repr(found)


@pytest.mark.parametrize("cuts", [[11], [1, 2], [7, 8, 20]], ids=str)
def test_the_tallies_of_uneven_shares_add_up_to_the_whole(cuts: list[int]) -> None:
    model, inputs = problem()
    loss = summing_form(nn.CrossEntropyLoss(ignore_index=1), model(inputs).detach(), LABELS)
    samples = Samples(inputs, LABELS)
    shares = [samples.slice(a, b) for a, b in zip([0, *cuts], [*cuts, ROWS], strict=True)]
    together = sum((tally(model, loss, share) for share in shares), Tally())
    whole = tally(model, loss, samples)
    assert together.loss_sum == pytest.approx(whole.loss_sum, rel=1e-12)
    assert (together.count, together.correct, together.judged, together.samples) == (
        whole.count,
        whole.correct,
        whole.judged,
        ROWS,
    )


def test_nothing_added_to_a_tally_changes_nothing() -> None:
    with_classes, without = Tally(1.5, 3.0, 2, 3, 3), Tally(1.5, 3.0, None, 0, 3)
    assert Tally() + with_classes == with_classes + Tally() == with_classes
    assert Tally() + without == without
    assert without.result().accuracy is None


def test_a_model_is_evaluated_in_its_calm_and_left_in_the_mode_it_was_in() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _, inputs = problem()
    loss = summing_form(nn.CrossEntropyLoss(), torch.zeros(ROWS, CLASSES), LABELS)
    first, again = (tally(model, loss, Samples(inputs, LABELS), 4) for _ in range(2))
    assert first == again  # dropout would have drawn anew
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    assert first.result().loss == pytest.approx(F.cross_entropy(model(inputs), LABELS).item(), rel=1e-12)


def test_the_modes_come_back_even_if_the_model_fails() -> None:
    model, inputs = nn.Sequential(nn.Linear(3, CLASSES), nn.Dropout()).double().train(), problem()[1]
    loss = summing_form(nn.CrossEntropyLoss(), torch.zeros(ROWS, CLASSES), LABELS)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tally(model, loss, Samples(inputs, LABELS))
    assert all(module.training for module in model.modules())


def test_an_evaluation_says_what_was_found() -> None:
    assert repr(Evaluation(0.12345, 0.975, 40)) == "<Evaluation: loss 0.1235, accuracy 97.50%, 40 samples>"
    assert repr(Evaluation(0.5, None, 40)) == "<Evaluation: loss 0.5000, 40 samples>"
