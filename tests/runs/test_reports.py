"""What a run reports: an accuracy only where it means something, validation that goes through, schedules in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

import parakit as pk
from parakit.errors import DataError, ModelError
from parakit.events.records import EpochEnded

WORDS, LENGTH, ROWS = 12, 7, 90
LIMIT = 60


class Language(nn.Module):
    """Scores of each next word, (rows, words, vocabulary), in several forms."""

    def __init__(self, form: str = "a tensor") -> None:
        super().__init__()
        self.form = form
        self.embed, self.rnn = nn.Embedding(WORDS, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, WORDS)

    def forward(self, words: Tensor) -> Any:
        scores = self.head(self.rnn(self.embed(words))[0])
        return {"a tensor": scores, "a dict": {"logits": scores}, "a tuple": (scores, scores.mean())}[self.form]


def scores_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"] if isinstance(output, dict) else output[0]


def over_words(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(scores_of(output).reshape(-1, WORDS), target.reshape(-1))


def over_the_vocabulary(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(scores_of(output).transpose(1, 2), target)


def known_words(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(scores_of(output).flatten(0, 1), target.flatten(), ignore_index=3)


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return make()


def text(length: int) -> tuple[Tensor, Tensor]:
    words = seeded(lambda: torch.randint(WORDS, (ROWS, length)))
    return words, words.roll(-1, 1)


@pytest.mark.parametrize("length", [LENGTH, WORDS], ids=["short", "as many words as there are in the vocabulary"])
@pytest.mark.parametrize("form", ["a tensor", "a dict", "a tuple"])
@pytest.mark.parametrize("loss", [over_words, over_the_vocabulary, known_words])
def test_a_language_model_is_judged_word_by_word(inline: pk.Workers, loss: Any, form: str, length: int) -> None:
    words, following = text(length)
    model = seeded(lambda: Language(form).double())
    run = pk.train(
        model, (words, following), on=inline, workers=2, loss=loss, epochs=2, batch_size=32,
        validation=(words[:41], following[:41]),
    )  # fmt: skip
    run.wait(LIMIT, progress=False)
    with torch.no_grad():
        output = run.model.eval()(words[:41])
    counted = following[:41] != (3 if loss is known_words else -100)
    right = (scores_of(output).argmax(-1) == following[:41])[counted]
    validated = run.history.of(EpochEnded)
    assert [event.epoch for event in validated] == [0, 1]
    assert validated[-1].validation_accuracy == pytest.approx(right.double().mean().item(), abs=1e-12)
    assert validated[-1].validation_loss == pytest.approx(loss(output, following[:41]).item(), rel=1e-9)
    alone = pk.evaluate(run.model, (words[:41], following[:41]), on=inline, loss=loss)
    assert alone.loss == pytest.approx(validated[-1].validation_loss, rel=1e-9)
    assert alone.accuracy == validated[-1].validation_accuracy


# --- where an accuracy would mean nothing

QUANTILES = torch.tensor([0.1, 0.5, 0.9])


def pinball(output: Tensor, target: Tensor) -> Tensor:
    off = target[:, None] - output
    return torch.maximum(QUANTILES * off, (QUANTILES - 1) * off).mean()


def poisson(output: Tensor, target: Tensor) -> Tensor:
    return F.poisson_nll_loss(output[:, 0], target.to(output.dtype))


def two_heads(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :2], target % 2) + F.cross_entropy(output[:, 1:], target % 2)


def ordinal(output: Tensor, target: Tensor) -> Tensor:
    return (output - (target[:, None] > torch.arange(3)).to(output.dtype)).square().mean()


@pytest.mark.parametrize("loss", [pinball, poisson, two_heads, ordinal])
def test_no_accuracy_where_no_class_was_compared(inline: pk.Workers, loss: Any) -> None:
    inputs, targets = seeded(lambda: (torch.randn(ROWS, 6), torch.randint(3, (ROWS,))))
    run = pk.train(
        nn.Linear(6, 3), (inputs, targets), on=inline, workers=2, loss=loss, epochs=1, validation=(inputs, targets)
    ).wait(LIMIT, progress=False)
    found = run.history.latest(EpochEnded)
    assert found is not None
    assert found.validation_accuracy is None
    output = run.model(inputs).detach()
    assert found.validation_loss == pytest.approx(loss(output, targets).item(), rel=1e-5)


# --- validation that cannot go through is refused before a step is made


class OtherwiseInEvaluation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.auxiliary = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return (self.body(x), self.auxiliary(x)) if self.training else self.body(x)


def both(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output[0], target) + F.cross_entropy(output[1], target)


INPUTS, LABELS = torch.linspace(-1, 1, ROWS * 6).view(ROWS, 6), torch.arange(ROWS) % 3
UNFIT: dict[str, tuple[nn.Module, Any, Any, str]] = {
    "other outputs in evaluation": (OtherwiseInEvaluation(), both, (INPUTS, LABELS), "in evaluation the model returns"),
    "another number of columns": (nn.Linear(6, 3), nn.CrossEntropyLoss(), (INPUTS[:, :5], LABELS), r"\(5,\)"),
    "other types": (nn.Linear(6, 3), nn.CrossEntropyLoss(), (INPUTS.double(), LABELS), "float64"),
    "labels without a class": (nn.Linear(6, 3), nn.CrossEntropyLoss(), (INPUTS, LABELS + 1), "label 3"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_validation_that_cannot_go_through_is_refused_at_the_call(inline: pk.Workers, name: str) -> None:
    model, loss, held_out, told = UNFIT[name]
    with pytest.raises(DataError, match=told):
        pk.train(model, (INPUTS, LABELS), on=inline, loss=loss, epochs=1, validation=held_out)


# --- forward or a loss that differentiates, in evaluation too


class Energy(nn.Module):
    """Forces are what an energy's gradient is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (forces,) = torch.autograd.grad(self.body(x).sum(), x, create_graph=self.training)
        return forces


