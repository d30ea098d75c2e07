"""FlexSwitch and the learned metric of Auto-FlexSwitch, against the known steps and by algebra."""

from dataclasses import replace

import published_switch as published
import pytest
import torch
from coloured import PARTS, PASS, coloured, fitted, separable
from samples import BACKBONE, SHAPES, drawn, lasting, models, task_vectors
from test_learned import of_experts
from torch.func import functional_call

from merging import UserError, merge, open_merged
from merging.deltas import Dense, Scattered
from merging.deltas.scattered import Form
from merging.fit.gates import Retrieval
from merging.fit.metric import learned_metric, missed
from merging.fit.switches import WIDTHS, start
from merging.methods import FlexSwitch, TSwitch
from merging.methods.flex_switch import stored
from merging.routing.install import install
from merging.routing.neighbours import Neighbours

NEAREST = replace(PASS, features="cls", activation="none", standardise=False, neighbours=5)


def short(steps=3, lr=0.05, batch=None, **options):
    method = FlexSwitch(**options)
    return replace(method, train=replace(method.train, steps=steps, lr=lr, batch=batch, schedule="constant"))


def divergence(experts, data, task):
    """KL from the expert, as a function of all weights."""
    module, inputs = BACKBONE.build(), data.inputs(task, torch.arange(data.sizes[task]))
    base, taus = of_experts(experts)
    own = {key: base[key] + taus[key][task] for key in base}

    def logs(weights):
        return data.outputs(task, functional_call(module, weights, inputs)).log_softmax(1)

    expert = logs(own).detach()
    return lambda weights: (expert.exp() * (expert - logs(weights))).sum(1).mean()


def switches(threshold, bits, scale=1.0):
    """What is learned of a parameter, as if it had been."""
    return torch.tensor([threshold, scale, *(float(bits == width) for width in WIDTHS)])


class TestSteps:
    @pytest.mark.parametrize(("bits", "penalty"), [(1, 0.0), (4, 0.5)])
    def test_equals_the_described_steps(self, bits, penalty):
        experts, context = separable()
        merged = short(density=0.3, bits=bits, penalty=penalty)(experts, context)
        data, (base, taus) = context.unlabelled(), of_experts(experts)
        for task in range(PARTS):
            own = {key: tau[task].double() for key, tau in taus.items()}
            known = published.flex_switch(divergence(experts, data, task), base, own, 0.3, bits, 0.1, penalty, 3, 0.05)
            found = {key: delta.mix(merged.one_hot(task)).double() for key, delta in merged.deltas.items()}
            apart = sum(int((found[key] - known[key][0]).abs().gt(1e-5).sum()) for key in known)
            assert apart <= 2e-3 * sum(tau.numel() for tau in own.values())  # next to a threshold, or between codes
            for key, delta in merged.deltas.items():
                assert isinstance(delta, Dense) or delta.forms[task].total == pytest.approx(known[key][1], rel=0.02)

    def test_learning_lowers_what_it_says_and_a_penalty_the_bytes(self):
        experts, context = separable()
        data = context.unlabelled()
        losses = {}
        for steps, lr in ((1, 1e-9), (9, 0.05)):
            merged = short(steps, lr, density=0.1, penalty=0.0)(experts, context)
            losses[steps] = [
                float(divergence(experts, data, task)(dict(merged.state(merged.one_hot(task)))))
                for task in range(PARTS)
            ]
        assert all(after < before for before, after in zip(losses[1], losses[9], strict=True))
        dear, cheap = (short(9, 0.05, penalty=penalty)(experts, context) for penalty in (0.0, 10.0))
        assert cheap.stored_bytes < dear.stored_bytes

    def test_a_task_is_learned_by_itself(self):
        experts, context = separable()
        merged = short()(experts, context)
        alone = replace(experts, tasks=experts.tasks[:1], checkpoints=experts.checkpoints[:1])
        single = short()(alone, replace(context, data=type(context.data)(alone)))
        (one,), (first, *_) = models(single), models(merged)
        assert all(torch.equal(one[key], first[key]) for key in one)

    def test_starts_at_the_largest_entries(self):
        change = drawn(24, 9)
        assert (start(change, 0.25, 4)[2:] == torch.tensor([0.0, 0.0, 1.0, 0.0])).all()
        kept = stored(change[None], [start(change, 0.25, 4)]).part(0) != 0
        assert int(kept.sum()) == 54 and change[kept].abs().min() > change[~kept].abs().max()
        signs = drawn(9, 9).sign()
        assert torch.equal(stored(signs[None], [start(signs, 0.1, 1)]).part(0), signs)  # equals stay


