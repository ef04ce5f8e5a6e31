"""Gradients as sums with a count, and the buffer that backward writes them into."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from parakit.data.samples import Samples
from parakit.gradients.forward import call_model
from parakit.gradients.gradient_buffer import GradientBuffer
from parakit.gradients.gradient_sum import GradientSum, flatten, unflatten_into
from parakit.losses.forms import summing_form
from parakit.losses.summed import ShareLoss, SummedLoss

ROWS = 10


def some_sum(seed: int, dtype: torch.dtype = torch.float64) -> GradientSum:
    g = torch.Generator().manual_seed(seed)
    return summed_up(torch.randn(5, generator=g, dtype=dtype), seed + 1.0, seed / 4)


def summed_up(total: torch.Tensor, count: float, loss_sum: float) -> GradientSum:
    return GradientSum(torch.cat([total, total.new_tensor([count, loss_sum, 0.0])]))


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, SummedLoss, Samples]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
        samples = Samples(torch.randn(ROWS, 4).to(dtype), torch.arange(ROWS) % 3)
    return model, summing_form(nn.CrossEntropyLoss(), torch.zeros(ROWS, 3), samples.targets), samples


def backward(
    buffer: GradientBuffer, model: nn.Module, loss: SummedLoss, share: Samples, unit: float = 1.0
) -> GradientSum:
    buffer.clear()
    buffer.begin()
    buffer.backward(loss.of_share(lambda: call_model(model, share.inputs), share.targets), unit)
    return buffer.sum


def test_parameters_go_when_nobody_uses_them_any_more() -> None:
    model, loss, samples = problem()
    buffer = GradientBuffer(list(model.parameters()))
    backward(buffer, model, loss, samples)
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, buffer
    gc.collect()
    assert [parameter() for parameter in parameters] == [None] * 4


def test_sums_add_in_every_part() -> None:
    a, b = some_sum(0), some_sum(3)
    both = a + b
    assert torch.equal(both.total, a.total + b.total)
    assert (both.count, both.loss_sum) == (5.0, 0.75)
    assert (a.count, b.count) == (1.0, 4.0)  # neither was touched


def test_sums_add_in_place() -> None:
    a, b = some_sum(0), some_sum(3)
    expected, vector = (a + b).vector.clone(), a.vector
    a += b
    assert a.vector is vector
    assert torch.equal(vector, expected)


def test_any_order_of_adding_gives_the_same_sum() -> None:
    a, b, c = some_sum(0), some_sum(1), some_sum(2)
    assert torch.allclose(((a + b) + c).vector, (c + (b + a)).vector, rtol=1e-15)


def test_what_is_noted_behind_a_gradient_is_the_same_where_numpy_cannot_write() -> None:
    written = []
    for by_numpy in (True, False):
        total = GradientSum(torch.zeros(9), flags=2)
        if not by_numpy:  # as where the vector is on a GPU
            total._numbers = total.vector[4:]
        total.note(ShareLoss(torch.tensor(1.25, requires_grad=True), 2.0, 7.0))
        total.note_used([1.0, 0.0])
        total.vote()
        assert (total.count, total.loss_sum, total.votes, total.used) == (7.0, 2.5, 1.0, [1.0, 0.0])
        total.note(ShareLoss(torch.tensor([1.5]), 1.0, 3.0))
        assert (total.count, total.loss_sum, total.votes) == (3.0, 1.5, 0.0)
        written.append(total.vector.tolist())
    assert written[0] == written[1] == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 3.0, 1.5, 0.0]


def test_votes_add_up() -> None:
    a, b, c = some_sum(0), some_sum(1), some_sum(2)
    assert a.votes == 0
    a.vote()
    c.vote()
    c.vote()  # a worker has one vote
    assert (a + b + c).votes == 2


def test_a_clone_shares_no_memory() -> None:
    a = some_sum(0)
    copy = a.clone()
    copy.total.zero_()
    assert a.total.abs().sum() > 0


def test_the_total_is_a_view() -> None:
    a = some_sum(0)
    a.total.fill_(7)
    assert a.vector[:5].tolist() == [7] * 5
    assert a.count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_survives_pickling_and_can_be_added_to(dtype: torch.dtype) -> None:
    a = some_sum(3, dtype)
    a.vote()
    a.unit = 4.0
    again = pickle.loads(pickle.dumps(a))
    assert again.vector.dtype == dtype
    assert torch.equal(again.vector, a.vector)
    assert again.unit == a.unit
    again += a
    assert again.count == 2 * a.count


def test_a_sum_that_arrives_read_only_can_be_added_to() -> None:
    make, (array, *others) = some_sum(1).__reduce__()
    array.setflags(write=False)
    arrived = make(array, *others)
    arrived += some_sum(1)
    assert arrived.count == 4
    assert not array.flags.writeable


def test_a_sum_says_what_it_holds() -> None:
    assert repr(summed_up(torch.zeros(5), 3.0, 1.25)) == "GradientSum(5 parameters, count=3, loss_sum=1.25)"


def test_tensors_survive_one_flat_vector() -> None:
    tensors = [torch.randn(2, 3), torch.randn(3, 2).t(), torch.randn(()), torch.randn(4).to(torch.bfloat16)]
    vector = flatten(tensors, torch.float64)
    assert (vector.shape, vector.dtype) == ((17,), torch.float64)
    blank = [torch.zeros_like(tensor) for tensor in tensors]
    unflatten_into(vector, blank)
    assert all(torch.equal(new, old) for new, old in zip(blank, tensors, strict=True))
    assert [new.dtype for new in blank] == [old.dtype for old in tensors]


def test_unflattening_writes_into_parameters() -> None:
    layer = nn.Linear(2, 2)
    places = [p.data_ptr() for p in layer.parameters()]
    unflatten_into(torch.arange(6.0), layer.parameters())
    assert layer.weight.tolist() == [[0, 1], [2, 3]]
    assert layer.bias.tolist() == [4, 5]
    assert [p.data_ptr() for p in layer.parameters()] == places


def test_backward_writes_into_the_vector() -> None:
    model, loss, samples = problem()
    buffer = GradientBuffer(list(model.parameters()))
    whole = backward(buffer, model, loss, samples)
    start, end = whole.total.data_ptr(), whole.total.data_ptr() + whole.total.nbytes
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert start <= parameter.grad.data_ptr() < end
    assert torch.equal(whole.total, flatten([p.grad for p in model.parameters()], torch.float64))
    plain = nn.functional.cross_entropy(model(samples.inputs), samples.targets, reduction="sum")
    expected = torch.autograd.grad(plain, list(model.parameters()))
    assert torch.allclose(whole.total, flatten(expected, torch.float64), rtol=1e-12)
    assert whole.count == ROWS
    assert whole.loss_sum == pytest.approx(plain.item(), rel=1e-12)


@pytest.mark.parametrize("cuts", [[5], [1], [1, 2, 9], [3, 7]], ids=str)
def test_the_sums_of_uneven_shares_divided_once_are_the_gradient_of_the_mean(cuts: list[int]) -> None:
    model, loss, samples = problem()
    buffer = GradientBuffer(list(model.parameters()))
    shares = [samples.slice(a, b) for a, b in zip([0, *cuts], [*cuts, ROWS], strict=True)]
    summed_up = sum((backward(buffer, model, loss, share).clone() for share in shares[1:]),
                    backward(buffer, model, loss, shares[0]).clone())  # fmt: skip
    said = buffer.load(summed_up)
    mean = nn.functional.cross_entropy(model(samples.inputs), samples.targets)
    expected = torch.autograd.grad(mean, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-12, atol=1e-15)
    assert said == pytest.approx(mean.item(), rel=1e-12)


def test_loading_ones_own_sum_divides_once() -> None:
    model, loss, samples = problem()
    buffer = GradientBuffer(list(model.parameters()))
    own = backward(buffer, model, loss, samples)
    before = own.total.clone()
    buffer.load(own)
    assert torch.equal(buffer.sum.total, before / ROWS)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("unit", [1.0, 4.0, float(ROWS)])
def test_whatever_the_unit_the_mean_is_the_same(unit: float, alone: bool) -> None:
    model, loss, samples = problem()
    mean = nn.CrossEntropyLoss()(model(samples.inputs), samples.targets)
    expected = torch.autograd.grad(mean, list(model.parameters()))
    buffer = GradientBuffer(list(model.parameters()))
    buffer.live_in(torch.zeros(buffer.numel, dtype=buffer.dtype), alone=alone)
    backward(buffer, model, loss, samples, unit)
    norm = sum(float(gradient.square().sum()) for gradient in expected)
    assert buffer.sum.divisor == ROWS / unit
    assert buffer.sum.mean_squared_norm == pytest.approx(norm, rel=1e-12)
    backward(buffer, model, loss, samples, unit)
    assert buffer.load(buffer.sum) == pytest.approx(mean.item(), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=0)


def test_sums_in_units_that_differ_are_not_added() -> None:
    a, b = some_sum(1), some_sum(2)
    b.unit = 2.0
    with pytest.raises(ValueError, match="of 1 and of 2 samples"):
        a + b
    with pytest.raises(ValueError, match="of 2 and of 1 samples"):
        b += a


def test_loading_another_sum_leaves_that_as_it_is() -> None:
    model, loss, samples = problem()
    buffer = GradientBuffer(list(model.parameters()))
    other = backward(buffer, model, loss, samples).clone()
    before = other.vector.clone()
    buffer.load(other)
    assert torch.equal(other.vector, before)


def test_a_loss_that_is_a_sum_is_not_divided() -> None:
    model, _, samples = problem()
    loss = summing_form(nn.CrossEntropyLoss(reduction="sum"), torch.zeros(ROWS, 3), samples.targets)
    buffer = GradientBuffer(list(model.parameters()))
    own = backward(buffer, model, loss, samples)
    before = own.total.clone()
    assert buffer.load(own) == own.loss_sum
    assert torch.equal(buffer.sum.total, before)


def test_gradients_do_not_pile_up() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model, loss, samples = problem(dtype)
        buffer = GradientBuffer(list(model.parameters()))
        once = backward(buffer, model, loss, samples).clone()
        assert torch.equal(backward(buffer, model, loss, samples).vector, once.vector)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((torch.float32,), torch.float32),
        ((torch.float64,), torch.float64),
        ((torch.bfloat16,), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
    ids=str,
)
def test_a_sum_is_at_least_of_single_precision(kinds: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    buffer = GradientBuffer([nn.Parameter(torch.zeros(2, dtype=kind)) for kind in kinds])
    assert buffer.sum.vector.dtype == expected


def test_half_precision_travels_in_single_precision_and_comes_back() -> None:
    model, loss, samples = problem(torch.bfloat16)
    buffer = GradientBuffer(list(model.parameters()))
    whole = backward(buffer, model, loss, samples)
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and g.dtype == torch.bfloat16 for g in grads)
    assert torch.equal(whole.total, flatten([g for g in grads if g is not None], torch.float32))
    other = whole.clone()
    other.vector.mul_(1003)  # as if of many workers: this count does not fit into bfloat16
    assert other.count == 1003 * ROWS
    means = other.total / other.count
    buffer.load(other)
    assert torch.equal(flatten([p.grad for p in model.parameters() if p.grad is not None], torch.float32),
                       means.to(torch.bfloat16).float())  # fmt: skip


def test_parameters_outside_the_buffer_keep_no_gradient() -> None:
    model, loss, samples = problem()
    first, last = model[0], model[2]
    first.requires_grad_(False)
    buffer = GradientBuffer(list(last.parameters()))
    buffer.load(backward(buffer, model, loss, samples))
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in last.parameters())


def test_a_parameter_used_twice_gets_the_gradient_of_both_uses() -> None:
    shared = nn.Linear(4, 4, bias=False).double()
    samples = Samples(torch.randn(ROWS, 4, dtype=torch.float64), torch.randn(ROWS, 4, dtype=torch.float64))
    model = nn.Sequential(shared, nn.Tanh(), shared)
    loss = summing_form(nn.MSELoss(reduction="sum"), samples.inputs, samples.targets)
    (expected,) = torch.autograd.grad((model(samples.inputs) - samples.targets).pow(2).sum(), [shared.weight])
    buffer = GradientBuffer(list(model.parameters()))
    assert torch.allclose(backward(buffer, model, loss, samples).total, expected.flatten(), rtol=1e-12)


def test_a_model_gets_its_inputs_as_one_several_or_named_arguments() -> None:
    class Difference(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
            return a if b is None else a - b

    one, two = torch.tensor([5.0]), torch.tensor([3.0])
    assert call_model(Difference(), one) == 5
    assert call_model(Difference(), (one, two)) == 2
    assert call_model(Difference(), {"b": one, "a": two}) == -2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_alone_the_sum_is_brought_together_only_if_somebody_asks(dtype: torch.dtype) -> None:
    model, loss, samples = problem(dtype)
    buffer = GradientBuffer(list(model.parameters()))
    among = backward(buffer, model, loss, samples).clone()
    buffer.live_in(torch.zeros(buffer.numel, dtype=buffer.dtype), alone=True)
    alone = backward(buffer, model, loss, samples)
    assert alone.is_late == (dtype != torch.bfloat16)  # that is summed in another type, so it must be copied
    assert (alone.count, alone.loss_sum, alone.votes) == (among.count, among.loss_sum, 0.0)
    assert alone.used == among.used
    assert torch.equal(alone.vector, among.vector)
    assert not alone.is_late
    said = buffer.load(alone)
    again = backward(buffer, model, loss, samples)
    assert buffer.load(again) == said  # without a look at the sum
    assert torch.equal(flatten([p.grad for p in model.parameters() if p.grad is not None], buffer.dtype),
                       (among.total / ROWS).to(dtype).to(buffer.dtype))  # fmt: skip
    assert torch.equal(again.total, among.total / ROWS)


class Forked(nn.Module):
    """One of two layers is used, and rows of a table that gives sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.left if bool(x[0] > 0) else self.right)(self.table(x))


