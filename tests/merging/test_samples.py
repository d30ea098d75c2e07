"""What a descent learns from, its optimizers, and coefficients that are functions of what is free."""

import pytest
import torch
from coloured import separable
from samples import IMAGES, drawn
from torch.func import functional_call

from merging.errors import UserError
from merging.fit import CrossEntropy, Descent
from merging.fit.coefficients import Coefficients, Shape, chunked, columns, combination
from merging.fit.descent import descend
from merging.fit.samples import first, opened


class TestSamples:
    def test_few_are_the_first_of_every_class(self):
        labels = torch.tensor([2, 0, 2, 2, 0, 1])
        assert first(labels, 2).tolist() == [0, 1, 2, 4, 5]
        assert first(labels.float(), 2).tolist() == [0, 1]
        with pytest.raises(UserError, match="no sample to learn from"):
            first(labels[:0], 1)

    def test_parts_are_rows_of_the_whole(self):
        _, context = separable()
        whole = opened(context, "calibration", "labels")
        few, alone = whole.few(2), whole.of_task(1)
        assert whole.few(None) is whole and whole.few(IMAGES).data.sizes == whole.data.sizes
        for task, (labels, known) in enumerate(zip(whole.labels, few.labels, strict=True)):
            rows = first(labels, 2)
            assert torch.equal(known, labels[rows]) and few.data.sizes[task] == len(rows)
            images = few.data.inputs(task, torch.arange(len(rows)))
            assert torch.equal(images, whole.data.inputs(task, rows))
        assert torch.equal(alone.data.inputs(0, torch.arange(5)), whole.data.inputs(1, torch.arange(5)))
        assert alone.data.heads == whole.data.heads[1:2] and torch.equal(alone.labels[0], whole.labels[1])
        assert len({*whole.data.ids, *few.data.ids, *alone.data.ids}) == 7

    def test_without_labels_few_are_the_first_of_all(self):
        _, context = separable()
        few = opened(context, "calibration", "inputs").few(5)
        assert few.data.sizes == (5, 5, 5) and not few.labels
        assert context.opened.splits == {"calibration": ["the method"]}


class Line:
    """Learnable: the logits of every image are what is free, and their squares a penalty."""

    def __init__(self, tasks):
        self.tasks, self.free = tasks, drawn(8).requires_grad_()

    def parameters(self):
        return [self.free]

    def features(self, inputs):
        return [self.free.expand(len(some), -1) for some in inputs]

    def penalty(self):
        return 10 * self.free.square().sum()

    def after(self):
        """Autograd has done all."""


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_a_descent_equals_a_plain_loop(name, kind):
    experts, context = separable()
    samples = opened(context, "calibration", "labels").few(2)
    train = Descent((CrossEntropy(2.0),), 4, None, 0.05, "constant", 0.3, name, 0.5)
    model, free = Line(experts.tasks), drawn(8).requires_grad_()
    descend(model, context, experts, train, "calibration", samples=samples)
    optimizer = kind([free], lr=0.05, weight_decay=0.3)
    for _ in range(4):
        loss = 10 * free.square().sum()
        for head, labels in zip(samples.data.heads, samples.labels, strict=True):
            logs = head(free.expand(len(labels), -1)).log_softmax(1)
            loss = loss - 2 * logs[torch.arange(len(labels)), labels].mean()
        optimizer.zero_grad()
        loss.backward()
        free.grad *= min(1.0, 0.5 / float(free.grad.norm()))
        optimizer.step()
    assert torch.allclose(model.free, free, rtol=1e-4, atol=1e-5) and not torch.allclose(free, drawn(8), atol=0.01)


def test_labels_that_are_numbers_are_met_by_their_squares():
    from merging.fit.objectives import Batch

    batch = Batch(drawn(6, 1), lambda x: 2 * x, lambda: torch.arange(6.0), lambda: drawn(6, 1))
    assert float(CrossEntropy()(batch)) == pytest.approx(float((2 * drawn(6) - torch.arange(6)).square().mean()))


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_chunks_are_flat_and_cover_a_parameter(count):
    tau, values = drawn(3, 4, 5), drawn(3, count, seed=1)
    pieces = chunked(tau, count)
    assert torch.equal(torch.cat(pieces, 1), tau.flatten(1))
    of_entry = torch.arange(20) // -(-20 // count)
    expected = (values[:, of_entry] * tau.flatten(1)).sum(0).view(4, 5)
    assert torch.allclose(combination(values, tau), expected, atol=1e-6)


@pytest.mark.parametrize("made", [torch.sigmoid, lambda free: free.softmax(0)])
def test_the_gradient_goes_through_what_makes_the_coefficients(made):
    """Autograd through task vectors, with several chunks a parameter and a penalty."""
    experts, context = separable()
    count = {key: 1 + index % 3 for index, key in enumerate(experts.specs())}
    column = columns(experts, chunks=count)
    start = drawn(3, max(one.stop for one in column.values()))
    shape = Shape(column, start, made, penalty=lambda values: values.square().sum())
    data = context.unlabelled()
    model = Coefficients(experts, data, experts.stream, shape)
    inputs = [data.inputs(task, torch.arange(4)) for task in range(3)]

    def loss(features):
        return sum(some.square().mean() for some in features)

    (loss(model.features(inputs)) + model.penalty()).backward()
    model.after()
    free = start.clone().requires_grad_()
    weights = {key: experts.base(key) + combination(made(free)[:, column[key]], experts.tau(key)) for key in column}
    features = [functional_call(model.module, weights, some) for some in inputs]
    (loss(features) + made(free).square().sum()).backward()
    assert torch.allclose(model.free.grad, free.grad, rtol=1e-3, atol=1e-5)
    assert torch.allclose(model.learned, made(start))