class Smooth(nn.Module):
    """A loss with the gradient of what it is given."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        inner = output.detach().requires_grad_()
        (slope,) = torch.autograd.grad(inner.square().sum(), inner)
        return (output * slope.sign() - target).square().mean()


@pytest.mark.parametrize("kind", ["forward", "loss"])
def test_gradients_are_there_in_validation(inline: pk.Workers, kind: str) -> None:
    model = seeded(lambda: Energy().double() if kind == "forward" else nn.Linear(6, 6).double())
    loss = nn.MSELoss() if kind == "forward" else Smooth()
    inputs = INPUTS.double()
    run = pk.train(
        model, (inputs, inputs.cos()), on=inline, workers=2, loss=loss, epochs=2, validation=(inputs, inputs.cos())
    ).wait(LIMIT, progress=False)
    found = run.history.latest(EpochEnded)
    trained = run.model.eval()
    assert found is not None
    assert found.validation_loss == pytest.approx(loss(trained(inputs), inputs.cos()).item(), rel=1e-9)
    assert found.validation_loss == pytest.approx(
        pk.evaluate(trained, (inputs, inputs.cos()), on=inline, loss=loss).loss, rel=1e-9
    )


# --- schedules that are stepped otherwise than they were made for

TOTAL, EPOCHS = 70, 10  # 7 batches an epoch


def one_cycle(length: int) -> Callable[[Any], Any]:
    return lambda optimizer: schedules.OneCycleLR(optimizer, max_lr=1.0, total_steps=length)


def cosine(length: int) -> Callable[[Any], Any]:
    return lambda optimizer: schedules.CosineAnnealingLR(optimizer, length)


def warm_up_and_cosine(length: int) -> Callable[[Any], Any]:
    def made(optimizer: Any) -> Any:
        parts = [schedules.LinearLR(optimizer, total_iters=2), schedules.CosineAnnealingLR(optimizer, length)]
        return schedules.SequentialLR(optimizer, parts, milestones=[2])

    return made


def scheduled(inline: pk.Workers, schedule: Any, **how: Any) -> pk.Run:
    rows = 7 * 32 - 5
    data = (torch.randn(rows, 6), torch.randint(3, (rows,)))
    return pk.train(
        nn.Linear(6, 3), data, on=inline, epochs=EPOCHS, batch_size=32, scheduler=schedule, **how
    ).wait(LIMIT, progress=False)  # fmt: skip


@pytest.mark.parametrize("make", [one_cycle, cosine, warm_up_and_cosine])
def test_a_schedule_made_for_steps_and_stepped_by_epochs_is_told(inline: pk.Workers, make: Any) -> None:
    with pytest.warns(UserWarning, match=r"70 steps of the schedule, but is stepped 10 times.*scheduler_every='step'"):
        scheduled(inline, make(TOTAL))


@pytest.mark.parametrize("make", [cosine, warm_up_and_cosine])
def test_a_schedule_made_for_epochs_and_stepped_by_steps_is_told(inline: pk.Workers, make: Any) -> None:
    with pytest.warns(UserWarning, match=r"10 steps of the schedule, but is stepped 70 times.*scheduler_every='epoch'"):
        scheduled(inline, make(EPOCHS), scheduler_every="step")


def test_a_cycle_that_would_end_within_the_run_is_refused_at_the_call(inline: pk.Workers) -> None:
    with pytest.raises(ModelError, match=r"made for 8 steps .* stepped 10 times") as refused:
        scheduled(inline, one_cycle(8))
    assert "make it for 10" in str(refused.value)


@pytest.mark.parametrize("make", [one_cycle, cosine, warm_up_and_cosine])
@pytest.mark.parametrize(("length", "every"), [(EPOCHS, "epoch"), (TOTAL, "step")])
def test_a_schedule_that_fits_is_not_remarked_on(inline: pk.Workers, make: Any, length: int, every: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = scheduled(inline, make(length), scheduler_every=every)
    rates = [step.learning_rate for step in run.history.steps]
    assert len(set(rates)) > 5
    assert rates[-1] < max(rates)
