"""Losses as sums: over any split of a batch into shares, they give what torch gives for the whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from parakit.errors import DataError, LossError
from parakit.losses.forms import draws_of, find_form, summing_form
from parakit.losses.summed import SummedLoss
from parakit.preflight.labels import check_labels, check_shapes

CLASSES = 3
IGNORED = 1
WEIGHTS = torch.tensor([0.2, 1.5, 3.0], dtype=torch.float64)

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch on the mean of KLDivLoss

Maker = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # (rows, generator) to (output, target)


def normal(*shape: int, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def numbers(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, 4, g=g), normal(rows, 4, g=g)


def chances(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, 4, g=g).sigmoid(), (normal(rows, 4, g=g) > 0).double()


def flags(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, 4, g=g), (normal(rows, 4, g=g) > 0).double()


def signs(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, 4, g=g), normal(rows, 4, g=g).sign()


def distributions(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, CLASSES, g=g).log_softmax(1), normal(rows, CLASSES, g=g).softmax(1)


def positive(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, 4, g=g), normal(rows, 4, g=g).abs()


def label_sets(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lists of labels that end at -1, as MultiLabelMarginLoss has them."""
    some = torch.stack([torch.randperm(CLASSES, generator=g) for _ in range(rows)])
    some[:, -1] = -1
    return normal(rows, CLASSES, g=g), some


def labels(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, CLASSES, g=g), torch.randint(CLASSES, (rows,), generator=g)


def likelihoods(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    output, target = labels(rows, g)
    return output.log_softmax(1), target


def label_images(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, CLASSES, 2, 3, g=g), torch.randint(CLASSES, (rows, 2, 3), generator=g)


def likelihood_images(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    output, target = label_images(rows, g)
    return output.log_softmax(1), target


def probabilities(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, CLASSES, g=g), normal(rows, CLASSES, g=g).softmax(1)


def probability_images(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rows, CLASSES, 2, 3, g=g), normal(rows, CLASSES, 2, 3, g=g).softmax(1)


# The loss as a user would make it for a reduction, and what it is given.
ELEMENTWISE: dict[str, tuple[Callable[..., nn.Module], Maker]] = {
    "mse": (nn.MSELoss, numbers),
    "l1": (nn.L1Loss, numbers),
    "smooth l1": (nn.SmoothL1Loss, numbers),
    "huber": (lambda **how: nn.HuberLoss(delta=0.3, **how), numbers),
    "bce": (nn.BCELoss, chances),
    "bce, weights": (lambda **how: nn.BCELoss(weight=torch.arange(1.0, 5), **how), chances),
    "bce of logits": (nn.BCEWithLogitsLoss, flags),
    "bce of logits, weights": (lambda **how: nn.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 5), **how), flags),
    "kl": (nn.KLDivLoss, distributions),
    "kl of logs": (lambda **how: nn.KLDivLoss(log_target=True, **how), numbers),
    "poisson": (lambda **how: nn.PoissonNLLLoss(full=True, **how), positive),
    "soft margin": (nn.SoftMarginLoss, signs),
    "multilabel margin": (nn.MultiLabelMarginLoss, label_sets),
    "multilabel soft margin": (nn.MultiLabelSoftMarginLoss, flags),
    "multi margin": (lambda **how: nn.MultiMarginLoss(weight=WEIGHTS, **how), labels),
    "hinge embedding": (nn.HingeEmbeddingLoss, signs),
}
WEIGHTED: dict[str, tuple[Callable[..., nn.Module], Maker]] = {
    "ce": (nn.CrossEntropyLoss, labels),
    "ce, weights": (lambda **how: nn.CrossEntropyLoss(weight=WEIGHTS, **how), labels),
    "ce, ignored": (lambda **how: nn.CrossEntropyLoss(ignore_index=IGNORED, **how), labels),
    "ce, smoothed": (lambda **how: nn.CrossEntropyLoss(label_smoothing=0.2, **how), labels),
    "ce, weights, ignored, smoothed": (
        lambda **how: nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=IGNORED, label_smoothing=0.2, **how),
        labels,
    ),
    "ce, probabilities": (nn.CrossEntropyLoss, probabilities),
    "ce, probabilities, weights, smoothed": (
        lambda **how: nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2, **how),
        probabilities,
    ),
    "ce, images": (nn.CrossEntropyLoss, label_images),
    "ce, images, weights, ignored": (
        lambda **how: nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=IGNORED, **how),
        label_images,
    ),
    "ce, images of probabilities": (lambda **how: nn.CrossEntropyLoss(weight=WEIGHTS, **how), probability_images),
    "nll": (nn.NLLLoss, likelihoods),
    "nll, weights, ignored": (lambda **how: nn.NLLLoss(weight=WEIGHTS, ignore_index=IGNORED, **how), likelihoods),
    "nll, images, weights": (lambda **how: nn.NLLLoss(weight=WEIGHTS, **how), likelihood_images),
}
CASES: dict[str, tuple[nn.Module, Maker]] = {
    f"{name}, {reduction}": (make(reduction=reduction), data)
    for name, (make, data) in (ELEMENTWISE | WEIGHTED).items()
    for reduction in ("mean", "sum")
} | {"kl, batchmean": (nn.KLDivLoss(reduction="batchmean"), distributions)}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def over_shares(loss: SummedLoss, output: Tensor, target: Tensor, cuts: list[int]) -> tuple[float, Tensor]:
    """Loss and gradient from the sums of the shares between some cuts, divided once."""
    leaf = output.detach().clone().requires_grad_()
    ends = sorted({0, len(output), *cuts})
    sums, count = torch.zeros((), dtype=torch.float64), 0.0
    for first, end in pairwise(ends):
        share = loss(leaf[first:end], target[first:end])
        sums, count = sums + share.value * share.weight, count + share.count
    (gradient,) = torch.autograd.grad(sums, leaf)
    return float(sums.detach()) / (count or 1.0), gradient / (count or 1.0)