@pytest.mark.parametrize("alone", [False, True], ids=["among others", "alone"])
def test_what_a_batch_does_not_reach_has_no_gradient_and_sparse_ones_are_dense(alone: bool) -> None:
    model = Forked().double()
    buffer = GradientBuffer(list(model.parameters()))
    buffer.live_in(torch.zeros(buffer.numel, dtype=torch.float64), alone=alone)
    targets = torch.tensor([0, 1, 2])
    loss = summing_form(nn.CrossEntropyLoss(), torch.zeros(3, 3), targets)
    for first, used, unused in ((1, model.left, model.right), (0, model.right, model.left)):
        samples = Samples(torch.tensor([first, 3, 3]), targets)
        whole = backward(buffer, model, loss, samples)
        buffer.load(whole)
        assert unused.weight.grad is None
        assert used.weight.grad is not None
        assert model.table.weight.grad is not None
        assert not model.table.weight.grad.is_sparse
        assert model.table.weight.grad.abs().sum(1).bool().tolist() == [row in (first, 3) for row in range(5)]
        plain = nn.functional.cross_entropy(model(samples.inputs), targets)
        expected = torch.autograd.grad(plain, [model.table.weight, used.weight])
        assert torch.allclose(model.table.weight.grad, expected[0].to_dense(), rtol=1e-12)
        assert torch.allclose(used.weight.grad, expected[1], rtol=1e-12)
        assert whole.used == [1.0 if p.grad is not None else 0.0 for p in model.parameters()]


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("cut", [(0, 10), (3, 31), (24, 30), (25, 26), (0, 51), (51, 51)], ids=str)
def test_a_slice_that_nobody_else_reads_stays_where_it_is_made(forked: bool, cut: tuple[int, int]) -> None:
    model, loss, samples = problem()
    if forked:
        model, targets = Forked().double(), torch.tensor([0, 1, 2])
        loss, samples = summing_form(nn.CrossEntropyLoss(), torch.zeros(3, 3), targets), Samples(targets, targets)
    buffer = GradientBuffer(list(model.parameters()))
    expected = backward(buffer, model, loss, samples).clone()
    where = slice(*(min(edge, len(expected.total)) for edge in cut))
    buffer.live_in(torch.zeros(buffer.numel, dtype=torch.float64), kept=where)
    part = backward(buffer, model, loss, samples)
    vector, pieces = buffer.detach_slice(part)
    if where.start == where.stop:
        assert pieces is None
    else:
        assert pieces is not None
        assert torch.equal(torch.cat(pieces), expected.total[where])
        assert not vector[where].any()
        vector[where] = expected.total[where]
    assert torch.equal(vector, expected.vector)
    assert part.vector is vector  # and nothing is brought there any more
    again = backward(buffer, model, loss, samples)
    again.vector[where] = again.vector[where]  # who asks gets all of it
    assert torch.equal(again.vector, expected.vector)
    assert buffer.detach_slice(again)[1] is None


