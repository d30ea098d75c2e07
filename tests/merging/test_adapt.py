"""Training of gates on three tasks whose images differ in colour: what is touched, what is seen, what is learned."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from coloured import BLOCK, EARLY, NAMES, PARTS, PASS, QUICK, SHARED, TWIN, WEMOE, coloured, fitted, separable
from samples import BACKBONE, IMAGES, Made
from torch.nn import functional

from merging.calibration import expert_features
from merging.context import ALONE, Context
from merging.errors import UserError
from merging.fit.gates import Gradient, Learned, Oracle, TaskId
from merging.fit.objectives import Entropy, FeatureDistillation, MarginalEntropy, marginal_entropy, mean_entropy
from merging.merged import Routing
from merging.methods import Duet, RankOneMoe, Twin, Wemoe
from merging.routing.gates import Gate, listening
from merging.routing.install import install
from tasks.heads.head import ZeroShot

SHAPES = [pytest.param(shape, id=shape.sees + shape.shared * " shared") for shape in (BLOCK, EARLY, PASS, SHARED)]


def routed_right(merged):
    """Share of held-out images whose largest weight, mean of all gates, is that of their task."""
    model, right = install(BACKBONE.build(), merged), 0
    for task in range(PARTS):
        with torch.inference_mode(), listening() as heard:
            model(coloured(task, 9))
        mean = torch.stack(
            [w.expand(IMAGES, -1) if w.ndim == 1 else w.mean(1) if w.ndim == 3 else w for w in heard]
        ).mean(0)
        right += int((mean.unflatten(1, (PARTS, -1)).sum(2).argmax(1) == task).sum())
    return right / (PARTS * IMAGES)


class TestTaskId:
    @pytest.mark.parametrize("shape", [
        BLOCK, EARLY, PASS, SHARED, WEMOE, TWIN, replace(BLOCK, top_k=1), replace(EARLY, top_k=1),
        replace(BLOCK, activation="sigmoid", features="cls"), replace(BLOCK, features="mean", granularity="token"),
        replace(BLOCK, activation="sigmoid", top_k=1), replace(BLOCK, activation="none", top_k=1),
    ], ids=str)  # fmt: skip
    def test_separable_tasks_are_routed_right(self, shape):
        """Hard routing too: its weights are constants, but the gate is fitted before they are cut."""
        assert routed_right(fitted(shape, TaskId(steps=60))) >= 0.98

    @pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none", "soft_top_k"])
    def test_several_parts_per_task(self, activation):
        assert routed_right(fitted(replace(BLOCK, activation=activation), TaskId(60), RankOneMoe(2))) >= 0.98

    @pytest.mark.parametrize("routes", ["ffn", "all"])
    def test_a_gate_is_fitted_on_what_the_gates_before_it_route(self, routes):
        """The second gate's statistics are those of tokens that the first, trained gate let through."""
        merged = fitted(method=Duet(routes, static=False))
        model, gates = install(BACKBONE.build(), merged), merged.routing.gates
        assert len(gates) == 2
        x = torch.cat([coloured(task) for task in range(PARTS)])
        shown = tokens_shown(model, x, lambda index, tokens: gates[index](tokens))
        assert_standardised(gates[0], shown[0])
        assert_standardised(gates[1], shown[1])
        other = Gate(16, PARTS, BLOCK).eval()
        with pytest.raises(AssertionError):
            assert_standardised(gates[1], tokens_shown(model, x, lambda _, tokens: other(tokens))[1])

    def test_a_shared_gate_sees_every_block_under_the_true_task(self):
        merged = fitted(SHARED)
        assert len(merged.routing.gates) == 1
        model, seen = install(BACKBONE.build(), merged), []
        for task, w in enumerate(torch.eye(PARTS)):
            seen += tokens_shown(model, coloured(task), lambda _, tokens, w=w: w).values()
        assert_standardised(merged.routing.gates[0], torch.cat(seen))

    def test_the_last_loss_of_every_gate_is_logged(self):
        heard = []
        fitted(log=lambda values, step: heard.append((step, values)))
        assert [step for step, _ in heard] == [0, 1] and all(values.keys() == {"router/task_id"} for _, values in heard)
        assert all(0 < values["router/task_id"] < 0.3 for _, values in heard)