def assert_same_over_shares(loss: SummedLoss, original: Any, output: Tensor, target: Tensor, cuts: list[int]) -> None:
    leaf = output.detach().clone().requires_grad_()
    whole = original(leaf, target)
    (expected,) = torch.autograd.grad(whole, leaf)
    value, gradient = over_shares(loss, output, target, cuts)
    assert value == pytest.approx(float(whole.detach()), rel=1e-12, abs=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12)
@given(rows=st.integers(2, 9), seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 8), max_size=3))
def test_the_sums_of_any_shares_give_the_loss_of_the_whole(name: str, rows: int, seed: int, cuts: list[int]) -> None:
    original, data = CASES[name]
    output, target = data(rows, generator(seed))
    if getattr(original, "ignore_index", -100) == IGNORED:
        target[0] = 0  # torch's own mean over nothing but ignored labels is not a number
    loss = summing_form(original, output, target)
    assert_same_over_shares(loss, original, output, target, [cut for cut in cuts if cut < rows])


def test_every_known_loss_is_tried_here() -> None:
    from parakit.losses.summed import ELEMENTWISE, WEIGHTED

    assert {type(loss) for loss, _ in CASES.values()} == {*ELEMENTWISE, *WEIGHTED}


@pytest.mark.parametrize("name", [name for name in WEIGHTED if "ignored" in name])
def test_a_share_with_nothing_but_ignored_labels_adds_nothing(name: str) -> None:
    make, data = WEIGHTED[name]
    output, target = data(8, generator(3))
    target[:3], target[3:] = IGNORED, 2
    loss = summing_form(make(), output, target)
    share = loss(output[:3], target[:3])
    assert share.total == share.count == 0.0
    assert_same_over_shares(loss, make(), output, target, [3])