def test_what_is_kept_apart_is_the_gradient_of_all_backward_passes() -> None:
    class Twice(nn.Module):
        """Has its gradient accumulated in two goes: each call is computed again within the backward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone().requires_grad_()
            return checkpoint(self.layer, x, use_reentrant=True) + checkpoint(self.layer, 2 * x, use_reentrant=True)

    class Strided(nn.Module):
        """Has a gradient that does not lie end to end."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3))
            self.weight.register_post_accumulate_grad_hook(self.turn)

        def turn(self, weight: torch.Tensor) -> None:
            assert weight.grad is not None
            weight.grad = weight.grad.t().contiguous().t()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    _, loss, samples = problem()
    for model in (Twice().double(), Strided().double()):
        parameters = list(model.parameters())
        buffer = GradientBuffer(parameters)
        expected = backward(buffer, model, loss, samples).clone()
        buffer.live_in(torch.zeros(buffer.numel, dtype=torch.float64), kept=slice(2, 9))
        vector, pieces = buffer.detach_slice(backward(buffer, model, loss, samples))
        assert pieces is not None
        assert torch.equal(torch.cat(pieces), expected.total[2:9])
        assert torch.equal(vector[9:], expected.vector[9:])
        assert torch.equal(vector[:2], expected.vector[:2])


LAYOUTS = {
    "row by row": lambda w: w,
    "column by column": lambda w: w.t().contiguous().t(),
    "with gaps": lambda w: torch.cat([w, w], 1)[:, ::2],
}


@pytest.mark.parametrize("alone", [False, True], ids=["among others", "alone"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gradient_lies_as_torch_would_lay_it(name: str, alone: bool) -> None:
    model, loss, samples = problem()
    loss = loss.knowing(samples.targets)  # a mean
    first = model[0]
    with torch.no_grad():
        first.weight = nn.Parameter(LAYOUTS[name](first.weight.detach()))
    loss(model(samples.inputs), samples.targets).value.backward()
    strides = [p.grad.stride() for p in model.parameters()]
    expected = [p.grad.clone() for p in model.parameters()]
    buffer = GradientBuffer(list(model.parameters()))
    buffer.live_in(buffer.fresh_vector(), alone=alone)
    buffer.load(backward(buffer, model, loss, samples))
    for parameter, stride, gradient in zip(model.parameters(), strides, expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.stride() == stride
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=0)