class TestStored:
    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0, 99.0])
    def test_keeps_the_norm_and_the_signs_of_what_it_keeps(self, bits, threshold):
        tau = drawn(2, 16, 16)
        delta = stored(tau, [switches(threshold, bits), switches(threshold, bits, -0.5)])
        for task, scale in enumerate((1.0, -0.5)):
            change = delta.part(task) / scale
            where = tau[task].abs() >= threshold * tau[task].square().mean().sqrt()
            assert torch.equal(change != 0, where) and (change * tau[task] >= 0).all()
            assert float(change.norm()) == pytest.approx(float((tau[task] * where).norm()), rel=1e-5)
            assert len(change[where].abs().unique()) <= 2 ** (bits - 1)

    def test_without_a_threshold_in_eight_bits_it_is_the_task_vector(self):
        tau = drawn(3, 40, 30)
        delta = stored(tau, [switches(0.0, 8)] * 3)
        for task, change in enumerate(tau):
            half, rms = (change.abs().max() - change.abs().min()) / 256, change.square().mean().sqrt()
            apart = (delta.part(task) - change).abs()  # by half a step and what the norm is made good by
            assert (apart <= half + (change.abs() + half) * half / rms + 1e-6).all()

    def test_one_bit_is_t_switch(self):
        base = {key: drawn(*shape, seed=1) for key, shape in SHAPES.items()}
        expert = {key: weight + drawn(*SHAPES[key], seed=2) for key, weight in base.items()}
        switched = merge(TSwitch(1.0), base, [expert])
        for key, tau in task_vectors(base, [expert]).items():
            if SHAPES[key]:
                found = stored(tau.float(), [switches(0.0, 1)]).part(0)
                assert torch.allclose(found, switched.deltas[key].part(0), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize("kept", [0, 1, 30, 400, 1000])
    def test_takes_the_fewest_bits_and_less_than_t_switch(self, bits, kept):
        form, (least, places) = Form.cheapest(1000, kept, bits), published.grouped(1000, kept, bits)
        assert form.total == least and Form(1000, kept, bits, places).total == least
        assert bits > 1 or kept > 900 or form.total < 2 * 1000
        tau = torch.zeros(1, 1000)
        tau[0, drawn(1000).argsort()[:kept]] = drawn(kept) + 1
        kept = int(tau.count_nonzero())
        delta = stored(tau, [switches(0.0, bits)])
        assert delta.bytes == -(-published.grouped(1000, kept, bits)[0] // 8) + 8 + 12

    def test_bytes_of_a_merge_are_the_sum_over_its_parameters(self):
        experts, context = separable()
        merged = short(1, 1e-9, density=0.4, bits=1)(experts, context)
        ternary = TSwitch(0.4)(experts)
        coded = {key: delta for key, delta in merged.deltas.items() if isinstance(delta, Scattered)}
        for delta in coded.values():
            counts = [int(delta.part(task).count_nonzero()) for task in range(PARTS)]
            bits = [published.grouped(delta.shape.numel(), count, 1)[0] for count in counts]
            assert delta.bytes == sum(-(-total // 8) for total in bits) + PARTS * (8 + 12)
        backbone = merged.stored_bytes - sum(delta.bytes for delta in merged.deltas.values())
        assert backbone == sum(tensor.nbytes for tensor in map(merged.base.tensor, merged.base.specs()))
        large = [key for key in coded if coded[key].shape.numel() > 400]
        assert large and all(coded[key].bytes < ternary.deltas[key].bytes for key in large)

    def test_a_reader_by_hand_finds_the_same(self):
        """Groups' counts, places and codes, of each the lowest bits of all numbers first."""
        tau = drawn(1, 13, 11) * (drawn(1, 13, 11, seed=1) > 1)
        delta = stored(tau, [switches(0.0, 4)])
        (form,), stream = delta.forms, delta.stream.tolist()
        flags = [byte >> bit & 1 for byte in stream for bit in range(8)]

        def numbers(count, width):
            planes = [[flags.pop(0) for _ in range(count)] for _ in range(width)]
            return [sum(plane[i] << bit for bit, plane in enumerate(planes)) for i in range(count)]

        counts = numbers(form.groups, form.places + 1)
        inside, codes = numbers(form.kept, form.places), numbers(form.kept, 4)
        change, (low, step) = torch.zeros(143), delta.levels[0].tolist()
        for group, count in enumerate(counts):
            for _ in range(count):
                code = codes.pop(0)
                change[(group << form.places) + inside.pop(0)] = (low + step * (code // 2)) * (-1) ** code
        assert form.places > 0 and torch.allclose(change.view(13, 11), delta.part(0))


class TestMetric:
    def test_identity_is_auto_switch(self):
        plain, metric, (samples, x) = Neighbours(6, 3, 4), Neighbours(6, 3, 4), (drawn(20, 6), drawn(7, 6, seed=1))
        weights = torch.eye(3)[torch.arange(20) % 3]
        plain.keep(samples, weights)
        metric.keep(samples, weights, torch.eye(6))
        assert torch.equal(plain(x), metric(x)) and metric.macs == plain.macs + 36
        turned = torch.linalg.qr(drawn(6, 6, seed=2))[0]
        metric.keep(samples, weights, 3 * turned)  # keeps the order of distances
        assert torch.equal(plain(x), metric(x))

    def test_brings_samples_of_a_task_together(self):
        tasks = torch.arange(3).repeat_interleave(30)
        told = torch.eye(3)[tasks] * 0.5
        samples, others = (
            torch.cat([told + drawn(90, 3, seed=s) / 8, 9 * drawn(90, 9, seed=s + 2)], 1) for s in (0, 1)
        )
        metric = learned_metric(samples, tasks, 4)
        right = [(tasks[torch.cdist(others @ L.T, samples @ L.T).argmin(1)] == tasks).float().mean()
                 for L in (torch.eye(12), metric)]  # fmt: skip
        assert metric.shape == (4, 12) and right[1] > right[0] + 0.2
        assert torch.equal(metric, learned_metric(samples, tasks, 4))

    def test_the_loss_is_that_of_its_formula(self):
        points, tasks, total = drawn(7, 2).double(), [0, 0, 1, 1, 1, 0, 2], 0.0
        for i in range(6):  # the last one is alone
            near = {j: float((-(points[i] - points[j]).square().sum()).exp()) for j in range(7) if j != i}
            own = sum(value for j, value in near.items() if tasks[j] == tasks[i])
            total -= float(torch.tensor(own / sum(near.values())).log())
        assert float(missed(points, torch.tensor(tasks))) == pytest.approx(total / 6, rel=1e-5)
        assert float(missed(points[-1:], torch.tensor([2]))) == 0.0

    def test_retrieves_and_is_saved(self, tmp_path):
        method, images = lasting(FlexSwitch(routed=True), 2), torch.cat([coloured(task, 1) for task in range(PARTS)])
        merged = fitted(NEAREST, Retrieval(9, rank=4), method)
        tasks = torch.arange(PARTS).repeat_interleave(len(images) // PARTS)
        (gate,) = merged.routing.gates
        assert gate.net[0].samples.shape == (PARTS * 9, 4) and gate.net[0].metric.shape == (4, 16)
        assert merged.routing.params == PARTS * 9 * (4 + PARTS) + 4 * 16 + 2 * 16
        again = open_merged(merged.save(tmp_path / "merged.safetensors"))
        with torch.inference_mode():
            model = install(BACKBONE.build(), merged)
            assert (model.weights(images).argmax(1) == tasks).float().mean() > 0.9
            assert torch.equal(install(BACKBONE.build(), again)(images), model(images))

    def test_more_directions_than_numbers_are_refused(self):
        with pytest.raises(UserError, match=r"router.train.rank=17 directions are more than the 16 numbers"):
            fitted(NEAREST, Retrieval(9, rank=17), TSwitch(routed=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "flex_switch: density=0.0"),
        ({"bits": 3}, "flex_switch: bits=3 is unknown. Choose one of 1, 2, 4, 8"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        FlexSwitch(**options)


def test_needs_inputs():
    experts, context = separable()
    with pytest.raises(UserError, match=r"uses unlabelled calibration inputs"):
        FlexSwitch()(experts, replace(context, data=None))