@pytest.mark.parametrize("name", CASES)
def test_the_users_loss_stays_as_it_is(name: str) -> None:
    original, data = CASES[name]
    reduction = original.reduction
    summing_form(original, *data(5, generator(0)))
    assert original.reduction == reduction


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0])], ids=["plain", "weights"])
def test_labels_of_one_byte_count_like_any_others(weight: Tensor | None) -> None:
    output, target = labels(6, generator(1))
    original = nn.CrossEntropyLoss(weight=weight).double()
    loss = summing_form(original, output, target.to(torch.uint8))
    assert_same_over_shares(loss, original, output, target.to(torch.uint8), [2])


def test_a_label_of_one_byte_is_not_mistaken_for_the_ignored_one() -> None:
    output, target = normal(4, 200, g=generator(1)), torch.full((4,), 156, dtype=torch.uint8)  # -100 in eight bits
    original = nn.CrossEntropyLoss()
    assert_same_over_shares(summing_form(original, output, target), original, output, target, [1])


FORMS: dict[str, tuple[nn.Module, Maker, str]] = {
    "classes": (nn.CrossEntropyLoss(), labels, "weighted"),
    "numbers": (nn.MSELoss(), numbers, "mean"),
    "batchmean": (nn.KLDivLoss(reduction="batchmean"), distributions, "mean"),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), labels, "sum"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_known_loss_is_known_by_its_form(name: str) -> None:
    known, data, form = FORMS[name]
    loss = summing_form(known, *data(5, generator(0)))
    assert loss.form == form
    assert loss.original == type(known).__name__