@torch.no_grad()
def tokens_shown(model, x, weigh):
    """What the gate of each block is shown where `weigh`(block, tokens) decides in its place."""
    shown = {}
    model.observed(lambda index, tokens: weigh(index, shown.setdefault(index, tokens)), x)
    return shown


def assert_standardised(gate, tokens):
    features = gate.features(tokens)
    assert torch.allclose(gate.mean, features.mean(0), rtol=0, atol=1e-5)
    assert torch.allclose(gate.std, features.std(0, correction=0), rtol=0, atol=1e-5)


class TestPasses:
    @pytest.mark.parametrize(("shape", "times"), [(BLOCK, 1), (EARLY, 1), (PASS, 2)])
    def test_only_a_gate_that_sees_the_last_tokens_runs_the_blocks_twice(self, shape, times):
        model, calls = install(BACKBONE.build(), fitted(shape)), Counter()
        for block in model.blocks:
            block.module.ln_1.register_forward_hook(lambda *_, name=block.name: calls.update([name]))
        with torch.inference_mode():
            model(coloured(0)[:3])
        assert calls == {block.name: times for block in model.blocks}

    @pytest.mark.parametrize("shape", [EARLY, PASS])
    def test_weights_are_those_of_a_static_pass(self, shape):
        """Early: of the tokens before the first routed block; pass: of the last tokens of the shared expert."""
        merged, x = fitted(shape, method=Twin(start=1, keep=1.0)), coloured(1)
        model = install(BACKBONE.build(), merged)
        static = install(BACKBONE.build(), replace(merged, deltas={}, routing=None))
        with torch.inference_mode(), listening() as heard:
            features = model(x)
            tokens = static.tokens(("enter", 1) if shape is EARLY else ("leave", 1), x)
            expected = merged.routing.gates[0](tokens)
            assert torch.allclose(heard[0], expected, rtol=0, atol=1e-6)
            assert torch.equal(model.weights(x), heard[0])
            assert torch.allclose(model(x, w=expected), features, rtol=0, atol=1e-5)


ALL = [Entropy(1), MarginalEntropy(0.5), FeatureDistillation(1)]
TRAINED = [QUICK, Gradient(steps=3, lr=0.01, batch=4), Gradient(ALL, 3, 4, 0.01, warm_up=QUICK)]