class Cubed(nn.Module):
    """A loss of one's own, with a constant that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64), requires_grad=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (self.scale * (output - target).abs().pow(3)).mean()


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Maker, str]] = {
    "cross_entropy": (F.cross_entropy, labels, "weighted"),
    "nll_loss": (F.nll_loss, likelihoods, "weighted"),
    "mse_loss": (F.mse_loss, numbers, "mean"),
    "l1_loss": (F.l1_loss, numbers, "mean"),
    "smooth_l1_loss": (F.smooth_l1_loss, numbers, "mean"),
    "huber_loss": (F.huber_loss, numbers, "mean"),
    "binary_cross_entropy": (F.binary_cross_entropy, chances, "mean"),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, flags, "mean"),
    "one's own mean": (lambda output, target: (output - target).pow(4).mean(), numbers, "mean"),
    "one's own sum": (lambda output, target: (output - target).pow(4).sum(), numbers, "sum"),
    "torch's in a wrapping": (lambda output, target: F.cross_entropy(output, target), labels, "mean"),
    "torch's sum in a wrapping": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), labels, "sum"),
    "a signed mean": (lambda output, target: (output * target).mean(), numbers, "mean"),
    "one's own module": (Cubed(), flags, "mean"),
    "one number in a vector": (lambda o, t: (o - t).pow(2).mean().reshape(1), numbers, "mean"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_recognised_by_its_form(name: str) -> None:
    function, data, form = FUNCTIONS[name]
    output, target = data(7, generator(4))
    loss = summing_form(function, output, target)
    assert loss.form == form
    assert_same_over_shares(loss, function, output, target, [2, 3])


def test_parts_of_an_output_may_come_in_a_tree() -> None:
    def both(output: dict[str, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output["class"], target[0]) + F.mse_loss(output["box"], target[1])

    g = generator(5)
    output = {"class": normal(6, CLASSES, g=g), "box": normal(6, 2, g=g)}
    target = (torch.randint(CLASSES, (6,), generator=g), normal(6, 2, g=g))
    loss = summing_form(both, output, target)
    share = loss(output, target)
    assert loss.form == "mean"
    assert share.total / share.count == pytest.approx(float(both(output, target)))


def test_one_sample_alone_is_taken_for_a_mean() -> None:
    output, target = numbers(1, generator(0))
    assert summing_form(lambda o, t: (o - t).abs().sum(), output, target).form == "mean"


class Trainable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (self.scale * (output - target)).pow(2).mean()


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    """Each sample is told from all the others."""
    return F.cross_entropy(output @ output.t(), torch.arange(len(output)))


BAD: dict[str, tuple[Any, Maker, str]] = {
    "reduction none": (nn.CrossEntropyLoss(reduction="none"), labels, r"a tensor of shape \(6,\)"),
    "no reduction": (lambda o, t: (o - t).pow(2), numbers, r"a tensor of shape \(6, 4\)"),
    "no tensor": (lambda o, t: (o - t).pow(2).mean().item(), numbers, "needs one number"),
    "nothing": (lambda *_: None, numbers, "returned None"),
    "a class": (nn.CrossEntropyLoss, labels, "give an instance"),
    "a name": ("cross_entropy", labels, "'cross_entropy', which cannot be called"),
    "None": (None, labels, "cannot be called"),
    "parameters of its own": (Trainable(), numbers, "Trainable has trainable parameters"),
    "shapes that do not fit": (nn.CrossEntropyLoss(), lambda n, g: (normal(n, 3, g=g), torch.zeros(n + 1).long()),
                               "the targets are int64 of shape"),
    "labels for numbers": (nn.BCEWithLogitsLoss(), labels, "cannot be computed"),
    "too few arguments": (nn.CosineEmbeddingLoss(), numbers, "TypeError"),
    "a square of weighted means": (lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS) ** 2, labels, "neither a mean"),
    "a pair of no numbers": (lambda o, t: (o, t), numbers, r"may return \(sum, count\)"),
    "a negative count": (lambda o, t: ((o - t).sum(), -1), numbers, r"may return \(sum, count\)"),
    "a count of one share": (lambda o, t: ((o - t).square().sum(), 3.0), numbers, "do not add up over samples"),
    "samples compared": (contrastive, labels, "neither a mean nor a sum over samples: on 6 samples"),
    "a root of a mean": (lambda o, t: F.mse_loss(o, t).sqrt(), numbers, "neither a mean nor a sum"),
    "the largest": (lambda o, t: (o - t).abs().max(), numbers, "neither a mean nor a sum"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_add_up_over_samples_is_refused(name: str) -> None:
    loss, data, reason = BAD[name]
    with pytest.raises(LossError, match=reason):
        summing_form(loss, *data(6, generator(4)))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.L1Loss, nn.HingeEmbeddingLoss, nn.PoissonNLLLoss])
def test_a_column_against_a_row_compares_all_samples_and_is_refused(kind: Any, reduction: str) -> None:
    output, target = normal(6, 1, g=generator(0)), normal(6, g=generator(1)).sign()
    with pytest.raises(LossError):
        check_shapes(kind(reduction=reduction), output, target)


def test_a_loss_of_zero_is_not_accused_of_comparing_samples() -> None:
    output, target = numbers(6, generator(0))
    with pytest.raises(LossError) as refusal:
        summing_form(lambda o, t: (o - t).abs().mean() * 0, output, target)
    assert "neither" not in str(refusal.value)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.NLLLoss(reduction="sum"), F.cross_entropy], ids=["object", "sum", "function"]
)
@pytest.mark.parametrize("wrong", [-1, 3, 7])
def test_labels_without_a_class_are_refused_with_their_row(loss: Any, wrong: int) -> None:
    targets = torch.tensor([0, 1, 2, wrong, wrong])
    with pytest.raises(DataError, match=rf"data has the label {wrong} at row 3, .* 3 classes, 0 to 2; 2 labels"):
        check_labels(loss, torch.zeros(6, CLASSES), targets, "data")


def test_labels_without_a_class_are_found_in_images() -> None:
    output, target = label_images(4, generator(0))
    target[2, 1, 0] = 9
    with pytest.raises(DataError, match="label 9 at row 2"):
        check_labels(nn.CrossEntropyLoss(), output, target, "data")


def test_labels_that_fit_or_are_ignored_or_are_no_labels_pass() -> None:
    output = torch.zeros(6, CLASSES)
    check_labels(nn.CrossEntropyLoss(), output, torch.tensor([0, 2, -100]), "data")
    check_labels(nn.CrossEntropyLoss(ignore_index=9), output, torch.tensor([0, 2, 9]), "data")
    check_labels(nn.CrossEntropyLoss(), output, torch.full((6, CLASSES), 99.0), "data")  # probabilities
    check_labels(nn.MSELoss(), output, torch.full((6, CLASSES), 99), "data")
    check_labels(lambda o, t: (o[:, 0] - t).abs().mean(), output, torch.tensor([99]), "data")


def test_a_loss_that_knows_its_labels_counts_them_without_a_look() -> None:
    output, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 2])
    ignoring = summing_form(nn.CrossEntropyLoss(ignore_index=1), output, labels)
    plain = summing_form(nn.CrossEntropyLoss(), output, labels)
    weighted = summing_form(nn.CrossEntropyLoss(weight=torch.ones(3)), output, labels)
    assert plain.knowing(labels, labels).form == "mean"
    assert plain.knowing(labels)(output, labels).count == plain(output, labels).count == 4.0
    assert ignoring.knowing(labels) is ignoring  # one of them is left out
    assert ignoring.knowing(labels[:2]).form == "mean"
    assert ignoring.knowing(labels[:2], labels) is ignoring  # in the second of all targets that there are
    assert weighted.knowing(labels) is weighted
    assert plain.knowing(torch.tensor([-100, 0], dtype=torch.int64)) is plain
    assert plain.knowing(torch.tensor([[0.5, 0.5]])) is plain  # probabilities
    pixels = torch.randint(3, (2, 5, 5))
    of_pixels = plain.knowing(pixels)(torch.randn(2, 3, 5, 5), pixels)
    assert (of_pixels.weight, of_pixels.count) == (2.0, 2.0)  # a mean over as many places for each row


HEADS: dict[str, tuple[Callable[..., Any], str]] = {
    "in a function": (lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS), "weighted calls"),
    "of two heads": (
        lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS) + 0.5 * F.cross_entropy(-o, t, weight=WEIGHTS),
        "weighted calls",
    ),
    "ignoring a label": (lambda o, t: F.cross_entropy(o, t, ignore_index=1), "weighted calls"),
    "beside a mean": (lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS) + o.square().mean(), "several means"),
    "with other weights": (
        lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS) + F.cross_entropy(-o, t, ignore_index=1),
        "several means",
    ),
    "as sum and count": (
        lambda o, t: (F.cross_entropy(o, t, weight=WEIGHTS, reduction="sum"), WEIGHTS[t].sum()),
        "counted",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_class_weights_are_exact_one_step_away_from_torchs_object(name: str) -> None:
    function, form = HEADS[name]
    output, target = labels(9, generator(6))
    target[:3] = torch.tensor([0, 1, 2])
    loss = summing_form(function, output, target)
    assert loss.form == form
    if form == "several means":
        return  # workers have to meet in the middle of it: test_same_as_plain.py
    whole = function(output, target)
    expected = whole[0] / whole[1] if isinstance(whole, tuple) else whole
    value, _ = over_shares(loss, output, target, [2, 6])
    assert value == pytest.approx(float(expected), rel=1e-12)


def test_a_label_that_is_ignored_somewhere_counts_although_no_draw_has_it() -> None:
    output, target = labels(6, generator(7))
    function = HEADS["ignoring a label"][0]
    target[:] = 0
    draw = partial(summing_form, function)
    assert draw(output, target).form == "mean"
    found = find_form(function, draws_of(output, target), lambda label: label == 1)
    assert found.form == "weighted calls"