@pytest.mark.parametrize("train", TRAINED, ids=["task id", "entropy", "all"])
class TestAnyTraining:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_gates_alone_are_touched(self, train, shape):
        experts, context = separable()
        merged = Duet()(experts, context)
        before = [tensor.clone() for tensor in frozen(merged, experts)]
        trained, _ = Learned(gate=shape, train=train).fit(merged, experts, context)
        assert all(map(torch.equal, before, frozen(trained, experts)))
        assert all(map(torch.equal, before, frozen(merged, experts)))
        fresh = [Gate(16, PARTS, shape).std for _ in trained.routing.gates]
        assert not any(torch.equal(gate.std, std) for gate, std in zip(trained.routing.gates, fresh, strict=True))
        model = install(BACKBONE.build(), trained)
        assert {id(each) for each in model.gates.parameters()} == {
            id(each) for each in trained.routing.gates.parameters()
        }
        assert not any(each.requires_grad for each in model.parameters()) and not any(
            gate.training for gate in trained.routing.gates
        )
        assert merged.routing == Routing("learned", init=0.3) and trained.routing.router == "task_id"

    @pytest.mark.parametrize("shape", [BLOCK, TWIN])
    def test_a_seed_decides_everything(self, train, shape):
        torch.manual_seed(1)
        first = fitted(shape, train).routing.gates.state_dict()
        torch.manual_seed(2)
        state = torch.get_rng_state()
        again, other = (fitted(shape, train, seed=seed).routing.gates.state_dict() for seed in (0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["0.net.0.weight"], other["0.net.0.weight"])


def frozen(merged, experts):
    """All that training must leave as it is."""
    checkpoints = (experts.origin, *experts.checkpoints)
    yield from (checkpoint.tensor(key) for checkpoint in checkpoints for key in merged.specs)
    yield from (tensor for delta in merged.deltas.values() for tensor in delta.buffers())
    yield from (*merged.shared.values(), *merged.fixed.values())


class TestGradient:
    @pytest.mark.parametrize("objective", [Entropy(), MarginalEntropy(), FeatureDistillation()])
    def test_every_objective_lowers_itself(self, objective):
        heard, train = [], Gradient([objective], steps=40, batch=IMAGES, lr=0.03)
        log = lambda values, step: heard.append(values[f"router/{objective.name}"])  # noqa: E731
        fitted(replace(BLOCK, activation="none"), train, log=log)
        assert len(heard) == 40 and heard[-1] < heard[0] - 1e-3
        assert sum(later < earlier for earlier, later in pairwise(heard)) > 30

    @pytest.mark.parametrize("granularity", ["sample", "batch", "mixed"])
    def test_the_loss_is_a_sum_over_tasks(self, granularity):
        """Terms of the first step, by separate passes; batch: a w for each task's images, mixed: one for all."""
        (experts, context), heard = separable(), []
        shape = replace(BLOCK, granularity=granularity, features="mean")
        train = Gradient([Entropy(), MarginalEntropy(), FeatureDistillation()], 1, IMAGES, 1e-9, warm_up=QUICK)
        merged = fitted(shape, train, log=lambda values, step: heard.append(values), given=(experts, context))
        model, calibration = install(BACKBONE.build(), merged), context.unlabelled()
        targets, images = expert_features(experts.checkpoints, calibration), [coloured(task) for task in range(PARTS)]
        with torch.inference_mode():
            together = model(torch.cat(images)).split(IMAGES)
            found = together if granularity == "mixed" else [model(each) for each in images]
        found = [functional.normalize(each, dim=1) for each in found]
        logits = [calibration.outputs(task, each) for task, each in enumerate(found)]
        gaps = [1 - functional.cosine_similarity(*pair).mean() for pair in zip(found, targets, strict=True)]
        assert heard[-1]["router/entropy"] == pytest.approx(float(sum(map(mean_entropy, logits))), abs=1e-4)
        assert heard[-1]["router/marginal"] == pytest.approx(-float(sum(map(marginal_entropy, logits))), abs=1e-4)
        assert heard[-1]["router/distillation"] == pytest.approx(float(sum(gaps)), abs=1e-4)
        assert torch.allclose(together[0], model(images[0]), atol=1e-5) == (granularity == "sample")

    def test_starts_where_the_warm_up_ended(self):
        steps = []
        warm = fitted(train=Gradient(warm_up=QUICK, steps=1, lr=1e-9), log=lambda values, step: steps.append([*values]))
        plain, alone = fitted(train=Gradient(steps=1, lr=1e-9)), fitted()
        for shape, gates in ((True, alone.routing.gates), (False, plain.routing.gates)):
            weights = zip(warm.routing.gates, gates, strict=True)
            assert all(torch.allclose(a.net[0].weight, b.net[0].weight, atol=1e-6) == shape for a, b in weights)
        assert [names[0] for names in steps] == ["router/task_id", "router/task_id", "router/entropy"]
        assert float(plain.routing.gates[1].mean.abs().max()) > 0.01  # standardised without a warm-up too

    @pytest.mark.parametrize("schedule", ["cosine", "constant"])
    def test_first_step_of_adam(self, schedule):
        """Its size is the learning rate for every entry with a gradient, whatever the schedule."""
        start = fitted(train=Gradient(steps=1, lr=1e-12)).routing.gates
        moved = fitted(train=Gradient(steps=1, lr=0.01, schedule=schedule)).routing.gates
        change = (moved[0].net[0].weight - start[0].net[0].weight).abs()
        assert float(change.median()) == pytest.approx(0.01, rel=1e-3)

    def test_a_collapse_is_told(self):
        """Of two classes all images are of one, and entropy makes that more certain still."""
        experts, context = separable()

        def unlabelled(split):
            made = context.unlabelled(split)
            means = [each.mean(0) for each in expert_features(experts.checkpoints, made)]
            return replace(made, heads=tuple(ZeroShot(torch.stack([2 * mean, -2 * mean])) for mean in means))

        router = Learned(gate=replace(BLOCK, activation="none"), train=Gradient(steps=20, lr=0.03, batch=8))
        told = router.fit(Wemoe()(experts), experts, Context(Made(unlabelled)))
        assert told[1] == list(NAMES)
        assert Learned(train=QUICK).fit(Wemoe()(experts), experts, context)[1] == []


class TestBadInput:
    @pytest.mark.parametrize("shape", [BLOCK, EARLY])
    def test_a_stem_that_is_routed(self, shape):
        with pytest.raises(UserError, match=r"sees=(block|early) cannot weigh what comes before .* method.start=0"):
            fitted(shape, method=Twin(start=None))
        assert fitted(PASS, method=Twin(start=None)).routing.gate == PASS

    def test_no_images(self):
        experts, _ = separable()
        with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
            Learned("mine").fit(Wemoe()(experts), experts, ALONE)

    def test_a_loss_that_is_not_finite(self):
        experts, context = separable()
        heads = (ZeroShot(torch.full((5, 8), torch.nan)),) * 3
        broken = Context(Made(lambda split: replace(context.unlabelled(split), heads=heads)))
        with pytest.raises(UserError, match=r"is nan at step 0: lower train.lr=0.0001"):
            fitted(train=Gradient(steps=2), given=(experts, broken))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("train", [QUICK, Gradient(steps=1)])
    def test_features_that_are_not_finite(self, shape, train):
        experts, context = separable()
        merged = Wemoe()(experts).scaled(torch.inf)
        with pytest.raises(UserError, match="gives NaN or Inf on the samples that train its gates"):
            Learned(gate=shape, train=train).fit(merged, experts, context)

    def test_hard_routing_has_no_gradient(self):
        with pytest.raises(UserError, match=r"top_k=1 gives one-hot weights.*router=task_id"):
            Learned(gate=replace(BLOCK, top_k=1), train=Gradient())

    @pytest.mark.parametrize("kind", [TaskId, Gradient])
    @pytest.mark.parametrize(("wrong", "value"), [("steps", 0), ("batch", 0), ("lr", 0.0), ("lr", 1.5)])
    def test_numbers_out_of_range(self, kind, wrong, value):
        with pytest.raises(UserError, match=rf"train.{wrong}={value} is out of range"):
            kind(**{wrong: value})

    def test_unknown_schedule(self):
        with pytest.raises(UserError, match=r"schedule='linear' is unknown. Choose one of cosine, constant"):
            Gradient(schedule="linear")


@pytest.mark.parametrize("split", ["calibration", "test"])
def test_the_split_that_trained_a_router_is_on_record(split):
    experts, context = separable()
    merged, _ = Learned("mine", train=QUICK, split=split).fit(Wemoe()(experts), experts, context.acting("mine"))
    assert (
        context.opened.splits == {split: ["mine"]}
        and merged.routing.adaptation == split
        and merged.routing.router == "mine"
    )


def test_the_oracle_learns_nothing():
    experts, context = separable()
    merged, suspected = Oracle().fit(Wemoe()(experts), experts, context)
    assert merged.routing == Routing("oracle") and merged.routing.by_task and suspected == []
    assert context.opened.splits == {}
    assert merged.routing.params == 0
